# Everything runs in .venv, which the first target makes from a package index; no model hub is needed.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-slow lint types bench clean

demo: $(VENV)/ready
	$(RUN) demo/run.py

test: $(VENV)/ready
	HF_HUB_OFFLINE=1 $(RUN) -m pytest -m "not slow"

test-slow: $(VENV)/ready
	HF_HUB_OFFLINE=1 $(RUN) -m pytest -m slow

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/ready
	$(VENV)/bin/mypy

bench: $(VENV)/ready
	$(RUN) bench/merge.py --peft

# torch first and alone: a resolver that sees a range would take the newest, with gigabytes of CUDA.
$(VENV)/ready: pyproject.toml setup.py constraints.txt src/inlay/tuners/_kernel.c
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build

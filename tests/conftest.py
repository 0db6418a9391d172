"""What every test shares: an offline hub, one torch thread, and tiny checkpoints built once a session."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from cases import Kit


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    """Bases, adapters and merged directories of `cases.py`, each built on first use. Read them, never write there."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    return Kit(tmp_path_factory.mktemp("kit"))


@pytest.fixture
def qwen2(kit: Kit) -> Path:
    """A sharded float32 Qwen2 with untied embeddings."""
    return kit.base("qwen2")


@pytest.fixture
def plain_lora(kit: Kit) -> Path:
    """A rank-4 LoRA on all linear layers of `qwen2`."""
    return kit.adapter("qwen2-plain")


@pytest.fixture(params=["kernel", "float64"])
def path_of_arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test twice: with the compiled kernel, and with INLAY_KERNEL=0."""
    monkeypatch.setenv("INLAY_KERNEL", "1" if request.param == "kernel" else "0")
    return str(request.param)

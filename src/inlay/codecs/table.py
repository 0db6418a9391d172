"""Which codecs there are. A file is imported when a checkpoint of its form is opened."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

# Their files, in the order in which they are tried; the names that plans have.
CODECS = (
    "bnb4", "bnb8", "gptq", "awq", "compressed_pack", "compressed_fp4", "compressed", "modelopt", "fp8",
    "mxfp4", "hqq", "mlx",
)  # fmt: skip


@cache
def codec(name: str) -> ModuleType:
    """The file of a codec; see `inlay.codecs` for what is in it."""
    return importlib.import_module(f"inlay.codecs.{name}")

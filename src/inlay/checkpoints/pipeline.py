"""A diffusers pipeline: a folder of models, and which files of each hold its weights.

    model_index.json                                       {"_class_name": …, component: [library, class], …}
    unet/diffusion_pytorch_model[.VARIANT].safetensors     a model of diffusers
    text_encoder/model[.VARIANT].safetensors               a model of transformers
    transformer/….safetensors.index[.VARIANT].json         one in several shards (older: ….VARIANT.index.json)

A variant (fp16, non_ema …) is a second copy of the weights. What loads without one is merged; where that does not
load, the only variant that does. A component that lacks the variant is loaded without it, as diffusers does.
Source: diffusers, pipelines/pipeline_loading_utils.py, `variant_compatible_siblings`; `_add_variant` in utils/.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from inlay.checkpoints.json_files import read_json_object
from inlay.errors import CheckpointError

MODEL_INDEX = "model_index.json"
_STEM = r"(?:diffusion_pytorch_model|pytorch_model|model)"
_KIND = r"(?P<kind>safetensors|bin)"
_FILES = (
    re.compile(rf"{_STEM}(?:\.(?P<variant>\w+))?\.{_KIND}"),
    re.compile(rf"{_STEM}\.{_KIND}\.index(?:\.(?P<variant>\w+))?\.json"),
    re.compile(rf"{_STEM}\.{_KIND}\.(?P<variant>\w+)\.index\.json"),
)
_ANY_COPY = re.compile(
    rf"{_STEM}\b.*\.(?:safetensors|bin|index(?:\.\w+)?\.json)|openvino_model\.(?:bin|xml)|weights\.pb"
)
_KINDS = ("safetensors", "bin")


def is_pipeline(directory: Path) -> bool:
    return (directory / MODEL_INDEX).is_file()


def class_name(directory: Path) -> str | None:
    """Name of the pipeline's class."""
    name = read_json_object(directory / MODEL_INDEX, CheckpointError).get("_class_name")
    return name if isinstance(name, str) else None


def is_copy_of_weights(name: str) -> bool:
    """Whether a file of a component holds its weights, in whatever variant or format."""
    return _ANY_COPY.fullmatch(name) is not None


def weights_of(directory: Path) -> dict[str, str]:
    """Component -> the file (or index) of the weights that are loaded, for every component that has any.

    Raises CheckpointError where that cannot be told.
    """
    found = {name: files for name in _components(directory) if (files := _by_variant(directory / name))}
    if not found:
        raise CheckpointError(f"{directory}: no component that {MODEL_INDEX} lists has weights that are known")
    variant = _variant(directory, found)
    return {name: files.get(variant) or files[""] for name, files in found.items()}


def _components(directory: Path) -> list[str]:
    where = directory / MODEL_INDEX
    index = read_json_object(where, CheckpointError)
    names = [name for name, value in index.items() if isinstance(value, list) and len(value) == 2 and value[1]]
    for name in names:
        if "/" in name or "\\" in name or "\0" in name or name in ("", ".", ".."):
            raise CheckpointError(f"{where}: {name!r} is not the name of a folder beside it")
    return [name for name in names if os.path.isdir(directory / name)]  # False for names that no file system holds


def _by_variant(folder: Path) -> dict[str, str]:
    """Variant ("" for none) -> its file: safetensors before .bin, one file before an index."""
    found: dict[str, tuple[int, int, str]] = {}
    for name in sorted(path.name for path in folder.iterdir() if path.is_file()):
        for sharded, pattern in enumerate(_FILES):
            if match := pattern.fullmatch(name):
                variant, rank = match["variant"] or "", (_KINDS.index(match["kind"]), sharded, name)
                found[variant] = min(found.get(variant, rank), rank)
    return {variant: rank[2] for variant, rank in found.items()}


def _variant(directory: Path, found: Mapping[str, Mapping[str, str]]) -> str:
    """The variant under which every component loads."""
    if all("" in files for files in found.values()):
        return ""
    variants = sorted({variant for files in found.values() for variant in files if variant})
    loading = [v for v in variants if all(v in files or "" in files for files in found.values())]
    if len(loading) == 1:
        return loading[0]
    have = "; ".join(f"{name} has {', '.join(v or 'no variant' for v in files)}" for name, files in found.items())
    why = f"{' and '.join(loading)} do" if loading else "none does"
    raise CheckpointError(
        f"{directory}: not every component loads without a variant, and of the variants {why} ({have}); leave the "
        "files of one variant in the folders, or add the missing ones"
    )

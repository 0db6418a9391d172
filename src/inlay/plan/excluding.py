"""What is said of codes, once some modules have none any more."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from inlay.checkpoints.checkpoint import Checkpoint
from inlay.checkpoints.decoded import OWN_FILES, quantisation
from inlay.checkpoints.json_files import read_json_object
from inlay.errors import CheckpointError
from inlay.keys import families
from inlay.plan.sidecars import CONFIG, of_codes


def less_codes(base: Checkpoint, modules: Sequence[str]) -> dict[str, dict[str, Any]]:
    """New values of a checkpoint in which these modules are no longer in codes: by file, then by dotted path.

    Every section and every file that describes the codes says the same.
    """
    method = (quantisation(base) or {}).get("quant_method")
    edits: dict[str, dict[str, Any]] = {CONFIG: {}}
    for path in of_codes(base.config):
        section: Any = base.config
        for name in path.split("."):
            section = section[name]
        edits[CONFIG][path] = _less(section, method, base, modules)
    for file in OWN_FILES:
        if (base.path / file).is_file():
            own = read_json_object(base.path / file, CheckpointError)
            made = _less(own, method, base, modules)
            edits[file] = {name: value for name, value in made.items() if value != own.get(name)}
    return {file: values for file, values in edits.items() if values}


def _less(config: Mapping[str, Any], method: str | None, base: Checkpoint, names: Sequence[str]) -> dict[str, Any]:
    """A description of the codes with these modules among those that it excludes."""

    def more(field: str, default: Sequence[str] = ()) -> dict[str, Any]:
        return {**config, field: [*(config.get(field) or default), *names]}

    for inner in ("quantization_config", "quantization"):  # the same, one level down
        if isinstance(config.get(inner), Mapping):
            return {**config, inner: _less(config[inner], method, base, names)}
    match method:
        case "compressed-tensors":
            return more("ignore")
        case "modelopt":
            return more("exclude_modules" if "exclude_modules" in config else "ignore")
        case "bitsandbytes":  # with a list of its own, transformers no longer leaves the head by itself
            return more("llm_int8_skip_modules", _in_floats(base))
        case "gptq":
            excluded = {**(config.get("dynamic") or {}), **{f"-:^{re.escape(n)}$": {} for n in names}}
            return {**config, "dynamic": excluded, "modules_in_block_to_quantize": [_in_blocks(base, names)]}
        case "auto-round":
            return {
                **config,
                "extra_config": {**(config.get("extra_config") or {}), **{n: {"bits": 16} for n in names}},
            }
        case "hqq":
            return more("skip_modules", _in_floats(base))
        case "mlx":
            return {**config, **dict.fromkeys(names, False)}
    return more("ignored_layers" if "ignored_layers" in config else "modules_to_not_convert")


def _in_blocks(base: Checkpoint, excluded: Sequence[str]) -> list[str]:
    """Modules in GPTQ's codes but for the excluded ones, from their block on.

    transformers (optimum) knows these names, which it compares with the ends of its own, and not `dynamic`.
    """
    coded = (key.removesuffix(".qweight") for key in base.tensors if key.endswith(".qweight"))
    return [re.sub(r"^.*?(\w+\.\d+\.)", r"\1", name) for name in coded if name not in excluded]


def _in_floats(base: Checkpoint) -> list[str]:
    """Modules with a matrix that is not in codes, embeddings apart."""
    coded = {key.rpartition(".")[0] for key, (_, t) in base.tensors.items() if not t.dtype.mergeable}
    names = (
        k.removesuffix(".weight") for k, (_, t) in base.tensors.items() if k.endswith(".weight") and len(t.shape) == 2
    )
    return [
        name
        for name in names
        if name not in coded and f"{name}.weight" not in coded and not families.is_embedding(name)
    ]

"""torchtune's own adapter file: `adapter_model.pt` (older: `adapter_0.pt`), beside an `adapter_config.json`.

    layers.0.attn.q_proj.lora_a.weight (r, in)      layers.0.mlp.w1.lora_b.weight (out, r)
    output.lora_a.weight                            layers.0.attn.q_proj.magnitude (out,)     DoRA

Modules are read under their names in Hugging Face's models. What else differs there (rows of q_proj and k_proj in
another order, fused tensors) depends on the family of the base: `inlay.keys.torchtune`.

torchtune writes the same adapter in PEFT's format beside it. That copy is not read where this one is there: it has
the rows of q_proj and k_proj reordered for every family, also for Qwen2, whose rows are not, and never those of
DoRA's magnitudes (torchtune 0.6, models/convert_weights.py, `tune_to_peft_adapter_weights`, and
training/checkpointing/_checkpointer.py).
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from inlay.adapters.peft_config import PeftConfig
from inlay.adapters.peft_names import FULL, PartName
from inlay.errors import AdapterError

FILES = re.compile(r"adapter_(?:model|\d+)\.pt")
WHAT_TO_GIVE = 'put an adapter_config.json with {"peft_type": "LORA", "r": …, "lora_alpha": …} of the recipe beside it'
_PARTS = {"lora_a.weight": "lora_A", "lora_b.weight": "lora_B", "magnitude": "magnitude"}
_NAME = re.compile(r"(?P<module>.+)\.(?P<part>lora_a\.weight|lora_b\.weight|magnitude)")
_LAYER = re.compile(r"layers\.(?P<number>\d+)\.(?P<module>(?:attn|mlp)\.\w+)")
MODULES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}


def own_file(directory: Path) -> str | None:
    """Name of torchtune's own file in a directory. Raises AdapterError where there are several epochs."""
    names = sorted(path.name for path in directory.glob("adapter_*.pt") if FILES.fullmatch(path.name))
    if len(names) > 1:
        raise AdapterError(f"{directory}: holds several adapters of torchtune ({', '.join(names)}); leave one")
    return names[0] if names else None


def parse_torchtune_name(key: str) -> PartName:
    """The module, under Hugging Face's name, and the part that `key` names."""
    found = _NAME.fullmatch(key)
    if found is None:
        return PartName(key, FULL)
    module, part = found["module"], _PARTS[found["part"]]
    if module == "output":
        return PartName("lm_head", part)
    layer = _LAYER.fullmatch(module)
    if layer is None or layer["module"] not in MODULES:
        return PartName(module, part)
    return PartName(f"model.layers.{layer['number']}.{MODULES[layer['module']]}", part)


def own_config(config: PeftConfig, has_magnitudes: bool) -> PeftConfig:
    """The config of the PEFT copy, as it is for the own file: the lists name other modules, DoRA is not said."""
    return replace(config, raw={}, use_dora=has_magnitudes)

"""Names of the original Stable Diffusion U-Net (`input_blocks.4.1…`) for the modules of diffusers' (`down_blocks.1.…`).

With L = `layers_per_block`, blocks i and layers j from 0:

    conv_in                            input_blocks.0.0            time_embedding.linear_1, _2   time_embed.0, .2
    down_blocks.i.resnets.j            input_blocks.(L+1)i+j+1.0   add_embedding.linear_1, _2    label_emb.0.0, .2
    down_blocks.i.attentions.j         input_blocks.(L+1)i+j+1.1   conv_out                      out.2
    down_blocks.i.downsamplers.0.conv  input_blocks.(L+1)(i+1).0.op
    mid_block.resnets.0, attentions.0, resnets.1                   middle_block.0, .1, .2
    up_blocks.i.resnets.j              output_blocks.(L+1)i+j.0
    up_blocks.i.attentions.j           output_blocks.(L+1)i+j.1
    up_blocks.i.upsamplers.0.conv      output_blocks.(L+1)i+L.n.conv, n = 2 where the block has attentions, else 1

and in a resnet conv1, conv2, time_emb_proj, conv_shortcut are in_layers.2, out_layers.3, emb_layers.1,
skip_connection. Source: diffusers, loaders/lora_conversion_utils.py, `_maybe_map_sgm_blocks_to_diffusers` and
`_convert_unet_lora_key`; scripts/convert_diffusers_to_original_stable_diffusion.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_LAYER = re.compile(
    r"(?P<way>down|up)_blocks\.(?P<block>\d+)\.(?P<kind>resnets|attentions)\.(?P<layer>\d+)\.(?P<rest>.+)"
)
_SAMPLER = re.compile(r"(?P<way>down|up)_blocks\.(?P<block>\d+)\.(?:down|up)samplers\.0\.conv")
_MIDDLE = re.compile(r"mid_block\.(?P<kind>resnets|attentions)\.(?P<layer>\d+)\.(?P<rest>.+)")
_UP_ATTENTIONS = re.compile(r"up_blocks\.(?P<block>\d+)\.attentions\..+")
_MIDDLE_PLACES = {("resnets", "0"): 0, ("attentions", "0"): 1, ("resnets", "1"): 2}


def original_names(modules: Iterable[str], layers_per_block: int) -> dict[str, str]:
    """Original name -> module, for those of `modules` that have one."""
    modules = list(modules)
    attending = {found["block"] for m in modules if (found := _UP_ATTENTIONS.fullmatch(m))}
    names = {module: _original(module, layers_per_block, attending) for module in modules}
    return {name: module for module, name in names.items() if name is not None}


def _original(module: str, layers: int, attending: set[str]) -> str | None:
    if module in _ENDS:
        return _ENDS[module]
    if found := _LAYER.fullmatch(module):
        first = (layers + 1) * int(found["block"]) + int(found["layer"])
        place = f"input_blocks.{first + 1}" if found["way"] == "down" else f"output_blocks.{first}"
        return _inside(place, found["kind"], int(found["kind"] == "attentions"), found["rest"])
    if found := _MIDDLE.fullmatch(module):
        number = _MIDDLE_PLACES.get((found["kind"], found["layer"]))
        return None if number is None else _inside("middle_block", found["kind"], number, found["rest"])
    if found := _SAMPLER.fullmatch(module):
        block = int(found["block"])
        if found["way"] == "down":
            return f"input_blocks.{(layers + 1) * (block + 1)}.0.op"
        return f"output_blocks.{(layers + 1) * block + layers}.{2 if found['block'] in attending else 1}.conv"
    return None


def _inside(place: str, kind: str, number: int, rest: str) -> str | None:
    """A module in a resnet or in an attention, which keeps its names."""
    if kind == "attentions":
        return f"{place}.{number}.{rest}"
    return f"{place}.{number}.{_RESNET[rest]}" if rest in _RESNET else None

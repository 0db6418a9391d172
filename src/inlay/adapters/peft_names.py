"""Names of the tensors in a PEFT adapter file.

    base_model.model.<module>.lora_A.weight            a pair for a module; Linear, Conv1D, Conv*d
    base_model.model.<module>.lora_B.weight | .bias
    base_model.model.<module>.lora_embedding_A | _B    a pair for an embedding
    base_model.model.<module>.lora_magnitude_vector    DoRA
    base_model.model.<module>.token_adapter.trainable_tokens_delta   rows of an embedding
    base_model.model.<module>.base_layer.weight        a full copy of a module that also has a pair
    base_model.model.<module>.token_adapter.weight     a full copy of an embedding that also has trained rows
    base_model.model.<module>.ln_tuning_layers.weight                a full copy of a norm (LN tuning)
    base_model.model.<module>.<part>, base_model.<part>              parts of other methods; see `tuners/`
    base_model.model.<module>.weight                   a full copy (modules_to_save, bias, resized embeddings)

Files saved through `state_dict()` instead of `save_pretrained` carry the adapter's name in addition
(`lora_A.default.weight`, `modules_to_save.default.weight`) and an untouched `original_module` copy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PREFIX = "base_model.model."

# One dotted word that may stand between a part and its `weight`: the name of the adapter.
_NAME = r"(?:\.(?P<name>(?!weight$|bias$)[^.]+))?"
_PARTS = (
    (re.compile(rf"(?P<module>.+)\.lora_A{_NAME}\.weight"), "lora_A"),
    (re.compile(rf"(?P<module>.+)\.lora_B{_NAME}\.weight"), "lora_B"),
    (re.compile(rf"(?P<module>.+)\.lora_B{_NAME}\.bias"), "lora_bias"),
    (re.compile(rf"(?P<module>.+)\.lora_embedding_A{_NAME}"), "lora_embedding_A"),
    (re.compile(rf"(?P<module>.+)\.lora_embedding_B{_NAME}"), "lora_embedding_B"),
    (re.compile(rf"(?P<module>.+)\.lora_diag{_NAME}"), "lora_diag"),
    (re.compile(rf"(?P<module>.+)\.lora_magnitude_vector{_NAME}(?:\.weight)?"), "magnitude"),
    (re.compile(rf"(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_delta{_NAME}"), "token_rows"),
)
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save(?:\.(?P<name>[^.]+))?\.(?P<leaf>.+)")
_BASE_LAYER = re.compile(
    r"(?P<module>.+?)\.(?:token_adapter\.base_layer|base_layer|token_adapter)\.(?P<leaf>weight|bias)"
)
_NORM = re.compile(r"(?P<module>.+)\.ln_tuning_layers(?:\.(?P<name>(?!weight$|bias$)[^.]+))?\.(?P<leaf>weight|bias)")
_ORIGINAL = re.compile(r".+\.original_module\..+")

FULL = "full"
ORIGINAL = "original"


@dataclass(frozen=True)
class PartName:
    """What a tensor is: a part of `module`, or a full copy of the tensor `module` (then with its leaf)."""

    module: str
    part: str
    adapter_name: str | None = None


def part_patterns(parts: Sequence[str], shared: Sequence[str]) -> tuple[re.Pattern[str], ...]:
    """Patterns for the parts of another method: `<module>.<part>`, and `base_model.<part>` for all modules."""
    patterns = []
    if parts:
        words = "|".join(re.escape(part) for part in sorted(parts, key=len, reverse=True))
        patterns.append(re.compile(rf"(?P<module>.+)\.(?P<part>{words}){_NAME}(?:\.weight)?"))
    if shared:
        words = "|".join(map(re.escape, shared))
        patterns.append(re.compile(rf"base_model\.(?P<module>)(?P<part>{words}){_NAME}(?:\.weight)?"))
    return tuple(reversed(patterns))


def parse_name(
    key: str, patterns: Sequence[re.Pattern[str]] = (), aliases: Mapping[str, str] | None = None
) -> PartName:
    """The module and part that `key` names; what fits no pattern is a full copy.

    `patterns` are those of another method than LoRA, `aliases` older names of its parts; a
    part that all modules share has the module "".
    """
    while key.startswith(PREFIX):  # old PEFT wrote the prefix twice for a wrapped model
        key = key[len(PREFIX) :]
    for pattern in patterns:
        if found := pattern.fullmatch(key):
            return PartName(found["module"], (aliases or {}).get(found["part"], found["part"]), found["name"])
    for pattern, part in _PARTS if not patterns else _PARTS[-1:]:
        if found := pattern.fullmatch(key):
            return PartName(found["module"], part, found["name"])
    if _ORIGINAL.fullmatch(key):
        return PartName(key, ORIGINAL)
    if found := _NORM.fullmatch(key) or _SAVED.fullmatch(key):
        return PartName(f"{found['module']}.{found['leaf']}", FULL, found["name"])
    if found := _BASE_LAYER.fullmatch(key):
        return PartName(f"{found['module']}.{found['leaf']}", FULL)
    return PartName(key, FULL)

"""LoRA files of image models: one file, no config. Names of kohya's trainers and of diffusers, of every age.

kohya (sd-scripts, LyCORIS, OneTrainer): one word for a module of a component, its dots turned to underscores

    lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight    (r, in, kernel…)
    ….lora_up.weight                                                 (out, r, 1…)
    ….alpha                                                          one number; scaling = alpha / r, 1 without it
    ….dora_scale                                                     (out, 1…) or (1, in…)
    ….hada_w1_a …, ….lokr_w1 …                                       LoHa, LoKr, as in PEFT

diffusers: the component, then the module

    unet.down_blocks.0.attentions.0.proj_in.lora_A.weight            | .lora_B.weight | .lora_magnitude_vector
    unet.….to_q.lora.down.weight, text_encoder.….lora_linear_layer.down.weight
    unet.….processor.to_q_lora.down.weight                           to_out_lora is to_out.0
    ….alpha                                                          as above, in old files

Since 0.34 the header of a diffusers file may hold the `LoraConfig` of each component, as JSON under
`lora_adapter_metadata`: {"unet.r": …, "unet.lora_alpha": …}. Without it diffusers takes alpha = r.
Source: diffusers, utils/state_dict_utils.py, loaders/lora_conversion_utils.py, utils/peft_utils.py; LyCORIS,
modules/{locon,loha,lokr}.py, which stores alpha so that alpha / r is the scaling, with rs_lora too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from inlay.adapters.peft_config import PeftConfig, Strength, parse_peft_config
from inlay.adapters.peft_names import FULL, PREFIX, PartName
from inlay.checkpoints.refs import TensorInfo, TensorRef
from inlay.checkpoints.spans import SpanReader
from inlay.dtypes import decode
from inlay.errors import AdapterError

WEIGHTS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
METADATA = "lora_adapter_metadata"
ALPHA = "alpha"
REFUSED = "refused"

_DOWN = r"(?:lora_down|lora_A|lora\.down|lora_linear_layer\.down)"
_UP = r"(?:lora_up|lora_B|lora\.up|lora_linear_layer\.up)"
_LYCORIS = r"hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2"
_PARTS = (
    (re.compile(rf"(?P<module>.+?)\.{_DOWN}\.weight"), "lora_A"),
    (re.compile(rf"(?P<module>.+?)\.{_UP}\.weight"), "lora_B"),
    (re.compile(rf"(?P<module>.+?)\.{_UP}\.bias"), "lora_bias"),
    (re.compile(r"(?P<module>.+)\.(?:dora_scale|lora_magnitude_vector(?:\.weight)?)"), "magnitude"),
    (re.compile(r"(?P<module>.+)\.alpha"), ALPHA),
)
_OWN = re.compile(rf"(?P<module>.+)\.(?P<part>{_LYCORIS})")
_OLD = re.compile(r"(?P<attention>.+)\.to_(?P<which>q|k|v|out)_lora\.(?P<way>down|up)\.weight")
_OLD_UNET = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
_OLD_TEXT = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}

_KOHYA = re.compile(r"lora_[^.]+\..+")
# Words that name a component where they come first, and first words of a U-Net's or a transformer's own modules.
COMPONENT = re.compile(r"(?:unet|transformer|text_encoder|image_encoder|prior|decoder|controlnet|vae)(?:_\d+)?")
_DIFFUSERS = re.compile(
    rf"{COMPONENT.pattern}\..+"
    r"|(?:down_blocks|mid_block|up_blocks|transformer_blocks|single_transformer_blocks|diffusion_model)\..+"
)
_TEXTUAL_INVERSION = "bundle_emb."


def is_image_lora(keys: Iterable[str]) -> bool:
    """Whether the tensors of a file without a config are named as those of a LoRA for an image model."""
    names = [key.removeprefix(PREFIX) for key in keys]
    return any(
        parse_diffusers_name(name).part != FULL and (_KOHYA.fullmatch(name) or _DIFFUSERS.fullmatch(name))
        for name in names
    )


def parse_diffusers_name(key: str) -> PartName:
    """The module and part that `key` names, in PEFT's words; what fits no pattern is a full copy."""
    while key.startswith(PREFIX):
        key = key[len(PREFIX) :]
    plain = key.replace(".processor.", ".")  # attention processors held the layers before they were layers
    if found := _OLD.fullmatch(plain):
        table = _OLD_TEXT if plain.startswith("text_encoder") else _OLD_UNET
        module = f"{found['attention']}.{table[found['which']]}"
        return PartName(module, "lora_A" if found["way"] == "down" else "lora_B")
    for pattern, part in _PARTS:
        if found := pattern.fullmatch(plain):
            return PartName(found["module"], part)
    if found := _OWN.fullmatch(plain):
        return PartName(found["module"], found["part"])
    if _KOHYA.fullmatch(plain) or plain.startswith(_TEXTUAL_INVERSION):
        module, _, part = plain.partition(".")
        return PartName(module, f"{REFUSED} {part}")
    return PartName(plain, FULL)


def take_config(
    parts: dict[str, dict[str, TensorInfo]], path: Path, metadata: Mapping[str, str]
) -> tuple[PeftConfig, dict[str, dict[str, TensorInfo]]]:
    """The config that the file itself implies, and the parts without their alphas.

    `path` is the file of weights, `metadata` that of its header. Raises AdapterError for what is refused by name.
    """
    _refuse(parts, path)
    alphas = _alphas(parts, path)
    kept = {m: {p: t for p, t in found.items() if p != ALPHA} for m, found in parts.items()}
    lonely = sorted(m for m, found in kept.items() if not found)
    if lonely:
        raise AdapterError(f"{path}: {lonely[0]} has an alpha and nothing that it scales")
    configs = _configs(metadata, path)
    if configs and alphas:
        raise AdapterError(f"{path}: holds both alphas and {METADATA}, which diffusers does not load either; keep one")
    kinds = {_kind(found) for found in kept.values()} or {"LORA"}
    if len(kinds) > 1:
        raise AdapterError(f"{path}: mixes {', '.join(sorted(kinds))} modules, which is not supported; train with one")
    kind = kinds.pop()
    strengths = {m: _strength(m, found, kind, alphas.get(m), configs) for m, found in kept.items()}
    with_magnitude = {m for m, found in kept.items() if "magnitude" in found}
    if kind != "LORA" and with_magnitude:
        raise AdapterError(f"{path}: dora_scale on {kind} modules is not supported; train without weight decomposition")
    _check_magnitudes(kept, configs, path)
    return _config(kind, strengths, bool(with_magnitude)), kept


def _refuse(parts: Mapping[str, Mapping[str, TensorInfo]], path: Path) -> None:
    """What other methods leave in such files."""
    reasons: dict[str, str] = {}
    for module, found in parts.items():
        for part in found:
            if part.startswith(REFUSED):
                reasons.setdefault(part.removeprefix(REFUSED + " "), module)
    if not reasons:
        return
    known = {
        "lora_mid.weight": "a core between the pair (LoCon with use_tucker or use_cp)",
        "diff": "a whole delta (LyCORIS full)", "diff_b": "a delta of a bias (LyCORIS full)",
        "w_norm": "a delta of a norm (train_norm)", "b_norm": "a delta of a norm (train_norm)",
        "oft_blocks": "OFT in kohya's form", "oft_diag": "OFT in LyCORIS's form", "scalar": "a factor (use_scalar)",
        "on_input": "IA3 in LyCORIS's form",
    }  # fmt: skip
    lines = [f"{module}.{part}: {known.get(part, 'not known')}" for part, module in reasons.items()]
    raise AdapterError(
        f"{path}: cannot be merged (nothing was written); of the forms that kohya's trainers and LyCORIS write, LoRA, "
        "LoCon, DoRA, LoHa and LoKr are\n  " + "\n  ".join(lines)
    )


def _alphas(parts: Mapping[str, Mapping[str, TensorInfo]], path: Path) -> dict[str, float]:
    """Module -> the number in its alpha."""
    with SpanReader({"": path}) as reader:
        return {m: _alpha(reader, found[ALPHA], path) for m, found in parts.items() if ALPHA in found}


def _alpha(reader: SpanReader, tensor: TensorInfo, path: Path) -> float:
    ref = TensorRef.of("", "", tensor)
    value = math.nan
    if ref.count == 1 and tensor.dtype.mergeable:
        value = float(decode(reader.whole(ref), tensor.dtype).reshape(-1)[0])
    elif ref.count == 1 and tensor.dtype.kind == "int":
        value = float(reader.whole(ref).reshape(-1)[0])
    if not math.isfinite(value) or value == 0:  # kohya's trainers read 0 as alpha = r, others as no effect
        raise AdapterError(f"{path}: {tensor.key} must be one number that is finite and not 0")
    return value


def _configs(metadata: Mapping[str, str], path: Path) -> dict[str, PeftConfig]:
    """Component ("" where the names have none) -> its LoraConfig, from the header of the file."""
    if METADATA not in metadata:
        return {}
    where = Path(f"{path} ({METADATA})")
    try:
        value = json.loads(metadata[METADATA])
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{where}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{where}: must be an object, found {value!r:.80}")
    fields: dict[str, dict[str, Any]] = {}
    for name, setting in value.items():
        component, _, field = name.rpartition(".")
        fields.setdefault(component, {})[field] = setting
    return {c: _plain_config({"peft_type": "LORA", **found}, where) for c, found in fields.items()}


def _plain_config(raw: Mapping[str, Any], where: Path) -> PeftConfig:
    """A config of which rank, alpha and DoRA are all that decides the result."""
    config = parse_peft_config(raw, where)
    more = [name for name in ("modules_to_save", "target_parameters", "trainable_token_indices") if raw.get(name)]
    if config.variant:
        more.insert(0, config.variant)
    if more:
        raise AdapterError(f"{where}: {', '.join(more)} in a LoRA for an image model is not supported")
    return config


def _config_of(module: str, configs: Mapping[str, PeftConfig]) -> tuple[PeftConfig | None, str]:
    """The config of a module's component, and the module's name in it."""
    component, _, name = module.partition(".")
    return (configs[component], name) if component in configs else (configs.get(""), module)


def _kind(parts: Mapping[str, TensorInfo]) -> str:
    """PEFT's word for the method of one module."""
    if any(name.startswith("hada_") for name in parts):
        return "LOHA"
    return "LOKR" if any(name.startswith("lokr_") for name in parts) else "LORA"


RANK_PARTS = {"LORA": ("lora_A",), "LOHA": ("hada_w1_b",), "LOKR": ("lokr_w1_b", "lokr_w2_b")}


def _strength(
    module: str, parts: Mapping[str, TensorInfo], kind: str, alpha: float | None, configs: Mapping[str, PeftConfig]
) -> Strength:
    """Rank, alpha and scaling of one module."""
    config, name = _config_of(module, configs)
    if config is not None:
        return Strength(config.rank(name), config.alpha(name), config.scaling(name))
    stored = next((parts[part] for part in RANK_PARTS[kind] if part in parts), None)
    if stored is None or not stored.shape or not stored.shape[0]:
        return Strength(1, 1.0, 1.0)  # LoKr of two whole factors has no rank and, in LyCORIS, no scaling
    rank = stored.shape[0]
    value = float(rank) if alpha is None else alpha
    return Strength(rank, value, value / rank)


def _check_magnitudes(
    parts: Mapping[str, Mapping[str, TensorInfo]], configs: Mapping[str, PeftConfig], path: Path
) -> None:
    for module, found in parts.items():
        config, _ = _config_of(module, configs)
        if config is not None and "lora_A" in found and config.use_dora != ("magnitude" in found):
            here = "has a" if "magnitude" in found else "lacks its"
            raise AdapterError(f"{path}: {module} {here} magnitude, and use_dora is {str(config.use_dora).lower()}")


def _config(kind: str, strengths: Mapping[str, Strength], use_dora: bool) -> PeftConfig:
    return PeftConfig(
        raw={},
        r=1,
        lora_alpha=1.0,
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,
        use_dora=use_dora,
        fan_in_fan_out=False,
        bias="none",
        lora_bias=False,
        modules_to_save=(),
        trainable_token_indices={},
        ensure_weight_tying=False,
        base_model=None,
        task_type=None,
        peft_version=None,
        peft_type=kind,
        strengths=strengths,
    )

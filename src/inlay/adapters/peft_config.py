"""`adapter_config.json` of PEFT, of any age: every field is used, known to change nothing, or refused.

The fields of LoRA are those of `LoraConfig` from PEFT 0.2 to 0.21; those of the other methods stand in their files.
A field that is set (not null, false or empty) and is in none of the tables below is an error that
names it: a setting that changes the weights must not pass unnoticed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from inlay.adapters.patterns import Patterns
from inlay.errors import AdapterError
from inlay.tuners import dense
from inlay.tuners.refused import REFUSED_TYPES

LARGEST = 1e100  # of a number in a config
LARGEST_WHOLE = 1 << 31  # of a rank, a seed, a count
# Types of the fields that single methods have; those that are names are checked where they are used.
OWN_WHOLE = (
    "gralora_k",
    "group_size",
    "hybrid_r",
    "init_r",
    "mini_r",
    "num_cayley_neumann_terms",
    "projection_prng_key",
    "random_loc_seed",
    "topk",
)
OWN_NUMBERS = ("eps", "scaling")
OWN_FLAGS = (
    "apply_GS", "block_share", "coft", "para", "save_projection", "sparse", "use_cayley_neumann", "very_sparse",
)  # fmt: skip

# Of no effect on the merged weight: they steer training, loading or placement, or say which modules
# to adapt, which the tensors of the file say themselves.
NO_EFFECT = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "merge_weights",
    "monteclora_config", "peft_type", "peft_version", "revision", "runtime_config",
    "target_modules", "task_type", "velora_config",
})  # fmt: skip

USED = frozenset({
    "alpha_pattern", "bias", "ensure_weight_tying", "fan_in_fan_out", "lora_alpha", "lora_bias", "modules_to_save",
    "kasa_config", "qalora_group_size", "r", "rank_pattern", "target_parameters", "trainable_token_indices",
    "use_bdlora", "use_dora", "use_qalora", "use_rslora",
})  # fmt: skip

REFUSED: dict[str, str] = {
    "layer_replication": "the adapter belongs to a model with repeated layers, which has more layers than this base; "
    "build that model first, and merge into it with layer_replication removed",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only, so no merged weight equals it",
    "arrow_config": "Arrow routes between adapters per token, so no merged weight equals it",
    "enable_lora": "LoRA on parts of a fused layer (PEFT 0.2's MergedLinear) is not supported",
}

# Fields that every method's config has, or may have.
COMMON = frozenset({
    "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias", "rank_pattern",
    "alpha_pattern", "peft_version", "fan_in_fan_out", "r", "trainable_token_indices", "ensure_weight_tying",
})  # fmt: skip
COMMON_REFUSED = {"layer_replication": REFUSED["layer_replication"]}
# Methods that replace values instead of changing them need no file of their own.
OWN_FIELDS = {"LN_TUNING": frozenset[str](), "TRAINABLE_TOKENS": frozenset({"token_indices", "init_weights"})}
MERGED_TYPES = frozenset({"LORA", *dense.FILES, *OWN_FIELDS})
ALPHA = ("lora_alpha", "alpha", "randlora_alpha")

# Variants of LoRA with a file of their own -> the field that asks for them.
VARIANT_FIELDS = {"kasa": "kasa_config", "bdlora": "use_bdlora", "qalora": "use_qalora"}

# Initialisations that move the base weight: merging into the original base would be wrong.
BASE_SHIFTING_INIT = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True)
class Strength:
    """Rank, alpha and scaling of one module."""

    rank: int
    alpha: float
    scaling: float


@dataclass(frozen=True)
class PeftConfig:
    """The part of an adapter's config that decides the merged weight, and what it says of itself."""

    raw: Mapping[str, Any]
    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    bias: str
    lora_bias: bool
    modules_to_save: tuple[str, ...]
    trainable_token_indices: Mapping[str, tuple[int, ...]]
    ensure_weight_tying: bool
    base_model: str | None
    task_type: str | None
    peft_version: str | None
    peft_type: str = "LORA"
    variant: str | None = None  # of LoRA, where it is no plain pair
    target_parameters: tuple[str, ...] = ()
    fixed_scaling: float | None = None  # where a file of another tool gives the scaling itself
    strengths: Mapping[str, Strength] = dataclasses.field(default_factory=dict)  # where it gives them module by module

    @property
    def tuner(self) -> str:
        """What the method is called: the file in `tuners/`, or the word for what replaces values."""
        if self.peft_type == "LORA":
            return self.variant or ("dora" if self.use_dora else "lora")
        return dense.FILES.get(self.peft_type, self.peft_type.lower())

    @property
    def has_alpha(self) -> bool:
        """Whether the config has an alpha at all; some methods know none."""
        return bool(self.strengths) or any(self.raw.get(name) is not None for name in ALPHA)

    @property
    def has_rank(self) -> bool:
        """Whether the config gives a rank; some methods count blocks or frequencies instead."""
        return self.peft_type == "LORA" or bool(self.raw.get("r")) or bool(self.strengths)

    def rank(self, module: str) -> int:
        """Rank that the config gives to `module` (its in-memory name)."""
        if module in self.strengths:
            return self.strengths[module].rank
        return int(self._patterns.value(self.rank_pattern, module, self.r))

    def alpha(self, module: str) -> float:
        if module in self.strengths:
            return self.strengths[module].alpha
        return float(self._patterns.value(self.alpha_pattern, module, self.lora_alpha))

    def scaling(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA, as float64."""
        if self.fixed_scaling is not None:
            return self.fixed_scaling
        if module in self.strengths:
            return self.strengths[module].scaling
        rank, alpha = self.rank(module), self.alpha(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    @cached_property
    def _patterns(self) -> Patterns:
        return Patterns()


def parse_peft_config(raw: Mapping[str, Any], where: Path) -> PeftConfig:
    """Check every field of `raw` and keep what decides the merged weight.

    Raises AdapterError for another kind of adapter, and for fields that are refused, unknown or malformed.
    """
    kind = raw.get("peft_type")
    if not isinstance(kind, str):
        raise AdapterError(f"{where}: peft_type must be the name of a method, found {kind!r:.80}")
    if kind in REFUSED_TYPES:
        raise AdapterError(f"{where}: peft_type {kind} is not merged: {REFUSED_TYPES[kind]}")
    if kind not in MERGED_TYPES:
        raise AdapterError(f"{where}: peft_type {kind!r} is not known; merged are {', '.join(sorted(MERGED_TYPES))}")
    reasons = [*_refusals(raw, kind), *_unknown(raw, kind)]
    if reasons:
        raise AdapterError(f"{where}: cannot be merged (nothing was written)\n  " + "\n  ".join(reasons))
    field = _Fields(raw, where)
    _check_own(field, kind)
    return PeftConfig(
        raw=raw,
        r=field.positive("r", 8) if raw.get("r") != 0 or kind != "OFT" else 1,  # OFT gives a block size instead
        lora_alpha=field.number(next((n for n in ALPHA if n in raw), "lora_alpha"), 8),
        rank_pattern=_rank_pattern(field, kind),
        alpha_pattern={k: field.as_number(v, f"alpha_pattern[{k!r}]") for k, v in field.table("alpha_pattern").items()},
        use_rslora=field.flag("use_rslora"),
        use_dora=field.flag("use_dora"),
        fan_in_fan_out=field.flag("fan_in_fan_out"),
        bias=field.choice("bias", ("none", "all", "lora_only", f"{str(kind).lower()}_only")),
        lora_bias=field.flag("lora_bias"),
        modules_to_save=tuple(dict.fromkeys(field.names("modules_to_save"))),
        trainable_token_indices=_token_indices(
            raw.get("token_indices" if kind == "TRAINABLE_TOKENS" else "trainable_token_indices"), where
        ),
        ensure_weight_tying=field.flag("ensure_weight_tying"),
        base_model=field.text("base_model_name_or_path"),
        task_type=field.text("task_type"),
        peft_version=field.text("peft_version"),
        peft_type=str(kind),
        variant=_variant(raw) if kind == "LORA" else None,
        target_parameters=tuple(dict.fromkeys(field.names("target_parameters"))),
    )


def _check_own(field: _Fields, kind: str) -> None:
    """Types of the fields that this method alone has."""
    blocks = field.raw.get("use_bdlora")
    if kind == "LORA" and isinstance(blocks, dict):
        _Fields(blocks, field.where).whole("nblocks")
    if kind == "LORA":
        field.flag("use_qalora")
        field.whole("qalora_group_size")
    file = _file(kind)
    for name in sorted(file.FIELDS) if file else ():
        if name in OWN_WHOLE:
            field.whole(name)
        elif name in OWN_NUMBERS:
            field.number(name, 0.0)
        elif name in OWN_FLAGS:
            field.flag(name)


def _rank_pattern(field: _Fields, kind: str) -> dict[str, int]:
    if kind in ("ADALORA", "OSF"):  # there it lists which components were kept, or shares, which the tensors show
        return {}
    return {k: field.as_rank(v, f"rank_pattern[{k!r}]") for k, v in field.table("rank_pattern").items()}


def _is_set(value: Any) -> bool:
    return value is not None and value is not False and value not in ("", [], {})


def _refusals(raw: Mapping[str, Any], kind: str) -> list[str]:
    refused = REFUSED if kind == "LORA" else {**COMMON_REFUSED, **getattr(_file(kind), "REFUSED", {})}
    found = [f"{name}: {why}" for name, why in refused.items() if _is_set(raw.get(name))]
    if kind != "LORA":
        return found
    found += _contradictions(raw)
    init = raw.get("init_lora_weights")
    shifting = isinstance(init, str) and init.lower().replace("-", "_").startswith(BASE_SHIFTING_INIT)
    if shifting and _variant(raw) is None:
        found.append(
            f"init_lora_weights {init!r}: training started from a base that was shifted by what cannot be computed "
            "again (random, or from data), so merging into the original one would be wrong; convert the adapter "
            "when saving it (PEFT: save_pretrained with path_initial_model_for_weight_conversion), which makes it a "
            "plain LoRA"
        )
    return found


def _variant(raw: Mapping[str, Any]) -> str | None:
    """The variant of LoRA that a config asks for, if it is one with a file of its own."""
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower() in ("pissa", "olora"):
        return init.lower()
    return next((name for name, field in VARIANT_FIELDS.items() if _is_set(raw.get(field))), None)


def _contradictions(raw: Mapping[str, Any]) -> list[str]:
    """Settings that no version of PEFT trains together with a variant."""
    variant = _variant(raw)
    others = ("use_dora", "lora_bias", "target_parameters", *VARIANT_FIELDS.values())
    own = VARIANT_FIELDS.get(variant or "")
    return [
        f"{name} together with {variant} is not supported"
        for name in others
        if variant and name != own and _is_set(raw.get(name))
    ]


def _file(kind: str) -> ModuleType | None:
    return dense.tuner(dense.FILES[kind]) if kind in dense.FILES else None


def _known_fields(kind: str) -> frozenset[str]:
    if kind == "LORA":
        return NO_EFFECT | USED | REFUSED.keys()
    file = _file(kind)
    own = file.FIELDS | file.IGNORED | file.REFUSED.keys() if file else OWN_FIELDS[kind]
    return COMMON | COMMON_REFUSED.keys() | own


def _unknown(raw: Mapping[str, Any], kind: str) -> list[str]:
    known = _known_fields(kind)
    return [
        f"{name} = {value!r:.80}: this field is not known, and it may change the weights; set it to null if it does not"
        for name, value in raw.items()
        if name not in known and _is_set(value)
    ]


def _token_indices(value: Any, where: Path) -> dict[str, tuple[int, ...]]:
    """Module suffix -> token ids. A plain list means the input embedding, named here by the empty string."""
    tables = {"": value} if isinstance(value, list) else value or {}
    if not isinstance(tables, dict):
        raise AdapterError(f"{where}: trainable_token_indices must be a list or a dict, found {value!r:.80}")
    for name, ids in tables.items():
        if not isinstance(ids, list) or not all(isinstance(i, int) and i >= 0 for i in ids):
            raise AdapterError(f"{where}: trainable_token_indices[{name!r}] must be a list of token ids")
        if len(set(ids)) != len(ids):
            raise AdapterError(f"{where}: trainable_token_indices[{name!r}] names a token twice")
    return {name: tuple(ids) for name, ids in tables.items() if ids}


@dataclass(frozen=True)
class _Fields:
    """Typed access to a config, with an error that names the field."""

    raw: Mapping[str, Any]
    where: Path

    def _fail(self, name: str, wanted: str, value: Any) -> AdapterError:
        return AdapterError(f"{self.where}: {name} must be {wanted}, found {value!r:.80}")

    def as_number(self, value: Any, name: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < LARGEST:
            raise self._fail(name, "a number", value)
        return float(value)

    def as_rank(self, value: Any, name: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < LARGEST_WHOLE:
            raise self._fail(name, "a positive integer", value)
        return value

    def whole(self, name: str) -> None:
        value = self.raw.get(name)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < LARGEST_WHOLE
        ):
            raise self._fail(name, "a whole number", value)

    def number(self, name: str, default: float) -> float:
        value = self.raw.get(name)
        return default if value is None else self.as_number(value, name)

    def positive(self, name: str, default: int) -> int:
        value = self.raw.get(name)
        return default if value is None else self.as_rank(value, name)

    def flag(self, name: str) -> bool:
        value = self.raw.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._fail(name, "true or false", value)
        return bool(value)

    def choice(self, name: str, allowed: tuple[str, ...]) -> str:
        value = self.raw.get(name) or allowed[0]
        if value not in allowed:
            raise self._fail(name, "one of " + ", ".join(allowed), value)
        return str(value)

    def text(self, name: str) -> str | None:
        value = self.raw.get(name)
        if value is not None and not isinstance(value, str):
            raise self._fail(name, "text", value)
        return value or None

    def names(self, name: str) -> list[str]:
        value = self.raw.get(name) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(n, str) for n in value):
            raise self._fail(name, "a list of names", value)
        return value

    def table(self, name: str) -> dict[str, Any]:
        value = self.raw.get(name) or {}
        if not isinstance(value, dict):
            raise self._fail(name, "an object", value)
        return value

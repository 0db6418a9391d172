"""Codes in a plan: which weights are stored in them, in which form, and what the base is taken for.

a base in codes     decoded, and the result in floats; with `keep`, what an adapter changes is encoded again
a base in floats    with `base_as` simulated, weights as they were when the adapter was trained on a base that was
                    quantised while it was loaded; with `method`, the result is stored in codes
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from inlay.adapters.adapter import Adapter
from inlay.checkpoints.checkpoint import Checkpoint, Shard
from inlay.checkpoints.decoded import Decoded, Encoding, parts_of
from inlay.checkpoints.refs import Made, TensorInfo, TensorRef
from inlay.checkpoints.spans import BASE
from inlay.codecs.table import codec
from inlay.dtypes import DTYPES, F32
from inlay.errors import Problem
from inlay.keys import families
from inlay.plan import compensating, zero_points
from inlay.plan.types import Coded, Entry

BASE_AS = ("dequantised", "simulated", "original")
SCALES = ("reuse", "fresh")
# --quant_method and --quant_bits -> codec, and its options where they are not the default.
STREAMED: dict[str, dict[int, tuple[str, dict[str, Any]]]] = {
    "bnb": {4: ("bnb4", {}), 8: ("bnb8", {})},
    "fp8": {8: ("compressed", {"scheme": "FP8_DYNAMIC"})},
    "int8": {8: ("compressed", {"scheme": "W8A8"})},
    "mxfp4": {4: ("compressed_fp4", {"scheme": "MXFP4A16"})},
    "rtn": {4: ("compressed_pack", {"scheme": "W4A16"}), 8: ("compressed_pack", {"scheme": "W8A16"})},
}
CALIBRATED = ("awq", "gptq")
FP8_STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "channel": ("compressed", {"scheme": "FP8_DYNAMIC"}),
    "block": ("fp8", {"strategy": "block"}),
    "tensor": ("fp8", {"strategy": "tensor"}),
}
# What trainers quantise with while loading, as --trained_quant names it.
TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "nf4": ("bnb4", {"double_quant": True}),
    "nf4-single": ("bnb4", {"double_quant": False}),
    "fp4": ("bnb4", {"quant_type": "fp4", "double_quant": True}),
    "fp4-single": ("bnb4", {"quant_type": "fp4", "double_quant": False}),
    "int8": ("bnb8", {}),
}
# Modules that quantisers leave in floats beside heads and embeddings, by words of their names.
ROUTERS = ("router", "gate", "shared_expert_gate", "wg")
OTHER_MODALITIES = ("visual", "vision", "audio", "vision_tower", "vision_model", "multi_modal_projector", "image")


@dataclass(frozen=True)
class Quant:
    """What is asked of codes; see the command line for the words.

    `keep_16bit` is a pattern of module names; `config` are further options of the method; `compensate` is "adapter"
    where codes are to hold each row's whole delta (`inlay.codecs.compensation`).
    """

    base_as: str | None = None
    trained_quant: str | None = None
    keep: bool = False
    scales: str | None = None
    keep_16bit: str | None = None
    method: str | None = None
    bits: int | None = None
    group_size: int | None = None
    config: Mapping[str, Any] | None = None
    compensate: str | None = None

    def given(self) -> dict[str, Any]:
        """Those that are given, by name."""
        return {name: value for name, value in asdict(self).items() if value not in (None, False)}


NO_QUANT = Quant()


def request_problems(quant: Quant, dtype: str | None, quantised: bool, merges: bool) -> list[Problem]:
    """What cannot be meant, whatever the tensors are."""
    problems = []

    def problem(where: str, what: str) -> None:
        problems.append(Problem(where, what))

    if quant.base_as is not None and quant.base_as not in BASE_AS:
        problem("base_as", f"{quant.base_as!r} is not one of {', '.join(BASE_AS)}")
    if quant.scales is not None and quant.scales not in SCALES:
        problem("scales", f"{quant.scales!r} is not reuse or fresh")
    if quant.scales is not None and not quant.keep:
        problem("scales", "is for --keep_quant true; leave it out")
    if found := compensating.request_problem(quant.compensate, quant.keep, quant.scales):
        problems.append(found)
    if quantised and quant.base_as in ("simulated", "original"):
        what = f"{quant.base_as} wants the 16-bit original as --model; this base is stored in codes"
        problem("base_as", what)
    if not quantised and quant.base_as == "dequantised":
        problem("base_as", "the base is not stored in codes; dequantised has no meaning for it")
    if quant.trained_quant is not None and quant.trained_quant not in TRAINED:
        problem("trained_quant", f"{quant.trained_quant!r} is not one of {', '.join(TRAINED)}")
    if quant.keep and not quantised:
        problem("keep_quant", "the base is not stored in codes; use --quant_method to store the result in them")
    if quant.keep and dtype:
        problem("keep_quant", "keeps the base's types; leave --torch_dtype, --fp16 and --bf16 out")
    if quant.keep and quant.method:
        problem("quant_method", "and --keep_quant contradict each other; give one")
    if quant.method and quantised and not merges:
        what = "the base is stored in codes already; give its 16-bit original, or decode it first (--bf16 true)"
        problem("quant_method", what)
    if quant.keep_16bit is not None:
        try:
            re.compile(quant.keep_16bit)
        except re.error as error:
            problem("keep_16bit", f"{quant.keep_16bit!r} is no pattern: {error}")
        if not quant.keep and not quant.method:
            problem("keep_16bit", "is for --keep_quant or --quant_method; the result is in floats as it is")
    return problems + _method_problems(quant)


def _method_problems(quant: Quant) -> list[Problem]:
    method, bits = quant.method, quant.bits
    if method is None:
        extra = [name for name in ("bits", "group_size", "config") if getattr(quant, name) is not None]
        return [Problem(f"quant_{name}".replace("quant_group", "group"), "needs --quant_method") for name in extra]
    if method not in STREAMED:
        known = ", ".join((*STREAMED, *CALIBRATED))
        return [Problem("quant_method", f"{method!r} is not one of {known}")]
    if bits is not None and bits not in STREAMED[method]:
        return [Problem("quant_bits", f"{method} has {' or '.join(map(str, STREAMED[method]))} bits, not {bits}")]
    if bits is None and len(STREAMED[method]) > 1:
        return [Problem("quant_bits", f"{method} needs it: {' or '.join(map(str, STREAMED[method]))}")]
    return []


def form_of(quant: Quant) -> tuple[str, dict[str, Any]]:
    """Codec and options that the method means. Raises ValueError for options that it does not have."""
    assert quant.method is not None
    forms = STREAMED[quant.method]
    name, options = forms[quant.bits or next(iter(forms))]
    config = dict(quant.config or {})
    if quant.method == "fp8":
        strategy = config.pop("strategy", "channel")
        if strategy not in FP8_STRATEGIES:
            raise ValueError(f"strategy {strategy!r} of fp8 is not one of {', '.join(FP8_STRATEGIES)}")
        name, options = FP8_STRATEGIES[strategy]
    if quant.group_size is not None:
        options = {**options, "group_size": quant.group_size}
    return name, {**options, **config}


def linear_weights(base: Checkpoint, keep_16bit: str | None = None) -> tuple[list[str], list[str]]:
    """Keys of the weights that a quantiser takes, and modules with a matrix that it leaves.

    A quantiser takes linear layers and leaves the head; by name, since no model is built: matrices whose module is no
    embedding, head, router or norm, and belongs to no tower of another modality.
    """
    taken: list[str] = []
    left: list[str] = []
    for key, (_, t) in base.tensors.items():
        if len(t.shape) == 3 and "experts" in key.split(".") and t.dtype.mergeable:
            left.append(key.removesuffix(".weight"))  # a stack, for which quantisers have no layer
        if not key.endswith(".weight") or len(t.shape) != 2 or not t.dtype.mergeable:
            continue
        module = key.removesuffix(".weight")
        words = module.split(".")
        spared = (
            key in families.HEADS or families.is_embedding(module) or words[-1] in ("lm_head", "score", "classifier")
            or words[-1] in ROUTERS or "embed" in words[-1] or any(w in OTHER_MODALITIES for w in words)
            or (keep_16bit is not None and re.search(keep_16bit, module) is not None)
        )  # fmt: skip
        (left if spared else taken).append(module if spared else key)
    return taken, left


# A base in floats, taken as it was while an adapter was trained on a quantised load of it.


def trained_as(quant: Quant, adapters: Sequence[Adapter]) -> str | None:
    """How the base was quantised while the adapters were trained: as asked, or as the trainer recorded."""
    if quant.trained_quant:
        return quant.trained_quant
    return next((name for adapter in adapters if (name := _recorded(adapter.args))), None)


def _recorded(args: Mapping[str, Any]) -> str | None:
    """From `args.json` of ms-swift and inlay: quant_method, quant_bits, bnb_4bit_…."""
    if args.get("quant_method") not in ("bnb", "bitsandbytes") and not (
        args.get("load_in_4bit") or args.get("load_in_8bit")
    ):
        return None
    bits = args.get("quant_bits") or (4 if args.get("load_in_4bit") else 8)
    if int(bits) == 8:
        return "int8"
    kind = str(args.get("bnb_4bit_quant_type") or "nf4")
    return kind if args.get("bnb_4bit_use_double_quant", True) else f"{kind}-single"


def simulate(base: Checkpoint, name: str, problems: list[Problem]) -> Checkpoint:
    """The base with decode(encode(W)) for every weight that the quantiser would have taken."""
    form_name, options = TRAINED[name]
    form = codec(form_name)
    taken = set(linear_weights(base)[0])

    def simulated(shard: Shard, t: TensorInfo) -> TensorInfo:
        if t.key not in taken:
            return t
        try:
            settings = form.fresh(t.shape, {**options, **({"dtype": t.dtype.torch} if form_name == "bnb4" else {})})
        except ValueError as error:
            problems.append(Problem(t.key, str(error)))
            return t
        ref = TensorRef.of(BASE, shard.file, t)
        cast = {"cast": "F16"} if form_name == "bnb8" else {}  # a layer of bitsandbytes casts before it quantises
        made = Made.of("simulated", {"weight": ref}, {**settings, **cast, "codec": form_name}, math.prod(t.shape[1:]))
        return TensorInfo(t.key, F32, t.shape, 0, F32.nbytes(math.prod(t.shape)), made)

    shards = tuple(replace(s, tensors=tuple(simulated(s, t) for t in s.tensors)) for s in base.shards)
    return replace(base, shards=shards, stored=base)


# The result in codes.


def keep_codes(
    decoded: Decoded, by_shard: Sequence[tuple[str, Sequence[Entry]]], quant: Quant, problems: list[Problem]
) -> list[tuple[str, list[Entry | Coded]]]:
    """The entries of the result in the base's own form: what is touched encoded again, all else as it is stored.

    `by_shard` are the entries of the decoded base.
    """
    base = decoded.checkpoint.on_disk
    entries = {e.key: e for _, found in by_shard for e in found}
    if (quant.scales or "reuse") == "reuse":
        problems += zero_points.problems_of(entries, decoded.encodings, quant.keep_16bit)
    owner = {ref.key: (key, part) for key, e in decoded.encodings.items() for part, ref in e.parts.items()}
    new = {file: [e for e in found if e.key not in decoded.checkpoint.tensors] for file, found in by_shard}
    result = []
    for shard in base.shards:
        stored: list[Entry | Coded] = []
        for t in shard.tensors:
            key, part = owner.get(t.key, (t.key, ""))
            if part and entries[key].touched:
                stored += _again(t, part, entries[key], decoded.encodings[key], quant)
            elif part or t.key in decoded.dropped:
                stored.append(Entry(t.key, t.dtype, t.shape, TensorRef.of(BASE, shard.file, t)))
            else:
                stored.append(entries[key])
        result.append((shard.file, [*stored, *new.get(shard.file, [])]))
    return result


def _again(t: TensorInfo, part: str, entry: Entry, encoding: Encoding, quant: Quant) -> list[Entry | Coded]:
    """One stored part of a weight that is touched."""
    codes = next(iter(encoding.parts))
    if quant.keep_16bit and re.search(quant.keep_16bit, encoding.stem.removesuffix(".weight")):
        return [entry] if part == codes else []
    reuse = (quant.scales or "reuse") == "reuse"
    changed = zero_points.offset_part(encoding) if reuse and zero_points.has_qalora(entry) else codes
    kept = {name: ref for name, ref in encoding.parts.items() if name != changed} if reuse else {}
    if part in kept:
        return [Entry(t.key, t.dtype, t.shape, encoding.parts[part])]
    if not reuse and encoding.settings.get("order") == "given":  # GPTQ's desc_act
        kept = {name: ref for name, ref in encoding.parts.items() if name == "g_idx"}
        if part in kept:
            return [Entry(t.key, t.dtype, t.shape, encoding.parts[part])]
    weight = replace(entry, dtype=F32, leading=len(entry.shape) - 1 if len(entry.shape) == 3 else entry.leading)
    compensate = quant.compensate if changed == codes and compensating.applies(weight) else None
    return [Coded(t.key, t.dtype, t.shape, part, weight, encoding.codec, encoding.settings, kept, compensate)]


@dataclass(frozen=True)
class InCodes:
    """Entries of a result that is stored in codes, and what config.json says of it."""

    by_shard: list[tuple[str, list[Entry | Coded]]]
    config: Mapping[str, Any]
    encoded: int


def quantise(
    base: Checkpoint, by_shard: Sequence[tuple[str, Sequence[Entry]]], quant: Quant, problems: list[Problem]
) -> InCodes:
    """Every linear weight encoded in the form that is asked for."""
    taken, left = linear_weights(base, quant.keep_16bit)
    if not taken:
        problems.append(Problem(str(base.path), "has no linear weights that could be stored in codes"))
    if families.stored_transposed(base.config.get("model_type"), "c_fc") is not None:
        what = f"a {base.config.get('model_type')} stores its weights (in, out), which no quantised form knows"
        problems.append(Problem(str(base.path), what))
        return InCodes([(file, list(found)) for file, found in by_shard], {}, 0)
    try:
        name, options = form_of(quant)
    except ValueError as error:
        problems.append(Problem("quant_config", str(error)))
        return InCodes([(file, list(found)) for file, found in by_shard], {}, 0)
    form, wanted = codec(name), set(taken)
    result: list[tuple[str, list[Entry | Coded]]] = []
    some: dict[str, Any] | None = None
    for file, found in by_shard:
        stored: list[Entry | Coded] = []
        for entry in found:
            if entry.key not in wanted:
                stored.append(entry)
                continue
            try:
                some = form.fresh(entry.shape, options)
            except ValueError as error:
                problems.append(Problem(entry.key, str(error)))
                continue
            stem = entry.key.removesuffix(form.NAME_SUFFIX)
            weight = replace(entry, dtype=F32)
            endings = parts_of(form)
            stored += [
                Coded(stem + endings[part], DTYPES[dtype], tuple(shape), part, weight, name, some)
                for part, (dtype, shape) in form.layout(some).items()
            ]
        result.append((file, stored))
    return InCodes(result, form.config(some, left) if some else {}, len(taken))

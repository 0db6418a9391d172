"""Where the reciprocal of a scale can go: W x = (W s)(x / s), and what makes x takes the 1/s.

    after a norm        its gain g becomes g / s; for norms with the gain 1 + w, w becomes (1 + g) / s − 1
    after a matrix      the rows that make x become rows / s: `up` before `down`, `v` before `o`

Whether a place is right is not read off names but proved on the layer itself: with powers of two as scales every
product and every sum of the layer is the same to the last bit, or the place is wrong (something else reads these
channels too, or a function between them is not linear). A layer that does not pass stays unscaled there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from inlay.dtypes import DType
from inlay.quantising.tracing import Group, Trace

if TYPE_CHECKING:
    import torch

Module = Any
SEED = 7


@dataclass(frozen=True)
class Fold:
    """Scales of the input channels of `readers`, taken over by `source`.

    `offset` is 0 or 1 for a norm: the gain is offset + weight. For a matrix `rows` says which of its rows makes each
    channel; channels of one row share their scale.
    """

    readers: tuple[str, ...]
    source: str
    offset: int | None = None
    rows: torch.Tensor | None = None

    @property
    def bias(self) -> str:
        return self.source.removesuffix("weight") + "bias"


def find_fold(layer: Module, group: Group, traced: Trace, run: Callable[[], torch.Tensor]) -> Fold | None:
    """The first place that passes the proof; None where there is none. `run` gives the output of the layer."""
    for fold in _candidates(layer, group, traced):
        if _is_exact(layer, fold, run):
            return fold
    return None


def _candidates(layer: Module, group: Group, traced: Trace) -> Iterator[Fold]:
    import torch

    if group.norm is not None:
        norm = layer.get_submodule(group.norm)
        offset = _offset(norm, traced.norm_inputs[group.norm])
        if offset is not None:
            yield Fold(group.names, f"{group.norm}.weight", offset)
        return
    parameters = dict(layer.named_parameters())
    channels = parameters[group.names[0]].shape[-1]
    if len(group.names) != 1 or parameters[group.names[0]].dim() != 2:
        return
    earlier = [name for g in traced.groups[: traced.groups.index(group)] for name in g.names]
    for name in reversed(earlier):  # v comes after q and k, up after gate
        made = parameters[name].shape[0]
        if parameters[name].dim() != 2:
            continue
        if made % channels == 0:  # by itself, or fused with others of the same width
            for first in reversed(range(0, made, channels)):
                yield Fold(group.names, name, rows=torch.arange(first, first + channels))
        elif channels % made == 0:  # heads of keys and values serve several heads of queries
            for width in _head_widths(layer, made):
                heads = torch.arange(made).reshape(-1, width)
                yield Fold(group.names, name, rows=heads.repeat_interleave(channels // made, 0).reshape(-1))


def _head_widths(layer: Module, made: int) -> list[int]:
    found = {getattr(m, "head_dim", None) for m in layer.modules()}
    return sorted(n for n in found if isinstance(n, int) and n and made % n == 0)


def _offset(norm: Module, x: torch.Tensor) -> int | None:
    """0 for a norm with the gain w, 1 for 1 + w: which weights make its output vanish."""
    import torch

    kept = norm.weight.data
    bias = getattr(norm, "bias", None)
    try:
        for offset in (0, 1):
            norm.weight.data = torch.full_like(kept, -float(offset))
            out = norm(x)
            if isinstance(out, torch.Tensor) and not (out if bias is None else out - bias).any():
                return offset
    finally:
        norm.weight.data = kept
    return None


def _is_exact(layer: Module, fold: Fold, run: Callable[[], torch.Tensor]) -> bool:
    """Whether the output of the layer keeps every bit under scales that are powers of two."""
    import torch

    draw = torch.Generator().manual_seed(SEED)
    parameters = dict(layer.named_parameters())
    touched = [name for name in (*fold.readers, fold.source, fold.bias) if name in parameters]
    kept = {name: parameters[name].data for name in touched}
    try:
        for name in touched:
            parameters[name].data = kept[name].clone()
        if fold.offset is not None:  # gains whose quotients are exact; what they are proves nothing either way
            gains = torch.exp2(torch.randint(0, 2, kept[fold.source].shape, generator=draw).float())
            parameters[fold.source].data = gains - fold.offset
        before = run()
        exponents = torch.randint(-2, 3, (parameters[fold.source].shape[0],), generator=draw)
        apply(layer, fold, torch.exp2(exponents.float())[slice(None) if fold.rows is None else fold.rows])
        return torch.equal(before, run())
    finally:
        for name in touched:
            parameters[name].data = kept[name]


def apply(layer: Module, fold: Fold, scale: torch.Tensor) -> None:
    """Readers times `scale`, their source divided by it, in place. Scales of channels of one row must be equal."""
    import torch

    parameters = dict(layer.named_parameters())
    for name in fold.readers:
        parameters[name].data *= scale
    rows = scale
    if fold.rows is not None:
        rows = torch.ones(parameters[fold.source].shape[0])
        rows[fold.rows] = scale
    source = parameters[fold.source].data
    if fold.offset is not None:
        source.copy_((source + fold.offset) / rows - fold.offset)
    else:
        source /= rows[:, None]
    if fold.bias in parameters:
        parameters[fold.bias].data /= rows


def storable(layer: Module, fold: Fold, scale: torch.Tensor, stored: DType) -> torch.Tensor:
    """The scale nearby with which the new gain is a number of its stored type, so that nothing is lost in rounding it.

    The gain is rounded first, and the scale is what lies between the old one and the new. Rows of a matrix are
    quantised after the fold, from float32, and need no such care.
    """
    import torch

    if fold.offset is None:
        return scale
    weight = layer.get_parameter(fold.source).data
    gain = weight + fold.offset
    rounded = (gain / scale - fold.offset).to(getattr(torch, stored.torch)).float() + fold.offset
    between = gain / rounded
    near = (between > scale / 2) & (between < scale * 2)  # not where the rounding left nothing
    return torch.where(near, between, torch.ones_like(scale))


def share(fold: Fold, values: torch.Tensor) -> torch.Tensor:
    """Numbers of channels, made equal (their mean) where one row makes several channels."""
    import torch

    if fold.rows is None:
        return values
    size = int(fold.rows.max()) + 1
    total = torch.zeros(size).index_add_(0, fold.rows, values)
    count = torch.zeros(size).index_add_(0, fold.rows, torch.ones_like(values))
    return (total / count.clamp(min=1))[fold.rows]


def interchangeable(layer: Module, names: Sequence[str], run: Callable[[], torch.Tensor]) -> set[str]:
    """Those matrices that come in pairs of which one can be doubled and the other halved: queries and keys.

    Their products alone enter the softmax, and AWQ does not clip them. With norms on queries and keys (Qwen3) the
    output is not the same to the last bit, for the small number in the norm, hence a tolerance: only clipping
    depends on it.
    """
    parameters = dict(layer.named_parameters())
    before = run()
    limit = float(before.abs().max()) * 1e-3
    found: set[str] = set()
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            if {first, second} & found:
                continue
            with _times(parameters, {first: 2.0, second: 0.5}):
                if float((run() - before).abs().max()) <= limit:
                    found |= {first, second}
    return found


class _times:  # noqa: N801  # read as a verb: with _times(…)
    """Matrices and their biases multiplied by powers of two while it is open."""

    def __init__(self, parameters: Mapping[str, Any], factors: Mapping[str, float]) -> None:
        named = {n.removesuffix("weight") + end: f for n, f in factors.items() for end in ("weight", "bias")}
        self._held = [(parameters[name], factor) for name, factor in named.items() if name in parameters]

    def __enter__(self) -> None:
        for parameter, factor in self._held:
            parameter.data *= factor

    def __exit__(self, *_: object) -> None:
        for parameter, factor in self._held:
            parameter.data /= factor

"""The searches of AWQ: a scale for each input channel, bounds for each group.

    s = ā^α / sqrt(max · min),   ā the mean of |x| over all tokens,   α of 0, 1/20, … 19/20

The α is taken whose quantised weights Q(W s) / s change the output of the piece of the layer least. α = 0 is plain
rounding, so on these tokens the result is never worse than that.

    Lin et al. 2024, "AWQ: Activation-aware Weight Quantization", section 3.2, equations 4 and 5; the norming and the
    grids are those of the authors' code (mit-han-lab/llm-awq, awq/quantize/auto_scale.py and auto_clip.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

GRID = 20
MOST_CLIPPED = 0.5  # of the largest value of a group
CLIP_TOKENS = 512
TOP = 15
SMALLEST = 1e-4  # of an activation, and of a scale


def rounded(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """The weight as its codes give it back: what `codecs.awq` encodes and decodes, in float32. Any leading axes."""
    import torch

    groups = weight.reshape(*weight.shape[:-1], -1, group_size)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    empty = low == high
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    scale = _half_up((high.double() - low.double()) / TOP)
    zero = torch.round(-low / scale).clamp(0, TOP)
    codes = torch.round(groups / scale).add_(zero).clamp_(0, TOP)
    return codes.sub_(zero).mul_(scale).reshape(weight.shape)


def _half_up(exact: torch.Tensor) -> torch.Tensor:
    """The least float16 not below, in float32; beyond float16 it is left as it is, and the codec refuses it."""
    import torch

    half = exact.half()
    bits = half.view(torch.int16) + (half.double() < exact).short()
    found = bits.view(torch.float16).float()
    return torch.where(torch.isfinite(found), found, exact.float())


def channel_scales(mean: torch.Tensor, alpha: float) -> torch.Tensor:
    """Scales of one α, normed so that the largest times the smallest is 1."""
    scale = mean.clamp(min=SMALLEST).pow(alpha).clamp(min=SMALLEST)
    return scale / (scale.max() * scale.min()).sqrt()


def best_scale(
    parameters: Mapping[str, Any], names: Sequence[str], mean: torch.Tensor, group_size: int,
    outputs: Callable[[], list[torch.Tensor]], allowed: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, list[float]]:  # fmt: skip
    """The best scale, and the error of each α: the sum of squares over all outputs.

    `names` are the matrices that are quantised, `outputs` runs the piece with what is in them, `allowed` turns a scale
    into one that can be folded.
    """
    import torch

    wanted = outputs()
    kept = {name: parameters[name].data for name in names}
    errors, scales = [], []
    try:
        for step in range(GRID):
            scale = allowed(channel_scales(mean, step / GRID)) if step else torch.ones_like(mean)
            for name in names:
                parameters[name].data = rounded(kept[name] * scale, group_size).div_(scale)
            errors.append(sum(float((a - b).square().sum()) for a, b in zip(outputs(), wanted, strict=True)))
            scales.append(scale)
    finally:
        for name in names:
            parameters[name].data = kept[name]
    return scales[errors.index(min(errors))], errors


def clipped(weight: torch.Tensor, x: torch.Tensor, group_size: int, rows_at_once: int = 64) -> torch.Tensor:
    """The weight with each group of a row clipped where its share of the output errs least.

    `x` are inputs (tokens, in). Bounds of 1, 0.95 … 0.55 of the largest absolute value are tried; 1 leaves the group.
    """
    import torch

    x = x[:: max(1, len(x) // CLIP_TOKENS)][:CLIP_TOKENS]
    grouped = x.reshape(len(x), -1, group_size)
    gram = torch.einsum("tgi,tgj->gij", grouped, grouped)  # |d xᵀ|² = d (xᵀ x) dᵀ, so that tokens are seen once
    made = weight.clone()
    for first in range(0, len(weight), rows_at_once):
        block = weight[first : first + rows_at_once].reshape(-1, gram.shape[0], group_size)
        largest = block.abs().amax(-1, keepdim=True)
        best, least = largest, torch.full_like(largest, torch.inf)
        for step in range(int(GRID * MOST_CLIPPED)):
            bound = largest * (1 - step / GRID)
            cut = block.clamp(-bound, bound)
            off = rounded(cut.reshape(len(block), -1), group_size).reshape(block.shape) - block
            error = (torch.einsum("rgi,gij->rgj", off, gram) * off).sum(-1, keepdim=True)
            better = error < least
            least, best = torch.where(better, error, least), torch.where(better, bound, best)
        made[first : first + rows_at_once] = block.clamp(-best, best).reshape(len(block), -1)
    return made

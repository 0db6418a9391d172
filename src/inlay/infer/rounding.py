"""Merged weights rounded at random to one of their two neighbours, in place of the nearer one.

With the distance to the neighbour as its probability the mean is the exact weight (stochastic rounding; Croci et al.,
"Stochastic rounding: implementation, error analysis and applications", 2022). It is as good a merge as the nearest one
in the same type, save for a larger variance of the error: 1/6 against 1/12 of a squared unit in the last place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Tensor = Any  # torch.Tensor: torch is not there when types are checked


def stochastic(exact: Tensor, dtype: torch.dtype, generator: Any) -> Tensor:
    """`exact`, float32, rounded at random to `dtype`, one of float32, bfloat16 and float16.

    What float32 has lost of the exact weight is not known: for that type the part of a unit that is missing is drawn,
    uniform in ±1/2, as it is for weights of no particular kind. Never Inf where the nearest value is finite.
    """
    import torch

    near = exact.to(dtype)
    u = torch.rand(exact.shape, generator=generator)
    if dtype == torch.float32:
        missing = torch.rand(exact.shape, generator=generator) - 0.5
        other = neighbour(near, missing > 0)
        moves = u < missing.abs()
    else:
        missing = exact - near.float()
        other = neighbour(near, missing > 0)
        moves = u < missing.abs() / (other.float() - near.float()).abs()
    return torch.where(moves & other.isfinite(), other, near)


def neighbour(values: Tensor, up: Tensor) -> Tensor:
    """The next larger value of the type where `up`, the next smaller one elsewhere; for finite values."""
    import torch

    bits = values.view(torch.int32 if values.element_size() == 4 else torch.int16)
    # Bits of floats count up with the magnitude. From zero, of either sign, the next is the smallest of a sign.
    away = (values > 0) == up
    stepped = torch.where(away, bits + 1, bits - 1).view(values.dtype)
    smallest = torch.ones_like(bits).view(values.dtype)
    return torch.where(values == 0, torch.where(up, smallest, -smallest), stepped)

"""The float64 path on an accelerator, in torch: the same bound, so the same bytes.

Only sums of low-rank products run there; what the bound leaves open comes back to be decided exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from inlay.dtypes import Array, DType, F64Array
from inlay.errors import InputError
from inlay.tuners.bounded import SLACK, TINY, U

if TYPE_CHECKING:
    import torch


def find_device(name: str) -> torch.device | None:
    """The device of `--device_map`: None for the CPU, where no torch is needed.

    Raises InputError for a device that is not there.
    """
    if name == "cpu":
        return None
    if name != "auto" and not (name == "cuda" or (name.startswith("cuda:") and name[5:].isdigit())):
        raise InputError(f"device_map {name!r} is not supported; use cpu, auto or cuda:N")
    try:
        import torch
    except ImportError:
        if name == "auto":
            return None
        raise InputError(f"--device_map {name} needs torch: pip install 'inlay[torch]'") from None
    there = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda:0") if there else None
    device = torch.device(name)
    if (device.index or 0) >= there:
        raise InputError(f"--device_map {name}: this machine has {there} CUDA devices")
    return device


def merge(
    raw: Array, source: DType, pairs: Sequence[tuple[F64Array, F64Array, float]], dtype: DType, device: torch.device
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Stored bits of `raw + Σ s · left @ right`, and which elements are still open."""
    import torch

    stored = torch.from_numpy(raw.view(f"<i{raw.itemsize}")).to(device).view(getattr(torch, source.torch))
    value = stored.double()
    error = torch.zeros_like(value)
    for left, right, scaling in pairs:
        l, r = torch.from_numpy(left).to(device), torch.from_numpy(right).to(device)  # noqa: E741
        bound = (SLACK * (l.shape[1] + 3) * U * abs(scaling)) * torch.outer(_norm(l, 1), _norm(r, 0))
        neutral = ~l.any(dim=1)[:, None] | ~r.any(dim=0)[None, :] | (scaling == 0)
        value = torch.where(neutral, value, value + scaling * (l @ r))
        error = error + torch.where(neutral, 0.0, SLACK * (bound + U * value.abs()) + TINY)
    low, high = _rounded(value - error, dtype), _rounded(value + error, dtype)
    exact = error == 0
    bits = torch.where(exact, _rounded(value, dtype), low)
    open_ = ((low != high) | ~error.isfinite()) & ~exact & value.isfinite()
    open_ |= ~value.isfinite() & stored.double().isfinite()
    return bits.cpu().numpy().view(np.dtype(dtype.raw)), open_.cpu().numpy()


def _norm(x: torch.Tensor, axis: int) -> torch.Tensor:
    """Euclidean norm, an upper bound where squares would underflow."""
    import torch

    largest = x.abs().amax(dim=axis)
    return torch.where(largest < 2.0**-500, largest * float(x.shape[axis]) ** 0.5, x.norm(dim=axis))


def _rounded(x: torch.Tensor, dtype: DType) -> torch.Tensor:
    """Bits of `x` rounded once, as integers; 16-bit types go through float32 rounded to odd."""
    import torch

    nearest = x.float()
    if dtype.bits == 32:
        return nearest.view(torch.int32)
    if dtype.bits == 64:
        return x.view(torch.int64)
    bits = nearest.view(torch.int32)
    error = x - nearest.double()
    away = (error > 0) == ~nearest.signbit()
    adjust = (error != 0) & (bits & 1 == 0) & nearest.isfinite()
    step = torch.where(away, 1, -1).to(torch.int32)
    odd = torch.where(adjust, bits + step, bits).view(torch.float32)
    return odd.to(getattr(torch, dtype.torch)).view(torch.int16)

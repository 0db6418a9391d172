"""FourierFT: a few trained frequencies of the change, at random places of its spectrum.

W' = W + s · Re ifft2(S),  S zero but for the n trained coefficients        Gao et al. 2024, section 3

The file holds the coefficients only. Their places are the first n of `torch.randperm(out · in)` under
`random_loc_seed`, counted along the rows of the spectrum, so torch is needed to find them. PEFT transforms
in float32; this is float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from inlay.dtypes import F64Array
from inlay.errors import InputError

PEFT_TYPE = "FOURIERFT"
REQUIRED = ("fourierft_spectrum",)
OPTIONAL = ()
SHARED = ()
WHOLE = False
ADDITIVE = True
FIELDS = frozenset({"scaling", "random_loc_seed"})
IGNORED = frozenset({"n_frequency", "n_frequency_pattern", "init_weights"})  # the spectrum has its own length
REFUSED: dict[str, str] = {}

SCALING, SEED = 150.0, 777  # PEFT's own, for a config without the fields


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """Strength of the change, and the seed of its places."""
    scaling, seed = raw.get("scaling"), raw.get("random_loc_seed")
    return {
        "scaling": float(SCALING if scaling is None else scaling),
        "seed": int(SEED if seed is None else seed),
    }


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    found = shapes["fourierft_spectrum"]
    if len(shape) != 2:
        return f"FourierFT is for matrices, the weight is {shape}"
    if len(found) == 1 and found[0] <= shape[0] * shape[1]:
        return None
    return f"fourierft_spectrum {found} does not fit the spectrum {shape}"


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """Coefficients with their rows and columns in the spectrum, ordered by column."""
    spectrum = parts["fourierft_spectrum"]
    rows, cols = np.divmod(_places(len(spectrum), settings["seed"], shape), shape[1])
    order = np.argsort(cols, kind="stable")
    return {"spectrum": spectrum[order], "rows": rows[order], "cols": cols[order]}


def _places(count: int, seed: int, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    try:
        import torch
    except ImportError:
        raise InputError("FourierFT needs torch to find its frequencies: pip install 'inlay[torch]'") from None
    generator = torch.Generator().manual_seed(seed)
    places: npt.NDArray[np.int64] = torch.randperm(shape[0] * shape[1], generator=generator)[:count].numpy().copy()
    return places


def delta(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...], first: int, last: int
) -> F64Array:
    """Rows `[first, last)`: the transform down the columns at these rows only, then along each row."""
    cols, starts = np.unique(parts["cols"], return_index=True)
    spectrum = np.zeros((last - first, shape[1]), np.complex128)
    if len(starts):
        turns = np.outer(np.arange(first, last), parts["rows"]) % shape[0]  # whole numbers: no phase is lost
        waves = np.exp(2j * np.pi / shape[0] * np.arange(shape[0]))[turns] * parts["spectrum"]
        spectrum[:, cols] = np.add.reduceat(waves, starts, axis=1)
    return np.asarray(settings["scaling"] / shape[0] * np.fft.ifft(spectrum, axis=1).real)

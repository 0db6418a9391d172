"""Places that a file names by number: of elements in a weight, of vectors in a bank."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def outside(places: npt.NDArray[np.generic], limits: npt.NDArray[np.int64] | int) -> bool:
    """Whether one of them is no whole number in `[0, limit)`; NaN is none."""
    numbers = places.astype(np.float64)  # exact below 2⁵³, and no weight has more elements
    with np.errstate(invalid="ignore"):
        inside = (numbers >= 0) & (numbers < limits) & (numbers == np.floor(numbers))
    return not bool(inside.all())


def span(places: npt.NDArray[np.generic]) -> str:
    """`3 to 12`, for messages."""
    return f"{places.min():g} to {places.max():g}"

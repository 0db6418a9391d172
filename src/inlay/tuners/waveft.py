"""WaveFT: a few trained wavelet coefficients of the change, at random places.

W' = W + s · (inverse wavelet transform of one level of S),  S zero but for the n trained coefficients;
without `use_idwt` W' = W + s · S        Bilican et al. 2025

The file holds the coefficients only. Their places are the first n of `torch.randperm(out · in)` under
`random_loc_seed`, counted along the rows of the weight, so torch is needed to find them. For a filter of L taps S is
padded by L − 2 on each axis (and one more where that is odd), the weight's places in its middle. In its top right
quarter, whose rows are low and columns high, PEFT's transform takes rows as high and columns as low, and the reverse
at the bottom left, in training as in merging; so it is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from inlay.dtypes import F64Array
from inlay.errors import InputError

PEFT_TYPE = "WAVEFT"
REQUIRED = ("waveft_spectrum",)
OPTIONAL = ()
SHARED = ()
WHOLE = False
ADDITIVE = True
FIELDS = frozenset({"scaling", "random_loc_seed", "wavelet_family", "use_idwt"})
# The spectrum has its own length.
IGNORED = frozenset({"n_frequency", "n_frequency_pattern", "proportional_parameters", "init_weights"})
REFUSED: dict[str, str] = {}

SCALING, SEED, WAVELET = 25.0, 777, "db1"  # PEFT's own, for a config without the fields

# Wavelet -> tangents of the L/2 rotations of which its filter is made (Vaidyanathan and Hoang 1988): Daubechies,
# symlets, coiflets.
TANGENTS: dict[str, tuple[float, ...]] = {
    "db1": (1.0,),
    "db2": (-0.2679491924311227, 1.7320508075688772),
    "db3": (0.10588941994813487, -0.5460964029793958, 2.425497243911958),
    "db4": (-0.046000097113777894, 0.25929388162988976, -0.8109313444939048, 3.102931485830326),
    "db5": (0.020834948930692848, -0.1331845456485091, 0.4248292778014028, -1.06394342665818, 3.771519211689269),
    "db6": (-0.009658363867335857, 0.06999987822450948, -0.24301459735988695, 0.5896181242331424, -1.3083360430181672,
        4.434468298690675),
    "db7": (0.004543409986180823, -0.03703317232894079, 0.14214170477042137, -0.3616950920259952, 0.7501664330496637,
        -1.5465355920499169, 5.093498484303615),
    "db8": (-0.0021588710067178478, 0.019605582091024497, -0.08329313467990687, 0.228281430588519, -0.48202108808897093,
        0.906100829140833, -1.7802042665222924, 5.7496416120242895),
    "db9": (0.0010333361706780816, -0.01036293847277634, 0.04854267571076777, -0.14460842060921011, 0.32112864925948886,
        -0.6008993263619814, 1.057930510492152, -2.0104771130011807, 6.403566670295305),
    "db10": (-0.0004973443606301636, 0.005464316860480698, -0.02806620649005272, 0.09103253015482796,
        -0.2157216293857113, 0.41615225892721125, -0.7172625003264426, 1.2063222708278143, -2.2381440048963905,
        7.055732716417224),
    "sym4": (-2.351285672986294, 1.2564778787962168, 6.972455802370357, -0.3911469419689111),
    "sym5": (1.3989064121710275, 3.567846210908284, 0.8287616462185936, -4.081175105656115, -1.079991845522442),
    "sym6": (-1.9747064862832033, 0.7763500443437893, -2.1550900078995743, -11.229629424855895, 1.3321347378963373,
        -0.2266091476054093),
    "sym7": (0.26117729022420594, 1.4150166674780478, 4.546804711570253, -0.0037828977320806764, -0.8388182132135168,
        -8.276110359622784, 0.39055082371307986),
    "sym8": (-1.7896851003760033, 0.6213016822266861, -0.9829012628266035, 4.355319509576526, 9.652492888463756,
        -2.6980072028165525, 0.7285055933021375, -0.16027961659739964),
    "sym9": (1.3098911470027366, 0.05950649880113883, -16.963293202841413, -0.3924323735820099, 0.5857532606546362,
        -1.568160662426332, 3.6016112499628425, 3.376810609629686, -0.442411321397022),
    "sym10": (-1.676704721918215, 0.5368851934683477, -0.6886633471570108, 1.772209489254381, -5.3071843436027235,
        -11.525724828283902, 2.94933886032095, -1.5119980530675536, 0.501730674704194, -0.12417250237040085),
    "coif1": (0.21525043702153024, -2.6457513110645903, -4.645751311064591),
    "coif2": (-0.04396989389570899, 0.1613415969259326, -0.7591665972145133, 8.580383064208137, 1.7776257022521658,
        -2.530303620724316),
    "coif3": (0.009120773919642508, -0.06650543756005133, 0.11993109665276201, -0.4513812606855209, 2.2670211935420497,
        -7.749846207007145, -3.8899782237595537, 0.8935982819359408, -2.0515539827866287),
}  # fmt: skip
TANGENTS |= {"sym2": TANGENTS["db2"], "sym3": TANGENTS["db3"]}
# The low filter that PEFT 0.21 has under this name (tuners/waveft/wavelet.py). It is not the wavelet's, and not
# orthogonal, so it is no chain of rotations; adapters were trained with it all the same.
TAPS: dict[str, tuple[float, ...]] = {
    "coif4": (0.000892313902537003, -0.001629492425226786, -0.007346167936268051, 0.016066782559655206,
        0.026792362270697267, -0.07314290441258073, -0.04877076756791383, 0.42747788393337943, 0.7842491699914577,
        0.4354613422154989, -0.0615536584279808, -0.09176542029839818, 0.02811565972369683, 0.024945239305530328,
        -0.010417174666056649, -0.0032702731315608483, 0.0020166775120449105, 0.0006600112966963782,
        -0.00017960623150243602, -0.0001598819866911797, 4.3110389559021745e-05, 1.791447688858775e-05,
        -2.2414246658720156e-06, -1.5895026298510706e-06),
}  # fmt: skip
WAVELETS = (*TANGENTS, *TAPS)
NO_COIF5 = (
    "PEFT's filter for wavelet_family 'coif5' has 48 numbers where its layer makes room for 30, so its change is "
    "smaller than the weight and PEFT (0.21) can neither train nor merge it; choose another wavelet"
)


def settings(raw: Mapping[str, Any], rank: int, alpha: float | None) -> dict[str, Any]:
    """Strength of the change, the seed of its places, and the wavelet, "" for none."""
    scaling, seed = raw.get("scaling"), raw.get("random_loc_seed")
    return {
        "scaling": float(SCALING if scaling is None else scaling),
        "seed": int(SEED if seed is None else seed),
        "wavelet": "" if raw.get("use_idwt") is False else str(raw.get("wavelet_family") or WAVELET),
    }


def check(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], shape: tuple[int, ...]) -> str | None:
    """What does not fit a weight of this shape."""
    found, wavelet = shapes["waveft_spectrum"], settings["wavelet"]
    if wavelet == "coif5":
        return NO_COIF5
    if wavelet and wavelet not in WAVELETS:
        return f"wavelet_family {wavelet!r} is none of {', '.join(WAVELETS)}, which are all that PEFT has"
    if len(shape) != 2:
        return f"WaveFT is for matrices, the weight is {shape}"
    if len(found) == 1 and found[0] <= shape[0] * shape[1]:
        return None
    return f"waveft_spectrum {found} does not fit the coefficients {shape}"


def prepare(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...]
) -> Mapping[str, F64Array]:
    """Coefficients with their places in the padded matrix, and the low and high filter (2, L)."""
    spectrum = parts["waveft_spectrum"]
    rows, cols = np.divmod(_places(len(spectrum), settings["seed"], shape), shape[1])
    if not settings["wavelet"]:
        return {"spectrum": spectrum, "rows": rows, "cols": cols}
    filters = _filters(settings["wavelet"])
    rows += (_padded(shape[0], filters) - shape[0]) // 2
    cols += (_padded(shape[1], filters) - shape[1]) // 2
    return {"spectrum": spectrum, "rows": rows, "cols": cols, "filters": filters}


def _places(count: int, seed: int, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    try:
        import torch
    except ImportError:
        raise InputError("WaveFT needs torch to find its coefficients: pip install 'inlay[torch]'") from None
    generator = torch.Generator().manual_seed(seed)
    places: npt.NDArray[np.int64] = torch.randperm(shape[0] * shape[1], generator=generator)[:count].numpy().copy()
    return places


def _filters(wavelet: str) -> F64Array:
    """The low filter and its mirror, (2, L)."""
    low = np.array(TAPS[wavelet]) if wavelet in TAPS else _rotations(TANGENTS[wavelet])
    return np.stack([low, low[::-1] * np.resize([1.0, -1.0], len(low))])


def _rotations(tangents: tuple[float, ...]) -> F64Array:
    """A chain of rotations of even and odd taps with a delay between."""
    taps = np.array([[1.0], [tangents[0]]]) / np.sqrt(1 + tangents[0] ** 2)
    for tangent in tangents[1:]:
        even, odd = np.append(taps[0], 0.0), np.append(0.0, taps[1])
        taps = np.stack([even - tangent * odd, tangent * even + odd]) / np.sqrt(1 + tangent**2)
    low = taps.T.reshape(-1)
    return np.asarray(np.sign(low.sum()) * low)


def _padded(size: int, filters: F64Array) -> int:
    length: int = size + filters.shape[1] - 2
    return length + length % 2


def delta(
    parts: Mapping[str, F64Array], settings: Mapping[str, Any], shape: tuple[int, ...], first: int, last: int
) -> F64Array:
    """Rows `[first, last)`: the transform down the columns at these rows only, then along each row."""
    spectrum, rows, cols = settings["scaling"] * parts["spectrum"], parts["rows"], parts["cols"]
    if not settings["wavelet"]:
        changes = np.zeros((last - first, shape[1]))
        here = (first <= rows) & (rows < last)
        changes[rows[here] - first, cols[here]] = spectrum[here]
        return changes
    filters = parts["filters"]
    length, tall, wide = filters.shape[1], *(_padded(size, filters) // 2 for size in shape)
    down, across = cols // wide, rows // tall  # which filter: each axis takes the half of the other
    bands = np.zeros((last - first, 2, wide))
    for tap in range(length):
        at = 2 * (rows % tall) + tap - (length - 2) - first
        here = (at >= 0) & (at < last - first)
        places = at[here], across[here], (cols % wide)[here]
        np.add.at(bands, places, filters[down[here], tap] * spectrum[here])
    whole = np.zeros((last - first, 2 * wide + length - 2))
    for tap in range(length):
        low, high = filters[:, tap]
        whole[:, tap : tap + 2 * wide - 1 : 2] += low * bands[:, 0] + high * bands[:, 1]
    return whole[:, length - 2 : length - 2 + shape[1]]

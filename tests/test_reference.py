"""Every element is the correctly rounded one: against exact integers, by all three ways of computing it.

The kernel, the float64 path (INLAY_KERNEL=0) and torch on a device must each give the rounding of the exact
sum, hence the same bytes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import inlay
from cases import TORCH_NAMES
from inlay.dtypes import DTYPES as STORED
from inlay.dtypes import decode, round_nearest
from inlay.tuners import device, kernel
from oracle import FORMATS, bits, exact_sum, float64, read, round_exactly, rounded

WAYS = ("kernel", "float64", "device")
ADAPTER_TYPES = ("F32", "BF16", "F16", "F64")
RANKS = (1, 3, 16, 64, 70)
WIDTHS = (1, 63, 64, 65, 130)
ROWS = 5  # one more than the kernel takes at a time

Pair = tuple[Any, Any]  # A (r, in) and B (out, r), torch


# --- a base and an adapter of given tensors -----------------------------------------------------------


def write_pair(
    root: Path, weights: dict[str, Any], pairs: dict[str, Pair], alpha: float, ranks: dict[str, int]
) -> tuple[Path, Path]:
    """A base with `<name>.weight` and an adapter with a pair for each name; scaling is `alpha / rank`."""
    from safetensors.torch import save_file

    base, adapter = root / "base", root / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    (base / "config.json").write_text("{}")
    save_file({f"{k}.weight": w.contiguous() for k, w in weights.items()}, base / "model.safetensors", {"format": "pt"})
    tensors = {}
    for name, (a, b) in pairs.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": alpha, "rank_pattern": ranks, "target_modules": sorted(pairs)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return base, adapter


@pytest.fixture
def merge_by(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Merge by one of the three ways; tensors by key."""
    import torch

    from inlay.run import execute

    runs = itertools.count()

    def merge(
        way: str, base: Path, adapters: Sequence[Path], torch_dtype: str | None = None, **options: Any
    ) -> dict[str, Any]:
        monkeypatch.setenv("INLAY_KERNEL", "0" if way == "float64" else "1")
        monkeypatch.setattr(execute, "find_device", lambda _: torch.device("cpu") if way == "device" else None)
        plan = inlay.make_plan(base, adapters, torch_dtype=torch_dtype, **options)
        out = tmp_path / f"merged{next(runs)}"
        inlay.run_plan(plan, out, workers=1, max_memory=options.get("max_memory", "1GB"))
        return read(out)

    return merge


def scaling_of(alpha: float, rank: int) -> float:
    return alpha / rank


def expected_bits(weight: Any, pair: Pair, scaling: float, dtype: str) -> np.ndarray:
    """Bits of the correctly rounded sum, as torch stores them; an exact zero has the sign of the base's zero."""
    a, b = pair
    w = float64(weight)
    value = round_exactly(*exact_sum(w.reshape(len(w), -1), [(float64(b), float64(a), scaling)]), dtype)
    return bits(as_stored(value, dtype))


def as_stored(value: np.ndarray, dtype: str) -> Any:
    """float64 values that the format holds, as a torch tensor of it: no rounding happens here."""
    import torch

    assert np.array_equal(rounded(value, dtype), value), "not values of the format"
    return torch.from_numpy(value).to(torch.float32).to(getattr(torch, TORCH_NAMES[dtype]))


def assert_same(found: Any, wanted: np.ndarray, what: str = "") -> None:
    """Equal values bit for bit; zeros may differ in sign (which `-0.0` tests look at)."""
    got = bits(found)
    zero = wanted.dtype.type(0), np.iinfo(wanted.dtype).min
    same = (got == wanted) | (np.isin(got, zero) & np.isin(wanted, zero))
    assert same.all(), f"{what}: {(~same).sum()} of {same.size} elements, first at {np.argwhere(~same)[0]}"


# --- the whole grid -----------------------------------------------------------------------------------


def random_tensor(shape: tuple[int, ...], dtype: str, generator: Any, scale: float = 1.0) -> Any:
    import torch

    x = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    return x.to(getattr(torch, TORCH_NAMES[dtype]))


@pytest.mark.parametrize("stored", ADAPTER_TYPES)
@pytest.mark.parametrize("source", FORMATS)
def test_every_element_is_correctly_rounded_by_every_way(
    source: str, stored: str, tmp_path: Path, merge_by: Callable[..., dict[str, Any]]
) -> None:
    """All ranks and widths, to each of the three types, from a base and an adapter of any type."""
    import torch

    generator = torch.Generator().manual_seed(1)
    alpha = 1.7  # no power of two, and not exact in any stored type
    weights, pairs, ranks = {}, {}, {}
    for rank, width in itertools.product(RANKS, WIDTHS):
        name = f"m{rank}x{width}"
        weights[name] = random_tensor((ROWS, width), source, generator, 0.05)
        a = random_tensor((rank, width), stored, generator, rank**-0.5)
        pairs[name] = a, random_tensor((ROWS, rank), stored, generator, 0.1)
        ranks[name] = rank
    base, adapter = write_pair(tmp_path, weights, pairs, alpha, ranks)
    sums = {
        name: exact_sum(float64(weights[name]), [(float64(b), float64(a), scaling_of(alpha, ranks[name]))])
        for name, (a, b) in pairs.items()
    }
    for dtype in FORMATS:
        wanted = {name: bits(as_stored(round_exactly(*sums[name], dtype), dtype)) for name in sums}
        for way in WAYS:
            merged = merge_by(way, base, [adapter], TORCH_NAMES[dtype])
            for name, expected in wanted.items():
                assert_same(merged[f"{name}.weight"], expected, f"{way} {name} to {dtype}")


def test_the_grid_takes_all_three_ways(
    tmp_path: Path, merge_by: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ways are what they are called: each calls its own code, so that their agreement says something."""
    import torch

    called: set[str] = set()

    def spy(module: Any, name: str, label: str) -> None:
        original = getattr(module, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            called.add(label)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    from inlay.tuners import lora

    spy(kernel, "merge", "kernel")
    spy(device, "merge", "device")
    spy(lora, "merge", "float64")
    monkeypatch.setattr("inlay.run.execute.survival", lambda plan: None)  # looks at the delta by float64
    generator = torch.Generator().manual_seed(1)
    weights = {"m": random_tensor((4, 8), "BF16", generator)}
    pairs = {"m": (random_tensor((2, 8), "F32", generator), random_tensor((4, 2), "F32", generator))}
    base, adapter = write_pair(tmp_path, weights, pairs, 1.0, {"m": 2})
    for way in WAYS:
        called.clear()
        merge_by(way, base, [adapter])
        assert called == {way}


# --- adversarial values -------------------------------------------------------------------------------


def check_all_ways(
    weight: Any,
    pair: Pair,
    alpha: float,
    dtypes: Sequence[str],
    tmp_path: Path,
    merge_by: Callable[..., dict[str, Any]],
) -> None:
    rank = len(pair[0])
    base, adapter = write_pair(tmp_path, {"m": weight}, {"m": pair}, alpha, {"m": rank})
    for dtype in dtypes:
        wanted = expected_bits(weight, pair, scaling_of(alpha, rank), dtype)
        for way in WAYS:
            found = merge_by(way, base, [adapter], TORCH_NAMES[dtype])["m.weight"]
            assert_same(found, wanted, f"{way} to {dtype}")


@pytest.mark.parametrize("nudge", [0.0, 2.0**-30, -(2.0**-30), 2.0**-100, -(2.0**-100)])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_sums_at_a_tie_go_to_the_even_neighbour_and_beside_it_to_the_nearer(
    dtype: str, nudge: float, tmp_path: Path, merge_by: Callable[..., dict[str, Any]]
) -> None:
    """w + half a spacing is a tie; what is added beside it decides, however little it is."""
    import torch

    form = FORMATS[dtype]
    values = np.arange(2**form.fraction, 2**form.fraction + 126) * 2.0**-form.fraction  # 1, 1 + ulp, …
    weight = as_stored(np.stack([values, -values, values * 8, values / 4, -values / 64]), dtype)
    half = 2.0 ** -(form.fraction + 1)
    scale = torch.tensor([[1.0], [1.0], [8.0], [0.25], [2.0**-6]])
    ones = torch.ones(126)
    pair = torch.stack([ones * half, ones * nudge]), torch.cat([scale, torch.ones_like(scale)], 1)
    check_all_ways(weight, pair, 2.0, [dtype], tmp_path, merge_by)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_a_float32_base_at_ties_is_rounded_to_even_when_the_delta_cancels(
    dtype: str, tmp_path: Path, merge_by: Callable[..., dict[str, Any]]
) -> None:
    """Base values half way between neighbours; factors are not zero, their product is."""
    import torch

    form = FORMATS[dtype]
    values = (np.arange(130) + 0.5) * 2.0**-form.fraction + 1
    weight = torch.from_numpy(np.stack([values, -values, 3 * values])).float()
    a = torch.randn(1, 130, generator=torch.Generator().manual_seed(2))
    pair = torch.cat([a, a]), torch.tensor([[1.0, -1.0], [0.3, -0.3], [1e-20, -1e-20]])
    check_all_ways(weight, pair, 2.0, [dtype], tmp_path, merge_by)


def test_cancellation_leaves_the_exact_rest(tmp_path: Path, merge_by: Callable[..., dict[str, Any]]) -> None:
    """delta = −w up to float32's last bit: the rest is 2**-24 of the terms, and exact."""
    import torch

    generator = torch.Generator().manual_seed(3)
    column, row = torch.randn(5, 1, generator=generator), torch.randn(1, 65, generator=generator)
    weight = -(column * row)  # float32, rounded: w + B A is the rounding error of the product
    check_all_ways(weight, (row, column), 1.0, list(FORMATS), tmp_path, merge_by)


def test_minus_the_weight_gives_zero(tmp_path: Path, merge_by: Callable[..., dict[str, Any]]) -> None:
    import torch

    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
    pair = -weight.float(), torch.eye(4)
    base, adapter = write_pair(tmp_path, {"m": weight}, {"m": pair}, 4.0, {"m": 4})
    for way in WAYS:
        found = merge_by(way, base, [adapter])["m.weight"]
        assert (bits(found) == 0).all(), way


@pytest.mark.parametrize("source", FORMATS)
def test_zero_b_returns_the_identical_bits(
    source: str, tmp_path: Path, merge_by: Callable[..., dict[str, Any]]
) -> None:
    """−0.0, subnormals and the largest number included; a base type that is kept is not touched."""
    import torch

    form = FORMATS[source]
    least = 2.0 ** (form.least - form.fraction)
    special = [0.0, -0.0, least, -least, 3 * least, form.largest, -form.largest, 1.0, -1.5]
    row = torch.tensor(special * 9, dtype=torch.float64).to(getattr(torch, TORCH_NAMES[source]))
    weight = torch.stack([row, -row, row, row, -row, row])
    pair = torch.randn(3, len(row), generator=torch.Generator().manual_seed(5)), torch.zeros(6, 3)
    base, adapter = write_pair(tmp_path, {"m": weight}, {"m": pair}, 3.0, {"m": 3})
    for way in WAYS:
        assert np.array_equal(bits(merge_by(way, base, [adapter])["m.weight"]), bits(weight)), way


@pytest.mark.parametrize("source", FORMATS)
def test_rows_and_columns_with_zero_factors_keep_their_bits(
    source: str, tmp_path: Path, merge_by: Callable[..., dict[str, Any]]
) -> None:
    """Half of the rows of B and of the columns of A are zero; what they meet keeps even the sign of zero."""
    import torch

    generator = torch.Generator().manual_seed(6)
    weight = random_tensor((6, 70), source, generator)
    weight[:, ::3] = 0.0
    weight[:, 1::3] = -0.0
    a, b = torch.randn(3, 70, generator=generator), torch.randn(6, 3, generator=generator)
    a[:, ::2] = 0
    b[::2] = 0
    base, adapter = write_pair(tmp_path, {"m": weight}, {"m": (a, b)}, 3.0, {"m": 3})
    wanted = bits(weight)
    for way in WAYS:
        found = bits(merge_by(way, base, [adapter])["m.weight"])
        assert np.array_equal(found[::2], wanted[::2]), way
        assert np.array_equal(found[:, ::2], wanted[:, ::2]), way
        assert not np.array_equal(found[1::2, 1::2], wanted[1::2, 1::2])


@pytest.mark.parametrize("dtype", FORMATS)
def test_subnormal_results_are_correctly_rounded(
    dtype: str, tmp_path: Path, merge_by: Callable[..., dict[str, Any]]
) -> None:
    """Sums around the least positive number of the format, its halves and its ties."""
    import torch

    form = FORMATS[dtype]
    least = 2.0 ** (form.least - form.fraction)
    steps = np.arange(-32, 33)
    weight = as_stored(np.stack([steps * least] * 4), dtype)
    factor = 2.0 ** (form.least // 2)
    a = torch.full((1, 65), least / factor / 4, dtype=torch.float64).float()
    b = torch.tensor([[1.0], [2.0], [3.0], [-2.0]]) * factor
    check_all_ways(weight, (a, b), 1.0, [dtype], tmp_path, merge_by)


EXTREMES = {
    "tiny B, huge A": (2.0**-135, 2.0**110),
    "subnormal B, huge A": (2.0**-146, 2.0**120),
    "huge B, tiny A": (2.0**110, 2.0**-135),
    "huge B, subnormal A": (2.0**120, 2.0**-147),
    "both tiny": (2.0**-100, 2.0**-100),
    "both small": (2.0**-60, 2.0**-70),
    "large, near the end of the range": (2.0**60, 2.0**60),
}


@pytest.mark.parametrize("weight_scale", [0.0, 1.0, 2.0**-26, 2.0**-100])
@pytest.mark.parametrize("scales", EXTREMES.values(), ids=EXTREMES)
def test_factors_of_extreme_size_are_correctly_rounded(
    scales: tuple[float, float], weight_scale: float, tmp_path: Path, merge_by: Callable[..., dict[str, Any]]
) -> None:
    """float32 factors whose product is ordinary, or nearly nothing, though each alone is at the end of its range.

    64 rows, so that an error bound which is short by a little meets a boundary that shows it.
    """
    import torch

    generator = torch.Generator().manual_seed(8)
    b = (torch.randn(64, 3, generator=generator, dtype=torch.float64) * scales[0]).float()
    a = (torch.randn(3, 130, generator=generator, dtype=torch.float64) * scales[1]).float()
    weight = (torch.randn(64, 130, generator=generator, dtype=torch.float64) * weight_scale).float()
    check_all_ways(weight, (a, b), 5.1, ["BF16", "F32"], tmp_path, merge_by)


def test_magnitudes_that_vary_within_a_tensor_are_correctly_rounded(
    tmp_path: Path, merge_by: Callable[..., dict[str, Any]]
) -> None:
    """Every factor and every weight has its own exponent, from 2**-40 to 2**12: bounds by rows are loose there."""
    import torch

    rng = np.random.default_rng(9)

    def wild(*shape: int) -> Any:
        return torch.from_numpy(rng.standard_normal(shape) * 2.0 ** rng.integers(-40, 13, shape)).float()

    check_all_ways(wild(9, 130), (wild(20, 130), wild(9, 20)), 20.0, ["BF16", "F32"], tmp_path, merge_by)


def cancelling(generator: Any, size: float, clean: int = 0) -> tuple[Any, Any]:
    """Factors (64, 5) and (5, 130): two pairs of large products that cancel exactly, and one ordinary product.

    In the first `clean` columns there are no large ones. Sums in floating point are off by `size` · 2**-53.
    """
    import torch

    left = torch.randn(64, 3, generator=generator)
    right = torch.randn(3, 130, generator=generator)
    right[:2] *= size
    right[:2, :clean] = 0
    order = [0, 1, 2, 0, 1]
    sign = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])
    return left[:, order], right[order] * sign[:, None]


@pytest.mark.parametrize("size", [2.0**8, 2.0**24])
def test_large_terms_that_cancel_leave_the_correct_rounding(
    size: float, tmp_path: Path, merge_by: Callable[..., dict[str, Any]]
) -> None:
    """A result of size 1 from terms of `size`: one in some hundred elements is rounded wrongly by plain float64."""
    import torch

    generator = torch.Generator().manual_seed(15)
    left, right = cancelling(generator, size)
    weight = torch.randn(64, 130, generator=generator)
    check_all_ways(weight, (right, left), 1.7, ["F32", "BF16"], tmp_path, merge_by)


@pytest.mark.parametrize("value", [2.0**-280, 2.0**-400, 2.0**-700])
def test_float64_factors_far_below_one_still_break_a_tie(
    value: float, tmp_path: Path, merge_by: Callable[..., dict[str, Any]]
) -> None:
    """1 + 2**-8 is a tie of bfloat16; a product of `value`² in float64 factors moves it to the upper neighbour.

    Squares of such factors leave float64's range, so a norm of them must not be taken for zero.
    """
    import torch

    weight = torch.full((2, 3), 1 + 2.0**-8)
    pair = torch.full((1, 3), value, dtype=torch.float64), torch.tensor([[value], [-value]], dtype=torch.float64)
    check_all_ways(weight, pair, 1.0, ["BF16"], tmp_path, merge_by)


@pytest.mark.parametrize("alpha", [1e-120, 1e-170, 1e-300])
def test_a_scaling_far_below_one_still_breaks_a_tie(
    alpha: float, tmp_path: Path, merge_by: Callable[..., dict[str, Any]]
) -> None:
    import torch

    weight = torch.full((2, 3), 1 + 2.0**-8)
    pair = torch.ones(1, 3), torch.tensor([[1.0], [-1.0]])
    check_all_ways(weight, pair, alpha, ["BF16"], tmp_path, merge_by)


def test_a_bias_is_correctly_rounded(tmp_path: Path, merge_by: Callable[..., dict[str, Any]]) -> None:
    """`bias + s · lora_B.bias`, for which the pair's left factor is one."""
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(10)
    for source, dtype in itertools.product(FORMATS, FORMATS):
        root = tmp_path / f"{source}-{dtype}"
        weight, bias = random_tensor((130, 8), source, generator), random_tensor((130,), source, generator)
        pair = random_tensor((2, 8), "F32", generator), random_tensor((130, 2), "F32", generator)
        added = random_tensor((130,), "F32", generator, 0.01)
        base, adapter = write_pair(root, {"m": weight}, {"m": pair}, 1.7, {"m": 2})
        for file, extra in (
            ("base/model", {"m.bias": bias}),
            ("adapter/adapter_model", {"base_model.model.m.lora_B.bias": added}),
        ):
            path = root / f"{file}.safetensors"
            save_file({**load_file(path), **extra}, path, {"format": "pt"})
        value = round_exactly(
            *exact_sum(float64(bias)[None], [(np.ones((1, 1)), float64(added)[None], 1.7 / 2)]), dtype
        )
        for way in WAYS:
            found = merge_by(way, base, [adapter], TORCH_NAMES[dtype])["m.bias"]
            assert_same(found, bits(as_stored(value[0], dtype)), f"{way}, {source} to {dtype}")


@pytest.mark.parametrize(("source", "dtype"), list(itertools.product(FORMATS, FORMATS)))
def test_a_change_of_type_alone_is_correctly_rounded(
    source: str, dtype: str, tmp_path: Path, merge_by: Callable[..., dict[str, Any]]
) -> None:
    """An untouched tensor in another type: every finite 16-bit value, or float32 values at and beside ties."""
    import torch

    if source == "F32":
        form = FORMATS["BF16" if dtype == "F32" else dtype]
        ties = (np.arange(2**form.fraction) + 0.5) * 2.0**-form.fraction + 1
        values = torch.from_numpy(
            np.concatenate([ties * 2.0**e for e in (0, 3, form.least, form.least - form.fraction)])
        )
        values = values.float()
        values = torch.cat(
            [values, torch.nextafter(values, torch.tensor(9.0)), torch.nextafter(values, torch.tensor(-9.0))]
        )
        values = torch.cat([values, -values, torch.tensor([0.0, -0.0])])
    else:
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        values = every.view(getattr(torch, TORCH_NAMES[source]))
        values = values[values.isfinite() & (values.double().abs() <= FORMATS[dtype].largest)]
    pair = torch.ones(1, 4), torch.ones(4, 1)
    base, adapter = write_pair(
        tmp_path, {"m": torch.zeros(4, 4).to(values.dtype), "other": values}, {"m": pair}, 1.0, {"m": 1}
    )
    wanted = as_stored(rounded(float64(values), dtype), dtype)
    for way in WAYS:
        found = merge_by(way, base, [adapter], TORCH_NAMES[dtype])["other.weight"]
        assert np.array_equal(bits(found), bits(wanted)), way


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", FORMATS)
def test_a_result_is_refused_exactly_when_it_rounds_to_infinity(
    dtype: str, sign: int, way: str, tmp_path: Path, merge_by: Callable[..., dict[str, Any]]
) -> None:
    """The largest number plus half its spacing rounds to infinity; less than half, however little less, does not."""
    import torch

    form = FORMATS[dtype]
    half = sign * 2.0 ** (form.greatest - form.fraction - 1)
    weight = as_stored(np.full((1, 5), sign * form.largest), dtype)
    for share in (0.0, -(2.0**-20), -(2.0**-60), 2.0**-60, 2.0**-20, 1.0):
        pair = torch.ones(2, 5), torch.tensor([[half, half * share]])
        base, adapter = write_pair(tmp_path / f"{share}", {"m": weight}, {"m": pair}, 2.0, {"m": 2})
        if share < 0:
            assert np.array_equal(bits(merge_by(way, base, [adapter])["m.weight"]), bits(weight)), share
        else:
            with pytest.raises(inlay.InlayError, match=r"Inf or NaN.*m\.weight"):
                merge_by(way, base, [adapter])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stored", ["F64", "F32"])
def test_a_float64_base_is_correctly_rounded(
    stored: str, way: str, tmp_path: Path, merge_by: Callable[..., dict[str, Any]]
) -> None:
    """No arithmetic at hand is finer than the result, so every element is decided exactly."""
    import torch

    generator = torch.Generator().manual_seed(13)
    weight = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    pair = random_tensor((3, 9), stored, generator), random_tensor((4, 3), stored, generator)
    base, adapter = write_pair(tmp_path, {"m": weight}, {"m": pair}, 1.7, {"m": 3})
    total, shift = exact_sum(float64(weight), [(float64(pair[1]), float64(pair[0]), 1.7 / 3)])
    wanted = np.array([n / (1 << shift) for n in total.reshape(-1)]).reshape(4, 9)  # Python divides exactly
    assert np.array_equal(float64(merge_by(way, base, [adapter])["m.weight"]), wanted)


# --- DoRA ---------------------------------------------------------------------------------------------


def dora_exactly(
    w: np.ndarray, deltas: list[tuple[np.ndarray, np.ndarray, float]], m: np.ndarray, axis: int
) -> np.ndarray:
    """`m / ‖w + Δ‖ · (w + Δ)` as decimals of 60 digits, norm over `axis`."""
    from decimal import Decimal, localcontext

    total, _shift = exact_sum(w, deltas)
    squares = (total * total).sum(axis=axis)
    with localcontext() as context:
        context.prec = 60
        lengths = [Decimal(int(n)).sqrt() for n in squares]
        factors = [Decimal(float(x)) / n for x, n in zip(m, lengths, strict=True)]
        line = (lambda i, j: i) if axis == 1 else (lambda i, j: j)
        rows, cols = total.shape
        return np.array([[Decimal(int(total[i, j])) * factors[line(i, j)] for j in range(cols)] for i in range(rows)])


def round_decimals(x: np.ndarray, dtype: str) -> np.ndarray:
    """Decimals rounded once, through integers over a power of two that hold 200 bits of them."""
    whole = np.array([int(v.scaleb(0) * (1 << 200)) * 2 + 1 for v in x.reshape(-1)], object)  # the rest is not zero
    return round_exactly(whole.reshape(x.shape), 201, dtype)


@pytest.mark.parametrize("layout", ["linear", "embedding", "conv1d of gpt2", "convolution"])
@pytest.mark.parametrize("source", FORMATS)
def test_dora_is_correctly_rounded(
    source: str, layout: str, tmp_path: Path, merge_by: Callable[..., dict[str, Any]]
) -> None:
    """Norm along rows, along columns and over a kernel; to every type, by the float64 path, from any block size."""
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(14)
    axis = 0 if layout in ("embedding", "conv1d of gpt2") else 1
    shape = (9, 2, 3, 5) if layout == "convolution" else (9, 30)
    name = {"embedding": "embed_tokens", "conv1d of gpt2": "h.0.mlp.c_fc"}.get(layout, "m")
    weight = random_tensor(shape, source, generator, 0.1)
    left, right = torch.randn(9, 3, generator=generator), torch.randn(3, 30, generator=generator)
    magnitude = 1 + torch.rand(9 if axis == 1 else 30, generator=generator)
    base, adapter = write_pair(tmp_path, {name: weight}, {name: (right, left)}, 1.7, {name: 3})
    file = adapter / "adapter_model.safetensors"
    prefix = f"base_model.model.{name}."
    a, b = load_file(file).values()
    parts: dict[str, Any] = {f"{prefix}lora_A.weight": a, f"{prefix}lora_B.weight": b}
    if layout == "embedding":
        parts = {f"{prefix}lora_embedding_A": left.T.contiguous(), f"{prefix}lora_embedding_B": right.T.contiguous()}
    elif layout == "conv1d of gpt2":
        parts = {f"{prefix}lora_A.weight": left.T.contiguous(), f"{prefix}lora_B.weight": right.T.contiguous()}
        (base / "config.json").write_text('{"model_type": "gpt2"}')
    elif layout == "convolution":
        parts = {
            f"{prefix}lora_A.weight": right.reshape(3, 2, 3, 5),
            f"{prefix}lora_B.weight": left.reshape(9, 3, 1, 1),
        }
        magnitude = magnitude.reshape(1, 9, 1, 1)
    save_file({**parts, f"{prefix}lora_magnitude_vector": magnitude}, file, {"format": "pt"})
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    flat = float64(weight).reshape(9, 30)
    exact = dora_exactly(flat, [(float64(left), float64(right), 1.7 / 3)], float64(magnitude).reshape(-1), axis)
    for dtype in FORMATS:
        wanted = bits(as_stored(round_decimals(exact, dtype), dtype))
        for memory in ("1GB", 9000):
            found = merge_by("float64", base, [adapter], TORCH_NAMES[dtype], max_memory=memory)
            assert_same(found[f"{name}.weight"].reshape(9, 30), wanted, f"{layout} to {dtype}")


def test_an_inexact_length_does_not_round_a_dora_wrongly(
    tmp_path: Path, merge_by: Callable[..., dict[str, Any]]
) -> None:
    """Half of a row cancels large terms, so its length is off; the other half is exact but for that length."""
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(16)
    left, right = cancelling(generator, 2.0**26, clean=65)
    weight, magnitude = torch.randn(64, 130, generator=generator), 5 + torch.rand(64, generator=generator)
    base, adapter = write_pair(tmp_path, {"m": weight}, {"m": (right, left)}, 1.7, {"m": 5})
    file = adapter / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.m.lora_magnitude_vector": magnitude}, file, {"format": "pt"})
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    pair = float64(left), float64(right), 1.7 / 5
    exact = dora_exactly(float64(weight), [pair], float64(magnitude), 1)
    found = merge_by("float64", base, [adapter])["m.weight"]
    assert_same(found, bits(as_stored(round_decimals(exact, "F32"), "F32")))


# --- the kernel on its own ----------------------------------------------------------------------------


@pytest.mark.skipif(not kernel.available(), reason="the kernel is not built")
@pytest.mark.parametrize("out", ["BF16", "F16"])
@pytest.mark.parametrize("source", FORMATS)
def test_elements_that_the_kernel_decides_are_never_wrong(source: str, out: str) -> None:
    """What is not in its list of open elements is the exact rounding; what is open lies at a boundary.

    Weights and factors have few bits, so that ties are common: about a quarter of the sums.
    """
    rng = np.random.default_rng(11)
    rows, cols, rank = 33, 65, 19
    form, coarse = FORMATS[out], min(FORMATS[out].fraction, FORMATS[source].fraction)
    values = rng.integers(2**coarse, 2 ** (coarse + 1), (rows, cols)) * 2.0**-coarse * rng.choice([-1, 1], (rows, cols))
    left = rng.integers(-3, 4, (rows, rank)).astype(np.float64)
    right = rng.integers(-3, 4, (rank, cols)) * 2.0 ** -(form.fraction + 3)
    scale = np.full(rank, 1.0)
    weight = round_nearest(values, STORED[source])
    assert np.array_equal(decode(weight, STORED[source]), values)
    found = np.empty((rows, cols), "<u2")
    packed = kernel.Packed.of(right.astype(np.float32), scale)
    result = kernel.merge(weight, STORED[source], left.astype(np.float32), packed, found, STORED[out])
    exact = round_exactly(*exact_sum(values, [(left, right, 1.0)]), out)
    open_ = np.zeros(rows * cols, bool)
    open_[result.open] = True
    open_ = open_.reshape(rows, cols)
    decided = decode(found, STORED[out])
    assert np.array_equal(decided[~open_], exact[~open_])
    total = values + left @ right  # exact in float64
    tie = np.abs(np.abs(total - exact) - np.ldexp(1.0, np.frexp(np.abs(total))[1] - 2 - form.fraction)) < 1e-12
    assert tie.mean() > 0.05, "too few ties to test anything"
    assert open_[tie].all()
    assert open_[~tie & (total != 0)].mean() < 0.01


@pytest.mark.skipif(not kernel.available(), reason="the kernel is not built")
def test_the_kernel_reports_every_open_element_beyond_its_first_list() -> None:
    """More open elements than the first list holds: the call is repeated with room for all."""
    rows, cols = 130, 256
    assert rows * cols > kernel.OPEN_CAPACITY
    weight = round_nearest(np.full((rows, cols), 1.0), STORED["BF16"])
    packed = kernel.Packed.of(np.full((1, cols), 2.0**-8, np.float32), np.ones(1))
    out = np.empty((rows, cols), "<u2")
    result = kernel.merge(weight, STORED["BF16"], np.ones((rows, 1), np.float32), packed, out, STORED["BF16"])
    assert sorted(result.open.tolist()) == list(range(rows * cols))


def test_neutral_elements_differ_in_no_bit_between_block_sizes(tmp_path: Path) -> None:
    """The same bytes for any number of threads and any cap on memory."""
    import torch

    generator = torch.Generator().manual_seed(12)
    weights = {"m": random_tensor((300, 65), "BF16", generator)}
    pairs = {"m": (random_tensor((5, 65), "F32", generator), random_tensor((300, 5), "F32", generator))}
    base, adapter = write_pair(tmp_path, weights, pairs, 1.7, {"m": 5})
    results = []
    for i, (workers, memory) in enumerate([(1, "1GB"), (3, "1GB"), (1, 9000), (2, 12000)]):
        plan = inlay.make_plan(base, [adapter], max_memory=memory)
        inlay.run_plan(plan, tmp_path / f"out{i}", workers=workers, max_memory=memory)
        results.append((tmp_path / f"out{i}" / "model.safetensors").read_bytes())
    assert len(set(results)) == 1


# --- the yardstick itself -----------------------------------------------------------------------------


def test_the_reference_rounds_as_fractions_do() -> None:
    """`round_exactly` and `rounded` against hand-made cases of IEEE 754."""
    one = 1 << 60
    cases = [
        ("BF16", one + (one >> 8), 1.0),  # tie, even below
        ("BF16", one + 3 * (one >> 8), 1 + 2.0**-6),  # tie, even above
        ("BF16", one + (one >> 8) + 1, 1 + 2.0**-7),  # a bit beyond the tie
        ("F16", one + (one >> 11), 1.0),
        ("F16", -(one + (one >> 11) + 1), -(1 + 2.0**-10)),
        ("F32", one + (one >> 24), 1.0),
    ]
    for dtype, n, wanted in cases:
        assert round_exactly(np.array([n], object), 60, dtype)[0] == wanted
    assert rounded(np.array([65519.99, 65520.0, -65520.0]), "F16").tolist() == [65504.0, np.inf, -np.inf]
    assert round_exactly(np.array([65520, 65519], object), 0, "F16").tolist() == [np.inf, 65504.0]
    assert rounded(np.array([2.0**-25, 2.0**-25 * 1.5, 3 * 2.0**-25]), "F16").tolist() == [0.0, 2.0**-24, 2.0**-23]
    x = np.random.default_rng(0).standard_normal(1000) * 2.0 ** np.random.default_rng(1).integers(-140, 15, 1000)
    from oracle import _integers

    for dtype in FORMATS:
        assert np.array_equal(round_exactly(*_integers(x), dtype), rounded(x, dtype))
    assert np.array_equal(x.astype(np.float32).astype(np.float64), rounded(x, "F32"))
    assert np.array_equal(x.astype(np.float16).astype(np.float64), rounded(x, "F16"))

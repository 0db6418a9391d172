"""Several adapters made into one: PEFT's `add_weighted_adapter` is the oracle where it is right, else the formula."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

import inlay
from cases import LINEAR, MODELS, Kit, edit_json, load_peft, new_peft_model, save_adapter, third_party
from inlay.cli.main import main
from inlay.cli.options import COMBINE_METHODS
from inlay.errors import InputError, OutputError
from inlay.plan.combination import rank_table
from inlay.tuners import combining
from inlay.tuners.combining import METHODS, Pair, Recipe
from oracle import bits, float64, header, read

U = 2.0**-24  # float32: each stored element of the result is rounded once, each weight in PEFT is
WEIGHTS = (1.0, -0.5, 0.3)
ON_FACTORS = ("linear", "ties", "magnitude_prune")
ON_DELTAS = ("svd", "ties_svd", "magnitude_prune_svd")
DARE = ("dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd")


def lora(*targets: str, r: int = 4, alpha: float = 6, **more: Any) -> dict[str, Any]:
    return {"target_modules": list(targets), "r": r, "lora_alpha": alpha, **more}


EQUAL_RANKS = (
    lora(*LINEAR, alpha=6),
    lora("q_proj", "down_proj", "v_proj", alpha=3, alpha_pattern={"v_proj": 11}),
    lora("q_proj", "k_proj", alpha=10),
)
RANKS = (
    lora(*LINEAR, r=4, alpha=6),
    lora("q_proj", "down_proj", r=7, alpha=3, rank_pattern={"down_proj": 2}),
    lora("q_proj", "k_proj", r=1, alpha=5),
)
RSLORA = tuple({**config, "use_rslora": True} for config in RANKS)


def build(
    kit: Kit, model: str, configs: Sequence[Mapping[str, Any]], seed: int = 60, stored: str = "F32"
) -> list[Path]:
    """Adapters a, b, c … of these configs, built once a session."""
    label = f"{model}.{stored}.{blake3(json.dumps([*map(dict, configs), seed]).encode()).hexdigest()[:12]}"
    root = kit.root / f"combine.{label}"
    if not root.exists():
        for i, config in enumerate(configs):
            adapted = new_peft_model(MODELS[model].load(kit.base(model)), config, seed + i)
            save_adapter(adapted, root / "abcdefgh"[i], stored, copies=False)
    return [root / "abcdefgh"[i] for i in range(len(configs))]


# --- what is in a directory, without inlay ------------------------------------------------------------


@dataclass(frozen=True)
class Factors:
    """Of a module in a file, kernel axes flattened."""

    a: np.ndarray
    b: np.ndarray
    s: float = 1.0

    @property
    def delta(self) -> np.ndarray:
        return self.s * (self.b @ self.a)


def pairs_in(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A and B by module, straight from the names in the file."""
    tensors, found = read(path / "adapter_model.safetensors"), {}
    for key, tensor in tensors.items():
        for name in (".lora_A.weight", ".lora_embedding_A"):
            if key.endswith(name):
                a, b = float64(tensor), float64(tensors[key.replace("_A", "_B")])
                module = key.removeprefix("base_model.model.").removesuffix(name)
                found[module] = (a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1))
    return found


def by_module(paths: Sequence[Path], configs: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, Factors]]:
    """Module -> position of adapter -> its pair and scaling; patterns are last words here."""
    found: dict[str, dict[int, Factors]] = {}
    for i, (path, config) in enumerate(zip(paths, configs, strict=True)):
        for module, (a, b) in pairs_in(path).items():
            alpha = config.get("alpha_pattern", {}).get(module.rpartition(".")[2], config["lora_alpha"])
            root = math.sqrt(len(a)) if config.get("use_rslora") else len(a)
            found.setdefault(module, {})[i] = Factors(a, b, alpha / root)
    return found


def deltas_in(path: Path) -> dict[str, np.ndarray]:
    return {module: b @ a for module, (a, b) in pairs_in(path).items()}


def combined(paths: Sequence[Path], out: Path, method: str, **options: Any) -> Path:
    inlay.combine_adapters(paths, out, combine_by=method, **options)
    return out


def peft_combined(
    kit: Kit, model: str, paths: Sequence[Path], weights: Sequence[float], method: str, **options: Any
) -> Any:
    """Deltas of PEFT's combination by module, in float64 but for the weights, which it makes float32."""
    from peft.tuners.lora import LoraLayer

    adapted = load_peft(MODELS[model].load(kit.base(model), "F64"), *paths, autocast=False)
    names = [f"a{i}" for i in range(len(paths))]
    with third_party():
        # With full matrices, its default, PEFT fails where svd_rank is more than rows or columns.
        adapted.base_model.add_weighted_adapter(
            names, list(weights), "c", combination_type=method, svd_full_matrices=False, **options
        )
    found = {}
    for name, layer in adapted.base_model.model.named_modules():
        if isinstance(layer, LoraLayer) and ("c" in layer.lora_A or "c" in layer.lora_embedding_A):
            a, b = (getattr(layer, f"lora_{x}") for x in "AB")
            if "c" not in a:
                a, b = layer.lora_embedding_A, layer.lora_embedding_B
            a, b = (float64(getattr(x["c"], "weight", x["c"])) for x in (a, b))
            found[name] = layer.scaling["c"] * (b.reshape(len(b), -1) @ a.reshape(len(a), -1))
    return found


def factor_tolerance(factors: Mapping[int, Factors], weights: Sequence[float]) -> np.ndarray:
    """Four roundings to float32 (A and B as stored, PEFT's weights for A and for B) of what is summed."""
    size = [math.sqrt(abs(weights[i] * f.s)) for i, f in factors.items()]
    b = sum(c * np.abs(f.b) for c, f in zip(size, factors.values(), strict=True))
    a = sum(c * np.abs(f.a) for c, f in zip(size, factors.values(), strict=True))
    return np.asarray(4.01 * U * (b @ a))


def sum_tolerance(factors: Mapping[int, Factors], weights: Sequence[float]) -> np.ndarray:
    """The stored A and B are each rounded once."""
    return np.asarray(sum(2.01 * U * abs(weights[i] * f.s) * (np.abs(f.b) @ np.abs(f.a)) for i, f in factors.items()))


def norm_tolerance(factors: Mapping[int, Factors], weights: Sequence[float], delta: np.ndarray) -> float:
    """Frobenius norm: weights rounded to float32, and the stored U S (out, r) and V (r, in), rounded too."""
    moved = U * sum(abs(weights[i]) * float(np.linalg.norm(f.delta)) for i, f in factors.items())
    return 1.01 * (moved + 2 * U * math.sqrt(min(delta.shape)) * float(np.linalg.norm(delta)))


def truncated_tolerance(whole: np.ndarray, rank: int, error: float) -> float:
    """How far the truncations of two matrices lie apart that are themselves `error` apart.

    For M and M + E with gap = σ_r − σ_{r+1} > ‖E‖, the projections on the leading right singular vectors differ
    by at most √2 ‖E‖ / (gap − ‖E‖) (Wedin 1972), so the truncated matrices by ‖E‖ and σ_1 times that.
    """
    s = [*np.linalg.svd(whole, compute_uv=False), 0.0]
    cut = min(rank, len(s) - 1)
    if s[cut] <= error:  # nothing is cut off but the error itself
        return 2 * error
    gap = float(s[cut - 1] - s[cut])
    assert gap > 2 * error
    return error + float(s[0]) * math.sqrt(2) * error / (gap - error)


# --- against PEFT ---------------------------------------------------------------------------------------


def settings(method: str) -> list[dict[str, Any]]:
    if "ties" in method:
        return [{"density": 0.5, "majority_sign_method": how} for how in ("total", "frequency")]
    return [{"density": d} for d in (0.3, 1.0)] if METHODS[method].prunes else [{}]


def cases(*methods: str) -> list[Any]:
    return [pytest.param(m, s, id="-".join([m, *map(str, s.values())])) for m in methods for s in settings(m)]


@pytest.mark.parametrize(("method", "options"), cases(*ON_FACTORS))
def test_methods_on_factors_are_those_of_peft(kit: Kit, tmp_path: Path, method: str, options: dict[str, Any]) -> None:
    paths = build(kit, "qwen2", EQUAL_RANKS)
    expected = peft_combined(kit, "qwen2", paths, WEIGHTS, method, **options)
    made = deltas_in(combined(paths, tmp_path / "c", method, weights=WEIGHTS, **options))
    found = by_module(paths, EQUAL_RANKS)
    assert made.keys() == expected.keys() == found.keys()
    for module, delta in made.items():
        assert (np.abs(delta - expected[module]) <= factor_tolerance(found[module], WEIGHTS)).all(), module
        assert np.abs(delta).max() > 0


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), WEIGHTS, (-2.0, 0.0, 0.7)], ids=str)
def test_cat_is_that_of_peft(kit: Kit, tmp_path: Path, weights: tuple[float, ...]) -> None:
    paths = build(kit, "qwen2", RANKS)
    expected = peft_combined(kit, "qwen2", paths, weights, "cat")
    made, found = deltas_in(combined(paths, tmp_path / "c", "cat", weights=weights)), by_module(paths, RANKS)
    assert made.keys() == expected.keys()
    for module, delta in made.items():
        assert (np.abs(delta - expected[module]) <= sum_tolerance(found[module], weights)).all(), module


@pytest.mark.parametrize(("method", "options"), cases(*ON_DELTAS))
def test_methods_on_deltas_are_those_of_peft(kit: Kit, tmp_path: Path, method: str, options: dict[str, Any]) -> None:
    """Of full rank within the rounding; of rank 3 and of the default rank within what the rounding can turn."""
    paths = build(kit, "qwen2", RANKS)
    found = by_module(paths, RANKS)
    whole = peft_combined(kit, "qwen2", paths, WEIGHTS, method, svd_rank=24, **options)
    made = deltas_in(combined(paths, tmp_path / "whole", method, weights=WEIGHTS, svd_rank=24, **options))
    assert made.keys() == whole.keys()
    for module, delta in made.items():
        tolerance = norm_tolerance(found[module], WEIGHTS, whole[module])
        assert np.linalg.norm(delta - whole[module]) <= tolerance, module
    for rank in (3, None):
        expected = peft_combined(kit, "qwen2", paths, WEIGHTS, method, svd_rank=rank, **options)
        out = combined(paths, tmp_path / f"rank{rank}", method, weights=WEIGHTS, svd_rank=rank, **options)
        for module, delta in deltas_in(out).items():
            error = norm_tolerance(found[module], WEIGHTS, whole[module])
            cut = rank or 7  # the largest rank of the three
            bound = truncated_tolerance(whole[module], cut, error)
            assert np.linalg.norm(delta - expected[module]) <= bound, (module, rank)
            assert np.linalg.matrix_rank(delta, tol=1e-5) <= cut


def test_svd_has_the_largest_rank_of_the_adapters_unless_told(kit: Kit, tmp_path: Path) -> None:
    paths = build(kit, "qwen2", RANKS)
    ranks = {m: len(a) for m, (a, _) in pairs_in(combined(paths, tmp_path / "c", "svd")).items()}
    assert ranks["model.layers.0.self_attn.q_proj"] == 7  # 4 + 7 + 1 are there
    assert ranks["model.layers.0.mlp.down_proj"] == 6  # 4 + 2 are all there is
    assert ranks["model.layers.0.self_attn.o_proj"] == 4


# --- cat, and rsLoRA ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["F32", "BF16", "F16", "F64"])
@pytest.mark.parametrize("configs", [RANKS, RSLORA], ids=["lora", "rslora"])
def test_cat_is_the_sum(kit: Kit, tmp_path: Path, configs: Any, stored: str) -> None:
    """Σ w s B A for any ranks, types and rules of scaling; PEFT multiplies rsLoRA by √r once more."""
    paths = build(kit, "qwen2", configs, stored=stored)
    made = pairs_in(combined(paths, tmp_path / "c", "cat", weights=WEIGHTS))
    for module, factors in by_module(paths, configs).items():
        exact = sum(WEIGHTS[i] * f.delta for i, f in factors.items())
        a, b = made[module]
        assert (np.abs(b @ a - exact) <= sum_tolerance(factors, WEIGHTS)).all(), module
        assert len(a) == sum(len(f.a) for f in factors.values())


def test_cat_is_exact_where_the_factors_are_powers_of_two(kit: Kit, tmp_path: Path) -> None:
    configs = (lora("q_proj", alpha=2), lora("q_proj", alpha=8))
    paths = build(kit, "qwen2", configs, stored="BF16")
    made = pairs_in(combined(paths, tmp_path / "c", "cat", weights=(0.5, -1.0)))
    for module, f in by_module(paths, configs).items():
        assert np.array_equal(made[module][0], np.vstack([0.25 * f[0].a, -2.0 * f[1].a]))
        assert np.array_equal(made[module][1], np.hstack([f[0].b, f[1].b]))


def test_linear_of_rslora_follows_the_formula(kit: Kit, tmp_path: Path) -> None:
    """And PEFT's, which keeps use_rslora, is this times √r: the day it is not, this test says so."""
    configs = tuple({**config, "use_rslora": True} for config in EQUAL_RANKS)
    paths = build(kit, "qwen2", configs)
    peft = peft_combined(kit, "qwen2", paths, WEIGHTS, "linear")
    made = deltas_in(combined(paths, tmp_path / "c", "linear", weights=WEIGHTS))
    for module, factors in by_module(paths, configs).items():
        c = {i: WEIGHTS[i] * f.s for i, f in factors.items()}
        a = sum(math.copysign(math.sqrt(abs(c[i])), c[i]) * f.a for i, f in factors.items())
        b = sum(math.sqrt(abs(c[i])) * f.b for i, f in factors.items())
        tolerance = factor_tolerance(factors, WEIGHTS)
        assert (np.abs(made[module] - b @ a) <= tolerance).all(), module
        assert (np.abs(peft[module] / 2 - made[module]) <= tolerance).all(), module


@pytest.mark.parametrize("method", METHODS)
def test_one_adapter_alone_keeps_its_delta_where_nothing_is_pruned(kit: Kit, tmp_path: Path, method: str) -> None:
    paths, config = build(kit, "qwen2", RSLORA)[:1], RSLORA[:1]
    options = {"density": 1.0} if METHODS[method].prunes else {}
    made = deltas_in(combined(paths, tmp_path / "c", method, weights=[-0.7], **options))
    for module, factors in by_module(paths, config).items():
        error = np.linalg.norm(made[module] + 0.7 * factors[0].delta)
        assert error <= norm_tolerance(factors, (-0.7,), factors[0].delta), module


# --- dare -------------------------------------------------------------------------------------------------


def documented_mask(
    seed: int, position: int, module: str, part: str, shape: tuple[int, ...], density: float
) -> np.ndarray:
    """The mask as the docstrings of `combining` describe it, by numpy's own uniform numbers."""
    text = json.dumps([seed, position, module, part], separators=(",", ":"))
    generator = np.random.Generator(np.random.Philox(key=int(blake3(text.encode()).hexdigest()[:32], 16)))
    return np.asarray(generator.random(math.prod(shape)).reshape(shape) < density)


def mixed_one_by_one(tensors: Sequence[np.ndarray], weights: Sequence[float], elects: bool, how: str) -> np.ndarray:
    """Sum, or ties, of each element by itself."""
    out = np.zeros(tensors[0].shape)
    for place in np.ndindex(out.shape):
        values = [float(t[place]) for t in tensors]
        chosen = list(zip(weights, values, strict=True))
        if elects:
            vote = sum(values) if how == "total" else sum((v > 0) - (v < 0) for v in values)
            chosen = [(w, v) for w, v in chosen if (v > 0 if vote >= 0 else v < 0)]
        total = sum(w * v for w, v in chosen)
        out[place] = total / max(1, len(chosen)) if elects else total
    return out


@pytest.mark.parametrize("method", DARE)
@pytest.mark.parametrize("how", ["total", "frequency"])
def test_dare_is_the_formula_with_the_documented_mask(kit: Kit, tmp_path: Path, method: str, how: str) -> None:
    density, seed, paths = 0.6, 11, build(kit, "qwen2", EQUAL_RANKS)
    options: dict[str, Any] = {"majority_sign_method": how} if "ties" in method else {}
    if method.endswith("svd"):
        options["svd_rank"] = 24
    out = combined(paths, tmp_path / "c", method, weights=WEIGHTS, density=density, seed=seed, **options)
    made = pairs_in(out)
    for module, factors in by_module(paths, EQUAL_RANKS).items():

        def pruned(part: str, of: Callable[[Factors], np.ndarray], factors=factors, module=module) -> list[np.ndarray]:
            masks = {i: documented_mask(seed, i, module, part, of(f).shape, density) for i, f in factors.items()}
            return [of(f) * masks[i] / density for i, f in factors.items()]

        weights, a, b = [WEIGHTS[i] for i in factors], *made[module]
        if method.endswith("svd"):
            expected = mixed_one_by_one(pruned("delta", lambda f: f.delta), weights, "ties" in method, how)
            tolerance = norm_tolerance(factors, WEIGHTS, expected) / density
            assert np.linalg.norm(b @ a - expected) <= tolerance, module
            continue
        c = [WEIGHTS[i] * f.s for i, f in factors.items()]
        roots = [math.sqrt(abs(x)) for x in c]
        signed = [math.copysign(root, x) for root, x in zip(roots, c, strict=True)]
        right = mixed_one_by_one(pruned("A", lambda f: f.a), signed, "ties" in method, how)
        left = mixed_one_by_one(pruned("B", lambda f: f.b), roots, "ties" in method, how)
        for stored, expected in ((a, right), (b, left)):
            assert (np.abs(stored - expected) <= 1.01 * U * np.abs(expected) + 1e-15).all(), module


def test_dare_keeps_the_expected_share_and_the_expected_value() -> None:
    """100 000 elements: the share within five standard deviations, and the kept ones divided by the density."""
    n, density = 100_000, 0.2
    keep = combining.random_keep(combining.mask_key(3, 0, "m", "A"), n, density)
    assert abs(keep.mean() - density) < 5 * math.sqrt(density * (1 - density) / n)
    other = combining.random_keep(combining.mask_key(3, 1, "m", "A"), n, density)
    assert abs((keep & other).mean() - density**2) < 5 * math.sqrt(density**2 * (1 - density**2) / n)
    pair = Pair(0, 1.0, 1.0, np.ones((4, n // 4)), np.ones((1, 4)))
    a, _ = combining.combine(Recipe("dare_linear", density), "m", [pair])
    assert set(np.unique(a)) == {0.0, 1 / density}


def test_the_mask_depends_on_seed_place_module_and_factor() -> None:
    keys = {combining.mask_key(*words) for words in itertools.product((0, 1), (0, 1), ("m", "n"), ("A", "B", "delta"))}
    assert len(keys) == 24
    masks = [combining.random_keep(key, 64, 0.5) for key in keys]
    assert len({mask.tobytes() for mask in masks}) == 24


def test_the_mask_is_read_by_index_and_not_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = combining.random_keep(5, 1000, 0.3)
    monkeypatch.setattr(combining, "KEEP_BLOCK", 7)
    assert np.array_equal(combining.random_keep(5, 1000, 0.3), whole)
    assert np.array_equal(combining.random_keep(5, 900, 0.3), whole[:900])
    assert (combining.random_keep(5, 1000, 0.6) >= whole).all()


@pytest.mark.parametrize("method", DARE)
def test_dare_depends_on_the_seed_only(kit: Kit, tmp_path: Path, method: str) -> None:
    """Not on numpy's or torch's state, nor on which other modules the adapters have."""
    import torch

    a, b, _ = build(kit, "qwen2", EQUAL_RANKS)

    def made(name: str, seed: int | None, paths: Sequence[Path] = (a, b)) -> dict[str, np.ndarray]:
        torch.manual_seed(len(name))
        return deltas_in(combined(paths, tmp_path / name, method, density=0.5, seed=seed))

    first, again, other, default = made("x", 0), made("longer", 0), made("other", 1), made("default", None)
    fewer = shutil.copytree(a, tmp_path / "fewer")
    keep_tensors(fewer, "q_proj")
    part = made("part", 0, [fewer, b])
    for module, delta in first.items():
        assert np.array_equal(delta, again[module]) and np.array_equal(delta, default[module])
        assert not np.array_equal(delta, other[module])
    queries = [m for m in first if m.endswith("q_proj")]
    assert queries and all(np.array_equal(first[m], part[m]) for m in queries)


def keep_tensors(path: Path, word: str) -> None:
    """Leave only the tensors with `word` in their name."""
    from safetensors.torch import load_file, save_file

    file = path / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if word in k}, file, {"format": "pt"})


# --- pruning and signs, by hand -------------------------------------------------------------------------


def test_pruning_by_magnitude_keeps_the_largest_and_of_equals_the_first() -> None:
    x = np.array([[3.0, -1.0, 2.0], [-2.0, 2.0, 0.0]])
    for density, kept in (
        (0.1, []),
        (0.2, [3.0]),
        (0.4, [3.0, 2.0]),
        (0.5, [3.0, 2.0, -2.0]),
        (0.99, [3, -1, 2, -2, 2]),
    ):
        assert x[combining.largest_keep(x, density)].tolist() == kept


def test_the_sign_of_the_majority() -> None:
    tensors = np.array([[5.0, 1.0, 0.0, 1.0], [-1.0, 1.0, 0.0, -1.0], [-1.0, -3.0, 0.0, 0.0]])
    assert combining.majority_sign(iter(tensors), "total").tolist() == [1, -1, 1, 1]
    assert combining.majority_sign(iter(tensors), "frequency").tolist() == [-1, 1, 1, 1]


def test_methods_on_deltas_hold_one_delta_at_a_time() -> None:
    """Memory does not grow with the number of adapters."""
    rng = np.random.default_rng(0)
    pairs = [Pair(i, 1.0, 1.0, rng.normal(size=(2, 300)), rng.normal(size=(300, 2))) for i in range(24)]

    def peak(n: int) -> int:
        tracemalloc.start()
        combining.combine(Recipe("ties_svd", 0.5, svd_rank=2), "m", pairs[:n])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(2)
    assert peak(24) < peak(2) + 300 * 300 * 8


def test_svd_never_makes_the_delta() -> None:
    rng, n = np.random.default_rng(0), 4000
    pairs = [Pair(i, 1.0, 2.0, rng.normal(size=(2, n)), rng.normal(size=(n, 2))) for i in range(3)]
    tracemalloc.start()
    a, b = combining.combine(Recipe("svd", svd_rank=6), "m", pairs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < n * n
    assert np.allclose(b @ a[:, :50], sum(2 * p.b @ p.a[:, :50] for p in pairs), rtol=0, atol=1e-10)


# --- the directory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_peft_loads_it_and_merges_the_same_as_inlay(kit: Kit, tmp_path: Path, method: str) -> None:
    """Every module is reached, nothing is missing or left over, and inlay's merge is base + B A, rounded once."""
    import warnings

    from peft import PeftModel

    paths = build(kit, "qwen2", EQUAL_RANKS)
    options = {"density": 0.5} if METHODS[method].prunes else {}
    out = combined(paths, tmp_path / "c", method, weights=WEIGHTS, **options)
    made, base = deltas_in(out), kit.base("qwen2")
    model = MODELS["qwen2"].load(base, "F64")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        adapted = PeftModel.from_pretrained(model, out, autocast_adapter_dtype=False)
    assert not [w for w in told if "missing" in str(w.message)]
    loaded = {n for n, _ in adapted.named_parameters() if "lora_A" in n}
    assert len(loaded) == len(made)
    with third_party():
        peft = adapted.merge_and_unload().state_dict()
    plan = inlay.make_plan(base, [out])
    inlay.run_plan(plan, tmp_path / "merged")
    before = read(base)
    for key, tensor in read(tmp_path / "merged").items():
        module, weight = key.removesuffix(".weight"), float64(before[key])
        if module not in made:
            assert np.array_equal(bits(tensor), bits(before[key]))
            continue
        expected = weight + made[module]
        assert (np.abs(float64(tensor) - expected) <= 1.001 * U * np.abs(expected) + 1e-12).all(), key
        assert np.abs(float64(peft[key]) - expected).max() < 1e-12
        assert not np.array_equal(float64(tensor), weight)


def test_a_merge_of_cat_is_the_merge_of_the_adapters(kit: Kit, tmp_path: Path) -> None:
    paths, base = build(kit, "qwen2", RSLORA), kit.base("qwen2")
    out = combined(paths, tmp_path / "c", "cat", weights=WEIGHTS)
    inlay.run_plan(inlay.make_plan(base, [out]), tmp_path / "one")
    inlay.run_plan(inlay.make_plan(base, paths, weights=WEIGHTS), tmp_path / "three")
    one, found = read(tmp_path / "one"), by_module(paths, RSLORA)
    for key, tensor in read(tmp_path / "three").items():
        x = float64(tensor)
        tolerance = 2 * U * np.abs(x)
        if (module := key.removesuffix(".weight")) in found:
            tolerance = tolerance + sum_tolerance(found[module], WEIGHTS)
        assert (np.abs(float64(one[key]) - x) <= tolerance).all(), key


def test_the_config_says_scaling_one_and_the_rank_of_each_module(kit: Kit, tmp_path: Path) -> None:
    paths = build(kit, "qwen2", RSLORA)
    out = combined(paths, tmp_path / "c", "cat")
    raw = json.loads((out / "adapter_config.json").read_text())
    assert (raw["r"], raw["lora_alpha"], raw["use_rslora"]) == (12, 12, False)
    assert raw["rank_pattern"] == raw["alpha_pattern"]
    adapter = inlay.read_adapter(out)
    for module, parts in adapter.parts.items():
        assert adapter.config.scaling(module) == 1
        assert adapter.config.rank(module) == parts["lora_A"].shape[0] == parts["lora_B"].shape[1]
    assert {t.dtype.name for t in adapter.tensors} == {"F32"}
    assert raw["base_model_name_or_path"] == str(kit.base("qwen2"))


def test_the_file_says_what_it_was_made_of(kit: Kit, tmp_path: Path) -> None:
    paths = build(kit, "qwen2", EQUAL_RANKS)
    out = combined(paths, tmp_path / "c", "dare_ties", density=0.5, seed=7, weights=WEIGHTS)
    said = json.loads(header(out / "adapter_model.safetensors")["__metadata__"]["inlay"])
    assert said["adapters"] == [inlay.read_adapter(p).digest for p in paths]
    assert (said["method"], said["density"], said["seed"], said["weights"]) == ("dare_ties", 0.5, 7, list(WEIGHTS))
    assert sorted(p.name for p in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    again = combined(paths, tmp_path / "again", "dare_ties", density=0.5, seed=7, weights=WEIGHTS)
    for file in out.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes()


@pytest.mark.parametrize(
    "ranks",
    [
        {"a.q": 4, "b.q": 4, "a.k": 2, "b.k": 2},
        {"a.q": 4, "b.q": 2, "a.k": 3, "x.a.k": 2, "k": 1},
        {"q": 1, "a.q": 2, "a.a.q": 3, "aXq": 5},
        {"m.0": 2, "m.1": 3, "n.0": 2, "m.1.x-y+(z)": 1},
    ],
    ids=lambda r: "-".join(r),
)
def test_the_table_of_ranks_gives_every_module_its_own(ranks: dict[str, int]) -> None:
    """By PEFT's own lookup, in any order of the table: it sorts keys when it saves."""
    from peft.utils.other import get_pattern_key

    r, table = rank_table(ranks)
    assert r == max(ranks.values())
    for order in (list(table), sorted(table), sorted(table, reverse=True)):
        for module, rank in ranks.items():
            assert table.get(get_pattern_key(order, module), r) == rank, (module, table)


@pytest.mark.parametrize("method", ["cat", "linear", "svd", "ties", "magnitude_prune_svd"])
@pytest.mark.parametrize(
    ("model", "targets"),
    [
        ("qwen2", ("embed_tokens", "q_proj")),
        ("gpt2", ("c_attn", "c_proj", "wte")),
        ("conv", ("conv2d", "point", "table")),
    ],
    ids=["embedding", "conv1d-of-gpt2", "kernels"],
)
def test_embeddings_and_kernels_follow_peft(
    kit: Kit, tmp_path: Path, model: str, targets: tuple[str, ...], method: str
) -> None:
    flag = {"fan_in_fan_out": True} if model == "gpt2" else {}
    configs = (lora(*targets, alpha=3, **flag), lora(*targets, alpha=5, **flag))
    paths, weights = build(kit, model, configs), (0.8, -1.5)
    options: dict[str, Any] = {"density": 0.5} if METHODS[method].prunes else {}
    options |= {"svd_rank": 18} if method.endswith("svd") else {}
    if model == "conv" and method.endswith("svd"):
        options["svd_rank"] = 4  # PEFT reshapes to the rank it was asked for, and `point` has 5 columns
    expected = peft_combined(kit, model, paths, weights, method, **options)
    out = combined(paths, tmp_path / "c", method, weights=weights, **options)
    found = by_module(paths, configs)
    if method.endswith("svd"):
        whole = deltas_in(combined(paths, tmp_path / "whole", method, weights=weights, **{**options, "svd_rank": 64}))
    for module, delta in deltas_in(out).items():
        if method.endswith("svd"):
            error = norm_tolerance(found[module], weights, whole[module])
            bound = truncated_tolerance(whole[module], options["svd_rank"], error)
            assert np.linalg.norm(delta - expected[module]) <= bound, module
        else:
            tolerance = factor_tolerance(found[module], weights)
            assert (np.abs(delta - expected[module]) <= tolerance).all(), module
    merged_by_peft = load_peft(MODELS[model].load(kit.base(model), "F64"), out, autocast=False)
    with third_party():
        state = merged_by_peft.merge_and_unload().state_dict()
    if model == "conv":
        return  # no transformers config: `run_plan` on this model is a matter of test_peft_oracle
    inlay.run_plan(inlay.make_plan(kit.base(model), [out]), tmp_path / "merged")
    for key, tensor in read(tmp_path / "merged").items():
        x = float64(state[key if key in state else f"transformer.{key}"])
        assert (np.abs(float64(tensor) - x) <= 2 * U * np.abs(x) + 1e-12).all(), key


def test_attention_reached_through_a_wrapper(kit: Kit, tmp_path: Path) -> None:
    configs = (lora("attention", "out", alpha=3), lora("attention", alpha=5))
    paths = build(kit, "conv", configs)
    out = combined(paths, tmp_path / "c", "cat")
    assert set(json.loads((out / "adapter_config.json").read_text())["target_modules"]) == {"attention", "out"}
    made = deltas_in(out)
    assert "attention.base_layer.out_proj" in made
    adapted = load_peft(MODELS["conv"].load(kit.base("conv")), out)
    assert sum("lora_A" in n for n, _ in adapted.named_parameters()) == len(made) == 3


def test_an_adapter_in_a_bin_file_takes_part(kit: Kit, tmp_path: Path) -> None:
    import torch

    a, b, _ = build(kit, "qwen2", EQUAL_RANKS)
    old = shutil.copytree(b, tmp_path / "old")
    torch.save(read(b / "adapter_model.safetensors"), old / "adapter_model.bin")
    (old / "adapter_model.safetensors").unlink()
    x, y = deltas_in(combined([a, b], tmp_path / "x", "cat")), deltas_in(combined([a, old], tmp_path / "y", "cat"))
    assert all(np.array_equal(x[m], y[m]) for m in x)


# --- bases ------------------------------------------------------------------------------------------------


def test_bases_of_two_names_are_told_and_none_is_written(kit: Kit, tmp_path: Path) -> None:
    a, b, _ = build(kit, "qwen2", EQUAL_RANKS)
    other = shutil.copytree(b, tmp_path / "other")
    edit_json(other / "adapter_config.json", base_model_name_or_path="meta-x/1b")
    made = inlay.combine_adapters([a, other], tmp_path / "c")
    assert len(made.warnings) == 1 and "meta-x/1b" in made.warnings[0]
    assert json.loads((tmp_path / "c" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert inlay.combine_adapters([a, b], tmp_path / "d").warnings == ()


def with_record(path: Path, where: Path, headers: str, tensors: Mapping[str, str]) -> Path:
    copy = Path(shutil.copytree(path, where))
    record = {"format": 1, "headers": headers, "tensors": tensors}
    (copy / "inlay_base.json").write_text(json.dumps(record))
    return copy


def test_records_of_the_base_are_kept_together(kit: Kit, tmp_path: Path) -> None:
    a, b, c = build(kit, "qwen2", EQUAL_RANKS)
    x, y = (
        with_record(a, tmp_path / "x", "h", {"k": "1", "l": "2"}),
        with_record(b, tmp_path / "y", "h", {"l": "2", "m": "3"}),
    )
    out = combined([x, c, y], tmp_path / "c", "cat")
    record = json.loads((out / "inlay_base.json").read_text())
    assert record == {"format": 1, "headers": "h", "tensors": {"k": "1", "l": "2", "m": "3"}}


@pytest.mark.parametrize(
    ("headers", "tensors", "words"), [("other", {}, "trained on another base"), ("h", {"k": "9"}, "is another tensor")]
)
def test_adapters_of_two_bases_are_refused(
    kit: Kit, tmp_path: Path, headers: str, tensors: dict[str, str], words: str
) -> None:
    a, b, _ = build(kit, "qwen2", EQUAL_RANKS)
    x, y = with_record(a, tmp_path / "x", "h", {"k": "1"}), with_record(b, tmp_path / "y", headers, tensors)
    refused([x, y], tmp_path, [words])


# --- refusals ---------------------------------------------------------------------------------------------


def refused(paths: Sequence[Path], tmp_path: Path, words: Sequence[str], **options: Any) -> str:
    """The message of a refusal that names all of `words`; the folder is as it was."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as error:
        inlay.combine_adapters(paths, options.pop("output_dir", tmp_path / "made" / "c"), **options)
    assert sorted(tmp_path.rglob("*")) == before
    for word in words:
        assert word in str(error.value), str(error.value)
    return str(error.value)


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "dora": (lora("q_proj", use_dora=True), "is a DoRA"),
    "lora_bias": (lora("q_proj", lora_bias=True), "has lora_bias"),
    "saved": (lora("q_proj", modules_to_save=["lm_head"]), "has saved modules (lm_head)"),
    "copies": (lora("q_proj", bias="all"), "has full copies of base tensors"),
    "tokens": (lora("q_proj", trainable_token_indices=[1, 5]), "trained token rows"),
}


@pytest.mark.parametrize("kind", ODD)
def test_adapters_that_are_more_than_lora_are_refused(kit: Kit, tmp_path: Path, kind: str) -> None:
    config, words = ODD[kind]
    odd, plain = build(kit, "qwen2", [config])[0], build(kit, "qwen2", EQUAL_RANKS)[0]
    refused([plain, odd], tmp_path, [words, str(odd), "(1 problem"])


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("target_parameters", ["mlp.experts.up"], "target_parameters"),
        ("use_qalora", True, "use_qalora"),
        ("init_lora_weights", "pissa", "is pissa"),
        ("init_lora_weights", "olora", "is olora"),
    ],
)
def test_other_kinds_of_lora_are_refused(kit: Kit, tmp_path: Path, field: str, value: Any, words: str) -> None:
    a, b, _ = build(kit, "qwen2", EQUAL_RANKS)
    odd = Path(shutil.copytree(b, tmp_path / "odd"))
    edit_json(odd / "adapter_config.json", **{field: value})
    refused([a, odd], tmp_path, [words, str(odd)])


def test_other_tuners_are_refused(kit: Kit, tmp_path: Path) -> None:
    from peft import IA3Config, get_peft_model

    plain = build(kit, "qwen2", EQUAL_RANKS)[0]
    with third_party():
        config = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
        get_peft_model(MODELS["qwen2"].load(kit.base("qwen2")), config).save_pretrained(tmp_path / "ia3")
    refused([plain, tmp_path / "ia3"], tmp_path, ["peft_type", "IA3", "(1 problem"])


def test_adapters_of_other_libraries_are_refused(kit: Kit, tmp_path: Path) -> None:
    """MLX stores A (in, r) and B (r, out): square ones would fit both ways."""
    import torch
    from safetensors.torch import save_file

    plain, odd = build(kit, "qwen2", EQUAL_RANKS)[0], tmp_path / "mlx"
    odd.mkdir()
    module = "model.layers.0.self_attn.q_proj"
    save_file(
        {f"{module}.lora_a": torch.ones(16, 16), f"{module}.lora_b": torch.ones(16, 16)}, odd / "adapters.safetensors"
    )
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 16, "scale": 2.0}}
    (odd / "adapter_config.json").write_text(json.dumps(config))
    refused([plain, odd], tmp_path, ["peft_type", str(odd), "(1 problem"])


def test_all_reasons_are_given_at_once(kit: Kit, tmp_path: Path) -> None:
    dora, bias = (build(kit, "qwen2", [ODD[kind][0]])[0] for kind in ("dora", "lora_bias"))
    words = [
        "is a DoRA",
        "has lora_bias",
        "no such file or directory",
        "2 for 3 adapters",
        "must be in (0, 1], not 1.5",
    ]
    refused([dora, bias, tmp_path / "none"], tmp_path, words, weights=[1, 2], density=1.5, combine_by="ties_svd")


def test_modules_of_other_shapes_are_refused(kit: Kit, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    a, b, _ = build(kit, "qwen2", EQUAL_RANKS)
    odd = Path(shutil.copytree(b, tmp_path / "odd"))
    file = odd / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors[key] = tensors[key][:, :-1].contiguous()
    save_file(tensors, file, {"format": "pt"})
    refused([a, odd], tmp_path, ["layers.0.self_attn.q_proj", "(16, 15)", "(16, 16)", "(1 problem"])


@pytest.mark.parametrize("change", ["lost", "rank", "nan"])
def test_broken_adapters_are_refused(kit: Kit, tmp_path: Path, change: str) -> None:
    from safetensors.torch import load_file, save_file

    a, b, _ = build(kit, "qwen2", EQUAL_RANKS)
    odd = Path(shutil.copytree(b, tmp_path / "odd"))
    file = odd / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    if change == "lost":
        del tensors[key]
    elif change == "nan":
        tensors[key][0, 3] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    if change == "rank":
        edit_json(odd / "adapter_config.json", rank_pattern={"layers.0.self_attn.q_proj": 3})
    words = {"lost": "incomplete", "rank": "rank 4 in the file, 3 in the config", "nan": "NaN or Inf"}[change]
    refused([a, odd], tmp_path, [words, "layers.0.self_attn.q_proj", "(1 problem"])


@pytest.mark.parametrize("method", [m for m in METHODS if m != "cat" and not METHODS[m].on_deltas])
def test_unequal_ranks_are_refused_with_the_method_to_use(kit: Kit, tmp_path: Path, method: str) -> None:
    paths = build(kit, "qwen2", RANKS)
    options = {"density": 0.5} if METHODS[method].prunes else {}
    instead = "svd" if method == "linear" else f"{method}_svd"
    text = refused(paths, tmp_path, ["ranks 4, 7, 1", f"use {instead} or cat"], combine_by=method, **options)
    assert "o_proj" not in text  # only the first has it


SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    *((method, {}, "needs it") for method in METHODS if METHODS[method].prunes),
    *(("ties", {"density": d}, "must be in (0, 1]") for d in (0.0, -0.1, 1.01, math.nan, math.inf)),
    ("cat", {"density": 0.5}, "density"),
    ("svd", {"density": 0.5}, "has no effect on svd"),
    ("linear", {"svd_rank": 4}, "has no effect on linear"),
    ("svd", {"svd_rank": 0}, "must be positive"),
    ("svd", {"majority_sign_method": "total"}, "has no effect on svd"),
    ("ties", {"density": 0.5, "majority_sign_method": "most"}, "must be total or frequency, not most"),
    ("ties", {"density": 0.5, "seed": 1}, "has no effect on ties"),
    ("sum", {}, "is not one of cat"),
    ("cat", {"weights": [1.0]}, "1 for 2 adapters"),
    ("cat", {"weights": [1.0, math.inf]}, "must be finite"),
]


@pytest.mark.parametrize(("method", "options", "words"), SETTINGS, ids=lambda x: str(x).replace(" ", ""))
def test_settings_that_cannot_be_met_are_refused(
    kit: Kit, tmp_path: Path, method: str, options: dict[str, Any], words: str
) -> None:
    refused(build(kit, "qwen2", EQUAL_RANKS)[:2], tmp_path, [words], combine_by=method, **options)


def test_no_adapters_are_refused(tmp_path: Path) -> None:
    refused([], tmp_path, ["none given"])


def test_a_result_beyond_float32_is_refused(kit: Kit, tmp_path: Path) -> None:
    paths = build(kit, "qwen2", EQUAL_RANKS)[:2]
    refused(paths, tmp_path, ["too large for float32"], weights=[1e60, 1.0])


# --- the destination --------------------------------------------------------------------------------------


def test_an_existing_destination_needs_exist_ok(kit: Kit, tmp_path: Path) -> None:
    paths = build(kit, "qwen2", EQUAL_RANKS)
    out = combined(paths, tmp_path / "c", "cat")
    first = deltas_in(out)
    refused(paths, tmp_path, ["exists", "exist_ok"], output_dir=out)
    assert all(np.array_equal(x, first[m]) for m, x in deltas_in(out).items())
    combined(paths, out, "cat", weights=WEIGHTS, exist_ok=True)
    assert not any(np.array_equal(x, first[m]) for m, x in deltas_in(out).items() if m.endswith("q_proj"))
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("extra", ["optimizer.pt", "checkpoint-5"])
def test_a_folder_with_more_than_an_adapter_is_not_replaced(kit: Kit, tmp_path: Path, extra: str) -> None:
    paths = build(kit, "qwen2", EQUAL_RANKS)
    out = combined(paths, tmp_path / "c", "cat")
    (out / extra).mkdir()
    refused(paths, tmp_path, [f"holds more than an adapter ({extra})"], output_dir=out, exist_ok=True)


@pytest.mark.parametrize("exist_ok", [True, False])
def test_an_input_is_never_the_destination(kit: Kit, tmp_path: Path, exist_ok: bool) -> None:
    a, b, _ = build(kit, "qwen2", EQUAL_RANKS)
    mine = Path(shutil.copytree(b, tmp_path / "mine"))
    (mine / "README.md").unlink(missing_ok=True)
    (tmp_path / "link").symlink_to(mine)
    for out in (mine, tmp_path / "link", tmp_path / "x" / ".." / "mine"):
        refused([a, mine], tmp_path, [], output_dir=out, exist_ok=exist_ok)
    refused([a, mine], tmp_path, ["itself"], output_dir=mine, exist_ok=exist_ok)
    refused([a, mine], tmp_path, ["lies inside"], output_dir=mine / "c", exist_ok=exist_ok)


@pytest.mark.parametrize("step", ["_write_weights", "_write_json", "write_at"])
@pytest.mark.parametrize("stop", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stopped"])
def test_a_failure_leaves_nothing_behind(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, stop: BaseException
) -> None:
    from inlay.run import combine

    calls = itertools.count()
    real = getattr(combine, step)

    def fails(*args: Any) -> Any:
        if next(calls) == (0 if step == "_write_weights" else 1):
            raise stop
        return real(*args)

    monkeypatch.setattr(combine, step, fails)
    paths = build(kit, "qwen2", EQUAL_RANKS)
    with pytest.raises(OutputError if isinstance(stop, OSError) else KeyboardInterrupt):
        inlay.combine_adapters(paths, tmp_path / "deep" / "c")
    assert list(tmp_path.iterdir()) == []


# --- the command ------------------------------------------------------------------------------------------


def words_of(paths: Sequence[Path], *more: str) -> list[str]:
    return ["combine", "--adapters", *map(str, paths), *more]


def test_the_command_offers_the_methods_there_are() -> None:
    assert list(COMBINE_METHODS) == list(METHODS)


def test_the_command_writes_what_the_function_writes(
    kit: Kit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = build(kit, "qwen2", EQUAL_RANKS)
    options = ["--combine", "dare_ties_svd", "--adapter-weights", "1", "-0.5", "0.3", "--density", "0.5"]
    options += ["--majority_sign_method", "frequency", "--svd_rank", "3", "--seed", "9", "--output_dir"]
    assert main(words_of(paths, *options, str(tmp_path / "c"))) == 0
    out = capsys.readouterr().out
    assert "3 adapters combined by dare_ties_svd" in out and "rank 3" in out and str(tmp_path / "c") in out
    same = {"density": 0.5, "majority_sign_method": "frequency", "svd_rank": 3, "seed": 9}
    combined(paths, tmp_path / "d", "dare_ties_svd", weights=WEIGHTS, **same)
    for file in (tmp_path / "c").iterdir():
        assert file.read_bytes() == (tmp_path / "d" / file.name).read_bytes()


def test_the_command_says_facts_as_json_or_nothing(
    kit: Kit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = build(kit, "qwen2", RANKS)
    assert main(words_of(paths, "--output_dir", str(tmp_path / "c"), "--json")) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["combine"], told["rank"], told["modules"]) == ("cat", [4, 5, 6, 12], 14)
    assert main(words_of(paths, "--output_dir", str(tmp_path / "c"), "--exist_ok", "true", "--quiet")) == 0
    assert capsys.readouterr() == ("", "")


def test_the_command_exits_with_2_when_it_cannot(kit: Kit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = build(kit, "qwen2", EQUAL_RANKS)
    out = str(tmp_path / "c")
    assert main(words_of(paths, "--combine", "ties", "--output_dir", out)) == 2
    assert "density" in capsys.readouterr().err
    assert main(words_of(paths, "--combine", "best", "--output_dir", out)) == 2
    assert main(words_of(paths)) == 2
    assert main(words_of([tmp_path / "none"], "--output_dir", out)) == 2
    assert list(tmp_path.iterdir()) == []

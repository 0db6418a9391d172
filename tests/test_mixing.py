"""`export --combine METHOD`: PEFT's methods as `inlay combine` has them, mergekit's against their plain formulas.

The oracle forms whole deltas with numpy's own products and sorts; it shares nothing with `inlay.tuners.mixing`
but the stream of random numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import inlay
from cases import LINEAR, Kit
from inlay.cli.main import main
from inlay.errors import InputError, PlanError
from inlay.plan.combination import METHODS as ALL
from inlay.plan.combination import Options
from inlay.plan.types import dumps, loads
from inlay.tuners import combining, mixing
from oracle import float64, read, rounded, same_tensors
from test_several import build, lora

QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
TWO = (lora(*LINEAR, r=4, alpha=6), lora("q_proj", "down_proj", r=4, alpha=3))
THREE = (*TWO, lora("q_proj", "k_proj", r=4, alpha=10))
DENSITY = 0.6


def options(name: str, **more: Any) -> Options:
    prunes = getattr((combining.METHODS | mixing.METHODS).get(name), "prunes", "")  # type: ignore[arg-type, operator]
    return Options(**{**({"density": DENSITY} if prunes else {}), **more})


def merge(base: Path, adapters: list[Path], out: Path, name: str, how: Options, **more: Any) -> Path:
    inlay.run_plan(inlay.make_plan(base, adapters, combine_by=name, options=how, **more), out)
    return out


def deltas(adapters: list[Path], module: str, scalings: tuple[float, ...]) -> list[np.ndarray]:
    found = []
    for path, s in zip(adapters, scalings, strict=False):
        tensors = read(path / "adapter_model.safetensors")
        keys = [f"base_model.model.{module}.lora_{x}.weight" for x in "BA"]
        if keys[0] in tensors:
            found.append(s * float64(tensors[keys[0]]) @ float64(tensors[keys[1]]))
    return found


# --- PEFT's methods -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", combining.METHODS)
def test_the_same_as_combined_first(kit: Kit, tmp_path: Path, name: str) -> None:
    """`export --combine ties` and `inlay combine --combine ties`, then `export`: the same bytes."""
    base = kit.base("qwen2")
    adapters = build(kit, "qwen2", tmp_path, *THREE)
    how, weights = options(name), [1.0, -0.5, 2.0]
    at_once = merge(base, adapters, tmp_path / "once", name, how, weights=weights)
    inlay.combine_adapters(adapters, tmp_path / "both", combine_by=name, weights=weights, **how.given())
    in_turn = merge(base, [tmp_path / "both"], tmp_path / "turn", "sum", Options())
    assert same_tensors(at_once, in_turn)
    plain = merge(base, adapters, tmp_path / "sum", "sum", Options(), weights=weights)
    assert name == "cat" or not same_tensors(plain, at_once)
    assert inlay.verify(base, adapters, at_once).exact


def test_records_all_adapters(kit: Kit, tmp_path: Path) -> None:
    adapters = build(kit, "qwen2", tmp_path, *TWO)
    out = merge(
        kit.base("qwen2"), adapters, tmp_path / "out", "ties", options("ties", majority_sign_method="frequency")
    )
    manifest = json.loads((out / "inlay.json").read_text())
    assert [a["name"] for a in manifest["adapters"]] == ["a", "b"]
    assert manifest["settings"]["combine"] == "ties"
    assert manifest["settings"]["options"] == {"density": DENSITY, "majority_sign_method": "frequency"}


# --- mergekit's methods -------------------------------------------------------------------------------


def outliers(delta: np.ndarray, density: float, gamma: float) -> np.ndarray:
    order = np.argsort(np.abs(delta).astype(np.float32), axis=None, kind="stable")
    kept, top = int(density * delta.size), int(gamma * delta.size)
    bottom = max(0, delta.size - kept - top)
    top = delta.size - kept - bottom
    mask = np.zeros(delta.size)
    mask[order[bottom : delta.size - top]] = 1
    return mask.reshape(delta.shape) * delta


def thinned(delta: np.ndarray, density: float, epsilon: float, key: int) -> np.ndarray:
    ranks = np.argsort(np.argsort(np.abs(delta), axis=1), axis=1)
    likely = density - epsilon + 2 * epsilon * ranks / (delta.shape[1] - 1)
    uniform = (np.random.Philox(key=key).random_raw(delta.size) >> np.uint64(11)) * 2.0**-53
    kept = np.where(uniform.reshape(delta.shape) < likely, delta, 0.0)
    return kept * (np.abs(delta).sum() / np.abs(kept).sum())


def signed(parts: list[np.ndarray], weights: list[float], normalise: bool) -> np.ndarray:
    weighted = np.stack([w * d for w, d in zip(weights, parts, strict=True)])
    majority = np.where(weighted.sum(axis=0) >= 0, 1, -1)
    agrees = np.sign(weighted) == majority
    total: np.ndarray = (weighted * agrees).sum(axis=0)
    share = (np.array(weights)[:, None, None] * agrees).sum(axis=0)
    return total / np.where(share == 0, 1, share) if normalise else total


def breadcrumbs(d: list[np.ndarray], w: list[float], key: str, ties: bool) -> np.ndarray:
    kept = [outliers(x, DENSITY, 0.05) for x in d]
    return signed(kept, w, False) if ties else sum(x * y for x, y in zip(w, kept, strict=True))  # type: ignore[return-value]


def della(d: list[np.ndarray], w: list[float], key: str, ties: bool) -> np.ndarray:
    kept = [thinned(x, DENSITY, 0.2, combining.mask_key(5, i, key, "delta")) for i, x in enumerate(d)]
    return signed(kept, w, True) if ties else sum(x * y for x, y in zip(w, kept, strict=True))  # type: ignore[return-value]


def slerp(d: list[np.ndarray], w: list[float], key: str, ties: bool) -> np.ndarray:
    if len(d) == 1:
        return d[0]
    t = w[1] / (w[0] + w[1])
    angle = math.acos((d[0] * d[1]).sum() / np.linalg.norm(d[0]) / np.linalg.norm(d[1]))
    return (math.sin((1 - t) * angle) * d[0] + math.sin(t * angle) * d[1]) / math.sin(angle)  # type: ignore[no-any-return]


def model_stock(d: list[np.ndarray], w: list[float], key: str, ties: bool) -> np.ndarray:
    n = len(d)
    pairs = [(d[i], d[j]) for i in range(n) for j in range(i + 1, n)]
    c = float(np.mean([(x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y) for x, y in pairs])) if pairs else 1.0
    return n * c / (1 + (n - 1) * c) * np.mean(d, axis=0)  # type: ignore[no-any-return]


FORMULAS: dict[str, tuple[Callable[..., np.ndarray], dict[str, Any]]] = {
    "breadcrumbs": (breadcrumbs, {"gamma": 0.05}),
    "breadcrumbs_ties": (breadcrumbs, {"gamma": 0.05}),
    "della": (della, {"epsilon": 0.2, "seed": 5}),
    "della_linear": (della, {"epsilon": 0.2, "seed": 5}),
    "slerp": (slerp, {}),
    "model_stock": (model_stock, {}),
}


def test_every_method_has_a_formula() -> None:
    assert FORMULAS.keys() == mixing.METHODS.keys()


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_against_the_formula(kit: Kit, tmp_path: Path, name: str, dtype: str) -> None:
    formula, more = FORMULAS[name]
    base = kit.base("qwen2")
    configs = TWO if name == "slerp" else THREE
    adapters = build(kit, "qwen2", tmp_path, *configs)
    weights = None if name == "model_stock" else [1.0, 0.7, 1.5][: len(configs)]
    out = merge(base, adapters, tmp_path / "out", name, options(name, **more), weights=weights, torch_dtype=dtype)
    merged, original = read(out), read(base)
    for module, places in ((QUERY, range(len(configs))), (DOWN, range(2))):
        key = f"{module}.weight"
        found = deltas(adapters, module, (6 / 4, 3 / 4, 10 / 4))
        factors = [(weights or [1.0] * 3)[i] for i in places]
        wanted = float64(original[key]) + formula(found, factors, key, name in ("della", "breadcrumbs_ties"))
        stored = {"float32": "F32", "bfloat16": "BF16"}[dtype]
        off = np.abs(float64(merged[key]) - wanted) > np.abs(rounded(wanted, stored) - wanted) * (1 + 1e-9) + 1e-12
        assert not off.any(), f"{key}: {off.sum()} elements"
    assert inlay.verify(base, adapters, out).exact


@pytest.mark.parametrize("name", FORMULAS)
def test_blocks_do_not_matter(name: str) -> None:
    """Any rows at a time give the bits of all rows at once."""
    rng = np.random.default_rng(1)
    rights, lefts = rng.normal(size=(2, 3, 37)), rng.normal(size=(2, 50, 3))
    terms = [
        [mixing.Pair(0.5 + i, rights[i], lambda first, last, i=i: lefts[i, first:last])]  # type: ignore[misc]
        for i in range(2)
    ]
    mix = mixing.Mix(name, "w", (0, 1), (1.0, 0.4), DENSITY, gamma=0.1)
    whole = mixing.Mixer(mix, terms, (50, 37)).rows(0, 50)
    pieces = mixing.Mixer(mix, terms, (50, 37))
    for step in (1, 7, 16):
        cut = np.vstack([pieces.rows(at, min(50, at + step)) for at in range(0, 50, step)])
        assert cut.tobytes() == whole.tobytes()


def test_blocks_of_statistics_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    right, left = rng.normal(size=(3, 37)), rng.normal(size=(50, 3))
    terms = [[mixing.Pair(1.0, right * (i + 1), lambda first, last: left[first:last])] for i in range(2)]
    for name in ("breadcrumbs", "della", "slerp", "model_stock"):
        mix = mixing.Mix(name, "w", (0, 1), (1.0, 0.4), DENSITY)
        whole = mixing.Mixer(mix, terms, (50, 37)).rows(0, 50).tobytes()
        monkeypatch.setattr(mixing, "BLOCK_ELEMENTS", 100)
        assert mixing.Mixer(mix, terms, (50, 37)).rows(0, 50).tobytes() == whole
        monkeypatch.undo()


def test_plans_survive_json(kit: Kit, tmp_path: Path) -> None:
    adapters = build(kit, "qwen2", tmp_path, *TWO)
    for name in ("ties", "della"):
        plan = inlay.make_plan(kit.base("qwen2"), adapters, combine_by=name, options=options(name))
        assert loads(dumps(plan)) == plan
        assert loads(dumps(plan)).digest == plan.digest


def test_seed_alone_decides(kit: Kit, tmp_path: Path) -> None:
    adapters, base = build(kit, "qwen2", tmp_path, *TWO), kit.base("qwen2")
    made = [
        merge(base, adapters, tmp_path / str(i), "della", options("della", seed=seed))
        for i, seed in enumerate((1, 1, 2))
    ]
    assert same_tensors(made[0], made[1])
    assert not same_tensors(made[0], made[2])


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("dare", {}, "is not one of"),
    ("ties", {"density": None}, "needs it"),
    ("della", {"density": 0.1}, "epsilon"),
    ("della", {"density": 0.5, "gamma": 0.1}, "has no effect"),
    ("slerp", {"density": 0.5}, "has no effect"),
    ("slerp", {"weights": [1.0, -1.0]}, "not negative"),
    ("slerp", {"weights": [0.0, 0.0]}, "not both zero"),
    ("model_stock", {"weights": [1.0, 2.0]}, "no meaning"),
    ("breadcrumbs", {"density": 0.5, "gamma": 1.5}, r"\[0, 1\)"),
    ("sum", {"seed": 1}, "has no effect"),
]


@pytest.mark.parametrize(("name", "more", "message"), REFUSED, ids=lambda x: str(x) if isinstance(x, str) else None)
def test_refused(kit: Kit, tmp_path: Path, name: str, more: dict[str, Any], message: str) -> None:
    adapters = build(kit, "qwen2", tmp_path, *TWO)
    more = dict(more)
    weights = more.pop("weights", None)
    with pytest.raises(PlanError, match=message):
        inlay.make_plan(kit.base("qwen2"), adapters, combine_by=name, weights=weights, options=Options(**more))


def test_slerp_takes_two(kit: Kit, tmp_path: Path) -> None:
    adapters = build(kit, "qwen2", tmp_path, *THREE)
    with pytest.raises(PlanError, match="takes 2 adapters"):
        inlay.make_plan(kit.base("qwen2"), adapters, combine_by="slerp")


def test_what_is_no_pair_is_not_mixed(kit: Kit, tmp_path: Path) -> None:
    adapters = build(kit, "qwen2", tmp_path, TWO[0], lora("q_proj", use_dora=True))
    for name in ("della", "ties"):
        with pytest.raises(InputError, match=r"(?i)dora"):
            inlay.make_plan(kit.base("qwen2"), adapters, combine_by=name, options=options(name))


def test_command_line(kit: Kit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapters = [str(a) for a in build(kit, "qwen2", tmp_path, *TWO)]
    base, out = str(kit.base("qwen2")), str(tmp_path / "out")
    command = ["export", "--model", base, "--adapters", *adapters, "--merge_lora", "true", "--output_dir", out]
    assert main([*command, "--combine", "breadcrumbs", "--density", "0.7", "--gamma", "0.02"]) == 0
    capsys.readouterr()
    assert main(["verify", "--model", base, "--adapters", *adapters, "--merged", out]) == 0
    wrong = ["verify", "--model", base, "--adapters", *adapters, "--merged", out, "--combine", "sum"]
    assert main(wrong) == 1


def test_help_names_every_method() -> None:
    from inlay.cli.options import COMBINE_METHODS, MIX_METHODS

    assert set(ALL) == {"sum", "override", *COMBINE_METHODS, *MIX_METHODS}


def test_the_plan_says_how_they_meet(kit: Kit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tensors in common, angles and whether the order matters are those of the adapters, not of what is made of them."""
    adapters = [str(a) for a in build(kit, "qwen2", tmp_path, *TWO)]
    command = ["plan", "--model", str(kit.base("qwen2")), "--adapters", *adapters, "--json"]
    met = {}
    for name, density in (("sum", None), ("ties", "0.5"), ("dare_linear", "0.5"), ("della", "0.5")):
        more = ["--combine", name, *(["--density", density] if density else [])]
        assert main([*command, *more]) == 0
        met[name] = json.loads(capsys.readouterr().out)
    assert all(m["meeting"] == met["sum"]["meeting"] for m in met.values())
    assert all(set(m["overlaps"]) == set(met["sum"]["overlaps"]) for m in met.values())
    assert met["sum"]["overlaps"]
    assert {name: m["order_matters"] for name, m in met.items()} == {
        "sum": False, "ties": False, "dare_linear": True, "della": True,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["ties_svd", "della", "cat", "breadcrumbs_ties"])
def test_the_cap_counts_what_combining_takes(tmp_path: Path, name: str) -> None:
    """The memory that a plan names covers what the run holds."""
    import tracemalloc

    from build import write_adapter, write_model

    weights = {"m.weight": np.ones((768, 768), np.float32)}
    base = write_model(tmp_path / "base", weights)
    adapters = [write_adapter(tmp_path / f"a{i}", {"m": (768, 768)}, r=8, seed=i) for i in range(3)]
    more = {"svd_rank": 4} if "svd" in name else {}
    plan = inlay.make_plan(base, adapters, combine_by=name, options=options(name, **more))
    tracemalloc.start()
    inlay.run_plan(plan, tmp_path / "out", workers=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < plan.cost.memory + (4 << 20)
    with pytest.raises(InputError, match="bytes"):
        inlay.make_plan(base, adapters, combine_by=name, options=options(name), max_memory=200_000)

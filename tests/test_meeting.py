"""How adapters meet, against the deltas themselves in float64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import inlay
from cases import Kit
from families import FAMILIES
from inlay.cli.main import main
from inlay.errors import InputError
from inlay.plan.meeting import meet
from oracle import float64, peft_merged, read
from test_experts import legacy

assert FAMILIES
# float64 sums of a few thousand products, relative to the product of the norms
TOLERANCE = 1e-10


def deltas(kit: Kit, model: str, paths: list[Path]) -> list[dict[str, np.ndarray]]:
    base = kit.base(model)
    before = read(base)
    found = []
    for path in paths:
        merged = peft_merged(model, base, [path], "F64")
        found.append({k: float64(merged[k]) - float64(t) for k, t in before.items()})
    return found


@pytest.mark.parametrize("names", [("qwen2-plain", "qwen2-patterns-by-suffix"), ("gpt2-plain", "gpt2-plain")])
def test_sizes_and_cosines_are_those_of_the_deltas(kit: Kit, names: tuple[str, str]) -> None:
    paths = [kit.adapter(name) for name in names]
    model = names[0].partition("-")[0]
    base = read(kit.base(model))
    one, two = deltas(kit, model, paths)
    *single, overall = meet(inlay.make_plan(kit.base(model), paths, weights=[1.0, -2.0]), base=True)
    inner = np.zeros(3)
    for m in single:
        assert m.key is not None and m.base is not None
        a, b = one[m.key], -2 * two[m.key]
        sizes = np.linalg.norm(a), np.linalg.norm(b)
        assert m.sizes[0] == pytest.approx(sizes[0], rel=TOLERANCE) and m.sizes[1] == pytest.approx(
            sizes[1], rel=TOLERANCE
        )
        assert m.cosines[0, 1] == pytest.approx(np.vdot(a, b) / sizes[0] / sizes[1], abs=TOLERANCE)
        assert m.base == pytest.approx(np.linalg.norm(float64(base[m.key])), rel=TOLERANCE)
        assert m.relative(0) == pytest.approx(sizes[0] / m.base, rel=TOLERANCE)
        inner += np.vdot(a, a), np.vdot(b, b), np.vdot(a, b)
    assert {m.key for m in single} == {k for k, d in one.items() if np.any(d)}
    assert overall.key is None and overall.cosines[0, 1] == pytest.approx(
        inner[2] / np.sqrt(inner[0] * inner[1]), abs=TOLERANCE
    )


def test_adapters_that_share_no_tensor_have_no_angle(kit: Kit, tmp_path: Path) -> None:
    base = kit.base("qwen3moe")
    legacy(tmp_path / "a", {"model.layers.0.mlp.experts.0.gate_proj": (12, 16)})
    legacy(tmp_path / "b", {"model.layers.0.mlp.experts.1.gate_proj": (12, 16)})
    *single, overall = meet(inlay.make_plan(base, [tmp_path / "a", tmp_path / "b"]))
    assert [len(m.sizes) for m in single] == [1, 1] and not overall.cosines


def test_modules_of_one_fused_tensor_are_kept_apart(kit: Kit, tmp_path: Path) -> None:
    """q_proj of one adapter and v_proj of the other lie in the same Wqkv, on other rows."""
    base = kit.base("nomicbert")
    q, v = "layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj"
    first = legacy(tmp_path / "a", {q: (16, 16)})
    legacy(tmp_path / "b", {v: (16, 16)})
    legacy(tmp_path / "c", {q: (16, 16), v: (16, 16)})
    plan = inlay.make_plan(base, [tmp_path / name for name in "abc"])
    (meeting, _) = meet(plan)
    a, b = (float64(t) for t in first[q])
    assert meeting.sizes[0] == pytest.approx(np.linalg.norm(b @ a), rel=TOLERANCE)
    assert (0, 1) not in meeting.cosines and 0 < meeting.cosines[0, 2] < 1


def test_plan_and_inspect_show_it(kit: Kit, capsys: pytest.CaptureFixture[str]) -> None:
    base, a, b = kit.base("qwen2"), kit.adapter("qwen2-plain"), kit.adapter("qwen2-rank1")
    assert main(["plan", "--model", str(base), "--adapters", str(a), str(b)]) == 0
    assert "how the adapters meet" in capsys.readouterr().out
    assert main(["plan", "--model", str(base), "--adapters", str(a), str(b), "--json"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text)["meeting"][-1]["key"] is None
    assert inlay.loads(text) == inlay.make_plan(base, [a, b])
    assert main(["inspect", str(a), str(b), "--model", str(base)]) == 0
    assert "% of the weights it changes" in capsys.readouterr().out
    assert main(["inspect", str(a), str(b), "--model", str(base), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["meeting"][0]["relative"]
    assert main(["inspect", str(a), str(b)]) == 2
    assert "--model" in capsys.readouterr().err


def test_what_is_no_number_is_null_in_json(kit: Kit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A base with NaN in it made JSON that no other reader takes."""
    from safetensors.torch import save_file

    base = kit.copy_of(kit.base("qwen2"), tmp_path)
    for file in base.glob("*.safetensors"):
        tensors = read(file)
        for key in [k for k in tensors if k.endswith("0.self_attn.q_proj.weight")]:
            tensors[key][0, 0] = float("nan")
            save_file(tensors, file, {"format": "pt"})
    paths = [str(kit.adapter(name)) for name in ("qwen2-plain", "qwen2-rank1")]
    assert main(["inspect", *paths, "--model", str(base), "--json"]) == 0

    def refuse(name: str) -> None:
        raise AssertionError(name)

    json.loads(capsys.readouterr().out, parse_constant=refuse)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused(kit: Kit, weight: float) -> None:
    with pytest.raises(InputError, match="finite"):
        inlay.make_plan(kit.base("qwen2"), [kit.adapter("qwen2-plain")], weights=[weight])


def test_a_bias_without_elements_is_refused(kit: Kit, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    base, path = kit.copy_of(kit.base("qwen2"), tmp_path), tmp_path / "ia3"
    key = "model.layers.0.self_attn.q_proj"
    for file in base.glob("*.safetensors"):
        tensors = read(file)
        if key + ".bias" in tensors:
            save_file({**tensors, key + ".bias": torch.zeros(0)}, file, {"format": "pt"})
    path.mkdir()
    save_file({f"base_model.model.{key}.ia3_l": torch.ones(16, 1)}, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", "feedforward_modules": []}))
    with pytest.raises(InputError, match="do not fit together"):
        inlay.make_plan(base, [path])

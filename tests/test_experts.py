"""Adapters named after the model in memory, on checkpoints that are laid out otherwise on disk, against PEFT."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import inlay
from cases import MODELS, Kit, load_peft, new_peft_model, save_adapter, third_party
from families import FAMILIES
from inlay.errors import PlanError
from inlay.keys.memory import memory_layout
from inlay.plan.combination import Options
from oracle import correctly_rounded, float64, reach, read, same_bytes, same_tensors

EXPERTS = ["gate_up_proj", "down_proj"]


@dataclass(frozen=True)
class Row:
    name: str
    lora: Mapping[str, Any]

    @property
    def model(self) -> str:
        return self.name.partition("/")[0]


def _row(name: str, targets: Any = (), **lora: Any) -> Row:
    return Row(name, {"r": 3, "lora_alpha": 5, "target_modules": targets, **lora})


ATTENTION = ("q_proj", "o_proj")
ROWS = (
    *(
        _row(f"{model}/experts", ATTENTION, target_parameters=EXPERTS)
        for model in ("qwen3moe", "qwen2moe", "mixtral", "olmoe", "deepseek3", "gptoss", "llama4", "qwen3vlmoe")
    ),
    _row("granitemoe/experts", ATTENTION, target_parameters=EXPERTS),
    _row("qwen3moe/one-parameter", ATTENTION, target_parameters=["down_proj"]),
    _row("qwen3moe/rslora", ATTENTION, target_parameters=EXPERTS, use_rslora=True),
    _row("qwen3moe/router", ATTENTION, target_parameters=["mlp.gate.weight", *EXPERTS]),
    _row("qwen3moe/patterns", ATTENTION, target_parameters=EXPERTS, rank_pattern={r".*\.gate_up_proj": 6}, alpha_pattern={r".*\.down_proj": 2}),
    _row("qwen2moe/shared-expert", ("shared_expert.gate_proj", "shared_expert.down_proj"), target_parameters=EXPERTS),
    _row("deepseek3/dense-too", ("kv_b_proj", "gate_proj", "up_proj", "down_proj"), target_parameters=EXPERTS),
    _row("gptoss/biases", ATTENTION, target_parameters=["gate_up_proj", "gate_up_proj_bias", "down_proj"]),
    _row("gptoss-square/experts", ATTENTION, target_parameters=EXPERTS),
    _row("qwen3moe-square/experts", ATTENTION, target_parameters=EXPERTS),
    _row("qwen25vl/language", r".*language_model.*\.(q_proj|down_proj)"),
    _row("qwen25vl/everything", ("q_proj", "qkv", "mlp.down_proj", "proj")),
    _row("qwen25vl/saved-merger", ("q_proj",), modules_to_save=["merger", "lm_head"]),
    _row("qwen25vl/dora", ("q_proj", "qkv"), use_dora=True),
    _row("gemma3/both-towers", ("q_proj", "fc1")),
    _row("llava/both-towers", ("q_proj", "fc1", "lm_head")),
    _row("neox/head", ("query_key_value", "lm_head")),
    _row("vit/attention", ("q_proj", "v_proj", "fc1")),
    _row("nomicbert/fused", ("q_proj", "v_proj", "gate_proj")),
    _row("nomicbert/fused-dora", ("q_proj", "k_proj", "v_proj"), use_dora=True),
)  # fmt: skip
NAMES = [row.name for row in ROWS]


@pytest.fixture(scope="module")
def adapter(kit: Kit, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            row = next(r for r in ROWS if r.name == name)
            model = MODELS[row.model].load(kit.base(row.model))
            path = tmp_path_factory.mktemp("experts") / name.replace("/", "-")
            made[name] = save_adapter(new_peft_model(model, row.lora, len(name)), path, copies=False)
        return made[name]

    return get


def peft_on_disk(model: str, base: Path, adapters: list[Path], where: Path) -> dict[str, Any]:
    """PEFT's merge in float64, saved by transformers: names and layout of the base."""
    with third_party():
        merged = load_peft(MODELS[model].load(base, "F64"), *adapters, autocast=False).merge_and_unload()
        merged.save_pretrained(where)
    return read(where)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("name", NAMES)
def test_every_element_is_pefts_float64_merge_rounded_once(
    kit: Kit, adapter: Callable[[str], Path], name: str, dtype: str, tmp_path: Path
) -> None:
    row = next(r for r in ROWS if r.name == name)
    base, path = kit.base(row.model, dtype), adapter(name)
    plan = inlay.make_plan(base, [path])
    inlay.run_plan(plan, tmp_path / "out")
    expected, before, merged = (
        peft_on_disk(row.model, base, [path], tmp_path / "peft"),
        read(base),
        read(tmp_path / "out"),
    )
    assert list(merged) == list(before), "keys and their order are the base's"
    changed = 0
    for key, tensor in merged.items():
        if not tensor.is_floating_point():
            continue
        stored, exact, weight = float64(tensor), float64(expected[key]), float64(before[key])
        assert stored.shape == exact.shape, key
        error = reach(exact, weight) if not np.array_equal(exact, weight) else 0.0
        assert correctly_rounded(stored, exact, error, dtype).all(), key
        changed += not np.array_equal(stored, weight)
    assert changed, "the adapter did nothing, so this test could not fail"
    report = inlay.verify(base, [path], tmp_path / "out")
    assert report.ok and report.exact, report
    assert inlay.loads(inlay.dumps(plan)) == plan


@pytest.mark.parametrize("name", ["qwen3moe/experts", "gptoss/experts", "nomicbert/fused", "qwen3vlmoe/experts"])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_threads_and_blocks_change_no_byte(
    kit: Kit, adapter: Callable[[str], Path], name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = inlay.make_plan(kit.base(name.partition("/")[0], dtype), [adapter(name)])
    inlay.run_plan(plan, tmp_path / "one", workers=1)
    for name_of in ("FLOAT64_TILE_BYTES", "KERNEL_TILE_BYTES"):
        monkeypatch.setattr(f"inlay.plan.memory.{name_of}", 700)
    inlay.run_plan(plan, tmp_path / "many", workers=8)
    assert same_bytes(tmp_path / "one", tmp_path / "many")
    monkeypatch.setenv("INLAY_KERNEL", "0")
    inlay.run_plan(plan, tmp_path / "float64")
    assert same_bytes(tmp_path / "one", tmp_path / "float64")
    tensors = dict(inlay.merged_tensors(plan))
    assert all(t.equal(tensors[k]) for k, t in read(tmp_path / "one").items())


def test_two_adapters_on_the_experts_are_summed_and_rounded_once(
    kit: Kit, adapter: Callable[[str], Path], tmp_path: Path
) -> None:
    base, paths = kit.base("qwen3moe", "BF16"), [adapter("qwen3moe/experts"), adapter("qwen3moe/rslora")]
    inlay.run_plan(inlay.make_plan(base, paths), tmp_path / "out")
    before, merged = read(base), read(tmp_path / "out")
    one, two = (peft_on_disk("qwen3moe", base, [p], tmp_path / p.name) for p in paths)
    for key, tensor in merged.items():
        weight = float64(before[key])
        exact = float64(one[key]) + float64(two[key]) - weight
        error = 4 * reach(exact, weight) if not np.array_equal(exact, weight) else 0.0
        assert correctly_rounded(float64(tensor), exact, error, "BF16").all(), key


def test_mixing_nothing_away_is_the_sum(kit: Kit, adapter: Callable[[str], Path], tmp_path: Path) -> None:
    """Each expert's deltas are mixed for themselves; a density of 1 keeps all of them."""
    base, paths = kit.base("qwen3moe", "BF16"), [adapter("qwen3moe/experts"), adapter("qwen3moe/rslora")]
    inlay.run_plan(inlay.make_plan(base, paths), tmp_path / "sum")
    mixed = inlay.make_plan(base, paths, combine_by="della_linear", options=Options(density=1.0))
    inlay.run_plan(mixed, tmp_path / "mixed")
    assert same_tensors(tmp_path / "sum", tmp_path / "mixed")
    thinned = inlay.make_plan(base, paths, combine_by="della_linear", options=Options(density=0.5))
    inlay.run_plan(thinned, tmp_path / "thinned", workers=1)
    assert inlay.verify(base, paths, tmp_path / "thinned").exact
    assert not same_tensors(tmp_path / "sum", tmp_path / "thinned")


def legacy(path: Path, modules: Mapping[str, tuple[int, int]], rslora: bool = False) -> dict[str, tuple[Any, Any]]:
    """An adapter as transformers 4 left it: a pair for each expert, under its name on disk."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(5)
    pairs = {
        m: (torch.randn(3, i, generator=generator), torch.randn(o, 3, generator=generator))
        for m, (o, i) in modules.items()
    }
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "use_rslora": rslora, "target_modules": ["gate_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return pairs


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("only", ["gate_proj", "experts.2.", "experts."])
@pytest.mark.parametrize("model", ["qwen3moe", "qwen2moe", "deepseek3"])
def test_per_expert_adapters_of_older_transformers_reach_their_experts(
    kit: Kit, model: str, only: str, rslora: bool, tmp_path: Path
) -> None:
    base = kit.base(model)
    before = read(base)
    modules = {
        k.removesuffix(".weight"): tuple(t.shape)
        for k, t in before.items()
        if ".mlp." in k and only in k and t.dim() == 2 and "_proj" in k
    }
    pairs = legacy(tmp_path / "a", modules, rslora)
    inlay.run_plan(inlay.make_plan(base, [tmp_path / "a"]), tmp_path / "out")
    merged = read(tmp_path / "out")
    scaling = 3 / np.sqrt(3) if rslora else 1.0
    assert pairs
    for key, tensor in merged.items():
        module, weight = key.removesuffix(".weight"), float64(before[key])
        exact = weight
        if module in pairs:
            a, b = (float64(t) for t in pairs[module])
            exact = weight + scaling * (b @ a)
        assert correctly_rounded(float64(tensor), exact, reach(exact, weight), "F32").all(), key


def test_old_names_of_a_vision_language_model_are_keys(kit: Kit, tmp_path: Path) -> None:
    """Before transformers 4.52 Qwen2.5-VL was named in memory as it still is on disk."""
    base = kit.base("qwen25vl")
    pairs = legacy(tmp_path / "a", {"model.layers.1.self_attn.q_proj": (16, 16), "visual.blocks.0.attn.qkv": (48, 16)})
    inlay.run_plan(inlay.make_plan(base, [tmp_path / "a"]), tmp_path / "out")
    before, merged = read(base), read(tmp_path / "out")
    for module, (a, b) in pairs.items():
        weight = float64(before[module + ".weight"])
        exact = weight + float64(b) @ float64(a)
        assert correctly_rounded(float64(merged[module + ".weight"]), exact, reach(exact, weight), "F32").all()


def _edit(path: Path, **changes: Any) -> None:
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(
        json.dumps({k: v for k, v in {**config, **changes}.items() if v is not None})
    )


def test_a_square_stack_without_a_version_is_refused(kit: Kit, adapter: Callable[[str], Path], tmp_path: Path) -> None:
    path = kit.copy_of(adapter("gptoss-square/experts"), tmp_path)
    _edit(path, peft_version=None)
    with pytest.raises(PlanError, match="peft_version") as error:
        inlay.make_plan(kit.base("gptoss-square"), [path])
    assert "down_proj" in str(error.value) and "gate_up_proj" not in str(error.value), "only that one is square"


@pytest.mark.parametrize(("version", "turned"), [("0.18.1", True), ("0.19.0", False), ("0.21.2", False)])
def test_how_a_square_stack_lies_follows_from_the_version(kit: Kit, version: str, turned: bool, tmp_path: Path) -> None:
    """Up to 0.18 the pair was for (in, out) = (d1, d2), whatever the class says."""
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "a"
    base = kit.base("qwen3moe-square")
    before = read(base)
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(4 * 2, 16, generator=generator), torch.randn(16, 4 * 2, generator=generator)
    module = "model.layers.0.mlp.experts"
    path.mkdir()
    save_file(
        {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b},
        path / "adapter_model.safetensors",
    )
    raw = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": [f"{module}.down_proj"], "peft_version": version,
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(raw))
    inlay.run_plan(inlay.make_plan(base, [path]), tmp_path / "out")
    merged = read(tmp_path / "out")
    for expert in range(4):
        key = f"{module}.{expert}.down_proj.weight"
        weight = float64(before[key])
        delta = float64(b).reshape(16, 2, 4)[:, :, expert] @ float64(a)[2 * expert : 2 * expert + 2]
        exact = weight + (delta.T if turned else delta)
        assert correctly_rounded(float64(merged[key]), exact, reach(exact, weight), "F32").all()


def test_a_missing_wrapper_is_refused(kit: Kit, adapter: Callable[[str], Path], tmp_path: Path) -> None:
    path = kit.copy_of(adapter("qwen3moe/one-parameter"), tmp_path)
    _edit(path, target_parameters=EXPERTS)
    with pytest.raises(PlanError, match="1 pairs in the file for 2 parameters"):
        inlay.make_plan(kit.base("qwen3moe"), [path])


@pytest.mark.parametrize("entry", ["mlp.gate.weight", "experts.gate_up_projection", "own_proj", "no.such.module"])
def test_an_entry_that_the_file_has_nothing_for_is_a_warning(
    kit: Kit, adapter: Callable[[str], Path], entry: str, tmp_path: Path
) -> None:
    """PEFT takes it without a word as long as another entry names something."""
    path = kit.copy_of(adapter("qwen3moe/experts"), tmp_path)
    listed = json.loads((path / "adapter_config.json").read_text())["target_parameters"]
    plain = inlay.make_plan(kit.base("qwen3moe"), [path])
    assert not plain.warnings
    _edit(path, target_parameters=[*listed, entry])
    plan = inlay.make_plan(kit.base("qwen3moe"), [path])
    assert plan.warnings == (f"{path.name}: target_parameters lists {entry!r}, the file has nothing for it",)
    assert [s.entries for s in plan.shards] == [s.entries for s in plain.shards]


def test_without_transformers_the_message_says_what_to_install(
    kit: Kit, adapter: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [
        (kit.base(m), adapter(name))
        for m, name in (
            ("qwen25vl", "qwen25vl/language"),
            ("gptoss", "gptoss/experts"),
            ("qwen3moe", "qwen3moe/router"),
        )
    ]
    monkeypatch.setitem(sys.modules, "transformers", None)
    for base, path in given:
        with pytest.raises(PlanError, match=r"inlay\[transformers\]"):
            inlay.make_plan(base, [path])


@pytest.mark.parametrize("model", ["qwen3moe", "qwen2moe", "mixtral", "olmoe", "deepseek3"])
def test_experts_of_declared_classes_need_no_transformers(
    kit: Kit, adapter: Callable[[str], Path], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: the plan is the same whether the declared table or transformers says where the experts lie."""
    base, path = kit.base(model), adapter(f"{model}/experts")
    with monkeypatch.context() as patch:
        patch.setattr("inlay.keys.names.stacked_experts", lambda *_: None)
        plan = inlay.make_plan(base, [path])
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert inlay.make_plan(base, [path]) == plan


def test_an_unknown_class_says_what_could_not_be_placed(
    kit: Kit, adapter: Callable[[str], Path], tmp_path: Path
) -> None:
    base = kit.copy_of(kit.base("qwen25vl"), tmp_path)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": ["RemoteModel"]}))
    with pytest.raises(PlanError, match="does not know the class") as error:
        inlay.make_plan(base, [adapter("qwen25vl/language")])
    assert "reaches nothing: the base has no model.language_model" in str(error.value)


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("model", FAMILIES)
def test_the_layout_rebuilds_what_transformers_loads(kit: Kit, model: str, original: bool, tmp_path: Path) -> None:
    """Law: every parameter is tiled by its slices, bit for bit; here for checkpoints of both kinds of names."""
    import torch

    loaded = MODELS[model].load(kit.base(model))
    with third_party():
        loaded.save_pretrained(tmp_path, save_original_format=original)
        again = type(loaded).from_pretrained(tmp_path)
    disk = read(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    layout = memory_layout(config, {k: tuple(t.shape) for k, t in disk.items()})
    assert layout is not None and not layout.refused and not layout.unplaced
    for name, tensor in again.state_dict().items():
        if not layout.slices.get(name):
            assert name == "lm_head.weight", name  # tied, and not stored
            continue
        filled = torch.zeros(tensor.shape, dtype=torch.int64)
        built = torch.zeros_like(tensor)
        for part in layout.slices[name]:
            rows = disk[part.key].transpose(-1, -2) if part.transposed else disk[part.key]
            where = slice(*part.rows) if part.expert is None else (part.expert, slice(*part.rows))
            built[where if tensor.dim() else ...] = rows[slice(*part.disk_rows) if tensor.dim() else ...].reshape(
                built[where if tensor.dim() else ...].shape
            )
            filled[where if tensor.dim() else ...] += 1
        assert torch.equal(built, tensor) and bool((filled == 1).all()), name


def test_a_class_that_is_not_known_has_no_layout() -> None:
    assert memory_layout({"architectures": ["RemoteModel"], "model_type": "remote"}, {}) is None


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_pairs_of_experts_that_are_no_floats_are_refused(
    kit: Kit, adapter: Callable[[str], Path], dtype: str, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import save_file

    path = kit.copy_of(adapter("qwen3moe/experts"), tmp_path)
    file = path / "adapter_model.safetensors"
    tensors = read(file)
    key = next(k for k in tensors if k.endswith("experts.lora_B.weight"))
    save_file({**tensors, key: tensors[key].to(getattr(torch, dtype))}, file)
    with pytest.raises(PlanError, match="adapter tensors of type"):
        inlay.make_plan(kit.base("qwen3moe"), [path])


def test_a_dense_method_on_a_fused_tensor_of_which_another_changes_a_module_is_refused(
    kit: Kit, adapter: Callable[[str], Path], tmp_path: Path
) -> None:
    """The cost of such a tensor was asked for after the refusal, and ended in a traceback."""
    import torch
    from safetensors.torch import save_file

    base = kit.base("nomicbert")
    key = next(k for k in read(base) if k.endswith("0.attn.Wqkv.weight"))
    out, in_ = read(base)[key].shape
    module = "base_model.model." + key.removesuffix(".weight")
    (tmp_path / "loha").mkdir()
    pairs = {f"{module}.hada_w{i}_{end}": torch.ones(s) for i in "12" for end, s in (("a", (out, 2)), ("b", (2, in_)))}
    save_file(pairs, tmp_path / "loha" / "adapter_model.safetensors")
    (tmp_path / "loha" / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA", "r": 2, "alpha": 2}))
    for paths in (
        [tmp_path / "loha", adapter("nomicbert/fused")],
        [adapter("nomicbert/fused-dora"), tmp_path / "loha"],
    ):
        with pytest.raises(PlanError, match="as a whole and in part"):
            inlay.make_plan(base, paths)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("model", ["qwen3moe", "nomicbert"])
def test_a_float64_base_passes_verification(
    kit: Kit, adapter: Callable[[str], Path], model: str, full: bool, tmp_path: Path
) -> None:
    """A sum that cancels is many units of float64 off where it is computed plainly; the file is right."""
    name = {"qwen3moe": "qwen3moe/experts", "nomicbert": "nomicbert/fused-dora"}[model]
    base, path = kit.base(model, "F64"), adapter(name)
    inlay.run_plan(inlay.make_plan(base, [path]), tmp_path / "out")
    report = inlay.verify(base, [path], tmp_path / "out", full=full)
    assert report.ok and report.exact, [t for t in report.tensors if t.verdict not in ("exact", "base")]


def test_a_plan_that_is_made_under_a_cap_runs_under_it(
    kit: Kit, adapter: Callable[[str], Path], tmp_path: Path
) -> None:
    """A quarter of the cap is for interleaved factors: the plan has to know, not only the run."""
    base, path = kit.base("qwen3moe", "BF16"), adapter("qwen3moe/experts")
    ran = 0
    for cap in range(500, 6000, 100):
        try:
            plan = inlay.make_plan(base, [path], max_memory=cap)
        except PlanError as error:
            assert "--max_memory" in str(error)
            continue
        inlay.run_plan(plan, tmp_path / str(cap), max_memory=cap)
        ran += 1
        if ran == 3:
            break
    assert ran


def _reshaped(kit: Kit, model: str, tmp_path: Path, part: str, tensor: Any) -> Path:
    """A base of which one tensor is another one."""
    from safetensors.torch import save_file

    base = kit.copy_of(kit.base(model), tmp_path)
    for file in sorted(base.glob("*.safetensors")):
        tensors = read(file)
        if found := [k for k in tensors if part in k]:
            save_file({**tensors, found[0]: tensor}, file, {"format": "pt"})
            return base
    raise AssertionError(part)


@pytest.mark.parametrize("shape", [(), (0, 16), (16, 0)])
@pytest.mark.parametrize(
    ("model", "name", "part"),
    [
        ("nomicbert", "nomicbert/fused", "layers.0.attn.Wqkv.weight"),
        ("qwen3moe", "qwen3moe/experts", "layers.0.mlp.experts.1.gate_proj"),
        ("qwen3moe", "qwen3moe/experts", "layers.1.self_attn.o_proj"),
        ("qwen3moe", "qwen3moe/experts", "lm_head"),
        ("qwen3moe", "qwen3moe/router", "layers.0.mlp.gate.weight"),
    ],
)
def test_a_base_with_a_tensor_of_no_size_is_merged_around_or_refused(
    kit: Kit, adapter: Callable[[str], Path], model: str, name: str, part: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    import torch

    base = _reshaped(kit, model, tmp_path, part, torch.zeros(shape))
    try:
        plan = inlay.make_plan(base, [adapter(name)])
    except PlanError:
        return
    inlay.run_plan(plan, tmp_path / "out")
    assert inlay.verify(base, [adapter(name)], tmp_path / "out").ok


@pytest.mark.parametrize("part", ["lora_B.weight", "lora_magnitude_vector"])
def test_what_is_left_beside_the_pairs_of_experts_is_refused(
    kit: Kit, adapter: Callable[[str], Path], part: str, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    path = kit.copy_of(adapter("qwen3moe/experts"), tmp_path)
    file = path / "adapter_model.safetensors"
    tensors = read(file)
    key = next(k for k in tensors if k.endswith("experts.lora_B.weight"))
    save_file({**tensors, key.replace("lora_B.weight", f"base_layer.base_layer.{part}"): tensors[key].clone()}, file)
    with pytest.raises(PlanError, match="no lora_A"):
        inlay.make_plan(kit.base("qwen3moe"), [path])


def test_dora_on_experts_is_refused(kit: Kit, adapter: Callable[[str], Path], tmp_path: Path) -> None:
    """PEFT has none; a file that says so and has no magnitudes was merged as plain LoRA."""
    from safetensors.torch import save_file

    path = kit.copy_of(adapter("qwen3moe/experts"), tmp_path)
    file = path / "adapter_model.safetensors"
    save_file({k: t for k, t in read(file).items() if "experts" in k}, file)
    _edit(path, use_dora=True)
    with pytest.raises(PlanError, match="use_dora is true"):
        inlay.make_plan(kit.base("qwen3moe"), [path])

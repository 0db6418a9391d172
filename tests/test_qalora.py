"""QA-LoRA: the delta is what PEFT's own forward adds, and on codes with zero points of floats these take it whole.

PEFT trains it on GPTQ layers, which need a GPU's kernels; its forward is called here on the factors alone, in float64.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import inlay
from build import PREFIX, adapter_tensors, listing, write_adapter, write_model
from coded import IN, MODULES, OUT, decoded, stored, write_coded
from inlay.checkpoints.checkpoint import open_checkpoint
from inlay.codecs.table import codec
from inlay.dtypes import decode32
from inlay.errors import AdapterError, InputError, PlanError
from inlay.plan.quant import Quant
from inlay.tuners import qalora
from inlay.verification import report

GROUP, R, ALPHA = 64, 4, 8.0
HALF_ULP = {"BF16": 2.0**-9, "F16": 2.0**-12, "F32": 2.0**-25}  # of the largest value below a power of two, relative
KEEP = Quant(keep=True)

# Codec, its options, the part that takes the delta.
FLOAT_OFFSETS = [
    pytest.param("hqq", {"group_size": 32, "dtype": "bfloat16"}, "zero", id="hqq-bf16"),
    pytest.param("hqq", {"group_size": 64, "dtype": "float16"}, "zero", id="hqq-f16"),
    pytest.param("hqq", {"group_size": 64, "dtype": "float32", "nbits": 3}, "zero", id="hqq-f32-3bit"),
    pytest.param("mlx", {"group_size": 32, "scale": "F16"}, "biases", id="mlx-f16"),
    pytest.param("mlx", {"group_size": 64, "scale": "BF16", "bits": 6}, "biases", id="mlx-bf16-6bit"),
]
WHOLE_OFFSETS = [
    pytest.param("gptq", {"group_size": 32, "sym": False}, id="gptq"),
    pytest.param("awq", {"group_size": 32}, id="awq"),
    pytest.param("compressed_pack", {"scheme": "W4A16_ASYM", "group_size": 32}, id="compressed"),
]


def write_qalora(directory: Path, group: int = GROUP, columns: int = IN, size: float = 0.5, **fields: Any) -> Path:
    """An adapter with a factor A for each group of columns."""
    pooled = dict.fromkeys(MODULES, (OUT, columns // group))
    tensors = adapter_tensors(pooled, r=R, size=size)
    fields = {"use_qalora": True, "qalora_group_size": group, **fields}
    return write_adapter(directory, MODULES, r=R, alpha=ALPHA, tensors=tensors, **fields)


def factors(module: str) -> tuple[np.ndarray, np.ndarray]:
    tensors = adapter_tensors(dict.fromkeys(MODULES, (OUT, IN // GROUP)), r=R, size=0.5)
    a, b = (tensors[f"{PREFIX}{module}.lora_{x}.weight"].astype(np.float64) for x in "AB")
    return a, b


def wanted_delta(module: str) -> np.ndarray:
    """By the definition, element by element: mean of a group, times the number of groups, through A and B."""
    a, b = factors(module)
    delta = np.zeros((OUT, IN))
    for k in range(IN):
        x = np.zeros(IN)
        x[k] = 1
        delta[:, k] = ALPHA / R * (b @ (a @ (x.reshape(-1, GROUP).mean(axis=1) * (IN // GROUP))))
    return delta


def refused(base: Path, adapters: list[Path], quant: Quant, words: str, place: Path) -> None:
    with pytest.raises(PlanError, match=words):
        inlay.make_plan(base, adapters, quant=quant, output_dir=place / "out")
    assert not (place / "out").exists()


@pytest.mark.parametrize(("columns", "group", "rslora"), [(128, 16, False), (96, 32, True), (64, 64, False)])
def test_the_delta_is_what_the_forward_of_peft_adds(columns: int, group: int, rslora: bool) -> None:
    from peft.tuners.lora.variants import QALoraLinearVariant

    rng = np.random.default_rng(columns)
    a, b = rng.standard_normal((R, columns // group)), rng.standard_normal((OUT, R))
    raw = {"qalora_group_size": group, "use_rslora": rslora}
    settings = qalora.settings(raw, R, ALPHA)
    layer = (
        {"default": SimpleNamespace(weight=torch.from_numpy(a))},
        {"default": SimpleNamespace(weight=torch.from_numpy(b))},
    )
    module = SimpleNamespace(
        lora_A=layer[0], lora_B=layer[1], lora_dropout={"default": torch.nn.Identity()},
        scaling={"default": ALPHA / (R**0.5 if rslora else R)}, qalora_group_size={"default": group},
        in_features=columns, training=False,
    )  # fmt: skip
    x = torch.from_numpy(rng.standard_normal((2, 3, columns)))
    added = QALoraLinearVariant.forward(module, "default", x, torch.zeros(2, 3, OUT, dtype=torch.float64)).numpy()
    delta = qalora.delta(
        qalora.prepare({"lora_A": a, "lora_B": b}, settings, (OUT, columns)), settings, (OUT, columns), 0, OUT
    )
    assert qalora.check({"lora_A": a.shape, "lora_B": b.shape}, settings, (OUT, columns)) is None
    np.testing.assert_allclose(x.numpy() @ delta.T, added, rtol=0, atol=columns * 2.0**-50 * np.abs(added).max())
    some = qalora.delta({"lora_A": a, "lora_B": b}, settings, (OUT, columns), 5, 9)
    np.testing.assert_allclose(some, delta[5:9], rtol=1e-14)


@pytest.mark.parametrize(("name", "options"), [c.values[:2] for c in (*WHOLE_OFFSETS, FLOAT_OFFSETS[0])])
def test_on_decoded_codes_the_merge_is_exact(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    base, adapter = write_coded(tmp_path / "base", name, options), write_qalora(tmp_path / "adapter")
    plan = inlay.make_plan(base, [adapter], torch_dtype="float32")
    merged = {key: tensor.numpy() for key, tensor in inlay.merged_tensors(plan)}
    for module, weight in decoded(base).items():
        exact = weight + wanted_delta(module)
        # One rounding to float32, and that of the float64 sums before it.
        bound = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64) / 2 * (1 + 2.0**-20)
        assert (np.abs(merged[f"{module}.weight"] - exact) <= bound).all()
        assert np.abs(wanted_delta(module)).max() > 1e-3
    inlay.run_plan(plan, tmp_path / "out")
    assert inlay.verify(base, [adapter], tmp_path / "out", full=True).ok


@pytest.mark.parametrize(("name", "options", "part"), FLOAT_OFFSETS)
def test_zero_points_of_floats_take_the_delta(name: str, options: dict[str, Any], part: str, tmp_path: Path) -> None:
    base, adapter = write_coded(tmp_path / "base", name, options), write_qalora(tmp_path / "adapter")
    plan = inlay.make_plan(base, [adapter], quant=KEEP)
    assert any("zero points of 2 weights" in note for note in plan.notes)
    assert inlay.loads(inlay.dumps(plan)) == plan
    inlay.run_plan(plan, tmp_path / "out")
    before, after = decoded(base), decoded(tmp_path / "out")
    for key in open_checkpoint(base).tensors:
        same = np.array_equal(stored(base, key), stored(tmp_path / "out", key))
        assert same == (not key.endswith(f".{part}")), key
    form = codec(name)
    endings = {**form.PARTS, **form.OPTIONAL}
    for module in MODULES:
        dtype = open_checkpoint(base).tensors[module + endings[part]][1].dtype
        offset = np.abs(decode32(stored(tmp_path / "out", module + endings[part]), dtype)).astype(np.float64)
        scale = 1.0 if name == "mlx" else decode32(stored(base, f"{module}.scale"), dtype).astype(np.float64)
        half_ulp = 2.0 ** np.floor(np.log2(offset)) * HALF_ULP[dtype.name] * 2
        bound = np.repeat((half_ulp * np.abs(scale)).reshape(OUT, -1), options["group_size"], axis=1)
        exact = before[module] + wanted_delta(module)
        slack = 2.0**-21 * (
            np.abs(exact) + np.repeat((offset * np.abs(scale)).reshape(OUT, -1), options["group_size"], axis=1)
        )
        assert (np.abs(after[module] - exact) <= bound + slack).all()  # and float32 in decoding
    survived = inlay.survival(plan, full=True)
    assert survived is not None
    assert survived.overall.kept == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("name", "options", "part"), [FLOAT_OFFSETS[0], FLOAT_OFFSETS[3]])
@pytest.mark.parametrize("full", [True, False])
def test_a_wrong_zero_point_is_found(
    name: str, options: dict[str, Any], part: str, full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = write_coded(tmp_path / "base", name, options), write_qalora(tmp_path / "adapter")
    inlay.run_plan(inlay.make_plan(base, [adapter], quant=KEEP), tmp_path / "out")
    if not full:  # so that the whole weight is more than is looked at
        monkeypatch.setattr("inlay.verification.codes.BLOCK_ELEMENTS", OUT * IN - 1)
    checked = inlay.verify(base, [adapter], tmp_path / "out", full=full, quant=KEEP)
    assert checked.ok
    key = f"{next(iter(MODULES))}.{part}"
    assert {t.key: t.verdict for t in checked.tensors}[key] == report.ENCODED
    shard, info = open_checkpoint(tmp_path / "out").tensors[key]
    file = tmp_path / "out" / shard.file
    data = bytearray(file.read_bytes())
    for row in range(info.nbytes // 2):
        data[info.start + 2 * row] ^= 1  # the last bit of each: a sample sees it wherever it looks
    file.write_bytes(bytes(data))
    checked = inlay.verify(base, [adapter], tmp_path / "out", full=full, quant=KEEP)
    assert {t.key: t.verdict for t in checked.tensors}[key] == report.WRONG


@pytest.mark.parametrize(("name", "options", "part"), FLOAT_OFFSETS)
def test_zero_points_do_not_depend_on_the_blocks(name: str, options: dict[str, Any], part: str) -> None:
    form, rng = codec(name), np.random.default_rng(0)
    weight = rng.standard_normal((OUT, IN)).astype(np.float32)
    settings = form.fresh(weight.shape, options)
    parts = form.encode(weight, settings, 0, {})
    parts = {**parts, **form.finish(parts, settings)} if hasattr(form, "finish") else parts
    shifted = form.decode(parts, settings, 0, OUT) + np.repeat(rng.standard_normal((OUT, IN // 64)), 64, axis=1)
    whole = form.encode(shifted.astype(np.float32), settings, 0, {p: a for p, a in parts.items() if p != part})
    assert whole.keys() == {part}
    found = []
    for first, last in ((0, 3), (3, 4), (4, OUT)):
        known = {
            p: parts[p] if span is None else parts[p][(slice(None),) * span[0] + (slice(*span[1:]),)]
            for p, span in form.spans(settings, first, last).items()
            if p != part
        }
        found.append(form.encode(shifted[first:last].astype(np.float32), settings, first, known)[part])
    assert np.array_equal(np.concatenate(found), whole[part])
    unshifted = form.encode(
        form.decode(parts, settings, 0, OUT), settings, 0, {p: a for p, a in parts.items() if p != part}
    )
    assert np.array_equal(unshifted[part], parts[part])


@pytest.mark.parametrize(("name", "options"), WHOLE_OFFSETS)
def test_integer_zero_points_refuse_it_with_the_reason(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    base, adapter = write_coded(tmp_path / "base", name, options), write_qalora(tmp_path / "adapter")
    refused(base, [adapter], KEEP, rf"(?s)_proj.*and 1 more.*zero points of {name}.*integers.*16 bits.*fresh", tmp_path)
    entries = inlay.make_plan(base, [adapter], quant=Quant(keep=True, scales="fresh")).entries
    assert any(e.touched for e in entries.values()), "new codes are what any adapter may have"
    freed = inlay.make_plan(base, [adapter], quant=Quant(keep=True, keep_16bit="proj"))
    assert f"{next(iter(MODULES))}.weight" in freed.entries


def test_groups_that_cut_those_of_the_codes_are_refused(tmp_path: Path) -> None:
    base = write_coded(tmp_path / "base", "hqq", {"group_size": 64})
    refused(base, [write_qalora(tmp_path / "a", group=32)], KEEP, "groups of 32 .* of 64 columns", tmp_path)


def test_another_adapter_on_the_same_weight_is_refused(tmp_path: Path) -> None:
    base = write_coded(tmp_path / "base", "hqq", {"group_size": 64})
    plain = write_adapter(tmp_path / "plain", MODULES, r=R)
    adapters = [write_qalora(tmp_path / "a"), plain]
    refused(base, adapters, KEEP, "another adapter changes this weight", tmp_path)
    assert inlay.make_plan(base, adapters, torch_dtype="float32").shards, "in floats they add up"


def test_a_base_in_floats_is_refused(tmp_path: Path) -> None:
    weights = {f"{module}.weight": np.ones((OUT, IN), np.float32) for module in MODULES}
    base = write_model(tmp_path / "base", weights)
    before = listing(base)
    refused(
        base, [write_qalora(tmp_path / "a")], Quant(), "trained on a layer of GPTQ.*give the GPTQ checkpoint", tmp_path
    )
    assert listing(base) == before


def test_shapes_that_are_not_of_groups_are_refused(tmp_path: Path) -> None:
    base = write_coded(tmp_path / "base", "gptq", {"group_size": 32})
    plain = write_adapter(tmp_path / "plain", MODULES, r=R, use_qalora=True, qalora_group_size=16)
    refused(base, [plain], Quant(), "it is a plain pair: set use_qalora to false", tmp_path)
    refused(base, [write_qalora(tmp_path / "a", qalora_group_size=48)], Quant(), "48 does not divide", tmp_path)
    refused(
        base, [write_qalora(tmp_path / "b", qalora_group_size=32)], Quant(), "groups of 32 columns do not", tmp_path
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_dora": True}, "use_dora together with qalora"),
        ({"lora_bias": True}, "lora_bias together with qalora"),
        ({"init_lora_weights": "pissa"}, "use_qalora together with pissa"),
        ({"qalora_group_size": "x"}, "qalora_group_size must be a whole number"),
        ({"use_qalora": "yes"}, "use_qalora must be true or false"),
    ],
)
def test_what_peft_does_not_train_is_refused(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=words) as error:
        inlay.read_adapter(write_qalora(tmp_path / "a", **fields))
    assert isinstance(error.value, InputError)


def test_a_scale_of_zero_has_no_zero_point() -> None:
    form = codec("hqq")
    settings = form.fresh((OUT, IN), {"group_size": 64, "dtype": "float32"})
    weight = np.ones((OUT, IN), np.float32)
    parts = form.encode(weight, settings, 0, {})
    parts = {**parts, **form.finish(parts, settings)}
    parts["scale"][3] = 0
    with pytest.raises(ValueError, match="no zero point"):
        form.encode(weight, settings, 0, {p: a for p, a in parts.items() if p != "zero"})

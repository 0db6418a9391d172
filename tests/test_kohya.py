"""LoRA files of kohya's trainers and of LyCORIS on diffusers pipelines, against their formulas in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import inlay
from inlay.errors import AdapterError, PlanError
from oracle import correctly_rounded, float64, reach
from pipelines import INNER, Tensors, pair, product, read_component, text_shapes, unet_shapes, write_pipeline

RANK = 3
BLOCK = "down_blocks.1.attentions.0"
UNET = (
    f"{BLOCK}.proj_in",
    f"{BLOCK}.transformer_blocks.0.attn1.to_out.0",
    f"{BLOCK}.transformer_blocks.0.attn2.to_k",
    f"{BLOCK}.transformer_blocks.0.ff.net.0.proj",
    "down_blocks.0.resnets.1.conv2",
    "down_blocks.0.downsamplers.0.conv",
    "up_blocks.0.resnets.2.time_emb_proj",
    "up_blocks.1.resnets.0.conv_shortcut",
    "conv_in",
)
TEXT = ("text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.1.mlp.fc2")
SGM = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "down_blocks.0.resnets.1.conv2": "input_blocks_2_0_out_layers_3",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
    "down_blocks.1.attentions.0.proj_in": "input_blocks_4_1_proj_in",
    "down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_v": "input_blocks_5_1_transformer_blocks_0_attn2_to_v",
    "mid_block.resnets.0.conv1": "middle_block_0_in_layers_2",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.2": "middle_block_1_transformer_blocks_0_ff_net_2",
    "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
    "up_blocks.0.attentions.2.transformer_blocks.0.attn1.to_out.0": "output_blocks_2_1_transformer_blocks_0_attn1_to_out_0",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
    "up_blocks.1.resnets.0.conv1": "output_blocks_3_0_in_layers_2",
    "up_blocks.1.upsamplers.0.conv": "output_blocks_5_1_conv",
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_pipeline(tmp_path / "base")


def word(prefix: str, module: str) -> str:
    return prefix + module.replace(".", "_")


def lora(names: Mapping[str, tuple[int, ...]], seed: int = 3, alpha: float | None = 1.5) -> Tensors:
    """A pair and an alpha for each name, of which the shape of the weight is given."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in names.items():
        down, up = pair(shape, RANK, generator)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def merge(base: Path, tensors: Tensors, out: Path) -> Path:
    adapter = out.with_suffix(".safetensors")
    save_file({k: t.contiguous() for k, t in tensors.items()}, adapter, {"ss_network_dim": str(RANK)})
    inlay.run_plan(inlay.make_plan(base, [adapter]), out)
    assert inlay.verify(base, [adapter], out).exact
    return out


def check(
    base: Path, out: Path, expected: Mapping[str, Callable[[np.ndarray], np.ndarray]], dtype: str = "F32"
) -> None:
    """Every tensor is the base's, or what `expected` makes of it, rounded once. Keys are component/module."""
    touched = set()
    for component in sorted(p.name for p in base.iterdir() if any(p.glob("*.safetensors"))):
        before, after = read_component(base, component), read_component(out, component)
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            name = f"{component}/{key.removesuffix('.weight')}"
            if name not in expected:
                assert torch.equal(after[key], tensor), key
                continue
            weight = float64(tensor)
            exact = expected[name](weight)
            assert not np.array_equal(float64(after[key]), weight), key
            error = 4 * reach(exact, weight)
            assert correctly_rounded(float64(after[key]), exact, error, dtype).all(), key
            touched.add(name)
    assert touched == set(expected)


def adds(tensors: Tensors, name: str, scaling: float) -> Callable[[np.ndarray], np.ndarray]:
    up, down = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"]
    return lambda weight: weight + scaling * product(up, down).reshape(weight.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [1.5, None])
def test_underscored_names_reach_the_modules_that_are_written_so(
    tmp_path: Path, dtype: torch.dtype, alpha: float | None
) -> None:
    base = write_pipeline(tmp_path / "base", dtype, second=True)
    names = {word("lora_unet_", m): ("unet", m, unet_shapes()) for m in UNET}
    names |= {word("lora_te1_", m): ("text_encoder", m, text_shapes()) for m in TEXT}
    names |= {word("lora_te2_", m): ("text_encoder_2", m, text_shapes(width=12)) for m in TEXT[:1]}
    tensors = lora({n: shapes[m + ".weight"] for n, (_, m, shapes) in names.items()}, alpha=alpha)
    expected = {f"{c}/{m}": adds(tensors, n, 1.0 if alpha is None else 0.5) for n, (c, m, _) in names.items()}
    check(base, merge(base, tensors, tmp_path / "out"), expected, {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype])


def test_every_module_has_its_own_alpha_and_rank(base: Path, tmp_path: Path) -> None:
    shapes, generator = unet_shapes(), torch.Generator().manual_seed(1)
    tensors, expected = {}, {}
    for i, module in enumerate(UNET, 1):
        name = word("lora_unet_", module)
        down, up = pair(shapes[module + ".weight"], i, generator)
        alpha = torch.tensor(0.25 * i * i, dtype=torch.float16 if i % 2 else torch.float32)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
        expected[f"unet/{module}"] = adds(tensors, name, 0.25 * i)
    check(base, merge(base, tensors, tmp_path / "out"), expected)


@pytest.mark.parametrize("prefix", ["lora_te_", "lora_text_encoder_"])
def test_other_prefixes_of_the_text_encoder(base: Path, tmp_path: Path, prefix: str) -> None:
    name = word(prefix, TEXT[0])
    tensors = lora({name: (10, 10)})
    check(base, merge(base, tensors, tmp_path / "out"), {f"text_encoder/{TEXT[0]}": adds(tensors, name, 0.5)})


def test_an_encoder_stored_without_its_prefix(base: Path, tmp_path: Path) -> None:
    """CLIP's text_model. is not stored by every version of transformers; the trainers always write it."""
    file = base / "text_encoder" / "model.safetensors"
    save_file({key.removeprefix("text_model."): t for key, t in load_file(file).items()}, file)
    tensors = lora({(name := word("lora_te_", TEXT[0])): (10, 10)})
    expected = {f"text_encoder/{TEXT[0].removeprefix('text_model.')}": adds(tensors, name, 0.5)}
    check(base, merge(base, tensors, tmp_path / "kohya"), expected)
    same = {f"text_encoder.{TEXT[0]}.{x}.weight": tensors[f"{name}.{y}.weight"] for x, y in (
        ("lora_A", "lora_down"), ("lora_B", "lora_up"))} | {f"text_encoder.{TEXT[0]}.alpha": torch.tensor(1.5)}  # fmt: skip
    check(base, merge(base, same, tmp_path / "diffusers"), expected)


@pytest.mark.parametrize("conv", [True, False])
@pytest.mark.parametrize("kernel", [True, False])
def test_a_kernel_of_one_is_a_matrix(tmp_path: Path, conv: bool, kernel: bool) -> None:
    """proj_in is a 1 × 1 convolution in SD 1 and a Linear in SDXL, and is trained as either."""
    base, name = write_pipeline(tmp_path / "base", conv=conv), word("lora_unet_", UNET[0])
    tensors = lora({name: (INNER, INNER, 1, 1) if kernel else (INNER, INNER)})
    check(base, merge(base, tensors, tmp_path / "out"), {f"unet/{UNET[0]}": adds(tensors, name, 0.5)})


def test_a_convolution_of_the_pair_is_the_convolution_of_the_merged_weight(base: Path, tmp_path: Path) -> None:
    """What the adapter computes: up(down(x)), by torch's own convolutions."""
    module, name = "down_blocks.0.resnets.1.conv2", "lora_unet_down_blocks_0_resnets_1_conv2"
    tensors = lora({name: (8, 8, 3, 3)})
    out = merge(base, tensors, tmp_path / "out")
    before, after = (read_component(p, "unet")[module + ".weight"].double() for p in (base, out))
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    conv = torch.nn.functional.conv2d
    down, up = (tensors[f"{name}.lora_{way}.weight"].double() for way in ("down", "up"))
    wanted = conv(x, before, padding=1) + 0.5 * conv(conv(x, down, padding=1), up)
    assert torch.allclose(
        conv(x, after, padding=1), wanted, rtol=0, atol=1e-4
    )  # weights rounded to 2**-24 of themselves


def test_names_of_the_original_unet(base: Path, tmp_path: Path) -> None:
    shapes = unet_shapes()
    tensors = lora({"lora_unet_" + name: shapes[module + ".weight"] for module, name in SGM.items()})
    expected = {f"unet/{module}": adds(tensors, "lora_unet_" + name, 0.5) for module, name in SGM.items()}
    check(base, merge(base, tensors, tmp_path / "out"), expected)


def test_both_names_of_one_module_in_a_file_are_refused(base: Path, tmp_path: Path) -> None:
    names = ("lora_unet_down_blocks_1_attentions_0_proj_in", "lora_unet_input_blocks_4_1_proj_in")
    with pytest.raises(PlanError, match="the file holds it twice"):
        merge(base, lora(dict.fromkeys(names, (INNER, INNER))), tmp_path / "out")


# --- other methods ----------------------------------------------------------------------------------


def lycoris(shapes: Mapping[str, tuple[int, ...]], seed: int = 8) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("module", [UNET[2], "down_blocks.0.resnets.1.conv2", "down_blocks.1.resnets.0.conv_shortcut"])
def test_loha(base: Path, tmp_path: Path, module: str) -> None:
    name, shape = word("lora_unet_", module), unet_shapes()[module + ".weight"]
    inputs = int(np.prod(shape[1:]))
    tensors = lycoris(
        {f"{name}.hada_w{i}_a": (shape[0], RANK) for i in "12"} | {f"{name}.hada_w{i}_b": (RANK, inputs) for i in "12"}
    ) | {f"{name}.alpha": torch.tensor(2.0)}
    one, two = (float64(tensors[f"{name}.hada_w{i}_a"]) @ float64(tensors[f"{name}.hada_w{i}_b"]) for i in "12")
    out = merge(base, tensors, tmp_path / "out")
    check(base, out, {f"unet/{module}": lambda w: w + 2 / RANK * (one * two).reshape(w.shape)})


def test_loha_with_a_core(base: Path, tmp_path: Path) -> None:
    module, name = "down_blocks.0.resnets.1.conv2", "lora_unet_down_blocks_0_resnets_1_conv2"
    tensors = lycoris(
        {f"{name}.hada_w{i}_{x}": (RANK, 8) for i in "12" for x in "ab"}
        | {f"{name}.hada_t{i}": (RANK, RANK, 3, 3) for i in "12"}
    ) | {f"{name}.alpha": torch.tensor(2.0)}
    one, two = (
        np.einsum("ijkl,jr,ip->prkl", *(float64(tensors[f"{name}.hada_{x}"]) for x in (f"t{i}", f"w{i}_b", f"w{i}_a")))
        for i in "12"
    )
    out = merge(base, tensors, tmp_path / "out")
    check(base, out, {f"unet/{module}": lambda w: w + 2 / RANK * one * two})


@pytest.mark.parametrize("whole", [True, False])
def test_lokr(base: Path, tmp_path: Path, whole: bool) -> None:
    """Of two whole factors the scaling is 1, whatever the alpha: LyCORIS stores its rank there."""
    module = "down_blocks.0.resnets.1.conv2"
    name = word("lora_unet_", module)
    shapes = {f"{name}.lokr_w1": (2, 4)}
    shapes |= {f"{name}.lokr_w2": (4, 2, 3, 3)} if whole else {
        f"{name}.lokr_w2_a": (4, RANK), f"{name}.lokr_w2_b": (RANK, 2 * 9)
    }  # fmt: skip
    tensors = lycoris(shapes) | {f"{name}.alpha": torch.tensor(2.0)}
    one = float64(tensors[f"{name}.lokr_w1"])
    if whole:
        two = float64(tensors[f"{name}.lokr_w2"])
    else:
        two = (float64(tensors[f"{name}.lokr_w2_a"]) @ float64(tensors[f"{name}.lokr_w2_b"])).reshape(4, 2, 3, 3)
    kron = np.kron(one[:, :, None, None], two)
    out = merge(base, tensors, tmp_path / "out")
    check(base, out, {f"unet/{module}": lambda w: w + (1.0 if whole else 2 / RANK) * kron})


@pytest.mark.parametrize("module", ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q", UNET[2], UNET[4]])
def test_dora_with_a_length_for_each_output(base: Path, tmp_path: Path, module: str) -> None:
    name, shape = word("lora_unet_", module), unet_shapes()[module + ".weight"]
    tensors = lora({name: shape})
    scale = torch.rand(shape[0], *(1 for _ in shape[1:]), generator=torch.Generator().manual_seed(4)) + 0.5
    tensors[f"{name}.dora_scale"] = scale

    def formula(weight: np.ndarray) -> np.ndarray:
        sum_ = adds(tensors, name, 0.5)(weight)
        return np.asarray(float64(scale) * sum_ / np.sqrt((sum_**2).sum(tuple(range(1, sum_.ndim)), keepdims=True)))

    check(base, merge(base, tensors, tmp_path / "out"), {f"unet/{module}": formula})


def test_dora_with_a_length_for_each_input(base: Path, tmp_path: Path) -> None:
    """LyCORIS before wd_on_output; the matrix is square, and the shape of dora_scale tells."""
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    name = word("lora_unet_", module)
    tensors = lora({name: (INNER, INNER)})
    scale = tensors[f"{name}.dora_scale"] = torch.rand(1, INNER, generator=torch.Generator().manual_seed(4)) + 0.5

    def formula(weight: np.ndarray) -> np.ndarray:
        sum_ = adds(tensors, name, 0.5)(weight)
        return np.asarray(float64(scale) * sum_ / np.sqrt((sum_**2).sum(0, keepdims=True)))

    check(base, merge(base, tensors, tmp_path / "out"), {f"unet/{module}": formula})


def test_dora_on_some_modules_only(base: Path, tmp_path: Path) -> None:
    plain, other = (word("lora_unet_", m) for m in UNET[1:3])
    shapes = unet_shapes()
    tensors = lora({n: shapes[m + ".weight"] for n, m in zip((plain, other), UNET[1:3], strict=True)})
    scale = tensors[f"{other}.dora_scale"] = torch.rand(INNER, 1, generator=torch.Generator().manual_seed(4)) + 0.5

    def formula(weight: np.ndarray) -> np.ndarray:
        sum_ = adds(tensors, other, 0.5)(weight)
        return np.asarray(float64(scale) * sum_ / np.linalg.norm(sum_, axis=1, keepdims=True))

    out = merge(base, tensors, tmp_path / "out")
    check(base, out, {f"unet/{UNET[1]}": adds(tensors, plain, 0.5), f"unet/{UNET[2]}": formula})


# --- refusals ---------------------------------------------------------------------------------------

NAME = "lora_unet_down_blocks_0_resnets_1_conv2"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({f"{NAME}.lora_mid.weight": (RANK, RANK, 3, 3)}, r"lora_mid\.weight: a core between the pair"),
        ({f"{NAME}.diff": (8, 8, 3, 3)}, "diff: a whole delta"),
        ({"lora_unet_x.oft_blocks": (2, 2, 2)}, "oft_blocks: OFT in kohya's form"),
        ({"lora_unet_x.w_norm": (8,)}, "w_norm: a delta of a norm"),
        ({"lora_unet_x.strange": (8,)}, "strange: not known"),
        ({"bundle_emb.word.string_to_param.*": (2, 8)}, "bundle_emb"),
        ({"lora_unet_x.alpha": ()}, "has an alpha and nothing that it scales"),
        ({f"{NAME}.alpha": (2,)}, "alpha must be one number"),
        ({"lora_unet_x.hada_w1_a": (8, 2)}, "mixes LOHA, LORA modules"),
    ],
)
def test_what_is_not_merged_is_refused_by_name(
    tmp_path: Path, more: Mapping[str, tuple[int, ...]], message: str
) -> None:
    save_file({**lora({NAME: (8, 8, 3, 3)}), **lycoris(more)}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=message):
        inlay.read_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize("alpha", [0.0, float("nan"), float("inf")])
def test_an_alpha_that_is_no_strength_is_refused(tmp_path: Path, alpha: float) -> None:
    save_file(lora({NAME: (8, 8, 3, 3)}, alpha=alpha), tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="finite and not 0"):
        inlay.read_adapter(tmp_path / "a.safetensors")


def test_dora_over_the_inputs_of_a_convolution_is_refused(base: Path, tmp_path: Path) -> None:
    tensors = lora({"lora_unet_conv_in": (8, 4, 3, 3)})
    with pytest.raises(PlanError, match="over the inputs of a convolution"):
        merge(base, {**tensors, "lora_unet_conv_in.dora_scale": torch.ones(1, 4, 1, 1)}, tmp_path / "out")


def test_dora_on_loha_is_refused(tmp_path: Path) -> None:
    shapes = {f"{NAME}.hada_w{i}_{x}": (3, 3) for i in "12" for x in "ab"} | {f"{NAME}.dora_scale": (8, 1, 1, 1)}
    save_file(lycoris(shapes), tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="dora_scale on LOHA"):
        inlay.read_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", "converted this one from"),
        ("lora_unet_input_blocks_77_1_proj_in", "converted this one from"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", "is for text_encoder_2, which this pipeline does not have"),
        ("lora_prior_down_blocks_0", "is for lora_prior_down_blocks_0, which"),
        ("lora_unet_down_blocks_9_proj_in", "reaches nothing in the pipeline"),
    ],
)
def test_names_that_reach_nothing_are_problems(base: Path, tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        merge(base, lora({name: (8, 8)}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_ambiguous_name_is_not_guessed(base: Path, tmp_path: Path) -> None:
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    twice = {"mid_block.a.b.weight": torch.ones(8, 8), "mid_block.a_b.weight": torch.ones(8, 8)}
    save_file({**load_file(file), **twice}, file)
    with pytest.raises(PlanError, match="several modules of unet are written so"):
        merge(base, lora({"lora_unet_mid_block_a_b": (8, 8)}), tmp_path / "out")


def test_a_kernel_of_another_size_is_a_problem(base: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="do not fit the base's"):
        merge(base, lora({"lora_unet_conv_in": (8, 4, 1, 1)}), tmp_path / "out")


def test_an_adapter_of_zeros_is_warned_of(base: Path, tmp_path: Path) -> None:
    tensors = lora({NAME: (8, 8, 3, 3)})
    tensors[f"{NAME}.lora_up.weight"].zero_()
    save_file(tensors, tmp_path / "a.safetensors")
    assert any("zero everywhere" in w for w in inlay.make_plan(base, [tmp_path / "a.safetensors"]).warnings)

"""compressed-tensors: which group a module is of, and all that is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from inlay.codecs import compressed, compressed_config, compressed_pack
from test_codec_compressed import Golden, group, settings, stored, top

# What is wrong: the case, how it is changed, and what is said.
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("pack4", {"change": top(sparsity_config={"format": "sparse-24-bitmask"})}, "stored sparse .*sparse-24-bitmask"),
    ("pack4", {"change": top(transform_config={"config_groups": {"R1": {"type": "hadamard"}}})}, "transform_config rotates"),
    ("pack4", {"change": top(config_groups={})}, "has no config_groups"),
    ("pack4", {"change": top(ignore=["re:.*up_proj"])}, r"is quantised, but quantization_config.ignore has it \(re:"),
    ("pack4", {"change": top(config_groups={"W3A16": ["Linear"]})}, "config group W3A16 is no preset"),
    ("pack4", {"change": top(config_groups={"group_0": {"targets": ["Linear"]}})}, "group_0 quantises no weights"),
    ("pack4", {"change": top(config_groups={"a": {"targets": ["x"]}, "b": {"targets": ["y"]}})}, "no group .* targets it: x, y"),
    ("pack4", {"change": group(rotation="u")}, "fields of weights that are not known: rotation"),
    ("pack4", {"change": group(dynamic=True)}, "quantises weights dynamically"),
    ("pack4", {"change": group(num_bits=None)}, "has num_bits None"),
    ("pack4", {"change": group(strategy="token")}, "has weights of strategy token"),
    ("pack4", {"change": group(group_size=None)}, "strategy group and group_size None"),
    ("fp8-block", {"change": group(block_structure=None)}, "strategy block and block_structure None"),
    ("pack4", {"change": group(group_size=24)}, "a row has 64 values, which is no multiple of its group_size 24"),
    ("pack4", {"change": stored("marlin-24")}, "stored as weight_packed I32, which is pack-quantized, but .* format marlin-24"),
    ("pack4", {"change": group(num_bits=3)}, "packed with 3 bits, which compressed-tensors 0.17 and 0.20 lay out differently"),
    ("pack4", {"change": group(num_bits=1)}, "packed with 1 bits; 2, 4, 8 are read"),
    ("pack4", {"change": group(type="float", num_bits=8)}, "stored as I32, but its config group says float of 8 bits"),
    ("pack4", {"weight_packed": ("U8", (24, 32))}, "weight_packed is U8, not I32"),
    ("pack4", {"weight_shape": ("F32", (2,))}, "weight_shape is F32, not I64 or I32"),
    ("pack4", {"weight_packed": ("I32", (24, 9))}, r"weight_packed is \[24, 9\], but a weight \[24, 64\] of 4 bits has \[24, 8\]"),
    ("pack4", {"weight_scale": ("BF16", (24, 3))}, r"weight_scale is \[24, 3\], but strategy group makes \[24, 2\]"),
    ("pack4", {"weight_scale": ("F64", (24, 2))}, "weight_scale is F64; it is read as F32, BF16, F16"),
    ("pack4", {"drop": ("weight_scale",)}, "weight_scale is missing"),
    ("pack4", {"drop": ("weight_shape",)}, "weight_shape is missing"),
    ("pack4-asym", {"drop": ("weight_zero_point",)}, "is not symmetric, but has no weight_zero_point"),
    ("pack4-asym", {"weight_zero_point": ("I32", (2, 4))}, r"weight_zero_point is I32 \[2, 4\], not I32 \[3, 4\]"),
    ("pack4", {"weight_zero_point": ("I32", (3, 2))}, r"weight_zero_point is I32 \[3, 2\], not I8 \[24, 2\]"),
    ("pack4-order", {"drop": ("weight_g_idx",)}, "by activation order, but no weight_g_idx"),
    ("pack4-order", {"weight_g_idx": ("I32", (63,))}, r"weight_g_idx is I32 \[63\], not I32 \[64\]"),
    ("pack4-order", {"change": group(group_size=8), "weight_scale": ("F16", (8, 8))}, "does not put 8 columns into each of 8"),
    ("fp8-channel", {"change": group(symmetric=False)}, "float codes that are not symmetric"),
    ("fp8-channel", {"weight": ("F8_E4M3", (2, 12, 33))}, r"is \[2, 12, 33\]; a quantised weight is read as \(out, in\)"),
    ("fp8-channel", {"weight": ("F8_E5M2", (12, 33))}, "weight is F8_E5M2; compressed-tensors stores codes as I8 or F8_E4M3"),
    ("fp8-channel", {"weight_scale": ("BF16", (12,))}, r"weight_scale is \[12\], but strategy channel makes \[12, 1\]"),
    ("fp8-channel", {"change": stored("mxfp8-quantized")}, "weight_scale is BF16, but its format is mxfp8-quantized"),
    ("mxfp8", {"change": stored("float-quantized")}, "weight_scale is U8, but its format is float-quantized"),
    ("int8-channel", {"change": stored("float-quantized")}, "which is int-quantized or naive-quantized, but .* float-quantized"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), WRONG, ids=[w[2][:40] for w in WRONG])
def test_what_contradicts_is_refused(name, change, message):
    settings(Golden(name))
    with pytest.raises(ValueError, match=message):
        settings(Golden(name), **change)


def test_what_cannot_be_kept_or_made_is_refused():
    case = Golden("pack4-order-asym")
    made, parts = case.settings, case.parts
    with pytest.raises(ValueError, match="by weight_g_idx, which must be kept"):
        compressed_pack.encode(case.weight, made, 0, {})
    with pytest.raises(ValueError, match="weight_scale is to be kept without its companion"):
        compressed_pack.encode(case.weight, made, 0, {p: parts[p] for p in ("weight_scale", "weight_g_idx")})
    with pytest.raises(ValueError, match="is beyond F16, in which the checkpoint stores scales"):
        Golden("pack8").codec.encode(np.full((12, 32), 1e9, np.float32), Golden("pack8").settings, 0, {})
    for options, message in (
        ({"bits": 4}, "options that are not known: bits"),
        ({"scheme": "NVFP4"}, "scheme NVFP4 is not one that can be made here"),
    ):
        with pytest.raises(ValueError, match=message):
            compressed_pack.fresh((8, 128), options)
    with pytest.raises(ValueError, match="scheme W8A8 takes no group_size"):
        compressed.fresh((8, 128), {"scheme": "W8A8", "group_size": 64})


def groups(**targets):
    """A config with a group for each number of bits."""
    make = lambda bits, where: {"targets": where, "weights": {"num_bits": int(bits[1:]), "group_size": 8}}  # noqa: E731
    return {"config_groups": {bits: make(bits, where) for bits, where in targets.items()}}


@pytest.mark.parametrize(
    ("config", "module", "bits"),
    [
        (groups(b4=["Linear"]), "a.b", 4),
        (groups(b4=["re:other"]), "a.b", 4),  # the only group there is
        (groups(b4=["Linear"], b8=["re:.*down_proj"]), "a.down_proj", 8),
        (groups(b4=["Linear"], b8=["re:.*down_proj"]), "a.up_proj", 4),
        (groups(b4=["re:.*"], b8=["z.down_proj"]), "z.down_proj", 8),  # a name goes before a pattern
        (groups(b4=["re:a.d.*"], b8=["re:a.*"]), "a.down_proj", 8),  # "*" comes before "." in the alphabet
        (groups(b4=["re:down"], b8=["Linear"]), "a.down_proj", 8),  # a pattern is of the whole beginning
        (groups(b4=["Linear"], b8=["Embedding"]), "model.embed_tokens", 8),
        ({"compression_config": {"quantization_config": groups(b4=["Linear"])}}, "a.b", 4),
        ({"config_groups": {"w4a16": ["Linear"]}}, "a.b", 4),
        ({**groups(b4=["Linear"]), "sparsity_config": {"format": "dense"}, "transform_config": {}}, "a.b", 4),
    ],
)
def test_a_modules_group_is_that_of_the_library(config, module, bits):
    assert compressed_config.scheme(config, module)["weights"]["num_bits"] == bits

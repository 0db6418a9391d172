"""Broken and hostile input: one message that names the place, exit code 2, and not a byte written."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from build import (
    BF16,
    CONFIG,
    F32,
    PREFIX,
    adapter_config,
    adapter_tensors,
    base_tensors,
    listing,
    modules_of,
    raw_file,
    with_memory,
    within,
    write_adapter,
    write_base,
    write_json,
    write_model,
    write_tensors,
)
from inlay import make_plan, run_plan
from inlay.adapters.peft_config import NO_EFFECT, REFUSED, USED, parse_peft_config
from inlay.checkpoints.header import parse_header
from inlay.checkpoints.torch_bin import read_torch_bin
from inlay.cli.main import main
from inlay.errors import AdapterError, CheckpointError, InputError

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """`base` and `adapter`, which fit."""
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    return tmp_path


@pytest.fixture
def refused(place: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused; the message. By default: export to `out`."""

    def run(*mentions: str, argv: list[str] | None = None, seconds: float = 20) -> str:
        before = listing(place)
        capfd.readouterr()
        with within(seconds):
            code = main(argv or export(place))
        out, err = capfd.readouterr()
        assert code == 2, (code, out, err)
        assert out == ""
        assert "Traceback" not in err
        assert err.count("Error:") == 1, err
        for mention in mentions:
            assert mention in err, err
        assert listing(place) == before
        return err

    return run


def export(place: Path, *more: str, out: str | None = None) -> list[str]:
    words = ["export", "--model", str(place / "base"), "--adapters", str(place / "adapter"), "--merge_lora", "--quiet"]
    return [*words, "--output_dir", str(place / "out") if out is None else out, *more]


def test_the_material_of_these_tests_can_be_merged(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(export(place)) == 0
    assert capsys.readouterr() == ("", "")
    assert (place / "out" / "inlay.json").is_file()


# ─── files of weights ────────────────────────────────────────────────────────────────────────────────────────────────


def u8(start: int, end: int, **more: Any) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end], **more}


def f32(shape: list[Any], nbytes: int = 4) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, nbytes]}


BROKEN_FILES: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"\x02\0\0\0\0\0\0",
    "header length zero": raw_file("", b"rest"),
    "header length beyond the file": raw_file("{}", length=1000),
    "header length at the limit": raw_file("{}", length=100_000_000),
    "header length over the limit": raw_file("{}", length=100_000_001),
    "header length of 63 bits": raw_file("{}", length=2**63),
    "header length of all ones": raw_file("{}", length=2**64 - 1),
    "header not JSON": raw_file("not JSON at all"),
    "header cut": raw_file('{"a": {"dtype": "U8"'),
    "header not UTF-8": raw_file(b'{"\xff\xfe": 1}'),
    "header null": raw_file("null"),
    "header a number": raw_file("5"),
    "header a list": raw_file("[]"),
    "header a string": raw_file('"x"'),
    "deep list": raw_file("[" * 200_000),
    "deep list, closed": raw_file("[" * 100_000 + "]" * 100_000),
    "deep object": raw_file('{"a":' * 100_000 + "1" + "}" * 100_000),
    "deep shape": raw_file('{"a":{"dtype":"U8","data_offsets":[0,1],"shape":' + "[" * 900 + "]" * 900 + "}}", b"1"),
    "duplicate key": raw_file('{"a":' + json.dumps(u8(0, 1)) + ',"a":' + json.dumps(u8(0, 1)) + "}", b"1"),
    "duplicate member": raw_file('{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"),
    "entry null": raw_file({"a": None}),
    "entry a list": raw_file({"a": ["U8", [1], [0, 1]]}, b"1"),
    "no dtype": raw_file({"a": {"shape": [1], "data_offsets": [0, 1]}}, b"1"),
    "unknown member": raw_file({"a": u8(0, 1, more=1)}, b"1"),
    "dtype a number": raw_file({"a": u8(0, 1, dtype=8)}, b"1"),
    "dtype a list": raw_file({"a": u8(0, 1, dtype=["U8"])}, b"1"),
    "dtype unknown": raw_file({"a": u8(0, 1, dtype="U9")}, b"1"),
    "dtype in small letters": raw_file({"a": u8(0, 1, dtype="u8")}, b"1"),
    "shape null": raw_file({"a": u8(0, 1, shape=None)}, b"1"),
    "shape a number": raw_file({"a": u8(0, 1, shape=1)}, b"1"),
    "shape negative": raw_file({"a": f32([-1])}, b"1234"),
    "shape negative twice": raw_file({"a": f32([-1, -1])}, b"1234"),
    "shape a bool": raw_file({"a": f32([True])}, b"1234"),
    "shape a float": raw_file({"a": f32([1.0])}, b"1234"),
    "shape a string": raw_file({"a": f32(["1"])}, b"1234"),
    "shape NaN": raw_file({"a": f32([math.nan])}, b"1234"),
    "shape infinite": raw_file({"a": f32([math.inf])}, b"1234"),
    "shape of 64 bits": raw_file({"a": f32([2**64])}, b"1234"),
    "shape that overflows to the size": raw_file({"a": f32([2**32, 2**32, 1])}, b""),
    "shape beyond every float": raw_file({"a": f32([2**61] * 20)}, b"1234"),
    "shape with very many axes": raw_file({"a": f32([2**61] * 20_000)}, b"1234"),
    "shape of a very long number": raw_file(
        '{"a":{"dtype":"U8","shape":[' + "9" * 5000 + '],"data_offsets":[0,1]}}', b"1"
    ),
    "offsets null": raw_file({"a": u8(0, 1, data_offsets=None)}, b"1"),
    "one offset": raw_file({"a": u8(0, 1, data_offsets=[1])}, b"1"),
    "three offsets": raw_file({"a": u8(0, 1, data_offsets=[0, 1, 1])}, b"1"),
    "offsets negative": raw_file({"a": u8(0, 1, data_offsets=[-1, 0])}, b"1"),
    "offsets reversed": raw_file({"a": u8(0, 1, data_offsets=[1, 0])}, b"1"),
    "offsets bool": raw_file({"a": u8(0, 1, data_offsets=[False, True])}, b"1"),
    "offsets float": raw_file({"a": u8(0, 1, data_offsets=[0.0, 1.0])}, b"1"),
    "offsets beyond the file": raw_file({"a": u8(0, 100)}, b"1"),
    "offsets far beyond the file": raw_file({"a": u8(0, 2**61)}, b"1"),
    "size and shape disagree": raw_file({"a": f32([2])}, b"1234"),
    "overlap": raw_file({"a": u8(0, 4), "b": u8(2, 6)}, b"123456"),
    "same span twice": raw_file({"a": u8(0, 4), "b": u8(0, 4)}, b"1234"),
    "hole at the start": raw_file({"a": u8(1, 4)}, b"1234"),
    "hole in the middle": raw_file({"a": u8(0, 1), "b": u8(2, 4)}, b"1234"),
    "trailing byte": raw_file({"a": u8(0, 4)}, b"12345"),
    "last byte missing": raw_file({"a": u8(0, 4)}, b"123"),
    "metadata a list": raw_file({"__metadata__": []}),
    "metadata of numbers": raw_file({"__metadata__": {"a": 1}}),
    "metadata nested": raw_file({"__metadata__": {"a": {}}}),
    "key that is half a character": raw_file('{"\\ud800":' + json.dumps(u8(0, 1)) + "}", b"1"),
    "Git-LFS pointer": LFS,
    "an error page": HTML,
    "zeros": bytes(4096),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_a_broken_base_file_is_refused_by_name(place: Path, refused: Callable[..., str], case: str) -> None:
    (place / "base" / "model.safetensors").write_bytes(BROKEN_FILES[case])
    refused("CheckpointError:", "model.safetensors")


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_a_broken_adapter_file_is_refused_by_name(place: Path, refused: Callable[..., str], case: str) -> None:
    (place / "adapter" / "adapter_model.safetensors").write_bytes(BROKEN_FILES[case])
    refused("AdapterError:", "adapter_model.safetensors")


@pytest.mark.parametrize("case", ["duplicate key", "overlap", "shape negative", "dtype unknown", "hole in the middle"])
def test_the_message_names_the_tensor(place: Path, refused: Callable[..., str], case: str) -> None:
    (place / "base" / "model.safetensors").write_bytes(BROKEN_FILES[case])
    message = refused()
    assert "'a'" in message or "'b'" in message


def test_a_pointer_of_git_lfs_says_how_to_fetch_the_file(place: Path, refused: Callable[..., str]) -> None:
    for path in (place / "base" / "model.safetensors", place / "base" / "config.json"):
        before = path.read_bytes()
        path.write_bytes(LFS)
        refused("git lfs pull", path.name)
        path.write_bytes(before)


@pytest.mark.parametrize("nbytes", [1, 8, 100, 1000, -1])
def test_a_file_cut_anywhere_is_refused(place: Path, refused: Callable[..., str], nbytes: int) -> None:
    path = place / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:nbytes])
    refused("model.safetensors")


def test_a_header_of_absurd_shapes_is_refused_at_once(place: Path, refused: Callable[..., str]) -> None:
    """A million axes of 2^61: the product alone would take hours and gigabytes."""
    shape = "[" + ",".join(["2305843009213693952"] * 400_000) + "]"
    file = raw_file('{"a":{"dtype":"U8","shape":' + shape + ',"data_offsets":[0,1]}}', b"1")
    (place / "base" / "model.safetensors").write_bytes(file)
    refused("model.safetensors", seconds=10)


# ─── the index ───────────────────────────────────────────────────────────────────────────────────────────────────────

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(place: Path) -> Path:
    shutil.rmtree(place / "base")
    return write_base(place / "base", shards=2)


def edit_index(base: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads((base / INDEX).read_text())
    changed = change(value)
    write_json(base / INDEX, value if changed is None else changed)


OUTSIDE = [
    "../secret.safetensors",
    "a/../../secret.safetensors",
    "/etc/passwd",
    "..",
    "..\\secret.safetensors",
    "",
    "a\0b",
]


@pytest.mark.parametrize("file", OUTSIDE)
def test_an_index_that_names_files_outside_its_directory_is_refused(
    place: Path, sharded: Path, refused: Callable[..., str], file: str
) -> None:
    write_tensors(place / "secret.safetensors", {"model.norm.weight": np.zeros(4, np.float32)})
    edit_index(sharded, lambda index: index["weight_map"].update({"model.norm.weight": file}))
    refused(INDEX, "outside its directory")


BAD_INDEXES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no weight_map": lambda index: index.pop("weight_map") and None,
    "weight_map empty": lambda index: index.update(weight_map={}),
    "weight_map a list": lambda index: index.update(weight_map=[["a", "b"]]),
    "weight_map null": lambda index: index.update(weight_map=None),
    "weight_map of numbers": lambda index: index.update(weight_map={"a": 1}),
    "weight_map of lists": lambda index: index.update(weight_map={"a": ["model-00001-of-00002.safetensors"]}),
    "a list": lambda index: [index],
    "not JSON": lambda index: "{",
    "empty file": lambda index: " ",
    "deep": lambda index: "[" * 100_000,
    "NUL": lambda index: "\0",
    "metadata a list": lambda index: index.update(metadata=["total_size"]),
    "metadata a string": lambda index: index.update(metadata="total_size"),
    "metadata a number": lambda index: index.update(metadata=5),
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_an_index_of_the_wrong_form_is_refused_by_name(sharded: Path, refused: Callable[..., str], case: str) -> None:
    edit_index(sharded, BAD_INDEXES[case])
    refused("CheckpointError:", INDEX)


def test_missing_shards_are_named(sharded: Path, refused: Callable[..., str]) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    refused(INDEX, "1 of 2", "model-00002-of-00002.safetensors")


def test_a_shard_that_is_a_directory_is_missing(sharded: Path, refused: Callable[..., str]) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    (sharded / "model-00002-of-00002.safetensors").mkdir()
    refused(INDEX, "model-00002-of-00002.safetensors")


def test_a_key_in_another_shard_than_the_index_says_is_refused(sharded: Path, refused: Callable[..., str]) -> None:
    edit_index(
        sharded, lambda index: index["weight_map"].update({"lm_head.weight": "model-00001-of-00002.safetensors"})
    )
    refused(INDEX, "lm_head.weight", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def test_a_key_in_no_shard_is_refused(sharded: Path, refused: Callable[..., str]) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update({"model.extra": "model-00001-of-00002.safetensors"}))
    refused(INDEX, "model.extra", "in no shard")


def test_a_key_in_two_shards_is_refused(sharded: Path, refused: Callable[..., str]) -> None:
    shutil.copy(sharded / "model-00002-of-00002.safetensors", sharded / "model-00001-of-00002.safetensors")
    refused(INDEX, "two shards", "lm_head.weight")


def test_an_index_that_names_a_file_of_no_weights_is_refused(sharded: Path, refused: Callable[..., str]) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update({"model.extra": "config.json"}))
    refused("config.json")


# ─── config.json and adapter_config.json ─────────────────────────────────────────────────────────────────────────────

NOT_AN_OBJECT: dict[str, bytes] = {
    "empty": b"",
    "not JSON": b"{'a': 1}",
    "cut": b'{"a": ',
    "a list": b"[]",
    "null": b"null",
    "a string": b'"LORA"',
    "deep": b"[" * 100_000,
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "NUL": b"\0" * 100,
    "number too long": b'{"a": ' + b"9" * 5000 + b"}",
    "Git-LFS pointer": LFS,
}


@pytest.mark.parametrize("case", NOT_AN_OBJECT)
@pytest.mark.parametrize("file", ["base/config.json", "adapter/adapter_config.json"])
def test_a_config_that_is_no_json_object_is_refused_by_name(
    place: Path, refused: Callable[..., str], file: str, case: str
) -> None:
    (place / file).write_bytes(NOT_AN_OBJECT[case])
    refused(file)


@pytest.mark.parametrize("file", ["adapter/args.json", "adapter/inlay_base.json"])
@pytest.mark.parametrize("case", ["not JSON", "a list", "deep"])
def test_a_broken_record_beside_the_adapter_is_refused_by_name(
    place: Path, refused: Callable[..., str], file: str, case: str
) -> None:
    (place / file).write_bytes(NOT_AN_OBJECT[case])
    refused(file)


WRONG_TYPES: list[tuple[str, Any]] = [
    ("peft_type", None), ("peft_type", "PSOFT"), ("peft_type", ["LORA"]), ("peft_type", 1),
    ("r", 0), ("r", -1), ("r", 4.0), ("r", "4"), ("r", True), ("r", [4]), ("r", 10**400),
    ("lora_alpha", "8"), ("lora_alpha", True), ("lora_alpha", [8]), ("lora_alpha", {"a": 1}), ("lora_alpha", 10**400),
    ("use_rslora", "true"), ("use_rslora", 1), ("use_dora", "false"), ("use_dora", 1), ("fan_in_fan_out", "no"),
    ("bias", "some"), ("bias", True), ("bias", ["none"]), ("lora_bias", "yes"),
    ("modules_to_save", 5), ("modules_to_save", [5]), ("modules_to_save", {"a": 1}),
    ("rank_pattern", ["q_proj"]), ("rank_pattern", {"q_proj": "4"}), ("rank_pattern", {"q_proj": 0}),
    ("rank_pattern", {"q_proj": True}), ("rank_pattern", {"q_proj": None}), ("rank_pattern", {"q_proj": 10**400}),
    ("alpha_pattern", "q_proj"), ("alpha_pattern", {"q_proj": "8"}), ("alpha_pattern", {"q_proj": [8]}),
    ("alpha_pattern", {"q_proj": 10**400}),
    ("trainable_token_indices", "1"), ("trainable_token_indices", {"embed_tokens": 1}),
    ("trainable_token_indices", {"embed_tokens": [-1]}), ("trainable_token_indices", {"embed_tokens": [1, 1]}),
    ("trainable_token_indices", [1.0]), ("ensure_weight_tying", "true"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES, ids=lambda v: str(v)[:30])
def test_a_field_of_the_wrong_type_is_refused_by_name(
    place: Path, refused: Callable[..., str], name: str, value: Any
) -> None:
    write_adapter(place / "adapter", config={**adapter_config(), name: value})
    refused(name.replace("_pattern", "") if value == {"q_proj": 10**400} else name)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_an_alpha_that_is_no_number_is_refused(place: Path, refused: Callable[..., str], value: str) -> None:
    config = json.dumps(adapter_config()).replace('"lora_alpha": 8', f'"lora_alpha": {value}')
    (place / "adapter" / "adapter_config.json").write_text(config)
    refused("lora_alpha", "adapter_config.json")


@pytest.mark.parametrize("value", [True, 1, "x", [1], {"a": None}, 0, 0.5])
def test_an_unknown_field_that_is_set_is_refused_by_name(place: Path, refused: Callable[..., str], value: Any) -> None:
    write_adapter(place / "adapter", use_novel_method=value)
    refused("use_novel_method", "adapter_config.json")


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unknown_field_that_is_empty_changes_nothing(place: Path, value: Any) -> None:
    plain = make_plan(place / "base", [write_adapter(place / "adapter")])
    known = make_plan(place / "base", [write_adapter(place / "other" / "adapter", use_novel_method=value)])
    assert plain.shards == known.shards


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_setting_that_no_merge_can_honour_is_refused_by_name(
    place: Path, refused: Callable[..., str], name: str
) -> None:
    write_adapter(place / "adapter", **{name: [[0, 4]]})
    refused(name)


def test_all_reasons_are_given_at_once(place: Path, refused: Callable[..., str]) -> None:
    write_adapter(place / "adapter", arrow_config={"top_k": 1}, layer_replication=[[0, 4]], use_novel_method=1)
    refused("arrow_config", "layer_replication", "use_novel_method")


@pytest.mark.parametrize("init", ["pissa_niter_4", "PiSSA_niter_2", "corda", "loftq", "lora_ga"])
def test_an_adapter_of_a_shifted_base_is_refused(place: Path, refused: Callable[..., str], init: str) -> None:
    write_adapter(place / "adapter", init_lora_weights=init)
    refused("init_lora_weights", init)


# ─── patterns ────────────────────────────────────────────────────────────────────────────────────────────────────────

CATASTROPHIC = [r"(a+)+b", r"(a|a)*b", r"(a|aa)+b", r"(.*a){25}b", r"((a*)*)*b", r"(a+)+\1b"]


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", CATASTROPHIC)
def test_a_catastrophic_pattern_ends_within_seconds(place: Path, field: str, pattern: str) -> None:
    module = "a" * 60
    write_model(place / "base", {f"{module}.weight": np.zeros((4, 4), np.float32)})
    adapter = write_adapter(place / "adapter", {module: (4, 4)}, **{field: {pattern: 4}})
    with within(10):
        try:
            make_plan(place / "base", [adapter])
        except AdapterError as error:
            assert pattern in str(error)


def test_a_slow_pattern_takes_seconds_for_all_modules_together(place: Path) -> None:
    """A pattern that stays just under the limit for each name must not add up over a model of many layers."""
    import regex

    length, seconds = 16, 0.0
    while seconds < 0.25 and length < 64:
        length += 1
        started = time.perf_counter()
        try:
            regex.match(r"(.*\.)?((a|aa|aaa)+b)$", "a" * length, timeout=5)
        except TimeoutError:
            break
        seconds = time.perf_counter() - started
    modules = {f"m{i}." + "a" * length: (4, 4) for i in range(24)}
    write_model(place / "base", {f"{module}.weight": np.zeros((4, 4), np.float32) for module in modules})
    adapter = write_adapter(place / "adapter", modules, rank_pattern={"(a|aa|aaa)+b": 4})
    with within(8):
        try:
            make_plan(place / "base", [adapter])
        except AdapterError as error:
            assert "rank_pattern" in str(error)


@pytest.mark.parametrize("pattern", ["(", "[", "*", "(?P<", "a{2,1}", "\\"])
def test_a_pattern_that_is_no_regular_expression_is_refused_by_name(
    place: Path, refused: Callable[..., str], pattern: str
) -> None:
    write_adapter(place / "adapter", rank_pattern={pattern: 4})
    refused("rank_pattern", repr(pattern))


# ─── adapters that do not fit ────────────────────────────────────────────────────────────────────────────────────────


def test_an_adapter_for_another_model_is_refused_with_every_module(place: Path, refused: Callable[..., str]) -> None:
    write_adapter(place / "adapter", {f"transformer.h.{i}.attn.c_attn": (48, 16) for i in range(3)})
    message = refused("3 problems", "nothing was written")
    for i in range(3):
        assert f"transformer.h.{i}.attn.c_attn" in message


def test_an_adapter_of_another_width_is_refused_with_both_shapes(place: Path, refused: Callable[..., str]) -> None:
    write_adapter(place / "adapter", {"model.layers.0.self_attn.q_proj": (32, 32)})
    refused("model.layers.0.self_attn.q_proj", "(32, 32)", "(16, 16)")


def test_one_layer_too_many_is_refused_by_name(place: Path, refused: Callable[..., str]) -> None:
    write_adapter(place / "adapter", modules_of(layers=3))
    message = refused("model.layers.2.self_attn.q_proj", "2 problems")
    assert "model.layers.1" not in message


def test_the_rank_of_the_file_must_be_that_of_the_config(place: Path, refused: Callable[..., str]) -> None:
    write_adapter(place / "adapter", r=4, config=adapter_config(r=8))
    refused("rank 4 in the file, 8 in the config")


def test_half_a_pair_is_refused_by_name(place: Path, refused: Callable[..., str]) -> None:
    tensors = adapter_tensors(modules_of())
    del tensors[f"{PREFIX}model.layers.1.mlp.down_proj.lora_B.weight"]
    write_adapter(place / "adapter", tensors=tensors)
    refused("model.layers.1.mlp.down_proj", "lora_B")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_an_adapter_with_nan_or_inf_is_refused_by_tensor(
    place: Path, refused: Callable[..., str], value: float, dtype: np.dtype
) -> None:
    tensors = adapter_tensors(modules_of(), dtype=dtype)
    key = f"{PREFIX}model.layers.1.mlp.down_proj.lora_B.weight"
    tensors[key][-1, -1] = value
    write_adapter(place / "adapter", tensors=tensors)
    refused(key, "NaN or Inf")


def test_a_result_out_of_range_is_refused_by_tensor(place: Path, refused: Callable[..., str]) -> None:
    write_adapter(place / "adapter", size=1e5)
    refused("model.layers.0.self_attn.q_proj.weight", argv=export(place, "--torch_dtype", "float16"))


def test_a_result_out_of_range_leaves_no_folder_above_the_destination(place: Path, refused: Callable[..., str]) -> None:
    write_adapter(place / "adapter", size=1e5)
    refused(argv=export(place, "--torch_dtype", "float16", out=str(place / "a" / "b" / "out")))


def test_a_token_index_far_beyond_the_vocabulary_is_refused_at_once(place: Path, refused: Callable[..., str]) -> None:
    tensors = {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": np.zeros((1, 16), np.float32)}
    write_adapter(place / "adapter", tensors=tensors, trainable_token_indices={"embed_tokens": [20_000_000]})
    refused("model.embed_tokens.weight", "20000000", seconds=2)


def test_an_adapter_of_integers_is_refused_by_module(place: Path, refused: Callable[..., str]) -> None:
    tensors = {key: np.ones(a.shape, np.int32) for key, a in adapter_tensors(modules_of()).items()}
    write_adapter(place / "adapter", tensors=tensors)
    refused("model.layers.0.self_attn.q_proj", "I32")


def test_an_adapter_with_no_tensors_is_refused(place: Path, refused: Callable[..., str]) -> None:
    write_adapter(place / "adapter", tensors={})
    refused("no tensors")


def test_base_and_adapter_taken_for_each_other_is_said(place: Path, refused: Callable[..., str]) -> None:
    base, adapter = str(place / "base"), str(place / "adapter")
    out = ["--merge_lora", "--output_dir", str(place / "out")]
    refused("this is a model", "--model", argv=["export", "--model", base, "--adapters", base, *out])
    refused("this is an adapter", "--adapters", argv=["export", "--model", adapter, "--adapters", adapter, *out])


@pytest.mark.parametrize(
    "file", ["adapter/adapter_model.safetensors", "base/model.safetensors", "adapter/adapter_config.json"]
)
def test_a_file_that_is_not_there_is_named(place: Path, refused: Callable[..., str], file: str) -> None:
    (place / file).unlink()
    refused(Path(file).name)


# ─── the destination ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_destination_may_not_be_an_input(place: Path, refused: Callable[..., str]) -> None:
    for name in ("base", "adapter"):
        for spelling in (name, f"{name}/", f"./{name}", f"base/../{name}"):
            refused("itself", argv=export(place, "--exist_ok", out=f"{place}/{spelling}"))


def test_the_destination_may_not_lie_inside_an_input(place: Path, refused: Callable[..., str]) -> None:
    for name in ("base", "adapter"):
        refused("lies inside", argv=export(place, out=str(place / name / "merged")))
        refused("lies inside", argv=export(place, out=str(place / name / "a" / "b")))


def test_the_destination_may_not_contain_an_input(place: Path, refused: Callable[..., str]) -> None:
    refused("contains", argv=export(place, "--exist_ok", out=str(place)))
    refused("contains", argv=export(place, "--exist_ok", out="/"))


def test_a_link_does_not_hide_an_input(place: Path, refused: Callable[..., str]) -> None:
    (place / "link").symlink_to("base")
    refused("itself", argv=export(place, "--exist_ok", out=str(place / "link")))
    refused("lies inside", argv=export(place, out=str(place / "link" / "merged")))


def test_an_existing_destination_is_refused_without_exist_ok(place: Path, refused: Callable[..., str]) -> None:
    write_base(place / "out", seed=9)
    refused("exists", "--exist_ok", argv=export(place))
    refused("exists", argv=export(place, "--exist_ok", "false"))


@pytest.mark.parametrize("exist_ok", ["true", "false"])
def test_a_directory_that_is_no_model_is_never_replaced(
    place: Path, refused: Callable[..., str], exist_ok: str
) -> None:
    (place / "out").mkdir()
    (place / "out" / "thesis.tex").write_text("years of work")
    refused("exists", argv=export(place, "--exist_ok", exist_ok))


def test_an_empty_directory_is_taken_with_exist_ok(place: Path) -> None:
    (place / "out").mkdir()
    assert main(export(place, "--exist_ok")) == 0
    assert (place / "out" / "inlay.json").is_file()


@pytest.mark.parametrize("exist_ok", ["true", "false"])
def test_a_file_is_never_replaced(place: Path, refused: Callable[..., str], exist_ok: str) -> None:
    (place / "out").write_text("a file")
    refused("exists", argv=export(place, "--exist_ok", exist_ok))


def test_a_destination_below_a_file_is_refused(place: Path, refused: Callable[..., str]) -> None:
    (place / "file").write_text("a file")
    refused("not a directory", argv=export(place, out=str(place / "file" / "out")))


def test_a_dangling_link_is_refused(place: Path, refused: Callable[..., str]) -> None:
    (place / "out").symlink_to(place / "nowhere")
    refused("exists")


def test_a_link_to_itself_is_refused(place: Path, refused: Callable[..., str]) -> None:
    (place / "out").symlink_to(place / "out")
    refused("out")


@pytest.mark.parametrize("length", [240, 255, 300, 5000])
def test_a_name_too_long_for_the_file_system_is_refused(place: Path, refused: Callable[..., str], length: int) -> None:
    refused("too long", argv=export(place, out=str(place / ("x" * length))))


@pytest.mark.parametrize("option", ["--model", "--adapters"])
def test_an_input_name_too_long_for_the_file_system_is_refused(
    place: Path, refused: Callable[..., str], option: str
) -> None:
    refused("x" * 40, argv=export(place, option, str(place / ("x" * 300))))


def test_a_full_disk_is_noticed_before_a_byte_is_written(
    place: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage(place)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=5000))
    refused("5,000 free", "needed")


def test_a_folder_that_cannot_be_written_is_refused(
    place: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdir(path: Any, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", mkdir)
        refused("OutputError:", "Permission denied", str(place))


def test_a_folder_without_permission_is_refused(
    place: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode, **_: not mode & os.W_OK)
    refused("cannot be written", str(place))


# ─── anything at all ─────────────────────────────────────────────────────────────────────────────────────────────────

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(10**300, 10**320) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
# Values that fields really have, so that more than the first check is reached.
likely = st.sampled_from(
    ["LORA", "none", "all", "q_proj", "SEQ_CLS", "embed_tokens", 4, 8, True, ["q_proj"], {"q_proj": 4}]
)
config_values = likely | json_values
quick = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@quick
@given(st.dictionaries(st.sampled_from(sorted(USED | NO_EFFECT | REFUSED.keys())) | st.text(max_size=5), config_values))
def test_only_adapter_errors_leave_the_config_reader(raw: dict[str, Any]) -> None:
    try:
        config = parse_peft_config({"peft_type": "LORA", **raw}, Path("adapter_config.json"))
        assert config.scaling("model.layers.0.self_attn.q_proj") is not None
    except AdapterError as error:
        assert str(error)


@pytest.fixture(scope="module")
def fitting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base with an embedding LoRA, so that vocabulary, ties and tasks are looked at."""
    place = tmp_path_factory.mktemp("fitting")
    write_base(place / "base", tied=True, layers=1)
    tensors = adapter_tensors(modules_of(layers=1))
    rng = np.random.default_rng(0)
    tensors[f"{PREFIX}model.embed_tokens.lora_embedding_A"] = rng.standard_normal((4, 32)).astype(np.float32)
    tensors[f"{PREFIX}model.embed_tokens.lora_embedding_B"] = rng.standard_normal((16, 4)).astype(np.float32)
    write_adapter(place / "adapter", tensors=tensors)
    return place


FIELDS_READ = ["architectures", "model_type", "vocab_size", "tie_word_embeddings", "torch_dtype", "dtype", "text_config",
               "llm_config", "quantization_config", "is_encoder_decoder", "id2label", "hidden_size"]  # fmt: skip


@quick
@given(st.dictionaries(st.sampled_from(FIELDS_READ), config_values, min_size=1))
def test_only_input_errors_come_of_any_config_json(fitting: Path, changes: dict[str, Any]) -> None:
    write_json(fitting / "base" / "config.json", {**CONFIG, **changes})
    try:
        make_plan(fitting / "base", [fitting / "adapter"], torch_dtype="float32")
    except InputError as error:
        assert str(error)


@quick
@given(st.dictionaries(st.sampled_from(["task_type", "base_model_name_or_path", "target_modules", "modules_to_save",
       "trainable_token_indices", "alpha_pattern", "peft_version", "bias", "r", "lora_alpha"]), config_values))  # fmt: skip
def test_only_input_errors_come_of_any_adapter_config(fitting: Path, changes: dict[str, Any]) -> None:
    write_json(fitting / "base" / "config.json", CONFIG)
    raw = {**adapter_config(), **changes}
    config = fitting / "adapter" / "adapter_config.json"
    before = config.read_text()
    try:
        write_json(config, raw)
        make_plan(fitting / "base", [fitting / "adapter"])
    except InputError as error:
        assert str(error)
    finally:
        config.write_text(before)


@quick
@given(st.dictionaries(st.sampled_from(["format", "headers", "tensors"]), json_values))
def test_only_input_errors_come_of_any_record_of_the_base(fitting: Path, record: dict[str, Any]) -> None:
    write_json(fitting / "base" / "config.json", CONFIG)
    path = write_json(fitting / "adapter" / "inlay_base.json", record)
    try:
        make_plan(fitting / "base", [fitting / "adapter"])
    except InputError as error:
        assert str(error)
    finally:
        path.unlink()


@pytest.mark.parametrize("record", [{"tensors": []}, {"tensors": 5}, {"tensors": None}, {"headers": 5}, {"format": 99}])
def test_a_record_of_the_base_in_another_form_is_refused(
    place: Path, refused: Callable[..., str], record: dict[str, Any]
) -> None:
    write_json(place / "adapter" / "inlay_base.json", record)
    refused("adapter")


@quick
@given(st.binary(max_size=80), st.integers(0, 200))
def test_only_checkpoint_errors_leave_the_header_parser(junk: bytes, more: int) -> None:
    raw = struct.pack("<Q", len(junk)) + junk
    try:
        parse_header(raw, len(raw) + more, "there")
    except CheckpointError as error:
        assert "there" in str(error)


entry_values = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F4", "U8", "X"]) | json_values,
        "shape": st.lists(st.integers(0, 2**62) | json_values, max_size=40) | json_values,
        "data_offsets": st.lists(st.integers(0, 20) | json_values, min_size=2, max_size=2) | json_values,
    },
)


@quick
@given(st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), entry_values | json_values, max_size=3))
def test_only_checkpoint_errors_leave_the_header_parser_for_json(header: dict[str, Any]) -> None:
    raw = raw_file(header)
    try:
        parse_header(raw, len(raw) + 8, "there")
    except CheckpointError as error:
        assert "there" in str(error)


@quick
@given(
    st.binary(max_size=60),
    st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."]),
)
def test_only_checkpoint_errors_leave_the_bin_reader(tmp_path: Path, junk: bytes, start: bytes) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(start + junk)
    try:
        with with_memory(1 << 30):
            read_torch_bin(path)
    except CheckpointError as error:
        assert "pytorch_model.bin" in str(error)


# ─── at random ───────────────────────────────────────────────────────────────────────────────────────────────────────

INTERESTING = [b"\0", b"\xff", b"-", b"9" * 30, b"null", b"true", b"[]", b"{}", b'"', b"1e999", b"[" * 50, b"NaN", b"\\ud800",
               b"\x80\x02", b"R", b"b", b"\0" * 8, b"\xff" * 8]  # fmt: skip


def mutated(pick: random.Random, content: bytes) -> bytes:
    """A file with one to three random edits, most of them near its start, where headers are."""
    for _ in range(pick.choice([1, 1, 1, 2, 3])):
        at = min(
            len(content), int(pick.expovariate(1 / 200)) if pick.random() < 0.7 else pick.randrange(len(content) + 1)
        )
        kind = pick.randrange(6)
        if kind == 0:
            content = content[:at] + bytes([pick.randrange(256)]) + content[at + 1 :]
        elif kind == 1:
            content = content[:at] + content[at + pick.randrange(1, 9) :]
        elif kind == 2:
            content = content[:at] + pick.choice(INTERESTING) + content[at:]
        elif kind == 3:
            content = content[:at]
        elif kind == 4:
            end = at + pick.randrange(1, 40)
            content = content[:at] + content[at:end] * 2 + content[end:]
        elif content:
            flipped = bytearray(content)
            flipped[min(at, len(content) - 1)] ^= 1 << pick.randrange(8)
            content = bytes(flipped)
    return content


def _everything(place: Path) -> list[Path]:
    """A sharded base, an adapter, a base and an adapter as `.bin`, and a merged directory; their files."""
    torch = pytest.importorskip("torch")
    write_base(place / "base", shards=2, layers=1)
    write_adapter(place / "adapter", modules_of(layers=1))
    plan = make_plan(place / "base", [place / "adapter"])
    run_plan(plan, place / "merged")
    state = {key: torch.from_numpy(a.astype(np.float32)) for key, a in base_tensors(layers=1).items()}
    for name, zipped in (("zip", True), ("legacy", False)):
        write_json(place / name / "config.json", CONFIG)
        torch.save(state, place / name / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    pair = {key: torch.from_numpy(a) for key, a in adapter_tensors(modules_of(layers=1)).items()}
    write_json(place / "adapter_bin" / "adapter_config.json", adapter_config())
    torch.save(pair, place / "adapter_bin" / "adapter_model.bin")
    return [path for path in sorted(place.rglob("*")) if path.is_file()]


def _commands(place: Path, path: Path, out: Path) -> list[list[str]]:
    """Commands that read `path`."""
    folder = path.relative_to(place).parts[0]
    base = str(place / (folder if folder in ("zip", "legacy") else "base"))
    adapter = str(place / (folder if folder.startswith("adapter") else "adapter"))
    inputs = ["--model", base, "--adapters", adapter]
    commands = [["inspect", str(place / folder)]]
    if folder == "merged":
        commands.append(["verify", *inputs, "--merged", str(place / "merged")])
    else:
        commands.append(["export", *inputs, "--merge_lora", "--quiet", "--output_dir", str(out)])
    return commands


@pytest.mark.slow
def test_random_changes_of_any_file_end_in_a_result_or_one_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A minute of it. Whatever a file becomes: no traceback, no hang, nothing left behind, no result that is not whole."""
    files = _everything(tmp_path / "in")
    seed = random.randrange(2**32)
    pick = random.Random(seed)
    failures: dict[str, str] = {}
    end, rounds = time.monotonic() + 60, 0
    while time.monotonic() < end:
        path = pick.choice(files)
        content = path.read_bytes()
        changed = mutated(pick, content)
        path.write_bytes(changed)
        for command in _commands(tmp_path / "in", path, tmp_path / "out"):
            try:
                _ends_well(command, tmp_path, capfd)
            except Exception as error:  # every kind once, with what makes it
                kind = f"{type(error).__name__}{_where(error)}"
                failures.setdefault(
                    kind, f"{command[0]} with {_change(path.relative_to(tmp_path), content, changed)}: {error!s:.200}"
                )
        path.write_bytes(content)
        rounds += 1
    assert rounds > 100
    assert not failures, f"seed {seed}, {rounds} rounds:\n" + "\n".join(f"{k}: {v}" for k, v in failures.items())


def _ends_well(command: list[str], place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = place / "out"
    try:
        with within(30), with_memory(2 << 30):
            code = main(command)
        stderr = capfd.readouterr().err
        assert code in (0, 1, 2), code
        assert code == 0 or command[0] == "verify" or stderr.count("Error:") == 1, stderr
        assert out.exists() == (code == 0 and command[0] == "export")
        assert sorted(path.name for path in place.iterdir()) == ["in", "out"][: 1 + out.exists()]
    finally:
        for left in place.iterdir():
            if left.name != "in":
                shutil.rmtree(left)


def _change(path: Path, before: bytes, after: bytes) -> str:
    at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after)))
    return f"{path} changed at byte {at}: {before[max(0, at - 20) : at + 20]!r} -> {after[max(0, at - 20) : at + 20]!r}"


def _where(error: BaseException) -> str:
    trace, last = error.__traceback__, ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "inlay" in file and "tests" not in file:
            last = f" {Path(file).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return last

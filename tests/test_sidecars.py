"""Files beside the weights: every byte of them kept, and only what must change is changed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from build import (
    BF16,
    CONFIG,
    F32,
    PREFIX,
    adapter_tensors,
    base_tensors,
    listing,
    modules_of,
    read_arrays,
    write_adapter,
    write_base,
    write_json,
    write_model,
)
from inlay import make_plan, run_plan, verify
from inlay.digests import digest_json


def merged(place: Path, *adapters: Path, **more: Any) -> Path:
    out = place / "out"
    shutil.rmtree(out, ignore_errors=True)
    run_plan(make_plan(place / "base", [*adapters] or [place / "adapter"], **more), out)
    assert verify(place / "base", [*adapters] or [place / "adapter"], out).exact
    return out


ODD = {
    "generation_config.json": '{"temperature":0.70, "top_p" : 1e0}',
    "tokenizer.json": '{"model": {"vocab": {"\\u0120a": 0}}}\r\n',
    "tokenizer.model": bytes(range(256)) * 5,
    "chat_template.jinja": "{% for m in messages %}{{ m }}\n{%- endfor %}",
    "modeling_custom.py": "# -*- coding: latin-1 -*-\nx = '\\xe9'\r\n",
    "code/deep/er/model.py": "y = 2\n",
    "1_Pooling/config.json": '{"pooling": true}',
    "no_newline": "x",
    "empty": b"",
    "with space and é.txt": "é",
    "LICENSE": "MIT",
    "big.dat": os.urandom(300_000),
    ".gitattributes": "*.bin filter=lfs\n",
    "preprocessor_config.json": "{}",
    "params.json": '{"dim": 8}',
}


def test_every_sidecar_is_copied_byte_for_byte(tmp_path: Path) -> None:
    write_base(tmp_path / "base", sidecars=ODD)
    write_adapter(tmp_path / "adapter")
    out = merged(tmp_path)
    for name, content in ODD.items():
        assert (out / name).read_bytes() == (content if isinstance(content, bytes) else content.encode()), name


def test_the_output_holds_these_files_and_no_others(tmp_path: Path) -> None:
    write_base(tmp_path / "base", sidecars={**ODD, "README.md": "the base"}, shards=2)
    write_adapter(tmp_path / "adapter")
    found = {name for name, content in listing(merged(tmp_path)).items() if content is not None}
    weights = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
    assert found == {*ODD, *weights, "config.json", "README.md", "README.base.md", "inlay.json"}


def test_sidecars_keep_being_executable_and_are_writable(tmp_path: Path) -> None:
    write_base(tmp_path / "base", sidecars={"run.sh": "#!/bin/sh\n", "fixed.txt": "x"})
    (tmp_path / "base" / "run.sh").chmod(0o755)
    (tmp_path / "base" / "fixed.txt").chmod(0o444)
    write_adapter(tmp_path / "adapter")
    out = merged(tmp_path)
    assert (out / "run.sh").stat().st_mode & 0o777 == 0o755
    assert (out / "fixed.txt").stat().st_mode & 0o200


def test_links_to_files_are_copied_as_files(tmp_path: Path) -> None:
    """A snapshot of the Hub's cache is a folder of links."""
    write_base(tmp_path / "blobs", sidecars={"generation_config.json": "{}", "sub/x.py": "1"})
    for path in sorted((tmp_path / "blobs").rglob("*")):
        link = tmp_path / "base" / path.relative_to(tmp_path / "blobs")
        if path.is_file():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(path, link.parent))
    write_adapter(tmp_path / "adapter")
    out = merged(tmp_path)
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert (out / "sub" / "x.py").read_text() == "1"


def test_a_linked_folder_is_copied_or_named_as_left_out(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "model.py").write_text("x = 1\n")
    (tmp_path / "base" / "code").symlink_to("../code")
    write_adapter(tmp_path / "adapter")
    plan = make_plan(tmp_path / "base", [tmp_path / "adapter"])
    assert "code/model.py" in {s.file for s in plan.sidecars} or any("code" in name for name in plan.left_out)


@pytest.mark.parametrize("name", [".git/config", ".cache/huggingface/x", "__pycache__/m.pyc", "code/__pycache__/m.pyc"])
def test_caches_are_not_sidecars(tmp_path: Path, name: str) -> None:
    write_base(tmp_path / "base", sidecars={name: "x"})
    write_adapter(tmp_path / "adapter")
    assert not (merged(tmp_path) / name).exists()


OTHER_FORMATS = [
    "model.gguf", "ggml/model-q4.gguf", "model.onnx", "onnx/model.onnx", "onnx/model.onnx_data", "tf_model.h5",
    "flax_model.msgpack", "rust_model.ot", "original/consolidated.00.pth", "consolidated.safetensors", "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "model.fp16.safetensors",
    "model.safetensors.index.json", "model-00001-of-00002.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_other_copies_of_the_weights_are_left_out_and_named(tmp_path: Path, name: str) -> None:
    """They would still be the unmerged ones, and some loader would take them."""
    write_base(tmp_path / "base", sidecars={name: b"weights of the base"})
    write_adapter(tmp_path / "adapter")
    plan = make_plan(tmp_path / "base", [tmp_path / "adapter"])
    assert name in plan.left_out
    run_plan(plan, tmp_path / "out")
    assert not (tmp_path / "out" / name).exists()


@pytest.mark.parametrize(
    "name", ["2_Dense/model.safetensors", "2_Dense/pytorch_model.bin", "vae/diffusion.safetensors"]
)
def test_weights_of_other_parts_in_folders_are_kept(tmp_path: Path, name: str) -> None:
    """A sentence-transformer does not work without its `2_Dense`."""
    write_base(tmp_path / "base", sidecars={name: b"weights of another part"})
    write_adapter(tmp_path / "adapter")
    assert (merged(tmp_path) / name).read_bytes() == b"weights of another part"


def test_an_adapter_inside_the_base_is_no_copy_of_the_weights(tmp_path: Path) -> None:
    """Folders of adapters that some publish beside the model stay what they are: sidecars."""
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "base" / "loras" / "one", seed=8)
    write_adapter(tmp_path / "adapter")
    plan = make_plan(tmp_path / "base", [tmp_path / "adapter"])
    assert "loras/one/adapter_config.json" in {s.file for s in plan.sidecars} | plan.left_out.keys()


# ─── config.json ─────────────────────────────────────────────────────────────────────────────────────────────────────

CONFIG_TEXT = """{
    "architectures": ["LlamaForCausalLM"],
  "model_type":"llama",   "rope_theta": 1000000.0, "eps": 1e-06,
  "tie_word_embeddings" : false,
  "torch_dtype": "bfloat16",
  "vocab_size": 32, "name": "\\u00e9\u6f22"
}"""


def test_the_config_is_kept_to_the_byte_where_nothing_must_change(tmp_path: Path) -> None:
    write_base(tmp_path / "base", config=CONFIG_TEXT)
    write_adapter(tmp_path / "adapter")
    assert (merged(tmp_path) / "config.json").read_text("utf-8") == CONFIG_TEXT
    assert (merged(tmp_path, torch_dtype="bfloat16") / "config.json").read_text("utf-8") == CONFIG_TEXT


def test_another_type_changes_one_value_of_the_config(tmp_path: Path) -> None:
    write_base(tmp_path / "base", config=CONFIG_TEXT)
    write_adapter(tmp_path / "adapter")
    wanted = CONFIG_TEXT.replace('"bfloat16"', '"float32"')
    assert (merged(tmp_path, torch_dtype="float32") / "config.json").read_text("utf-8") == wanted


@pytest.mark.parametrize("field", ["dtype", "torch_dtype", None])
@pytest.mark.parametrize("inner", ["text_config", None])
def test_every_spelling_of_the_type_is_changed(tmp_path: Path, field: str | None, inner: str | None) -> None:
    config: dict[str, Any] = {k: v for k, v in CONFIG.items() if k != "torch_dtype"}
    if field:
        config[field] = "bfloat16"
    if inner:
        config[inner] = {"vocab_size": 32, **({field: "bfloat16"} if field else {})}
    write_base(tmp_path / "base", config=config)
    write_adapter(tmp_path / "adapter")
    found = json.loads((merged(tmp_path, torch_dtype="float16") / "config.json").read_text())
    assert found[field or "torch_dtype"] == "float16"
    if inner and field:
        assert found[inner][field] == "float16"
    assert {k: v for k, v in found.items() if k not in (field, "torch_dtype", inner)} == {
        k: v for k, v in config.items() if k not in (field, "torch_dtype", inner)
    }


def test_a_config_with_a_byte_order_mark_can_be_edited(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_bytes(b"\xef\xbb\xbf" + CONFIG_TEXT.encode())
    write_adapter(tmp_path / "adapter")
    found = (merged(tmp_path, torch_dtype="float32") / "config.json").read_text("utf-8-sig")
    assert json.loads(found) == {**json.loads(CONFIG_TEXT), "torch_dtype": "float32"}


def test_a_base_without_a_config_can_be_merged(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    (tmp_path / "base" / "config.json").unlink()
    write_adapter(tmp_path / "adapter")
    assert not (merged(tmp_path) / "config.json").exists()
    assert not (merged(tmp_path, torch_dtype="float32") / "config.json").exists()


def test_an_untied_head_changes_the_config(tmp_path: Path) -> None:
    text = CONFIG_TEXT.replace('"tie_word_embeddings" : false', '"tie_word_embeddings" : true')
    write_base(tmp_path / "base", tied=True, config=text)
    tensors = adapter_tensors(modules_of())
    tensors[f"{PREFIX}lm_head.lora_A.weight"] = np.full((4, 16), 0.1, np.float32)
    tensors[f"{PREFIX}lm_head.lora_B.weight"] = np.full((32, 4), 0.1, np.float32)
    write_adapter(tmp_path / "adapter", tensors=tensors)
    out = merged(tmp_path)
    assert (out / "config.json").read_text("utf-8") == CONFIG_TEXT
    arrays = read_arrays(out)
    assert arrays["lm_head.weight"].tobytes() != arrays["model.embed_tokens.weight"].tobytes()
    assert (
        arrays["model.embed_tokens.weight"].tobytes() == base_tensors(tied=True)["model.embed_tokens.weight"].tobytes()
    )


def test_a_grown_vocabulary_changes_the_config(tmp_path: Path) -> None:
    write_base(tmp_path / "base", config=CONFIG_TEXT)
    tensors = adapter_tensors(modules_of())
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[f"{PREFIX}{key}"] = np.ones((35, 16), np.float32)
    write_adapter(tmp_path / "adapter", tensors=tensors)
    out = merged(tmp_path)
    assert (out / "config.json").read_text("utf-8") == CONFIG_TEXT.replace('"vocab_size": 32', '"vocab_size": 35')
    assert read_arrays(out)["lm_head.weight"].shape == (35, 16)


def test_the_generation_config_is_kept_to_the_byte(tmp_path: Path) -> None:
    text = '{"do_sample":true,\n\n "torch_dtype": "bfloat16", "transformers_version" : "4.0"}'
    write_base(tmp_path / "base", sidecars={"generation_config.json": text})
    write_adapter(tmp_path / "adapter")
    assert (merged(tmp_path, torch_dtype="float32") / "generation_config.json").read_text() == text


# ─── tokenizer ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_tokenizer_that_the_adapter_brings_takes_the_place_of_the_base_s(tmp_path: Path) -> None:
    write_base(
        tmp_path / "base", sidecars={"tokenizer.json": "base", "tokenizer_config.json": "{}", "vocab.json": "{}"}
    )
    brought = {"tokenizer.json": "adapter", "tokenizer_config.json": "{}", "special_tokens_map.json": "{ }",
               "training_args.bin": b"x", "trainer_state.json": "{}", "optimizer.pt": b"y", "README.md": "adapter"}  # fmt: skip
    write_adapter(tmp_path / "adapter", sidecars=brought)
    plan = make_plan(tmp_path / "base", [tmp_path / "adapter"])
    out = merged(tmp_path)
    found = listing(out)
    assert (found["tokenizer.json"], found["special_tokens_map.json"]) == (b"adapter", b"{ }")
    assert (found["tokenizer_config.json"], found["vocab.json"]) == (b"{}", b"{}")
    assert not {"training_args.bin", "trainer_state.json", "optimizer.pt", "adapter_config.json"} & found.keys()
    (note,) = [n for n in plan.notes if "tokenizer" in n]
    assert "tokenizer.json" in note
    assert "special_tokens_map.json" in note
    assert "tokenizer_config.json" not in note, "the same as the base's"


def test_a_chat_template_of_the_adapter_takes_the_place_of_the_base_s(tmp_path: Path) -> None:
    write_base(tmp_path / "base", sidecars={"chat_template.jinja": "old"})
    write_adapter(tmp_path / "adapter", sidecars={"chat_template.jinja": "new"})
    assert (merged(tmp_path) / "chat_template.jinja").read_text() == "new"


def test_a_template_inside_the_adapter_s_tokenizer_config_is_not_hidden_by_a_file_of_the_base(tmp_path: Path) -> None:
    """transformers prefers chat_template.jinja to the one in tokenizer_config.json."""
    write_base(tmp_path / "base", sidecars={"chat_template.jinja": "old", "tokenizer_config.json": "{}"})
    write_adapter(tmp_path / "adapter", sidecars={"tokenizer_config.json": '{"chat_template": "new"}'})
    plan = make_plan(tmp_path / "base", [tmp_path / "adapter"])
    assert "chat_template.jinja" in plan.left_out
    out = merged(tmp_path)
    assert not (out / "chat_template.jinja").exists()
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"chat_template": "new"}


def test_a_tokenizer_config_without_a_template_hides_nothing(tmp_path: Path) -> None:
    write_base(tmp_path / "base", sidecars={"chat_template.jinja": "old", "tokenizer_config.json": "{}"})
    write_adapter(tmp_path / "adapter", sidecars={"tokenizer_config.json": '{"padding_side": "left"}'})
    assert (merged(tmp_path) / "chat_template.jinja").read_text() == "old"


@pytest.mark.parametrize(
    "empty", ['{"chat_template": null}', '{"chat_template": ""}', '{"x": "a \\"chat_template\\" word"}']
)
def test_an_empty_template_hides_nothing(tmp_path: Path, empty: str) -> None:
    """Dropping the base's template for nothing would leave a chat model without one."""
    write_base(tmp_path / "base", sidecars={"chat_template.jinja": "old", "tokenizer_config.json": "{}"})
    write_adapter(tmp_path / "adapter", sidecars={"tokenizer_config.json": empty})
    assert (merged(tmp_path) / "chat_template.jinja").read_text() == "old"


def test_of_two_tokenizers_the_later_adapter_s_is_taken_and_said(tmp_path: Path) -> None:
    write_base(tmp_path / "base", sidecars={"tokenizer.json": "base"})
    one = write_adapter(tmp_path / "one", sidecars={"tokenizer.json": "one"})
    two = write_adapter(tmp_path / "two", seed=2, sidecars={"tokenizer.json": "two"})
    plan = make_plan(tmp_path / "base", [one, two])
    assert any("tokenizer.json" in n and "two" in n and "over" in n for n in plan.notes)
    assert (merged(tmp_path, one, two) / "tokenizer.json").read_text() == "two"


def test_of_two_equal_tokenizers_nothing_is_said_to_be_overridden(tmp_path: Path) -> None:
    write_base(tmp_path / "base", sidecars={"tokenizer.json": "base"})
    one = write_adapter(tmp_path / "one", sidecars={"tokenizer.json": "same"})
    two = write_adapter(tmp_path / "two", seed=2, sidecars={"tokenizer.json": "same"})
    assert not any("over an earlier" in n for n in make_plan(tmp_path / "base", [one, two]).notes)


def test_a_later_adapter_with_the_base_s_tokenizer_does_not_silently_lose_to_an_earlier_one(tmp_path: Path) -> None:
    """ "The last adapter wins": if that one brings the base's own file, that file it is, or the plan says otherwise."""
    write_base(tmp_path / "base", sidecars={"tokenizer.json": "base"})
    one = write_adapter(tmp_path / "one", sidecars={"tokenizer.json": "one"})
    two = write_adapter(tmp_path / "two", seed=2, sidecars={"tokenizer.json": "base"})
    plan = make_plan(tmp_path / "base", [one, two])
    taken = next(s for s in plan.sidecars if s.file == "tokenizer.json")
    assert taken.root != "adapter0" or any("two" in note and "tokenizer.json" in note for note in plan.notes)


# ─── index ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_index_is_kept_to_the_byte_where_it_is_right(tmp_path: Path) -> None:
    write_base(tmp_path / "base", shards=3)
    path = tmp_path / "base" / "model.safetensors.index.json"
    odd = json.dumps(json.loads(path.read_text()), indent=7, sort_keys=False) + "\n\n"
    path.write_text(odd)
    write_adapter(tmp_path / "adapter")
    assert (merged(tmp_path) / path.name).read_text() == odd


@pytest.mark.parametrize("total", [0, 1, None, "missing"])
def test_a_wrong_total_size_is_put_right(tmp_path: Path, total: Any) -> None:
    write_base(tmp_path / "base", shards=3)
    path = tmp_path / "base" / "model.safetensors.index.json"
    value = json.loads(path.read_text())
    size = value["metadata"].pop("total_size")
    write_json(path, {**value, "metadata": {} if total == "missing" else {"total_size": total}})
    write_adapter(tmp_path / "adapter")
    found = json.loads((merged(tmp_path) / path.name).read_text())
    assert found["metadata"]["total_size"] == size == sum(a.nbytes for a in read_arrays(tmp_path / "out").values())
    assert found["weight_map"] == value["weight_map"]


def test_the_total_size_follows_the_type(tmp_path: Path) -> None:
    write_base(tmp_path / "base", shards=2)
    write_adapter(tmp_path / "adapter")
    out = merged(tmp_path, torch_dtype="float32")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * sum(a.nbytes for a in base_tensors().values())


def test_unknown_members_of_the_index_are_kept(tmp_path: Path) -> None:
    write_base(tmp_path / "base", shards=2)
    path = tmp_path / "base" / "model.safetensors.index.json"
    value = json.loads(path.read_text())
    value["metadata"]["note"] = "kept"
    value["other"] = [1]
    write_json(path, value)
    write_adapter(tmp_path / "adapter")
    found = json.loads((merged(tmp_path, torch_dtype="float32") / path.name).read_text())
    assert (found["metadata"]["note"], found["other"]) == ("kept", [1])


# ─── card and manifest ───────────────────────────────────────────────────────────────────────────────────────────────

CARD = """---
license: apache-2.0
language:
- en
- fr
pipeline_tag: text-generation
model-index:
- name: base
---
# The base
"""


def front_matter(path: Path) -> Any:
    yaml = pytest.importorskip("yaml")
    text = path.read_text("utf-8")
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def test_the_card_of_the_base_is_kept_under_another_name(tmp_path: Path) -> None:
    write_base(tmp_path / "base", sidecars={"README.md": CARD})
    write_adapter(tmp_path / "adapter", base_model_name_or_path="org/base")
    out = merged(tmp_path)
    assert (out / "README.base.md").read_text() == CARD
    found = front_matter(out / "README.md")
    assert found["base_model"] == "org/base"
    assert found["license"] == "apache-2.0"
    assert found["pipeline_tag"] == "text-generation"


def test_lists_in_the_card_of_the_base_are_kept_whole(tmp_path: Path) -> None:
    """A list of languages stands on lines of its own."""
    write_base(tmp_path / "base", sidecars={"README.md": CARD})
    write_adapter(tmp_path / "adapter")
    assert front_matter(merged(tmp_path) / "README.md").get("language", "absent") in (["en", "fr"], "absent")


@pytest.mark.parametrize("name", ["a: b", "x\ny", "- z", "'q", "org/base #1", "{a}", "@x", "C:\\models\\base"])
def test_the_front_matter_is_yaml_whatever_the_base_is_called(tmp_path: Path, name: str) -> None:
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter", base_model_name_or_path=name)
    assert front_matter(merged(tmp_path) / "README.md")["base_model"] == name


def test_neither_card_nor_manifest_tells_a_path_of_this_machine(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    out = merged(tmp_path)
    for name in ("README.md", "inlay.json"):
        assert str(tmp_path) not in (out / name).read_text("utf-8"), name


def test_the_manifest_lists_every_file_with_its_size_and_the_tensors_that_changed(tmp_path: Path) -> None:
    write_base(tmp_path / "base", sidecars=ODD, shards=2)
    write_adapter(tmp_path / "adapter", alpha=6)
    out = merged(tmp_path)
    manifest = json.loads((out / "inlay.json").read_text("utf-8"))
    there = {name: content for name, content in listing(out).items() if content is not None and name != "inlay.json"}
    assert {name: entry["nbytes"] for name, entry in manifest["files"].items()} == {n: len(c) for n, c in there.items()}
    before, after = read_arrays(tmp_path / "base"), read_arrays(out)
    assert set(manifest["tensors"]) == {key for key in before if before[key].tobytes() != after[key].tobytes()}
    (adapter,) = manifest["adapters"]
    assert (adapter["name"], adapter["rank"], adapter["scaling"], adapter["weight"]) == ("adapter", [4], [1.5], 1.0)
    digest = manifest.pop("digest")
    assert digest == digest_json(manifest)


def test_the_manifest_and_everything_else_is_the_same_every_time_and_everywhere(tmp_path: Path) -> None:
    first = None
    for name in ("one", "two"):
        place = tmp_path / name
        write_base(place / "base", sidecars=ODD, shards=2)
        write_adapter(place / "adapter")
        first = first or listing(merged(place))
        assert listing(merged(place)) == first


def test_the_recipe_of_a_base_that_was_merged_is_kept(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    merged(tmp_path)
    (tmp_path / "second").mkdir()
    shutil.move(tmp_path / "out", tmp_path / "second" / "base")
    write_adapter(tmp_path / "second" / "adapter", seed=5)
    out = merged(tmp_path / "second")
    manifest = json.loads((out / "inlay.json").read_text())
    before = json.loads((tmp_path / "second" / "base" / "inlay.json").read_text())
    assert manifest["base"]["recipe"]["adapters"] == before["adapters"]
    assert manifest["base"]["recipe"]["plan"] == before["plan"]
    assert (out / "README.base.md").read_bytes() == (tmp_path / "second" / "base" / "README.md").read_bytes()


def test_a_third_merge_on_top_can_be_made(tmp_path: Path) -> None:
    """README.base.md is a sidecar by then, and a card comes on top."""
    write_base(tmp_path / "m0", sidecars={"README.md": "base"})
    for i in range(3):
        adapter = write_adapter(tmp_path / f"a{i}", seed=i)
        run_plan(make_plan(tmp_path / f"m{i}", [adapter]), tmp_path / f"m{i + 1}")
        assert verify(tmp_path / f"m{i}", [adapter], tmp_path / f"m{i + 1}").exact


def test_files_with_names_of_the_manifest_in_folders_are_sidecars(tmp_path: Path) -> None:
    write_base(tmp_path / "base", sidecars={"sub/inlay.json": "{}", "sub/README.md": "x"})
    write_adapter(tmp_path / "adapter")
    out = merged(tmp_path)
    assert (out / "sub" / "inlay.json").read_text() == "{}"
    assert (out / "sub" / "README.md").read_text() == "x"


def test_the_metadata_and_header_of_the_base_are_kept_to_the_byte(tmp_path: Path) -> None:
    write_base(tmp_path / "base", metadata={"format": "pt", "trained_by": "someone"})
    write_adapter(tmp_path / "adapter")
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    after = (merged(tmp_path) / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(before[:8], "little")
    assert after[:header] == before[:header]
    assert len(after) == len(before)


def test_tensors_that_no_model_class_would_build_are_kept(tmp_path: Path) -> None:
    """Multi-token-prediction heads, vision towers, counters of batches: bytes like others."""
    tensors = base_tensors()
    tensors["model.mtp.0.weight"] = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensors["visual.counter"] = np.array(7, np.int64)
    tensors["mask"] = np.array([True, False])
    tensors["codes"] = np.arange(9, dtype=np.uint8)
    write_model(tmp_path / "base", tensors)
    write_adapter(tmp_path / "adapter")
    for dtype in (None, "float16"):
        after = read_arrays(merged(tmp_path, torch_dtype=dtype))
        assert after["visual.counter"].tobytes() == tensors["visual.counter"].tobytes()
        assert after["mask"].tobytes() == tensors["mask"].tobytes()
        assert after["codes"].tobytes() == tensors["codes"].tobytes()
        assert after["model.mtp.0.weight"].astype(np.float32).tolist() == tensors["model.mtp.0.weight"].tolist()
    assert (BF16.itemsize, F32.itemsize) == (2, 4)

"""Files beside the weights: copied byte for byte, save for the few values that must change."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from inlay.adapters.adapter import Adapter
from inlay.checkpoints.checkpoint import Checkpoint
from inlay.checkpoints.json_files import read_json_object
from inlay.checkpoints.pipeline import is_copy_of_weights
from inlay.checkpoints.spans import BASE, adapter_root
from inlay.dtypes import DTYPES
from inlay.errors import AdapterError
from inlay.keys import families
from inlay.plan.types import ShardPlan, Sidecar

MANIFEST = "inlay.json"
CARD = "README.md"
BASE_CARD = "README.base.md"
CONFIG = "config.json"

# Other copies of the same weights would still be the unmerged ones.
OTHER_WEIGHTS = (
    ".gguf", ".onnx", ".onnx_data", ".pth", ".h5", ".msgpack", ".ot", ".tflite", ".mlmodel", ".ckpt", ".flashpack",
)  # fmt: skip
# What quantisers leave beside the weights to say how they are stored.
OF_CODES = (
    "quantize_config.json", "quant_config.json", "hf_quant_config.json", "quant_log.csv", "recipe.yaml",
    "inlay_quant.json",
)  # fmt: skip
# The state of a run of transformers, beside a checkpoint that it trained.
OF_TRAINING = frozenset({"optimizer.pt", "scheduler.pt", "scaler.pt", "training_args.bin", "trainer_state.json"})
SKIPPED_FOLDERS = frozenset({".git", ".cache", "__pycache__"})
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.json",
    CHAT_TEMPLATE,
)  # fmt: skip


def plan_sidecars(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    edits: Mapping[str, Mapping[str, Any]],
    removed: Sequence[str],
    notes: list[str],
) -> tuple[tuple[Sidecar, ...], dict[str, str]]:
    """Sidecars of the output, and what is left out with the reason.

    `edits` are values to change, by file; `removed` are dotted paths that config.json loses.
    """
    weights = {shard.file for shard in base.on_disk.shards} | ({base.index_file} if base.index_file else set())
    indexes = {f"{name}/{part.index_file}" for name, part in base.components.items() if part.index_file}
    found: dict[str, Sidecar] = {}
    left_out: dict[str, str] = {}
    for file in _files(base.path):
        if file in weights:
            continue
        if not (base.path / file).is_file():
            left_out[file] = "is not a regular file, or a link to nothing"
        elif file not in indexes and (reason := _reason_to_leave_out(file, base.components)):
            left_out[file] = reason
        elif base.stored and file in OF_CODES:
            left_out[file] = "describes codes, of which the result has none"
        elif file == CARD:
            found[BASE_CARD] = Sidecar(BASE_CARD, BASE, file)
        else:
            gone = tuple(removed) if file == CONFIG else ()
            found[file] = Sidecar(file, BASE, file, dict(edits.get(file, {})), gone)
    _overlay_tokenizer(found, base, adapters, left_out, notes)
    return tuple(found[name] for name in sorted(found)), left_out


def _files(directory: Path) -> list[str]:
    """Files below `directory`, by relative name; linked folders are followed once."""
    found: list[str] = []
    seen: set[str] = set()
    for folder, folders, files in os.walk(directory, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(f for f in folders if f not in SKIPPED_FOLDERS)
        found += [] if real in seen else [os.path.relpath(os.path.join(folder, f), directory) for f in files]
        seen.add(real)
    return sorted(PurePosixPath(f).as_posix() for f in found)


def _reason_to_leave_out(file: str, components: Collection[str]) -> str | None:
    folder, name = file.rpartition("/")[0], PurePosixPath(file).name
    top = "/" not in file
    if name == MANIFEST and top:
        return "the manifest of the base; its recipe is kept in the new one"
    if top and name in OF_TRAINING:
        return "is the state of a training, of which the result has none"
    if name.endswith(OTHER_WEIGHTS):
        return "holds weights in another format, which would not be merged"
    unindexed = name.endswith(".safetensors") or (name.startswith("pytorch_model") and ".bin" in name)
    if (top and (unindexed or name.endswith(".safetensors.index.json"))) or (
        folder in components and is_copy_of_weights(name)
    ):
        return "holds a second copy of the weights, which would not be merged"
    return None


def _overlay_tokenizer(
    found: dict[str, Sidecar],
    base: Checkpoint,
    adapters: Sequence[Adapter],
    left_out: dict[str, str],
    notes: list[str],
) -> None:
    """Tokenizer files that an adapter brings take the place of the base's; the last adapter wins."""
    for position, adapter in enumerate(adapters):
        brought = [file for file in TOKENIZER_FILES if (adapter.path / file).is_file()]
        changed = [f for f in brought if not _same_file(adapter.path / f, _chosen(found.get(f), base, adapters))]
        for file in changed:
            if file in found and found[file].root != BASE:
                notes.append(f"{file}: {adapter.name} brings its own, over an earlier adapter's")
            found[file] = Sidecar(file, adapter_root(position), file)
        if changed:
            notes.append(f"tokenizer files from {adapter.name}: {', '.join(changed)}")
        embedded = "tokenizer_config.json" in changed and _has_template(adapter.path / "tokenizer_config.json")
        if embedded and CHAT_TEMPLATE not in brought and CHAT_TEMPLATE in found:
            del found[CHAT_TEMPLATE]
            left_out[CHAT_TEMPLATE] = (
                f"{adapter.name} has its chat template in tokenizer_config.json, which this would hide"
            )


def _chosen(sidecar: Sidecar | None, base: Checkpoint, adapters: Sequence[Adapter]) -> Path | None:
    """Where the file comes from so far."""
    if sidecar is None:
        return None
    folder = base.path if sidecar.root == BASE else adapters[int(sidecar.root.removeprefix("adapter"))].path
    return folder / sidecar.source


def _same_file(a: Path, b: Path | None) -> bool:
    return b is not None and b.is_file() and a.stat().st_size == b.stat().st_size and a.read_bytes() == b.read_bytes()


def _has_template(path: Path) -> bool:
    return bool(read_json_object(path, AdapterError).get("chat_template"))


def pipeline_edits(base: Checkpoint, dtype: str | None, shards: Sequence[ShardPlan]) -> dict[str, dict[str, Any]]:
    """The values of a pipeline's files that must change, by file and dotted path: dtypes and total sizes.

    Models of diffusers name no dtype in their configs; those of transformers do.
    """
    edits: dict[str, dict[str, Any]] = {}
    for name, component in base.components.items():
        torch_name = DTYPES[dtype].torch if dtype else None
        fields = [
            f for f in ("dtype", "torch_dtype") if torch_name and component.config.get(f) not in (None, torch_name)
        ]
        if fields:
            edits[f"{name}/{CONFIG}"] = dict.fromkeys(fields, torch_name)
        nbytes = sum(e.nbytes for s in shards for e in s.entries if s.file.startswith(name + "/"))
        if component.index_file and (component.index.get("metadata") or {}).get("total_size") != nbytes:
            edits[f"{name}/{component.index_file}"] = {"metadata.total_size": nbytes}
    return edits


def of_codes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Dotted paths of what config.json says of a quantisation."""
    names = ("quantization_config", "compression_config", "quantization")
    top = [name for name in names if name in config]
    inner = [f"{s}.{name}" for s, part in config.items() if isinstance(part, dict) for name in names if name in part]
    return (*top, *inner)


def config_edits(
    base: Checkpoint, dtype: str | None, untied: bool, vocabulary: int | None, head: tuple[str, int] | None
) -> dict[str, Any]:
    """The values of config.json that must change, by dotted path.

    `vocabulary` is a new number of rows; `head` is the task and the number of labels of a new head.
    """
    config = base.config
    edits: dict[str, Any] = {}
    part, text = families.text_config(config)
    if untied:
        edits["tie_word_embeddings"] = False
        if part and text.get("tie_word_embeddings"):
            edits[part + "tie_word_embeddings"] = False
    if vocabulary is not None:
        edits[part + "vocab_size"] = vocabulary
        if part and "vocab_size" in config:
            edits["vocab_size"] = vocabulary
    if dtype is not None:
        edits.update(_dtype_edits(config, part, text, DTYPES[dtype].torch))
    if head is not None:
        edits.update(_head_edits(config, *head))
    return edits


def _dtype_edits(config: Mapping[str, Any], part: str, text: Mapping[str, Any], name: str) -> dict[str, Any]:
    edits = {}
    for prefix, section in (("", config), (part, text)):
        for field in ("dtype", "torch_dtype"):
            if section.get(field) not in (None, name):
                edits[prefix + field] = name
    if not any(field in config for field in ("dtype", "torch_dtype")):
        edits["torch_dtype"] = name
    return edits


HEAD_CLASSES = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}


def _head_edits(config: Mapping[str, Any], task: str, labels: int) -> dict[str, Any]:
    """A new classification head: the class that builds it, and its number of labels."""
    edits: dict[str, Any] = {}
    name = families.architecture_of(config)
    for ending in ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining", "Model"):
        if name.endswith(ending) and task in HEAD_CLASSES:
            edits["architectures"] = [name.removesuffix(ending) + HEAD_CLASSES[task]]
            break
    known = config.get("id2label")
    if (len(known) if isinstance(known, Mapping) else 2) != labels:
        edits["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
        edits["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
    return edits

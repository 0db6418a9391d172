"""What the files beside the weights say of a plan's result: config, class, tokenizer, length of the context.

They are read where they lie, with the few edits that the plan makes; code of a checkpoint is run only when told to.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from inlay.checkpoints.spans import BASE
from inlay.errors import InputError
from inlay.extras import needs
from inlay.infer.backend import CAUSAL, EMBEDDING, SEQ_CLS
from inlay.keys.memory import IGNORED
from inlay.output.json_edit import edit_json
from inlay.plan.sidecars import CONFIG, TOKENIZER_FILES
from inlay.plan.types import Plan


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' report, which comes back as values, and its progress bar where nobody sees it move."""
    import transformers

    logging: Any = transformers.logging
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def last_line(error: Exception) -> str:
    return f"{(str(error).strip().splitlines() or [type(error).__name__])[-1]:.300}"


def read_sidecar(plan: Plan, file: str) -> dict[str, Any] | None:
    """An object in a JSON file of the result as the plan has it; None where it has none."""
    value = _read_json(plan, file)
    return value if isinstance(value, dict) else None


def read_sidecar_list(plan: Plan, file: str) -> list[Any] | None:
    """The same for a list."""
    value = _read_json(plan, file)
    return value if isinstance(value, list) else None


def _read_json(plan: Plan, file: str) -> Any:
    """Raises InputError for a file that is not JSON."""
    for sidecar in plan.sidecars:
        if sidecar.file == file:
            path = plan.roots[sidecar.root] / sidecar.source
            try:
                return json.loads(edit_json(path.read_text("utf-8-sig"), sidecar.edits, sidecar.removed))
            except (OSError, ValueError) as error:
                raise InputError(f"{path}: cannot be read as JSON ({last_line(error)})") from None
    return None


def read_config(plan: Plan, trust_remote_code: bool = False) -> Any:
    """The config object of the result. Raises InputError for a model that transformers does not know."""
    with needs("infer", "loading a model"):
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    raw = read_sidecar(plan, CONFIG)
    if raw is None:
        raise InputError(f"{plan.base_name}: has no {CONFIG}, so its class is not known")
    kind = raw.get("model_type")
    kept = {k: v for k, v in raw.items() if k not in IGNORED or k == "auto_map"}
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        made = CONFIG_MAPPING[kind].from_dict(kept)
    elif not raw.get("auto_map"):
        raise InputError(f"{plan.base_name}: transformers {transformers.__version__} does not know model_type {kind!r}")
    elif not trust_remote_code:
        raise InputError(
            f"{plan.base_name}: model_type {kind!r} is code of the checkpoint's own; look at its .py files, and pass "
            "--trust_remote_code true to run them"
        )
    else:
        made = type(transformers.AutoConfig.from_pretrained(plan.roots[BASE], trust_remote_code=True)).from_dict(kept)
    made.name_or_path = plan.base_name
    return made


def model_class(config: Any, task: str, plan: Plan, trust_remote_code: bool) -> Any:
    """The class that config.json names where it fits the task, or the one that transformers has for it."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    tables = {
        CAUSAL: ("AutoModelForCausalLM", auto.MODEL_FOR_CAUSAL_LM_MAPPING),
        SEQ_CLS: ("AutoModelForSequenceClassification", auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
        EMBEDDING: ("AutoModel", auto.MODEL_MAPPING),
    }
    name, table = tables[task]
    if task == CAUSAL and getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{plan.base_name}: {config.model_type} has an encoder of its own, which is not supported here"
        )
    own = (getattr(config, "auto_map", None) or {}).get(name)
    if own and trust_remote_code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(own, str(plan.roots[BASE]))
    named = str((config.architectures or [""])[0])
    cls: Any = getattr(transformers, named, None)
    if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
        fits = {
            CAUSAL: cls.can_generate(),
            SEQ_CLS: named.endswith("ForSequenceClassification"),
            EMBEDDING: named.endswith("Model"),
        }
        if fits[task]:
            return cls
    if type(config) not in table:
        if own:
            raise InputError(
                f"{plan.base_name}: its class {own!r} is code of the checkpoint's own; look at its .py files, and pass "
                "--trust_remote_code true to run them"
            )
        raise InputError(f"{plan.base_name}: transformers has no class of {config.model_type} for the task {task}")
    return table[type(config)]


def read_tokenizer(plan: Plan, trust_remote_code: bool = False) -> Any:
    """The tokenizer of the result: the base's, with the files that an adapter brings. Raises InputError."""
    with needs("infer", "a tokenizer"):
        import transformers
    files = {s.file: plan.roots[s.root] / s.source for s in plan.sidecars if s.file in (*TOKENIZER_FILES, CONFIG)}
    mixed = any(path.parent != plan.roots[BASE] for path in files.values())
    with ExitStack() as stack:
        folder = plan.roots[BASE]
        if mixed:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="inlay-tokenizer-")))
            for path in plan.roots[BASE].glob("*.py"):
                files[path.name] = path
            for name, path in files.items():
                (folder / name).symlink_to(path.absolute())
        try:
            with quiet():  # it warns of a config that it does not know, which is told when the model is loaded
                return transformers.AutoTokenizer.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=trust_remote_code
                )
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise InputError(f"{plan.base_name}: no tokenizer can be read ({last_line(error)})") from error


def context_of(config: Any, lower: int | None = None, model: Any = None) -> int | None:
    """Tokens that a model takes, by its config, or `lower` where that is less. Raises InputError where it is more.

    With the `model` itself, positions that it leaves unused are taken off.
    """
    if lower is not None and lower < 1:
        raise InputError(f"--max_model_len must be positive, not {lower}")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "max_position_embeddings", None)
    own = int(found) if isinstance(found, int) and found > 0 else None
    if model is not None and (taken := _numbered(model)) is not None:
        own = taken if own is None else min(own, taken)
    if lower is not None and own is not None and lower > own:
        raise InputError(f"--max_model_len {lower} is more than the {own} tokens that the model was made for")
    return lower or own


def _numbered(model: Any) -> int | None:
    """Tokens that a table of positions has numbers for, where it keeps some for padding; None for all other models.

    RoBERTa and its kin number tokens from `padding_idx` + 1 on, so that 514 rows serve 512 tokens.
    """
    import torch

    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            return None if module.padding_idx is None else module.num_embeddings - module.padding_idx - 1
    return None

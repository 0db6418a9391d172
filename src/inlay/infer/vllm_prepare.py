"""From what a user asks for to vLLM's engine arguments: merged while loading, live LoRA, or the base alone.

merge, and the loader is to be had     --load_format inlay, the model directory without its weights (`folder`)
merge, and it is not                   an ordinary directory in the cache of merged models (`cache`)
no merge                               the base, and the adapter as vLLM's own LoRA where vLLM can do it
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from inlay.dtypes import BY_TORCH_NAME
from inlay.errors import InputError, PlanError, Problem
from inlay.infer.backend import CAUSAL, Source
from inlay.infer.cache import merged_copy
from inlay.infer.folder import model_folder
from inlay.infer.vllm_loader import LOAD_FORMAT, PLUGIN_GROUP, Merge
from inlay.infer.vllm_lora import EXTENSION, WHAT_TO_DO, allowed_rank, largest_rank, lora_problems, pattern_problems
from inlay.infer.vllm_settings import check_names
from inlay.plan.build import make_plan
from inlay.plan.types import Plan

CPU_SHARE = 0.5  # of the memory that is free, where vLLM would ask for 92 % of all there is


@dataclass(frozen=True)
class Prepared:
    """Engine arguments by vLLM's names, the folder of an adapter that stays live, and what a user should know."""

    args: Mapping[str, Any]
    lora: Path | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)


@contextmanager
def prepared(source: Source) -> Iterator[Prepared]:
    """What to start an engine with. Folders that it names are there until the end.

    Raises InputError for what vLLM cannot do, for settings that it does not have, and if vLLM is missing.
    """
    quiet()
    with _installed():
        from vllm.engine.arg_utils import EngineArgs
    _check(source)
    with ExitStack() as stack:
        if source.merge and source.adapters:
            found = _merged(source, stack)
        elif source.adapters:
            found = _live(source, stack)
        else:
            found = Prepared({"model": _path(source.model)})
        args = {**_common(source), **found.args}
        for name, value in source.engine.items():
            if name in found.args and found.args[name] != value:
                raise InputError(f"--vllm_{name} {value}: inlay sets it to {found.args[name]} for these adapters")
            args[name] = value
        check_names(args, EngineArgs.__dataclass_fields__)
        yield Prepared({**_memory(args), **args}, found.lora, found.notes)


@contextmanager
def _installed() -> Iterator[None]:
    """An import of vLLM within fails with the name of the extra."""
    try:
        yield
    except (ImportError, RuntimeError) as error:
        if (getattr(error, "name", None) or "").partition(".")[0] == "vllm":
            what = "--infer_backend vllm needs vllm, which is not installed: pip install 'inlay[vllm]'"
        else:  # a CPU build brings packages for CUDA with it, which break it
            hint = "on a CPU build: pip uninstall torchvision torchaudio torchcodec"
            what = f"vLLM is installed and cannot be imported: {error} ({hint})"
        raise InputError(what) from error


def quiet() -> None:
    """vLLM's log goes to stderr, errors only, and it reports no usage; the user's own settings win.

    Its processes do not repeat what their libraries warn of: names to come, and how memory is bound.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _check(source: Source) -> None:
    """Options of the other backend, which vLLM has no place for."""
    if source.device_map not in (None, "auto"):
        raise InputError(
            f"--device_map {source.device_map}: vLLM takes the devices that it sees; choose them with "
            "CUDA_VISIBLE_DEVICES and --vllm_tensor_parallel_size"
        )
    if source.attn_impl is not None:
        raise InputError(f"--attn_impl {source.attn_impl} is of --infer_backend pt; vLLM has --vllm_attention_backend")


def _common(source: Source) -> dict[str, Any]:
    """Arguments that do not depend on the adapters."""
    args: dict[str, Any] = {"disable_log_stats": True}
    if source.torch_dtype not in (None, "auto"):
        dtype = BY_TORCH_NAME.get(str(source.torch_dtype).lower().removeprefix("torch."))
        if dtype is None:
            raise InputError(f"torch_dtype {source.torch_dtype!r} is not supported; use bfloat16, float16 or float32")
        args["dtype"] = dtype.torch
    if source.trust_remote_code:
        args["trust_remote_code"] = True
    if source.max_model_len is not None:
        args["max_model_len"] = source.max_model_len
    if source.task != CAUSAL:
        args["runner"] = "pooling"
    return args


def plan_of(source: Source) -> Plan:
    """The plan of the merge, whether or not it is carried out: it says what does not fit."""
    return make_plan(
        source.model,
        source.adapters,
        weights=source.weights,
        torch_dtype=source.torch_dtype,
        combine_by=source.combine_by,
        options=source.options,
        quant=source.quant,
    )


def _merged(source: Source, stack: ExitStack) -> Prepared:
    plan = plan_of(source)
    if reason := loader_missing(source.engine):
        path = stack.enter_context(merged_copy(plan, source.cache_dir))
        note = f"loaded from a merged copy in the cache, {path}: {reason}"
        return Prepared({"model": str(path)}, None, (*plan.warnings, note))
    folder = stack.enter_context(model_folder(plan))
    args = {
        "model": str(folder),
        "load_format": LOAD_FORMAT,
        "model_loader_extra_config": Merge.of(source, plan).to_json(),
    }
    return Prepared(args, None, plan.warnings)


def loader_missing(settings: Mapping[str, Any]) -> str | None:
    """Why merged tensors cannot stream into the engine; None if they can."""
    asked = settings.get("load_format", LOAD_FORMAT)
    if asked != LOAD_FORMAT:
        return f"load_format {asked} reads files"
    found = [e.name for e in entry_points(group=PLUGIN_GROUP) if e.value.startswith("inlay.")]
    if not found:
        return "this inlay is not installed as a package, so the processes of vLLM cannot find its loader"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and not set(found) & set(allowed.split(",")):
        return f"VLLM_PLUGINS={allowed} leaves out inlay's loader"
    return None


def _live(source: Source, stack: ExitStack) -> Prepared:
    adapter = source.adapters[0]
    problems = lora_problems(source.adapters, source.weights) or pattern_problems(adapter)
    rank = source.engine.get("max_lora_rank") or allowed_rank(largest_rank(adapter))
    if rank is None:
        problems = [Problem(adapter.name, f"has rank {largest_rank(adapter)}, more than vLLM can take")]
    elif rank < largest_rank(adapter):
        problems = [Problem(adapter.name, f"has rank {largest_rank(adapter)}; --vllm_max_lora_rank is {rank}")]
    if problems:
        raise PlanError(problems, [WHAT_TO_DO])
    plan = plan_of(source)
    args: dict[str, Any] = {"model": _path(source.model), "enable_lora": True, "max_lora_rank": rank}
    args["worker_extension_cls"] = EXTENSION
    if any(s.root != "base" for s in plan.sidecars):  # the adapter brings its own tokenizer or chat template
        args["tokenizer"] = str(stack.enter_context(model_folder(plan)))
    return Prepared(args, Path(_path(adapter.path)), plan.warnings)


def _path(path: Path) -> str:
    return os.path.abspath(path)


def _memory(args: Mapping[str, Any]) -> dict[str, Any]:
    """On a processor, a share of the memory that is free, unless something says how much."""
    from vllm.platforms import current_platform

    said = {"gpu_memory_utilization", "kv_cache_memory_bytes"} & args.keys() or os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    if said or not current_platform.is_cpu():
        return {}
    import psutil

    memory = psutil.virtual_memory()
    return {"gpu_memory_utilization": round(CPU_SHARE * memory.available / memory.total, 3)}

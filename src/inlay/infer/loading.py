"""The model of a plan, its tensors merged while they are loaded, and nothing written.

transformers' own loader does the work: it knows the names in memory, stacks of experts, ties, buffers and devices. It
takes a state dict of objects of which it asks for `[...]` when it wants the values, as of the slices of a safetensors
file. Here these are such slices where the plan copies a tensor, and otherwise merge one tensor when they are asked;
what they return becomes the parameter itself. So, for every plan:

    load_model(plan) == from_pretrained(what run_plan(plan) writes)        bit for bit
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inlay.checkpoints.spans import SpanReader
from inlay.errors import InlayError, InputError
from inlay.extras import needs
from inlay.infer.backend import CAUSAL
from inlay.infer.description import last_line, model_class, quiet, read_config, read_sidecar
from inlay.infer.devices import check_places, place
from inlay.plan.types import Coded, Entry, Plan
from inlay.run.tensors import merged_tensor

if TYPE_CHECKING:
    import torch

GENERATION = "generation_config.json"
Finish = Callable[[Entry, "torch.Tensor"], "torch.Tensor"]


class Tensor:
    """A tensor that is made when it is indexed."""

    def __init__(self, make: Callable[[], torch.Tensor]) -> None:
        self._make = make

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._make()[index]


@contextmanager
def tensors(plan: Plan, finish: Finish | None = None) -> Iterator[dict[str, Any]]:
    """Key on disk -> what gives the merged tensor for `[...]`; any thread may ask, within the context.

    `finish` is called on each tensor, and its result is taken instead.
    """
    with needs("infer", "loading a model"):
        from safetensors import safe_open
    with ExitStack() as stack:
        reader = stack.enter_context(SpanReader(plan.roots))
        files: dict[Path, Any] = {}
        found: dict[str, Any] = {}
        for shard in plan.shards:
            for entry in shard.entries:
                file = None if finish else _copied_from(plan, entry)
                if file is None:
                    found[entry.key] = Tensor(_maker(entry, reader, finish))
                    continue
                if file not in files:
                    files[file] = stack.enter_context(safe_open(file, framework="pt"))
                assert isinstance(entry, Entry)
                found[entry.key] = files[file].get_slice(entry.source.key)
        yield found


def _copied_from(plan: Plan, entry: Entry | Coded) -> Path | None:
    """The safetensors file that has the tensor as it is wanted."""
    if isinstance(entry, Coded) or not entry.copied or entry.source.shape != entry.shape:
        return None
    file = plan.roots[entry.source.root] / entry.source.file
    return file if file.suffix == ".safetensors" and not entry.touched else None


def _maker(entry: Entry | Coded, reader: SpanReader, finish: Finish | None) -> Callable[[], torch.Tensor]:
    if isinstance(entry, Coded):
        raise InputError(f"{entry.key}: a model is loaded in floats, not in codes; leave --keep_quant out")

    def make() -> torch.Tensor:
        tensor = merged_tensor(entry, reader)  # on one thread: transformers asks for several at once
        return finish(entry, tensor) if finish else tensor

    return make


def load_model(
    plan: Plan,
    *,
    task: str = CAUSAL,
    device_map: str | None = None,
    attn_impl: str | None = None,
    trust_remote_code: bool = False,
    dtype: str | None = None,
    finish: Finish | None = None,
) -> tuple[Any, tuple[str, ...]]:
    """The model in evaluation mode, and notes on it.

    `dtype` is the type it computes in: the plan's, else what config.json says. Raises InputError for a class that
    transformers does not have, a checkpoint that lacks tensors, or a device that is not there.
    """
    with needs("infer", "loading a model"):
        import torch
        import transformers
    config = read_config(plan, trust_remote_code)
    cls = model_class(config, task, plan, trust_remote_code)
    wanted = dtype or _own_dtype(plan, config)
    where = place(device_map)
    if isinstance(where, dict) and "" not in where:
        check_places(where, cls, config)
    try:
        with quiet(), tensors(plan, finish) as state:
            options = {"attn_implementation": attn_impl} if attn_impl else {}
            model, info = cls.from_pretrained(
                None, config=config, state_dict=state, dtype=getattr(torch, wanted), device_map=where,
                output_loading_info=True, **options,
            )  # fmt: skip
    except InlayError:
        raise
    except (ValueError, RuntimeError, OSError, ImportError, TypeError, KeyError, AttributeError) as error:
        # whatever a class of transformers raises on a config or a device that it does not expect
        raise InputError(
            f"transformers cannot load {cls.__name__} from {plan.base_name}: {last_line(error)}"
        ) from error
    _check_whole(plan, cls.__name__, info)
    model.requires_grad_(False)
    if task == CAUSAL and (generation := read_sidecar(plan, GENERATION)):
        model.generation_config = transformers.GenerationConfig.from_dict(generation)
    left = sorted(info["unexpected_keys"])
    notes = (
        (f"{cls.__name__} has no place for {len(left)} tensors, such as {left[0]}",) if left and task == CAUSAL else ()
    )
    return model.eval(), notes


def _check_whole(plan: Plan, cls: str, info: Mapping[str, Any]) -> None:
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        why = "the checkpoint is not whole, or made for another task"
        raise InputError(f"{plan.base_name}: has no tensor for {missing[0]}{more}, which {cls} needs; {why}")
    if wrong := sorted(info["mismatched_keys"]):
        name, stored, held = wrong[0]
        raise InputError(f"{plan.base_name}: {name} is {tuple(stored)} on disk and {tuple(held)} in {cls}")


def _own_dtype(plan: Plan, config: Any) -> str:
    """The type of the model: what was asked for, what config.json says, or that of the first float tensor."""
    if plan.settings.dtype:
        from inlay.dtypes import DTYPES

        return DTYPES[plan.settings.dtype].torch
    if config.dtype is not None:
        return str(config.dtype).removeprefix("torch.")
    found = next((e.dtype for e in plan.entries.values() if e.dtype.mergeable), None)
    return found.torch if found else "float32"

"""vLLM's load format `inlay`: merged tensors stream into the engine, and no merged copy is written.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). The format then works in
plain vLLM too:

    vllm serve BASE --load-format inlay --model-loader-extra-config '{"adapters": ["ADAPTER"]}'

Further settings in that object are those of `make_plan`: "weights", "torch_dtype", "combine_by", "options", "quant";
"base" is where the base's weights lie, if that is not the model directory, and "plan" the digest that the merge must
have. Each worker makes the plan again from headers, merges tensor by tensor and keeps its own share of each.

Written against vLLM 0.32 (`vllm.model_executor.model_loader`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from inlay.errors import InputError
from inlay.plan.build import make_plan
from inlay.plan.combination import Options
from inlay.plan.quant import Quant
from inlay.plan.sidecars import CONFIG
from inlay.plan.types import Plan
from inlay.run.tensors import merged_tensors

if TYPE_CHECKING:
    import torch

    from inlay.infer.backend import Source

LOAD_FORMAT = "inlay"
PLUGIN_GROUP = "vllm.general_plugins"
# Set while `inlay.infer.vllm` starts an engine: its processes leave the terminal's group, see `register`.
OWN_GROUP = "INLAY_VLLM_OWN_GROUP"
PR_SET_PDEATHSIG = 1
# Of config.json, what names a type only: vLLM has a setting of its own for it.
DTYPE_FIELDS = ("dtype", "torch_dtype")


@dataclass(frozen=True)
class Merge:
    """What is merged, as it travels to vLLM's workers in `model_loader_extra_config`."""

    base: str | None = None
    adapters: tuple[str, ...] = ()
    weights: tuple[float, ...] | None = None
    torch_dtype: str | None = None
    combine_by: str = "sum"
    options: Mapping[str, Any] | None = None
    quant: Mapping[str, Any] | None = None
    plan: str | None = None

    @classmethod
    def of(cls, source: Source, plan: Plan) -> Merge:
        """The merge of `source`, bound to the plan that was made of it."""
        return cls(
            base=os.path.abspath(source.model),
            adapters=tuple(os.path.abspath(a.path) for a in source.adapters),
            weights=source.weights,
            torch_dtype=source.torch_dtype,
            combine_by=source.combine_by,
            options=source.options.given(),
            quant=source.quant.given(),
            plan=plan.digest,
        )

    def to_json(self) -> dict[str, Any]:
        """Law: `from_json(m.to_json()) == m`."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Merge:
        """Raises InputError for a setting that is not known or of another type."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(config.keys() - known):
            what = f"there {'is' if len(unknown) == 1 else 'are'} no {', '.join(unknown)}"
            raise InputError(f"model_loader_extra_config: {what}; known are {', '.join(sorted(known))}")
        values = dict(config)
        for name in ("adapters", "weights"):
            if isinstance(values.get(name), (list, tuple)):
                values[name] = tuple(values[name])
        merge = cls(**values)
        merge._check()
        return merge

    def _check(self) -> None:
        texts = [self.base, self.torch_dtype, self.plan]
        problem = None
        if not isinstance(self.adapters, tuple) or not all(isinstance(a, str) for a in self.adapters):
            problem = "adapters must be a list of directories"
        elif not self.adapters:
            problem = "adapters is empty: nothing to merge; leave --load-format away to load the base alone"
        elif self.weights is not None and (
            not isinstance(self.weights, tuple) or not all(isinstance(w, (int, float)) for w in self.weights)
        ):
            problem = "weights must be a list of numbers"
        elif not all(isinstance(t, (str, type(None))) for t in (*texts, self.combine_by)):
            problem = "base, torch_dtype, combine_by and plan must be texts"
        elif not all(isinstance(o, (Mapping, type(None))) for o in (self.options, self.quant)):
            problem = "options and quant must be objects"
        if problem:
            raise InputError(f"model_loader_extra_config: {problem}")

    def make_plan(self, model: str) -> Plan:
        """The plan, for a base that is `model` unless the merge names one; ids on the Hub are looked up there.

        Raises PlanError for what does not fit, and InputError if base or adapters are no longer those of the digest.
        """
        try:
            options, quant = Options(**(self.options or {})), Quant(**(self.quant or {}))
        except TypeError as error:
            raise InputError(f"model_loader_extra_config: {error}") from None
        plan = make_plan(
            _local(self.base or model, None),
            [_local(adapter, None) for adapter in self.adapters],
            weights=self.weights,
            torch_dtype=self.torch_dtype,
            combine_by=self.combine_by,
            options=options,
            quant=quant,
        )
        if self.plan is not None and plan.digest != self.plan:
            raise InputError(
                f"{self.base or model}: the base or its adapters have changed since the engine was started"
            )
        return plan


def config_problems(plan: Plan, config: Mapping[str, Any]) -> list[str]:
    """What the engine's config has otherwise than config.json of the merged model would, by dotted path."""
    found = []
    for sidecar in plan.sidecars:
        if sidecar.file != CONFIG:
            continue
        wanted = {p: v for p, v in sidecar.edits.items() if p.rpartition(".")[2] not in DTYPE_FIELDS}
        for path, value in {**wanted, **dict.fromkeys(sidecar.removed)}.items():
            if not _same(_at(config, path.split(".")), value):
                found.append(f"{path} = {value!r}" if path not in sidecar.removed else f"no {path}")
    return found


def _at(config: Any, path: Sequence[str]) -> Any:
    for name in path:
        config = config.get(name) if isinstance(config, Mapping) else None
    return config


def _same(found: Any, value: Any) -> bool:
    """Equality of JSON values; transformers turns the keys of `id2label` into numbers."""
    if isinstance(found, Mapping) and isinstance(value, Mapping):
        return {str(k): v for k, v in found.items()} == {str(k): v for k, v in value.items()}
    return bool(found == value)


def _local(model: str, revision: str | None) -> str:
    """Path of a model or adapter that was given as an id, downloaded or from the local cache."""
    if os.path.exists(model):
        return model
    from huggingface_hub import snapshot_download

    return str(snapshot_download(model, revision=revision))


def register() -> None:
    """Make `--load-format inlay` known to the vLLM of this process.

    A process of an engine that `inlay` started leaves the terminal's group too (`_leave_the_terminal`).
    """
    from dataclasses import replace
    from multiprocessing import parent_process

    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    class InlayLoader(DefaultModelLoader):  # type: ignore[misc, unused-ignore]
        """vLLM's own loader, with merged tensors in place of those in the files."""

        def __init__(self, load_config: Any) -> None:
            self.merge = Merge.from_json(load_config.model_loader_extra_config)
            # What the base loader reads itself (an encoder in a repository of its own) is in ordinary files.
            super().__init__(replace(load_config, load_format="auto", model_loader_extra_config={}))

        def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> Any:
            if model_config.model != vllm_config.model_config.model:  # a draft model has weights of its own
                return DefaultModelLoader(self.load_config).load_model(vllm_config, model_config, prefix)
            return super().load_model(vllm_config, model_config, prefix)

        def download_model(self, model_config: Any) -> None:
            _local(self.merge.base or model_config.model, model_config.revision)

        def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
            self.counter_before_loading_weights = time.perf_counter()  # for vLLM's log
            plan = self.merge.make_plan(_local(model_config.model, model_config.revision))
            if problems := config_problems(plan, model_config.hf_config.to_dict()):
                raise InputError(
                    f"{model_config.model}: the merged model needs another config.json ({'; '.join(problems)}); "
                    "`inlay serve` and `inlay infer` see to that, or write the merged model with `inlay export`"
                )
            yield from merged_tensors(plan)
            for other in getattr(model, "secondary_weights", ()):
                yield from self._get_weights_iterator(other)

    register_model_loader(LOAD_FORMAT)(InlayLoader)
    if os.environ.get(OWN_GROUP) and parent_process() is not None:
        _leave_the_terminal()


def _leave_the_terminal() -> None:
    """A process group of its own, which ends with the process that started it.

    A terminal sends Ctrl-C to all of a group, and vLLM's processes would end where only a reply is to be stopped. What
    is outside the group does not hear that the terminal closes either, so Linux is asked to say when the parent ends.
    """
    os.setpgid(0, 0)
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)

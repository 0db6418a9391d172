"""vLLM as a backend: its engine in processes of its own, driven step by step from here.

Written against vLLM 0.32 (`vllm.v1.engine.llm_engine`). Serving hands over to vLLM's own server (`vllm_serve`).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from inlay.errors import InputError
from inlay.infer.backend import (
    CANCELLED,
    EMBEDDING,
    LENGTH,
    SEQ_CLS,
    STOP,
    Reply,
    Request,
    Sampling,
    Source,
    check_length,
)
from inlay.infer.vllm_loader import OWN_GROUP
from inlay.infer.vllm_lora import left_out
from inlay.infer.vllm_prepare import Prepared, prepared
from inlay.infer.vllm_serve import serve

__all__ = ["VllmBackend", "load", "serve"]

GRACE_SECONDS = 30.0  # for the engine's processes to end; vLLM kills them after five, which is too soon for its workers
FINISH = {"stop": STOP, "length": LENGTH}
# The choices that generation_config.json may make, by the names of vLLM's SamplingParams.
CHOICES = ("temperature", "top_p", "top_k", "repetition_penalty")


def load(source: Source) -> VllmBackend:
    """The model in a running engine. Raises InputError for what vLLM refuses."""
    with ExitStack() as stack:
        ready = stack.enter_context(prepared(source))
        engine = _start(ready.args)
        stack.callback(engine.engine_core.shutdown, timeout=GRACE_SECONDS)
        lora = _add_lora(engine, ready)
        return VllmBackend(engine, lora, source.task, ready.notes, stack.pop_all())


def _start(args: Mapping[str, Any]) -> Any:
    """The engine. What it refuses comes as an InputError with vLLM's own words."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.exceptions import VLLMError
    from vllm.v1.engine.llm_engine import LLMEngine

    try:
        config = EngineArgs(**args).create_engine_config()
    except (ValueError, TypeError, NotImplementedError, VLLMError) as error:
        raise InputError(f"vLLM refuses {args['model']}: {_words(error)}") from error
    try:
        os.environ[OWN_GROUP] = "1"
        return LLMEngine.from_vllm_config(config, disable_log_stats=True)
    except (ValueError, NotImplementedError, VLLMError) as error:
        raise InputError(f"vLLM cannot load {args['model']}: {_words(error)}") from error
    except RuntimeError as error:
        if "ngine core initialization failed" not in str(error):
            raise
        raise InputError(f"vLLM cannot load {args['model']}; the reason is in its log above") from error
    finally:
        os.environ.pop(OWN_GROUP, None)


def _words(error: Exception) -> str:
    """The reason in an error of vLLM, without pydantic's heading and link."""
    if callable(errors := getattr(error, "errors", None)):
        return "; ".join(str(e.get("msg", e)) for e in errors())
    return str(error).strip() or type(error).__name__


def _add_lora(engine: Any, ready: Prepared) -> Any:
    """The request that names the adapter, which the engine then has loaded; None without one."""
    if ready.lora is None:
        return None
    from vllm.lora.request import LoRARequest

    request = LoRARequest(ready.lora.name or "adapter", 1, str(ready.lora))
    try:
        loaded = engine.add_lora(request)
    except Exception as error:  # what a worker raises comes as a plain Exception with its text
        raise InputError(f"{ready.lora}: vLLM does not take this adapter: {_words(error)}") from error
    if not loaded:
        raise InputError(f"{ready.lora}: vLLM did not load this adapter; its log above may say why")
    if problem := left_out(str(ready.lora), engine.collective_rpc("inlay_unplaced", args=(1,))):
        raise InputError(problem)
    return request


class VllmBackend:
    """A `Backend` over vLLM's engine."""

    name = "vllm"

    def __init__(self, engine: Any, lora: Any, task: str, notes: tuple[str, ...], stack: ExitStack) -> None:
        self.notes = notes
        self._engine = engine
        self._lora = lora
        self._task = task
        self._stack = stack
        self._ids = itertools.count()
        self._own: Mapping[str, Any] = engine.model_config.try_get_generation_config() if task not in VECTORS else {}

    @property
    def tokenizer(self) -> Any:
        return self._engine.get_tokenizer()

    @property
    def context(self) -> int | None:
        return int(self._engine.model_config.max_model_len)

    def generate(self, requests: Sequence[Request]) -> list[Reply]:
        """Replies in order; vLLM puts the requests into batches itself."""
        growing = [_Growing(request) for request in requests]
        for i, out in self._outputs([(r.tokens, self._params(r)) for r in requests]):
            growing[i].take(out)
        return [g.reply() for g in growing]

    def stream(self, request: Request) -> Iterator[str | Reply]:
        """Pieces of text, then the reply; closing the iterator stops the engine's work on it."""
        growing = _Growing(request)
        for _, out in self._outputs([(request.tokens, self._params(request))]):
            if piece := growing.take(out):
                yield piece
        yield growing.reply()

    def vectors(self, prompts: Sequence[tuple[int, ...]]) -> list[list[float]]:
        """Normalised vectors, or the scores of the classes as logits."""
        from vllm import PoolingParams

        if self._task not in VECTORS:
            raise InputError("vectors and scores need --task_type embedding or seq_cls")
        vllm_task, activation = VECTORS[self._task]
        for tokens in prompts:
            if not 0 < len(tokens) <= (self.context or len(tokens)):
                raise InputError(f"the prompt has {len(tokens)} tokens; the model takes 1 to {self.context}")
        params = PoolingParams(task=vllm_task, use_activation=activation)
        found = {i: out.outputs.data for i, out in self._outputs([(tokens, params) for tokens in prompts])}
        return [found[i].flatten().tolist() for i in range(len(prompts))]

    def close(self) -> None:
        self._stack.close()
        self._engine = None

    def _params(self, request: Request) -> Any:
        """vLLM's own form of the sampling. What is left open, the model's generation_config.json decides."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import RequestOutputKind

        asked = request.sampling
        if asked.num_beams > 1:
            raise InputError(f"--num_beams {asked.num_beams}: vLLM has no beam search; use --infer_backend pt")
        if self._task in VECTORS:
            raise InputError(f"a model loaded for {self._task} gives vectors, not text")
        given = {n: v for n in CHOICES if (v := _chosen(n, asked, self._own)) is not None}
        if not _samples(asked, self._own):
            given = {"temperature": 0.0, **{n: v for n, v in given.items() if n == "repetition_penalty"}}
        room = check_length(request, self.context)
        try:
            return SamplingParams(
                **given,
                max_tokens=room,
                stop=list(asked.stop_words),
                seed=asked.seed,
                output_kind=RequestOutputKind.DELTA,
            )
        except (ValueError, VLLMClientError) as error:
            raise InputError(f"vLLM refuses this: {error}") from error

    def _outputs(self, prompts: Sequence[tuple[Sequence[int], Any]]) -> Iterator[tuple[int, Any]]:
        """What the engine gives for these tokens and parameters, with the place of each in the list.

        The end comes when all are done; what is left when the iterator is closed, or fails, is aborted.
        """
        left: dict[str, int] = {}
        try:
            for i, (tokens, params) in enumerate(prompts):
                name = str(next(self._ids))
                prompt = {"type": "token", "prompt_token_ids": list(tokens)}  # as vLLM's renderer makes it
                self._engine.add_request(name, prompt, params, lora_request=self._lora)
                left[name] = i
            while left:
                for out in self._engine.step():
                    if (at := left.get(out.request_id)) is None:
                        continue
                    if out.finished:
                        del left[out.request_id]
                    yield at, out
        finally:
            if left:
                self._engine.abort_request(sorted(left))


def _chosen(name: str, asked: Sampling, own: Mapping[str, Any]) -> Any:
    """What was asked for, or else what generation_config.json says."""
    value = getattr(asked, name)
    return own.get(name) if value is None else value


def _samples(asked: Sampling, own: Mapping[str, Any]) -> bool:
    """Whether tokens are drawn: as asked for, or where the file says `do_sample`, as transformers has it."""
    if asked.temperature is not None:
        return asked.temperature > 0
    return asked.top_p is not None or (asked.top_k or 0) > 0 or bool(own.get("do_sample"))


# Our tasks -> vLLM's, and whether its activation is wanted: it normalises vectors, and turns scores to probabilities.
VECTORS = {EMBEDDING: ("embed", True), SEQ_CLS: ("classify", False)}


class _Growing:
    """A reply while its pieces come."""

    def __init__(self, request: Request) -> None:
        self._prompt_tokens = len(request.tokens)
        self._pieces: list[str] = []
        self._count = 0
        self._reason = CANCELLED

    def take(self, out: Any) -> str:
        """Add what one step brought; the new text."""
        piece = out.outputs[0]
        self._count += len(piece.token_ids)
        self._pieces.append(piece.text)
        if out.finished:
            self._reason = FINISH.get(piece.finish_reason, CANCELLED)
        return str(piece.text)

    def reply(self) -> Reply:
        return Reply("".join(self._pieces), self._prompt_tokens, self._count, self._reason)

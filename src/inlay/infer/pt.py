"""The engine `pt`: transformers and PyTorch, on any device that they know."""

from __future__ import annotations

import copy
import queue
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from inlay.adapters.adapter import Adapter
from inlay.checkpoints.checkpoint import open_checkpoint
from inlay.checkpoints.decoded import quantisation
from inlay.errors import InputError
from inlay.extras import needs
from inlay.infer import live
from inlay.infer.backend import (
    CANCELLED,
    CAUSAL,
    EMBEDDING,
    LENGTH,
    Reply,
    Request,
    Sampling,
    Serving,
    Source,
    check_length,
    check_text,
)
from inlay.infer.description import context_of, last_line, read_tokenizer
from inlay.infer.growing import GrowingReply, stop_criterion
from inlay.infer.loading import load_model
from inlay.infer.pooling import pooling_of, vectors
from inlay.plan.build import make_plan
from inlay.plan.quant import trained_as
from inlay.plan.types import Plan


def load(source: Source) -> TorchBackend:
    """The model in memory: adapters merged while it loads, or beside it. Raises InputError."""
    with needs("infer", "--infer_backend pt"):
        import torch  # noqa: F401
    return TorchBackend(source)


def serve(source: Source, serving: Serving) -> int:
    """The OpenAI-compatible endpoint of `inlay.infer.serve` over this engine."""
    from inlay.infer.serve import run

    code: int = run(lambda: load(source), serving)
    return code


def make_source_plan(source: Source, adapters: Sequence[Adapter]) -> Plan:
    """The plan for a source with these of its adapters; a quantised base is decoded also without any."""
    dtype, quant = source.torch_dtype, source.quant
    base = open_checkpoint(source.model)
    if not adapters:
        if dtype is None and quantisation(base) is not None:
            named = base.config.get("torch_dtype") or base.config.get("dtype")
            dtype = str(named) if named in ("float16", "bfloat16", "float32") else "bfloat16"
        if quant.base_as == "simulated":
            quant = replace(quant, trained_quant=trained_as(quant, source.adapters))
    return make_plan(
        base,
        adapters,
        weights=source.weights if adapters else None,
        torch_dtype=dtype,
        combine_by=source.combine_by if adapters else "sum",
        options=source.options if adapters else type(source.options)(),
        quant=quant,
    )


class TorchBackend:
    """A model of transformers. One call at a time; `stream` works in a thread of its own."""

    name = "pt"

    def __init__(self, source: Source) -> None:
        self.source = source
        # The merge is planned in any case: what does not fit the base is refused, also where it stays beside it.
        self.plan = make_source_plan(source, source.adapters)
        self.tokenizer: Any = read_tokenizer(self.plan, source.trust_remote_code)
        self.peft: Any = None
        self._notes = list(self.plan.warnings)
        self.model = self._load()
        self.context = context_of(self.model.config, source.max_model_len, self.model)
        self._cancel = threading.Event()

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(self._notes)

    def _load(self) -> Any:
        source = self.source
        if source.adapters and not source.merge:
            try:
                live.check_request(source)
                self.peft = live.with_adapters(self._load_plan(make_source_plan(source, [])), source)
                return self.peft.get_base_model()
            except live.Unfit as reason:
                self._notes.append(f"the adapters are merged while loading instead of kept apart: {reason}")
        return self._load_plan(self.plan)

    def _load_plan(self, plan: Plan) -> Any:
        source = self.source
        model, notes = load_model(
            plan, task=source.task, device_map=source.device_map, attn_impl=source.attn_impl,
            trust_remote_code=source.trust_remote_code,
        )  # fmt: skip
        self._notes += notes
        return model

    def generate(self, requests: Sequence[Request]) -> list[Reply]:
        """Replies in the order of the requests; those with equal settings and lengths to come run together."""
        self._check_task()
        together: defaultdict[tuple[Sampling, int, int], list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            # A penalty on repetition is one on padding too, which may be the token that ends a reply.
            width = len(request.tokens) if self._penalty(request.sampling) != 1 else 0
            together[request.sampling, check_length(request, self.context), width].append(i)
        replies: dict[int, Reply] = {}
        for (sampling, room, _), members in together.items():
            prompts = [requests[i].tokens for i in members]
            rows = self._run(prompts, sampling, room, threading.Event())
            for i, row in zip(members, rows, strict=True):
                growing = self._growing(requests[i])
                growing.add(row)
                growing.finish()
                replies[i] = growing.reply(LENGTH)
        return [replies[i] for i in range(len(requests))]

    def _check_task(self) -> None:
        if self.source.task != CAUSAL:
            raise InputError(f"a model for {self.source.task} makes no text; leave --task_type out")

    def _penalty(self, sampling: Sampling) -> float:
        own = self.model.generation_config.repetition_penalty
        return sampling.repetition_penalty if sampling.repetition_penalty is not None else own or 1.0

    def _growing(self, request: Request) -> GrowingReply:
        return GrowingReply(self.tokenizer, request, self._ends(), self._words(request.sampling))

    def _words(self, sampling: Sampling) -> tuple[str, ...]:
        """Stop words, with those of the model's own generation config."""
        own = self.model.generation_config.stop_strings or ()
        return (*sampling.stop_words, *((own,) if isinstance(own, str) else own))

    def _ends(self) -> set[int]:
        return end_tokens(self.model, self.tokenizer)

    def stream(self, request: Request) -> Iterator[str | Reply]:
        """Pieces of text, then the reply; closing the iterator ends the work at the next token."""
        self._check_task()
        if request.sampling.num_beams > 1:
            raise InputError("--num_beams above 1 decides on the text at its end, so it cannot be streamed")
        room = check_length(request, self.context)
        stop = threading.Event()
        arrived: queue.SimpleQueue[list[int] | Exception | None] = queue.SimpleQueue()

        def work() -> None:
            try:
                self._run([request.tokens], request.sampling, room, stop, arrived)
                arrived.put(None)
            except Exception as error:  # raised again where the pieces are taken
                arrived.put(error)

        worker = threading.Thread(target=work, name="generate", daemon=True)
        try:
            worker.start()  # waits for the thread, where an interrupt may come
            yield from self._pieces(request, arrived)
        finally:
            stop.set()
            with suppress(RuntimeError):  # an interrupt came before the thread had begun
                worker.join()

    def _pieces(
        self, request: Request, arrived: queue.SimpleQueue[list[int] | Exception | None]
    ) -> Iterator[str | Reply]:
        growing = self._growing(request)
        while (item := arrived.get()) is not None and not growing.done:
            if isinstance(item, Exception):
                raise item
            if piece := growing.add(item):
                yield piece
        if piece := growing.finish():
            yield piece
        yield growing.reply(CANCELLED if self._cancel.is_set() else LENGTH)

    def _run(
        self, prompts: Sequence[tuple[int, ...]], sampling: Sampling, room: int, stop: threading.Event,
        arrived: queue.SimpleQueue[Any] | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """New tokens of each prompt, all of one length; each is put into `arrived` when it is there."""
        import torch

        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        width = max(map(len, prompts))
        pad = self._padding()
        ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        device = self.model.get_input_embeddings().weight.device
        criteria = [stop_criterion(self.tokenizer, self._words(sampling), width, (stop, self._cancel))]
        with torch.inference_mode(), _settings_errors():
            made = self.model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device),
                streamer=None if arrived is None else _Tokens(arrived),
                generation_config=self._settings(sampling, room, pad), stopping_criteria=criteria,
                tokenizer=self.tokenizer,  # for stop strings of the model's own config
            )  # fmt: skip
        rows: list[list[int]] = made[:, width:].tolist()
        return rows

    def _padding(self) -> int:
        own = self.tokenizer.pad_token_id
        return int(own) if own is not None else min(self._ends(), default=0)

    def _settings(self, sampling: Sampling, room: int, pad: int) -> Any:
        """The model's own generation config with what was asked for instead."""
        config = copy.deepcopy(self.model.generation_config)
        config.max_new_tokens, config.max_length, config.min_length = room, None, 0
        config.pad_token_id = pad
        config.eos_token_id = sorted(self._ends()) or None
        config.num_beams = sampling.num_beams
        # One reply as plain tokens, whatever the model's own config asks for.
        config.num_return_sequences, config.return_dict_in_generate = 1, False
        if sampling.temperature is not None:
            config.do_sample = sampling.temperature > 0
        elif sampling.top_p is not None or (sampling.top_k or 0) > 0:
            config.do_sample = True
        if config.do_sample:
            config.temperature = sampling.temperature or config.temperature or 1.0
            if sampling.top_p is not None:
                config.top_p = sampling.top_p
            # 0 is all tokens. transformers would take 50 where nothing is said, which other engines do not.
            config.top_k = max((config.top_k if sampling.top_k is None else sampling.top_k) or 0, 0)
        else:
            config.temperature = config.top_p = config.top_k = None
        if sampling.repetition_penalty is not None:
            config.repetition_penalty = sampling.repetition_penalty
        return config

    def vectors(self, prompts: Sequence[tuple[int, ...]]) -> list[list[float]]:
        """Embeddings, pooled as the checkpoint says (`inlay.infer.pooling`), or scores of classes."""
        if self.source.task == CAUSAL:
            raise InputError("a model for text makes no vectors; give --task_type embedding or seq_cls")
        for prompt in prompts:
            check_text(prompt, self.context)
        how = pooling_of(self.plan, self.model.config) if self.source.task == EMBEDDING else None
        return vectors(self.model, prompts, how, self._padding_token())

    def _padding_token(self) -> int | None:
        """A token that stands for nothing else; None where there is none."""
        own = self.tokenizer.pad_token_id
        return None if own is None or own == self.tokenizer.eos_token_id else int(own)

    def close(self) -> None:
        """End what is being generated, and drop the model."""
        self._cancel.set()
        self.model = self.peft = None


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a reply: those of generation_config.json, and the tokenizer's."""
    named = model.generation_config.eos_token_id
    found = set(named) if isinstance(named, (list, tuple)) else {named}
    return {t for t in (*found, tokenizer.eos_token_id) if t is not None}


@contextmanager
def _settings_errors() -> Iterator[None]:
    """What generate of transformers refuses, and logits that nothing can be drawn from, as InputError."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"transformers cannot generate with these settings: {last_line(error)}") from error
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise InputError("the model's logits are Inf or NaN; try another --torch_dtype") from error


class _Tokens:
    """What transformers gives its tokens to as it makes them, the prompt first (its `BaseStreamer`, by its methods)."""

    def __init__(self, arrived: queue.SimpleQueue[Any]) -> None:
        self._arrived = arrived
        self._prompt = True

    def put(self, value: Any) -> None:
        if not self._prompt:
            self._arrived.put(value.reshape(-1).tolist())
        self._prompt = False

    def end(self) -> None: ...

"""What an engine does for us: the `Backend` protocol, what goes in and comes out, and the table of engines.

A prompt reaches a backend as tokens: the chat template is applied once, before (`inlay.infer.chat`), so that two
engines answer the same question. Stop words are strings, and are not part of the reply.

An engine is a module of this folder with two functions, named in `MODULES`:

    load(source: Source) -> Backend                  the model in memory, or InputError
    serve(source: Source, serving: Serving) -> int   an endpoint until interrupted; its exit code
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from inlay.adapters.adapter import Adapter
from inlay.checkpoints.checkpoint import open_checkpoint
from inlay.errors import InputError
from inlay.plan.combination import NO_OPTIONS, Options
from inlay.plan.quant import NO_QUANT, Quant
from inlay.records.fingerprint import check_recorded

CAUSAL, EMBEDDING, SEQ_CLS = "causal_lm", "embedding", "seq_cls"
TASKS = (CAUSAL, EMBEDDING, SEQ_CLS)
STOP, LENGTH, CANCELLED = "stop", "length", "cancelled"  # why a reply ended, in OpenAI's words and one of our own
MODULES = {"pt": "inlay.infer.pt", "transformers": "inlay.infer.pt", "vllm": "inlay.infer.vllm"}
DEFAULT_NEW_TOKENS = 512


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. None leaves a choice to the model's generation_config.json.

    `temperature` 0 is greedy, and so is None where the model has no say and neither `top_p` nor `top_k` asks for
    sampling. `max_new_tokens` None is
    `DEFAULT_NEW_TOKENS`, or what is left of the context if that is less. A number that is given has to fit in.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    stop_words: tuple[str, ...] = ()
    seed: int | None = None
    num_beams: int = 1

    def __post_init__(self) -> None:
        _in_range("max_new_tokens", self.max_new_tokens, 1, None)
        if self.temperature:  # logits divided by less are Inf
            _in_range("temperature, where it is not 0,", self.temperature, 1e-5, 100)
        _in_range("top_p", self.top_p, 0, 1, above=True)
        _in_range("top_k", self.top_k, -1, None)
        _in_range("repetition_penalty", self.repetition_penalty, 0, 100, above=True)
        _in_range("num_beams", self.num_beams, 1, None)
        _in_range("seed", self.seed, 0, (1 << 63) - 1)
        if any(not word for word in self.stop_words):
            raise InputError("stop_words: an empty word would stop every reply at once")


def _in_range(name: str, value: float | None, low: float, high: float | None, *, above: bool = False) -> None:
    """Raises InputError for a number outside [low, high], or (low, high] if it has to be `above`."""
    if value is None:
        return
    too_low = not value > low if above else not value >= low
    if too_low or (high is not None and value > high):
        bounds = f"{'above' if above else 'at least'} {low}" + ("" if high is None else f" and at most {high}")
        raise InputError(f"{name} must be {bounds}, not {value}")


@dataclass(frozen=True)
class Request:
    """One prompt in tokens, special tokens included, and how to answer it."""

    tokens: tuple[int, ...]
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class Reply:
    """What came back. `completion_tokens` counts the end-of-sequence token; `text` is without it and stop words."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str  # STOP, LENGTH or CANCELLED


@dataclass(frozen=True)
class Source:
    """What to load, and how.

    With `merge` the adapters are merged while the weights are loaded, and nothing is written; without, they stay
    apart from the base as the engine's own adapters. `weights` is a factor for each adapter (1.0 if None);
    `combine_by`, `options`, `quant` are those of `make_plan`. `engine` has the settings of one engine, by the names
    that the engine itself has for them (vLLM's engine arguments). `cache_dir` is where merged copies are kept for an
    engine that cannot take merged tensors as a stream (`inlay.infer.cache`).
    """

    model: Path
    adapters: tuple[Adapter, ...] = ()
    merge: bool = False
    weights: tuple[float, ...] | None = None
    torch_dtype: str | None = None
    combine_by: str = "sum"
    options: Options = NO_OPTIONS
    quant: Quant = NO_QUANT
    device_map: str | None = None
    attn_impl: str | None = None
    task: str = CAUSAL
    trust_remote_code: bool = False
    max_model_len: int | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)
    cache_dir: Path | None = None


@dataclass(frozen=True)
class Serving:
    """Where an endpoint listens, and what it takes. Sizes in bytes; `name` is what the model is called there."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    name: str = "model"
    max_body_bytes: int = 4 << 20
    max_waiting: int = 64
    system: str | None = None


class Backend(Protocol):
    """A model in memory that answers. `close` gives its memory back; no call may follow."""

    @property
    def name(self) -> str:
        """The engine's name, a key of `MODULES`."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers, with the chat template where the model has one."""

    @property
    def context(self) -> int | None:
        """Tokens that prompt and reply may have together; None where nothing says so."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how this was loaded: adapters merged although they were to stay apart, …"""

    def generate(self, requests: Sequence[Request]) -> list[Reply]:
        """Replies in the order of the requests, which are run as one batch.

        Raises InputError for a prompt that does not fit into the context.
        """

    def stream(self, request: Request) -> Iterator[str | Reply]:
        """Pieces of text as they come, which join to the text of the `Reply` that is last.

        Closing the iterator stops the work.
        """

    def vectors(self, prompts: Sequence[tuple[int, ...]]) -> list[list[float]]:
        """For `EMBEDDING` the normalised vector of each prompt, for `SEQ_CLS` the scores of its classes (logits).

        Raises InputError where the engine does not do it.
        """

    def close(self) -> None: ...


def open_backend(name: str, source: Source) -> Backend:
    """The model, loaded by the engine of this name. Raises InputError for another base than an adapter recorded."""
    check_base(source)
    backend: Backend = _module(name).load(source)
    return backend


def serve_backend(name: str, source: Source, serving: Serving) -> int:
    """An endpoint over the engine of this name, until it is interrupted; the exit code."""
    check_base(source)
    code: int = _module(name).serve(source, serving)
    return code


def check_base(source: Source) -> None:
    """Raises InputError where the base is not the one that an adapter was trained on, by the adapter's record."""
    recorded = [adapter for adapter in source.adapters if adapter.fingerprint]
    base = open_checkpoint(source.model) if recorded else None
    for adapter in recorded:
        assert base is not None
        if adapter.fingerprint["headers"] != base.fingerprint:
            raise InputError(
                f"{adapter.name} was trained on another base: recorded {adapter.fingerprint['headers']}, "
                f"{source.model} is {base.fingerprint}. Give the base it was trained on with --model"
            )
        known = {k: d for k, d in adapter.fingerprint["tensors"].items() if k in base.on_disk.tensors}
        check_recorded(base, known, adapter.name)


def _module(name: str) -> Any:
    if name not in MODULES:
        raise InputError(f"unknown backend {name!r}; there are {', '.join(MODULES)}")
    return import_module(MODULES[name])


def check_length(request: Request, context: int | None) -> int:
    """Tokens that the reply may have. Raises InputError for a prompt that leaves less room than is asked for."""
    asked = request.sampling.max_new_tokens
    if not request.tokens:
        raise InputError("the prompt is empty: not one token")
    if context is None:
        return asked or DEFAULT_NEW_TOKENS
    room = context - len(request.tokens)
    if room < (asked or 1):
        raise InputError(
            f"the prompt has {len(request.tokens)} tokens and the reply may have {asked or 1}; the model's context is "
            f"{context}. Shorten the prompt, or lower --max_new_tokens"
        )
    return asked or min(room, DEFAULT_NEW_TOKENS)


def check_text(tokens: Sequence[int], context: int | None) -> None:
    """Raises InputError for a text that nothing can be made of, as it is empty or longer than the model takes."""
    if not tokens:
        raise InputError("the text is empty: not one token")
    if context is not None and len(tokens) > context:
        raise InputError(f"the text has {len(tokens)} tokens, and the model takes {context}; shorten it")

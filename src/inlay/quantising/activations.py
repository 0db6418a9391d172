"""What flows between the layers: the hidden states of all blocks, and what else a layer is called with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from inlay.errors import InputError

if TYPE_CHECKING:
    import torch

    from inlay.quantising.skeleton import Skeleton

Module = Any


@dataclass(frozen=True)
class Call:
    """How the decoder calls a layer, besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, layer: Module, hidden: torch.Tensor) -> torch.Tensor:
        """Output of the layer for the hidden states of one block, (1, tokens, hidden)."""
        out: torch.Tensor = _first(layer(hidden, *self.args, **self.kwargs))
        return out


def embed(skeleton: Skeleton, blocks: Sequence[Sequence[int]]) -> tuple[torch.Tensor, list[Call]]:
    """The input of the first layer for all blocks, (blocks, tokens, hidden), and the call of each layer.

    The decoder runs as it is, with layers that pass on what they get. Raises InputError for a model whose layers get
    something besides the hidden states that depends on the text.
    """
    import torch

    hidden = torch.empty(len(blocks), len(blocks[0]), _width(skeleton))
    calls: list[Call] = []
    with skeleton.around_the_layers():
        as_tuple = _returns_tuple(skeleton, blocks[0])
        for number, block in enumerate(blocks):
            seen = _pass_through(skeleton, block, as_tuple)
            hidden[number] = seen[0][0][0]
            if calls and not all(_same(call, new) for call, (_, new) in zip(calls, seen, strict=True)):
                raise InputError(
                    f"{type(skeleton.decoder).__name__} gives its layers more than hidden states that depends on the "
                    "text, so they cannot be run one by one"
                )
            calls = calls or [call for _, call in seen]
    return hidden, calls


def _width(skeleton: Skeleton) -> int:
    return int(skeleton.model.get_input_embeddings().weight.shape[1])


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, (tuple, list)) else out


class _Found(Exception):
    """The first layer has answered; the rest of the model is not there."""


def _returns_tuple(skeleton: Skeleton, block: Sequence[int]) -> bool:
    """Whether layers return a tuple, which the decoder takes apart."""
    answers = []

    def note(_module: Module, _args: Any, out: Any) -> None:
        answers.append(isinstance(out, (tuple, list)))
        raise _Found

    with skeleton.layer(0) as layer:
        hook = layer.register_forward_hook(note)
        try:
            _decode(skeleton, block)
        except _Found:
            pass
        finally:
            hook.remove()
    return answers[0]


def _decode(skeleton: Skeleton, block: Sequence[int]) -> None:
    import torch

    skeleton.decoder(input_ids=torch.tensor([block]), use_cache=False)


def _pass_through(skeleton: Skeleton, block: Sequence[int], as_tuple: bool) -> list[tuple[torch.Tensor, Call]]:
    """Hidden states and call that each layer gets, all of them passing on the hidden states."""
    seen: list[tuple[torch.Tensor, Call]] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        seen.append((hidden, Call(args[1:], kwargs)))
        return (hidden,) if as_tuple else hidden

    try:
        for layer in skeleton.layers:
            layer.forward = forward
        _decode(skeleton, block)
    finally:
        for layer in skeleton.layers:
            layer.__dict__.pop("forward", None)
    return seen


def _same(a: Any, b: Any) -> bool:
    """Whether two calls are equal, tensors by their values."""
    import torch

    if isinstance(a, Call) and isinstance(b, Call):
        return _same(a.args, b.args) and _same(dict(a.kwargs), dict(b.kwargs))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return type(a) is type(b) and (a == b or not isinstance(a, (int, float, str, bool)))

"""What the matrices of a layer read on the calibration texts: means, samples, and calls to try scales on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from inlay.quantising.activations import Call
from inlay.quantising.search import CLIP_TOKENS
from inlay.quantising.tracing import Group

if TYPE_CHECKING:
    import torch

Module = Any


@dataclass
class Observed:
    """Means of |x| by group, over all tokens; some inputs (tokens, in) by matrix; calls of each group's piece.

    The piece is the smallest module with all matrices of a group in it: the attention for queries, keys and values, the
    matrix itself for one that reads alone.
    """

    means: dict[Group, torch.Tensor] = field(default_factory=dict)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    pieces: dict[Group, Module] = field(default_factory=dict)
    calls: dict[Group, list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=dict)

    def outputs(self, group: Group) -> list[torch.Tensor]:
        """What the piece of a group computes with the weights that are in it."""
        results = [self.pieces[group](*args, **kwargs) for args, kwargs in self.calls[group]]
        return [out[0] if isinstance(out, (tuple, list)) else out for out in results]


def observe(layer: Module, groups: Sequence[Group], call: Call, hidden: torch.Tensor, tokens: int) -> Observed:
    """Run the layer on all blocks; `hidden` holds its outputs afterwards. The first `tokens` serve the search."""
    seen = Observed()
    some = max(1, tokens // hidden.shape[1])
    state = _State(seen, min(some, len(hidden)), hidden.shape[1])
    hooks = [hook for group in groups for hook in _hooks(layer, group, state)]
    try:
        for number in range(len(hidden)):
            state.searching = number < some
            hidden[number] = call(layer, hidden[number : number + 1])[0]
    finally:
        for hook in hooks:
            hook.remove()
    for group in groups:
        if group in seen.means:
            seen.means[group] /= state.counts[group]
    return seen


@dataclass
class _State:
    seen: Observed
    blocks: int  # that serve the search
    length: int
    searching: bool = True
    counts: dict[Group, int] = field(default_factory=dict)

    def mean(self, group: Group, x: torch.Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1])
        total = flat.abs().sum(0)
        self.seen.means[group] = self.seen.means[group] + total if group in self.seen.means else total
        self.counts[group] = self.counts.get(group, 0) + len(flat)

    def sample(self, name: str, x: torch.Tensor) -> None:
        import torch

        if self.searching:
            flat = x.reshape(-1, x.shape[-1])
            few = -(-CLIP_TOKENS // self.blocks)
            part = flat[:: max(1, len(flat) // few)][:few].clone()
            self.seen.inputs[name] = torch.cat([self.seen.inputs[name], part]) if name in self.seen.inputs else part


def _hooks(layer: Module, group: Group, state: _State) -> list[Any]:
    owners = [name.rpartition(".")[0] for name in group.names]
    piece = layer.get_submodule(_common(owners))
    state.seen.pieces[group] = piece
    state.seen.calls[group] = []

    def keep_call(_module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if state.searching:
            state.seen.calls[group].append((args, kwargs))

    def keep_mean(_module: Module, _args: tuple[Any, ...], out: torch.Tensor) -> None:
        state.mean(group, out)

    def keep_mean_of_input(_module: Module, args: tuple[Any, ...]) -> None:
        state.mean(group, args[0])

    def keep_sample(name: str) -> Callable[..., None]:
        return lambda _module, args: state.sample(name, args[0])

    linears = [(n, o) for n, o in zip(group.names, owners, strict=True) if _is_linear(layer.get_submodule(o))]
    hooks = [layer.get_submodule(owner).register_forward_pre_hook(keep_sample(name)) for name, owner in linears]
    if group.norm is not None:
        hooks.append(layer.get_submodule(group.norm).register_forward_hook(keep_mean))
    elif linears:
        hooks.append(layer.get_submodule(linears[0][1]).register_forward_pre_hook(keep_mean_of_input))
    if group.norm is not None or linears:
        hooks.append(piece.register_forward_pre_hook(keep_call, with_kwargs=True))
    return hooks


def _common(owners: Sequence[str]) -> str:
    """Name of the smallest module with all of these in it."""
    parts = zip(*(owner.split(".") for owner in owners), strict=False)
    shared = takewhile(lambda names: len(set(names)) == 1, parts)
    return ".".join(names[0] for names in shared)


def _is_linear(module: Module) -> bool:
    import torch

    return isinstance(module, torch.nn.Linear)

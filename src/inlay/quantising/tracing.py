"""Which matrices of a layer read the same channels, found by watching one forward.

No table of names: every product `x Wᵀ` is seen as torch executes it, and where its x comes from. Two matrices share
their input where x is the output of the same module or the same tensor, seen through operations that only reorder or
repeat rows (`view`, indexing of tokens …).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Module = Any

# They keep the last axis as it is when its length stays the same; `folding` proves what is concluded from that.
ROWS_ONLY = frozenset(
    {"view", "reshape", "flatten", "contiguous", "clone", "to", "float", "type_as", "unsqueeze", "squeeze", "expand",
     "repeat_interleave", "index_select", "__getitem__", "dropout"}
)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Parameters of a layer, by name, that multiply the same channels; `norm` is the module that made these, if one.

    Matrices are (out, in), or (experts, out, in) for a stack.
    """

    names: tuple[str, ...]
    norm: str | None


@dataclass
class Trace:
    """What one forward of a layer showed: groups in the order of their execution, and the inputs of the norms."""

    groups: list[Group]
    norm_inputs: dict[str, torch.Tensor]


def trace(layer: Module, run: Callable[[], Any]) -> Trace:
    """Watch `run`, which is one forward of the layer."""
    from torch.overrides import TorchFunctionMode

    seen = _Seen({p.untyped_storage().data_ptr(): name for name, p in layer.named_parameters()})

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            seen.operation(getattr(func, "__name__", ""), args, kwargs or {}, out)
            return out

    norms = {name: m for name, m in layer.named_modules() if is_norm(m)}
    hooks = [m.register_forward_hook(seen.norm_hook(name)) for name, m in norms.items()]
    try:
        with Watch():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    groups = [Group(tuple(dict.fromkeys(names)), seen.norms.get(source)) for source, names in seen.readers.items()]
    return Trace(groups, seen.norm_inputs)


def is_norm(module: Module) -> bool:
    """Whether it may be a norm: one gain a channel, and perhaps a bias, and nothing else."""
    own = dict(module.named_parameters())
    return "weight" in own and own["weight"].dim() == 1 and set(own) <= {"weight", "bias"}


@dataclass
class _Seen:
    """Sources are numbered as they appear. Tensors are kept, so that no two of them have the same id."""

    parameters: Mapping[int, str]
    source_of: dict[int, int] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)
    norms: dict[int, str] = field(default_factory=dict)
    norm_inputs: dict[str, Any] = field(default_factory=dict)
    readers: dict[int, list[str]] = field(default_factory=dict)

    def norm_hook(self, name: str) -> Callable[..., None]:
        def note(_module: Module, args: tuple[Any, ...], out: Any) -> None:
            self.norms[self._source(out, new=True)] = name
            self.norm_inputs[name] = args[0].detach()

        return note

    def _source(self, tensor: Any, new: bool = False) -> int:
        if new or id(tensor) not in self.source_of:
            self.source_of[id(tensor)] = len(self.kept)
            self.kept.append(tensor)
        return self.source_of[id(tensor)]

    def operation(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        import torch

        given = [*args, *kwargs.values()]
        if name == "linear":
            weight = given[1]
            parameter = self.parameters.get(weight.untyped_storage().data_ptr())
            if parameter is not None:
                self.readers.setdefault(self._source(given[0]), []).append(parameter)
            return
        tensors = isinstance(out, torch.Tensor) and bool(given) and isinstance(given[0], torch.Tensor)
        if name in ROWS_ONLY and tensors and out.shape[-1:] == given[0].shape[-1:]:
            source = self._source(given[0])
            if id(out) != id(given[0]):
                self.source_of[id(out)] = source
                self.kept.append(out)

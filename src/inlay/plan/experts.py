"""LoRA on bare parameters (PEFT's `target_parameters`): stacks of experts, routers.

A wrapper stands around the module, one more for each of its parameters that is a target, in the order in
which the class registers them: `M.lora_A` belongs to the last, `M.base_layer.lora_A` to the one before.

For a parameter (E, d1, d2) the file holds A (E·r, in), expert after expert, and B (out, r·E) with the
experts interleaved: element (o, j) of expert e is B[o, j·E + e]. Whether in is d2 (W + s B A) or d1
(W + s (B A)ᵀ) is seen in the shapes, and where d1 = d2 it follows from PEFT's version: up to 0.18 it was
always d1, since 0.19 it is d1 for classes that declare themselves transposed only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from inlay.checkpoints.refs import TensorInfo
from inlay.keys.memory import MemoryLayout, Slice
from inlay.plan.placer import Placer
from inlay.plan.steps import Part, Step

WRAPPER = ".base_layer"


def plain_module(module: str) -> str:
    """The module without the wrappers around it."""
    while module.endswith(WRAPPER):
        module = module.removesuffix(WRAPPER)
    return module


def wrapped(modules: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, list[Mapping[str, TensorInfo]]]:
    """Module -> the parts of its wrappers, outermost first."""
    found: dict[str, list[tuple[int, Mapping[str, TensorInfo]]]] = {}
    for name, parts in modules.items():
        if "lora_A" in parts:
            module = plain_module(name)
            depth = (len(name) - len(module)) // len(WRAPPER)
            found.setdefault(module, []).append((depth, parts))
    return {module: [parts for _, parts in sorted(pairs, key=lambda p: p[0])] for module, pairs in found.items()}


def targeted(layout: MemoryLayout, module: str, targets: Sequence[str]) -> list[str]:
    """Parameters of a module that `target_parameters` names, in the order of registration."""
    own = [n for n in layout.shapes if n.startswith(module + ".") and "." not in n[len(module) + 1 :]]
    return [n for n in own if any(names(t, n) for t in targets)]


def names(target: str, parameter: str) -> bool:
    """Whether an entry of `target_parameters` names this parameter: in full, or by its last words."""
    return parameter == target or parameter.endswith("." + target)


def place(placer: Placer, module: str, wrappers: Sequence[Mapping[str, TensorInfo]]) -> bool:
    """Place the pairs of a module's parameters; False where the module has none that is a target."""
    layout = placer.names.layout_of(placer.config.target_parameters)
    found = targeted(layout, module, placer.config.target_parameters) if layout else []
    if not found:
        if layout is None:
            placer.problem(module, "is LoRA on bare parameters, whose layout only transformers knows")
        return layout is None
    if len(found) != len(wrappers):
        placer.problem(module, f"{len(wrappers)} pairs in the file for {len(found)} parameters: {', '.join(found)}")
        return True
    assert layout is not None
    placer.found.parameters.update(found)
    for name, parts in zip(reversed(found), wrappers, strict=True):
        _place_parameter(placer, layout, module, name, parts)
    return True


@dataclass(frozen=True)
class _Stack:
    """The pairs of all experts of one parameter."""

    a: Part
    b: Part
    experts: int
    turned: bool

    def pair(self, expert: int) -> tuple[Part, Part]:
        """(left, right) of one expert, in the orientation of the parameter's matrix."""
        rank = self.a.shape[0] // self.experts
        a = self.a.rows(expert * rank, (expert + 1) * rank)
        b = Part(self.b.ref, (self.b.shape[0], rank), expert, (self.b.shape[1], self.experts))
        return (a.turned, b.turned) if self.turned else (b, a)


def _place_parameter(
    placer: Placer, layout: MemoryLayout, module: str, name: str, parts: Mapping[str, TensorInfo]
) -> None:
    if set(parts) != {"lora_A", "lora_B"}:
        placer.problem(name, f"has {', '.join(sorted(parts))}; a parameter takes lora_A and lora_B and nothing else")
        return
    if not placer.parts_are_numbers(name, parts) or not placer.magnitude_fits(name, None, 0):
        return
    slices = layout.slices.get(name, ())
    if not slices:
        placer.problem(name, placer.names.why_not(name))
        return
    placer.names.used_layout = True
    shape = layout.shapes[name]
    experts, matrix = (shape[0], shape[1:]) if len(shape) == 3 else (1, shape)
    a, b = Part.of(placer.ref(parts["lora_A"])), Part.of(placer.ref(parts["lora_B"]))
    if len(matrix) != 2 or a.shape[0] % experts or a.shape[0] != b.shape[1] or a.shape[0] == 0:
        placer.problem(name, f"A {a.shape} and B {b.shape} are no pairs for the parameter's {shape}")
        return
    turned = _turned(placer, layout, module, name, (matrix[0], matrix[1]), (b.shape[0], a.shape[1]))
    rank = a.shape[0] // experts
    if turned is None or not placer.rank_agrees(name, rank):
        return
    placer.found.scalings.add(placer.config.scaling(name))
    placer.found.ranks.add(rank)
    stack = _Stack(a, b, experts, turned)
    scaling = placer.config.scaling(name) * placer.found.weight
    for part in slices:
        _place_slice(placer, name, stack, part, scaling, (matrix[0], matrix[1]))


def _turned(
    placer: Placer, layout: MemoryLayout, module: str, name: str, matrix: tuple[int, int], logical: tuple[int, int]
) -> bool | None:
    """Whether the delta is (B A)ᵀ; None, and a problem, where it fits neither way or cannot be known."""
    plain, turned = matrix == logical, matrix == logical[::-1]
    if plain != turned:
        return turned
    if not plain:
        placer.problem(name, f"is for {logical} (out, in), the parameter's matrix is {matrix}")
        return None
    version = _version(placer.config.peft_version)
    if version is None:
        placer.problem(
            name,
            f"{matrix} is square, and which way the pair lies depends on the version of PEFT, which the config does "
            "not say; set peft_version in adapter_config.json to the one that trained it",
        )
        return None
    return version < (0, 19) or module in layout.transposed_experts


def _version(text: str | None) -> tuple[int, int] | None:
    numbers = (text or "").split(".")[:2]
    return (int(numbers[0]), int(numbers[1])) if len(numbers) == 2 and all(n.isdigit() for n in numbers) else None


def _place_slice(
    placer: Placer, name: str, stack: _Stack, part: Slice, scaling: float, matrix: tuple[int, int]
) -> None:
    """Steps on one tensor of the base, for the experts that it holds."""
    if not placer.target_is_float(name, part.key):
        return
    stored = placer.base.tensors[part.key][1].shape
    whole = len(stored) == 3
    experts = range(stack.experts) if whole or part.expert is None else (part.expert,)
    for expert in experts:
        left, right = stack.pair(expert)
        if not whole and part.rows != (0, matrix[0]):
            left = left.rows(*part.rows)
        if part.transposed:
            left, right = right.turned, left.turned
        rows: tuple[int, int] | None = None
        if whole:
            rows = expert * stored[1], (expert + 1) * stored[1]
        elif part.disk_rows != (0, stored[0]):
            rows = part.disk_rows
        count = rows[1] - rows[0] if rows else stored[0]
        if (left.shape[0], right.shape[1]) != (count, stored[-1]):
            placer.problem(name, f"its expert {expert} is {left.shape[0]} × {right.shape[1]}, {part.key} has {stored}")
            return
        step = Step(placer.found.position, "lora", scaling, right, left, rows=rows)
        placer.found.steps.setdefault(part.key, []).append(step)

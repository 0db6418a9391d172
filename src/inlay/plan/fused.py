"""LoRA on a module that shares a tensor on disk with others: Wqkv, gate_up, stacks of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from inlay.checkpoints.refs import TensorInfo, TensorRef
from inlay.keys.memory import Slice
from inlay.plan.placer import Placer
from inlay.plan.steps import Part, Step


def place(placer: Placer, module: str, parts: Mapping[str, TensorInfo], slices: Sequence[Slice]) -> None:
    """The rows of the pair that belong to each of the tensors."""
    extra = parts.keys() - {"lora_A", "lora_B", "magnitude"}
    if extra:
        placer.problem(
            module, f"{', '.join(sorted(extra))} on a module that is part of a fused tensor is not supported"
        )
        return
    a, b = Part.of(placer.ref(parts["lora_A"])), Part.of(placer.ref(parts["lora_B"]))
    if placer.adapter.turned:
        a, b = a.turned, b.turned
    if len(parts["lora_A"].shape) != 2 or len(parts["lora_B"].shape) != 2 or a.shape[0] != b.shape[1]:
        placer.problem(module, f"A {a.ref.shape} and B {b.ref.shape} are not a pair (r, in), (out, r)")
        return
    magnitude = parts.get("magnitude")
    outputs = b.shape[0]
    if not placer.rank_agrees(module, a.shape[0]) or not placer.magnitude_fits(module, magnitude, outputs):
        return
    covered = sorted(part.rows for part in slices)
    if [end for _, end in covered] != [first for first, _ in covered[1:]] + [outputs] or covered[0][0] != 0:
        what = f"has {outputs} outputs, and its tensors hold rows {', '.join(map(str, covered))} of it"
        placer.problem(module, what)
        return
    scaling = placer.config.scaling(module)
    placer.found.scalings.add(scaling)
    placer.found.ranks.add(a.shape[0])
    for part in slices:
        if not _fits(placer, module, part, (outputs, a.shape[1])) or not placer.target_is_float(module, part.key):
            return
        step = Step(
            placer.found.position,
            "lora" if magnitude is None else "dora",
            scaling * placer.found.weight,
            a,
            b.rows(*part.rows),
            None if magnitude is None else _rows_of(placer.ref(magnitude), *part.rows),
            rows=None if part.disk_rows == (0, placer.base.tensors[part.key][1].shape[0]) else part.disk_rows,
        )
        placer.found.steps.setdefault(part.key, []).append(step)


def _fits(placer: Placer, module: str, part: Slice, logical: tuple[int, int]) -> bool:
    stored = placer.base.tensors[part.key][1].shape
    rows = part.rows[1] - part.rows[0]
    right = part.expert is None and not part.transposed and len(stored) == 2
    if (
        right
        and part.rows[1] <= logical[0]
        and stored[1] == logical[1]
        and part.disk_rows[1] - part.disk_rows[0] == rows
    ):
        return True
    placer.problem(module, f"is for {logical} (out, in) and does not fit its rows of {part.key} {stored}")
    return False


def _rows_of(vector: TensorRef, first: int, last: int) -> TensorRef:
    start = vector.start + vector.dtype.nbytes(first)
    return replace(vector, shape=(last - first,), start=start)

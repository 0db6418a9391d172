"""What one adapter contributes to which keys of the base: names, orientation and shapes decided.

Every tensor of the adapter ends in exactly one contribution, or in a problem that names it.
"""

from __future__ import annotations

from collections.abc import Mapping

from inlay.adapters.adapter import Adapter
from inlay.checkpoints.checkpoint import Checkpoint
from inlay.checkpoints.header import TensorInfo
from inlay.keys import families
from inlay.keys.memory import Slice
from inlay.keys.names import Names
from inlay.plan import dense, experts, fused
from inlay.plan.placer import Contribution, Placer
from inlay.plan.types import Part, Rows, Step

PAIRS = ({"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"})


def contribute(adapter: Adapter, position: int, weight: float, base: Checkpoint) -> Contribution:
    """Place every tensor of the adapter."""
    found = Contribution(adapter, position, weight)
    names = [f"{module}.weight" for module in adapter.parts] or list(adapter.full)
    shapes = {key: info.shape for key, (_, info) in base.tensors.items()}
    place = _Pairs(found, base, Names(base.config, shapes, names))
    for module, parts in place.without_parameters(adapter.parts).items():
        place.module(module, parts)
    for name, tensor in adapter.full.items():
        place.full_copy(name, tensor)
    found.rule, found.hint = str(place.names.rule), place.names.unavailable
    if place.names.used_layout:
        found.rule += ", and as transformers maps them from memory to disk"
    return found


class _Pairs(Placer):
    """Places low-rank pairs and full copies, and hands the rest to the files that know it."""

    def without_parameters(
        self, modules: Mapping[str, Mapping[str, TensorInfo]]
    ) -> Mapping[str, Mapping[str, TensorInfo]]:
        """The modules that are left when those with LoRA on bare parameters have been placed."""
        if not self.config.target_parameters:
            return modules
        done = {m for m, wrappers in experts.wrapped(modules).items() if experts.place(self, m, wrappers)}
        for name, parts in modules.items():
            if experts.plain_module(name) in done and "lora_A" not in parts:
                self.problem(name, f"has {', '.join(sorted(parts))} and no lora_A; parameters take pairs")
        return {name: parts for name, parts in modules.items() if experts.plain_module(name) not in done}

    def module(self, module: str, parts: Mapping[str, TensorInfo]) -> None:
        """Place the parts of one module."""
        if not self.parts_are_numbers(module, parts):
            return
        if "token_rows" in parts:
            self._token_rows(module, parts["token_rows"])
        names = {name for name in parts if name != "token_rows"}
        if not names:
            return
        if self.config.tuner not in ("lora", "dora"):
            dense.place(self, module, {name: parts[name] for name in names})
            return
        pair = next((p for p in PAIRS if p <= names), None)
        extra = names - (pair or set()) - {"magnitude", "lora_bias"}
        if pair is None or extra:
            missing = sorted((next((p for p in PAIRS if p & names), PAIRS[0])) - names)
            self.problem(module, f"incomplete: has {', '.join(sorted(names))}, lacks {', '.join(missing) or 'nothing'}")
            return
        slices = self._fused(module)
        if slices:
            fused.place(self, module, parts, slices)
            return
        key = self.weight_key(module)
        if key is None:
            return
        step = self._step(module, key, parts, embedding="lora_embedding_A" in pair)
        if step is not None:
            self.found.steps.setdefault(key, []).append(step)
        if "lora_bias" in names:
            self._bias(module, parts["lora_bias"])

    def _fused(self, module: str) -> tuple[Slice, ...]:
        """What holds the module's weight, if that is not one tensor of its own."""
        name = module.replace(".base_layer.", ".") + ".weight"
        key = self.names.rule.key(name)
        if key in self.base.tensors or key == self.tied_head() or self.names.key(name) in self.base.tensors:
            return ()
        return self.names.slices(name)

    def _step(self, module: str, key: str, parts: Mapping[str, TensorInfo], embedding: bool) -> Step | None:
        shape = self.shape(key)
        if not self.target_is_float(module, key):
            return None
        oriented = (self._embedding if embedding else self._pair)(module, shape, parts)
        if oriented is None:
            return None
        left, right, axis = oriented
        rank = right.shape[0]
        if not self.rank_agrees(module, rank):
            return None
        magnitude = parts.get("magnitude")
        if not self.magnitude_fits(module, magnitude, shape[0] if axis == 1 else shape[-1]):
            return None
        scaling = self.config.scaling(module) * self.found.weight
        self.found.scalings.add(self.config.scaling(module))
        self.found.ranks.add(rank)
        if magnitude is None:
            return Step(self.found.position, "lora", scaling, right, left)
        return Step(self.found.position, "dora", scaling, right, left, self.ref(magnitude), axis)

    def _embedding(
        self, module: str, shape: tuple[int, ...], parts: Mapping[str, TensorInfo]
    ) -> tuple[Part, Part, int] | None:
        """A (r, vocabulary), B (dimension, r) on a weight stored (vocabulary, dimension)."""
        a, b = parts["lora_embedding_A"], parts["lora_embedding_B"]
        if not self._two_dimensional(module, a, b):
            return None
        if (a.shape[1], b.shape[0]) != shape:
            self.problem(module, f"fits ({a.shape[1]}, {b.shape[0]}), the base has {shape}")
            return None
        return Part.of(self.ref(a)).turned, Part.of(self.ref(b)).turned, 0

    def _pair(
        self, module: str, shape: tuple[int, ...], parts: Mapping[str, TensorInfo]
    ) -> tuple[Part, Part, int] | None:
        """A (r, in), B (out, r) on a weight stored (out, in) or (in, out); kernels are flattened."""
        a, b = parts["lora_A"], parts["lora_B"]
        if self.adapter.turned:
            return self._turned_pair(module, shape, Part.of(self.ref(a)).turned, Part.of(self.ref(b)).turned)
        if len(shape) > 2 and len(a.shape) == len(shape):
            fits = (b.shape[0], *a.shape[1:])
            flat = all(n == 1 for n in b.shape[2:]) and b.shape[1] == a.shape[0]
            if fits != shape or not flat:
                self.problem(module, f"A {a.shape} and B {b.shape} do not fit the base's {shape}")
                return None
            return Part.of(self.ref(b)), Part.of(self.ref(a)), 1
        if not self._two_dimensional(module, a, b):
            return None
        transposed = self._transposed(module, shape, (b.shape[0], a.shape[1]))
        if transposed is None:
            return None
        if transposed:
            return Part.of(self.ref(a)).turned, Part.of(self.ref(b)).turned, 0
        return Part.of(self.ref(b)), Part.of(self.ref(a)), 1

    def _turned_pair(self, module: str, shape: tuple[int, ...], a: Part, b: Part) -> tuple[Part, Part, int] | None:
        """A and B of MLX, as views in PEFT's orientation; MLX has Linear layers only, stored (out, in)."""
        if families.is_embedding(module):  # (vocabulary, r) and (r, width): not the transposes of a Linear layer's
            self.problem(module, "LoRA of MLX on an embedding is not supported")
            return None
        two = len(a.ref.shape) == len(b.ref.shape) == 2
        if two and a.shape[0] == b.shape[1] > 0 and (b.shape[0], a.shape[1]) == shape:
            return b, a, 1
        self.problem(module, f"lora_a {a.ref.shape} and lora_b {b.ref.shape} do not fit the base's {shape}")
        return None

    def _two_dimensional(self, module: str, a: TensorInfo, b: TensorInfo) -> bool:
        if len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] > 0:
            return True
        self.problem(module, f"A {a.shape} and B {b.shape} are not a pair (r, in), (out, r)")
        return False

    def _transposed(self, module: str, shape: tuple[int, ...], logical: tuple[int, int]) -> bool | None:
        """Whether the weight is stored (in, out); a square one is never guessed."""
        declared = families.stored_transposed(self.model_type, module)
        plain, turned = shape == logical, shape == logical[::-1]
        if declared is not None:
            plain, turned = plain and not declared, turned and declared
        if plain != turned:
            return turned
        if not plain:
            self.problem(module, f"is for {logical} (out, in), the base stores {shape}")
            return None
        if not self.config.fan_in_fan_out:
            return False
        if (known := self._siblings_transposed()) is not None:
            return known
        self.problem(
            module,
            f"{shape} is square and fan_in_fan_out is set, so its orientation cannot be known; set fan_in_fan_out to "
            "what the layer type is (true for Conv1D only) and give config.json its model_type",
        )
        return None

    def _siblings_transposed(self) -> bool | None:
        """How this adapter's other modules lie, where their shapes leave no doubt."""
        for module, parts in self.adapter.parts.items():
            key = self.names.rule.key(module + ".weight")
            if {"lora_A", "lora_B"} <= parts.keys() and key in self.base.tensors:
                shape = self.base.tensors[key][1].shape
                logical = (parts["lora_B"].shape[0], parts["lora_A"].shape[-1])
                if len(shape) == 2 and shape[0] != shape[1] and shape in (logical, logical[::-1]):
                    return shape != logical
        return None

    def _bias(self, module: str, tensor: TensorInfo) -> None:
        """LoRA's own bias is scaled and added to the layer's."""
        key = self.names.key(module + ".bias")
        if key not in self.base.tensors:
            self.problem(module, f"has a LoRA bias, but the base has no {key} to add it to")
        elif self.base.tensors[key][1].shape != tensor.shape:
            self.problem(module, f"LoRA bias {tensor.shape}, the base's bias {self.base.tensors[key][1].shape}")
        else:
            scaling = self.config.scaling(module) * self.found.weight
            self.found.steps.setdefault(key, []).append(
                Step(self.found.position, "lora", scaling, Part.of(self.ref(tensor)))
            )

    def _token_rows(self, module: str, tensor: TensorInfo) -> None:
        ids = self._token_ids(module)
        key = self.weight_key(module)
        if key is None:
            return
        shape = self.shape(key)
        if ids is None:
            self.problem(module, "has trained token rows, but trainable_token_indices names none for it")
        elif len(shape) != 2 or tensor.shape != (len(ids), shape[1]):
            self.problem(module, f"token rows {tensor.shape} do not fit {len(ids)} indices into {shape}")
        elif self.target_is_float(module, key):
            self.found.rows[key] = Rows(self.found.position, self.ref(tensor), ids)

    def _token_ids(self, module: str) -> tuple[int, ...] | None:
        table: Mapping[str, tuple[int, ...]] = self.config.trainable_token_indices
        for name, ids in table.items():
            if name and (module == name or module.endswith("." + name)):
                return ids
        return table.get("") or next(iter(table.values()), None)

    def full_copy(self, name: str, tensor: TensorInfo) -> None:
        """Place a tensor that replaces one of the base, or is new."""
        key = self.names.key(name.replace(".base_layer.", "."))
        if not tensor.dtype.mergeable:
            self.problem(name, f"a full copy of type {tensor.dtype.name} is not supported")
        elif key in self.base.tensors:
            self._replace(name, key, tensor)
        elif key == self.tied_head() or self._is_saved(name):
            self._take(name, key, tensor)
        else:
            self.problem(
                name, self.names.why_not(name.replace(".base_layer.", ".")) + "; not in modules_to_save either"
            )

    def _replace(self, name: str, key: str, tensor: TensorInfo) -> None:
        shape = self.base.tensors[key][1].shape
        resized = len(shape) == 2 and tensor.shape[1:] == shape[1:] and _is_vocabulary(key)
        if tensor.shape != shape and not resized:
            self.problem(name, f"full copy {tensor.shape}, the base has {shape}")
        elif self.target_is_float(name, key):
            self._take(name, key, tensor)

    def _take(self, name: str, key: str, tensor: TensorInfo) -> None:
        self.found.copies[key] = self.ref(tensor)
        if self._is_saved(name):
            self.found.saved.add(key)

    def _is_saved(self, name: str) -> bool:
        path = name.split(".")
        return any(saved.split(".")[-1] in path[:-1] for saved in self.config.modules_to_save)


def _is_vocabulary(key: str) -> bool:
    """Whether the rows of this weight are tokens, whose number may change."""
    return key in families.HEADS or families.is_embedding(key.removesuffix(".weight"))

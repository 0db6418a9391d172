"""What one adapter contributes to which keys of the base: names, orientation and shapes decided.

Every tensor of the adapter ends in exactly one contribution, or in a problem that names it.
"""

from __future__ import annotations

from collections.abc import Mapping

from inlay.adapters.adapter import IMAGE, TORCHTUNE, Adapter
from inlay.checkpoints.checkpoint import Checkpoint
from inlay.checkpoints.refs import TensorInfo
from inlay.errors import Problem
from inlay.keys import families, torchtune
from inlay.keys.memory import Slice
from inlay.keys.names import Names
from inlay.keys.pipeline import PipelineNames
from inlay.plan import dense, experts, fused
from inlay.plan.placer import Contribution, Placer
from inlay.plan.steps import Part, Rows, Step

PAIRS = ({"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"})


def contribute(adapter: Adapter, position: int, weight: float, base: Checkpoint) -> Contribution:
    """Place every tensor of the adapter."""
    found = Contribution(adapter, position, weight)
    if reason := _not_for_this_base(adapter, base):
        found.problems.append(Problem(adapter.name, reason))
        return found
    names = [f"{module}.weight" for module in adapter.parts] or list(adapter.full)
    shapes = {key: info.shape for key, (_, info) in base.tensors.items()}
    pipeline = PipelineNames(base.components, shapes, names) if base.components else None
    place = _Pairs(found, base, pipeline or Names(base.config, shapes, names))
    for module, parts in place.without_parameters(adapter.parts).items():
        place.module(module, parts)
    for name, tensor in adapter.full.items():
        place.full_copy(name, tensor)
    found.rule, found.hint = str(place.names.rule), place.names.unavailable
    if place.names.used_layout:
        found.rule += ", and as transformers maps them from memory to disk"
    return found


def _not_for_this_base(adapter: Adapter, base: Checkpoint) -> str | None:
    """Why no name of the adapter can be looked for in this base."""
    if adapter.format == IMAGE and not base.components:
        return (
            "is a LoRA for an image model (kohya, diffusers), and this base is no diffusers pipeline; give the folder "
            "with its model_index.json with --model"
        )
    if adapter.format == TORCHTUNE and base.config.get("model_type") not in torchtune.FAMILIES:
        return (
            f"is torchtune's own file, whose names are known for {', '.join(sorted(torchtune.FAMILIES))}; this base is "
            f"{base.config.get('model_type')!r}: give the PEFT files that torchtune writes, in a folder without the .pt"
        )
    return None


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
        if not names or self._reached_before(module):
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
        if self.adapter.format == TORCHTUNE and torchtune.is_permuted(self.model_type, module):
            self._permuted(module, key, parts)
            return
        step = self._step(module, key, parts, embedding="lora_embedding_A" in pair)
        if step is not None:
            self.found.steps.setdefault(key, []).append(step)
        if "lora_bias" in names:
            self._bias(module, parts["lora_bias"])

    def _reached_before(self, module: str) -> bool:
        """Whether another module of a file for image models, which may spell one in two ways, has the same weight."""
        if self.adapter.format != IMAGE:
            return False
        key = self.names.key(module + ".weight")
        if key not in self.base.tensors or self.owners.setdefault(key, module) == module:
            return False
        self.problem(module, f"is the same module as {self.owners[key]} ({key}); the file holds it twice")
        return True

    def _permuted(self, module: str, key: str, parts: Mapping[str, TensorInfo]) -> None:
        """A pair of torchtune whose outputs have another order than the rows of the base: one step for half a head."""
        a, b = Part.of(self.ref(parts["lora_A"])), Part.of(self.ref(parts["lora_B"]))
        shape, width = self.shape(key), torchtune.head_width(self.base.config)
        if "magnitude" in parts:
            self.problem(module, "DoRA on rows that torchtune has in another order is not supported")
        elif not width or width % 2 or shape[0] % width:
            self.problem(module, f"{shape[0]} rows are no heads of {width}; give config.json its head_dim")
        elif not self._two_dimensional(module, parts["lora_A"], parts["lora_B"]):
            return
        elif (b.shape[0], a.shape[1]) != shape:
            self.problem(module, f"is for {(b.shape[0], a.shape[1])} (out, in), the base stores {shape}")
        elif self.target_is_float(module, key) and self.rank_agrees(module, a.shape[0]):
            scaling = self.config.scaling(module)
            self.found.scalings.add(scaling)
            self.found.ranks.add(a.shape[0])
            for part in torchtune.stretches(shape[0], width):
                rank = a.shape[0]
                left = Part(b.ref, (part.end - part.begin, rank), part.first * rank, (2 * rank, 1))
                step = Step(
                    self.found.position, "lora", scaling * self.found.weight, a, left, rows=(part.begin, part.end)
                )
                self.found.steps.setdefault(key, []).append(step)

    def _fused(self, module: str) -> tuple[Slice, ...]:
        """What holds the module's weight, if that is not one tensor of its own."""
        if self.adapter.format == TORCHTUNE and self.model_type in torchtune.FUSED:
            return torchtune.fused(module, self.base.config, self.names.shapes)
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
        left, right, natural = oriented
        axis = self._norm_axis(module, shape, parts.get("magnitude"), natural)
        if axis is None:
            return None
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

    def _norm_axis(self, module: str, shape: tuple[int, ...], magnitude: TensorInfo | None, natural: int) -> int | None:
        """The stored axis along which DoRA's norm goes; LyCORIS may give each input its length, dora_scale (1, in)."""
        if magnitude is None or not magnitude.key.endswith(".dora_scale") or magnitude.shape[:1] == shape[:1]:
            return natural
        if len(shape) == 2 and magnitude.shape == (1, shape[1]):
            return 0
        what = (
            "over the inputs of a convolution is not supported; train with wd_on_output"
            if len(shape) > 2
            else (f"does not fit the base's {shape}")
        )
        self.problem(module, f"dora_scale {magnitude.shape} {what}")
        return None

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
        if self.adapter.format == IMAGE and _is_matrix(shape) and _is_matrix(a.shape) and _is_matrix(b.shape):
            # A 1 × 1 convolution is a matrix, and is trained as either.
            if (b.shape[0], a.shape[1]) == shape[:2] and a.shape[0] == b.shape[1] > 0:
                return Part.of(self.ref(b)), Part.of(self.ref(a)), 1
            self.problem(module, f"A {a.shape} and B {b.shape} do not fit the base's {shape}")
            return None
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


def _is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether nothing is left beyond rows and columns: a matrix, or a kernel of one element."""
    return len(shape) > 1 and all(n == 1 for n in shape[2:])


def _is_vocabulary(key: str) -> bool:
    """Whether the rows of this weight are tokens, whose number may change."""
    return key in families.HEADS or families.is_embedding(key.removesuffix(".weight"))

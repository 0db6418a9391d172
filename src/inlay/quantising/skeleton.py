"""A model's class without weights: those of one layer at a time are put into it and taken out again.

Parameters are on the meta device, buffers (rotary frequencies, mostly) are real. Parameters have the names and shapes
of the memory, which `keys.memory` describes in slices of the tensors on disk; here these are read and written back.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from inlay.checkpoints.checkpoint import Checkpoint
from inlay.checkpoints.refs import TensorRef
from inlay.checkpoints.spans import BASE, SpanReader
from inlay.dtypes import decode32
from inlay.errors import InputError
from inlay.extras import needs
from inlay.keys.memory import IGNORED, Slice, memory_layout

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

Module = Any  # torch.nn.Module: torch is not there when types are checked


class Skeleton:
    """The model of a checkpoint, and what of it is materialised.

    `layers` are the decoder's, `prefixes` their names. Raises InputError for a class that cannot be taken apart so.
    """

    def __init__(self, base: Checkpoint, reader: SpanReader) -> None:
        self.base = base
        self._reader = reader
        self.model = _without_weights(base)
        layout = memory_layout(base.config, {key: t.shape for key, (_, t) in base.tensors.items()})
        assert layout is not None  # the class is known: it was built
        self._slices: Mapping[str, tuple[Slice, ...]] = layout.slices
        self._refused = layout.refused
        self.names = {id(p): name for name, p in self.model.named_parameters(remove_duplicate=False)}
        self.decoder = self.model.get_decoder()
        self.prefixes, self.layers = self._find_layers()
        self.loaded: int = 0  # parameters (numbers) that are materialised
        self.most_loaded = 0

    def _find_layers(self) -> tuple[list[str], list[Module]]:
        """The list of as many modules as the config has layers."""
        import torch

        count = self.decoder.config.num_hidden_layers
        within = next(name for name, m in self.model.named_modules() if m is self.decoder)
        for name, module in self.decoder.named_children():
            if isinstance(module, torch.nn.ModuleList) and len(module) == count:
                whole = ".".join(part for part in (within, name) if part)
                return [f"{whole}.{i}." for i in range(count)], list(module)
        kind = type(self.decoder).__name__
        raise InputError(f"{kind} has no list of {count} layers, so it cannot be quantised layer by layer")

    def slices(self, name: str) -> tuple[Slice, ...]:
        """The tensors on disk that a parameter is made of."""
        if name in self._refused:
            raise InputError(f"{name} cannot be made of what is stored: {self._refused[name]}")
        if name not in self._slices:
            raise InputError(f"{self.base.path}: has no tensor for {name}; it is not whole")
        return self._slices[name]

    @contextmanager
    def around_the_layers(self) -> Iterator[None]:
        """Within, what the decoder has besides its layers is there: embeddings, the last norm."""
        inside = {id(p) for layer in self.layers for p in layer.parameters()}
        names = [self.names[id(p)] for p in self.decoder.parameters() if id(p) not in inside]
        self._load(names)
        try:
            yield
        finally:
            self._unload(names)

    @contextmanager
    def layer(self, number: int) -> Iterator[Module]:
        """Within, the parameters of this layer are there, in float32."""
        names = [self.prefixes[number] + name for name, _ in self.layers[number].named_parameters()]
        self._load(names)
        try:
            yield self.layers[number]
        finally:
            self._unload(names)

    def _load(self, names: list[str]) -> None:
        import torch

        for name in names:
            owner, _, leaf = name.rpartition(".")
            made = torch.nn.Parameter(torch.from_numpy(self._read(name)), requires_grad=False)
            setattr(self.model.get_submodule(owner), leaf, made)
            self.loaded += int(made.numel())
        self.most_loaded = max(self.most_loaded, self.loaded)

    def _unload(self, names: list[str]) -> None:
        import torch

        for name in names:
            owner, _, leaf = name.rpartition(".")
            held = self.model.get_parameter(name)
            setattr(self.model.get_submodule(owner), leaf, torch.nn.Parameter(held.to("meta"), requires_grad=False))
            self.loaded -= held.numel()

    def _read(self, name: str) -> npt.NDArray[np.float32]:
        """A parameter in float32, put together of its slices."""
        shape = tuple(self.model.get_parameter(name).shape)
        made = np.empty(shape, np.float32)
        for piece in self.slices(name):
            shard, info = self.base.tensors[piece.key]
            stored = self._reader.whole(TensorRef.of(BASE, shard.file, info))
            values = decode32(stored, info.dtype)
            if piece.transposed:
                made[:] = values.swapaxes(-1, -2)
            elif not shape:
                made[()] = values.reshape(())
            else:
                target = made if piece.expert is None else made[piece.expert]
                rows = values[piece.disk_rows[0] : piece.disk_rows[1]]
                target[piece.rows[0] : piece.rows[1]] = rows.reshape(-1, *target.shape[1:])
        return made

    def on_disk(self, names: set[str]) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
        """Keys that hold rows of these parameters, with the whole tensors as they are in memory now."""
        pieces: dict[str, list[tuple[str, Slice]]] = defaultdict(list)
        for name, slices in self._slices.items():
            for piece in slices:
                pieces[piece.key].append((name, piece))
        for key in dict.fromkeys(piece.key for name in names for piece in self.slices(name)):
            made = np.empty(self.base.tensors[key][1].shape, np.float32)
            for name, piece in pieces[key]:
                values = self.model.get_parameter(name).numpy()
                source = values if piece.expert is None else values[piece.expert]
                made[piece.disk_rows[0] : piece.disk_rows[1]] = source[piece.rows[0] : piece.rows[1]]
            yield key, made

    def layer_nbytes(self) -> int:
        """Bytes of the largest layer in float32."""
        counts = [sum(math.prod(p.shape) for p in layer.parameters()) for layer in self.layers]
        return int(4 * max(counts))


def model_class(config: Mapping[str, Any], where: Path) -> Any:
    """The class that config.json names. Raises InputError where transformers does not have it."""
    with needs("quant", "calibration"):
        import transformers
    named = str((config.get("architectures") or [""])[0])
    found = getattr(transformers, named, None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise InputError(f"{where}: transformers has no model class {named!r}, which config.json names")
    return found


def make_config(config: Mapping[str, Any]) -> Any:
    """The config object for a config.json, without what it says of quantisation."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise InputError(f"transformers does not know model_type {kind!r}")
    made = CONFIG_MAPPING[kind].from_dict(_kept(config))
    # The grouped products of experts would hide from tracing which rows are read by which matrix.
    made._experts_implementation = "eager"
    return made


def _kept(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _kept(v) if isinstance(v, Mapping) else v for k, v in config.items() if k not in IGNORED}


def _without_weights(base: Checkpoint) -> Module:
    with needs("quant", "calibration"):
        import torch
    cls, config = model_class(base.config, base.path), make_config(base.config)
    every_module: Any = torch.nn.Module
    register = every_module.register_parameter

    def on_meta(module: Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else torch.nn.Parameter(parameter.detach().to("meta"), False))

    every_module.register_parameter = on_meta  # a device context would put the buffers on meta too
    try:
        model = cls(config).eval()
    except Exception as error:  # whatever a class of transformers raises on a config that it does not expect
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise InputError(f"transformers cannot build {cls.__name__} from this config.json: {reason:.200}") from error
    finally:
        every_module.register_parameter = register
    if not hasattr(model, "get_decoder") or not hasattr(model.get_decoder().config, "num_hidden_layers"):
        raise InputError(f"{cls.__name__} has no decoder, so it cannot be quantised layer by layer")
    return model

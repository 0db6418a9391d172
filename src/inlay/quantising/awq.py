"""AWQ: weights scaled along the channels that matter on real text, then rounded to 4 bits in groups.

Layer by layer, of which one is in memory at a time: what each matrix reads is measured on the calibration texts;
groups of matrices that read the same channels get a scale (`search`), whose reciprocal goes into what makes these
channels (`folding`), so that the layer computes what it did; groups of a row are clipped where that lessens the error;
then all is rounded, once. The next layer sees the outputs of the layer as it was, as in the authors' code.

    Lin et al. 2024, "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inlay.checkpoints.checkpoint import Checkpoint
from inlay.checkpoints.spans import BASE, SpanReader
from inlay.codecs import awq as codec
from inlay.dtypes import Array
from inlay.errors import InputError
from inlay.quantising import folding, search
from inlay.quantising.activations import Call, embed
from inlay.quantising.calibration import Text, calibration_blocks, read_tokenizer
from inlay.quantising.choice import Choice, choose
from inlay.quantising.folding import Fold
from inlay.quantising.observing import Observed, observe
from inlay.quantising.skeleton import Skeleton
from inlay.quantising.tracing import Group, trace
from inlay.quantising.writing import ShardWriter, write_sidecars

if TYPE_CHECKING:
    import torch

Module = Any
Progress = Callable[[int, int], None]  # layers that are done, layers there are

SEARCH_TOKENS = 4096  # on which scales are tried; their means come from all tokens
SAMPLED = 256  # weights of which a few rows are kept, to check the codes by
SAMPLED_ROWS = 8


@dataclass(frozen=True)
class Scaled:
    """A group of matrices: where its scale went (None: unscaled), and the error on the output of its piece of the layer
    by plain rounding and with the scale, as sums of squares before clipping."""

    readers: tuple[str, ...]
    source: str | None
    plain: float = 0.0
    scaled: float = 0.0


@dataclass
class Calibrated:
    """What was done: settings by key, modules left as they are, groups, rows (first, values) as they were encoded."""

    settings: Mapping[str, Mapping[str, Any]]
    excluded: tuple[str, ...]
    groups: list[Scaled] = field(default_factory=list)
    samples: dict[str, tuple[int, Array]] = field(default_factory=dict)
    tokens: int = 0
    most_parameters: int = 0  # numbers of the model that were in memory at once


def quantise_awq(
    base: Checkpoint, folder: Path, *, texts: Sequence[Text], bits: int = 4, group_size: int = 128, samples: int,
    max_length: int, keep: Sequence[str] = (), scale: bool = True, clip: bool = True, max_memory: int | None = None,
    progress: Progress | None = None,
) -> Calibrated:  # fmt: skip
    """Quantise a checkpoint in floats into `folder`, which is there and empty.

    Without `scale` and `clip` it is plain rounding to nearest. Raises InputError for what cannot be quantised.
    """
    if bits != codec.BITS:
        raise InputError(f"AWQ is written with {codec.BITS} bits, not {bits}; gptq has others")
    blocks = calibration_blocks(read_tokenizer(base.path), texts, samples, max_length)
    with SpanReader({BASE: base.path}) as reader:
        skeleton = Skeleton(base, reader)
        _check_blocks(skeleton, blocks)
        chosen = choose(skeleton, codec, {"group_size": group_size}, keep)
        _check_memory(skeleton, blocks, max_memory)
        made = Calibrated(chosen.settings, chosen.excluded, tokens=sum(map(len, blocks)))
        with ShardWriter(base, reader, folder, codec, chosen.settings) as writer:
            _Run(skeleton, chosen, group_size, scale, clip, writer, made).all(blocks, progress or (lambda *_: None))
            writer.finish()
        made.most_parameters = skeleton.most_loaded
    one = next(iter(chosen.settings.values()))
    write_sidecars(base, folder, codec.config(one, list(chosen.excluded)))
    return made


def _check_blocks(skeleton: Skeleton, blocks: Sequence[Sequence[int]]) -> None:
    rows = skeleton.model.get_input_embeddings().weight.shape[0]
    largest = max(map(max, blocks))
    if largest >= rows:
        raise InputError(f"the tokenizer gives token {largest}, and the model has {rows}; they do not belong together")


def _check_memory(skeleton: Skeleton, blocks: Sequence[Sequence[int]], cap: int | None) -> None:
    """Hidden states of all blocks, a layer three times (as it is, scaled, rounded), and inputs for the search."""
    width = skeleton.model.get_input_embeddings().weight
    tokens = sum(map(len, blocks))
    largest = skeleton.layer_nbytes()
    around = 4 * width.numel() + largest
    needed = 4 * tokens * width.shape[1] + max(3 * largest + 40 * min(tokens, SEARCH_TOKENS) * width.shape[1], around)
    if cap is not None and needed > cap:
        raise InputError(
            f"calibration needs about {needed:,} bytes of memory, {cap:,} are allowed: {tokens} tokens take "
            f"{4 * tokens * width.shape[1]:,}, the largest layer {largest:,}; lower --quant_n_samples or --max_length"
        )


@dataclass
class _Run:
    """The layers one after the other."""

    skeleton: Skeleton
    chosen: Choice
    group_size: int
    scale: bool
    clip: bool
    writer: ShardWriter
    made: Calibrated

    @cached_property
    def sampled(self) -> frozenset[str]:
        """Keys of which some rows are kept, spread over the model."""
        keys = list(self.chosen.settings)
        return frozenset(keys[:: max(1, len(keys) // SAMPLED)])

    def all(self, blocks: Sequence[Sequence[int]], progress: Progress) -> None:
        import torch

        with torch.no_grad():
            calibrated = self.scale or self.clip
            hidden, calls = embed(self.skeleton, blocks) if calibrated else (torch.empty(0), [])
            for number in range(len(self.skeleton.layers)):
                progress(number, len(self.skeleton.layers))
                with self.skeleton.layer(number) as layer:
                    touched = self._calibrate(number, layer, calls[number], hidden) if calibrated else set()
                    self._write(number, touched)
            progress(len(self.skeleton.layers), len(self.skeleton.layers))

    def _mine(self, number: int, names: Sequence[str]) -> list[str]:
        """Those names of a layer's parameters that are quantised."""
        return [name for name in names if self.skeleton.prefixes[number] + name in self.chosen.parameters]

    def _calibrate(self, number: int, layer: Module, call: Call, hidden: torch.Tensor) -> set[str]:
        """Scale and clip the layer, replace its inputs by its outputs; the parameters that changed."""
        first = hidden[:1].clone()

        def run() -> torch.Tensor:
            return call(layer, first)

        traced = trace(layer, run)
        groups = [group for group in traced.groups if self._mine(number, group.names)]
        folds = [self._fold(number, layer, group, traced, run) for group in groups]
        matrices = {name: p for name, p in layer.named_parameters() if p.dim() == 2}
        unclipped: set[str] = set()
        for group in groups if self.clip else []:
            unclipped |= folding.interchangeable(layer, [n for n in group.names if n in matrices], run)
        seen = observe(layer, groups, call, hidden, SEARCH_TOKENS)
        touched: set[str] = set()
        reciprocal: dict[str, torch.Tensor] = {}
        for group, fold in zip(groups, folds, strict=True):
            if fold is None:
                self.made.groups.append(Scaled(group.names, None))
            else:
                scale = self._scale(number, layer, group, fold, seen)
                touched |= {*fold.readers, fold.source, fold.bias} & set(dict(layer.named_parameters()))
                reciprocal |= dict.fromkeys(fold.readers, scale)
        for group in groups if self.clip else []:
            for name in self._mine(number, group.names):
                if name in seen.inputs and name not in unclipped:
                    x = seen.inputs[name] / reciprocal.get(name, 1)
                    matrices[name].data = search.clipped(matrices[name].data, x, self._columns(x))
        return touched

    def _columns(self, x: torch.Tensor) -> int:
        """Columns of a group."""
        return self.group_size if self.group_size > 0 else x.shape[-1]

    def _fold(self, number: int, layer: Module, group: Group, traced: Any, run: Callable[[], Any]) -> Fold | None:
        fold = folding.find_fold(layer, group, traced, run) if self.scale else None
        # Rows of a matrix that stays in 16 bits would be rounded by taking a scale over.
        if fold is not None and fold.offset is None and not self._mine(number, [fold.source]):
            return None
        return fold

    def _scale(self, number: int, layer: Module, group: Group, fold: Fold, seen: Observed) -> torch.Tensor:
        """Find the scale of a group and fold it."""
        key = self.skeleton.slices(self.skeleton.prefixes[number] + fold.source)[0].key
        stored = self.skeleton.base.tensors[key][1].dtype

        def allowed(scale: torch.Tensor) -> torch.Tensor:
            return folding.storable(layer, fold, scale, stored)

        mean = folding.share(fold, seen.means[group])
        names = self._mine(number, group.names)
        scale, errors = search.best_scale(
            dict(layer.named_parameters()), names, mean, self._columns(mean), lambda: seen.outputs(group), allowed
        )
        folding.apply(layer, fold, scale)
        self.made.groups.append(Scaled(group.names, fold.source, errors[0], min(errors)))
        return scale

    def _write(self, number: int, touched: set[str]) -> None:
        prefix = self.skeleton.prefixes[number]
        mine = {name for name in self.chosen.parameters if name.startswith(prefix)}
        for key, weight in self.skeleton.on_disk(mine):
            if key not in self.chosen.settings:
                continue
            self.writer.put_weight(key, weight)
            if key in self.sampled:
                first = (len(weight) // 2) // SAMPLED_ROWS * SAMPLED_ROWS
                self.made.samples[key] = (first, weight[first : first + SAMPLED_ROWS].copy())
        for key, values in self.skeleton.on_disk({prefix + name for name in touched} - mine):
            self.writer.put_rounded(key, values)

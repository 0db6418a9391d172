"""One weight that is stored in codes: merged block after block, encoded, and its parts written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from inlay.checkpoints.refs import TensorInfo
from inlay.checkpoints.spans import SpanReader, byte_view
from inlay.codecs.compensation import compensated
from inlay.codecs.encoding import F32Array, encode_whole, row_blocks, stored_item
from inlay.codecs.table import codec
from inlay.dtypes import Array
from inlay.errors import InputError
from inlay.plan.memory import Tiling
from inlay.plan.types import Coded
from inlay.records.fingerprint import array_digest
from inlay.run.blocks import Blocks
from inlay.run.shard import Progress, Target


class Encoding:
    """The parts of one weight that lie in one output file, and their digests once they are written."""

    def __init__(
        self, parts: Sequence[Coded], places: Mapping[str, TensorInfo], reader: SpanReader, tiling: Tiling
    ) -> None:
        self.parts = parts
        self.first = parts[0]
        self.digests: dict[str, str] = {}
        self._places, self._reader = places, reader
        self._blocks = Blocks(self.first.weight, reader, tiling, by_rows=True)
        self._encoded = tiling.encoded
        self._form = codec(self.first.codec)

    def run(self, target: Target, progress: Progress) -> None:
        """Merge, encode and write. Raises InputError for a weight that the form cannot hold."""
        encoded = self.encoded()
        for part in self.parts:
            stored = encoded[part.part]
            fits = stored.shape == part.shape and stored.dtype == stored_item(part.dtype)
            assert fits, f"{part.key}: {stored.dtype} {stored.shape} for {part.dtype.name} {part.shape}"
            data = byte_view(stored if stored.flags.c_contiguous else stored.copy())
            target.write(data, self._places[part.key].start)
            self.digests[part.key] = array_digest(data, part.shape)
            progress(len(data))

    def encoded(self) -> dict[str, Array]:
        """All parts of the weight that are not kept."""
        try:
            return encode_whole(self._form, self.first.settings, self._values, self._known)
        except ValueError as error:
            raise InputError(f"{self.first.weight.key}: {error}. Nothing was written") from error

    def _values(self) -> Iterator[tuple[int, F32Array]]:
        """The merged weight, as many rows as are encoded together."""
        for first, last in row_blocks(self._blocks.rows, self._encoded):
            values = np.empty((last - first, self._blocks.cols), np.float32)
            base = np.empty_like(values) if self.first.compensate else None
            for block in self._blocks.of(first, last):
                values[block.first - first :][: len(block.out)] = block.out
                if base is not None:
                    base[block.first - first :][: len(block.out)] = block.raw.view(np.float32)
            yield first, values if base is None else self._compensated(first, values, base)

    def _compensated(self, first: int, merged: F32Array, base: F32Array) -> F32Array:
        known, settings = self._known(first, first + len(merged)), self.first.settings
        return compensated(self._form, self.first.codec, settings, first, merged, base, known)

    def _known(self, first: int, last: int) -> dict[str, Array]:
        kept = self.first.kept
        if not kept:
            return {}
        spans = self._form.spans(self.first.settings, first, last)
        return {part: self._reader.slice(ref, spans.get(part)) for part, ref in kept.items()}

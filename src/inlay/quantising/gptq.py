"""GPTQ through gptqmodel: codes of a column chosen so that they make up for the errors of the columns before.

    Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"

gptqmodel 7.6.0 does the work and writes the weights; symmetric and without `desc_act`, which is what vLLM loads. Files
beside the weights are those of the source. The whole model is loaded, in its stored type: unlike AWQ here, this is not
done one layer at a time.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from inlay.checkpoints.checkpoint import Checkpoint, open_checkpoint
from inlay.checkpoints.decoded import decode_checkpoint
from inlay.checkpoints.json_files import read_json_object
from inlay.checkpoints.refs import TensorRef
from inlay.checkpoints.spans import BASE, SpanReader
from inlay.codecs import packing
from inlay.errors import CheckFailed, CheckpointError, InputError
from inlay.extras import needs
from inlay.output.copying import copy_span
from inlay.quantising.awq import Calibrated
from inlay.quantising.calibration import Text, calibration_blocks, read_tokenizer
from inlay.quantising.writing import write_sidecars

FEWEST_TOKENS = 10  # of a block; gptqmodel drops shorter ones
# The thread pool of gptqmodel asks for two workers where a machine of two cores has one left, and stops.
WORKERS = {"GPTQMODEL_CPU_WORKERS": "2"}


def quantise_gptq(
    base: Checkpoint, folder: Path, *, texts: Sequence[Text], bits: int = 4, group_size: int = 128, samples: int,
    max_length: int, keep: Sequence[str] = (), max_memory: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Calibrated:  # fmt: skip
    """Quantise a checkpoint in floats into `folder`, which is there and empty.

    Raises InputError where gptqmodel is not installed, or cannot do what is asked.
    """
    if bits not in packing.BITS:
        raise InputError(f"GPTQ is written with {', '.join(map(str, packing.BITS))} bits, not {bits}")
    if max_memory is not None and base.nbytes > max_memory:
        raise InputError(
            f"gptqmodel loads the whole model, {base.nbytes:,} bytes, and {max_memory:,} are allowed; "
            "awq goes layer by layer"
        )
    for name, value in WORKERS.items():
        os.environ.setdefault(name, value)
    with needs("gptq", "gptq"):
        import optimum  # noqa: F401  # loading the result needs it
        from gptqmodel import GPTQModel, QuantizeConfig
    blocks = [
        b for b in calibration_blocks(read_tokenizer(base.path), texts, samples, max_length) if len(b) >= FEWEST_TOKENS
    ]
    if not blocks:
        raise InputError(
            f"the texts for calibration come to fewer than {FEWEST_TOKENS} tokens; give others with --dataset"
        )
    _check_groups(base, group_size)
    dynamic: dict[str, Any] | None = {f"-:.*(?:{pattern})": {} for pattern in keep} or None
    config = QuantizeConfig(bits=bits, group_size=group_size, sym=True, desc_act=False, dynamic=dynamic)
    inputs = [{"input_ids": block, "attention_mask": [1] * len(block)} for block in blocks]
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name.strip('.')}-gptq-") as work:
        _run(GPTQModel, config, base, inputs, work)
        _take_over(base, Path(work), folder)
    decoded = decode_checkpoint(open_checkpoint(folder))
    _check_values(folder, decoded)
    if progress is not None:
        progress(1, 1)
    settings = {key: e.settings for key, e in decoded.encodings.items()}
    return Calibrated(settings, tuple(_excluded(base, settings)), tokens=sum(map(len, blocks)))


def _run(library: Any, config: Any, base: Checkpoint, inputs: list[dict[str, Any]], work: str) -> None:
    try:
        with redirect_stdout(sys.stderr):  # its log and tables
            model = library.load(str(base.path), config, trust_remote_code=False, device="cpu")
            model.quantize(inputs, batch_size=1)
            model.save(work)
    except Exception as error:  # gptqmodel raises whatever its model definitions do
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise InputError(f"{base.path}: gptqmodel cannot quantise it: {type(error).__name__}: {reason:.300}") from error


def _check_groups(base: Checkpoint, group_size: int) -> None:
    if group_size != -1 and group_size < 1:
        raise InputError(f"a group has at least one column, not {group_size}; -1 stands for all of a row")
    layers = {k: t.shape for k, (_, t) in base.tensors.items() if ".layers." in k and len(t.shape) == 2}
    wrong = [(k, s) for k, s in layers.items() if group_size > 0 and s[1] % group_size]
    if wrong:
        key, shape = wrong[0]
        raise InputError(
            f"{key} has {shape[1]} columns, which groups of {group_size} do not fill ({len(wrong)} such weights); "
            "choose another group size"
        )


def _take_over(base: Checkpoint, work: Path, folder: Path) -> None:
    """The weights from what gptqmodel wrote, everything else from the source."""
    written = open_checkpoint(work)
    files = [shard.file for shard in written.shards] + ([written.index_file] if written.index_file else [])
    for file in files:
        assert not (folder / file).exists()
        with open(work / file, "rb") as read, open(folder / file, "wb") as write:
            copy_span(read.fileno(), 0, write.fileno(), 0, (work / file).stat().st_size)
            os.fsync(write.fileno())
    found = read_json_object(work / "config.json", CheckpointError).get("quantization_config")
    assert isinstance(found, dict), "gptqmodel wrote no quantization_config"
    write_sidecars(base, folder, found)


def _check_values(folder: Path, decoded: Any) -> None:
    """Every scale and the first rows of every weight must be numbers."""
    import numpy as np

    with SpanReader({BASE: folder}) as reader:
        for key in decoded.encodings:
            shard, info = decoded.checkpoint.tensors[key]
            if not np.isfinite(reader.rows(TensorRef.of(BASE, shard.file, info), 0, min(32, info.shape[0]))).all():
                raise CheckFailed(f"{key}: gptqmodel wrote scales that are no numbers")


def _excluded(base: Checkpoint, settings: dict[str, Any]) -> list[str]:
    """Matrices of the source that are matrices still."""
    return [k.removesuffix(".weight") for k, (_, t) in base.tensors.items() if len(t.shape) == 2 and k not in settings]

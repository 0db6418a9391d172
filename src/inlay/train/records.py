"""What a run leaves behind, besides the weights.

output/v3-20261125-101500/
  args.json           the recipe, versions, what was resolved and counted
  logging.jsonl       one line for each log: step, epoch, loss, learning_rate, …
  images/*.png        curves of what was logged
  checkpoint-100/     adapter_config.json, adapter_model.safetensors, tokenizer, args.json, inlay_base.json
  last, best          links to checkpoints; best by the loss on the rows that are held out
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from inlay import __version__
from inlay.adapters.adapter import ARGS, FINGERPRINT, Adapter, read_adapter
from inlay.checkpoints.checkpoint import Checkpoint, open_checkpoint
from inlay.checkpoints.json_files import read_json_object
from inlay.checkpoints.refs import TensorRef
from inlay.checkpoints.spans import BASE
from inlay.errors import InlayError, InputError, OutputError, first_line
from inlay.plan.build import make_plan
from inlay.plan.sidecars import CHAT_TEMPLATE, TOKENIZER_FILES
from inlay.plan.types import Plan
from inlay.records.fingerprint import make_fingerprint

LOG = "logging.jsonl"
IMAGES = "images"
LAST, BEST = "last", "best"
STATE = "trainer_state.json"
OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_0", "latest")  # FSDP whole and in parts; DeepSpeed
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
CURVES = ("loss", "learning_rate", "grad_norm", "eval_loss")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_VERSION = re.compile(r"v(\d+)-\d{8}-\d{6}")


def new_run_folder(output_dir: str, add_version: bool) -> Path:
    """`output_dir/vN-YYYYMMDD-HHMMSS`, made, with N one above the largest that is there; or `output_dir` itself.

    Raises OutputError when it cannot be made, or holds a run already.
    """
    root = Path(output_dir)
    try:
        root.mkdir(parents=True, exist_ok=True)
        if add_version:
            taken = [int(m[1]) for p in root.iterdir() if (m := _VERSION.fullmatch(p.name))]
            root = root / f"v{max(taken, default=-1) + 1}-{time.strftime('%Y%m%d-%H%M%S')}"
            root.mkdir()
        elif (root / ARGS).exists() or any(root.glob("checkpoint-*")):
            raise OutputError(
                f"{root}: holds a run already; go on with it (--resume_from_checkpoint), or give another --output_dir"
            )
    except FileExistsError as error:
        raise OutputError(f"{root}: is there already, and is no new folder for a run") from error
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{root}: cannot be made: {error.strerror or error}") from error
    return root


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {"inlay": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def read_checkpoint(path: str) -> tuple[Path, dict[str, Any]]:
    """A checkpoint to go on from, and its `args.json`. Raises InputError where it is not whole."""
    folder = Path(path).resolve()  # `last` is a link
    if not folder.is_dir():
        raise InputError(f"--resume_from_checkpoint {path}: no such folder")
    missing = [name for name in (ARGS, STATE, "scheduler.pt") if not (folder / name).is_file()]
    if not any((folder / name).exists() for name in OPTIMIZERS):
        missing.append(OPTIMIZERS[0])
    if missing:
        inner = sorted(p.name for p in folder.glob("checkpoint-*"))
        cure = f"; it holds {', '.join(inner[:5])}: name one of them" if inner else ""
        raise InputError(f"--resume_from_checkpoint {path}: lacks {', '.join(missing)}, to go on from{cure}")
    return folder, read_json_object(folder / ARGS, InputError)


def write_json(path: Path, value: Any) -> None:
    """The file is whole or not there."""
    draft = path.with_name(f".{path.name}.new")
    draft.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
    os.replace(draft, path)


def fingerprint(base: Path, adapter: Path) -> dict[str, Any]:
    """The record of the base for what the adapter touches, as stored: codes and scales where the base has them.

    Planning the merge finds the tensors, so an adapter that could not be merged is refused here, as PlanError.
    """
    trained = read_adapter(adapter)
    return dict(make_fingerprint(open_checkpoint(base), touched_keys(make_plan(base, [trained]), trained)))


def touched_keys(plan: Plan, adapter: Adapter) -> set[str]:
    """Stored base tensors that a plan of one adapter changes or replaces."""
    assert len(plan.adapters) == 1, adapter.path
    base = open_checkpoint(plan.base_name)
    return {key for e in plan.weights.values() if e.touched for key in _stored(e.source, base, e.key)}


def _stored(ref: TensorRef, base: Checkpoint, key: str) -> set[str]:
    if ref.made is not None:
        return {k for _, part in ref.made.parts for k in _stored(part, base, part.key)}
    found = ref.key if ref.root == BASE else key  # a full copy stands in the place of the base's own
    return {found} & base.tensors.keys()


def checkpoint_path(run: Path, step: int) -> Path:
    return run / f"checkpoint-{step}"


FORMER = "former-"  # a checkpoint in the draft folder that another one is to replace


def draft_folder(run: Path) -> Path:
    """Where checkpoints are while they are written: a run that is killed leaves none that is half."""
    return run / ".saving"


@contextmanager
def whole_or_gone(run: Path, step: int, writes: bool) -> Iterator[None]:
    """While a checkpoint is written to the draft folder: it is put in its place when all of it is there, and removed
    where that fails. `writes` says whether this process is the one to do so. Raises OutputError."""
    checkpoint, drafts = checkpoint_path(run, step), draft_folder(run)
    try:
        if writes:
            _clear(run)  # of a run that was killed
        yield
        if writes:
            _put(checkpoint_path(drafts, step), checkpoint)
            _clear(run)
    except BaseException as error:
        if writes:
            _clear(run)
        if isinstance(error, InlayError) or not _is_of_files(error):
            raise
        raise OutputError(
            f"{checkpoint}: cannot be saved ({first_line(error)}), and is removed; checkpoints before it are whole: "
            "make room, and go on from one with --resume_from_checkpoint"
        ) from error


def _put(draft: Path, checkpoint: Path) -> None:
    """Put a whole folder in its place. One that was there, of a run that is gone on with from before, is taken away."""
    if not checkpoint.exists():
        os.rename(draft, checkpoint)
        return
    os.rename(checkpoint, draft.with_name(FORMER + checkpoint.name))
    os.rename(draft, checkpoint)


def _clear(run: Path) -> None:
    """Remove the draft folder. A checkpoint that was taken away there, and that none replaced, is put back first."""
    drafts = draft_folder(run)
    for former in drafts.glob(f"{FORMER}*"):
        place = run / former.name.removeprefix(FORMER)
        if not place.exists():
            os.rename(former, place)
    shutil.rmtree(drafts, ignore_errors=True)


def _is_of_files(error: BaseException) -> bool:
    """Whether a file could not be written. torch.save says so with a RuntimeError, in words of many kinds."""
    from safetensors import SafetensorError

    if isinstance(error, RuntimeError):
        frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
        return any(frame.f_globals.get("__name__") == "torch.serialization" for frame in frames)
    return isinstance(error, (OSError, SafetensorError))


def point(run: Path, name: str, step: int) -> None:
    """`name` in the run folder leads to a checkpoint: a link, or a file with its name where there are no links."""
    checkpoint = checkpoint_path(run, step)
    draft = run / f".{name}.new"
    draft.unlink(missing_ok=True)
    try:
        os.symlink(checkpoint.name, draft)
    except OSError:
        draft.write_text(checkpoint.name + "\n", "utf-8")
    os.replace(draft, run / name)


def remove_old(run: Path, limit: int, step: int, best: int | None) -> None:
    """Leave the `limit` newest checkpoints up to `step`, and the best one.

    Those after `step`, of a run that was gone on with from an earlier one, are on their way to be written anew.
    """
    steps = sorted(int(m[1]) for p in run.iterdir() if (m := _CHECKPOINT.fullmatch(p.name)) and int(m[1]) <= step)
    for old in steps[:-limit]:
        if old != best:
            shutil.rmtree(checkpoint_path(run, old))


class Log:
    """`logging.jsonl` of a run: lines are appended; those after the step that a run goes on from are dropped."""

    def __init__(self, run: Path, step: int = 0) -> None:
        self.path = run / LOG
        kept = [line for line in self.lines() if line.get("step", 0) <= step] if step else []
        with open(self.path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)

    def lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text("utf-8").splitlines() if line.endswith("}")]

    def append(self, line: Mapping[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def draw_curves(run: Path, lines: Sequence[Mapping[str, Any]]) -> list[Path]:
    """One PNG for each quantity that was logged more than once."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = []
    for name in CURVES:
        found = [(line["step"], line[name]) for line in lines if name in line]
        if len(found) < 2:
            continue
        figure = Figure(figsize=(8, 5))
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        steps, values = zip(*found, strict=True)
        axes.plot(steps, values, alpha=0.5 if "loss" in name else 1.0)
        if "loss" in name:
            axes.plot(steps, _smoothed(values), color="C0")
        axes.set(xlabel="step", ylabel=name)
        axes.grid(alpha=0.3)
        (run / IMAGES).mkdir(exist_ok=True)
        path = run / IMAGES / f"{name if name.startswith('eval') else 'train_' + name}.png"
        figure.savefig(path, dpi=100)
        drawn.append(path)
    return drawn


def _smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential mean, corrected for its beginning, as TensorBoard draws it."""
    smoothed, total, share = [], 0.0, 0.0
    for value in values:
        total, share = weight * total + (1 - weight) * value, weight * share + (1 - weight)
        smoothed.append(total / share)
    return smoothed


def copy_tokenizer(base: Path, checkpoint: Path, template: str | None) -> None:
    """The base's tokenizer files byte for byte, with another chat template if the run has one."""
    for name in (*TOKENIZER_FILES, *PROCESSOR_FILES):
        if (base / name).is_file():
            shutil.copyfile(base / name, checkpoint / name)
    if template is not None:
        (checkpoint / CHAT_TEMPLATE).write_text(template, "utf-8")


def restore_cache(base: Path, checkpoint: Path) -> None:
    """`use_cache` in the config of a model that is trained whole as the base has it: training alone turns it off."""
    before = read_json_object(base / "config.json", InputError)
    after = read_json_object(checkpoint / "config.json", InputError)
    sections = [(before, after)]
    sections += [(v, after[k]) for k, v in before.items() if isinstance(v, dict) and isinstance(after.get(k), dict)]
    for old, new in sections:
        new.pop("use_cache", None)
        if "use_cache" in old:
            new["use_cache"] = old["use_cache"]
    write_json(checkpoint / "config.json", after)


def finish_checkpoint(checkpoint: Path, args: Mapping[str, Any], base: Mapping[str, Any] | None) -> None:
    """Put the records beside the weights; without a base for a model that is whole itself."""
    if base is not None:
        write_json(checkpoint / FINGERPRINT, base)
        _sort_config(checkpoint / "adapter_config.json")
    write_json(checkpoint / ARGS, args)


def _sort_config(path: Path) -> None:
    """Lists that PEFT writes in the order of a set, the same in every run."""
    config = read_json_object(path, InputError)
    for name in ("target_modules", "feedforward_modules", "modules_to_save"):
        if isinstance(config.get(name), list):
            config[name] = sorted(config[name])
    write_json(path, config)

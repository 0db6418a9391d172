"""Where a model goes: one device, a rule of accelerate's, or a device for each of its modules."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from inlay.errors import InputError

RULES = ("auto", "balanced", "balanced_low_0", "sequential")
DISK = "disk"  # accelerate's word for weights that stay in files
SHOWN = 3


def place(device_map: str | None) -> Any:
    """`device_map` as transformers takes it. Nothing given: the first GPU, or the CPU. Raises InputError."""
    import torch

    if device_map is None:
        return {"": "cuda:0"} if torch.cuda.is_available() else None
    if device_map in RULES:
        return device_map
    if (text := _json_text(device_map)) is None:
        _check_device(device_map)
        return {"": device_map}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"--device_map is not JSON: {error}") from None
    if not found:
        raise InputError('--device_map is empty; {"": "cpu"} puts all of the model on the CPU')
    for module, device in found.items():
        if isinstance(device, bool) or not isinstance(device, int | str):
            raise InputError(f"--device_map: {module!r} is to be on {device!r}, which is no device")
        if device != DISK:
            _check_device(device)
    return dict(found)


def _json_text(device_map: str) -> str | None:
    """The JSON object that is given, itself or in a file; None for anything else."""
    text = device_map
    if device_map.endswith(".json") and Path(device_map).is_file():
        try:
            text = Path(device_map).read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--device_map: {device_map} cannot be read ({error})") from None
    return text if text.lstrip().startswith("{") else None


def _check_device(name: str | int) -> None:
    """Raises InputError for what is no device that weights can be on, or one that this machine has not. 0 is cuda:0."""
    import torch

    try:
        device = torch.device("cuda", name) if isinstance(name, int) else torch.device(name)
        known = torch.get_device_module(device)
    except RuntimeError:
        raise InputError(f"--device_map {name!r} is not a device; use auto, cpu, cuda:0 or JSON") from None
    count = known.device_count() if known.is_available() else 0
    if (device.index or 0) >= count:
        raise InputError(f"--device_map {name}: this machine has {count} such devices")


def check_places(places: Mapping[str, Any], cls: Any, config: Any) -> None:
    """Raises InputError for names that the model has not, and for modules that no entry covers.

    transformers leaves both on the CPU without a word. An entry covers a module with all that is in it.
    """
    import torch

    with torch.device("meta"):
        model = cls(copy.deepcopy(config))
    held = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]  # what is tied stands once
    known = {name for name, _ in model.named_modules()} | set(held)
    if unknown := [name for name in places if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, SHOWN, 0.5)
        likely = f"; there are {', '.join(near)}" if near else ""
        raise InputError(f"--device_map names {_shown(unknown)}, which {cls.__name__} has not{likely}")
    if bare := [n for n in held if not any(n == place or n.startswith(place + ".") for place in places)]:
        modules = dict.fromkeys(name.rpartition(".")[0] for name in bare)
        raise InputError(f'--device_map has no device for {_shown(modules)}; "" stands for all that is not named')


def _shown(names: Iterable[str]) -> str:
    all_names = list(names)
    more = f" and {len(all_names) - SHOWN} more" if all_names[SHOWN:] else ""
    return ", ".join(all_names[:SHOWN]) + more

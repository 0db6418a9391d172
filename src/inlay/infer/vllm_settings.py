"""Settings of vLLM as users give them: `--vllm_NAME VALUE` and `--vllm_engine_kwargs JSON`.

Names are those of vLLM's engine arguments (`vllm.engine.arg_utils.EngineArgs`), so that a flag of a newer vLLM works
without a change here; whether a name is known is checked when vLLM is imported.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from inlay.errors import InputError

PREFIX = "vllm_"
KWARGS = "engine_kwargs"
# What other options of inlay decide.
DECIDED = {
    "model": "--model",
    "model_loader_extra_config": "--adapters and the options beside it",
    "enable_lora": "--adapters, without --merge_lora",
    "served_model_name": "--served_model_name",
    "trust_remote_code": "--trust_remote_code",
}


def parse_settings(flags: Mapping[str, str | bool], kwargs: str | None = None) -> dict[str, Any]:
    """Engine arguments from `flags` (names without the prefix) and a JSON object, which may not contradict them.

    A value is read as JSON where it is JSON (numbers, true, objects), and as text otherwise; one that is True stands
    for a flag without a value. Raises InputError.
    """
    settings = {name.replace("-", "_"): _value(value) for name, value in flags.items()}
    for name, value in _object(kwargs).items():
        if settings.get(name, value) != value:
            raise InputError(f"--vllm_{name} {settings[name]} contradicts --vllm_{KWARGS}, which says {value!r}")
        settings[name] = value
    for name, option in DECIDED.items():
        if name in settings:
            raise InputError(f"--vllm_{name}: this is decided by {option}")
    return settings


def _value(value: str | bool) -> Any:
    if isinstance(value, bool):
        return value
    try:
        return json.loads(value.lower() if value.lower() in ("true", "false") else value)
    except ValueError:
        return value


def _object(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InputError(f"--vllm_{KWARGS} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"--vllm_{KWARGS} must be a JSON object, found {text:.80}")
    return found


def check_names(settings: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises InputError for a setting that the installed vLLM does not have."""
    names = sorted(known)
    for name in settings:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1, 0.6)
            hint = f"; did you mean --vllm_{near[0]}?" if near else ""
            raise InputError(f"--vllm_{name}: this version of vLLM has no such engine argument{hint}")


def as_flags(args: Mapping[str, Any]) -> list[str]:
    """Engine arguments as the command line of vLLM's server takes them. None leaves the default."""
    words: list[str] = []
    for name, value in args.items():
        flag = "--" + name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag.removeprefix("--"))
        elif isinstance(value, (list, tuple)) and not any(isinstance(v, (dict, list)) for v in value):
            words += [flag, *map(str, value)]
        elif isinstance(value, (dict, list, tuple)):
            words += [flag, json.dumps(value)]
        else:
            words.append(f"{flag}={value}")
    return words

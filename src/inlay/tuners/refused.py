"""Methods of PEFT that are not merged: why, and what to do."""

from __future__ import annotations

_PROMPT = (
    "it trains vectors that are put in front of the input, not weights, so no merged weight equals it; "
    "serve it with PEFT beside the base"
)
_DECOMPOSED = (
    "it depends on a decomposition of the base that is not in the file and whose signs another library may choose "
    "otherwise; merge it with PEFT on the machine that trained it"
)

REFUSED_TYPES: dict[str, str] = {
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT,
    "CPT": _PROMPT,
    "CARTRIDGE": _PROMPT,
    "ADAPTION_PROMPT": "it adds gated prompts inside the attention, which no merged weight equals; serve it with PEFT",
    "XLORA": "it mixes adapters by a gate that reads every token, so no merged weight equals it; serve it with PEFT",
    "POLY": "it mixes skills by a router that reads the task, so no merged weight equals it; serve it with PEFT",
    "LILY": "it routes between shared experts per token, so no merged weight equals it; serve it with PEFT",
    "SHADOW": "it runs a second network beside the layers, so no merged weight equals it; serve it with PEFT",
    "PSOFT": _DECOMPOSED,
    "ADAMSS": "it clusters a decomposition of the base anew on every load, so its parts belong to no fixed weight; "
    "merge it with PEFT on the machine that trained it",
    "FROD": _DECOMPOSED,
    "TINYLORA": _DECOMPOSED,
}

"""One candidate of `bench/infer.py` in vLLM: loaded, then one reply; the figures as JSON on the last line.

python bench/vllm_child.py base|live|merged|exported BASE ADAPTER OUT REPLY
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any

PROMPT = 32
SETTINGS = {"enforce_eager": True, "max_num_seqs": 4, "gpu_memory_utilization": 0.1, "skip_tokenizer_init": True}


def engine_of(candidate: str, base: str, adapter: str, out: str) -> tuple[Any, Any]:
    """The engine, and the request that names the adapter where it stays live."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    import inlay

    given: dict[str, Any] = {"model": base}
    if candidate == "live":
        given |= {"enable_lora": True, "max_lora_rank": 16}
    elif candidate == "merged":
        given |= {"load_format": "inlay", "model_loader_extra_config": {"adapters": [adapter]}}
    elif candidate == "exported":
        inlay.run_plan(inlay.make_plan(base, [adapter]), out)
        given["model"] = out
    engine = LLM(**given, **SETTINGS).llm_engine
    if candidate != "live":
        return engine, None
    lora = LoRARequest("adapter", 1, adapter)
    engine.add_lora(lora)
    return engine, lora


def token_times(engine: Any, lora: Any, length: int) -> list[float]:
    """The clock at each token of a greedy reply."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
    prompt = {"type": "token", "prompt_token_ids": list(range(5, 5 + PROMPT))}
    engine.add_request("0", prompt, params, lora_request=lora)
    marks = []
    while engine.has_unfinished_requests():
        if engine.step():
            marks.append(time.monotonic())
    return marks


def main() -> None:
    candidate, base, adapter, out, length = sys.argv[1:]
    import vllm  # noqa: F401

    started = time.monotonic()
    engine, lora = engine_of(candidate, base, adapter, out)
    loaded = time.monotonic()
    first, *rest = token_times(engine, lora, int(length))
    engine.engine_core.shutdown()  # its worker is waited for, so that its memory is known
    used = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    speed = len(rest) / (rest[-1] - first)
    print(json.dumps({"load": loaded - started, "first": first - loaded, "tokens/s": speed, "peak": used / 1000}))


if __name__ == "__main__":
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    main()

"""inlay: set LoRA adapters flush into the model they were trained on.

A merge is a plan, executed as a stream, and checked.

    base dir ─ open_checkpoint ─┐                 ┌─ run_plan: shard by shard, block by block,
                                ├─ make_plan ─────┤            rounded once, published whole
    adapters ─ read_adapter ────┘  (JSON, digest) └─ verify:   recomputed, by other code

Layers, imports go down only:

    cli                      parse, one library call, print
    train  infer  quantising make an adapter; try it; codes chosen with calibration
    run  verification        do the plan; check it, without trusting run
    plan                     decide: pure data, all problems at once
    keys                     module names ↔ checkpoint keys
    output                   crash-safe writing
    records                  fingerprints, manifests
    adapters  datasets       what training produced, and what it reads
    checkpoints              what is on disk: layouts, headers, spans
    tuners  codecs           the maths of each method, and of each stored form
    extras                   packages that are not there by default
    dtypes  digests  errors  words everything shares

From Python:

    plan = inlay.make_plan("base", ["adapter"], torch_dtype="bfloat16")
    print(inlay.dumps(plan))
    inlay.run_plan(plan, "merged")
    report = inlay.verify("base", ["adapter"], "merged")
    for key, tensor in inlay.merged_tensors(plan): …       # torch tensors, no files written
    inlay.survival(plan).overall                           # how much of the adapters is in the result
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # names of the table below, for type checkers
    from inlay.adapters.adapter import Adapter, read_adapter
    from inlay.checkpoints.checkpoint import Checkpoint, open_checkpoint
    from inlay.errors import InlayError
    from inlay.plan.build import make_plan
    from inlay.plan.combination import Options
    from inlay.plan.quant import Quant
    from inlay.plan.types import Plan, dumps, loads
    from inlay.run.combine import Combination, combine_adapters
    from inlay.run.execute import RunResult, run_plan
    from inlay.run.survival import Survived, survival
    from inlay.run.tensors import merged_tensors
    from inlay.verification.report import Report
    from inlay.verification.verify import verify

_WHERE = {
    "Adapter": "adapters.adapter",
    "Checkpoint": "checkpoints.checkpoint",
    "Combination": "run.combine",
    "InlayError": "errors",
    "Options": "plan.combination",
    "Plan": "plan.types",
    "Quant": "plan.quant",
    "Report": "verification.report",
    "RunResult": "run.execute",
    "Survived": "run.survival",
    "combine_adapters": "run.combine",
    "dumps": "plan.types",
    "loads": "plan.types",
    "make_plan": "plan.build",
    "merged_tensors": "run.tensors",
    "open_checkpoint": "checkpoints.checkpoint",
    "read_adapter": "adapters.adapter",
    "run_plan": "run.execute",
    "survival": "run.survival",
    "verify": "verification.verify",
}
__all__ = [*_WHERE, "__version__"]


def __getattr__(name: str) -> Any:
    """Load a public name on first use, so that `import inlay` costs nothing."""
    if name not in _WHERE:
        raise AttributeError(f"module 'inlay' has no attribute {name!r}")
    return getattr(import_module(f"inlay.{_WHERE[name]}"), name)

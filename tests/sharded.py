"""`inlay sft` with FSDP on the processor, for tests: torch divides a model among processes of gloo, and all that hinders
accelerate is a list of devices. Run by torchrun with the arguments of `inlay`."""

from __future__ import annotations

import sys
from typing import Any

from accelerate import state

from inlay.cli.main import main
from inlay.train import schedule

former = state.AcceleratorState.__init__


def init(self: Any, *args: Any, **kwargs: Any) -> None:
    former(self, *args, **kwargs)
    plugin = kwargs.get("fsdp_plugin")
    if plugin is not None and self.distributed_type == state.DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = state.DistributedType.FSDP, plugin
        state.PartialState._shared_state["distributed_type"] = self.distributed_type


if __name__ == "__main__":
    state.AcceleratorState.__init__ = init
    schedule.check_sharding = lambda *_: None  # which refuses the processor
    sys.exit(main())

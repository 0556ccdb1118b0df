"""A rank that shards a policy on a CPU.

`accelerate launch ... -m tests.sharded JOB...` runs jobs one after another, and with `--again` the last of them a
second time, from its newest checkpoint. accelerate makes FSDP and DeepSpeed only of processes that have GPUs. What is
changed here is that decision alone: the wrapping, the gathering and the checkpoints are the libraries' and ours."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from accelerate import state
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from stages.job import Job
from stages.kinds import STAGES
from stages.runtime import ranks
from stages.runtime.worker import attempt

FIRST = "out-of-the-first"
"""Where the output of an attempt lies once it was made again."""


def allow_fsdp_on_a_cpu() -> None:
    """FSDP for them."""
    made = state.AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    state.AcceleratorState.__init__ = init


def allow_deepspeed_on_a_cpu() -> None:
    """DeepSpeed has a device of its own for a CPU (DS_ACCELERATOR), which `use_cpu` would keep it from."""
    checked = TrainingArguments.__post_init__

    def post_init(self: Any) -> None:
        self.use_cpu = False
        checked(self)

    TrainingArguments.__post_init__ = post_init


def main(paths: list[str], again: bool) -> int:
    for path in paths:
        if code := attempt(Job.model_validate_json(Path(path).read_text()), STAGES):
            return code
    if not again:
        return 0
    job = Job.model_validate_json(Path(paths[-1]).read_text())
    if ranks.first():
        shutil.move(job.out, Path(job.work, FIRST))
        Path(job.out).mkdir()
    state.PartialState().wait_for_everyone()
    return attempt(job, STAGES)


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        allow_deepspeed_on_a_cpu()
    else:
        allow_fsdp_on_a_cpu()
    sys.exit(main([path for path in sys.argv[1:] if path != "--again"], "--again" in sys.argv))

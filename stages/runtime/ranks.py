"""Several processes of one stage: who this one is, and how they put together what each has made.

The environment says it (RANK, WORLD_SIZE, LOCAL_RANK), as torchrun would; without it there is one process, and nothing
here costs anything. The processes that switchback forks meet through a file, because the store that torch would open
listens on every interface of the machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")


MEETING = "SWITCHBACK_MEETING"
"""Environment variable with the directory through which the processes of a job meet."""

PATIENCE = timedelta(days=1)
"""How long one process waits for another, which may be sampling; a deadline is the launcher's to keep."""


def variables(number: int, processes: int, meeting: str) -> dict[str, str]:
    """The environment of one of the processes that meet in a directory on this machine."""
    return {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        MEETING: meeting,
    }


def world() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this one is, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Which of this machine's."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def first() -> bool:
    """Whether this process speaks for all: it alone writes files."""
    return rank() == 0


def meet_here() -> bool:
    """Whether this is one of several processes that switchback forked."""
    return world() > 1 and MEETING in os.environ


def meet(on_gpu: bool) -> None:
    """Make the process group, before torch or accelerate does. Processes of another launcher keep its own: env://."""
    if not meet_here():
        return
    import torch
    from torch import distributed
    from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage] - documented, but not in __all__

    if on_gpu:
        torch.cuda.set_device(local_rank())
    # objects, unlike tensors, are exchanged over the CPU
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    store = FileStore(f"{os.environ[MEETING]}/store", world())
    distributed.init_process_group(backend, store=store, rank=rank(), world_size=world(), timeout=PATIENCE)


def part() -> None:
    """Leave the process group, once every process has come here. Threads of a group that is still there when the
    interpreter ends can abort the process (https://github.com/pytorch/pytorch/issues/190489)."""
    if world() == 1:
        return
    from torch import distributed

    if distributed.is_initialized():
        together({})
        distributed.destroy_process_group()


def together(mine: Mapping[int, T]) -> dict[int, T]:
    """Everybody's entries in everybody's hands. All processes call it, at the same point."""
    if world() == 1:
        return dict(mine)
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
    everybody: list[Any] = [None] * world()
    distributed.all_gather_object(everybody, dict(mine))
    return {key: value for part in everybody for key, value in part.items()}

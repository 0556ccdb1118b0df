"""The worker: `python -m stages job.json` runs one job here; `--rank job.json` is one process of a job that accelerate
or torchrun started; `--serve PID` forks one process a job, on orders from stdin, and `--serve-bare` does so without
importing TRL first; `--guarded` runs a user's code for a stage (`stages.guard`)."""

from __future__ import annotations

import sys

USAGE = "usage: python -m stages job.json | --rank job.json (under torchrun) | --serve | --serve-bare LAUNCHER_PID"


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    if len(arguments) == 4 and arguments[0] == "--guarded":
        from stages.guard import user_process  # before kinds: a process of user code loads no stage

        user_process.keep(*map(int, arguments[1:]))
    from stages.runtime import logs

    logs.make_visible()
    from stages.inspections.kinds import INSPECTIONS
    from stages.kinds import STAGES

    stages = {**STAGES, **INSPECTIONS}

    if len(arguments) == 2 and arguments[0] in ("--serve", "--serve-bare"):
        from stages.runtime.server import serve

        serve(int(arguments[1]), stages, preload=arguments[0] == "--serve")
        return 0
    from stages.runtime import worker

    if len(arguments) == 2 and arguments[0] == "--rank":
        return worker.main_of_rank(arguments[1], stages)
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        return 2
    return worker.main(arguments[0], stages)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

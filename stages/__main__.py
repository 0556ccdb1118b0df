"""The worker: `python -m stages job.json` runs one job here; `python -m stages --serve PID` forks one process a job, on orders from stdin."""

from __future__ import annotations

import sys

USAGE = "usage: python -m stages job.json | --serve LAUNCHER_PID"


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    if len(arguments) == 2 and arguments[0] == "--serve":
        from stages.serve import serve

        serve(launcher=int(arguments[1]))
        return 0
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        return 2
    from stages.worker import main as work

    return work(arguments[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

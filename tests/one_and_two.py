"""The work of a test in one process and in two, after one import: python -m tests.one_and_two MODULE DIRECTORY

`MODULE.main` gets DIRECTORY/two in each of two ranks, and then DIRECTORY/one in a process alone."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from stages.runtime import forked_ranks, ranks
from stages.runtime.server import load_for_forks
from tests.conftest import ROOT, environment

Main = Callable[[Path], None]


def one_and_two(module: str, directory: Path) -> None:
    """Run it from a test."""
    for name in ("one", "two"):
        (directory / name).mkdir()
    command = [sys.executable, "-m", "tests.one_and_two", module, str(directory)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def main(module: str, directory: Path) -> int:
    load_for_forks()
    work: Main = importlib.import_module(module).main
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as meeting:
        # before anything is computed here: threads of a backward pass do not survive a fork
        code = forked_ranks.run(2, meeting, lambda: _rank(work, directory / "two"))
    if code == 0:
        work(directory / "one")
    return code


def _rank(work: Main, out: Path) -> int:
    ranks.meet(on_gpu=False)
    work(out)
    ranks.part()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))

"""A signal to a whole tree of processes ends those that it is meant for, and no other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.runtime import locks, signals
from stages.runtime.process import forked, started_at
from tests.conftest import ROOT, environment
from tests.pipeline.launch.test_processes import SOON, signal_tree, wait_for


def is_deaf(pid: int, number: int, how: str = "SigCgt SigBlk") -> bool:
    """Whether a process catches or blocks a signal (or what `how` says), as the kernel tells it."""
    lines = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "Sig" in line)
    return any(int(lines[name], 16) & 1 << (number - 1) for name in how.split())


def program(code: str, **more) -> subprocess.Popen[str]:
    """A Python program whose first line of output has come."""
    started = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True, **more
    )
    assert started.stdout
    started.stdout.readline()
    return started


def test_a_program_that_is_started_held_hears_a_signal_only_once_it_listens():
    """The half second in which Python starts is none in which it can be hit."""
    code = (
        "from stages.runtime import signals; print(flush=True); input()\n"
        "signals.ignore(lambda number: print('heard', number, flush=True)); print('on', flush=True); input()"
    )
    with signals.held():
        started = program(code, stdin=subprocess.PIPE)
    assert started.stdin and started.stdout
    started.send_signal(signal.SIGTERM)
    started.stdin.write("\n")
    started.stdin.flush()
    assert [started.stdout.readline() for _ in range(2)] == [f"heard {signal.SIGTERM}\n", "on\n"]
    started.send_signal(signal.SIGTERM)
    assert started.stdout.readline() == f"heard {signal.SIGTERM}\n"
    started.stdin.close()
    assert started.wait() == 1, "at the end of its input"


def test_what_an_ignoring_process_starts_ends_as_usual():
    """SIG_IGN and a mask would both be inherited by a program."""
    code = (
        "import subprocess, sys; from stages.runtime import signals; signals.ignore()\n"
        "child = subprocess.Popen(['sleep', '600']); print(child.pid, flush=True); sys.exit(-child.wait())"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert started.stdout
    os.kill(int(started.stdout.readline()), signal.SIGTERM)
    assert started.wait() == signal.SIGTERM


def test_a_program_of_others_hears_nothing_and_dies_with_its_parent():
    """As accelerate's launcher, and Prefect's server, would end themselves."""
    code = (
        "import os, subprocess; from stages.runtime import signals; me = os.getpid()\n"
        "child = subprocess.Popen(['sleep', '600'], preexec_fn=lambda: signals.deaf_child(me))\n"
        "print(child.pid, flush=True); child.wait()"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert started.stdout
    child = int(started.stdout.readline())
    for number in signals.ENDINGS:
        os.kill(child, number)
        assert is_deaf(child, number, "SigBlk") and started_at(child)
    started.kill()
    started.wait()
    assert wait_for(lambda: not started_at(child), SOON)


LOADER = """
import os, sys, time
from torch.utils.data import DataLoader
from stages.runtime import signals
from stages.runtime.process import descendants
signals.at_fork(signals.obey_parent)
rows = iter(DataLoader(range(10**9), num_workers=2, batch_size=1))
next(rows)
print(*descendants(os.getpid()), flush=True)
input()
print(next(rows).item(), flush=True)
if sys.argv[1] == "end":
    for worker in rows._workers:
        worker.terminate()
        worker.join()
    print(*(worker.exitcode for worker in rows._workers), flush=True)
"""


def test_the_processes_of_a_loader_outlive_a_signal_of_others_and_end_at_their_parents():
    """torch takes a loader's process that a signal ended for an error; the parent ends it by the same signal."""
    code = LOADER.replace("sys.argv[1]", "'end'")
    started = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert started.stdin and started.stdout
    for pid in map(int, started.stdout.readline().split()):
        os.kill(pid, signal.SIGTERM)
    out, _ = started.communicate("\n", timeout=SOON)
    assert out.splitlines() == ["1", "143 143"] and started.returncode == 0


def test_what_must_not_be_cut_short_comes_to_its_end_and_ctrl_c_is_heard_at_once():
    came: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append("ended"))
    try:
        with signals.postponed():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            came.append("done")
        assert came == ["done", "ended"]
        with pytest.raises(KeyboardInterrupt), signals.postponed():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, before)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_only_what_a_wait_took_longer_counts_as_overslept():
    now = time.monotonic()
    assert signals.overslept(now, 10.0) == 0.0
    assert signals.overslept(now - 100.0, 10.0) == pytest.approx(90.0, abs=5.0)


def test_ranks_outlive_a_signal_to_all_and_die_with_their_job():
    """SIGKILL to the job alone, as where memory runs out; nothing of a job by itself is left, and its lock is free."""
    code = (
        "import os, time; from stages.runtime import forked_ranks, signals; signals.ignore()\n"
        "forked_ranks.run(2, '/nowhere', lambda: (print(os.getpid(), flush=True), time.sleep(600)) and 0)"
    )
    job = program(code)
    assert job.stdout
    job.stdout.readline()
    ranks = signal_tree(job.pid, signal.SIGTERM) - {job.pid}
    assert len(ranks) == 2 and all(map(started_at, ranks))
    job.kill()
    job.wait()
    assert wait_for(lambda: not any(map(started_at, ranks)), SOON)


def test_a_lock_names_the_process_that_keeps_it_and_not_the_one_that_has_ended(tmp_path):
    """A child inherits the lock of the job that started it."""
    with (tmp_path / "lock").open("a+") as lock:
        reads, writes = os.pipe()

        def job() -> int:
            with (tmp_path / "lock").open("a+") as mine:
                assert locks.try_lock(mine)
                locks.write_holder(mine)
                os.write(writes, f"{forked(lambda: time.sleep(600) or 0)}\n".encode())
            return 0

        pid = forked(job)
        os.waitpid(pid, 0)
        child = os.read(reads, 100).decode().strip()
        try:
            assert (tmp_path / "lock").read_text() == str(pid) and not locks.try_lock(lock)
            assert locks.holder(lock) == child
        finally:
            os.kill(int(child), signal.SIGKILL)

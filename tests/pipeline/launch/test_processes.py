"""Nothing outlives its launcher: jobs, the serving worker, the Prefect server, and what a job starts in a session of
its own."""

from __future__ import annotations

import copy
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.errors import StageFailed
from pipeline.launch import local
from pipeline.launch.local import Launcher
from pipeline.registry import Registry, runs
from stages.errors import BadInput
from stages.job import Execution, Job
from stages.runtime.process import descendants, kill_marked, marked, started_at
from tests.conftest import LEARNED, ROOT, SWITCHBACK, environment, stage

TOKEN = "SWITCHBACK_TEST_TOKEN"


def wait_for(condition, seconds):
    """Whether it comes to hold in so many seconds, looked at again and again."""
    ends_at = time.monotonic() + seconds
    while not condition() and time.monotonic() < ends_at:
        time.sleep(0.05)
    return condition()


def signal_tree(root: int, number: int) -> set[int]:
    """Send a signal to every process of a tree, as systemd and Slurm do; the pids that got it."""
    told = set()
    for pid in sorted({root, *descendants(root)}):
        with suppress(ProcessLookupError):
            os.kill(pid, number)
            told.add(pid)
    return told


SOON = 30.0
"""Seconds until what was killed is gone: it takes a fraction of one, and what is not killed sleeps or trains for
minutes."""
STARTED = 300.0
"""Seconds until a launcher has got to work, on a machine that does much else."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "state"),
    [(signal.SIGKILL, -9, "interrupted"), (signal.SIGTERM, 143, "stopped"), (signal.SIGINT, 130, "stopped")],
)
def test_the_launchers_death_takes_job_worker_and_prefect_server_along(number, code, state, climbed, write, tmp_path):
    """Only the launcher's pid is signalled, in the middle of rl1, with a Prefect server of its own; soon nothing of it
    lives."""
    settings = copy.deepcopy(LEARNED)
    stage(settings, "rl1")["steps"] = 100_000
    shutil.copytree(climbed[1], tmp_path / "r", ignore=shutil.ignore_patterns("work"))
    mark = f"{TOKEN}={uuid.uuid4().hex}"
    command = [str(SWITCHBACK), "run", str(write(settings)), "--registry", str(tmp_path / "r")]
    launcher = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(**dict([mark.split("=")])),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert wait_for(lambda: is_training(tmp_path / "r" / "work", "grpo"), STARTED), launcher.communicate()
        assert wait_for(lambda: len(marked(mark)) >= 3, SOON), (
            "the worker, the job and the Prefect server share the launcher's environment"
        )
        os.kill(launcher.pid, number)
        assert wait_for(lambda: not marked(mark), SOON), f"still alive: {marked(mark)}"
        _, err = launcher.communicate()
        assert launcher.returncode == code
        if number != signal.SIGKILL:
            assert len(err.splitlines()) == 1 and "Traceback" not in err, err
        assert runs.runs(Registry(tmp_path / "r"))[0].state == state
    finally:
        kill_marked(mark)


def is_training(work: Path, kind: str) -> bool:
    """Whether a job of a kind has logged a step."""
    jobs = [path for path in work.glob("*/job.json") if f'"{kind}"' in path.read_text()]
    return any((path.parent / "out" / "metrics.jsonl").exists() for path in jobs)


SLEEPY = """
import os, signal, subprocess, sys, time
from pathlib import Path
from stages.job import Job, Result
def run(job):
    child = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)'
    subprocess.Popen([sys.executable, '-c', child], start_new_session=True)
    if os.fork() == 0:
        time.sleep(600)
    Path(job.out, 'started.txt').touch()
    while not Path(job.work, 'go').exists():
        time.sleep(0.05)
    return Result(outputs={}, metrics={})
"""

WORKER = """
import sys
import sleepy
from stages.__main__ import main
from stages.config import Config
from stages.kinds import STAGES, Stage
from stages.runtime import server
server.PRELOAD = ()
STAGES['sleepy'] = Stage(Config, sleepy.run, 1)
sys.exit(main(sys.argv[1:]))
"""

LAUNCH = """
import sys, time
from pathlib import Path
from pipeline.errors import StageFailed
from pipeline.launch import serving_worker
from pipeline.launch.local import Launcher
from stages.config import Config
from stages.job import Execution, Job
from stages.kinds import STAGES, Stage
serving_worker.WORKER = [sys.executable, str(Path(__file__).with_name('worker.py'))]
STAGES['sleepy'] = Stage(Config, print, 1)
work = Path(sys.argv[1])
job = Job(kind='sleepy', name='sleepy', config={}, inputs={}, work=str(work), out=str(work / 'out'), problem=None,
          rows=None, format=None, seed=0,
          dtype='float32', execution=Execution())
try:
    with Launcher() as launcher:
        launcher.launch(job, deadline=float(sys.argv[2]))
except StageFailed as error:
    print(error)
"""


@pytest.fixture
def sleepy(tmp_path):
    """A directory whose worker knows one more kind, which starts a grandchild in its own session and sleeps; a
    launcher of it, by deadline."""
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "sleepy.py").write_text(SLEEPY)
    (tmp_path / "launch.py").write_text(LAUNCH)
    mark = f"{TOKEN}={uuid.uuid4().hex}"
    env = environment(**dict([mark.split("=")]))

    def launch(deadline: float) -> subprocess.Popen[str]:
        command = [sys.executable, str(tmp_path / "launch.py"), str(tmp_path / "work"), str(deadline)]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    yield launch, mark, tmp_path / "work" / "out" / "started.txt"
    kill_marked(mark)


def test_a_deadline_kills_a_grandchild_in_its_own_session_too(sleepy):
    launch, mark, _ = sleepy
    launcher = launch(4.0)
    out, err = launcher.communicate(timeout=STARTED)
    assert "killed after its deadline of 4 s" in out, err
    assert not marked(mark)


def test_time_in_which_everything_stood_still_counts_in_no_deadline(sleepy):
    """As where a container is paused, for longer than the deadline."""
    deadline = 5.0
    launch, mark, started = sleepy
    launcher = launch(deadline)
    assert wait_for(started.exists, STARTED), launcher.communicate()
    told = signal_tree(launcher.pid, signal.SIGSTOP)
    time.sleep(1.2 * deadline)
    (started.parents[1] / "go").touch()
    os.kill(launcher.pid, signal.SIGCONT)
    time.sleep(0.5)  # it looks at the clock before the job can end
    for pid in told:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    out, err = launcher.communicate(timeout=STARTED)
    assert (out, launcher.returncode) == ("", 0), err
    assert wait_for(lambda: not marked(mark), SOON)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_launcher_that_dies_takes_a_grandchild_in_its_own_session_along(number, sleepy):
    launch, mark, started = sleepy
    launcher = launch(600)
    assert wait_for(started.exists, STARTED), launcher.communicate()
    assert wait_for(lambda: len(marked(mark)) == 5, SOON), (
        "launcher, worker, job, its child, and one in a session of its own"
    )
    os.kill(launcher.pid, number)
    assert wait_for(lambda: not marked(mark), SOON), f"still alive: {marked(mark)}"


def test_a_worker_that_is_killed_takes_its_job_along_and_is_named(sleepy):
    """As the OOM killer does it."""
    launch, mark, started = sleepy
    launcher = launch(600)
    assert wait_for(started.exists, STARTED), launcher.communicate()
    (worker,) = [
        pid
        for pid in descendants(launcher.pid)
        if b"--serve" in Path(f"/proc/{pid}/cmdline").read_bytes()
        and os.getsid(pid) == pid
        and pid != launcher.pid
        and parent(pid) == launcher.pid
    ]
    os.kill(worker, signal.SIGKILL)
    out, _ = launcher.communicate(timeout=SOON)
    assert "the serving worker is gone (exit -9)" in out
    assert not marked(mark)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_launcher_killed_while_its_worker_imports_leaves_nothing(tmp_path):
    mark = f"{TOKEN}={uuid.uuid4().hex}"
    code = (
        "import time\nfrom pipeline.launch.local import Launcher\nlauncher = Launcher()\nlauncher.warm_up()\n"
        "print('up', flush=True)\ntime.sleep(600)"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(**dict([mark.split("=")])),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout.readline() == "up\n"
    assert wait_for(lambda: any(map(imports_torch, marked(mark))), STARTED)
    os.kill(launcher.pid, signal.SIGKILL)
    assert wait_for(lambda: not marked(mark), SOON)
    launcher.wait()


def imports_torch(pid: int) -> bool:
    """Whether a process is at its imports: it has loaded torch's library; TRL, which takes longest, comes after
    that."""
    try:
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


def test_one_job_runs_from_its_file_alone_in_a_directory_of_its_own(climbed, tmp_path):
    """`python -m stages job.json`, as in a notebook or under a debugger."""
    import json
    import shutil

    _, registry = climbed
    source = next(
        path for path in (registry / "work").glob("*/job.json") if json.loads(path.read_text())["kind"] == "sft"
    )
    job = json.loads(source.read_text())
    work = tmp_path / "work"
    work.mkdir()
    job |= {"work": str(work), "out": str(work / "out")}
    (work / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "stages", str(work / "job.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((work / "result.json").read_text())
    assert result["outputs"] == {"policy": "."} and result["seen"]["processes"] == 1
    shutil.rmtree(work / "out")
    wrong_world = subprocess.run(command, cwd=ROOT, env=environment(WORLD_SIZE="2"), capture_output=True, text=True)
    assert wrong_world.returncode == 2
    assert (
        "the job is for 1 processes, but the launcher started 2"
        in json.loads((work / "error.json").read_text())["message"]
    )
    mixed = environment(ACCELERATE_MIXED_PRECISION="bf16")  # a job by itself has its shell's environment
    refused = subprocess.run(command, cwd=ROOT, env=mixed, capture_output=True, text=True)
    error = json.loads((work / "error.json").read_text())["message"]
    assert refused.returncode == 2 and "found mixed_precision bf16, expected no" in error
    assert not (work / "result.json").exists()
    before = sorted(path.name for path in work.iterdir())
    with (work / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        busy = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert busy.returncode == 75 and "already working in" in busy.stderr
    assert sorted(path.name for path in work.iterdir()) == before, "it touches nothing of the other's"


def sft_job(work):
    config = {"name": "x", "kind": "sft", "policy": "base"}
    return Job(
        kind="sft",
        name="x",
        config=config,
        inputs={},
        work=str(work),
        out=str(work / "out"),
        problem=None,
        rows=None,
        format=None,
        seed=0,
        dtype="float32",
        execution=Execution(),
    )


@pytest.mark.parametrize("status", [-signal.SIGPROF, 128 + signal.SIGPROF])
def test_a_job_that_ended_in_an_endless_template_is_the_users_to_change(status, tmp_path):
    """The kernel ended the job, or a rank of it, which wrote no word; another rank may have written what it saw."""
    (tmp_path / "error.json").write_text('{"message": "a rank is gone", "bad_input": false, "refused": false}')
    said = r"^x: a template did not end within 60 s of CPU time \(log: .*attempt-1.log\)\. Fix: use another template$"
    with pytest.raises(BadInput, match=said):
        local._result(sft_job(tmp_path), status, tmp_path / "attempt-1.log")


def test_a_launcher_touches_nothing_where_another_job_works(tmp_path):
    work = tmp_path / "work"
    (work / "out").mkdir(parents=True)
    kept = [work / "job.json", work / "out" / "metrics.jsonl", work / "said.jsonl"]
    for path in kept:
        path.write_text("somebody's")
    job = sft_job(work)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with Launcher(preload=False) as launcher, pytest.raises(StageFailed, match="another job still works"):
            launcher.launch(job)
    assert [path.read_text() for path in kept] == ["somebody's"] * 3


def test_a_neighbour_whose_name_is_no_text_disturbs_nobody(tmp_path):
    """The kernel cuts names at 15 bytes, within a letter too."""
    program = os.fsencode(tmp_path) + b"/\xff\xfe slp"
    shutil.copy(shutil.which("sleep") or "sleep", program)
    neighbour = subprocess.Popen([program, "60"])
    try:
        assert neighbour.pid in descendants(os.getpid()) and started_at(neighbour.pid)
        assert neighbour.pid not in marked("NO_SUCH=mark")
    finally:
        neighbour.kill()
        neighbour.wait()

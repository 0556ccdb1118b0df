"""Hostile user code, in real processes: the answer it hurts is lost, the others are judged, and nothing is left
running."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from stages.errors import BadInput, TooManyFailures
from stages.guard import failures
from stages.guard.pool import Guard, Limits
from stages.guard.worker import MARK
from stages.problems import catalog
from stages.problems.base import Answer, passes
from tests.conftest import environment
from tests.pipeline.launch.test_processes import signal_tree, wait_for

OWN = """
import os, signal, sys, time
REWARDS = {"right": 1.0, "short": 0.2}
def rows(rng):
    for i in range(400):
        yield {"prompt": f"What is {i} + 1?", "n": i}
def rewards(row, completion):
    return {"right": float(completion == str(row["n"] + 1)), "short": 1 / (1 + len(completion))}
def score(row, completion):
    if completion in ACTS:
        return ACTS[completion]()
    return float(completion == str(row["n"] + 1))
def demonstration(row, rng):
    return str(row["n"] + 1)
def fork_and_sleep():
    if os.fork() == 0:
        os.setsid()
        time.sleep(1000)
    return 0.5
def fork_and_exit():
    if os.fork() == 0:
        os.setsid()
        time.sleep(1000)
    os._exit(3)
def ignore_sigterm():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(1000)
def kill_parent():
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(1000)
def print_a_gigabyte():
    for _ in range(1024):
        os.write(1, b"x" * 2**20)
    return 0.5
def write_into_the_pipe(data):
    for fd in range(3, 1000):
        try:
            os.write(fd, data)
        except OSError:
            pass
    time.sleep(1000)
def rename():
    with open("/proc/self/comm", "wb") as comm:
        comm.write(b"\\xff\\xfe")
    return 0.5
def half_a_pair():
    raise ValueError("\\ud83d")
def tell_a_secret():
    raise ValueError("refused: " + os.environ["SOME_API_KEY"])
def boom():
    raise ValueError("bad luck")
ACTS = {
    "sleep": lambda: time.sleep(1000), "fork": lambda: 0.5 if os.fork() else 1.0, "fork_and_sleep": fork_and_sleep,
    "fork_and_exit": fork_and_exit,
    "exit": lambda: os._exit(3), "sys_exit": lambda: sys.exit(0), "none": lambda: None, "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "str": lambda: "1", "two": lambda: 2.0, "raise": boom, "kill_parent": kill_parent,
    "close": lambda: os.closerange(0, 1000),
    "sigterm": ignore_sigterm, "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "print": lambda: (print("last words"), time.sleep(1000)), "gigabyte": print_a_gigabyte,
    "brackets": lambda: write_into_the_pipe(b"[" * 20000 + b"\\n"), "passes_badly": lambda: 0.25,
    "exit_255": lambda: os._exit(255), "exit_160": lambda: os._exit(160), "rename": rename,
    "half_a_pair": half_a_pair, "secret": tell_a_secret,
}
def passed(score):
    if score == 0.25:
        raise ValueError("no opinion")
    return score >= 1
"""
HOSTILE = {
    "sleep": "timeout",
    "fork": None,
    "fork_and_sleep": None,
    "fork_and_exit": "crash",
    "exit": "crash",
    "sys_exit": "exception",
    "none": None,
    "nan": "not_a_number",
    "inf": "not_a_number",
    "str": "not_a_number",
    "two": "out_of_range",
    "raise": "exception",
    "kill_parent": "crash",
    "close": "crash",
    "brackets": "crash",
    "passes_badly": "exception",
    "sigterm": "timeout",
    "segfault": "crash",
    "stop": "timeout",
    "gigabyte": None,
    "exit_255": "crash",
    "exit_160": "crash",
    "rename": None,
    "half_a_pair": "exception",
}
"""What the score does -> what is recorded of it; None: it judged."""


PATIENT = 60.0
"""Seconds that a call may take which is to come to its end, on a machine that does much else: only what hangs meets
its time limit."""
MINE = f"TEST_PROCESS={os.getpid()}"
"""In the environment of everything that these tests start; other tests have guards too."""


@pytest.fixture(autouse=True, scope="module")
def marked():
    name, _, value = MINE.partition("=")
    os.environ[name] = value
    yield
    del os.environ[name]


@pytest.fixture
def mark(monkeypatch):
    """In the environment of what this test starts and no other: another guard's worker may still be on its way."""
    value = f"{MINE}-{uuid.uuid4().hex}"
    monkeypatch.setenv(*value.split("="))
    return value


def workers_alive(mark: str = MINE) -> set[int]:
    """Processes of any guard that was started under a mark: they carry the guard's, too."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            environ = (entry / "environ").read_bytes() if entry.name.isdigit() else b""
            if f"{MARK}=".encode() in environ and mark.encode() in environ.split(b"\0"):
                state = (entry / "stat").read_bytes().rpartition(b")")[2].split()[0]
                found |= {int(entry.name)} if state != b"Z" else set()
        except OSError:
            pass
    return found


def own(tmp_path: Path, code: str = OWN, **settings: Any) -> Any:
    file = tmp_path / "mine.py"
    file.write_text(code)
    limits = {"time_limit": PATIENT, "max_failures": 1.0, "workers": 2, **settings}
    return catalog.load({"file": str(file), **limits})


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    made = own(tmp_path_factory.mktemp("own"))
    yield made
    made.guard.close()


@pytest.mark.parametrize(("act", "failure"), HOSTILE.items())
def test_a_hostile_score_loses_its_own_answer_and_no_other_and_leaves_no_process(problem, act, failure):
    rows = problem.rows("train", 0, 10, 0)
    texts = [act if i == 4 else problem.demonstration(row, random.Random(0)) for i, row in enumerate(rows)]
    problem.guard.limits = problem.guard.limits._replace(seconds=4.0 if failure == "timeout" else PATIENT)
    judged = problem.judge([Answer(row, text) for row, text in zip(rows, texts, strict=True)])
    assert [one.score for i, one in enumerate(judged) if i != 4] == [1.0] * 9
    assert judged[4].failure == failure
    if failure:
        assert (judged[4].outcome, judged[4].score, set(judged[4].rewards.values())) == ("failed", 0.0, {None})
    assert wait_for(lambda: len(workers_alive()) <= 4, PATIENT), "two workers and their keepers, at most"


def test_nothing_is_left_when_the_guard_is_closed(tmp_path, mark):
    mine = own(tmp_path)
    (row,) = mine.rows("train", 0, 1, 0)
    mine.judge([Answer(row, "fork_and_sleep")] * 4)
    assert workers_alive(mark)
    mine.guard.close()
    assert not workers_alive(mark)


def test_workers_die_with_the_process_that_started_them(tmp_path, mark):
    """Killed with SIGKILL, while user code sleeps."""
    (tmp_path / "mine.py").write_text(OWN)
    code = (
        "from stages.problems import catalog\nfrom stages.problems.base import Answer\n"
        f"p = catalog.load({{'file': {str(tmp_path / 'mine.py')!r}, 'workers': 1}})\n"
        "row, = p.rows('train', 0, 1, 0)\nprint('ready', flush=True)\np.judge([Answer(row, 'sleep')])"
    )
    stage = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment())
    assert stage.stdout and stage.stdout.readline() == "ready\n"
    assert workers_alive(mark)
    stage.kill()
    stage.wait()
    assert wait_for(lambda: not workers_alive(mark), PATIENT)


def test_a_message_says_what_a_hanging_call_printed_last(tmp_path):
    mine = own(tmp_path, time_limit=3.0)
    (row,) = mine.rows("train", 0, 1, 0)
    (judgement,) = mine.judge([Answer(row, "print")])
    (finding,) = failures.found("rl", mine, [judgement.failure])
    assert finding.evidence == {"timeout": 1.0, "answers": 1.0}
    assert finding.advice.endswith("no answer within 3 s; it printed last: last words")
    mine.guard.close()


def test_too_many_failures_stop_the_stage_with_counts_and_the_first_message(tmp_path):
    """10 of 100 may fail; the eleventh is one too many, whatever the size of a call."""
    mine = own(tmp_path, max_failures=0.1)
    (row,) = mine.rows("train", 0, 1, 0)
    mine.judge([Answer(row, "raise")] * 10)
    with pytest.raises(
        TooManyFailures,
        match=r"failed on 11 of the first 11 .*exception 10, not_a_number 1.*max_failures=0.1.*mine.py:\d+: "
        r"ValueError: bad luck",
    ):
        mine.judge([Answer(row, "nan")])
    mine.guard.close()


def test_a_share_of_failures_that_is_allowed_stops_nothing(tmp_path):
    mine = own(tmp_path, max_failures=0.1)
    (row,) = mine.rows("train", 0, 1, 0)
    judged = mine.judge([Answer(row, "raise" if i < 30 else "1") for i in range(300)])
    assert sum(one.failure is not None for one in judged) == 30
    mine.guard.close()


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("def rows(:\n", r"mine.py:1: SyntaxError"),
        ("import nothing_like_it\n", r"mine.py: its import failed: mine.py:1: ModuleNotFoundError"),
        (OWN.replace("def score", "def scores"), r"mine.py has no function score; did you mean scores "
                                                 r"\(mine.py:\d+\)\?"),
        (OWN.replace("def score(row, completion)", "def score(completion)"), r"mine.py:\d+: score\(completion\) "
                                                                             r"cannot be called with \(row, "
                                                                             r"completion\)"),
        (OWN.replace("REWARDS = ", "REWARD = "), r"mine.py: REWARDS is None, expected component: weight"),
        (OWN + "import os; os._exit(4)\n", r"mine.py: its import failed \(crash\): its process ended with exit code 4"),
        (OWN + "import os; os._exit(255)\n", r"mine.py: its import failed \(crash\): its process ended with exit "
                                             r"code 255"),
        (OWN.replace('"right": 1.0', '"right": 1e300'), r"mine.py: REWARDS has 'right': 1e\+300, expected a name and "
                                                        r"a weight of at most 1e\+06"),
        (OWN.replace('"prompt": f"', '"prompt": "\\ud83d" + f"'), r"row 0 of rows\(rng\): .*surrogates not allowed"),
        (OWN.replace('"n": i', '"n": {1}'), r"row 0 of rows\(rng\): Object of type set"),
        (OWN.replace('"prompt"', '"prompts"'), r"expected a dict with a text under 'prompt'"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_refused_in_one_line(tmp_path, code, says):
    mine = own(tmp_path, code)
    with pytest.raises(BadInput, match=says) as refused:
        mine.rows("train", 0, 1, 0)
    assert "\n" not in str(refused.value)
    mine.guard.close()


def test_an_import_that_hangs_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text("import time\ntime.sleep(1000)\n")
    guard = Guard(
        "file",
        {"name": "mine.py", **dict.fromkeys(("path", "copy"), str(tmp_path / "mine.py")), "files": []},
        Limits(1.0, 1.0, 1, import_seconds=1.0),
    )
    with pytest.raises(BadInput, match=r"mine.py: its import did not end within 1 s"):
        guard.about()
    guard.close()


def test_rows_are_shared_out_by_content_and_too_few_are_said_with_the_counts(problem):
    seen = {split: {row.id for row in problem.rows(split, 0, 80, 0)} for split in ("train", "validation", "held_out")}
    assert not seen["train"] & seen["validation"] and not seen["train"] & seen["held_out"]
    with pytest.raises(
        BadInput, match=r"it has train (\d+), validation (\d+), held_out (\d+): ask for fewer"
    ) as refused:
        problem.rows("train", 0, 1000, 0)
    assert (
        sum(int(word) for word in str(refused.value).replace(",", "").replace(":", "").split() if word.isdigit()) >= 400
    )


def test_async_functions_are_awaited(tmp_path):
    mine = own(tmp_path, OWN.replace("def rewards", "async def rewards"))
    (row,) = mine.rows("train", 0, 1, 0)
    (judged,) = mine.judge([Answer(row, mine.demonstration(row, random.Random(0)))])
    assert judged.rewards == {"right": 1.0, "short": 1 / (1 + len(str(row.columns()["n"] + 1)))}
    mine.guard.close()


def test_rewards_are_the_same_in_process_and_through_the_guard(problem):
    namespace: dict[str, Any] = {}
    exec(OWN, namespace)
    rows = problem.rows("validation", 0, 50, 0)
    texts = [str(i) for i in range(50)]
    judged = problem.judge([Answer(row, text) for row, text in zip(rows, texts, strict=True)])
    assert [one.rewards for one in judged] == [
        namespace["rewards"](row.columns(), text) for row, text in zip(rows, texts, strict=True)
    ]


@pytest.mark.parametrize(
    ("value", "failure"),
    [("1e9", None), ("1.1e9", "out_of_range"), ("-1e39", "out_of_range"), ("1e400", "not_a_number")],
)
def test_a_reward_that_float32_could_not_square_is_no_reward(value, failure, tmp_path):
    mine = own(tmp_path, OWN.replace('"right": float(completion == str(row["n"] + 1))', f'"right": {value}'))
    (row,) = mine.rows("train", 0, 1, 0)
    (judgement,) = mine.judge([Answer(row, "x")])
    assert judgement.failure == failure
    mine.guard.close()


def test_an_answer_that_could_not_be_judged_does_not_pass(tmp_path):
    """Even where a score of 0 would."""
    mine = own(tmp_path, OWN.replace("return score >= 1", "return score < 0.2"))
    (row,) = mine.rows("train", 0, 1, 0)
    bad, wrong = mine.judge([Answer(row, "raise"), Answer(row, "wrong")])
    assert (bad.failure, wrong.failure) == ("exception", None)
    assert (passes(mine, bad), passes(mine, wrong)) == (False, True)
    mine.guard.close()


def test_what_user_code_says_can_be_written_anywhere_and_holds_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "sk-0123456789")
    mine = own(tmp_path)
    (row,) = mine.rows("train", 0, 1, 0)
    mine.guard.map("judge", [{"row": row.columns(), "completion": "x"}])
    replies = mine.guard.map("judge", [{"row": row.columns(), "completion": act} for act in ("secret", "half_a_pair")])
    assert replies[0].message.endswith("ValueError: refused: [SOME_API_KEY]")
    assert replies[1].message.endswith(r"ValueError: \ud83d")
    mine.guard.close()


def test_what_moves_on_while_it_is_killed_is_caught(tmp_path, mark):
    """A chain of processes, each of which forks the next and ends, with none of our marks in its environment."""
    chain = (
        "import os, sys, time\n"
        "for _ in range(40000):\n"
        "    if os.fork(): os._exit(0)\n"
        "    os.setsid(); time.sleep(0.0005)\n"
    )
    code = OWN.replace(
        "def boom():",
        f"def move_on():\n    import subprocess\n    subprocess.Popen([sys.executable, '-S', '-c', {chain!r}, "
        f"{mark!r}], env={{}})\n    time.sleep(1000)\ndef boom():",
    ).replace('"print":', '"move_on": move_on, "print":')
    mine = own(tmp_path, code, time_limit=1.0)
    (row,) = mine.rows("train", 0, 1, 0)
    assert [one.failure for one in mine.judge([Answer(row, "move_on")])] == ["timeout"]
    mine.guard.close()
    assert not any(named(mark) for _ in range(20))


def named(mark: str) -> set[int]:
    """Processes whose command line holds a mark."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "cmdline").read_bytes():
                found.add(int(entry.name))
        except OSError:
            pass
    return found


WALKS_A_SET = """
import os
REWARDS = {"right": 1.0}
def rows(rng):
    seen = " ".join(sorted(os.environ))
    for word in {f"word {i}" for i in range(400)}:
        yield {"prompt": f"{word} {seen}"}
def rewards(row, completion):
    return {"right": 1.0}
def score(row, completion):
    return 1.0
"""


def test_a_set_is_walked_in_the_same_order_in_every_process_and_foreign_variables_are_not_seen(tmp_path, monkeypatch):
    """The rows of an evaluation are asked for again by every policy; a rank has RANK, and user code does not."""
    foreign = {"PYTHONHASHSEED": "random", "RANK": "1", "PYTHONPATH": "/nowhere", "SOME_API_KEY": "for-a-judge"}
    for name, value in foreign.items():
        monkeypatch.setenv(name, value)
    problems = [own(tmp_path, WALKS_A_SET, workers=1) for _ in range(2)]
    first, second = ([row.prompt for row in problem.rows("train", 0, 50, 0)] for problem in problems)
    for problem in problems:
        problem.guard.close()
    assert first == second
    seen = first[0].split()
    assert "SOME_API_KEY" in seen and not {"RANK", "PYTHONPATH"} & {*seen}


STARTS_PROCESSES = """
import multiprocessing, os, subprocess, time
REWARDS = {"right": 1.0}
calculator = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) if HELPER else None
def rows(rng):
    for i in range(400):
        yield {"prompt": f"What is {i} + 1?", "n": i}
def rewards(row, completion):
    return {"right": 1.0}
def score(row, completion):
    return ACTS[completion](row)
def by_a_process(row):
    open(os.environ["TEST_BEGAN"], "a").close()
    done = subprocess.run(["sh", "-c", "while [ ! -e $TEST_GO ]; do sleep 0.05; done; echo 1"], capture_output=True)
    return float(done.stdout or 0)
def by_the_helper(row):
    try:
        print("1", file=calculator.stdin, flush=True)
        return float(calculator.stdout.readline() or 0)
    except BrokenPipeError:
        return 0.0
def by_a_fork(row):
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    child.terminate()
    child.join()
    return 1.0
def as_usual(row):
    status = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True).stdout
    masks = dict(line.split(":\\t") for line in status.splitlines() if line.startswith("Sig"))
    return float(not (int(masks["SigIgn"], 16) | int(masks["SigBlk"], 16)) & 1 << 14)
def ends_itself(row):
    os.kill(os.getpid(), 15)
    return 1.0
ACTS = {each.__name__: each for each in (by_a_process, by_the_helper, by_a_fork, as_usual, ends_itself)}
"""


def terminate(mark: str) -> None:
    """SIGTERM to each process of a guard, as one that comes to the whole tree."""
    for pid in sorted(workers_alive(mark)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


@pytest.mark.parametrize("helper", [False, True])
def test_a_signal_to_every_process_changes_no_answer(helper, tmp_path, mark, monkeypatch):
    """Processes that user code started end by it, as it expects of them: a call that has one is made again, and a
    worker whose import left one running is replaced."""
    began, go = tmp_path / "began", tmp_path / "go"
    monkeypatch.setenv("TEST_BEGAN", str(began))
    monkeypatch.setenv("TEST_GO", str(go))
    mine = own(tmp_path, STARTS_PROCESSES.replace("HELPER", str(helper)), workers=1)
    (row,) = mine.rows("train", 0, 1, 0)

    def tell_all():
        assert wait_for(began.exists, PATIENT)
        terminate(mark)
        go.touch()

    thread = threading.Thread(target=tell_all)
    thread.start()
    judged = mine.judge([Answer(row, "by_a_process")])
    thread.join()
    if helper:
        terminate(mark)
        judged += mine.judge([Answer(row, "by_the_helper")])
    judged += mine.judge([Answer(row, act) for act in ("by_a_fork", "as_usual")])
    assert [(one.score, one.failure) for one in judged] == [(1.0, None)] * len(judged)
    (ended,) = mine.judge([Answer(row, "ends_itself")])
    assert ended.failure == "crash"
    mine.guard.close()


def test_time_in_which_the_stage_itself_stood_still_is_not_user_codes(tmp_path, mark):
    """As where a container is paused, or a scheduler suspends a job: the call takes longer than its limit by the clock
    on the wall, and as long as it takes."""
    limit, began, go = 3.0, tmp_path / "began", tmp_path / "go"
    acts = (
        f"import pathlib\ndef pause():\n    pathlib.Path({str(began)!r}).touch()\n"
        f"    while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.05)\n    return 1.0\n"
    )
    (tmp_path / "mine.py").write_text(
        OWN.replace("def boom()", acts + "def boom()").replace('"print":', '"pause": pause, "print":')
    )
    code = (
        "from stages.problems import catalog\nfrom stages.problems.base import Answer\n"
        f"p = catalog.load({{'file': {str(tmp_path / 'mine.py')!r}, 'workers': 1, 'time_limit': {limit}}})\n"
        "row, = p.rows('train', 0, 1, 0)\nfor act in 'pause', 'sleep': print(p.judge([Answer(row, act)])[0].failure)"
    )  # fmt: skip
    stage = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment())
    assert wait_for(began.exists, PATIENT)
    told = signal_tree(stage.pid, signal.SIGSTOP)
    assert len(told) == 3, "the stage, a supervisor and its child"
    time.sleep(1.5 * limit)
    go.touch()
    os.kill(stage.pid, signal.SIGCONT)
    time.sleep(0.2)  # it looks at the clock before user code can answer
    for pid in told:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    out, _ = stage.communicate(timeout=PATIENT)
    assert out.splitlines() == ["None", "timeout"], "what hangs still meets its limit"

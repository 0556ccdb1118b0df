"""What every test may use: a command line in a process of its own, a recipe small enough to run in seconds, an empty
registry.

Nothing is mocked: the model is the tiny base, registries are real directories, processes are real.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a shell's background job ignores Ctrl-C, and so would all that it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import yaml

from stages.runtime.environment import passes
from tests.preloaded import Preloaded

ROOT = Path(__file__).parent.parent
TINY_BASE = ROOT / "configs" / "tiny-base"
SWITCHBACK = Path(sys.executable).parent / "switchback"

STARTED_WITH = frozenset(os.environ)
"""Variables of the suite. Libraries that a test imports, and trainers that it runs here, set others."""
SET_BY_TESTS = ("AWS_", "AZURE_", "GOOGLE_", "HF_", "HTTP", "http", "NO_PROXY", "no_proxy", "SOME_", "TEST_")
"""How the names begin of those that tests set for the commands they start."""

Settings = dict[str, Any]

TINY: Settings = {
    "name": "tiny",
    "model": {"path": str(TINY_BASE), "dtype": "float32"},
    "problem": {"name": "scheduling", "form": "compact"},
    "format": {"prompt": "plain", "response_prefix": "<think>\n"},
    "evaluate": {"rows": 8, "samples": 2, "max_completion_length": 36},
    "validation": {"rows": 4},
    "stages": [
        {
            "name": "warmup",
            "kind": "sft",
            "policy": "base",
            "rows": "train[0:512]",
            "epochs": 1.0,
            "learning_rate": 1.5e-3,
            "prompt_loss_weight": 0.1,
        },
        {
            "name": "rl1",
            "kind": "grpo",
            "policy": "warmup",
            "rows": "train[512:528]",
            "steps": 2,
            "prompts_per_step": 2,
            "group_size": 4,
            "max_completion_length": 36,
            "learning_rate": 5e-4,
        },
        {
            "name": "harvest",
            "kind": "rejection",
            "policy": "rl1",
            "samples": 2,
            "max_completion_length": 36,
            "keep": {"min_score": 0.0},
        },
        {
            "name": "distill",
            "kind": "sft",
            "policy": "warmup",
            "data": "harvest",
            "epochs": 1.0,
            "learning_rate": 1.5e-3,
        },
        {
            "name": "rl2",
            "kind": "grpo",
            "policy": "distill",
            "rows": "train[528:544]",
            "steps": 2,
            "prompts_per_step": 2,
            "group_size": 4,
            "max_completion_length": 36,
            "learning_rate": 5e-4,
        },
    ],
    "launch": {"threads": 1},
}


LEARNED: Settings = {**TINY, "stages": [{**TINY["stages"][0], "epochs": 6.0}, *TINY["stages"][1:]]}
"""The same with enough warm-up that some completions earn a reward, so that RL has something to do."""


LONG = (
    "test_ranks.py",
    "test_resume.py",
    "test_run.py",
    "test_processes.py",
    "test_crashes.py",
    "test_prefect.py",
    "test_custom.py",
    "test_check.py",
)
"""Files that take minutes, the longest first: begun last, they would keep one of two processes busy while the other
has nothing left."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first; the order within a file stays."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture
def settings() -> Settings:
    """The tiny climb as a dict of one's own."""
    return copy.deepcopy(TINY)


def tensors(content: str) -> bytes:
    """A safetensors file with one tensor, whose bytes are the text's."""
    data = content.encode()
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    return struct.pack("<Q", len(header)) + header + data


def stage(settings: Settings, name: str) -> Settings:
    """One box of it."""
    return next(stage for stage in settings["stages"] if stage["name"] == name)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Settings], Path]:
    """Write a recipe file."""

    def write(settings: Settings) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
        return path

    return write


PATIENCE = 300.0
"""Seconds that a command may take, on a machine that does much else; no test waits for it to pass."""


def run_alone(
    *arguments: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The `switchback` command in a process that starts from nothing, as a user runs it."""
    command = [str(SWITCHBACK), *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment(**(env or {})), capture_output=True, text=True, timeout=PATIENCE
    )


def run_cli(
    *arguments: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The same in a process that is forked from one that has done its imports, wherever these cannot matter."""
    full = environment(**(env or {}))
    if not PRELOADED.can(full):
        return run_alone(*arguments, cwd=cwd, env=env)
    return PRELOADED.run([str(argument) for argument in arguments], cwd, full, PATIENCE)


def printed_json(*arguments: str | Path) -> Any:
    """What a command prints as JSON."""
    done = run_cli(*arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def environment(**more: str) -> dict[str, str]:
    """This process's, without what would point a test at somebody's registry or server, and without what a trainer
    that ran in this process left for the next one."""
    foreign = ("SWITCHBACK_", "PREFECT_", "ACCELERATE_")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(foreign) and passes(name) and (name in STARTED_WITH or name.startswith(SET_BY_TESTS))
    }
    return {**kept, **more}


PRELOADED = Preloaded(environment())


@pytest.fixture(scope="session", autouse=True)
def preloaded() -> Iterator[None]:
    """It ends with the tests."""
    yield
    PRELOADED.close()


@pytest.fixture(scope="session")
def climbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(recipe, registry) of the tiny climb, run once for all tests that only look at it."""
    directory = tmp_path_factory.mktemp("climbed")
    recipe = directory / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(LEARNED, sort_keys=False))
    done = run_alone("run", recipe, "--registry", directory / "registry", "--no-prefect")
    assert done.returncode == 0, done.stderr
    return recipe, directory / "registry"


@pytest.fixture(scope="module")
def started() -> Any:
    """An S3 server for the tests of a file; moto takes seconds to import."""
    from tests.object_server import serving

    with serving() as server:
        yield server


@pytest.fixture
def server(started: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The server with an empty bucket, and an environment that leads to it."""
    started.reset()
    for name, value in {**started.env, "SWITCHBACK_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    return started

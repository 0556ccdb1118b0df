"""The command is ours, whatever lies on PYTHONPATH, and its distribution has a name of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import tomllib
from pathlib import Path

import pytest

from pipeline.cli.commands.run import run
from tests.conftest import ROOT, SWITCHBACK, environment, run_alone


def package(directory: Path, name: str) -> Path:
    """A package of the user's with a name of ours; it says so when it is imported."""
    (directory / name).mkdir()
    (directory / name / "__init__.py").write_text("raise SystemExit('not ours')")
    return directory / name / "__init__.py"


def module(directory: Path, name: str) -> Path:
    (directory / f"{name}.py").write_text("raise SystemExit('not ours')")
    return directory / f"{name}.py"


def without_init(directory: Path, name: str) -> Path:
    """A folder of scripts, which Python takes for a package as well where it finds no other."""
    (directory / name).mkdir()
    return directory / name


@pytest.mark.parametrize("name", ["pipeline", "stages", "prompts"])
@pytest.mark.parametrize("put", [module, package])
def test_what_shadows_a_package_of_ours_is_named_and_not_run(put, name, tmp_path):
    path = put(tmp_path, name)
    done = run_alone("plan", ROOT / "configs" / "demo.yaml", env={"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"switchback: PYTHONPATH: {path} would be imported in the place of switchback's own package {name}. Fix: take "
        f"its directory out of PYTHONPATH, or rename it\n"
    )


def test_a_folder_without_init_shadows_nothing(tmp_path):
    without_init(tmp_path, "stages")
    assert run_alone("--version", env={"PYTHONPATH": str(tmp_path)}).returncode == 0


def test_a_closed_stdout_is_no_error(climbed):
    command = f"exec {SWITCHBACK} ls --registry {climbed[1]} >&-"
    done = subprocess.run(["bash", "-c", command], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_path_that_is_too_long_is_one_short_line():
    done = run_alone("ls", "--registry", "a" * 5000)
    assert done.returncode == 2 and len(done.stderr) < 200 and "File name too long. Fix: give a sh" in done.stderr


def test_nohup_outlives_its_terminal():
    """SIGHUP is ignored then, and a run leaves it so."""
    before = {number: signal.getsignal(number) for number in run.ENDINGS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        run._listen()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == run._terminate
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        run._listen()
        assert signal.getsignal(signal.SIGHUP) == run._terminate
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_version_is_that_of_the_project():
    done = run_alone("--version")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert (done.returncode, done.stdout) == (0, f"{version}\n")


def test_no_page_and_no_message_installs_a_strangers_distribution():
    """`switchback` on the package index is a scraper."""
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"] == "switchback-rl"
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    sources = [path for package in ("pipeline", "stages", "prompts") for path in (ROOT / package).rglob("*.py")]
    for path in (*pages, *sources):
        assert not re.search(r"pip install [^`\n]*\bswitchback\b(?!-rl)", path.read_text(encoding="utf-8")), path

"""What `switchback init` writes: a recipe, a problem of one's own, a prompt, and a tiny model, so that the first run
needs no internet.

The tiny model is `configs/tiny-base` of the repository; the wheel carries it here.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from stages.errors import BadInput
from stages.problems.catalog import PROBLEMS

HERE = Path(__file__).parent
OWN = "file"
SETTINGS = {"scheduling": {"form": "compact"}}
"""Settings of built-in problems that suit the tiny model."""
CHOICES = (OWN, *PROBLEMS)
MODEL = "tiny-base"


def write(directory: Path, problem: str) -> list[Path]:
    """Write the starter; returns what was written. Raises BadInput, before anything is written, for an unknown problem
    and for files that are there."""
    if problem not in CHOICES:
        raise BadInput(f"--problem: found {problem!r}, expected one of {', '.join(CHOICES)}")
    names = ["recipe.yaml", "my_prompt.md"]
    if problem == OWN:
        names.append("my_problem.py")
    for name in (*names, MODEL):
        if (directory / name).exists():
            raise BadInput(f"{directory / name} is there already and is not overwritten; give another directory")
    for path in (directory, *directory.parents):
        if path.exists() and not path.is_dir():
            raise BadInput(f"{path} is a file; give a directory, or one that is not there")
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copytree(_tiny_base(), directory / MODEL, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    settings = {"name": problem, **SETTINGS.get(problem, {})}
    if problem == OWN:
        settings = {"file": "my_problem.py"}
    for name in names:
        text = (HERE / name).read_text(encoding="utf-8")
        flow = yaml.safe_dump(settings, default_flow_style=True, sort_keys=False).strip()
        (directory / name).write_text(text.replace("problem: PROBLEM", f"problem: {flow}"), encoding="utf-8")
    return [directory / name for name in (*names, MODEL)]


def _tiny_base() -> Path:
    packaged = HERE / MODEL
    return packaged if packaged.is_dir() else HERE.parents[1] / "configs" / MODEL

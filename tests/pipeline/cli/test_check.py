"""check: what would stop a run before its first step is found without one."""

from __future__ import annotations

import json

import pytest

from pipeline.launch.local import Launcher
from pipeline.plan import plan
from pipeline.recipe import recipe
from pipeline.registry import Registry
from pipeline.run import inspections
from stages.errors import BadInput
from stages.job import Execution
from tests.conftest import run_cli, stage

OWN = """
REWARDS = {"right": 1.0}
def rows(rng):
    for i in range(400):
        yield {"prompt": f"{i} + 1?", "gold": str(i + 1)}
def rewards(row, completion):
    return {"right": float(completion.strip() == row["gold"])}
def score(row, completion):
    return float(completion.strip() == row["gold"])
def baselines(row, rng):
    return {"gold": row["gold"]}
"""
BROKEN = {
    "a syntax error": (("def score", "dfe score"), {}, "mine.py:8: SyntaxError"),
    "no rewards": (("REWARDS", "REWARD"), {}, "mine.py: REWARDS is None, expected component: weight"),
    "no score": (("def score", "def scores"), {}, "mine.py has no function score; did you mean scores"),
    "an import that fails": (
        ("REWARDS", "import nosuch\nREWARDS"),
        {},
        "mine.py: its import failed: mine.py:2: ModuleNotFoundError",
    ),
    "no demonstration": (
        ("", ""),
        {"stages.rl1": {"kind": "sft", "rows": "train[0:8]"}},
        "mine.py has no demonstration",
    ),
    "too few rows to evaluate on": (("", ""), {"evaluate.rows": 1000}, "evaluate.rows: mine.py has "),
    "too few to decide on": (("", ""), {"validation.rows": 200}, "validation.rows: mine.py has "),
    "too few to train on": (("", ""), {"stages.rl1.rows": "train[0:400]"}, "stages.rl1.rows: mine.py has "),
    "a weight of nothing": (
        ("", ""),
        {"stages.rl1.rewards": {"weights": {"left": 2.0}}},
        "stages.rl1.rewards.weights: there is no component left; there is right",
    ),
    "a scale of nothing": (
        ("", ""),
        {"stages.rl1.rewards": {"normalise": {"left": "group"}}},
        "stages.rl1.rewards.normalise: there is no component left",
    ),
    "a sampler that is not here": (("", ""), {"sampler": "vllm"}, "sampler: vllm is not installed here"),
    "a mix of something else": (
        ("", ""),
        {"stages.rl1.mix": {"data": "general.jsonl", "share": 0.1}},
        "general.jsonl, line 1: found text, expected",
    ),
}
"""(what is written otherwise in the file, what in the recipe, what is said)"""


@pytest.fixture(scope="module")
def launcher():
    with Launcher(1) as launcher:
        yield launcher


@pytest.fixture
def own(settings, tmp_path):
    """A recipe of one grpo stage on a problem file that has nothing wrong with it."""
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "general.jsonl").write_text(json.dumps({"text": "hello"}))
    settings["stages"] = [{**stage(settings, "rl1"), "policy": "base", "rows": "train[0:16]"}]
    settings |= {
        "format": {"prompt": "plain", "response_prefix": ""},
        "problem": {"file": str(tmp_path / "mine.py")},
        "evaluate": {"rows": 40},
        "validation": {"rows": 40},
    }
    return settings


def changed(settings, changes, tmp_path):
    for path, value in changes.items():
        first, *rest = path.split(".")
        if first != "stages":
            settings[first] = {**settings[first], rest[0]: value} if rest else value
        elif rest[1:] == ["mix"]:
            stage(settings, rest[0])["mix"] = {**value, "data": str(tmp_path / value["data"])}
        elif rest[1:]:
            stage(settings, rest[0])[rest[1]] = value
        else:
            settings["stages"] = [{"name": rest[0], "policy": "base", **value}]
    return recipe.Recipe.model_validate(settings)


def asked(loaded, tmp_path, launcher):
    registry = Registry(tmp_path / "none")
    planned = plan.plan(loaded, registry)
    found = [one for part in inspections.beforehand(planned, registry, launcher, Execution()) for one in part]
    assert not (tmp_path / "none").exists(), "nothing is written"
    return [finding.severity for finding in found]


def test_a_problem_that_is_sound_has_nothing_said_against_it(own, tmp_path, launcher):
    assert asked(changed(own, {}, tmp_path), tmp_path, launcher) == []


@pytest.mark.parametrize(("rewritten", "changes", "said"), BROKEN.values(), ids=BROKEN.keys())
def test_what_would_stop_a_run_is_found_before_it(rewritten, changes, said, own, tmp_path, launcher):
    (tmp_path / "mine.py").write_text(OWN.replace(*rewritten, 1))
    with pytest.raises(BadInput) as refused:
        asked(changed(own, changes, tmp_path), tmp_path, launcher)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_check_ends_as_a_run_would_where_the_best_answer_is_not_the_best_paid(own, write, tmp_path):
    (tmp_path / "mine.py").write_text(OWN.replace('completion.strip() == row["gold"])}', 'completion == "")}'))
    done = run_cli("check", write(own), "--registry", tmp_path / "r")
    assert done.returncode == 3 and "rl1: " in done.stderr and len(done.stderr.splitlines()) == 1, done
    assert not (tmp_path / "r").exists()


def test_a_model_that_is_not_here_yet_is_not_fetched_and_what_was_looked_at_is_said(own, write):
    own["model"] = {"hub": "nobody/nothing", "dtype": "float32"}
    done = run_cli("check", write(own))
    assert done.returncode == 0, done.stderr
    assert "good; 1 stage: rl1" in done.stdout
    assert "not at prompts, data and rows: nobody/nothing is not on this machine yet" in done.stdout

"""`switchback audit`, and the audit that a run makes of itself: quick, light, seen before anything is trained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.launch.local import Launcher
from pipeline.plan import plan
from pipeline.recipe import recipe
from pipeline.registry import Registry, runs
from pipeline.run import inspections
from pipeline.run.job import job_of
from stages.job import Execution
from stages.problems import catalog
from stages.rewards.audit.audit import with_one_change
from tests.conftest import ROOT, environment, printed_json, run_cli, stage
from tests.stages.inspections.test_inspect_and_probe import on_a_terminal

IMPOSSIBLE = "A 1\n"
"""A response prefix after which no answer has the right form, so that gold is worth nothing."""


@pytest.fixture
def only_rl(settings):
    """The tiny climb without what comes before and after rl1."""
    settings["stages"] = [{**stage(settings, "rl1"), "policy": "base"}]
    return settings


def line(report, name):
    return next(line for line in report["baselines"] if line["name"] == name)


def audit(*arguments):
    return printed_json("audit", *arguments, "--json")


def test_the_reference_reward_pays_for_everything_and_the_audit_says_what_mends_it(settings, write, tmp_path):
    recipe = write({**settings, "problem": {"name": "scheduling", "form": "text"}})
    report = audit(recipe, "--registry", tmp_path / "r")
    gold, everything = report["baselines"][0], line(report, "everything")
    assert (gold["name"], gold["reward"], gold["score"]) == ("gold", pytest.approx(1), pytest.approx(1))
    assert everything["share"] - everything["score"] > 0.4 and everything["outcomes"]["overlap"] > 10
    (flag,) = (one for one in report["findings"] if "everything earns" in one["advice"])
    assert (flag["rule"], flag["severity"], flag["stage"], flag["override"]) == (
        "exploitable",
        "warn",
        "rl1",
        "problem.overlap=zero",
    )
    mended = audit(recipe, "--set", flag["override"], "--registry", tmp_path / "r")
    assert not [one for one in mended["findings"] if "everything earns" in one["advice"]]
    assert line(mended, "everything")["score"] == everything["score"]


def test_the_same_question_has_the_same_answer_and_each_stage_its_own_rows(settings, write, tmp_path):
    recipe, registry = write(settings), tmp_path / "r"
    first, again, rl2 = (audit(recipe, "--registry", registry, *more) for more in ([], [], ["--stage", "rl2"]))
    assert first == again != rl2 and (first["stage"], rl2["stage"]) == ("rl1", "rl2")
    assert not list(registry.glob("artifacts/*"))


def test_rows_may_come_from_a_file(settings, write, tmp_path):
    problem = {"name": "arithmetic"}
    recipe = write({**settings, "problem": problem, "format": {"prompt": "plain"}})
    rows = tmp_path / "rows.jsonl"
    known = [problems_row(problem, i) for i in range(3)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in known))
    report = audit(recipe, "--rows", rows, "--registry", tmp_path / "r")
    assert report["rows"] == 3 and line(report, "gold")["score"] == 1.0


def problems_row(problem, i):
    (row,) = catalog.load(problem).rows("train", i, i + 1, 0)
    return dict(row.columns())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"\xff\xfe", "cannot be read as text"),
        (b'{"a": ', "line 1: found no JSON"),
        (b"[1]\n", "line 1: found [1], expected an object"),
        (b"{}\n", "line 1: "),
    ],
)
def test_rows_that_cannot_be_read_are_bad_input(content, says, settings, write, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(content)
    done = run_cli("audit", write(settings), "--rows", tmp_path / "rows.jsonl", "--registry", tmp_path / "r")
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1


def test_what_is_no_grpo_stage_has_no_rewards_to_audit(settings, write, tmp_path):
    for arguments, says in (
        (["--stage", "warmup"], "no grpo stage is named warmup"),
        (["--stage", "rl3"], "did you mean rl"),
        (["--rows", tmp_path / "nowhere.jsonl"], "nowhere.jsonl is not there"),
    ):
        done = run_cli("audit", write(settings), *arguments, "--registry", tmp_path / "r")
        assert done.returncode == 2 and says in done.stderr
    settings["stages"] = settings["stages"][:1]
    assert "no grpo stage" in run_cli("audit", write(settings), "--registry", tmp_path / "r").stderr


def test_what_differs_in_nothing_but_its_name_is_printed_once(only_rl, write, tmp_path):
    """A reward that pays everything, and a score that gives everything: eight hostile texts are paid like gold."""
    always = HANGS.replace("time.sleep(1000)", "return 1.0").replace('str(row["n"])', "f'<a>{row[\"n\"]}</a>'")
    (tmp_path / "mine.py").write_text(always)
    only_rl["problem"] = {"file": str(tmp_path / "mine.py")}
    only_rl["stages"][0]["rows"] = "train[0:16]"
    arguments = ["audit", write(only_rl), "--registry", tmp_path / "r"]
    shown, report = run_cli(*arguments).stdout, audit(*arguments[1:])
    assert sum(one["name"].startswith("hostile_") for one in report["baselines"]) == 8
    assert "8 hostile ones" in shown and "hostile_long " not in shown
    unearned = [one for one in report["findings"] if one["rule"] == "unearned"]
    assert len(unearned) == 9, "empty, prompt_copied, one_answer and the six hostile texts that do not hold gold alone"
    (alone, several) = sorted((line for line in shown.splitlines() if "unearned:" in line), key=len)
    assert "one_answer scores 100.0 of 100: one class" in alone
    assert (
        "each of empty, prompt_copied, hostile_long, " in several and " scores 100.0 of 100: the score can" in several
    )


def test_bars_are_drawn_on_a_terminal_and_numbers_when_piped(settings, write, tmp_path):
    arguments = ["audit", str(write(settings)), "--registry", str(tmp_path / "r")]
    piped = run_cli(*arguments).stdout
    assert "█" not in piped and "\x1b" not in piped and "warn: exploitable: unsorted earns" in piped
    shown = on_a_terminal(arguments, {"TERM": "xterm-256color", "COLUMNS": "160"})
    (gold,) = (line for line in shown.splitlines() if line.startswith("gold"))
    assert gold.count("█" * 9) == 2


HANGS = """
import time
REWARDS = {"right": 1.0}
def rows(rng):
    for n in range(400):
        yield {"prompt": f"{n}?", "n": n}
def rewards(row, completion):
    return {"right": score(row, completion)}
def score(row, completion):
    time.sleep(1000)
def baselines(row, rng):
    return {"gold": str(row["n"])}
"""


def test_a_reward_that_hangs_on_the_first_gold_answers_ends_the_audit(only_rl, write, tmp_path):
    """And not after the time limit of each of 200 answers."""
    (tmp_path / "mine.py").write_text(HANGS)
    (tmp_path / "tmp").mkdir()
    only_rl["problem"] = {"file": str(tmp_path / "mine.py"), "time_limit": 0.3}
    only_rl["stages"][0]["rows"] = "train[0:16]"
    arguments = ["audit", write(only_rl), "--registry", tmp_path / "r"]
    done = run_cli(*arguments, env={"TMPDIR": str(tmp_path / "tmp")})
    assert done.returncode == 1 and not list((tmp_path / "tmp").iterdir())
    assert done.stderr == (
        "switchback: rl1: the problem's own code judged none of the first 3 gold answers: no answer within 0.3 s; "
        "fix it, or raise problem.time_limit\n"
    )


def test_a_reward_that_fails_on_everything_is_quoted_and_does_not_end_the_audit(only_rl, write, tmp_path):
    (tmp_path / "mine.py").write_text(HANGS.replace("time.sleep(1000)", "return row['m']"))
    only_rl["problem"] = {"file": str(tmp_path / "mine.py")}
    only_rl["stages"][0]["rows"] = "train[0:16]"
    done = run_cli("audit", write(only_rl), "--registry", tmp_path / "r")
    assert done.returncode == 3 and "of 16 gold answers, 16 do not pass" in done.stderr
    assert "such a rollout has no reward; the first said: mine.py:10: KeyError: 'm'" in done.stdout


def test_an_audit_says_how_far_it_is(only_rl, write, tmp_path):
    place, heard = Registry(tmp_path / "r"), list[dict[str, Any]]()
    one = next(one for one in plan.plan(recipe.load(write(only_rl)), place) if one.step.name == "rl1")
    with Launcher(preload=False) as launcher:
        report = inspections.audit(one, None, place, launcher, Execution(), heard.append)
    answers = sum(line.rows for line in report.baselines)
    assert [line["step"] for line in heard] == [*range(0, answers, 32), answers]
    assert {line["total"] for line in heard} == {answers}


def test_an_audit_does_not_import_torch(settings, write, tmp_path):
    planned = plan.plan(recipe.load(write(settings)), Registry(tmp_path / "r"))
    one = next(one for one in planned if one.step.name == "rl1")
    job = job_of(one.step.model_copy(update={"inputs": {}}), {}, Registry(tmp_path / "r"), Execution())
    job = job.model_copy(
        update={"kind": "audit", "config": {}, "work": str(tmp_path / "w"), "out": str(tmp_path / "w" / "out")}
    )
    code = (
        "import sys\nfrom stages.inspections.kinds import INSPECTIONS\nfrom stages.runtime import "
        "worker\nprint(worker.main(sys.argv[1], INSPECTIONS), [m for m in ('torch', 'transformers', 'numpy') if m "
        "in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(job.save())], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.stdout.strip() == "0 []", done.stderr


def test_every_choice_of_a_built_in_problem_is_tried():
    tried = [change for change, _ in with_one_change({"name": "scheduling", "form": "compact"})]
    assert {"problem.overlap=zero", "problem.overlap=reward", "problem.reward_overlap=touching"} < set(tried)
    assert "problem.overlap=remove" not in tried and not list(with_one_change({"file": "mine.py"}))


def test_a_run_ends_before_it_trains_where_gold_is_not_the_best(only_rl, write, tmp_path):
    only_rl["format"] = {"prompt": "plain", "response_prefix": IMPOSSIBLE}
    recipe, registry = write(only_rl), tmp_path / "r"
    shown = run_cli("audit", recipe, "--registry", registry)
    assert shown.returncode == 3 and "gold" in shown.stdout and "16 do not pass" in shown.stderr
    done = run_cli("run", recipe, "--registry", registry, "--no-prefect")
    assert done.returncode == 3 and done.stderr.startswith("switchback: rl1: of 16 gold answers, 16 do not pass")
    assert "stages.rl1.audit=false" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(registry.glob("artifacts/*"))
    (found, end) = [event for event in remembered(registry) if event["event"] in ("findings", "failed")]
    first = found["findings"][0]
    assert (first["rule"], first["severity"]) == ("gold", "stop")
    assert "16 do not pass" in end["message"]


def remembered(registry: Path):
    """What happened in the only run."""
    (run,) = runs.runs(Registry(registry))
    return runs.events(Registry(registry), run.run)


def test_stages_with_the_same_rewards_are_audited_once_and_a_warning_stops_nothing(only_rl, write, tmp_path):
    only_rl["stages"].append({**stage(only_rl, "rl1"), "name": "rl2", "policy": "rl1", "rows": "train[528:544]"})
    done = run_cli("run", write(only_rl), "--registry", tmp_path / "r", "--no-prefect")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("warn: overlapping earns") == 1 and "--set problem.overlap=zero" in done.stdout
    (found,) = [event for event in remembered(tmp_path / "r") if event["event"] == "findings"]
    assert {one["stage"] for one in found["findings"] if one["rule"] == "exploitable"} == {"rl1"}
    again = run_cli("run", tmp_path / "recipe.yaml", "--registry", tmp_path / "r", "--no-prefect")
    assert "overlapping earns" not in again.stdout, "nothing is going to be trained"


def test_a_stage_that_says_so_is_not_audited(only_rl, write, tmp_path):
    only_rl["format"] = {"prompt": "plain", "response_prefix": IMPOSSIBLE}
    path, registry = write(only_rl), Registry(tmp_path / "r")
    with Launcher(preload=False) as launcher:
        found = [
            inspections.audits(plan.plan(recipe.load(path, overrides), registry), registry, launcher, Execution())
            for overrides in ((), ("stages.rl1.audit=false",))
        ]
    assert [one.severity for one in found[0]][:1] == ["stop"] and found[1] == []

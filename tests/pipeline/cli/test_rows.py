"""rows: what a split holds, as lines that a problem reads back."""

from __future__ import annotations

import json

import pytest

from stages.errors import BadInput
from stages.inspections import rows as rows_job
from stages.job import SPLITS
from stages.problems import catalog
from stages.problems.arithmetic import Arithmetic
from stages.problems.files import rows as rows_of
from tests.conftest import run_cli

REWARD = "def one(completions, **kwargs):\n    return [1.0] * len(completions)\n"


def printed(recipe, *options, cwd):
    done = run_cli("rows", recipe, *options, cwd=cwd)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.splitlines()


def test_the_splits_of_a_dataset_are_all_its_lines_and_can_be_a_dataset_again(settings, write, tmp_path):
    """Written out and read as a file of rows, they have the same ids."""
    lines = [{"question": f"{i} è 1?", "id": f"mine-{i}", "gold": str(i)} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "r.py").write_text(REWARD)
    settings["problem"] = {"dataset": "rows.jsonl", "prompt": "question", "gold": "gold", "rewards": ["r.py:one"]}
    recipe = write(settings)
    splits = {split: printed(recipe, "--split", split, cwd=tmp_path) for split in SPLITS}
    found = [json.loads(line) for some in splits.values() for line in some]
    assert sorted((row["question"], row["gold"]) for row in found) == sorted((r["question"], r["gold"]) for r in lines)
    assert "è" in splits["train"][0] and {*found[0]} == {"id", "question", "gold"}

    (tmp_path / "train.jsonl").write_text("\n".join(splits["train"]))
    here = {"dataset": str(tmp_path / "rows.jsonl"), "rewards": [f"{tmp_path / 'r.py'}:one"]}
    problem = catalog.load({**settings["problem"], **here})
    again = rows_of(problem, tmp_path / "train.jsonl")
    assert [row.id for row in again] == [json.loads(line)["id"] for line in splits["train"]]
    assert again == problem.rows("train", 0, len(again), 0)
    problem.guard.close()


def test_a_range_is_the_rows_that_a_stage_of_this_seed_has(settings, write, tmp_path):
    settings["seed"] = 3
    problem = catalog.load(settings["problem"])
    found = [json.loads(line) for line in printed(write(settings), "--split", "train[5:9]", cwd=tmp_path)]
    assert [row["id"] for row in found] == [row.id for row in problem.rows("train", 5, 9, 3)]
    assert [problem.row(row) for row in found] == problem.rows("train", 5, 9, 3)


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ("train", "scheduling makes as many rows as it is asked for; name a range, such as train[0:1000]"),
        ("test", "--split: rows: found 'test', expected a range such as train[0:1000]"),
        ("held_out[3:3]", "--split: rows: found 'held_out[3:3]', expected a range"),
    ],
)
def test_what_has_no_end_or_is_no_split_is_refused(split, said, settings, write, tmp_path):
    done = run_cli("rows", write(settings), "--split", split, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and not done.stdout


def test_a_split_without_an_end_asks_for_a_range(monkeypatch):
    monkeypatch.setattr(rows_job, "MOST", 20)
    config = rows_job.RowsConfig(split="validation")
    with pytest.raises(BadInput, match=r"has 20 rows in it or more, and may have no end; name a range, such as valid"):
        rows_job._whole(Arithmetic(), config, 0)
    monkeypatch.setattr(rows_job, "MOST", 60)
    assert 10 < len(rows_job._whole(Arithmetic(digits=1, operations=("+",)), config, 0)) < 40

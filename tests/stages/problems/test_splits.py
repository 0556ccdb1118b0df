"""Splits of a user's own problem are disjoint for the model: by what rows ask, and the same in every process."""

from __future__ import annotations

import hashlib
import json
import random
from collections import defaultdict

import pytest

from stages.errors import BadInput, TooFew
from stages.job import SPLITS
from stages.problems import catalog
from stages.problems.base import Row

REWARD = "def one(completions, **kwargs):\n    return [1.0] * len(completions)\n"
FILE = """
import json
REWARDS = {"right": 1.0}
def rows(rng):
    yield from map(json.loads, open(__file__[:-3] + ".jsonl"))
def rewards(row, completion):
    return {"right": 1.0}
def score(row, completion):
    return 1.0
"""


def questions(count: int) -> list[str]:
    rng = random.Random(0)
    return [f"What is {rng.randrange(10**6)} + {rng.randrange(10**6)}?" for _ in range(count)]


def write(tmp_path, lines):
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "rewards.py").write_text(REWARD)


def problem(tmp_path, kind: str, **more):
    """A problem with the rows of `mine.jsonl`."""
    if kind == "file":
        return catalog.load({"file": str(tmp_path / "mine.py"), "workers": 1})
    settings = {"dataset": str(tmp_path / "mine.jsonl"), "rewards": [f"{tmp_path / 'rewards.py'}:one"], "workers": 1}
    return catalog.load({**settings, **more})


def every_row(one, split) -> list[Row]:
    """All rows of a split, as a range of the size that it is said to have."""
    with pytest.raises(TooFew) as error:
        one.rows(split, 0, 100_000, 0)
    return one.rows(split, 0, error.value.there, 0)


@pytest.mark.parametrize("kind", ["file", "dataset"])
def test_a_question_is_in_one_split_whatever_the_other_columns_and_blanks_are(kind, tmp_path):
    """Each question stands there three times: with another idx, another source, and other white space."""
    spaced = [text.replace(" ", "  ", 1) + "\n" for text in questions(120)]
    texts = [*questions(120), *questions(120), *spaced]
    lines = [{"idx": i, "prompt": text, "source": i % 2 * "a"} for i, text in enumerate(texts)]
    write(tmp_path, lines)
    one = problem(tmp_path, kind)
    splits = {split: every_row(one, split) for split in SPLITS}
    one.guard.close()
    seen = defaultdict(set)
    for split, rows in splits.items():
        for row in rows:
            seen["".join(row.prompt.split())].add(split)
    assert len(seen) == 120 and all(len(found) == 1 for found in seen.values())
    assert sum(map(len, splits.values())) == 360, "rows that differ in a column are rows of their own"
    assert {split: len({row.prompt.strip() for row in rows}) > 20 for split, rows in splits.items()} == dict.fromkeys(
        SPLITS, True
    )
    content = json.dumps(dict(sorted(lines[0].items())), separators=(",", ":"))
    first = next(row for rows in splits.values() for row in rows if row.columns()["idx"] == 0)
    assert first.id == hashlib.sha256(content.encode()).hexdigest()[:16], "an id is that of all columns"


@pytest.mark.parametrize("kind", ["file", "dataset"])
def test_rows_with_one_prompt_that_fill_one_split_are_explained(kind, tmp_path):
    write(tmp_path, [{"idx": i, "prompt": "Solve it."} for i in range(50)])
    one = problem(tmp_path, kind)
    with pytest.raises(TooFew, match=r"\(50 rows have 1 prompts, and rows with one prompt are in one split\)"):
        one.rows("held_out", 0, 60, 0)
    one.guard.close()


UNSTABLE = {
    "what the system draws": "yield from asks(os.urandom(4).hex() for _ in range(60))",
    "a generator that was not seeded": "yield from asks(random.random() for _ in range(60))",
    "the process": "yield from asks(f'{i} {os.getpid()}' for i in range(60))",
    "what earlier calls left": "CALLS.append(1)\n    yield from asks(f'{i} {len(CALLS)}' for i in range(60))",
}


def own_rows(tmp_path, body):
    """A problem file whose `rows` has this body."""
    top = "import os, random\nCALLS = []\ndef asks(values):\n    return ({'prompt': f'{value}?'} for value in values)\n"
    code = FILE.replace('yield from map(json.loads, open(__file__[:-3] + ".jsonl"))', body)
    (tmp_path / "mine.py").write_text(top + code)
    return problem(tmp_path, "file")


@pytest.mark.parametrize("name", UNSTABLE)
def test_rows_that_are_others_in_another_worker_are_refused(name, tmp_path):
    one = own_rows(tmp_path, UNSTABLE[name])
    with pytest.raises(BadInput, match=r"mine.py: rows\(rng\) makes other rows each time it is asked: row \d+ was"):
        one.rows("train", 0, 5, 0)
        one.rows("held_out", 0, 5, 0)  # a worker's second call, where the calls before it are what counts
    one.guard.close()


def test_rows_that_walk_a_set_are_the_same_in_every_process_or_refused(tmp_path):
    seen = set()
    for _ in range(3):
        one = own_rows(tmp_path, "yield from asks({f'{i} and {i * 7}' for i in range(500)})")
        try:
            seen.add(tuple(row.prompt for row in one.rows("held_out", 0, 10, 0)))
        except BadInput as error:
            assert "makes other rows each time it is asked" in str(error)
        one.guard.close()
    assert len(seen) <= 1


def test_rows_by_the_given_generator_are_accepted_and_never_change(tmp_path):
    rows = []
    for _ in range(2):
        one = own_rows(tmp_path, "yield from asks(rng.random() for _ in range(500))")
        rows.append([*one.rows("held_out", 0, 10, 0), *one.rows("train", 3, 9, 1)])
        one.guard.close()
    assert rows[0] == rows[1] and len(rows[0]) == 16


def test_a_gold_column_of_a_dataset_is_what_it_demonstrates(tmp_path):
    write(tmp_path, [{"prompt": text, "best": f"It is {i}."} for i, text in enumerate(questions(60))])
    one = problem(tmp_path, "dataset", gold="best")
    for row in one.rows("train", 0, 5, 0):
        assert one.demonstration(row, random.Random(0)) == row.columns()["best"]
    one.guard.close()
    without = problem(tmp_path, "dataset")
    with pytest.raises(BadInput, match=r"name the column with the best completion as problem\.gold"):
        without.demonstration(row, random.Random(0))

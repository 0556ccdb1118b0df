"""What a checkpoint's record says, on files alone: which one is whole, to what it belongs, what is set aside."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from stages.job import Execution, Job
from stages.runtime import checkpoints
from stages.sft import SftConfig
from stages.trl.resume import asked

PROBLEM = {"file": "/here/mine.py", "time_limit": 10.0}
EXECUTION = {"processes": 1, "micro-batch": 8, "device": "cpu"}


@pytest.fixture
def job(tmp_path):
    return Job(
        kind="sft",
        name="warmup",
        config={"name": "warmup", "kind": "sft", "policy": "base"},
        inputs={"policy": "/models/tiny"},
        work=str(tmp_path),
        out=str(tmp_path / "out"),
        problem=PROBLEM,
        rows=None,
        format=None,
        seed=0,
        dtype="float32",
        execution=Execution(),
    )


def of(job, execution=EXECUTION):
    return checkpoints.Belongs(asked(job, SftConfig.model_validate(job.config)), execution)


def make(job, *steps):
    for step in steps:
        checkpoint = checkpoints.directory(Path(job.work), step)
        (checkpoint / "logs").mkdir(parents=True)
        (checkpoint / "optimizer.pt").write_bytes(b"state")
        (checkpoint / "logs" / "metrics.jsonl").write_text("{}\n")
        checkpoints.seal(checkpoint, step, of(job))


def leaving(record: Path) -> None:
    """A record that names a file outside the checkpoint."""
    record.write_text(record.read_text().replace("optimizer.pt", "../optimizer.pt"))


def test_the_newest_whole_checkpoint_is_used_by_step_and_not_by_name(job, tmp_path):
    make(job, 9, 10, 2)
    assert checkpoints.newest(Path(job.work), of(job)) == (tmp_path / "checkpoint-10", [])


def test_a_checkpoint_of_another_commit_of_a_model_on_the_hub_is_not_used(job, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model, job = tmp_path / "hub" / "models--org--tiny", job.model_copy(update={"inputs": {"policy": "hf://org/tiny"}})
    for commit in ("a" * 40, "b" * 40):
        (model / "snapshots" / commit).mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("a" * 40)
    make(job, 2)
    assert checkpoints.newest(Path(job.work), of(job))[0] == tmp_path / "checkpoint-2"
    (model / "refs" / "main").write_text("b" * 40)
    found, said = checkpoints.newest(Path(job.work), of(job))
    assert found is None and said[0] == "set aside checkpoint-2: it was made from another job, such as other inputs"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda one: (one / "optimizer.pt").unlink(), "optimizer.pt is not what was saved"),
        (lambda one: (one / "optimizer.pt").write_bytes(b"stale"), "optimizer.pt is not what was saved"),
        (lambda one: (one / "logs" / "metrics.jsonl").write_text(""), "logs/metrics.jsonl is not what was saved"),
        (lambda one: (one / "complete.json").unlink(), "it was not finished"),
        (lambda one: (one / "complete.json").write_text("{"), "its complete.json cannot be read"),
        (lambda one: leaving(one / "complete.json"), "its complete.json cannot be read"),
        (lambda one: (one / "complete.json").write_bytes(b"\xff"), "its complete.json cannot be read"),
    ],
)
def test_a_torn_checkpoint_is_set_aside_and_the_one_before_it_is_used(damage, said, job, tmp_path):
    make(job, 2, 4)
    damage(tmp_path / "checkpoint-4")
    assert checkpoints.newest(Path(job.work), of(job)) == (
        tmp_path / "checkpoint-2",
        [f"set aside checkpoint-4: {said}"],
    )
    assert not (tmp_path / "checkpoint-4").exists() and (tmp_path / "set-aside" / "checkpoint-4").is_dir()


@pytest.mark.parametrize("field", ["processes", "micro-batch", "device"])
def test_a_checkpoint_of_another_execution_is_not_used(field, job):
    make(job, 4)
    _, said = checkpoints.newest(Path(job.work), of(job, {**EXECUTION, field: "other"}))
    assert said == [
        f"set aside checkpoint-4: it was made with {field} {EXECUTION[field]}, not other",
        "starts from its beginning",
    ]


@pytest.mark.parametrize(
    ("change", "used"),
    [
        ({"config": {"name": "renamed", "kind": "sft", "policy": "base", "save_every": 7, "deadline": 60.0}}, True),
        ({"inputs": {"policy": "/elsewhere/models/tiny"}}, True),
        ({"execution": Execution(threads=2)}, True),
        ({"sources": {"policy": "elsewhere"}}, True),
        ({"sampler": "vllm"}, True),
        ({"problem": {**PROBLEM, "max_failures": 0.5, "workers": 2, "file": "/elsewhere/mine.py"}}, True),
        ({"problem": {**PROBLEM, "time_limit": 5.0}}, False),
        ({"config": {"name": "warmup", "kind": "sft", "policy": "base", "epochs": 9.0}}, False),
        ({"inputs": {"policy": "/models/other"}}, False),
        ({"seed": 1}, False),
    ],
)
def test_a_checkpoint_belongs_to_what_was_asked_wherever_it_lies(change, used, job):
    make(job, 4)
    found, said = checkpoints.newest(Path(job.work), of(job.model_copy(update=change)))
    assert (found is not None) == used
    assert used or said[0] == "set aside checkpoint-4: it was made from another job, such as other inputs"


def test_old_checkpoints_go_and_unfinished_ones_do_not_count(job, tmp_path):
    make(job, 1, 2, 3)
    (tmp_path / "checkpoint-4").mkdir()
    checkpoints.keep(tmp_path, last=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-3",
        "checkpoint-4",
    ]

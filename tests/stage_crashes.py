"""Stages that are killed and go on, in a process of its own that imports torch and trl once: python -m
tests.stage_crashes DIRECTORY < scenarios.json

Each scenario runs its job three times: uninterrupted; killed at a point; and again. Prints a JSON line each: what
differs, what was said, what was logged."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.job import Job, parse_rows
from stages.kinds import STAGES
from stages.runtime import checkpoints, worker
from stages.runtime.disk import digest_file
from stages.runtime.metrics import FILE
from stages.runtime.server import load_for_forks
from stages.runtime.workdir import WORDS
from tests.crashes import crash_at, is_write, points

Scenario = dict[str, Any]
"""name, job (path of a job.json), config (over its own), lora, micro_batch, kill: the start of a point's name (the
last one of it), "every", "torn", or "kinds": of every, one for each thing that is done in each directory."""


def main(directory: Path, scenarios: list[Scenario]) -> None:
    """Answer scenarios, a line each crash."""
    load_for_forks()
    gc.collect()
    gc.freeze()
    for scenario in scenarios:
        place = directory / scenario["name"]
        alone = job_of(scenario, place / "alone")
        listed = points(lambda alone=alone: run(alone), place / "alone")
        whole, lines = digests(alone), logged(alone)
        for n, point in chosen(scenario, listed):
            mode = "torn" if scenario["kill"] == "torn" else "before"
            print(json.dumps({"point": point, **crashed(scenario, place / f"{n}", n, mode, whole, lines)}), flush=True)
            shutil.rmtree(place / f"{n}")


def chosen(scenario: Scenario, listed: list[str]) -> Iterator[tuple[int, str]]:
    """(number, name) of the points to kill at: of those that are named alike, the one in the middle."""
    if scenario["kill"] in ("every", "torn", "kinds"):
        alike: dict[str, list[int]] = {}
        for n, point in enumerate(listed):
            if scenario["kill"] != "torn" or is_write(point):
                name = re.sub(r"checkpoint-\d+", "checkpoint-N", point)
                alike.setdefault(name.rpartition("/")[0] or name if scenario["kill"] == "kinds" else name, []).append(n)
        for point, numbers in alike.items():
            yield numbers[len(numbers) // 2], point
    else:
        n = max(n for n, point in enumerate(listed) if point.startswith(scenario["kill"]))
        yield n, listed[n]


def crashed(
    scenario: Scenario, place: Path, n: int, mode: Any, whole: dict[str, str], lines: list[dict[str, Any]]
) -> dict[str, Any]:
    """Kill the job at a point, then run it again, in another execution where the scenario says so; what is other than
    in the uninterrupted run."""
    job = job_of(scenario, place)
    killed = crash_at(lambda: run(job), place, n, mode)
    saved = sorted(path for path in place.glob("checkpoint-*") if (path / checkpoints.COMPLETE).exists())
    so_far = (saved[-1] / checkpoints.LOGS / FILE).read_text() if saved else ""
    job_of({**scenario, **scenario.get("again", {})}, place)
    points(lambda: run(job), place / "nowhere")
    found, said = digests(job), place / WORDS
    return {
        "scenario": scenario["name"],
        "killed": killed,
        "whole": [path.name for path in saved],
        "differs": sorted(path for path in whole.keys() | found.keys() if whole.get(path) != found.get(path)),
        "log": logged(job) == lines,
        "kept": (place / "out" / FILE).read_text().startswith(so_far),
        "said": [json.loads(line)["text"] for line in said.read_text().splitlines()] if said.exists() else [],
    }


def job_of(scenario: Scenario, place: Path) -> Job:
    """The scenario's job, in a place of its own."""
    base = json.loads(Path(scenario["job"]).read_text())
    base |= {"copies": {}}  # they are gone with the publication
    base |= {"work": str(place), "out": str(place / "out"), "config": {**base["config"], **scenario["config"]}}
    if rows := scenario["config"].get("rows"):
        base["rows"] = parse_rows(rows, 0).model_dump()
    base["lora"] = scenario.get("lora")
    base["execution"] |= {name: scenario[name] for name in ("micro_batch", "sampler_tokens") if name in scenario}
    job = Job.model_validate(base)
    job.save()
    return job


def run(job: Job) -> None:
    """The job, its log beside it."""
    log = os.open(Path(job.work).parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    code = worker.main(str(Path(job.work, "job.json")), STAGES)
    assert code == 0, f"exit {code}"


def digests(job: Job) -> dict[str, str]:
    """Of everything that would be published, but for the log, which holds times."""
    files = [path for path in Path(job.out).rglob("*") if path.is_file() and path.name != FILE]
    return {path.relative_to(job.out).as_posix(): digest_file(path) for path in files}


def logged(job: Job) -> list[dict[str, Any]]:
    """The lines of metrics, without their times."""
    lines = [json.loads(line) for line in Path(job.out, FILE).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("seconds", "step_time")} for line in lines]


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main(Path(sys.argv[1]), json.load(sys.stdin))

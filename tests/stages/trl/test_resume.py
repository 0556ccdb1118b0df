"""A stage that is killed goes on from its newest whole checkpoint, and ends bit for bit where it would have ended."""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pyarrow import parquet

from pipeline.launch.local import Launcher
from pipeline.registry import Registry, runs
from stages.job import Job
from stages.runtime.disk import digest_file
from stages.trl.resume import random_state_kept
from tests.conftest import LEARNED, ROOT, SWITCHBACK, environment, printed_json, run_cli, stage
from tests.models import save
from tests.pipeline.launch.test_processes import STARTED, signal_tree, wait_for
from tests.stage_crashes import digests
from tests.stages.test_grpo import trained

LORA = {"r": 4, "alpha": 8.0, "dropout": 0.1, "targets": "all-linear"}
SFT = {"rows": "train[0:64]", "epochs": 2.0, "rows_per_step": 16, "save_every": 2}
SMALL = {"rows": "train[0:16]", "epochs": 1.0, "rows_per_step": 4, "save_every": 1, "keep_last": 1}
GRPO = {"steps": 8, "prompts_per_step": 4, "group_size": 4, "temperature": 1.0, "save_every": 2}
MIDDLE = "open checkpoint-6/trainer_state.json"
"""A point in the middle of training: six steps are done, and what they made is being saved."""
PUBLISHING = "open out/config.json"
CHUNK = "os.rename chunks/"

SCENARIOS = {
    "sft": {"stage": "warmup", "config": SFT, "micro_batch": 8},
    "sft-lora": {"stage": "warmup", "config": SFT, "lora": LORA},
    "sft-packed": {
        "stage": "warmup",
        "config": {**SFT, "packing": {"strategy": "bfd", "max_length": 256}, "epochs": 8.0, "rows_per_step": 4},
    },
    "grpo": {"stage": "rl1", "config": {**GRPO, "kl": {"beta": 0.05}}, "micro_batch": 8},
    "grpo-no-kl": {
        "stage": "rl1",
        "config": {**GRPO, "kl": {"beta": 0.0}, "rewards": {"normalise": "running", "clip": [-2.0, 2.0]}},
    },
    "grpo-iterations": {
        "stage": "rl1",
        "config": {**GRPO, "kl": {"beta": 0.05}, "trl": {"num_iterations": 2}, "steps": 13, "save_every": 11},
        "micro_batch": 4,
        "kill": PUBLISHING,
    },
    "grpo-lora": {"stage": "rl1", "config": {**GRPO, "kl": {"beta": 0.05}}, "lora": LORA},
    "rejection": {"stage": "harvest", "config": {"samples": 128}, "kill": CHUNK, "sampler_tokens": 2**15},
}
"""What is killed in the middle; 16 rows of rl1 are 4 steps an epoch, so that those stages are in their second epoch by
then."""


@pytest.fixture(scope="module")
def jobs(climbed):
    """Stage -> its job.json, of the climb that all tests look at."""
    found = {}
    for path in (climbed[1] / "work").glob("*/job.json"):
        job = Job.model_validate_json(path.read_text())
        found[job.name] = path
    return found


def crash(jobs, directory: Path, *scenarios) -> list[dict]:
    """What came of scenarios (`tests.stage_crashes`)."""
    given = [{"kill": MIDDLE, **one, "job": str(jobs[one["stage"]])} for one in scenarios]
    command = [sys.executable, "-m", "tests.stage_crashes", str(directory)]
    done = subprocess.run(command, cwd=ROOT, input=json.dumps(given), capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def quick():
    """A directory in memory: what is asked here is what survives a process, not a disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def killed(jobs, quick) -> dict[str, list[dict]]:
    """Scenario -> what came of it each time that it was killed: every one in the middle, and what is small at every
    change to its files."""
    scenarios = [{"name": name, **one} for name, one in SCENARIOS.items()]
    scenarios += [
        {"name": f"small-{kill}", "stage": "warmup", "config": SMALL, "kill": kill} for kill in ("kinds", "torn")
    ]
    scenarios.append({"name": "other", **SCENARIOS["sft"], "again": {"micro_batch": 16}})
    found: dict[str, list[dict]] = {}
    for one in crash(jobs, quick, *scenarios):
        found.setdefault(one["scenario"], []).append(one)
    return found


@pytest.fixture(scope="module")
def middles(killed):
    """Every scenario, killed in the middle."""
    return {name: one for name in SCENARIOS for one in killed[name]}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_stage_killed_in_the_middle_ends_bit_for_bit_where_it_would_have_ended(name, middles):
    one = middles[name]
    assert one["killed"]
    assert one["differs"] == []
    assert one["log"], "the log holds every step once, with the same numbers"
    assert one["kept"], (
        "no step before the checkpoint was run again: their lines are those of the first attempt, times and all"
    )


@pytest.mark.slow
def test_it_goes_on_from_its_newest_whole_checkpoint_and_names_the_torn_one(middles):
    torn = "set aside checkpoint-6: it was not finished"
    assert middles["sft"]["said"] == [torn, "resumed from checkpoint-4"]
    assert middles["grpo-iterations"]["said"] == ["resumed from checkpoint-11"]
    assert middles["rejection"]["said"] == ["resumed with 3 batches that were sampled already"]


@pytest.mark.slow
@pytest.mark.parametrize(("kill", "points"), [("kinds", 25), ("torn", 15)])
def test_a_stage_may_be_killed_at_any_change_to_its_files(kill, points, killed):
    """One of everything that a training stage writes, renames and removes in each directory; `torn` leaves half a line
    in each file that was to be written."""
    found = killed[f"small-{kill}"]
    assert all(one["killed"] for one in found) and len(found) >= points, [one["point"] for one in found]
    for one in found:
        assert (one["differs"], one["log"], one["kept"]) == ([], True, True), one
        if one["whole"]:
            assert one["said"][-1] == f"resumed from {max(one['whole'])}", one


@pytest.mark.full
@pytest.mark.parametrize("kill", ["every", "torn"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_stage_may_be_killed_at_any_change_to_its_files(name, kill, jobs, quick):
    """The cross product: make test-full."""
    killed = crash(jobs, quick, {**SCENARIOS[name], "name": f"{name}-{kill}", "kill": kill})
    print(f"{name}, {kill}: {len(killed)} points")
    for one in killed:
        assert (one["killed"], one["differs"], one["log"]) == (True, [], True), one


@pytest.mark.slow
def test_a_checkpoint_of_another_execution_is_set_aside_and_named(killed):
    (one,) = killed["other"]
    assert one["said"] == [
        "set aside checkpoint-6: it was not finished",
        "set aside checkpoint-4: it was made with micro-batch 8, not 16",
        "set aside checkpoint-2: it was made with micro-batch 8, not 16",
        "starts from its beginning",
    ]


@pytest.mark.slow
def test_two_processes_stop_at_one_step_go_on_exactly_and_not_as_one(jobs, quick):
    base = json.loads(jobs["rl1"].read_text())
    base["config"] |= {**GRPO, "steps": 30, "save_every": None, "kl": {"beta": 0.05}}

    def launch(place: Path, processes: int, at: int | None = None) -> tuple[Job, list[str]]:
        """Run the job, with Ctrl-C at a step; (job, what was said)."""
        execution = {**base["execution"], "processes": processes}
        job = Job.model_validate({**base, "work": str(place), "out": str(place / "out"), "execution": execution})
        words: list[str] = []

        def press(line):
            if at and line["step"] >= at:
                raise KeyboardInterrupt

        launcher.launch(job, on_metrics=press, on_word=words.append)
        return job, words

    with Launcher(1) as launcher:
        whole, _ = launch(quick / "whole", 2)
        with pytest.raises(KeyboardInterrupt):
            launch(quick / "stopped", 2, at=4)
        (checkpoint,) = (quick / "stopped").glob("checkpoint-*")
        assert json.loads((checkpoint / "complete.json").read_text())["execution"]["mixed precision"] == "no"
        resumed, words = launch(quick / "stopped", 2)
        assert words == [f"resumed from {checkpoint.name}"] and digests(resumed) == digests(whole)
        _, words = launch(quick / "stopped", 1)
    assert words == [
        f"set aside {checkpoint.name}: it was made with processes 2, not 1, micro-batch 8, not 16, distribution "
        f"MULTI_CPU, not NO",
        "starts from its beginning",
    ]


@pytest.mark.parametrize("at", [5, 11])
def test_a_trainer_resumes_exactly_inside_a_generation_of_several_steps(at, tmp_path):
    """steps_per_generation 4 at one micro-step a step, 8 steps an epoch: both checkpoints are inside a generation, the
    second in another epoch."""
    policy = save(tmp_path / "policy")
    settings = {"steps_per_generation": 4, "max_steps": 14, "beta": 0.1, "save_strategy": "steps", "save_steps": at}
    _, _, whole = trained(policy, tmp_path / "a", **settings)
    trainer, seen, resumed = trained(
        policy, tmp_path / "b", resume=str(tmp_path / "a" / f"checkpoint-{at}"), **settings
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert trainer.state.global_step == 14 and len(seen) == 32 * (4 - (at + 3) // 4), (
        "what was sampled before is not sampled again"
    )


def test_looking_moves_no_random_state():
    def draws():
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    expected = draws()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    with random_state_kept():
        draws()
    assert draws() == expected


def test_evaluation_inside_training_does_not_change_the_training(tmp_path):
    policy = save(tmp_path / "policy")
    _, _, plain = trained(policy, tmp_path / "a", max_steps=4)
    _, _, watched = trained(
        policy, tmp_path / "b", max_steps=4, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=8
    )
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


# the command line


GRACE = 120.0
"""Seconds that a job has to save, where a test shows that nobody waits for their end."""
LONG = {"steps": 60, "prompts_per_step": 4, "group_size": 4, "temperature": 1.0}


@pytest.fixture(scope="module")
def long_recipe(tmp_path_factory):
    """A climb with an rl1 that takes some seconds, and a step in none."""
    settings = copy.deepcopy(LEARNED)
    stage(settings, "rl1").update(LONG)
    path = tmp_path_factory.mktemp("long") / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def uninterrupted(long_recipe, climbed, tmp_path_factory):
    """Digests of its rl1."""
    registry = Path(shutil.copytree(climbed[1], tmp_path_factory.mktemp("uninterrupted") / "r"))
    assert run_cli("run", long_recipe, "--registry", registry, "--no-prefect", "--only", "rl1").returncode == 0
    return published(registry)


def published(registry: Path) -> dict[str, str]:
    """Digests of the newest rl1, but for its log, which holds times."""
    newest = Registry(registry).artifacts("rl1")[-1]
    return {file.path: file.sha256 for file in newest.files if file.path != "metrics.jsonl"}


class Running:
    """`switchback run --only rl1` in a process of its own, and its job."""

    def __init__(self, recipe: Path, registry: Path, *more: str) -> None:
        command = [str(SWITCHBACK), "run", str(recipe), "--registry", str(registry), "--no-prefect", "--only", "rl1"]
        command += more
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.registry = registry

    def after(self, steps: int) -> Running:
        """Wait until rl1 has done so many steps."""
        assert wait_for(lambda: self.steps() >= steps, STARTED), self.process.communicate()
        return self

    def steps(self) -> int:
        logs = [path for path in self.registry.glob("work/*/out/metrics.jsonl") if '"reward"' in path.read_text()]
        return len(logs[0].read_text().splitlines()) if logs else 0

    def is_saving(self) -> bool:
        """Whether it has asked its job to stop."""
        registry = Registry(self.registry)
        events = runs.events(registry, runs.runs(registry)[0].run)
        return any(event.get("text", "").startswith("asked to stop") for event in events)

    @property
    def job(self) -> int:
        """The pid of the job, which holds its directory."""
        (log,) = [path for path in self.registry.glob("work/*/out/metrics.jsonl") if '"reward"' in path.read_text()]
        return int((log.parent.parent / "lock").read_text())

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=STARTED)
        return self.process.returncode, out, err


@pytest.fixture
def registry(climbed, tmp_path):
    return Path(shutil.copytree(climbed[1], tmp_path / "r"))


@pytest.mark.slow
def test_sigterm_to_every_process_saves_at_the_next_step_and_the_same_command_goes_on(
    long_recipe, registry, uninterrupted
):
    """As a service manager sends it, and again before the stage has saved. Without any checkpoint on the way:
    save_every is 10 minutes. What was never saved ends where what was saved and resumed ends."""
    running = Running(long_recipe, registry).after(10)
    signal_tree(running.process.pid, signal.SIGTERM)
    assert wait_for(running.is_saving, STARTED)
    signal_tree(running.process.pid, signal.SIGTERM)
    checkpoint = saved(running, 143)
    before = runs.runs(Registry(registry))[0].run
    done = run_cli("run", long_recipe, "--registry", registry, "--no-prefect", "--only", "rl1")
    assert f"continues run {before}, which is stopped" in done.stdout
    assert f"rl1: resumed from {checkpoint.name}" in done.stdout
    assert published(registry) == uninterrupted
    assert not list(registry.glob("work/*/checkpoint-*")), "optimiser states go once the stage is published"
    started = runs.events(Registry(registry), runs.runs(Registry(registry))[0].run)[0]
    assert started["resumes"] == before


@pytest.mark.slow
def test_ctrl_c_saves_as_well_and_a_single_stage_goes_on_from_its_job_file(long_recipe, registry, uninterrupted):
    checkpoint = stopped(Running(long_recipe, registry).after(5), signal.SIGINT, 130)
    alone = [sys.executable, "-m", "stages", str(checkpoint.parent / "job.json")]
    done = subprocess.run(alone, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and f"resumed from {checkpoint.name}" in done.stdout, done.stderr
    found = {path: digest_file(checkpoint.parent / "out" / path) for path in uninterrupted}
    assert found == uninterrupted


def stopped(running: Running, number: int, code: int) -> Path:
    """The checkpoint that a run saves when it is told to stop."""
    os.kill(running.process.pid, number)
    return saved(running, code)


def saved(running: Running, code: int) -> Path:
    """The checkpoint of a run that has been told to stop."""
    ended, out, err = running.end()
    assert ended == code and len(err.splitlines()) == 1, err
    assert "rl1: asked to stop" in out
    (checkpoint,) = running.registry.glob("work/*/checkpoint-*")
    return checkpoint


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once_what_does_not_stop(long_recipe, registry):
    running = Running(long_recipe, registry, "--set", f"launch.grace={GRACE}").after(3)
    job = running.job
    os.kill(job, signal.SIGSTOP)
    # or SIGTERM, whose number is lower, would be taken first on a machine that does much else
    assert wait_for(lambda: " T " in Path(f"/proc/{job}/stat").read_text(), STARTED)
    os.kill(running.process.pid, signal.SIGINT)
    assert wait_for(lambda: is_asked_to_stop(job), STARTED)
    time.sleep(1.0)
    assert running.process.poll() is None, "it waits for the job to save"
    os.kill(running.process.pid, signal.SIGINT)
    asked = time.monotonic()
    ended, _, err = running.end()
    assert ended == 130 and len(err.splitlines()) == 1 and time.monotonic() - asked < GRACE / 2, err
    assert not list(registry.glob("work/*/checkpoint-*"))


def is_asked_to_stop(pid: int) -> bool:
    """Whether SIGTERM waits for a process that stands still."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("ShdPnd:")]
    return bool(int(line.split()[1], 16) & 1 << (signal.SIGTERM - 1))


@pytest.mark.slow
def test_a_job_killed_for_want_of_memory_fails_in_one_line_and_is_resumed(long_recipe, registry, uninterrupted):
    running = Running(long_recipe, registry, "--set", "stages.rl1.save_every=4").after(12)
    os.kill(running.job, signal.SIGKILL)
    ended, _, err = running.end()
    assert ended == 1 and len(err.splitlines()) == 1 and "rl1: killed by signal 9" in err, err
    done = run_cli("run", long_recipe, "--registry", registry, "--no-prefect", "--only", "rl1")
    assert "rl1: resumed from checkpoint-" in done.stdout
    assert published(registry) == uninterrupted


@pytest.mark.slow
def test_a_full_disk_fails_in_one_line_and_nothing_half_is_used(long_recipe, registry, uninterrupted):
    """The optimiser's state is larger than the process may write; the model is not."""
    limit = (1_200_000, 1_200_000)
    command = [str(SWITCHBACK), "run", str(long_recipe), "--registry", str(registry), "--no-prefect", "--only", "rl1"]
    full = subprocess.run(
        [*command, "--set", "stages.rl1.save_every=5"], cwd=ROOT, env=environment(), capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )  # fmt: skip
    assert full.returncode == 1 and len(full.stderr.splitlines()) == 1 and "rl1: " in full.stderr, full.stderr
    done = run_cli(*command[1:])
    assert done.returncode == 0, done.stderr
    assert (
        "rl1: set aside checkpoint-5: it was not finished" in done.stdout
        and "rl1: starts from its beginning" in done.stdout
    )
    assert published(registry) == uninterrupted


def test_resume_runs_what_a_changed_field_needs_and_names_the_field(climbed, registry):
    run = printed_json("runs", "--registry", registry, "--json")[0]["run"]
    done = run_cli(
        "resume", run, "--registry", registry, "--no-prefect", "--set", "stages.rl2.kl.beta=0.01", cwd=registry
    )
    assert done.returncode == 0, done.stderr
    assert "rl2                runs, because kl.beta: 0.001 -> 0.01" in done.stdout
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines if " done in " in line] == ["rl2", "rl2.evaluate"]
    assert run in lines[0]


def test_a_run_that_is_not_there_cannot_be_resumed(registry):
    done = run_cli("resume", "nothing", "--registry", registry)
    assert done.returncode == 2 and "there is no run nothing" in done.stderr


ENDS_BY_SIGTERM = """
import subprocess
REWARDS = {"short": 1.0, "by_a_process": 1.0}
def rows(rng):
    for i in range(400):
        yield {"prompt": f"Say {i}", "n": i}
def rewards(row, completion):
    done = subprocess.run(["sh", "-c", "sleep 0.02; echo 1"], capture_output=True)
    return {"short": 1 / (1 + len(completion)), "by_a_process": float(done.stdout or 0)}
def score(row, completion):
    return 1 / (1 + len(completion))
def demonstration(row, rng):
    return str(row["n"])
"""
MOMENTS = 20


@pytest.mark.full
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_to_every_process_at_any_moment_loses_the_step_under_way_and_no_more(processes, settings, tmp_path):
    """sft, grpo and rejection with user code that starts processes, each stopped many times and evaluated, by signals
    to launcher, server, jobs, ranks, keepers, user code and what that started: make test-full."""
    (tmp_path / "mine.py").write_text(ENDS_BY_SIGTERM)
    few = {"max_completion_length": 8}
    settings |= {"problem": {"file": str(tmp_path / "mine.py")}, "format": {"prompt": "plain"}}
    settings["evaluate"] |= few
    settings["launch"] |= {"processes": processes, "sampler_tokens": 2**11, "grace": 120.0}
    stage(settings, "warmup").update(rows="train[0:64]", rows_per_step=4, epochs=2.0)
    stage(settings, "rl1").update(rows="train[64:96]", steps=30, audit=False, trl={"dataloader_num_workers": 1}, **few)
    stage(settings, "harvest").update(samples=16, **few)
    settings["stages"] = settings["stages"][:3]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    command = ("run", tmp_path / "recipe.yaml", "--no-prefect", "--registry")
    assert run_cli(*command, tmp_path / "whole").returncode == 0
    moments, draw = 0, random.Random(processes)
    while moments < MOMENTS:
        if stopped_once(tmp_path, draw):
            moments += 1
        else:
            assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
            shutil.rmtree(tmp_path / "stopped")
    done = run_cli(*command, tmp_path / "stopped")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def contents(registry: Path) -> dict[str, dict[str, str]]:
    """Step -> file -> digest of what it holds, with the steps in the place of their artifacts' ids. Logs hold times."""
    artifacts = Registry(registry).artifacts()

    def digest(path: Path) -> str:
        text = json.dumps(parquet.read_table(path).to_pylist()) if path.suffix == ".parquet" else None
        content = text.encode() if text else path.read_bytes()
        for one in artifacts:
            content = content.replace(one.id.encode(), one.stage.encode())
        return sha256(content).hexdigest()

    return {
        one.stage: {
            file.path: digest(registry / "artifacts" / one.id / file.path)
            for file in one.files
            if file.path != "metrics.jsonl"
        }
        for one in artifacts
    }


def stopped_once(directory: Path, draw: random.Random) -> bool:
    """Run the recipe until it has made some lines more, and signal all its processes; whether it was still running."""
    registry, lines = directory / "stopped", draw.randint(1, 4)
    command = [SWITCHBACK, "run", directory / "recipe.yaml", "--registry", registry, "--no-prefect"]
    before = sum(made(registry).values())
    run = subprocess.Popen(
        [str(part) for part in command], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    assert wait_for(lambda: run.poll() is not None or sum(made(registry).values()) >= before + lines, STARTED)
    time.sleep(draw.random() / 4)
    known = made(registry)
    signal_tree(run.pid, signal.SIGTERM)
    _, err = run.communicate(timeout=STARTED)
    assert run.returncode in (0, 143), err
    for work, steps in known.items():
        kept = made(registry, saved=True).get(work)
        assert kept is None or kept >= steps, f"{work}: {steps} were made, {kept} are kept"
    return run.returncode == 143


def made(registry: Path, saved: bool = False) -> dict[str, int]:
    """Directory of a step that is not published yet -> the optimiser steps and the batches of completions that were
    made, or those that are saved for good."""
    found = {}
    for job in registry.glob("work/*/job.json"):
        if not (job.parent / "out").exists():
            continue
        batches = len(list(job.parent.glob("chunks/[!.]*.json")))
        log = job.parent / "out" / "metrics.jsonl"
        trains = any(f'"kind": "{kind}"' in job.read_text() for kind in ("sft", "grpo"))  # or it is being written
        steps = len(log.read_text().splitlines()) if trains and log.exists() else 0
        if trains and saved:
            whole = [path.parent.name for path in job.parent.glob("checkpoint-*/complete.json")]
            steps = max((int(name.partition("-")[2]) for name in whole), default=0)
        found[job.parent.name] = steps + batches
    return found

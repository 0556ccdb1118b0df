"""Several processes of one stage compute what one does, are as many as the job is for, and die with their launcher."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from pipeline.registry import Registry
from stages.job import Execution, Job
from stages.runtime.process import descendants, kill_marked, marked, started_at
from tests.conftest import ROOT, SWITCHBACK, environment, run_cli, stage
from tests.one_and_two import one_and_two
from tests.pipeline.flows.test_server import listening
from tests.pipeline.launch.test_processes import SOON, STARTED, TOKEN, is_training, signal_tree, wait_for
from tests.stages.trl.test_sft_loss import relative

TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--local-addr",
    "127.0.0.1",
    "--nproc-per-node",
    "2",
]
LEFT_OVER = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "203.0.113.7",
    "PET_NNODES": "2",
    "TORCHELASTIC_RUN_ID": "another",
}
"""What a shell inside another launcher's job has."""


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(tmp_path):
    """Full and LoRA, accumulated, padding-free, packed and with a ragged last batch, under every normaliser, to
    relative 1e-5."""
    one_and_two("tests.gradients_of_ranks", tmp_path)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == 21
    for name in names:
        one, two = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
        assert one.keys() == two.keys() and relative(one, two) < 1e-5, name


def test_the_climb_in_two_processes_with_adapters(settings, write, tmp_path):
    """sft, grpo and rejection: what each publishes is whole, and says how many made it. What another launcher left in
    the shell is not taken for ours, and what ours gives its ranks reaches them."""
    settings["model"]["lora"] = {"r": 4, "alpha": 8.0}
    settings["launch"]["processes"] = 2
    stage(settings, "harvest")["samples"] = 64
    settings["launch"]["sampler_tokens"] = 2**15  # several batches, so that both processes sample
    registry = tmp_path / "r"
    for name in ("warmup", "rl1", "harvest"):
        command = ("run", write(settings), "--registry", registry, "--no-prefect", "--only", name)
        done = run_cli(*command, env=LEFT_OVER)
        assert done.returncode == 0, done.stderr
    artifacts = {artifact.stage: artifact for artifact in Registry(registry).artifacts()}
    assert {artifact.provenance["processes"] for artifact in artifacts.values()} == {2}
    for artifact in artifacts.values():
        assert artifact.provenance["dropped_environment"] == sorted(LEFT_OVER)
    for name in ("warmup", "rl1"):
        files = {file.path for file in artifacts[name].files}
        assert {"model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"} <= files
        steps = [
            json.loads(line)["step"]
            for line in (registry / "artifacts" / artifacts[name].id / "metrics.jsonl").read_text().splitlines()
        ]
        assert steps == list(range(1, len(steps) + 1)), "one process writes the log"
    alone = tmp_path / "alone"
    settings["launch"]["processes"] = 1
    done = run_cli("run", write(settings), "--registry", alone, "--no-prefect", "--only", "warmup")
    assert done.returncode == 0, done.stderr
    one = next(artifact for artifact in Registry(alone).artifacts() if artifact.stage == "warmup")
    assert one.key == artifacts["warmup"].key, "how many processes is no matter of identity"
    a, b = (
        load_file(place / "artifacts" / artifact.id / "model.safetensors")
        for place, artifact in ((alone, one), (registry, artifacts["warmup"]))
    )
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-4


def test_rollouts_do_not_depend_on_how_many_processes_sample_nor_on_a_signal_to_all_of_them(settings, write, tmp_path):
    """Every sequence has a seed of its own, and the first or the second process samples it the same, beside whichever
    others. Of what two processes sampled before SIGTERM came to each process of the run, nothing is sampled again."""
    settings["stages"] = [{**stage(settings, "harvest"), "policy": "base", "rows": "train[0:24]", "samples": 64}]
    rollouts = []
    for processes in (1, 2):
        settings["launch"] |= {"processes": processes, "sampler_tokens": 2**14 * processes}
        registry = Registry(tmp_path / str(processes))
        command = ("run", write(settings), "--registry", registry.store.root, "--no-prefect")
        sampled = sampled_until_sigterm(command, Path(registry.store.root)) if processes == 2 else 0
        done = run_cli(*command)
        assert done.returncode == 0, done.stderr
        if sampled:
            (said,) = re.findall(r"harvest: resumed with (\d+) batches", done.stdout)
            assert int(said) >= sampled
        assert {(one.kind, one.provenance["processes"]) for one in registry.artifacts()} == {
            ("evaluate", processes),
            ("rejection", processes),
        }
        made = next(artifact for artifact in registry.artifacts() if artifact.kind == "rejection")
        rollouts.append((registry.path(made) / "rollouts" / "rollouts.jsonl").read_text())
    assert rollouts[0] == rollouts[1] and len(rollouts[0].splitlines()) == 24 * 64


def sampled_until_sigterm(command, registry):
    """How many batches a rejection stage had sampled when SIGTERM came to every process of the run."""

    def sampled() -> int:
        jobs = [path for path in registry.glob("work/*/job.json") if '"rejection"' in path.read_text()]
        return sum(len(list(path.parent.glob("chunks/[!.]*.json"))) for path in jobs)

    run = subprocess.Popen(
        [str(SWITCHBACK), *map(str, command)],
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert wait_for(lambda: sampled() > 0, STARTED), run.communicate()
    before = sampled()
    signal_tree(run.pid, signal.SIGTERM)
    _, err = run.communicate(timeout=STARTED)
    assert run.returncode == 143 and len(err.splitlines()) == 1, err
    return before


@pytest.mark.parametrize(
    ("launch", "said"),
    [
        ({"accelerate": "nowhere.yaml"}, "launch.accelerate: nowhere.yaml is not there"),
        ({"accelerate": "FILE", "processes": 1}, "is for num_processes: 2, but launch.processes is 1"),
        ({"processes": 3}, "does not divide by processes=3"),
        ({"accelerate": "BF16", "processes": 2}, "asks for mixed precision (found mixed_precision: bf16, expected no)"),
        ({"accelerate": "ZERO", "processes": 2}, "(found model.dtype bfloat16, expected float32)"),
        ({"accelerate": "FILE_OF_FILE", "processes": 2}, "(found deepspeed_config_file, expected zero_stage"),
    ],
)
def test_processes_that_do_not_add_up_are_one_line(launch, said, settings, write, tmp_path):
    files = {
        "FILE": {},
        "BF16": {"mixed_precision": "bf16"},
        "ZERO": {"distributed_type": "DEEPSPEED"},
        "FILE_OF_FILE": {"deepspeed_config": {"deepspeed_config_file": "ds.json"}},
    }
    for name, content in files.items():
        config = {"distributed_type": "MULTI_CPU", "num_processes": 2, **content}
        (tmp_path / name).write_text(yaml.safe_dump(config))
    settings["launch"] |= launch
    asked = launch.get("accelerate")
    if asked in files:
        settings["launch"]["accelerate"] = str(tmp_path / asked)
    if asked == "ZERO":
        settings["model"]["dtype"] = "bfloat16"
    done = run_cli("run", write(settings), "--registry", tmp_path / "r")
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_launcher_that_starts_fewer_processes_than_it_was_told_is_noticed(settings, write, tmp_path):
    """`accelerate launch --cpu --num_processes 2` runs one process and exits 0."""
    file = tmp_path / "cpu.yaml"
    file.write_text(
        yaml.safe_dump({"distributed_type": "NO", "use_cpu": True, "num_processes": 2, "mixed_precision": "no"})
    )
    settings["launch"] |= {"accelerate": str(file), "processes": 2}
    done = run_cli("run", write(settings), "--registry", tmp_path / "r", "--no-prefect", "--only", "warmup")
    assert done.returncode == 2 and "the job is for 2 processes, but the launcher started 1" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "said"), [("MULTI_GPU", None), ("FSDP", "asks for FSDP, but accelerate made it MULTI_CPU here")]
)
def test_an_accelerate_file_starts_the_processes_and_gets_what_it_asks_for_or_is_refused(
    kind, said, settings, write, tmp_path
):
    """On a CPU accelerate turns both into plain data parallelism; for what was asked as FSDP that is not the same."""
    file = tmp_path / "accelerate.yaml"
    config = {"distributed_type": kind, "use_cpu": True, "num_processes": 2, "num_machines": 1, "mixed_precision": "no"}
    sharding = {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_state_dict_type": "FULL_STATE_DICT",
    }
    file.write_text(yaml.safe_dump({**config, "fsdp_config": sharding} if kind == "FSDP" else config))
    settings["launch"] |= {"accelerate": str(file), "processes": 2}
    done = run_cli("run", write(settings), "--registry", tmp_path / "r", "--no-prefect", "--only", "warmup")
    if said:
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
    else:
        assert done.returncode == 0, done.stderr
        (artifact,) = [one for one in Registry(tmp_path / "r").artifacts() if one.kind == "sft"]
        assert artifact.provenance["processes"] == 2


def test_one_process_that_fails_is_one_line_and_none_is_left(settings, write, tmp_path):
    settings["launch"]["processes"] = 2
    stage(settings, "warmup").update(learning_rate=1e38, warmup_steps=0.0)
    done = run_cli("run", write(settings), "--registry", tmp_path / "r", "--no-prefect", "--only", "warmup")
    assert done.returncode == 1 and "FloatingPointError: the loss is" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr


@contextmanager
def endless_training(settings, write, tmp_path):
    """(the launcher, what marks all its processes) of a warm-up in two processes that has logged a step; nothing of it
    is left afterwards."""
    settings["launch"]["processes"] = 2
    stage(settings, "warmup")["epochs"] = 10_000.0
    mark = f"{TOKEN}={uuid.uuid4().hex}"
    command = [SWITCHBACK, "run", write(settings), "--registry", tmp_path / "r", "--no-prefect", "--only", "warmup"]
    env = environment(**dict([mark.split("=")]))
    launcher = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=env,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert wait_for(lambda: is_training(tmp_path / "r" / "work", "sft"), STARTED)
        yield launcher, mark
    finally:
        kill_marked(mark)
        launcher.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_processes_that_meet_open_no_port_to_the_network_and_none_outlives_the_launcher(
    number, settings, write, tmp_path
):
    """torch's own store listens on every interface."""
    with endless_training(settings, write, tmp_path) as (launcher, mark):
        addresses = set().union(*map(listening, marked(mark)))
        assert not [address for address in addresses if set(address) == {"0"}], "open to all"
        assert len(marked(mark)) >= 5, "launcher, server, job and two ranks"
        os.kill(launcher.pid, number)
        assert wait_for(lambda: not marked(mark), SOON), f"still alive: {marked(mark)}"


def test_a_stage_runs_under_somebody_elses_torchrun(settings, tmp_path):
    """`torchrun -m stages --rank job.json`: a job is a file and a directory, whoever starts it."""
    job = Job(
        kind="sft",
        name="warmup",
        config={**stage(settings, "warmup"), "kind": "sft"},
        inputs={"policy": settings["model"]["path"]},
        work=str(tmp_path),
        out=str(tmp_path / "out"),
        problem=settings["problem"],
        rows={"split": "train", "start": 0, "stop": 64, "seed": 0},
        format={
            "prompt": "plain",
            "prompt_digest": "",
            "system_prompt": "",
            "user_template": "{{ prompt }}",
            "response_prefix": "<think>\n",
        },
        seed=0,
        dtype="float32",
        execution=Execution(processes=2, threads=1),
    )
    (tmp_path / "out").mkdir()
    path = job.save()
    done = subprocess.run(
        [*TORCHRUN, "-m", "stages", "--rank", str(path)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=STARTED,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "result.json").read_text())["seen"]["processes"] == 2
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.full
def test_sigterm_to_every_process_saves_where_accelerate_started_them_and_none_outlives_its_job(
    settings, write, tmp_path
):
    """accelerate's launcher is a program that would end its processes. Afterwards the job goes on by itself, and is
    killed: make test-full."""
    file = tmp_path / "accelerate.yaml"
    config = {"distributed_type": "MULTI_GPU", "use_cpu": True, "num_processes": 2, "mixed_precision": "no"}
    file.write_text(yaml.safe_dump({**config, "num_machines": 1}))
    settings["launch"] |= {"accelerate": str(file), "grace": 120.0}
    with endless_training(settings, write, tmp_path) as (launcher, _):
        told = signal_tree(launcher.pid, signal.SIGTERM)
        assert len(told) >= 6, "launcher, server, job, accelerate's launcher and two ranks"
        launcher.communicate(timeout=STARTED)
        assert launcher.returncode == 143
    (saved,) = (tmp_path / "r").glob("work/*/checkpoint-*/complete.json")
    (job,) = [path for path in (tmp_path / "r").glob("work/*/job.json") if '"sft"' in path.read_text()]
    alone = subprocess.Popen(
        [sys.executable, "-m", "stages", str(job)], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert alone.stdout and alone.stdout.readline() == f"resumed from {saved.parent.name}\n"
    started = descendants(alone.pid)
    alone.kill()
    try:
        assert len(started) >= 3 and wait_for(lambda: not any(map(started_at, started)), SOON)
    finally:
        for pid in started:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        alone.communicate()

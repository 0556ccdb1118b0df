"""A policy that is sharded over two processes (FSDP2) is trained, resumed and published as one that is not.

On a CPU, by `tests.sharded`: NCCL, real memory and attention kernels are not seen here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from stages.job import Job
from tests.conftest import ROOT, TINY, TINY_BASE, environment, run_cli, stage
from tests.pipeline.launch.test_processes import STARTED
from tests.sharded import FIRST

TWO = {
    "compute_environment": "LOCAL_MACHINE",
    "use_cpu": False,
    "num_processes": 2,
    "num_machines": 1,
    "machine_rank": 0,
    "main_process_ip": "127.0.0.1",
    "mixed_precision": "no",
}
ZERO_3 = {
    **TWO,
    "distributed_type": "DEEPSPEED",
    "deepspeed_config": {"zero_stage": 3, "zero3_init_flag": False, "zero3_save_16bit_model": True},
}
FSDP = {
    **TWO,
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_reshard_after_forward": True,
    },
}


def published(directory: Path, stage_of: dict[str, Any], dtype: str = "float32") -> tuple[Job, Path]:
    """(the job of a stage that starts from the base, the policy that it published) of one process."""
    settings = {**TINY, "model": {**TINY["model"], "dtype": dtype}, "stages": [{**stage_of, "policy": "base"}]}
    directory.mkdir()
    recipe, name = directory / "recipe.yaml", stage_of["name"]
    recipe.write_text(yaml.safe_dump(settings))
    done = run_cli("run", recipe, "--registry", directory / "r", "--no-prefect", "--only", name)
    assert done.returncode == 0, done.stderr
    jobs = (Job.model_validate_json(path.read_text()) for path in (directory / "r" / "work").glob("*/job.json"))
    (job,) = (job for job in jobs if job.name == name)
    (weights,) = (directory / "r" / "artifacts").glob(f"{name}-*/model.safetensors")
    return job, weights.parent


def in_two(job: Job, work: Path, accelerate: Path | None) -> Path:
    """The same job for two processes, in a directory of its own."""
    launch = {"processes": 2, "threads": 1, "device": "cpu", "accelerate": str(accelerate) if accelerate else None}
    execution = job.execution.model_copy(update=launch)
    config = {**job.config, "save_every": 2}
    places = {"work": str(work), "out": str(work / "out"), "execution": execution, "config": config}
    (work / "out").mkdir(parents=True)
    return job.model_copy(update=places).save()


def run_ranks(launcher: list[str], *arguments: str | Path) -> None:
    command = [sys.executable, "-m", *launcher, sys.executable, "-P", "-m", "tests.sharded", *map(str, arguments)]
    ours = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    env = environment(**ours, PYTHONPATH=os.pathsep.join([str(ROOT), *sys.path]))  # wherever DeepSpeed was found
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=STARTED)
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if "Error" in line)


def sharding(file: Path) -> list[str]:
    return ["accelerate.commands.launch", "--config_file", str(file), "--num_processes", "2", "--no_python"]


PLAIN = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2", "--no-python"]


def policy(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def farthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


@pytest.fixture
def fsdp(tmp_path):
    file = tmp_path / "fsdp.yaml"
    file.write_text(yaml.safe_dump(FSDP))
    return file


BASE = load_file(TINY_BASE / "model.safetensors")


@pytest.mark.slow
def test_two_processes_that_shard_a_policy_train_resume_and_publish_what_one_does(fsdp, tmp_path):
    """Float32 to rounding, and resumed bit for bit. A bfloat16 policy has bfloat16 masters and is published once:
    accelerate trained float32 masters under the key of bfloat16, and published them, tied weights twice."""
    warmup = {**stage(TINY, "warmup"), "rows": "train[0:128]"}
    exact, one = published(tmp_path / "float32", warmup)
    coarse, one_coarse = published(tmp_path / "bfloat16", warmup, "bfloat16")
    sft, half = in_two(exact, tmp_path / "a", fsdp), in_two(coarse, tmp_path / "b", fsdp)
    run_ranks(sharding(fsdp), half, sft, "--again")

    sharded = policy(sft.parent / "out")
    assert farthest(policy(one), sharded) < 2e-6 < 1e-3 < farthest(sharded, BASE)
    assert "resumed from checkpoint-2" in (sft.parent / "said.jsonl").read_text()
    first = policy(sft.parent / FIRST)
    assert all(torch.equal(first[name], sharded[name]) for name in first)

    assert {tensor.dtype for tensor in policy(half.parent / "out").values()} == {torch.bfloat16}
    assert json.loads((half.parent / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    apart, moved = (farthest(policy(half.parent / "out"), other) for other in (policy(one_coarse), BASE))
    assert apart < moved / 2, (apart, moved)


@pytest.mark.full
def test_rl_in_two_processes_that_shard_a_policy_is_that_of_two_that_do_not(fsdp, tmp_path):
    """One process samples other rollouts than two, so it is no measure here."""
    rewards = {"audit": False, "rewards": {"repetition_penalty": {"ngram": 1}}}  # the base knows no task
    job, _ = published(tmp_path / "one", {**stage(TINY, "rl1"), **rewards, "steps": 3})
    sharded, plain = in_two(job, tmp_path / "a", fsdp), in_two(job, tmp_path / "b", None)
    run_ranks(sharding(fsdp), sharded)
    run_ranks(PLAIN, plain)
    two, shards = policy(plain.parent / "out"), policy(sharded.parent / "out")
    assert farthest(two, shards) < 2e-6 < 1e-4 < farthest(two, BASE), "what learns nothing is equal, too"


@pytest.mark.full
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="pip install deepspeed, with DS_BUILD_OPS=0")
def test_two_processes_under_zero_3_train_resume_and_publish_what_one_does(tmp_path):
    """As under FSDP, in float32: transformers refuses DeepSpeed in bfloat16 on a CPU."""
    exact, one = published(tmp_path / "float32", {**stage(TINY, "warmup"), "rows": "train[0:128]"})
    file = tmp_path / "zero3.yaml"
    file.write_text(yaml.safe_dump(ZERO_3))
    sft = in_two(exact, tmp_path / "a", file)
    run_ranks(sharding(file), sft, "--again")
    sharded, first = policy(sft.parent / "out"), policy(sft.parent / FIRST)
    assert farthest(policy(one), sharded) < 2e-6 < 1e-3 < farthest(sharded, BASE)
    assert "resumed from checkpoint-2" in (sft.parent / "said.jsonl").read_text()
    assert all(torch.equal(first[name], sharded[name]) for name in first)

"""The shell's variables do not reach what computes: a job ends with the same bits in any environment, and its artifact
names what it did not see."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.launch.serving_worker import FORKED, ServingWorker
from pipeline.registry import Registry
from stages.runtime.environment import FAMILIES, OURS, cleaned
from tests.conftest import PATIENCE, ROOT, TINY_BASE, environment, run_alone, run_cli

SECRET = "s3cr3t-value"
MEMBERS: dict[str, dict[str, bool]] = {
    "ACCELERATE_*": {"ACCELERATE_MIXED_PRECISION": False, "ACCELERATE_USE_FSDP": False},
    "FSDP_*": {"FSDP_OFFLOAD_PARAMS": False},
    "PARALLELISM_CONFIG_*": {"PARALLELISM_CONFIG_TP_SIZE": False},
    "RANK": {"RANK": False, "RANKING": True, "MY_RANK": True},
    "WORLD_SIZE": {"WORLD_SIZE": False},
    "LOCAL_*": {"LOCAL_RANK": False, "LOCAL_WORLD_SIZE": False},
    "NODE_RANK": {"NODE_RANK": False},
    "NPROC": {"NPROC": False},
    "MASTER_*": {"MASTER_ADDR": False, "MASTER_PORT": False},
    "TORCHELASTIC_*": {"TORCHELASTIC_RUN_ID": False},
    "PET_*": {"PET_NNODES": False, "PETNAME": True},
    "OMPI_*": {"OMPI_COMM_WORLD_SIZE": False},
    "PMI_*": {"PMI_SIZE": False, "PMIX_RANK": False},
    "PMIX_*": {"PMIX_RANK": False},
    "MV2_*": {"MV2_COMM_WORLD_RANK": False},
    "SLURM_*": {"SLURM_PROCID": False},
    "TORCHDYNAMO_*": {"TORCHDYNAMO_DISABLE": False},
    "TORCHINDUCTOR_*": {"TORCHINDUCTOR_USE_FAST_MATH": False, "TORCHINDUCTOR_CACHE_DIR": True},
    "TORCH_ALLOW_TF32*": {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": False, "TORCH_HOME": True},
    "NVIDIA_TF32_OVERRIDE": {"NVIDIA_TF32_OVERRIDE": False, "NVIDIA_VISIBLE_DEVICES": True},
    "ONEDNN_DEFAULT_FPMATH_MODE": {"ONEDNN_DEFAULT_FPMATH_MODE": False, "ONEDNN_VERBOSE": True},
    "DNNL_DEFAULT_FPMATH_MODE": {"DNNL_DEFAULT_FPMATH_MODE": False},
    "PJRT_DEVICE": {"PJRT_DEVICE": False},
    "USE_TORCH_XLA": {"USE_TORCH_XLA": False},
    "XLA_*": {"XLA_USE_BF16": False},
    "HF_*": {
        "HF_DEBUG": False,
        "HF_TOKEN": True,
        "HF_HOME": True,
        "HF_ENDPOINT": True,
        "HF_HUB_OFFLINE": True,
        "HF_DATASETS_CACHE": True,
    },
    "TOKENIZERS_*": {"TOKENIZERS_PARALLELISM": False},
    "PYTHON*": {
        "PYTHONHASHSEED": False,
        "PYTHONPATH": False,
        "PYTHONOPTIMIZE": False,
        "PYTHONWARNINGS": False,
        "PYTHONUNBUFFERED": True,
        "PYTHONUTF8": False,
    },
}
"""Family -> names, and whether a job sees the user's value."""
OUTSIDE = (
    "PATH",
    "HOME",
    "CUDA_VISIBLE_DEVICES",
    "DS_ACCELERATOR",
    "AWS_SECRET_ACCESS_KEY",
    "https_proxy",
    "OMP_NUM_THREADS",
)


def test_every_family_has_its_row_here():
    assert FAMILIES.keys() == MEMBERS.keys()


@pytest.mark.parametrize("family", MEMBERS)
def test_of_a_family_only_the_named_members_pass(family):
    given = dict.fromkeys((*MEMBERS[family], *OUTSIDE), SECRET)
    variables, dropped = cleaned(given)
    passing = {name for name, passes in MEMBERS[family].items() if passes}
    assert {name for name, value in variables.items() if value == SECRET} == {*passing, *OUTSIDE}
    assert dropped == tuple(sorted(MEMBERS[family].keys() - passing))
    assert {name: variables[name] for name in OURS} == OURS


FOREIGN = {
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_DYNAMO_BACKEND": "eager",
    "ACCELERATE_TORCH_DEVICE": "meta",
    "ACCELERATE_DEBUG_MODE": "true",
    "ACCELERATE_BYPASS_DEVICE_MAP": "true",
    "FSDP_VERSION": "2",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "PARALLELISM_CONFIG_TP_SIZE": "2",
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "NODE_RANK": "1",
    "NPROC": "2",
    "MASTER_ADDR": "203.0.113.7",
    "MASTER_PORT": "1",
    "TORCHELASTIC_RUN_ID": "another",
    "PET_NNODES": "2",
    "PET_MAX_RESTARTS": "3",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMI_SIZE": "2",
    "PMI_RANK": "1",
    "PMIX_RANK": "1",
    "MV2_COMM_WORLD_SIZE": "2",
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "2",
    "TORCHDYNAMO_DISABLE": "1",
    "NVIDIA_TF32_OVERRIDE": "1",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
    "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
    "PJRT_DEVICE": "CPU",
    "USE_TORCH_XLA": "1",
    "HF_DEBUG": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "PYTHONHASHSEED": "7",
    "PYTHONOPTIMIZE": "1",
}
"""What other launchers, notebooks and job systems leave in a shell."""
IN_THE_JOB = {name: value for name, value in FOREIGN.items() if not name.startswith("PYTHON")}
"""Those for which the preloaded command needs no process of its own."""


STARTER = ROOT / "pipeline" / "starter"
SHORT = {
    "name": "small",
    "model": {"path": str(TINY_BASE)},
    "problem": {"file": str(STARTER / "my_problem.py"), "workers": 1},
    "format": {"prompt": str(STARTER / "my_prompt.md")},
    "evaluate": {"rows": 2, "samples": 1, "max_completion_length": 12},
    "validation": {"rows": 2},
    "stages": [
        {
            "name": "warmup",
            "kind": "sft",
            "policy": "base",
            "rows": "train[0:64]",
            "epochs": 1,
            "learning_rate": 1.5e-3,
        },
        {
            "name": "rl1",
            "kind": "grpo",
            "policy": "warmup",
            "rows": "train[64:80]",
            "steps": 2,
            "prompts_per_step": 4,
            "group_size": 4,
            "max_completion_length": 12,
            "learning_rate": 5.0e-4,
            "rewards": {"repetition_penalty": {"ngram": 1}},
            "audit": False,
        },
    ],
    "launch": {"threads": 1},
}
"""A file problem, sft and grpo: guard workers, demonstrations, rollouts and weights, any of which could move."""


@pytest.fixture
def small(write):
    return write(SHORT)


COMPARED = ("model.safetensors", "held_out.jsonl", "validation.jsonl", "rollouts/rollouts.jsonl")
"""Weights, and every answer with its score."""


def made(recipe, registry, run, **env):
    """(the digests of weights and answers by step, provenance by step) of a run in an environment."""
    done = run("run", recipe, "--registry", registry, "--no-prefect", env=env)
    assert done.returncode == 0, (env, done.stderr)
    artifacts = {one.stage: one for one in Registry(registry).artifacts()}
    files = {name: {f.path: f.sha256 for f in one.files if f.path in COMPARED} for name, one in artifacts.items()}
    assert all(files.values()) and len(files) == 5
    return files, {name: one.provenance for name, one in artifacts.items()}


def test_a_run_ends_with_the_same_bits_whatever_other_launchers_left_and_its_artifacts_name_it(small, tmp_path):
    """All of it, and a random part: one variable may hide what another does."""
    expected, plain = made(small, tmp_path / "plain", run_cli)
    assert expected["warmup"]["model.safetensors"] != expected["rl1"]["model.safetensors"], "both stages train"
    assert not [one for one in plain.values() if "dropped_environment" in one], sorted(environment())
    generator = random.Random(0)
    parts = [sorted(IN_THE_JOB), generator.sample(sorted(IN_THE_JOB), 12)]
    for i, names in enumerate(parts):
        given = {name: IN_THE_JOB[name] for name in names} | {"HF_DEBUG_KEY": SECRET}
        found, provenance = made(small, tmp_path / str(i), run_cli, **given)
        assert found == expected, names
        assert {tuple(one["dropped_environment"]) for one in provenance.values()} == {tuple(sorted(given))}
        texts = [path.read_bytes() for path in (tmp_path / str(i)).rglob("*") if path.is_file()]
        assert not [text for text in texts if SECRET.encode() in text], "names are recorded, values are not"


@pytest.mark.full
def test_sixty_random_environments_change_no_bit(small, tmp_path):
    """Each command a process that imports everything in that environment."""
    expected, _ = made(small, tmp_path / "plain", run_alone)
    for seed in range(60):
        generator = random.Random(seed)
        some = generator.sample(sorted(FOREIGN), generator.randrange(1, len(FOREIGN)))
        assert made(small, tmp_path / str(seed), run_alone, **{name: FOREIGN[name] for name in some})[0] == expected, (
            some
        )


def test_a_serving_worker_has_the_clean_environment(monkeypatch):
    """What the kernel says of the real process."""
    for name, value in FOREIGN.items():
        monkeypatch.setenv(name, value)
    worker = ServingWorker(threads=None, preload=False)
    try:
        read = Path(f"/proc/{worker._process.pid}/environ").read_bytes().split(b"\0")
    finally:
        worker.kill()
    seen = dict(entry.split(b"=", 1) for entry in read if entry)
    assert not {name for name in FOREIGN if os.fsencode(name) in seen and name not in OURS}
    assert {name: seen[os.fsencode(name)].decode() for name in OURS} == OURS
    assert seen[b"PYTORCH_NVML_BASED_CUDA_CHECK"] == b"1" and set(worker.dropped) == FOREIGN.keys()


ASKED_FOR_A_GPU = """
import os
import torch
driver = []
def is_available():
    driver.append(os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK") != "1")
    return False
torch.cuda.is_available = is_available
from stages.runtime.server import load_for_forks
load_for_forks()
torch.cuda.is_available()
print(any(driver), torch.cuda.is_initialized())
"""
"""The imports of a serving worker, and whether one asked the driver for a GPU. bitsandbytes and vLLM ask while they are
imported. The suite has neither, so the last line but one asks for them."""


def test_a_serving_worker_asks_no_gpu_driver_before_it_forks():
    """A process that has started the driver cannot use a GPU in its forks."""
    env = {**cleaned(environment()).variables, **FORKED}
    command = [sys.executable, "-P", "-c", ASKED_FOR_A_GPU]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout.splitlines()[-1:] == ["False False"], done.stderr

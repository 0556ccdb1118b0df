"""A stage that trains on 4-bit weights publishes a policy on full ones, and says how far that is from what it trained.

On a CPU, where bitsandbytes is installed: `pip install -e .[nf4]`."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from stages.job import Execution, Format, Job, Lora
from tests.conftest import PATIENCE, ROOT, TINY, TINY_BASE, environment, stage

pytest.importorskip("bitsandbytes")


@pytest.mark.slow
def test_what_is_published_is_the_full_policy_with_the_adapter_and_its_distance_is_a_finding(tmp_path):
    job = Job(
        kind="sft",
        name="warmup",
        config={**stage(TINY, "warmup"), "kind": "sft", "rows": "train[0:64]"},
        inputs={"policy": str(TINY_BASE)},
        work=str(tmp_path),
        out=str(tmp_path / "out"),
        problem=TINY["problem"],
        rows={"split": "train", "start": 0, "stop": 64, "seed": 0},
        format=Format(
            prompt="plain", prompt_digest="", system_prompt="", user_template="{{ prompt }}", response_prefix=""
        ),
        seed=0,
        dtype="float32",
        lora=Lora(r=4, alpha=8.0, quantize="nf4"),
        execution=Execution(threads=1, device="cpu"),
    )
    command = [sys.executable, "-m", "stages", str(job.save())]
    env = environment(PYTHONPATH=os.pathsep.join(sys.path))  # wherever bitsandbytes was found
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "result.json").read_text())["findings"]
    (finding,) = (one for one in found if one["rule"] == "quantized_merge")
    assert 0 < finding["evidence"]["kl"] < 2 and "nats a token" in finding["advice"]
    assert finding["severity"] == ("warn" if finding["evidence"]["kl"] > 0.01 else "note")

    base, policy = load_file(TINY_BASE / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert base.keys() == policy.keys() and {tensor.dtype for tensor in policy.values()} == {torch.float32}
    for name, weight in base.items():
        a, b = (f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight" for part in "AB")
        update = adapter[b].float() @ adapter[a].float() * 2.0 if a in adapter else torch.zeros(())
        assert torch.allclose(policy[name], weight + update, atol=1e-6), name

"""Adapters: trained on a frozen policy, published merged into it and beside it, fresh on the next stage."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.registry import Registry
from stages.errors import BadInput
from stages.job import Lora
from stages.policy.lora import merged, peft_config, quantization, refuse_quantization, save_adapter
from tests.conftest import printed_json, run_cli, stage
from tests.models import make_model, make_tokenizer

TOKENIZER = make_tokenizer()


def adapted(seed=0, dtype=torch.float32, **settings):
    """A model with an adapter that does something."""
    model = get_peft_model(make_model(TOKENIZER).to(dtype), peft_config(Lora(**{"r": 4, "alpha": 8.0, **settings})))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(
                parameter.dtype
            )
    return model


def test_the_merged_policy_says_what_policy_and_adapter_say_together(tmp_path):
    model = adapted().eval()
    ids = torch.randint(3, 300, (2, 9))
    save_adapter(model, tmp_path, None, "/somewhere/base-1")
    whole, kept = merged(make_model(TOKENIZER), tmp_path)
    assert kept == pytest.approx(1.0, abs=1e-4)
    with torch.no_grad():
        together, alone, plain = (
            model(input_ids=ids).logits,
            whole(input_ids=ids).logits,
            make_model(TOKENIZER)(input_ids=ids).logits,
        )
    assert (together - alone).abs().max() < 1e-5 < 1e-2 < (plain - alone).abs().max()
    assert not [name for name, _ in whole.named_parameters() if "lora" in name]


def test_a_bfloat16_policy_is_rounded_once_after_the_sum(tmp_path):
    model = adapted(dtype=torch.bfloat16)
    save_adapter(model, tmp_path, None, "base")
    whole, kept = merged(make_model(TOKENIZER).to(torch.bfloat16), tmp_path)
    assert 0.95 < kept < 1.05
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = (part["default"].weight.detach().float() for part in (module.lora_A, module.lora_B))
            expected = (module.base_layer.weight.detach().float() + b @ a * 2.0).to(torch.bfloat16)
            assert torch.equal(whole.get_submodule(name).weight, expected), name


@pytest.mark.parametrize(("scale", "low", "high"), [(1.0, 0.95, 1.05), (3e-5, 0.0, 0.5)])
def test_what_rounding_leaves_of_a_small_update_is_measured(scale, low, high, tmp_path):
    """bfloat16 has 8 bits: a small update mostly falls below them, and float32 keeps it."""
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= scale
    save_adapter(model, tmp_path, None, "base")
    _, kept = merged(make_model(TOKENIZER).to(torch.bfloat16), tmp_path)
    _, exact = merged(make_model(TOKENIZER), tmp_path)
    assert low < kept < high and exact == pytest.approx(1.0, abs=1e-2)


def test_an_adapter_names_its_base_without_a_path_of_this_machine(tmp_path):
    save_adapter(adapted(), tmp_path, None, "/home/me/registry/artifacts/warmup-12345678")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "warmup-12345678"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_hub_model_is_named_as_on_the_hub(tmp_path):
    save_adapter(adapted(), tmp_path, None, "hf://Qwen/Qwen2.5-0.5B@abc")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "Qwen/Qwen2.5-0.5B"


@pytest.mark.parametrize(("targets", "found"), [("all-linear", 7), (("q_proj", "v_proj"), 2)])
def test_targets_are_the_modules_that_get_an_adapter(targets, found):
    names = {name.split(".")[-4] for name, _ in adapted(targets=targets).named_parameters() if "lora_A" in name}
    assert len(names) == found and "lm_head" not in names


def test_four_bits_are_asked_of_bitsandbytes_and_full_precision_is_the_default(monkeypatch):
    """Of no GPU: the library works on a CPU too."""
    assert quantization(None) is None and quantization(Lora()) is None
    if find_spec("bitsandbytes"):
        found = quantization(Lora(quantize="nf4"))
        assert found and found.load_in_4bit
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # Python's own way to say that it is not installed
    monkeypatch.delitem(sys.modules, "bitsandbytes.functional", raising=False)
    with pytest.raises(BadInput, match="nf4 needs bitsandbytes, which is not installed"):
        quantization(Lora(quantize="nf4"))


def test_a_bitsandbytes_that_does_not_work_here_is_refused_in_one_line(monkeypatch, tmp_path):
    """A build for another CUDA has no kernels, and fails where it is first used."""
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").touch()
    code = "def quantize_4bit(*a, **k):\n    raise RuntimeError('no kernel\\nimage')\ndequantize_4bit = None\n"
    (tmp_path / "bitsandbytes" / "functional.py").write_text(code)
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BadInput, match=r"does not work here \(RuntimeError: no kernel image\)\. Fix: install a build"):
        refuse_quantization()
    for name in ("bitsandbytes", "bitsandbytes.functional"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def climbed_with_adapters(tmp_path_factory):
    """(registry, stage -> artifact) of the tiny climb with adapters, from a base whose own end of turn is another, and
    whose generation settings contradict each other, as Llama 2's did."""
    import copy

    import yaml

    from tests.conftest import TINY, TINY_BASE

    directory = tmp_path_factory.mktemp("lora")
    settings = copy.deepcopy(TINY)
    shutil.copytree(TINY_BASE, directory / "base")
    file = directory / "base" / "generation_config.json"
    contradicting = {"do_sample": False, "temperature": 0.9, "top_p": 0.6}
    ends = {"eos_token_id": 0, "pad_token_id": None}
    file.write_text(json.dumps({**json.loads(file.read_text()), **ends, **contradicting}))
    settings["model"] = {"path": str(directory / "base"), "lora": {"r": 4, "alpha": 8.0}}
    stage(settings, "warmup")["learning_rate"] = 2e-2
    (directory / "recipe.yaml").write_text(yaml.safe_dump(settings))
    done = run_cli("run", directory / "recipe.yaml", "--registry", directory / "r", "--no-prefect")
    assert done.returncode == 0, done.stderr
    registry = Registry(directory / "r")
    return registry, {artifact.stage: artifact for artifact in registry.artifacts()}, directory / "recipe.yaml"


@pytest.mark.parametrize(
    ("name", "before"), [("warmup", None), ("rl1", "warmup"), ("distill", "warmup"), ("rl2", "distill")]
)
def test_a_published_policy_is_the_one_before_it_plus_its_adapter(name, before, climbed_with_adapters, settings):
    registry, artifacts, _ = climbed_with_adapters
    path = registry.path(artifacts[name])
    start = registry.path(artifacts[before]) if before else settings["model"]["path"]
    together = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(start), path / "adapter"
    ).merge_and_unload()
    whole = AutoModelForCausalLM.from_pretrained(path)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(together.parameters(), whole.parameters(), strict=True))
    adapter = load_file(path / "adapter" / "adapter_model.safetensors")
    learnt = any(value.abs().max() > 0 for key, value in adapter.items() if "lora_B" in key)
    assert learnt or name != "warmup", "the others have nothing to learn from here"


def test_a_published_policy_ends_its_turns_where_its_tokenizer_says(climbed_with_adapters):
    registry, artifacts, _ = climbed_with_adapters
    for name in ("warmup", "rl1", "distill", "rl2"):
        policy = AutoModelForCausalLM.from_pretrained(registry.path(artifacts[name]))
        tokenizer = AutoTokenizer.from_pretrained(registry.path(artifacts[name]))
        ends = policy.generation_config.eos_token_id
        assert tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends]), name


def test_the_first_kl_of_an_adapter_stage_is_zero(climbed_with_adapters):
    registry, artifacts, _ = climbed_with_adapters
    for name in ("rl1", "rl2"):
        first = json.loads((registry.path(artifacts[name]) / "metrics.jsonl").read_text().splitlines()[0])
        assert first["kl"] == pytest.approx(0.0, abs=1e-7)


def test_adapters_reuse_and_move_keys_as_everything_else_does(climbed_with_adapters):
    registry, _, recipe = climbed_with_adapters
    again = printed_json("plan", recipe, "--registry", registry.store.root, "--json")
    assert {one["action"] for one in again} == {"reuse"}
    other = printed_json("plan", recipe, "--registry", registry.store.root, "--set", "model.lora.r=8", "--json")
    assert [one["action"] for one in other] == ["reuse"] + ["run"] * 9

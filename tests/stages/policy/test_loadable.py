"""`check` refuses what a run could not load: each of these models passes every other question, fails in `load_policy`,
and is one line before anything is trained. No code of any of them runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
import torch

from stages.errors import BadInput
from stages.inspections.preflight import look_at
from stages.policy import loadable, models
from tests.conftest import TINY_BASE
from tests.models import save
from tests.stages.inspections.test_preflight import GRPO, SFT, job

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
CONFIGS = {
    "a kernel": ({"attn_implementation": "evil/kernel"}, "attn_implementation names code on the hub"),
    "a kernel by version": ({"attn_implementation": "evil/kernel@v1:f"}, "names code on the hub"),
    "a kernel by the inner name": ({"_attn_implementation": "evil/kernel"}, "names code on the hub"),
    "a kernel of one part": ({"attn_implementation": {"": "evil/kernel"}}, "names code on the hub"),
    "a kernel of a part's config": ({"text_config": {"attn_implementation": "evil/kernel"}}, "names code on the hub"),
    "experts": ({"experts_implementation": "evil/kernel"}, "experts_implementation names code on the hub"),
    "flash attention": ({"attn_implementation": "flash_attention_2"}, "flash_attention_2 needs flash_attn, which is"),
    "4 bits": ({"quantization_config": NF4}, "its quantization_config cannot be used here"),
    "GPTQ": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "its quantization_config cannot be used"),
    "AWQ": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "its quantization_config cannot be used"),
    "no such activation": ({"hidden_act": "nosuch"}, "config.json: no model can be built from it (KeyError"),
    "no heads": ({"num_attention_heads": 0}, "config.json: no model can be built from it (ZeroDivisionError"),
    "no such architecture": ({"model_type": "nosuch"}, "config.json cannot be loaded"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return save(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def model(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "model")


def configured(model, changes):
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return model


def refused(model, tmp_path, config=GRPO):
    with pytest.raises(BadInput) as error:
        look_at(job(model, config, tmp_path))
    assert str(error.value).isprintable() and len(str(error.value)) < 1000
    return str(error.value)


@pytest.mark.parametrize(("changes", "said"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_cannot_be_loaded_is_refused_before_anything_is_trained(changes, said, model, tmp_path):
    configured(model, changes)
    assert said in refused(model, tmp_path)
    if "text_config" not in changes:
        with pytest.raises((BadInput, ImportError, LookupError, ArithmeticError, ValueError, RuntimeError)):
            models.load_policy(str(model), "float32")


def test_a_kernel_is_refused_where_a_policy_is_loaded_too(model):
    configured(model, {"attn_implementation": "evil/kernel"})
    with pytest.raises(BadInput, match="names code on the hub"):
        models.load_policy(str(model), "float32")


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["SOME_MARKER"],)


@pytest.mark.parametrize("config", [GRPO, SFT, {"kind": "evaluate"}])
def test_pickled_weights_are_refused_and_not_opened(config, model, tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    monkeypatch.setenv("SOME_MARKER", str(marker))
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    if config["kind"] == "evaluate":
        with pytest.raises(BadInput, match=r"found pytorch_model\.bin, which are pickled"):
            loadable.refuse_weights(str(model), str(model))
    else:
        assert "there is no model.safetensors (found pytorch_model.bin, which are pickled" in refused(
            model, tmp_path, config
        )
    with pytest.raises(OSError, match="safetensors"):
        models.load_policy(str(model), "float32")
    assert not marker.exists()


def test_no_weights_and_missing_shards_are_refused(model, tmp_path):
    weights = model / "model.safetensors"
    weights.rename(model / "model-00001-of-00002.safetensors")
    assert "there is no model.safetensors (expected safetensors)" in refused(model, tmp_path)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / loadable.INDEX).write_text(json.dumps(index))
    assert "(such as model-00002-of-00002.safetensors)" in refused(model, tmp_path)
    for broken in ("[", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 200_000, '{"a": ' + "9" * 5000):
        (model / loadable.INDEX).write_text(broken)
        assert "model.safetensors.index.json" in refused(model, tmp_path)


@pytest.mark.parametrize("content", ["[" * 200_000, "{", "\0", '{"a": ' + "9" * 5000 + "}", "[]", "3", '"x"'])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json"])
def test_a_json_file_that_is_none_is_one_line(name, content, model, tmp_path):
    (model / name).write_text(content)
    with pytest.raises(BadInput) as error:
        look_at(job(model, GRPO, tmp_path))
    assert "\n" not in str(error.value) and len(str(error.value)) < 1500, error


def test_sound_models_have_nothing_said_against_them(sound, tmp_path):
    for path in (sound, TINY_BASE):
        loadable.refuse_config(str(path))
        loadable.refuse_weights(str(path), str(path))
    sharded = tmp_path / "sharded"
    models.load_policy(str(sound), "float32").save_pretrained(sharded, max_shard_size="20KB")
    assert len([*sharded.glob("*.safetensors")]) > 1
    loadable.refuse_weights(str(sharded), str(sharded))


def test_nothing_is_fetched_and_no_memory_is_taken_for_a_large_config(model):
    configured(model, {"hidden_size": 2**16, "intermediate_size": 2**20, "head_dim": 2**12, "vocab_size": 2**24})
    loadable.refuse_config(str(model))
    assert not torch.cuda.is_available() or torch.cuda.memory_allocated() == 0


def test_weights_that_were_cut_off_are_named(model, tmp_path):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert f"{weights}: it is damaged (" in refused(model, tmp_path)

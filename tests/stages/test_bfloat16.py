"""All stages in bfloat16, on a randomly initialised policy: small everywhere, of the shape of a 0.5B model where there
is a GPU."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from tests.conftest import TINY_BASE, run_cli

SHAPES = {
    "small": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "0.5B": {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
}
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"r": 8, "alpha": 16.0}], ids=["full", "lora"])
@pytest.mark.parametrize("shape", ["small", pytest.param("0.5B", marks=NEEDS_GPU)])
def test_all_stages_run_in_bfloat16(shape, lora, settings, write, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY_BASE)
    torch.manual_seed(0)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    Qwen3ForCausalLM(Qwen3Config(**SHAPES[shape], **ends, tie_word_embeddings=True)).to(torch.bfloat16).save_pretrained(
        tmp_path / "base"
    )
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY_BASE / file, tmp_path / "base")
    settings["model"] = {"path": str(tmp_path / "base"), "dtype": "bfloat16", "lora": lora}
    settings["launch"] = {"threads": 1}
    done = run_cli("run", write(settings), "--registry", tmp_path / "r", "--no-prefect")
    assert done.returncode == 0, done.stderr
    made = [json.loads(path.read_text()) for path in sorted((tmp_path / "r").glob("artifacts/*/artifact.json"))]
    assert len(made) == 10
    on = {artifact["provenance"]["device"] for artifact in made}
    assert on == {torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
    config = json.loads(next((tmp_path / "r").glob("artifacts/rl2-*/config.json")).read_text())
    assert config["dtype"] == "bfloat16"

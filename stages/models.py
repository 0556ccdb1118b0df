"""Policies on disk and in memory: a directory that `from_pretrained` loads, safetensors only, no code from it ever run.

A published policy carries two chat templates: the serving template, which yields the response prefix, and the training template beside it
(see `stages.prefix`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from stages import prefix
from stages.job import BadInput, Dtype, Execution, Format

HUB = "hf://"
"""How a job's input names a model on the hub: hf://org/name@revision."""
SAFE_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "additional_chat_templates/*.jinja"]


def local_path(source: str) -> str:
    """The directory of a model; one on the hub is fetched at its revision first, so that whoever loads it again gets the same."""
    if not source.startswith(HUB):
        return source
    from huggingface_hub import snapshot_download

    repo, _, revision = source.removeprefix(HUB).partition("@")
    return snapshot_download(repo, revision=revision or None, allow_patterns=SAFE_PATTERNS)


def pick_device(execution: Execution) -> torch.device:
    """The device a job runs on. Raises BadInput where a GPU is asked for and there is none."""
    if execution.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("launch.device: cuda was asked for, but torch sees no GPU; set launch.device to auto or cpu")
    use_gpu = execution.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if use_gpu else "cpu")


def load_policy(path: str, dtype: Dtype, device: torch.device | None = None) -> PreTrainedModel:
    """A model in the given precision, on the CPU or on `device`."""
    precision = getattr(torch, dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=precision, use_safetensors=True, trust_remote_code=False
    )
    return model.to(device) if device else model


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """A tokenizer that can pad on the left. Raises BadInput when it has no chat template."""
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, padding_side="left")
    if tokenizer.chat_template is None:
        raise BadInput(f"the tokenizer in {path} has no chat template; add a chat_template.jinja to it")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_policy(model: Any, tokenizer: PreTrainedTokenizerBase, format: Format, out: Path) -> None:
    """Write a self-contained policy, a PreTrainedModel, whose serving template yields the Format's prefix."""
    model.save_pretrained(out)
    training = prefix.training_template(tokenizer)
    tokenizer.chat_template = {
        "default": prefix.serving_template(training, format.response_prefix),
        prefix.TRAINING: training,
    }
    tokenizer.save_pretrained(out)

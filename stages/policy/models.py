"""Policies as stages load them: a directory that `from_pretrained` reads, safetensors only, no code of it ever run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from stages.errors import BadInput
from stages.job import HUB, Dtype, Execution, Format
from stages.policy import loadable, lora
from stages.policy.generation_settings import saveable
from stages.runtime import ranks
from stages.tokens import chat, sandbox, turns

SAFE_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "additional_chat_templates/*.jinja"]


def local_path(source: str, weights: bool = True) -> str:
    """The directory of a model; one on the hub is fetched at its revision first, so that every later load gets
    the same. Without `weights`, only what a tokenizer needs is fetched."""
    if not source.startswith(HUB):
        return source
    from huggingface_hub import snapshot_download

    repo, _, revision = source.removeprefix(HUB).partition("@")
    patterns = list(SAFE_PATTERNS)
    if not weights:
        patterns.remove("*.safetensors")
    return snapshot_download(repo, revision=revision or None, allow_patterns=patterns)


def pick_device(execution: Execution) -> torch.device:
    """The device a job runs on. Raises BadInput where a GPU is asked for and there is none, or fewer than processes."""
    if execution.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("launch.device: cuda was asked for, but torch sees no GPU; set launch.device to auto or cpu")
    if torch.cuda.is_available() and execution.device != "cpu" and execution.processes > torch.cuda.device_count():
        raise BadInput(
            f"launch.processes: {execution.processes} were asked for, but torch sees {torch.cuda.device_count()} GPUs; "
            "lower it"
        )
    use_gpu = execution.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", ranks.local_rank()) if use_gpu else torch.device("cpu")


def load_policy(
    path: str, dtype: Dtype, device: torch.device | None = None, adapters: lora.Lora | None = None
) -> PreTrainedModel:
    """A model in the given precision, on the CPU or on `device`, with generation settings that can be saved; its frozen
    weights in 4 bits where `adapters` say so."""
    options: dict[str, Any] = {}
    quantization = lora.quantization(adapters)
    if quantization is not None:
        options["quantization_config"] = quantization
    loadable.refuse_kernels(path)
    model: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False, **options
    )
    model.generation_config = saveable(model.generation_config).settings
    return model.to(device) if device else model


def refuse_vision(path: str) -> None:
    """Raise BadInput for a model that also sees images: its words cannot be weighted as text."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if getattr(config, "vision_config", None) is not None:
        raise BadInput(
            f"{config.model_type} is a vision model, and token weights are for text; use the text model of its family"
        )


def load_tokenizer(path: str, format: Format | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer that can pad on the left, with the Format's chat template where that names one, and whose eos token
    is what ends the template's turns. Raises BadInput when it has no template."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, padding_side="left")
    except Exception as error:  # transformers raises anything for files that are none of a tokenizer
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise BadInput(f"the tokenizer in {path} cannot be loaded ({said}). Fix: save it again") from None
    if format is not None and format.chat_template is not None:
        tokenizer.chat_template = format.chat_template
    if tokenizer.chat_template is None:
        raise BadInput(
            f"the tokenizer in {path} has no chat template; add a chat_template.jinja to it, or set "
            "format.chat_template"
        )
    sandbox.refuse_dice(chat.training_template(tokenizer))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    chat.end_turns_as_the_template(tokenizer, declared_ends(path))
    return tokenizer


def declared_ends(path: str) -> list[int]:
    """Ids that a model's settings end a text with."""

    def settings(name: str) -> dict[str, Any]:
        file = Path(path, name)
        return loadable.settings(file) if file.is_file() else {}

    ends = turns.declared_ends(settings(loadable.GENERATION), settings(loadable.CONFIG))
    return [id for id in ends if isinstance(id, int) and 0 <= id < 2**31]

"""Low-rank adapters (LoRA, arXiv 2106.09685): a fresh adapter on the stage's policy while it trains, merged into it when it is published.

A policy is always published whole, with the adapter beside it in `adapter/`. So the next stage puts a fresh adapter on a whole policy, and the KL
reference of an RL stage is its own policy with the adapter off. Cheap to import: torch and peft come with the functions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.job import BadInput, Lora

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

ADAPTER = "adapter"
"""Where a published policy keeps the adapter it was made with."""


def peft_config(lora: Lora) -> LoraConfig:
    """The same in peft's words."""
    from peft import LoraConfig

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    alpha: Any = lora.alpha  # peft's own type is int, but it only divides by r
    return LoraConfig(
        r=lora.r, lora_alpha=alpha, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )


def quantization(lora: Lora | None) -> BitsAndBytesConfig | None:
    """How the frozen weights are held; None for full precision. Raises BadInput where 4 bits cannot be had."""
    if lora is None or lora.quantize is None:
        return None
    refuse_quantization()
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=lora.quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def refuse_quantization() -> None:
    """Raise BadInput where there is no GPU or no bitsandbytes."""
    from importlib.util import find_spec

    import torch

    missing = [
        what
        for what, there in (
            ("a GPU", torch.cuda.is_available()),
            ("bitsandbytes", find_spec("bitsandbytes") is not None),
        )
        if not there
    ]
    if missing:
        raise BadInput(
            f"model.lora.quantize: nf4 needs {' and '.join(missing)}, which is not here; remove it to train in the model's dtype"
        )


def save_adapter(model: Any, directory: Path, state: dict[str, Any] | None, base: str) -> None:
    """Write the adapter alone, naming its base without a path of this machine."""
    model.save_pretrained(directory, state_dict=state)
    (directory / "README.md").unlink(missing_ok=True)
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": Path(base).name}, indent=2))


def merged(policy: Any, adapter: Path) -> Any:
    """`policy`, a whole PreTrainedModel on the CPU, with the adapter's update added in float32 before the sum is rounded to the policy's precision."""
    from peft import PeftModel

    return PeftModel.from_pretrained(policy, str(adapter)).merge_and_unload()

"""Low-rank adapters (LoRA, arXiv 2106.09685): a fresh adapter on the stage's policy while it trains, merged into it
when it is published.

A policy is always published complete, with its adapter in `adapter/`. So the next stage puts a fresh adapter on
a whole policy, and the KL reference of an RL stage is its own policy with the adapter off. Cheap to import: torch and
peft come with the functions.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import BadInput
from stages.job import HUB, Lora

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

ADAPTER = "adapter"
"""Directory of the adapter in a published policy."""


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
    """Raise BadInput where bitsandbytes is not installed, or cannot hold a matrix in 4 bits on this machine."""
    import torch

    what = "model.lora.quantize: nf4 needs bitsandbytes"
    fix = "Fix: {}, or remove it to train in the model's dtype"
    try:
        functional = import_module("bitsandbytes.functional")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        functional.dequantize_4bit(*functional.quantize_4bit(torch.ones(64, 64, device=device), quant_type="nf4"))
    except ImportError:
        raise BadInput(f"{what}, which is not installed. {fix.format('pip install bitsandbytes')}") from None
    except Exception as error:  # a build without kernels for this machine raises anything
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise BadInput(
            f"{what}, which does not work here ({said}). {fix.format('install a build that does')}"
        ) from None


def refuse_targets(path: str, lora: Lora) -> None:
    """Raise BadInput for targets that the model has not, or that its embeddings are among: a merged update would change
    both ends of a tied model."""
    import torch
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        names = [name for name, _ in model.named_modules()]
        for target in lora.targets if isinstance(lora.targets, tuple) else ():
            if not any(name == target or name.endswith(f".{target}") for name in names):
                raise BadInput(
                    f"model.lora.targets: the model has no module called {target}; it ends in names such as "
                    f"{', '.join(_ends(names))}"
                )
        try:
            adapted = get_peft_model(model, peft_config(lora))
        except ValueError as error:
            raise BadInput(f"model.lora.targets: {' '.join(str(error).split())}") from None
    if any(getattr(module, "base_layer", module) in ends for module in adapted.modules() if hasattr(module, "lora_A")):
        raise BadInput(
            "model.lora.targets: an adapter on the embeddings or the LM head is not supported; leave them out"
        )


def _ends(names: list[str]) -> list[str]:
    """The last part of each name, once each, numbers left out."""
    ends = [name.rpartition(".")[2] for name in names]
    return list(dict.fromkeys(end for end in ends if end and not end.isdigit()))[:16]


def save_adapter(model: Any, directory: Path, state: dict[str, Any] | None, base: str) -> None:
    """Write the adapter alone, naming its base (`hf://org/name@revision`, or a path) without a path of this machine."""
    model.save_pretrained(directory, state_dict=state)
    (directory / "README.md").unlink(missing_ok=True)
    path = directory / "adapter_config.json"
    name = Path(base).name
    if base.startswith(HUB):
        name = base.removeprefix(HUB).partition("@")[0]
    path.write_text(
        json.dumps({**json.loads(path.read_text(encoding="utf-8")), "base_model_name_or_path": name}, indent=2),
        encoding="utf-8",
    )


def merged(policy: Any, adapter: Path) -> tuple[Any, float]:
    """(`policy`, a whole PreTrainedModel on the CPU, with the adapter's update added in float32 before the sum is
    rounded to the policy's precision; the share of the update that the rounding kept, 1 when there is none).

    A bfloat16 weight has 8 bits: an update of a thousandth of a weight mostly falls below them.
    """
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(policy, str(adapter))
    layers: list[Any] = [
        module for module in adapted.modules() if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight")
    ]
    squared = kept = 0.0
    for layer in layers:
        before = layer.base_layer.weight.detach().float().clone()
        update = layer.get_delta_weight("default").detach().float()
        layer.merge()
        squared += float(update.square().sum())
        kept += float((update * (layer.base_layer.weight.detach().float() - before)).sum())
    share = kept / squared if squared else 1.0
    return adapted.unload(), share

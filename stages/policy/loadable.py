"""Whether a model can be loaded, by its files and its config.json, before anything is trained.

the directory of a model -> nothing, or BadInput for what a stage would fail with hours later: weights that are pickled
or missing, a package that its quantisation needs, an attention that is not installed, code that it names on the hub.
No weight is read, and no code of the model is run or fetched."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stages.errors import BadInput
from stages.job import HUB

CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
IMPLEMENTATIONS = (
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
)
"""Where a config.json names what computes a layer. transformers fetches and runs whatever is called owner/name."""
PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
"""Attention -> its package, in whose place transformers would fetch a kernel from the hub."""


@lru_cache(maxsize=16)
def refuse_config(path: str) -> None:
    """Raise BadInput for a model that cannot be built from its config.json here."""
    refuse_kernels(path)
    config = _loaded(path)
    _refuse_generation_settings(path)
    _refuse_quantization(path, config)
    _refuse_architecture(path, config)


def refuse_kernels(path: str) -> None:
    """Raise BadInput for a config.json that names code on the hub, or an attention that is not installed."""
    for name, value in _implementations(settings(Path(path, CONFIG))):
        if "/" in value:
            raise BadInput(
                f"{path}/{CONFIG}: {name} names code on the hub (found {value!r}), and no code of a model is ever run. "
                f"Fix: remove it"
            )
        package = PACKAGES.get(value)
        if package and find_spec(package) is None:
            raise BadInput(f"{path}/{CONFIG}: {name} {value} needs {package}, which is not installed. Fix: remove it")


def settings(path: Path) -> dict[str, Any]:
    """The content of a JSON file of a model. Raises BadInput where it is no JSON object."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read ({_line(error)}). Fix: save the model again") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path} is no JSON object (found {str(content)[:60]}). Fix: save the model again")
    return content


def _implementations(content: Any) -> Iterator[tuple[str, str]]:
    """(name, value) of each, at any depth."""
    if isinstance(content, list):
        for item in content:
            yield from _implementations(item)
    for name, value in content.items() if isinstance(content, dict) else ():
        if name in IMPLEMENTATIONS:
            yield from ((name, one) for one in (value.values() if isinstance(value, dict) else [value]) if _is(one))
        yield from _implementations(value)


def _is(value: Any) -> bool:
    return isinstance(value, str)


def _loaded(path: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers raises anything for a config that is not one
        raise BadInput(f"{path}/{CONFIG} cannot be loaded ({_line(error)}). Fix: save the model again") from None


def _refuse_generation_settings(path: str) -> None:
    from transformers import GenerationConfig

    if not Path(path, GENERATION).is_file():
        return
    settings(Path(path, GENERATION))
    try:
        GenerationConfig.from_pretrained(path)
    except Exception as error:  # as above
        raise BadInput(f"{path}/{GENERATION} cannot be loaded ({_line(error)}). Fix: save the model again") from None


def _refuse_quantization(path: str, config: Any) -> None:
    """The model's own quantisation, asked as `from_pretrained` asks it."""
    from transformers.quantizers.auto import AutoHfQuantizer

    own = getattr(config, "quantization_config", None)
    own = own or getattr(config.get_text_config(decoder=True), "quantization_config", None)
    if own is None:
        return
    try:
        if AutoHfQuantizer.supports_quant_method(own):
            quantizer = AutoHfQuantizer.from_config(own, pre_quantized=True)
            quantizer.validate_environment(device_map=None, weights_only=True)
    except Exception as error:  # a package is missing, or cannot be used on this machine
        raise BadInput(
            f"{path}: its quantization_config cannot be used here ({_line(error)}). Fix: install what it needs, or use "
            f"the model that was quantised"
        ) from None


def _refuse_architecture(path: str, config: Any) -> None:
    """A small copy is built without memory, so that what is missing shows. What only the copy raises is no reason: the
    model itself decides, which takes longer."""
    from stages.policy.small_copy import small_copy

    try:
        _build(small_copy(config))
    except ImportError as error:
        raise BadInput(f"{path}: it cannot be built here ({_line(error)}). Fix: install what it needs") from None
    except Exception:
        if getattr(config, "vision_config", None) is not None:
            return  # `stages.policy.models.refuse_vision` says more
        try:
            _build(config)
        except Exception as error:
            raise BadInput(
                f"{path}/{CONFIG}: no model can be built from it ({_line(error)}). Fix: save the model again"
            ) from None


def _build(config: Any) -> None:
    """The model without its weights, on no device."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def refuse_weights(source: str, path: str) -> None:
    """Raise BadInput for a model without weights as safetensors. `source` may be a model on the hub, whose weights need
    not be in `path` yet."""
    names = _names(source, path)
    _refuse_headers(path)
    if names is None or WHOLE in names or _named_by_config(path, names):
        return
    if INDEX in names:
        _refuse_missing_shards(path, names)
        return
    pickled = sorted(name for name in names if name.endswith(PICKLED))
    found = f"found {', '.join(pickled[:3])}, which are pickled and never loaded, " if pickled else ""
    raise BadInput(
        f"{source}: there is no {WHOLE} ({found}expected safetensors). Fix: save the model again with save_pretrained"
    )


def _refuse_headers(path: str) -> None:
    """Each file of weights that is here begins with a header that describes it, to its last byte."""
    from safetensors import safe_open

    for file in sorted(Path(path).glob("*.safetensors")):
        try:
            with safe_open(file, "np"):
                pass
        except Exception as error:  # safetensors has a class of its own, and OSError
            raise BadInput(f"{file}: it is damaged ({_line(error)}). Fix: copy or download it again") from None


def _names(source: str, path: str) -> Collection[str] | None:
    """The names of the model's files; None where they cannot be known here."""
    here = {file.name for file in Path(path).iterdir()}
    if not source.startswith(HUB):
        return here
    from huggingface_hub import HfApi

    repo, _, revision = source.removeprefix(HUB).partition("@")
    try:
        return HfApi().list_repo_files(repo, revision=revision or None)
    except Exception:  # offline, in any of several ways: what was fetched before counts
        return here if any(name.endswith((*PICKLED, ".safetensors")) for name in here) else None


def _named_by_config(path: str, names: Collection[str]) -> bool:
    named = settings(Path(path, CONFIG)).get("transformers_weights")
    return isinstance(named, str) and named in names


def _refuse_missing_shards(path: str, names: Collection[str]) -> None:
    index = Path(path, INDEX)
    shards = settings(index).get("weight_map") if index.is_file() else {}
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise BadInput(f"{index} cannot be read (found no weight_map of names). Fix: save the model again")
    missing = sorted({*shards.values()} - {*names})
    if missing:
        raise BadInput(f"{path}: {len(missing)} files of {INDEX} are missing (such as {missing[0]}). Fix: copy them")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"

"""A rehearsal: a stage that passes settings to TRL runs beforehand, from its first line to its last, on a small copy of
its policy and on rows of its own.

a job with `trl` -> two optimiser steps of the same stage in a temporary directory -> nothing, or the setting that it
fails with. Missing packages, values of the wrong type, optimisers and schedules that cannot be made and losses that
are no number show there, and not after hours."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import BadInput
from stages.job import Finding, Format, Job, RowRange
from stages.kinds import STAGES
from stages.training import TrainingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END = "<|end|>"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '" + END + "\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
SMALL: Mapping[str, Mapping[str, Any]] = {
    "sft": {"data": "rows.jsonl", "rows": None, "mix": None, "rows_per_step": 4, "epochs": 1.0, "drop_overlap": False},
    "grpo": {
        "rows": "train[0:4]",
        "steps": 2,
        "prompts_per_step": 2,
        "group_size": 4,
        "max_completion_length": 2,
        "rewards": {},
        "mix": None,
        "drop_overlap": False,
        "stop_without_signal": None,
    },
}
"""Kind -> settings of the rehearsal in place of the stage's."""
PACKED = 64
"""Tokens of a packed sequence of the rehearsal."""
MICRO_BATCH = 2


def rehearse(job: Job, config: TrainingConfig, path: str) -> list[Finding]:
    """A warning where a small copy of the policy in `path` cannot be trained at all. Raises BadInput for the setting
    that the stage fails with."""
    trl = _tried(job, config)
    if not trl:
        return []
    with tempfile.TemporaryDirectory(prefix="switchback-rehearsal-") as place:
        failure = _failure(job, trl, path, Path(place, "all"))
        if failure is None:
            return []
        if (without := _failure(job, {}, path, Path(place, "none"))) is not None:
            return [_not_rehearsed(job, without)]
        name = _culprit(job, trl, path, Path(place))
    setting = f"{name}={trl[name]!r}" if name else "its settings together"
    raise BadInput(
        f"stages.{job.name}.trl{f'.{name}' if name else ''}: a rehearsal on a small copy of the policy fails with "
        f"{setting} ({_line(failure)}). Fix: change or remove it"
    )


def _tried(job: Job, config: TrainingConfig) -> dict[str, Any]:
    """The settings that a rehearsal has. It leaves vLLM out, whose server belongs to somebody. Raises BadInput where
    vLLM is asked for and not installed."""
    if not config.trl.get("use_vllm"):
        return config.trl
    if find_spec("vllm") is None:
        raise BadInput(f"stages.{job.name}.trl.use_vllm: vllm is not installed. Fix: remove use_vllm")
    return {name: value for name, value in config.trl.items() if "vllm" not in name}


def _culprit(job: Job, trl: Mapping[str, Any], path: str, place: Path) -> str | None:
    """The setting without which the rehearsal passes; None where that takes several."""
    for name in trl if len(trl) > 1 else ():
        rest = {other: value for other, value in trl.items() if other != name}
        if _failure(job, rest, path, place / name) is None:
            return name
    return next(iter(trl)) if len(trl) == 1 else None


def _failure(job: Job, trl: Mapping[str, Any], path: str, place: Path) -> Exception | None:
    """What the stage raises with these settings."""
    try:
        (place / "out").mkdir(parents=True)
        STAGES[job.kind].run(_small(job, trl, path, place))
    except Exception as error:
        return error
    return None


def _not_rehearsed(job: Job, error: Exception) -> Finding:
    return Finding(
        rule="trl_not_rehearsed",
        severity="warn",
        stage=job.name,
        evidence={},
        advice=f"a small copy of the policy cannot be trained here ({_line(error)}), so the settings of trl were not "
        f"tried beforehand",
    )


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _small(job: Job, trl: Mapping[str, Any], path: str, place: Path) -> Job:
    """The job on a small copy of its policy, with rows of the rehearsal's own."""
    _write_policy(path, job, place / "policy")
    config = {**job.config, **SMALL[job.kind], "trl": dict(trl), "save_every": None}
    if config.get("packing"):
        config["packing"] = {**config["packing"], "max_length": PACKED}
    inputs = {"policy": str(place / "policy")}
    what: dict[str, Any] = {"problem": {"name": "arithmetic"}, "rows": RowRange(split="train", start=0, stop=4, seed=0)}
    if job.kind == "sft":
        what = {"problem": None, "rows": None}
        inputs["data"] = str(place / "rows.jsonl")
        (place / "rows.jsonl").write_text("".join(_conversation(number) for number in range(8)), encoding="utf-8")
    execution = job.execution.model_copy(update={"processes": 1, "accelerate": None, "micro_batch": MICRO_BATCH})
    return job.model_copy(
        update={
            **what,
            "config": config,
            "inputs": inputs,
            "sources": {"policy": "rehearsal"},
            "work": str(place),
            "out": str(place / "out"),
            "format": PLAIN,
            "execution": execution,
        }
    )


PLAIN = Format(prompt="", prompt_digest="", system_prompt="", user_template="{{ prompt }}", response_prefix="")


def _conversation(number: int) -> str:
    return json.dumps({"prompt": f"{number} + {number * 7} =", "completion": str(8 * number)}) + "\n"


def _write_policy(path: str, job: Job, directory: Path) -> None:
    """A small policy of the architecture in `path`, with a tokenizer of characters and numbers."""
    from transformers import AutoConfig

    from stages.policy.models import pick_device
    from stages.policy.small_copy import small_model

    model = small_model(AutoConfig.from_pretrained(path, trust_remote_code=False), pick_device(job.execution))
    model.save_pretrained(directory)
    _tokenizer().save_pretrained(directory)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0, 1 and 2 are padding, start and end, as a small copy has them; most of the others are numbers, so that
    some random completions earn a reward and others none."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from stages.policy.small_copy import VOCABULARY

    words = ["<|pad|>", "<|start|>", END, "\n", *map(chr, range(32, 127)), *(f"{i:02}" for i in range(100))]
    words += [f"{i:03}" for i in range(VOCABULARY - len(words))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[4]))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(words[:3])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=words[0], bos_token=words[1], eos_token=END, padding_side="left"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer

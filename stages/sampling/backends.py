"""From a job to the Engine that its `sampler` names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from stages.job import Job, Sampler
from stages.policy import models
from stages.runtime import ranks
from stages.runtime.metrics import say
from stages.sampling import Engine, turn_ends, vllm_engine
from stages.sampling.continuous_engine import Continuous
from stages.sampling.transformers_engine import Transformers

UNVERIFIED = (
    "sampler: vllm was written against vLLM's documentation and has not been run on a GPU by us; look at what it "
    "samples"
)


def opened(job: Job, path: str, tokenizer: PreTrainedTokenizerBase) -> Engine:
    """The policy in `path`, loaded by the backend of the job. Raises BadInput where that cannot be."""
    return BACKENDS[job.sampler](job, path, tokenizer)


def _on_torch(
    engine: type[Transformers] | type[Continuous], job: Job, path: str, tokenizer: PreTrainedTokenizerBase
) -> Engine:
    """A model that we load ourselves."""
    model = models.load_policy(path, job.dtype, models.pick_device(job.execution))
    ends = turn_ends(tokenizer, model.generation_config)
    return engine(model, ends, cast(int, tokenizer.pad_token_id), job.execution.sampler_tokens)


def _vllm(job: Job, path: str, tokenizer: PreTrainedTokenizerBase) -> Engine:
    vllm_engine.refuse_what_it_cannot(job.execution.processes)
    if ranks.first():
        say(job, UNVERIFIED)
    return vllm_engine.loaded(path, job.dtype, turn_ends(tokenizer, _generation_config(path)))


def _generation_config(path: str) -> GenerationConfig:
    """A policy's generation settings, which it may have in a file of their own or in its config, without its
    weights."""
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(path, trust_remote_code=False))


BACKENDS: dict[Sampler, Callable[[Job, str, PreTrainedTokenizerBase], Engine]] = {
    "transformers": partial(_on_torch, Transformers),
    "continuous": partial(_on_torch, Continuous),
    "vllm": _vllm,
}

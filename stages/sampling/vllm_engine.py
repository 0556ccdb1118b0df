"""The backend `vllm`. UNVERIFIED: written against vLLM's documentation (docs.vllm.ai: LLM, SamplingParams,
TokensPrompt), and never run by us on a GPU.

Each sequence is a request with a seed of its own, so what it gets does not depend on the order of requests; vLLM
promises the same completion for the same seed only for equal batches, because its kernels round differently in others.
One process: vLLM makes its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from stages.errors import BadInput
from stages.job import Dtype
from stages.sampling import Decoding, SequenceRequest

QUEUE_TOKENS = 2**22
"""Tokens of the sequences that are handed to vLLM at a time, and committed together; it schedules them itself."""
SEEDS = 2**63
"""vLLM takes a seed of 64 bits with a sign."""


@dataclass(frozen=True)
class Vllm:
    """vLLM with a policy in it."""

    llm: Any
    ends: frozenset[int]
    name: str = "vllm"
    batch_tokens: int = QUEUE_TOKENS

    def complete(self, batch: Sequence[SequenceRequest], decoding: Decoding) -> list[list[int]]:
        """See `Engine`."""
        prompts = [{"prompt_token_ids": list(request.prompt)} for request in batch]
        outputs = self.llm.generate(prompts, [self._params(request, decoding) for request in batch], use_tqdm=False)
        return [self._ids(output.outputs[0]) for output in outputs]

    def _params(self, request: SequenceRequest, decoding: Decoding) -> Any:
        return import_module("vllm").SamplingParams(
            n=1,
            seed=request.seed % SEEDS,
            temperature=decoding.temperature,
            max_tokens=decoding.max_completion_length,
            stop_token_ids=sorted(self.ends),
            detokenize=False,
        )

    def _ids(self, completion: Any) -> list[int]:
        """The ids with their end token, which vLLM names in `stop_reason` where it is not the tokenizer's eos."""
        ids, end = list(completion.token_ids), completion.stop_reason
        if completion.finish_reason == "stop" and isinstance(end, int) and ids[-1:] != [end]:
            ids.append(end)
        return ids


def refuse_what_it_cannot(processes: int) -> None:
    """Raise BadInput where vLLM is not there, or where a job has several processes."""
    if find_spec("vllm") is None:
        raise BadInput("sampler: vllm is not installed here; pip install vllm, or set sampler to transformers")
    if processes > 1:
        raise BadInput(f"sampler: vllm makes its own processes, but launch.processes is {processes}; set it to 1")


def loaded(path: str, dtype: Dtype, ends: frozenset[int]) -> Vllm:
    """VLLM with the policy of a directory, and its own defaults in place of the policy's generation settings."""
    llm = import_module("vllm").LLM(model=path, dtype=dtype, trust_remote_code=False, generation_config="vllm", seed=0)
    return Vllm(llm, ends)

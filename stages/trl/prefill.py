"""GRPOTrainer with a response prefix that is prompt to the policy and completion to the rewards.

The prefix ids are appended to the prompt ids, so loss, KL, entropy and length leave them out by construction, whatever
generates; the prefix text is put back in front of the completions that rewards and logs see. The prefix travels with
the prompt, in its last turn, so that every row may have its own. Two hooks: `_tokenize_prompts` and `_generate`.
"""

from __future__ import annotations

from typing import Any

from stages.tokens import prefix
from stages.tokens.turns import Message
from stages.trl.positions import PositionedGRPOTrainer
from stages.trl.resume import ExactResume

START = "response_prefix"
"""Key of a prompt's last turn that holds its prefix; templates do not look at it."""
COMPLETION_IDS, COMPLETIONS = 1, 3
"""Positions of the sampled ids and of the decoded completions in the result of `GRPOTrainer._generate`."""


def prefilled(messages: list[Message], response_prefix: str) -> list[Message]:
    """A prompt that carries its prefix."""
    return [*messages[:-1], {**messages[-1], START: response_prefix}]


class PrefillGRPOTrainer(ExactResume, PositionedGRPOTrainer):
    """GRPOTrainer that renders with the training template and samples after the prefix. Prompts are made by
    `prefilled`."""

    def _tokenize_prompts(self, prompts: list[list[Message]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """Prompt ids + prefix ids, each distinct prompt rendered once."""
        size = self.num_generations if self.model.training else self.num_generations_eval
        if _in_groups(prompts, size):
            once = self._given(prompts[::size])
            return [list(once[i // size]) for i in range(len(prompts))], None, {}
        return self._given(prompts), None, {}

    def _given(self, prompts: list[list[Message]]) -> list[list[int]]:
        ids = prefix.prompt_ids(self._tokenizer, [_without_prefix(prompt) for prompt in prompts])
        starts = [prefix.prefix_ids(self._tokenizer, prompt[-1][START]) for prompt in prompts]
        return [[*prompt, *start] for prompt, start in zip(ids, starts, strict=True)]

    def _generate(self, prompts: list[list[Message]]) -> tuple[Any, ...]:
        """What rewards and logs see is made from the ids again: a tokenizer with a response template would have put the
        prefix elsewhere."""
        out = list(super()._generate(prompts))
        ends = frozenset(self.eos_token_ids)
        texts = [
            prefix.completion_text(self._tokenizer, prompt[-1][START], ids, ends)
            for prompt, ids in zip(prompts, out[COMPLETION_IDS], strict=True)
        ]
        out[COMPLETIONS] = [[{"role": "assistant", "content": text}] for text in texts]
        return tuple(out)


def _without_prefix(prompt: list[Message]) -> list[Message]:
    return [{"role": turn["role"], "content": turn["content"]} for turn in prompt]


def _in_groups(prompts: list[Any], size: int) -> bool:
    """Whether the list is runs of `size` equal prompts."""
    return len(prompts) % size == 0 and all(prompts[i] == prompts[i - i % size] for i in range(len(prompts)))

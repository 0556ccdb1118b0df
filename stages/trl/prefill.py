"""GRPOTrainer with a response prefix that is prompt to the policy and completion to the rewards.

The prefix ids are appended to the prompt ids, so loss, KL, entropy and length leave them out by construction, whatever generates; the prefix
text is put back in front of the completions that rewards and logs see. Two hooks: `_tokenize_prompts` and `_generate`.
"""

from __future__ import annotations

from typing import Any

from trl.trainer.grpo_trainer import GRPOTrainer

from stages import prefix

COMPLETIONS = 3
"""Where the decoded completions are in what `GRPOTrainer._generate` returns."""


class PrefillGRPOTrainer(GRPOTrainer):
    """GRPOTrainer that renders with the training template and samples after the prefix. Conversational prompts only."""

    def __init__(self, *args: Any, response_prefix: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.response_prefix = response_prefix
        self._prefix_ids = prefix.prefix_ids(self._tokenizer, response_prefix)

    def _tokenize_prompts(self, prompts: list[list[prefix.Message]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """Prompt ids + prefix ids, each distinct prompt rendered once."""
        size = self.num_generations if self.model.training else self.num_generations_eval
        groups = prefix.prompt_ids(self._tokenizer, prompts[::size]) if _in_groups(prompts, size) else None
        ids = (
            [groups[i // size] for i in range(len(prompts))] if groups else prefix.prompt_ids(self._tokenizer, prompts)
        )
        return [[*prompt, *self._prefix_ids] for prompt in ids], None, {}

    def _generate(self, prompts: list[list[prefix.Message]]) -> tuple[Any, ...]:
        out = list(super()._generate(prompts))
        out[COMPLETIONS] = [
            [{**turns[0], "content": self.response_prefix + turns[0]["content"]}, *turns[1:]]
            for turns in out[COMPLETIONS]
        ]
        return tuple(out)


def _in_groups(prompts: list[Any], size: int) -> bool:
    """Whether the list is runs of `size` equal prompts."""
    return len(prompts) % size == 0 and all(prompts[i] == prompts[i - i % size] for i in range(len(prompts)))

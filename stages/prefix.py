"""The response prefix and the chat template: the only module that knows where the one is added and which of the other is used.

A row becomes messages, messages become prompt ids by the *training template*, and a completion is prefix + what was sampled:

    prompt ids | prefix ids | sampled ids, turn end

The prefix is tokenised on its own and never together with what stands before or after it, so the boundary is the same in SFT, RL, rejection
sampling and evaluation. SFT trains prefix + sampled as the completion; sampling gives the model prompt + prefix; rewards, saved rollouts and
scores see prefix + sampled as text. Serving needs none of this: the *serving template* ends its generation prompt with the prefix.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import cast

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import SandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from stages.job import BadInput, Format
from stages.problems.base import Row

TRAINING = "training"
"""Name of the training template beside the serving template: additional_chat_templates/training.jinja."""
Message = dict[str, str]


def training_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template everything is rendered with: the one a switchback policy carries, else the model's own."""
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        return templates.get(TRAINING) or templates["default"]
    return cast(str, templates)


def serving_template(training: str, response_prefix: str) -> str:
    """The training template, with the prefix at the end of its generation prompt."""
    if not response_prefix:
        return training
    ending = training.removesuffix(
        "\n"
    )  # jinja2 drops one newline at the end of a template, but not one before more text
    literal = json.dumps(response_prefix, ensure_ascii=False)
    return f"{ending}{{{{ {literal} if add_generation_prompt else '' }}}}"  # an expression: a block would trim blanks around it


def seen_format(format: Format, tokenizer: PreTrainedTokenizerBase) -> Format:
    """The Format with the digest of the template that is really used."""
    digest = hashlib.sha256(training_template(tokenizer).encode()).hexdigest()
    return format.model_copy(update={"training_template": digest})


def format_digest(format: Format) -> str:
    """SHA-256 of everything that dresses text; the prompt's name is not part of it."""
    return hashlib.sha256(format.model_dump_json(exclude={"prompt"}).encode()).hexdigest()


def messages(format: Format, row: Row) -> list[Message]:
    """The conversation up to the policy's turn. Raises BadInput when the user template does not work on the row."""
    try:
        user = _compiled(format.user_template).render(asdict(row))
    except TemplateError as error:
        raise BadInput(f"prompt {format.prompt}: {error}; a row has {', '.join(asdict(row))}") from None
    system = [{"role": "system", "content": format.system_prompt}] if format.system_prompt else []
    return [*system, {"role": "user", "content": user}]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[list[Message]]) -> list[list[int]]:
    """Ids up to and including the generation prompt, without the prefix."""
    template = training_template(tokenizer)
    rendered = tokenizer.apply_chat_template(
        list(conversations), chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return [list(ids) for ids in cast(dict[str, list[list[int]]], rendered)["input_ids"]]


def prefix_ids(tokenizer: PreTrainedTokenizerBase, response_prefix: str) -> list[int]:
    """The prefix on its own. Raises BadInput when the tokenizer cannot write it down and read it back."""
    ids = encode(tokenizer, response_prefix) if response_prefix else []
    if (back := tokenizer.decode(ids) if ids else "") != response_prefix:
        raise BadInput(
            f"format.response_prefix: {response_prefix!r} comes back from the tokenizer as {back!r}; choose another"
        )
    return ids


def sampling_prompts(
    tokenizer: PreTrainedTokenizerBase, format: Format, rows: Sequence[Row]
) -> tuple[list[list[int]], list[list[int]]]:
    """(prompt ids, prompt ids + prefix ids) of each row: what is stored as prompt, and what a sampler is given."""
    prompts = prompt_ids(tokenizer, [messages(format, row) for row in rows])
    start = prefix_ids(tokenizer, format.response_prefix)
    return prompts, [[*ids, *start] for ids in prompts]


def demonstration_ids(tokenizer: PreTrainedTokenizerBase, format: Format, text: str) -> list[int]:
    """Prefix ids + the rest of a completion's text + turn end: the SFT target. Raises BadInput when the text does not start with the prefix."""
    if not text.startswith(format.response_prefix):
        raise BadInput(
            f"format.response_prefix is {format.response_prefix!r}, but a demonstration starts with {text[:40]!r}; make them agree"
        )
    rest = encode(tokenizer, text.removeprefix(format.response_prefix))
    return [*prefix_ids(tokenizer, format.response_prefix), *rest, turn_end(tokenizer)]


def completion_text(tokenizer: PreTrainedTokenizerBase, response_prefix: str, sampled: Sequence[int]) -> str:
    """What rewards and scores judge: the prefix, then what was sampled."""
    return response_prefix + cast(str, tokenizer.decode(list(sampled), skip_special_tokens=True))


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text on its own, without special tokens around it."""
    return list(cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"]))


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends the policy's turn. Raises BadInput when the template does not end a turn with the tokenizer's eos token."""
    turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    text = tokenizer.apply_chat_template(turn, chat_template=training_template(tokenizer), tokenize=False)
    ending = cast(str, text).rpartition("!")[2]
    if str(tokenizer.eos_token) not in ending:
        raise BadInput(
            f"the chat template ends an assistant turn with {ending!r}, which does not hold the tokenizer's eos token"
            f" {tokenizer.eos_token!r}; set the eos token that ends a turn"
        )
    return cast(int, tokenizer.eos_token_id)


@lru_cache(maxsize=16)
def _compiled(template: str) -> Template:
    return SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(template)

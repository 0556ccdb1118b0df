"""The dataset that a rejection stage makes: rows as they were sampled, where each comes from, and how many rollouts
each rule left.

pools of rollouts + which of them -> token rows (`stages.tokens.token_rows`) with their provenance, `card.json` for
programs, README.md for people and the hub. What was sampled is what is written: prompt ids by the Format, and the ids
of the completion as the rollout has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from stages.data.rollout_line import SelectedLine
from stages.data.selection import Choice, Keep, Pool
from stages.job import Format
from stages.tokens import token_rows
from stages.tokens.token_rows import COMPLETION, PREFIX, TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

README = """---
{front_matter}---
# Completions that were {how}

{kept} of {sampled} rollouts, from {source}. `rows.parquet` has a row each: token ids and roles (s system, u user, t chat template, p response prefix,
c completion), the completion's text, and where it comes from. `card.json` says which tokenizer and Format made them.

| rule | left |
|---|---|
{funnel}

The settings: `{keep}`
"""  # noqa: E501 - published text


class Sampled(NamedTuple):
    """How rollouts were sampled (`rollouts.card`)."""

    fresh: dict[str, Any] | None
    """Those of this stage; None where none were sampled."""
    training: dict[str, Any] | None
    """Those of a grpo stage's log; None where none were read."""


def selected(pools: Sequence[Pool]) -> Iterator[SelectedLine]:
    """Every rollout, and what became of it."""
    for pool in pools:
        for line, one, choice in zip(pool.lines, pool.candidates, pool.choices, strict=True):
            reward = one.reward if one.reward > float("-inf") else None
            yield {**line, "reward": reward, "kept": choice.rank is not None, "dropped_by": choice.dropped_by}


def rows(
    tokenizer: PreTrainedTokenizerBase,
    format: Format | None,
    pools: Sequence[Pool],
    picks: Sequence[Sequence[int]],
    sampled: Sampled,
    rule: str | None = None,
) -> list[TokenRow]:
    """The picked rollouts of each pool. `rule` says why they are there; None: they are the best of their rows."""
    from stages.tokens import prefix

    assert format is not None, "the plan gives every stage a Format"
    prompts = prefix.prompts(tokenizer, format, [pool.row for pool in pools])
    starts = [prefix.of_row(format, pool.row) for pool in pools]
    return [
        _row(pool, i, prompt, _provenance(pool, i, start, sampled, rule))
        for pool, picked, prompt, start in zip(pools, picks, prompts, starts, strict=True)
        for i in picked
    ]


def _row(pool: Pool, i: int, prompt: tuple[list[int], str], provenance: dict[str, Any]) -> TokenRow:
    line, (ids, roles) = pool.lines[i], prompt
    answered = PREFIX * line["prefix"] + COMPLETION * (len(line["ids"]) - line["prefix"])
    return TokenRow(pool.row.id, [*ids, *line["ids"]], roles + answered, provenance)


def _provenance(pool: Pool, i: int, start: str, sampled: Sampled, rule: str | None) -> dict[str, Any]:
    line, one, choice = pool.lines[i], pool.candidates[i], pool.choices[i]
    how = sampled.fresh if line["step"] is None else sampled.training
    assert how is not None, "rollouts with a step come from a log, the others from this stage"
    return {
        **how,
        **{name: line[name] for name in ("step", "sample", "text", "score", "outcome")},
        **{f"reward_{name}": value for name, value in line["rewards"].items()},
        "prefix": start,
        "reward": one.reward if one.reward > float("-inf") else None,
        "rank": choice.rank,
        "rule": rule or f"best {choice.rank} of {_kept(pool.choices)}",
    }


def _kept(choices: Sequence[Choice]) -> int:
    return sum(choice.rank is not None for choice in choices)


def write(directory: Path, rows: Sequence[TokenRow], card: dict[str, Any]) -> None:
    """A dataset that `datasets.load_dataset` reads."""
    token_rows.write(directory, rows, card)
    counts = card["funnel"]
    front_matter = yaml.safe_dump(
        {"configs": [{"config_name": "default", "data_files": token_rows.FILE}]}, sort_keys=False
    )
    text = README.format(
        front_matter=front_matter,
        how="drawn at random, a control" if card.get("control") else "kept as the best",
        kept=len(rows),
        sampled=counts["sampled"],
        source={"fresh": "a policy", "training": "a policy's training", "both": "a policy and its training"}[
            card["source"]
        ],
        funnel="\n".join(f"| {rule} | {count} |" for rule, count in counts.items()),
        keep=Keep.model_validate(card["keep"]).model_dump_json(exclude_none=True),
    )
    (directory / "README.md").write_text(text, encoding="utf-8")

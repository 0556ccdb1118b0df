"""The rows that an sft stage trains on, and those that a grpo stage trains on in addition to its rollouts: a problem's
demonstrations, a file of conversations, or the samples of another stage. A stage with a mix adds general conversations.

A row of any source is ids with a role each (`stages.tokens.token_rows`), and every answer in it starts with the
response prefix. A file has a JSON object a line, as TRL takes them: `{"messages": [...]}`, trained as they are, every
assistant turn an answer; or `{"prompt": ..., "completion": ...}`, of messages, of which the completion's are answers,
or of plain text, which the Format renders. A message has a role and content, both text; a key that is null is missing.
A line of which no answer says anything beyond the prefix is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.data import mix, overlap
from stages.data.mix import Mix
from stages.errors import BadInput
from stages.job import Format, Job
from stages.problems import catalog
from stages.problems.files import refuse_half_pairs
from stages.runtime.workdir import NO_COPIES, Copies, place
from stages.tokens import chat, conversation, prefix, token_rows
from stages.tokens.conversation import Conversation
from stages.tokens.token_rows import TokenRow
from stages.tokens.turns import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHAPES = '{"messages": [...]} or {"prompt": ..., "completion": ...}'
Line = tuple[int, str]
"""Its number, from 1, and what it holds."""
ROLES = ("system", "developer", "user", "assistant", "tool")
"""Whose words a message may hold."""
OTHER_NAMES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "function": "tool"}
"""What other formats call them."""


class Rows(NamedTuple):
    """What an sft stage trains on."""

    own: list[TokenRow]
    """The stage's own; never none."""
    general: list[TokenRow]
    """Those of its mix, in the order of their lines."""
    dropped: int = 0
    """Rows of both that were left out, because they ask what is evaluated."""

    @property
    def all(self) -> list[TokenRow]:
        """What is trained: first the own rows, then the general ones."""
        return [*self.own, *self.general]


def load(
    job: Job, format: Format, tokenizer: PreTrainedTokenizerBase, mixed: Mix | None, drop_overlap: bool = False
) -> Rows:
    """The job's rows, with `mixed` and `drop_overlap` of its config. Raises BadInput for no own rows or too few general
    ones, for rows that cannot be read, and for rows that another tokenizer or template made."""
    evaluated = _evaluated(job, format, tokenizer) if drop_overlap else None
    every = own(job, format, tokenizer)
    rows = overlap.without(every, lambda row: overlap.of_row(tokenizer, row), evaluated)
    if not rows:
        raise BadInput(f"{job.name}: each of its {len(every)} rows asks what is evaluated; give it others")
    if mixed is None:
        return Rows(rows, [], len(every) - len(rows))
    lines = _lines(Path(job.inputs["mix"]), job.copies)
    left = overlap.without(lines, lambda line: _questions(line, format), evaluated)
    drawn = general(job, format, tokenizer, mixed, len(rows), left)
    return Rows(rows, drawn, len(every) - len(rows) + len(lines) - len(left))


def _evaluated(job: Job, format: Format, tokenizer: PreTrainedTokenizerBase) -> overlap.Asked:
    assert job.evaluated is not None, "the plan says what a policy is evaluated on"
    return overlap.asked(overlap.rows_of(job.evaluated, job.copies), format, tokenizer)


def own(job: Job, format: Format, tokenizer: PreTrainedTokenizerBase) -> list[TokenRow]:
    """The stage's own rows. Raises BadInput as `load` does."""
    if (source := job.inputs.get("data")) is None:
        rows = demonstrations(job, format, tokenizer)
    elif Path(source).is_dir():
        _made_for(job, tokenizer, token_rows.read_card(Path(source)))
        rows = token_rows.read(Path(source))
    else:
        rows = conversations(Path(source), format, tokenizer, job.copies)
    if not rows:
        raise BadInput(
            f"{job.name}: its data has no rows ({source or 'demonstrations'}); if a rejection stage kept none, lower "
            f"keep.min_score or raise samples"
        )
    return rows


def general(
    job: Job, format: Format, tokenizer: PreTrainedTokenizerBase, mixed: Mix, own: int, lines: Sequence[Line]
) -> list[TokenRow]:
    """The general rows that go with `own` rows of the stage, drawn from lines of the mix; the others are not rendered.
    Raises BadInput as `load` does."""
    drawn = mix.drawn(job.name, lines, own, mixed.share, job.seed)
    return _general(Path(job.inputs["mix"]), sorted(drawn), format, tokenizer)


def general_of_steps(
    job: Job, format: Format, tokenizer: PreTrainedTokenizerBase, a_step: int, steps: int, drop_overlap: bool = False
) -> list[TokenRow]:
    """The rows that so many steps take, in the order in which they are drawn. Raises BadInput for too few, for a row
    that cannot be read, and for one with nothing to train."""
    path = Path(job.inputs["mix"])
    evaluated = _evaluated(job, format, tokenizer) if drop_overlap else None
    lines = overlap.without(_lines(path, job.copies), lambda line: _questions(line, format), evaluated)
    rows = _general(path, mix.drawn_by_steps(job.name, lines, a_step, steps, job.seed), format, tokenizer)
    for row in rows:
        if token_rows.COMPLETION not in row.roles[1:]:
            raise BadInput(
                f"{path}, line {row.row.removeprefix(mix.MARK)}: no token follows the response prefix; remove it"
            )
    return rows


def look_at_general(job: Job, format: Format, tokenizer: PreTrainedTokenizerBase) -> None:
    """For a stage whose own rows are not there yet: raise BadInput where the row that every share draws cannot be
    used, or there is none."""
    path = Path(job.inputs["mix"])
    if not (lines := _lines(path, job.copies)):
        raise BadInput(f"stages.{job.name}.mix: {path} has no rows; add rows, or remove mix")
    _general(path, mix.order(lines, job.seed)[:1], format, tokenizer)


def _general(path: Path, lines: Sequence[Line], format: Format, tokenizer: PreTrainedTokenizerBase) -> list[TokenRow]:
    return [
        replace(row, row=f"{mix.MARK}{row.row}", provenance={"rule": mix.RULE})
        for row in _rendered(path, lines, format, tokenizer)
    ]


def _made_for(job: Job, tokenizer: PreTrainedTokenizerBase, card: dict[str, Any]) -> None:
    """The plan compares what of the two Formats it knows; tokenizer and chat template are only known here."""
    if card["tokenizer"] != prefix.tokenizer_digest(tokenizer):
        raise BadInput(
            f"{job.name}: its data was tokenised by another tokenizer than its policy's; sample from a policy of the "
            f"same family"
        )
    assert job.format is not None, "the plan gives every sft step a Format"
    seen = prefix.seen_format(job.format, tokenizer).training_template
    if card["format"]["training_template"] != seen and not (job.config.get("format") or {}).get("chat_template"):
        raise BadInput(
            f"{job.name}: its data was rendered with another chat template than its policy carries;"
            f" set stages.{job.name}.format.chat_template to train across templates"
        )


def demonstrations(job: Job, format: Format, tokenizer: PreTrainedTokenizerBase) -> list[TokenRow]:
    """The problem's demonstrations of the job's rows."""
    assert job.problem is not None and job.rows is not None, "the plan gives demonstrations a problem and rows"
    problem = catalog.load(job.problem, job.copies)
    rows = catalog.rows(problem, job.rows)
    rng = random.Random(f"demonstrations-{job.rows.seed}")
    texts = [problem.demonstration(row, rng) for row in rows]
    made: list[TokenRow] = []
    for row, prompt, text in zip(rows, prefix.prompts(tokenizer, format, rows), texts, strict=True):
        answer = prefix.demonstration(tokenizer, prefix.of_row(format, row), text)
        asks = overlap.of_prompt(format, row)
        made.append(TokenRow(row.id, prompt[0] + answer[0], prompt[1] + answer[1], questions=asks))
    return made


def conversations(
    path: Path, format: Format, tokenizer: PreTrainedTokenizerBase, copies: Copies = NO_COPIES
) -> list[TokenRow]:
    """The rows of a file, identified by their line. Raises BadInput with the line that cannot be used."""
    return _rendered(path, _lines(path, copies), format, tokenizer)


def _lines(path: Path, copies: Copies) -> list[Line]:
    """The lines that hold something. Split there and nowhere else: a JSON string may hold other ends of lines."""
    return [(number, line) for number, line in enumerate(_text(path, copies).split("\n"), start=1) if line.strip()]


def _rendered(path: Path, lines: Sequence[Line], format: Format, tokenizer: PreTrainedTokenizerBase) -> list[TokenRow]:
    rows: list[TokenRow] = []
    for number, line in lines:
        try:
            columns = _object(line)
            ids, roles, notes = _conversation(columns, format, tokenizer)
        except BadInput as error:
            raise BadInput(f"{path}, line {number}: {error}") from None
        rows.append(TokenRow(str(number), ids, roles, questions=_asks(columns, format), notes=notes))
    return rows


def _questions(line: Line, format: Format) -> overlap.Questions:
    """What a line asks that may not be drawn; nothing where it cannot be used, which is refused if it is drawn."""
    try:
        columns = _object(line[1])
        _nothing_is_left_out(columns)
        return _asks(columns, format)
    except BadInput:
        return ()


def _asks(columns: Mapping[str, Any], format: Format) -> overlap.Questions:
    """What a line asks."""
    if _turns(columns.get("messages")):
        return overlap.of_turns(columns["messages"])
    prompt, completion = columns.get("prompt"), columns.get("completion")
    if _turns(prompt) and _turns(completion):
        return overlap.of_turns([*columns["prompt"], *columns["completion"]], len(columns["prompt"]))
    return overlap.of_prompt(format, columns) if isinstance(prompt, str) else ()


def _text(path: Path, copies: Copies) -> str:
    try:
        return place(path, copies).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _object(line: str) -> Mapping[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{error}; expected {SHAPES}") from None
    if not isinstance(found, dict):
        raise BadInput(f"found {type(found).__name__}, expected {SHAPES}")
    refuse_half_pairs(found)
    return _without_nulls(found)


def _without_nulls(columns: dict[str, Any]) -> dict[str, Any]:
    """The columns, and the keys of their messages, that say something: `datasets` writes null for what is missing."""

    def said(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: part for name, part in value.items() if part is not None}
        return value

    return {
        name: [said(item) for item in value] if isinstance(value, list) else value
        for name, value in said(columns).items()
    }


def _conversation(columns: Mapping[str, Any], format: Format, tokenizer: PreTrainedTokenizerBase) -> Conversation:
    _nothing_is_left_out(columns)
    start = prefix.of_row(format, columns)
    if _turns(columns.get("messages")):
        return _trained(tokenizer, start, columns["messages"])
    prompt, completion = columns.get("prompt"), columns.get("completion")
    if _turns(prompt) and _turns(completion):
        chat.render(tokenizer, columns["prompt"])  # refuses a prompt that ends in an assistant turn
        return _trained(tokenizer, start, [*columns["prompt"], *columns["completion"]], len(columns["prompt"]))
    if isinstance(prompt, str) and isinstance(completion, str):
        turns = [*prefix.messages(format, columns), {"role": "assistant", "content": completion}]
        return _trained(tokenizer, start, turns)
    raise BadInput(f"found {', '.join(columns) or 'nothing'}, expected {SHAPES}")


def _trained(tokenizer: PreTrainedTokenizerBase, start: str, turns: Sequence[Message], given: int = 0) -> Conversation:
    """The conversation. Raises BadInput where none of its answers says anything: it would teach to end the turn at
    once."""
    answers = [turn["content"] for turn in turns[given:] if turn["role"] == "assistant"]
    if answers and not any(text.removeprefix(start).strip() for text in answers):
        raise BadInput("its answer is empty, so nothing but the end of the turn would be trained; remove the line")
    return conversation.rendered(tokenizer, start, turns, given)


def _nothing_is_left_out(columns: Mapping[str, Any]) -> None:
    """Raise BadInput for a line of which a part would be ignored, and for a message that is not a role and its
    words."""
    if "messages" in columns and {"prompt", "completion"} & set(columns):
        raise BadInput(f"found messages together with prompt or completion, expected {SHAPES}")
    for name in ("tools", "chat_template_kwargs"):
        if columns.get(name):
            raise BadInput(
                f"{name} are not rendered by switchback, so the row would be trained otherwise than it says; remove "
                f"them"
            )
    for name in ("messages", "prompt", "completion"):
        turns: list[Any] = columns[name] if isinstance(columns.get(name), list) else []
        for i, turn in enumerate(turns, start=1):
            _refuse_no_turn(f"{name}, turn {i}", turn)


def _refuse_no_turn(where: str, turn: Any) -> None:
    """Raise BadInput for anything but a message of a known role."""
    if not _is_turn(turn):
        found = turn
        if isinstance(turn, dict):
            found = ", ".join(f"{k}: {type(v).__name__}" for k, v in turn.items())
        raise BadInput(
            f"{where}: found {found!r}, expected role and content, both text, and nothing else; write what the turn "
            f"says into content, and remove the rest"
        )
    if (role := turn["role"]) not in ROLES:
        meant = f"; rename it to {OTHER_NAMES[role]}" if role in OTHER_NAMES else ""
        raise BadInput(f"{where}: found the role {role!r}, expected one of {', '.join(ROLES)}{meant}")


def _turns(value: Any) -> bool:
    """A list of {role, content}, both text, and nothing else in them that would be left out of training."""
    return isinstance(value, list) and bool(value) and all(_is_turn(turn) for turn in value)


def _is_turn(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"role", "content"}
        and all(isinstance(part, str) for part in value.values())
    )

"""Rows as token ids with a role each: how rollouts travel from rejection sampling to SFT, so that what was sampled is
what is trained.

A row says what every token is, so that weights are decided by role and nothing is ever rendered or tokenised a second
time:

    s  system      words of the system prompt
    u  user        words of a user's (or tool's) turn, and of an answer that is only prompt
    t  template    what the chat template puts around them, up to and including the generation prompt
    p  prefix      the response prefix
    c  completion  what was sampled or demonstrated, and the token that ends the turn
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "rows.parquet"
CARD = "card.json"
"""Beside the rows: which tokenizer and which Format made them."""
PROVENANCE = {
    "policy": "string",
    "step": "int64",
    "sample": "int64",
    "seed": "int64",
    "temperature": "double",
    "max_completion_length": "int64",
    "prefix": "string",
    "text": "string",
    "score": "double",
    "outcome": "string",
    "reward": "double",
    "rank": "int64",
    "rule": "string",
}
"""Columns with the origin of a row -> their Arrow types. A column `reward_<component>` per component follows them."""
SYSTEM, USER, TEMPLATE, PREFIX, COMPLETION = "sutpc"
ROLES = {"system": SYSTEM, "user": USER, "template": TEMPLATE, "prefix": PREFIX, "completion": COMPLETION}
"""Role -> its letter; the position of a role in this table is its code in a batch."""
CODES = {letter: code for code, letter in enumerate(ROLES.values())}
ANSWERED = (PREFIX, COMPLETION)
"""Roles of the policy's own turns; the others are prompt."""


@dataclass(frozen=True)
class TokenRow:
    """One training example."""

    row: str
    """Id of the problem's row, or the number of a line."""
    ids: list[int]
    roles: str
    """A letter a token."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Its origin: columns of PROVENANCE, and `reward_<component>`."""
    questions: tuple[str, ...] = ()
    """The words of the user's turns that it answers, white space folded, where they are known as text. They are
    compared and never written."""
    notes: tuple[str, ...] = ()
    """What the chat template made of its messages (`stages.tokens.conversation`); not kept in a file."""

    @property
    def edges(self) -> tuple[int, int]:
        """Start of the first answer and end of its prefix; both are the row's length when there is no answer."""
        start = min((self.roles.index(role) for role in ANSWERED if role in self.roles), default=len(self.roles))
        return start, len(self.roles) - len(self.roles[start:].lstrip(PREFIX))


def write(directory: Path, rows: Sequence[TokenRow], card: dict[str, Any]) -> None:
    """A Parquet row a row, and the card (`prefix.card`). The same rows give the same bytes."""
    import pyarrow as pa
    from pyarrow import parquet

    directory.mkdir(parents=True, exist_ok=True)
    components = sorted({name for row in rows for name in row.provenance if name not in PROVENANCE})
    types = {"row": "string", **PROVENANCE, **dict.fromkeys(components, "double")}
    fields = [pa.field(name, pa.type_for_alias(alias)) for name, alias in types.items()]
    schema = pa.schema([fields[0], pa.field("ids", pa.list_(pa.int32())), pa.field("roles", pa.string()), *fields[1:]])
    lines = [{"row": row.row, "ids": row.ids, "roles": row.roles, **row.provenance} for row in rows]
    parquet.write_table(pa.Table.from_pylist(lines, schema), directory / FILE, compression="zstd")
    (directory / CARD).write_text(json.dumps(card, indent=1), encoding="utf-8")


def read(directory: Path) -> list[TokenRow]:
    """The rows of a published data directory."""
    from pyarrow import parquet

    lines = parquet.read_table(directory / FILE).to_pylist()
    return [TokenRow(line.pop("row"), line.pop("ids"), line.pop("roles"), line) for line in lines]


def read_card(directory: Path) -> dict[str, Any]:
    """The card of the rows (`prefix.card`)."""
    return json.loads((directory / CARD).read_text(encoding="utf-8"))


def labelled(row: TokenRow) -> dict[str, list[int]]:
    """Columns for SFTTrainer: input_ids, and in `labels` the code of each token's role.

    A list column named `labels` is the only column but the ids that TRL carries through truncation, every packing
    strategy and its collator, which writes -100 where nothing is to be learned: on padding, and on the first token of a
    document in a padding-free batch. The loss takes its targets from `input_ids`.
    """
    return {"input_ids": row.ids, "labels": [CODES[role] for role in row.roles]}


def lengths(rows: Iterable[TokenRow]) -> tuple[int, int]:
    """(prompt tokens, completion tokens) of all rows together."""
    answered = total = 0
    for row in rows:
        answered += sum(row.roles.count(role) for role in ANSWERED)
        total += len(row.roles)
    return total - answered, answered

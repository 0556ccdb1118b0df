"""A row of a problem of one's own: whatever columns its source gives it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stages.job import Split
from stages.problems.base import Row, folded, row_id, split_of


@dataclass(frozen=True)
class OwnRow(Row):
    """A prompt and further columns."""

    values: Mapping[str, Any] = field(hash=False)
    """Column -> JSON value, the source's own `prompt` among them."""

    def columns(self) -> Mapping[str, Any]:
        """The values, with `id` and `prompt`."""
        return {**self.values, "id": self.id, "prompt": self.prompt}

    def line(self) -> Mapping[str, Any]:
        """The values as the source has them, with our `id`."""
        return {"id": self.id, **self.values}

    @property
    def split(self) -> Split:
        """By the prompt alone, white space folded: rows that ask the same and differ in another column, such as the
        number of their line, are one question to the model."""
        return split_of(row_id(folded(self.prompt)))


def own_row(columns: Mapping[str, Any], prompt: str = "prompt") -> OwnRow:
    """A row of columns, whose text is in the column `prompt`. Equal columns make equal rows."""
    values = {name: columns[name] for name in sorted(columns) if name != "id"}
    return OwnRow(row_id(values), str(columns[prompt]), values)

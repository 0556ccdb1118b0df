"""Rows as token ids: how rollouts travel from rejection sampling to SFT, so that what was sampled is what is trained."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FILE = "rows.jsonl"


@dataclass(frozen=True)
class TokenRow:
    """One training example."""

    row: str
    """Id of the problem's row."""
    prompt_ids: list[int]
    """Up to the generation prompt, without the response prefix."""
    completion_ids: list[int]
    """Response prefix, what was sampled or demonstrated, turn end."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where it comes from: sample number, score, seed."""


def write(path: Path, rows: Iterable[TokenRow]) -> None:
    """One JSON line a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))


def read(directory: Path) -> list[TokenRow]:
    """The rows of a published data directory."""
    return [TokenRow(**json.loads(line)) for line in (directory / FILE).read_text().splitlines()]


def labelled(row: TokenRow) -> dict[str, list[int]]:
    """What SFTTrainer takes: input_ids, and labels that are -100 on the prompt."""
    return {
        "input_ids": [*row.prompt_ids, *row.completion_ids],
        "labels": [*([-100] * len(row.prompt_ids)), *row.completion_ids],
    }

"""The loss map of a row: what every token is, what it weighs, and how much of the row's loss it decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.tokens.token_rows import ROLES, TokenRow
from stages.tokens.weights import Weights, row_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "loss_map.json"
NAMES = {letter: role for role, letter in ROLES.items()}


def of_row(row: TokenRow, weights: Weights, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """{"row", "tokens": [{"text", "id", "role", "weight", "share"}]}; share is of the row's total weight, so the shares
    add up to 1.

    The first token has nothing before it and is never predicted: its weight is 0 whatever its role.
    """
    token_weights = row_weights(row, weights)
    total = sum(token_weights) or 1.0
    tokens = [
        {
            "text": tokenizer.decode([token_id]),
            "id": token_id,
            "role": NAMES[letter],
            "weight": weight,
            "share": weight / total,
        }
        for token_id, letter, weight in zip(row.ids, row.roles, token_weights, strict=True)
    ]
    return {"row": row.row, "tokens": tokens}


def write(out: Path, loss_map: dict[str, Any]) -> None:
    """Write a loss map into the policy's directory, as a record of what was trained."""
    (out / FILE).write_text(json.dumps(loss_map), encoding="utf-8")

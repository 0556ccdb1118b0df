"""Loss maps as text: on a terminal the row's text, coloured by role and shaded by weight; when piped, a line per
token."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from pipeline.cli.show.terminal import console, write
from stages.data.mix import MARK

STYLES = {"system": "magenta", "user": "cyan", "template": "bright_blue", "prefix": "yellow", "completion": "green"}
"""Role -> colour of its tokens."""
SHADES = (234, 235, 236, 238, 240)
"""256-colour greys behind the text, from the least to the greatest weight; none for weight 0."""


def show_map(stage: str, row: int, found: dict[str, Any]) -> None:
    """Print the tokens, then the weight of each role, then the stage's numbers."""
    terminal = console()
    if terminal.is_terminal:
        terminal.print(_text(found["tokens"]), end="\n\n")
    else:
        _lines(found["tokens"])
    for role, style in STYLES.items():
        _role(terminal, role, style, found["tokens"])
    metrics = found["metrics"]
    line = found["row"].removeprefix(MARK)
    mixed = f" (line {line} of its mix)" if line != found["row"] else ""
    terminal.print(
        f"{stage}, row {row} of {metrics['rows']:.0f}{mixed}; over all rows: R_g {metrics['generation_ratio']:.2f} "
        f"(completion / prompt tokens), prompt tokens carry {metrics['prompt_weight_share']:.1%} of the weight"
        f"{_mix(metrics)}",
        soft_wrap=True,
    )


def _mix(metrics: dict[str, float]) -> str:
    """The share of general rows in the weight; "" for a stage without a mix."""
    if "mix_rows" not in metrics:
        return ""
    return f", the last {metrics['mix_rows']:.0f} rows, of the mix, {metrics['mix_weight_share']:.1%}"


def _text(tokens: list[dict[str, Any]]) -> Text:
    """The row's text with the colours of its roles and weights."""
    text = Text()
    greatest = max(token["weight"] for token in tokens) or 1.0
    for token in tokens:
        shade = SHADES[round(token["weight"] / greatest * (len(SHADES) - 1))]
        background = f" on color({shade})" if token["weight"] else ""
        text.append(token["text"], f"{STYLES[token['role']]}{background}")
    return text


def _lines(tokens: list[dict[str, Any]]) -> None:
    write(f"{'weight':<8} {'share':<9} {'role':<11} token")
    for token in tokens:
        write(f"{token['weight']:<8g} {token['share']:<9.4f} {token['role']:<11} {token['text']!r}")


def _role(terminal: Console, role: str, style: str, tokens: list[dict[str, Any]]) -> None:
    """Print one line about a role, if the row has tokens of it."""
    role_tokens = [token for token in tokens if token["role"] == role]
    if not role_tokens:
        return
    predicted = [token for token in tokens[1:] if token["role"] == role]  # the first token of a row never is
    weights = sorted({token["weight"] for token in predicted}) or [0.0]
    share = sum(token["share"] for token in role_tokens)
    facts = f"{len(role_tokens):>5} tokens, weight {', '.join(f'{w:g}' for w in weights)}, {share:.1%} of the row"
    terminal.print(Text.assemble((f"{role:<11}", style), facts))

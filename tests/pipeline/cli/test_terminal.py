"""One module writes to the terminal, and what it writes is visible."""

from __future__ import annotations

import ast
import re

import pytest
from rich.text import Text

from pipeline.cli import complain
from pipeline.cli.show import terminal
from pipeline.cli.show.loss_map import show_map
from pipeline.cli.show.tables import run_table, show, table
from pipeline.registry import Registry
from pipeline.registry.runs import runs
from pipeline.results.summary import summarise
from tests.conftest import ROOT
from tests.stages.test_visible import ATTACKS

HOSTILE = " ".join(ATTACKS.values())
DIRECT = ("print", "sys.stdout.write", "sys.stderr.write", "typer.echo", "click.echo")
"""Ways to the terminal around it."""


def around(text: str) -> list[str]:
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and not to_a_file(node)]
    return [name for name in (ast.unparse(call.func) for call in calls) if name in DIRECT]


def to_a_file(call: ast.Call) -> bool:
    """Whether it has a file of its own: print(..., file=out)."""
    files = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "file"]
    return bool(files) and not files[0].startswith("sys.")


def test_no_other_module_of_the_pipeline_prints():
    found = {path: around(path.read_text()) for path in (ROOT / "pipeline").rglob("*.py")}
    names = {path.name: calls for path, calls in found.items() if calls}
    assert names == {"terminal.py": ["print"] * 2, "__init__.py": ["print"]}, names
    assert around("print(1)") == ["print"], "it can fail"


def test_lines_tables_texts_and_complaints_are_visible(capsys):
    terminal.write(HOSTILE)
    rows = table("name", f"{HOSTILE} [/x] [red]")
    rows.add_row(f"{HOSTILE} [/x] [red] :smile:", Text(HOSTILE))
    show(rows)
    terminal.console().print(Text(HOSTILE), soft_wrap=True)
    said = capsys.readouterr().out
    assert said.replace("\n", "").isprintable() and "\\x1b]0;owned" in said
    assert said.count("[/x]") == said.count("[red]") == 2 and ":smile:" in said
    assert complain(HOSTILE, 2) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line[:-1].isprintable() and "\\u202egnp" in line


def test_what_a_terminal_hides_pushes_no_text_out_of_its_cell(capsys):
    rows = table("who", "why")
    rows.add_row("\u200b" * 20 + "mallory", "\u200b" * 40 + "REVERTED: the reward was hacked")
    show(rows)
    said = "".join(capsys.readouterr().out.split())
    assert "mallory" in said and "REVERTED:therewardwashacked" in said


def test_a_table_of_stages_keeps_each_name_whole_in_80_columns(climbed, monkeypatch, capsys):
    registry = Registry(climbed[1])
    summary = summarise(registry, runs(registry)[0].run)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as a terminal
    monkeypatch.setenv("COLUMNS", "80")
    show(run_table(summary))
    said = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert max(map(len, said.splitlines())) <= 80
    assert all(stage.artifact in said.split() for stage in summary.stages if stage.artifact)


def test_a_complaint_without_end_is_cut_in_its_middle(capsys):
    complain("a" * 10**6 + "; Fix: b", 2)
    line = capsys.readouterr().err
    assert len(line) < terminal.LONGEST + 20 and line.startswith("switchback: aaa") and line.endswith("; Fix: b\n")


@pytest.mark.parametrize("piped", [True, False])
def test_the_text_of_a_row_is_visible_in_its_loss_map(piped, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR" if not piped else "NO_COLOR", "1")
    token = {"text": HOSTILE, "weight": 1.0, "share": 1.0, "role": "user"}
    metrics = {"rows": 1.0, "generation_ratio": 1.0, "prompt_weight_share": 1.0}
    show_map("sft", 0, {"tokens": [token], "metrics": metrics, "row": "1"})
    said = capsys.readouterr().out
    assert "\x1b]" not in said and "\u202e" not in said and "owned" in said

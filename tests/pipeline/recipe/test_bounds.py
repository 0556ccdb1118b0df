"""YAML that was written to hurt ends in one line with its place, at once."""

from __future__ import annotations

import pytest
import yaml

from pipeline.cli import exit_code
from pipeline.recipe import bounds, recipe
from stages.errors import BadInput


def bomb(levels: int, width: int = 10) -> str:
    lines = ["a0: &a0 [" + ", ".join(["x"] * width) + "]"]
    lines += [f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * width) + "]" for i in range(1, levels)]
    return "\n".join(lines)


HOSTILE = {
    "aliases of aliases": ("trl:\n  " + bomb(9).replace("\n", "\n  "), "line 6, column ", "stand for more than 100000"),
    "aliases side by side": (bomb(4) + "\nb: [" + ", ".join(["*a3"] * 9) + "]", "line 5", "stand for more than 100000"),
    "merged aliases": ("a: &a {x: 1}\n" + bomb(5).replace("[x", "[*a"), "line ", "stand for more than 100000"),
    "an alias of itself": ("a: &a [*a]", "line 1, column 8", "stands for what it is part of"),
    "an alias of what is around it": ("a: &a {b: [1, {c: *a}]}", "line 1, column 19", "stands for what it is part of"),
    "deep lists": ("[" * 3000 + "]" * 3000, "line 1, column 51", "more than 50 levels"),
    "deep mappings": ("{a: " * 3000 + "1" + "}" * 3000, "line 1, column 201", "more than 50 levels"),
    "deep blocks": ("\n".join(" " * i + "a:" for i in range(3000)), "line 51", "more than 50 levels"),
    "a giant integer": ("name: x\nseed: " + "9" * 5000, "line 2, column 7", "a number of 5000 characters"),
    "a giant integer in hex": ("seed: 0x" + "f" * 5000, "line 1, column 7", "a number of 5002 characters"),
    "a giant integer with a tag": ("seed: !!int '" + "9" * 5000 + "'", "line 1, column 7", "a number of 5000"),
    "a giant float": ("seed: 1." + "9" * 5000, "line 1, column 7", "a number of 5002 characters"),
    "a month 13": ("name: x\ndeadline: !!timestamp 2026-13-01", "line 2, column 11", "which is no timestamp"),
    "an empty integer": ("seed: !!int ''", "line 1, column 7", "which is no int"),
    "a word as a float": ("seed: !!float many", "line 1, column 7", "which is no float"),
    "a word as a boolean": ("seed: !!bool many", "line 1, column 7", "which is no bool"),
    "a word as a timestamp": ("seed: !!timestamp many", "line 1, column 7", "which is no timestamp"),
    "a word as a mapping": ("seed: !!map many", "line 1, column 7", "expected a mapping"),
    "a class": ("seed: !!python/object/apply:os.system [ls]", "line 1, column 7", "could not determine a constructor"),
    "an unknown alias": ("seed: *nosuch", "line 1, column 7", "undefined alias"),
    "NUL": ("seed: \0", "", "special characters"),
    "two documents": ("a: 1\n---\nb: 1", "line 2", "another document"),
}


@pytest.mark.parametrize(("text", "place", "said"), HOSTILE.values(), ids=HOSTILE)
def test_a_recipe_that_was_written_to_hurt_is_one_line_with_its_place(text, place, said, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(text)
    assert exit_code(["plan", str(tmp_path / "r.yaml"), "--registry", str(tmp_path / "r")]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line[:-1].isprintable() and len(line) < 1000, line
    assert place in line and said in line, line


def test_overrides_have_the_same_bounds(settings, write):
    for override in ("seed=" + "9" * 5000, "stages.rl1.trl=" + "[" * 3000 + "]" * 3000):
        with pytest.raises(BadInput) as refused:
            recipe.load(write(settings), [override])
        assert "line 1, column " in str(refused.value)


def test_aliases_that_stand_for_little_are_what_they_were():
    text = "a: &a {x: 1, y: [1, 2]}\nb: *a\nc: {<<: *a, x: 2}\n" + bomb(4)
    assert bounds.load(text) == yaml.safe_load(text)


def test_digits_that_are_text_are_no_number():
    digest = "0123456789abcdef" * 8
    assert bounds.load(f"a: {digest}\nb: '{'9' * 5000}'") == {"a": digest, "b": "9" * 5000}


def test_an_accelerate_config_has_the_same_bounds(settings, write, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(bomb(9) + "\nnum_processes: *a8")
    settings["launch"]["accelerate"] = str(tmp_path / "a.yaml")
    assert exit_code(["plan", str(write(settings)), "--registry", str(tmp_path / "r")]) == 2
    assert "stand for more than 100000" in capsys.readouterr().err

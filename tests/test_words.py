"""Names and messages use the field's words, and the pages name files that exist.

A word of BANNED says in a private dialect what the field has a word for. Names hold none of them. In messages their
number only goes down.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from pipeline.cli import app
from tests.conftest import ROOT

PACKAGES = ("pipeline", "stages", "prompts")
BANNED = ("beside", "climb", "dearest", "dress", "dressed", "mend", "nobody", "told", "whoever")
ALLOWED: frozenset[str] = frozenset()
"""Names that hold a banned word today. It only gets shorter."""
MESSAGES = 1
"""Banned words in the messages of errors today. It only goes down."""

PLACES = ("pipeline/", "stages/", "prompts/", "tests/", "docs/", "configs/")
HISTORY = "CHANGELOG.md"
"""It may name what is gone."""
WIDEST = 100
LONGEST = 25
"""Words of a sentence."""
PLAIN = ("README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/decisions/0015-rooms.md")
"""Pages that keep to WIDEST, and whose sentences are short and start with a noun that does something."""
PLACEHOLDERS = {"x", "X", "S"}
"""Names of stages that pages use where any stage is meant: `stages.x.format`."""


# names


def parts(name: str) -> list[str]:
    """The words of a name: `told_of`, `ToldOf` -> told, of."""
    return [part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def names(path: Path) -> Iterator[str]:
    """What a module is called, and what it calls its functions, classes and parameters."""
    yield path.parent.name if path.name == "__init__.py" else path.stem
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg


def modules(root: Path) -> list[Path]:
    return sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))


def banned_names(root: Path) -> list[str]:
    """`file: name` of each name that holds a banned word."""
    found = {(path, name) for path in modules(root) for name in names(path) if {*parts(name)} & {*BANNED}}
    return sorted(f"{path.relative_to(root)}: {name}" for path, name in found)


def test_names_hold_no_banned_word():
    found = [line for line in banned_names(ROOT) if line.split(": ")[1] not in ALLOWED]
    assert not found, "\n".join(found)


def test_a_banned_name_is_noticed(tmp_path):
    """The test above can fail."""
    file = tmp_path / "stages" / "climb.py"
    file.parent.mkdir()
    file.write_text("class TheDress:\n    def f(self, told_of, *, fold, amended): ...\n")
    assert banned_names(tmp_path) == ["stages/climb.py: TheDress", "stages/climb.py: climb", "stages/climb.py: told_of"]


# messages


def exceptions(root: Path) -> set[str]:
    """The classes of both modules of exceptions."""
    files = [root / "stages" / "errors.py", root / "pipeline" / "errors.py"]
    trees = [ast.parse(file.read_text()) for file in files if file.is_file()]
    return {node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def messages(path: Path, errors: set[str]) -> Iterator[str]:
    """The literals of what a module raises, and of the errors that it makes for others to raise."""
    seen: set[ast.AST] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        makes = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in errors
        if not makes and not (isinstance(node, ast.Raise) and node.exc):
            continue
        for part in ast.walk(node):
            if isinstance(part, ast.Constant) and isinstance(part.value, str) and part not in seen:
                seen.add(part)
                yield part.value


def banned_in_messages(root: Path) -> Counter[str]:
    """Banned word -> how often messages say it."""
    pattern = re.compile(rf"\b({'|'.join(BANNED)})\b", re.IGNORECASE)
    errors = exceptions(root)
    said = (text for path in modules(root) for text in messages(path, errors))
    return Counter(word.lower() for text in said for word in pattern.findall(text))


def test_messages_hold_no_more_banned_words_than_before():
    found = banned_in_messages(ROOT)
    assert found.total() <= MESSAGES, found


def test_a_banned_word_in_a_message_is_noticed(tmp_path):
    """The test above can fail, on what is raised and on what is made to be raised. A docstring does not count."""
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "errors.py").write_text("class Bad(Exception): ...\n")
    (tmp_path / "stages" / "bad.py").write_text(
        'def f(x):\n    """Mend it."""\n    raise ValueError(f"{x}: mend it")\n\n\n'
        'def g():\n    return Bad("nobody was told, amend it")\n'
    )
    assert banned_in_messages(tmp_path) == {"mend": 1, "nobody": 1, "told": 1}


# pages


def pages(root: Path) -> list[Path]:
    return sorted([*root.glob("*.md"), *(root / "docs").rglob("*.md")])


def code_spans(text: str) -> list[str]:
    """What stands between backticks, fenced blocks left out."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def defined(path: Path) -> set[str]:
    """What a module defines: functions, classes and their methods as Class.method, constants."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            found |= {
                node.name,
                *(f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)),
            }
        elif isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return found


def no_such_path(root: Path, span: str) -> bool:
    """Whether `stages/errors.py` or `stages/errors.py:BadInput` names what is not there.

    A path with a <placeholder> or a * names a pattern.
    """
    if not span.startswith(PLACES) or set("<>*{} ") & set(span):
        return False
    path, _, name = span.partition(":")
    return not (root / path).exists() or bool(name and name not in defined(root / path))


def no_such_module(root: Path, span: str, stages: set[str]) -> bool:
    """Whether `stages.data.sources` names no module and no definition. `stages.rl1.format` is a recipe's field."""
    match = re.fullmatch(r"(pipeline|stages|prompts)((?:\.\w+)+)", span)
    if not match or match[2].split(".")[1] in stages:
        return False
    path, rest = root / match[1], match[2].split(".")[1:]
    while rest and (path / rest[0]).is_dir():
        path, rest = path / rest[0], rest[1:]
    if rest and (path / f"{rest[0]}.py").is_file():
        path, rest = path / f"{rest[0]}.py", rest[1:]
    elif not rest or (path / "__init__.py").is_file():
        path /= "__init__.py"
    return not path.is_file() or bool(rest and ".".join(rest) not in defined(path))


def stage_names(root: Path) -> set[str]:
    """What recipes in configs/ call their stages."""
    recipes = [yaml.safe_load(path.read_text()) for path in (root / "configs").glob("*.yaml")]
    return PLACEHOLDERS | {stage["name"] for recipe in recipes for stage in recipe["stages"]}


def wrong_references(root: Path) -> list[str]:
    """`page: reference` of each path, module, test and link on a page that leads nowhere."""
    stages = stage_names(root)
    tests = {
        name
        for path in (root / "tests").rglob("*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    found: list[str] = []
    for page in pages(root):
        text = page.read_text()
        spans = [] if page.name == HISTORY else code_spans(text)
        wrong = [span for span in spans if no_such_path(root, span) or no_such_module(root, span, stages)]
        wrong += [span for span in spans if re.fullmatch(r"test_\w+", span) and span not in tests]
        links = re.findall(r"\]\(([^)#\s]+)", text)
        wrong += [link for link in links if "://" not in link and not (page.parent / link).exists()]
        found += [f"{page.relative_to(root)}: {one}" for one in wrong]
    return found


def test_paths_modules_tests_and_links_of_the_pages_exist():
    found = wrong_references(ROOT)
    assert not found, "\n".join(found)


def test_a_reference_that_leads_nowhere_is_noticed(tmp_path):
    """The test above can fail, and lets pass what is right."""
    for path, text in {
        "stages/data/__init__.py": "",
        "stages/data/sources.py": "ROWS = 1\nclass Reader:\n    def read(self): ...\n",
        "tests/test_it.py": "def test_it():\n    pass\n",
        "configs/demo.yaml": "stages: [{name: rl1}]\n",
        "docs/good.md": "`stages/data/sources.py:Reader.read` `stages.data.sources.ROWS` `stages.data`\n"
        "`stages/<kind>.py` `stages.rl1.format` `test_it` [it](good.md)\n",
        "CHANGELOG.md": "`stages.sources`\n",
        "docs/bad.md": "`stages/sources.py` `stages/data/sources.py:read` `stages.sources`\n"
        "`stages.data.sources.rows` `test_that` [it](../good.md)\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert wrong_references(tmp_path) == [
        f"docs/bad.md: {wrong}"
        for wrong in (
            *("stages/sources.py", "stages/data/sources.py:read", "stages.sources", "stages.data.sources.rows"),
            *("test_that", "../good.md"),
        )
    ]


def rooms(root: Path) -> set[str]:
    """The folders right below pipeline/ and stages/, as `stages/data/`."""
    folders = {path.parent for package in PACKAGES[:2] for path in (root / package).glob("*/__init__.py")}
    return {f"{folder.relative_to(root).as_posix()}/" for folder in folders}


def tree(text: str) -> set[str]:
    """The folders of a tree that is drawn by indentation, in blocks of code: `pipeline/`, `pipeline/cli/`."""
    found: set[str] = set()
    above: list[tuple[int, str]] = []
    for indent, name in re.findall(r"^ {4}( *)([\w-]+/)(?= )", text, re.MULTILINE):
        above = [(depth, folder) for depth, folder in above if depth < len(indent)]
        above.append((len(indent), name))
        found.add("".join(folder for _, folder in above))
    return found


def test_the_architecture_page_has_a_line_for_each_room_and_each_exception():
    spans = code_spans((ROOT / "docs" / "architecture.md").read_text())
    missing = (rooms(ROOT) | exceptions(ROOT)) - set(spans)
    assert not missing, missing


def commands(text: str) -> list[list[str]]:
    """The command lines of switchback on a page, as words: whole lines of code, and spans."""
    lines = [line for line in text.splitlines() if line.startswith("    switchback ")] + code_spans(text)
    return [line.split(" #")[0].split() for line in lines if line.split()[:1] == ["switchback"]]


def wrong_commands(root: Path, top: Any) -> list[str]:
    """`page: command` of each that `--help` does not know, and of each option that its command does not have."""
    found: list[str] = []
    asked = [(page, words) for page in pages(root) for words in commands(page.read_text())]
    for page, words in asked:
        command, rest = top, words[1:]
        while rest and hasattr(command, "commands") and not rest[0].startswith("--"):
            command, *rest = command.commands.get(rest[0]), *rest[1:]
        known = {option for parameter in command.params for option in parameter.opts} if command else set()
        options = {word.strip("[]") for word in rest if word.lstrip("[").startswith("--")}
        if command is None or options - known:
            found.append(f"{page.relative_to(root)}: {' '.join(words)}")
    return found


def test_commands_and_options_on_the_pages_exist():
    assert wrong_commands(ROOT, typer.main.get_command(app())) == []


def test_a_command_that_is_not_there_is_noticed(tmp_path):
    """The test above can fail."""
    (tmp_path / "README.md").write_text(
        "`switchback alias set prod ID [--expect N]`\n\n    switchback plan r.yaml --only x  # --not\n"
        "    switchback plan r.yaml --not\n    switchback fly\n"
    )
    wrong = ["README.md: switchback plan r.yaml --not", "README.md: switchback fly"]
    assert wrong_commands(tmp_path, typer.main.get_command(app())) == wrong


def test_the_tree_of_the_readme_is_the_one_on_disk():
    drawn = tree((ROOT / "README.md").read_text())
    assert rooms(ROOT) <= drawn
    assert not [folder for folder in drawn if not (ROOT / folder).is_dir()]


def test_a_tree_is_read_by_its_indentation():
    """The test above can fail."""
    assert tree("    stages/    does\n      trl/     hooks\n    docs/   pages\n") == {"stages/", "stages/trl/", "docs/"}


# prose


def prose(text: str) -> Iterator[tuple[int, str]]:
    """(number, line) of every line. Code, tables and headings count as blank, and a blank line ends a paragraph."""
    fenced = blank = False
    for number, line in enumerate(text.splitlines(), 1):
        fence = line.lstrip().startswith("```")
        fenced = fenced != fence
        indented = line.startswith("    ") and (blank or not line.strip())
        if fence or fenced or indented or line.lstrip().startswith(("|", "#")):
            yield number, ""
            continue
        blank = not line.strip()
        yield number, line


def too_wide(text: str) -> list[int]:
    """Lines of prose over WIDEST columns; a URL cannot be broken."""
    return [number for number, line in prose(text) if len(line) > WIDEST and "://" not in line]


def sentences(text: str) -> Iterator[str]:
    """The sentences of the prose; code is one word, of a link what it shows counts."""
    joined = "\n".join(re.sub(r"^\s*(?:[-*]|\d+\.) ", "\n", line) for _, line in prose(text))
    joined = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "Code", joined))
    for paragraph in re.split(r"\n\s*\n", joined):
        yield from filter(None, re.split(r"(?<=[.!?])\s+", " ".join(paragraph.replace("**", "").split())))


def clumsy(text: str) -> list[str]:
    """Sentences that are long, hold a semicolon, or start with a relative clause."""
    starts = ("What ", "Who ", "Whoever ", "Whatever ", "Nothing ")
    return [one for one in sentences(text) if ";" in one or one.startswith(starts) or len(one.split()) > LONGEST]


def banned_in_prose(root: Path) -> list[str]:
    """`page: sentence` of each that holds a banned word. Decisions and the changelog are records and stay."""
    pattern = re.compile(rf"\b({'|'.join(BANNED)})\b", re.IGNORECASE)
    found = [page for page in pages(root) if page.name != HISTORY and page.parent.name != "decisions"]
    said = ((page, one) for page in found for one in sentences(page.read_text()))
    return [f"{page.relative_to(root)}: {one}" for page, one in said if pattern.search(one)]


def test_pages_hold_no_banned_word():
    found = banned_in_prose(ROOT)
    assert not found, "\n".join(found)


def test_a_banned_word_on_a_page_is_noticed(tmp_path):
    """The test above can fail. Code and names of tests are not prose."""
    for name in ("README.md", "CHANGELOG.md", "docs/decisions/0001-it.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("Mend it. Amend `told`.\n\n    told\n")
    assert banned_in_prose(tmp_path) == ["README.md: Mend it."]


@pytest.mark.parametrize("page", PLAIN)
def test_lines_of_plain_pages_are_narrow(page):
    assert too_wide((ROOT / page).read_text()) == []


@pytest.mark.parametrize("page", PLAIN)
def test_sentences_of_plain_pages_are_short_and_say_who_does_what(page):
    found = clumsy((ROOT / page).read_text())
    assert not found, "\n".join(found)


def test_wide_lines_and_clumsy_sentences_are_noticed():
    """The two tests above can fail, and let tables and code pass."""
    wide = "word " * 21
    code = f"    {wide}; {wide}\n\n| {wide}; |\n\n```\n{wide};\n```\n\n"
    page = f"# Title; it\n\n{wide}\n\n{code}https://{wide}\n\n1. What is\nit.\n2. A `x; y`. So; it.\n"
    assert too_wide(page) == [3]
    assert clumsy(page) == ["What is it.", "So; it."]
    assert clumsy("Short. " + "word " * 26) == [" ".join(["word"] * 26)]

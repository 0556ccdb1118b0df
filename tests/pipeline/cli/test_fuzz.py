"""Recipes, templates and manifests at random: each is taken, or refused in one line that a terminal can show.

Seeded: a case that fails is named by its number. 60 of each in `make test`, 1,000 in `make test-full`."""

from __future__ import annotations

import copy
import json
import random
import unicodedata

import pytest
import yaml

from pipeline.cli import exit_code
from pipeline.registry import Registry, Source
from stages.errors import BadInput
from stages.job import Format
from stages.policy import models
from stages.tokens import chat, prefix
from stages.visible import visible
from tests.conftest import TINY
from tests.models import CHATML, save
from tests.pipeline.registry.test_hostile import draft, finished

SHORT, LONG = range(60), range(1000)
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp", "Cn", "Co")
TEXTS = (
    "", " ", "x", "\x1b]0;owned\x07", "\x1b[2J", "\x9b31m", "\u202egnp", "\u2066", "a\u200bb", "\ud800", "\x00",
    "\r\n", "[/]", "[bold]", "[/red]", "[link=x]y", "`|<img>|`", "{{ x }}", "{% raw %}", "~", "%s", "{0.__class__}",
    "null", "010", "10:00", "1e400", "2026-13-01", "train[0:9]", "train[9:0]", "a" * 5000, "漢" * 300, "..", "a/../b",
    "hf://x", "s3://", "base", "warmup",
)  # fmt: skip
NUMBERS = (0, 1, -1, 2**31, 2**63, -(2**70), 10**99, 0.0, -0.0, 1e308, 5e-324, 1e-9, True, False)


def a_value(draw: random.Random, depth: int = 0):
    kind = draw.random()
    if kind < 0.45 or depth > 3:
        return draw.choice(TEXTS)
    if kind < 0.75:
        return draw.choice(NUMBERS)
    if kind < 0.82:
        return None
    if kind < 0.9:
        return [a_value(draw, depth + 1) for _ in range(draw.randint(0, 3))]
    return {draw.choice(TEXTS): a_value(draw, depth + 1) for _ in range(draw.randint(0, 3))}


def places(value, way=()):
    """Every place in a structure, as the way to it."""
    yield way
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, one in inner:
        yield from places(one, (*way, name))


def changed(draw: random.Random, value):
    """A structure with up to three places changed: replaced, removed, renamed, nested or doubled."""
    value = copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        ways = [way for way in places(value) if way]
        if not ways:
            return value
        *before, last = draw.choice(ways)
        here = value
        for name in before:
            here = here[name]
        change = draw.random()
        if change < 0.6:
            here[last] = a_value(draw)
        elif change < 0.7:
            here.pop(last)
        elif change < 0.85 and isinstance(here, dict):
            here[draw.choice(TEXTS)] = here.pop(last)
        elif change < 0.92:
            here[last] = [here[last]]
        elif isinstance(here, list):
            here.append(copy.deepcopy(here[last]))
        else:
            here[last] = {"x": here[last]}
    return value


def shown(capsys, *allowed: str) -> str:
    """All that was printed, which hides nothing and is no surprise; the line of a refusal."""
    said = capsys.readouterr()
    for text in said:
        hidden = {char for char in text if unicodedata.category(char) in HIDDEN} - {"\n", "\t"}
        assert not hidden, ascii(text)
        assert "should not happen" not in text, text
    lines = [line for line in said.err.splitlines() if not line.startswith(allowed)]
    assert len(lines) <= 1, said.err
    return said.err


def run(arguments, capsys, codes, *allowed):
    code = exit_code([str(argument) for argument in arguments])
    line = shown(capsys, *allowed)
    assert code in codes, (code, line)
    assert code in (0, 1) or line.startswith("switchback: "), (arguments, line)


# recipes


def a_recipe(draw: random.Random) -> str:
    text = yaml.safe_dump(changed(draw, TINY), sort_keys=False, allow_unicode=draw.random() < 0.5)
    for _ in range(draw.choice((0, 0, 1, 3))):
        at = draw.randrange(len(text))
        pieces = ("&a ", "*a", "!!int ", "!!timestamp ", "- ", ": ", "{", "[", "'", "\t", "<<: ", "9" * 5000, "[" * 200)
        text = text[:at] + draw.choice((*pieces, *TEXTS)) + text[at + draw.randint(0, 3) :]
    return text


def fuzz_recipes(numbers, tmp_path, capsys):
    for number in numbers:
        draw = random.Random(f"recipe {number}")
        (tmp_path / "r.yaml").write_bytes(a_recipe(draw).encode(errors="surrogatepass"))
        override = ["--set", f"stages.rl1.trl={a_recipe(draw)[:200]}"] if draw.random() < 0.1 else []
        arguments = ["plan", tmp_path / "r.yaml", "--registry", tmp_path / "r", *override]
        try:
            run(arguments, capsys, (0, 2))
        except AssertionError as error:
            raise AssertionError(f"recipe {number}: {error}") from None


def test_a_recipe_at_random_is_planned_or_refused_in_one_line(tmp_path, capsys):
    fuzz_recipes(SHORT, tmp_path, capsys)


@pytest.mark.full
def test_a_thousand_recipes_at_random(tmp_path, capsys):
    fuzz_recipes(LONG, tmp_path, capsys)


# templates


def an_expression(draw: random.Random, depth: int = 0) -> str:
    leaves = ["prompt", "messages", "nosuch", "1", "0", "-3", "2.5", "''", "'a'", "none", "true", "[]", "{}", "range"]
    leaves += ["range(9)", "loop", "self", "joiner()", "cycler(1)", "namespace(a=1)", "dict(a=1)", "lipsum", "[1, 'a']"]
    leaves += ["messages[0].content", "messages[0]['role']", "bos_token", "'\\x1b[2J'", "10 ** 5000"]
    if depth > 3 or draw.random() < 0.3:
        return draw.choice(leaves)

    def inner() -> str:
        return an_expression(draw, depth + 1)

    filters = ["upper", "list", "join(1)", "random", "map('upper')", "first", "sum", "tojson", "length", "center(9)"]
    filters += ["replace('a', 'b')", "int", "float", "sort", "unique", "batch(0)", "slice(0)", "round(400)", "trim"]
    filters += ["items", "dictsort", "groupby('a')", "format(1)", "urlize", "wordwrap(0)", "pprint", "attr('a')"]
    shapes = [
        lambda: f"({inner()} {draw.choice(['+', '-', '*', '/', '//', '%', '**', '~', 'in', '<', 'and'])} {inner()})",
        lambda: f"{inner()} | {draw.choice(filters)}",
        lambda: f"{inner()}[{inner()}]",
        lambda: f"{inner()}.{draw.choice(['__class__', 'x', 'upper', 'format', 'split', 'content', 'pop'])}",
        lambda: f"{inner()}({draw.choice(['', inner()])})",
        lambda: f"({inner()} if {inner()} else {inner()})",
        lambda: f"({inner()} is {draw.choice(['defined', 'string', 'number', 'even', 'iterable', 'nosuch'])})",
    ]
    return draw.choice(shapes)()


def a_template(draw: random.Random) -> str:
    def block(depth: int = 0) -> str:
        inner = block(depth + 1) if depth < 2 else "x"
        return draw.choice(
            [
                f"{{{{ {an_expression(draw)} }}}}",
                f"{{% if {an_expression(draw)} %}}{inner}{{% endif %}}",
                f"{{% for m in {an_expression(draw)} %}}{inner}{{% endfor %}}",
                f"{{% set x = {an_expression(draw)} %}}{{{{ x }}}}",
                f"{{% macro f(a) %}}{inner}{{% endmacro %}}{{{{ f({an_expression(draw)}) }}}}",
                "{% include 'x' %}",
                "{% raise %}",
                "{{ raise_exception('\\x1b[2J no') }}",
                draw.choice(TEXTS).encode(errors="ignore").decode(),
                "{{",
                "{% endfor %}",
                "((" * draw.randint(0, 90),
            ]
        )

    return "".join(block() for _ in range(draw.randint(1, 3)))


def outcome(render, number: int):
    """What comes out, twice the same: a text, or the line of a refusal."""
    try:
        text = render()
    except BadInput as error:
        line = visible(" ".join(str(error).split()))
        assert line.isprintable(), (number, line)
        return line
    except Exception as error:
        raise AssertionError(f"template {number}: {type(error).__name__}: {error}") from error
    assert render() == text, number
    return text


PLAIN = Format(prompt="p", prompt_digest="", system_prompt="", response_prefix="", user_template="{{ prompt }}")


def fuzz_templates(numbers, policy):
    row, refused = {"prompt": "a?", "id": "1", "messages": [{"role": "user", "content": "?"}]}, 0
    for number in numbers:
        draw = random.Random(f"template {number}")
        format = PLAIN.model_copy(update={"user_template": a_template(draw)})
        said = outcome(lambda format=format: prefix.messages(format, row)[0]["content"], number)
        refused += said.startswith("prompt p: ")
        ours = format.model_copy(update={"user_template": "{{ prompt }}", "chat_template": a_template(draw) + CHATML})
        outcome(lambda ours=ours: chat.render(models.load_tokenizer(policy, ours), row["messages"]), number)
    assert 0 < refused < len(numbers), "some are rendered, and some refused"


def test_a_template_at_random_is_rendered_or_refused_in_one_line(tmp_path):
    fuzz_templates(SHORT, str(save(tmp_path / "policy")))


@pytest.mark.full
def test_a_thousand_templates_at_random(tmp_path):
    fuzz_templates(LONG, str(save(tmp_path / "policy")))


# manifests

LOOKS = (
    ["ls"], ["show", "ID"], ["lineage", "ID"], ["lineage", "ID", "--mermaid"], ["diff", "ID", "GOOD"],
    ["show", "ID", "--json"], ["export", "ID", "DIR"], ["gc"], ["alias", "ls"], ["alias", "history", "best"], ["pins"],
)  # fmt: skip
LEFT_OUT = ("switchback: left out: ",)


def a_manifest():
    return draft("other").model_copy(
        update={
            "format": PLAIN,
            "inputs": {"policy": Source(id=None, output="policy", key="k", name="hf://org/model@abc")},
            "identity": {
                "problem": {"name": "scheduling"},
                "rows": {"split": "train", "start": 0, "stop": 9},
                "seed": 0,
            },
            "config": {"rows": "train[0:9]", "execution": {"processes": 1}},
            "metrics": {"loss": 1.0, "funnel/all": 9.0, "funnel/best": 3.0},
            "provenance": {"run": "demo-1", "host": "h", "versions": {"trl": "1.16"}, "seconds": 1.0, "processes": 1},
        }
    )


def fuzz_manifests(numbers, tmp_path, capsys):
    registry = Registry(tmp_path / "registry")
    good = registry.publish(finished(tmp_path / "good"), draft("good"), "user").artifact
    other = registry.publish(finished(tmp_path / "other"), a_manifest(), "user").artifact
    path = registry.path(other) / "artifact.json"
    sound = json.loads(path.read_text())
    run(["alias", "set", "best", other.id, "--registry", registry.url], capsys, (0,))
    for number in numbers:
        draw = random.Random(f"manifest {number}")
        made = {**changed(draw, sound), **({"id": other.id, "key": other.key} if draw.random() < 0.7 else {})}
        path.write_bytes(json.dumps(made).encode())
        place = tmp_path / f"x{number}"
        words = {"ID": other.id, "GOOD": good.id, "DIR": str(place)}
        for look in draw.sample(LOOKS, 4):
            arguments = [*(words.get(word, word) for word in look), "--registry", registry.url]
            try:
                run(arguments, capsys, (0, 1, 2), *LEFT_OUT)
            except AssertionError as error:
                raise AssertionError(f"manifest {number}, {look}: {error}") from None


def test_a_manifest_at_random_is_read_or_refused_in_one_line(tmp_path, capsys):
    fuzz_manifests(SHORT, tmp_path, capsys)


@pytest.mark.full
def test_a_thousand_manifests_at_random(tmp_path, capsys):
    fuzz_manifests(LONG, tmp_path, capsys)

"""Prompts: a file each, identified by what reaches the model, with a rule that says whether it was followed."""

from __future__ import annotations

import re

import pytest
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

import prompts
from prompts import templates

GOOD = "---\npurpose: a test\nformat: one word\nfollow: 'yes'\n---\n# system\nBe brief.\n# user\n{{ prompt }}\n"


@pytest.mark.parametrize("name", prompts.names())
def test_every_shipped_prompt_has_a_purpose_and_a_user_template(name):
    prompt = prompts.load(name)
    assert prompt.purpose and "{{ prompt }}" in prompt.user_template
    assert prompt.follow is None or re.compile(prompt.follow)


def test_there_is_an_absolute_and_a_conversational_form_of_one_task():
    absolute, talk = prompts.load("scheduler"), prompts.load("scheduler-talk")
    assert "MUST" in absolute.user_template and "MUST" not in talk.user_template + talk.system_prompt
    answer = "<think>\nhm\n</think>\n<schedule>\n<event>\n</event>\n</schedule>"
    for prompt in (absolute, talk):
        assert re.search(prompt.follow, answer) and not re.search(prompt.follow, "<schedule></schedule>")


def test_front_matter_is_for_people_and_for_the_probe_and_not_for_the_model():
    prompt = prompts.parse("p", GOOD)
    assert (prompt.purpose, prompt.format, prompt.follow) == ("a test", "one word", "yes")
    assert prompts.parse("p", GOOD.replace("'yes'", "'no'")).digest == prompt.digest
    assert prompts.parse("p", GOOD.replace("brief", "long")).digest != prompt.digest


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (GOOD.replace("format:", "fromat:"), "fromat: 'one word', expected text under purpose, format, follow"),
        (GOOD.replace("'yes'", "'('"), "follow is no regular expression"),
        (GOOD.replace("'yes'", "[a, b]"), "expected text under"),
        (GOOD.replace("{{ prompt }}", "{{ prompt"), "user template"),
        (GOOD.replace("# user", "# nobody"), "needs front matter"),
        (GOOD.replace("Be brief.", "About {{ prompt }}"), "but only '# user' is one"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(wrong, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        prompts.parse("p", wrong)


REFUSED = {
    "{{ [1, 2] | random }}": "random is refused, because it makes another prompt each time",
    "{{ [[1, 2]] | map('random') | first }}": "random is refused",
    "{{ [[1]] | map('map', 'random') | first }}": "random is refused",
    "{{ [[1]] | map('ran' ~ 'dom') | list }}": "a map whose filter is not written out is refused",
    "{{ [[1]] | map(name) | list }}": "a map whose filter is not written out is refused",
    "{{ [[1]] | map(*['random']) | list }}": "a map whose filter is not written out is refused",
    "{{ [[1]] | map('map', *['random']) | list }}": "a map whose filter is not written out is refused",
    "{{ lipsum() }}": "lipsum is refused",
    "{% include 'other.md' %}": "a prompt includes no other template",
    "{% from 'other.md' import x %}": "a prompt includes no other template",
    "{% extends 'other.md' %}": "a prompt includes no other template",
    "{{ prompt | nosuch }}": "No filter named 'nosuch'",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}": "RecursionError",
}


@pytest.mark.parametrize(("template", "said"), REFUSED.items(), ids=lambda text: text[:30])
def test_a_user_template_that_says_something_else_each_time_or_cannot_stand_alone_is_refused(template, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        prompts.parse("p", GOOD.replace("{{ prompt }}", template))


GENERATORS = (
    "[1] | map('upper')",
    "[1] | select",
    "{'a': 1} | items",
    "[1] | unique",
    "[1] | batch(1)",
    "[1] | reverse",
)
"""What jinja2 makes an iterator of, whose text is its address."""
TEXTS = (
    "{}",
    "'x' ~ ({})",
    "'%s' | format({})",
    "'{{}}'.format({})",
    "({}) | pprint",
    "({}) | e",
    "[{}] | join",
    "[{}]",
)
"""Ways to make it a text."""


@pytest.mark.parametrize("text", [*TEXTS, "({}) | string | replace('at', '') | upper"])
@pytest.mark.parametrize("generator", GENERATORS)
def test_the_text_of_a_generator_is_its_address_and_not_there(generator, text):
    with pytest.raises(TemplateError, match="another prompt each time"):
        templates.compiled(f"{{{{ {text.format(generator)} }}}}").render()


def test_a_generator_is_what_it_is_in_plain_jinja2():
    """Items are taken once, and only those that are asked for."""
    template = (
        "{% set up = many | map('upper') %}{% for one in up %}{{ loop.index }}{{ one }}{% endfor %}{{ up | list }}"
        "{{ many | map(attribute='a', default=1) | join }}{{ ['a'] | map('default', 'b') | list }}{{ up is iterable }}"
        "{{ (none, 1) | select | map('string') | first }}{{ [1, 'x'] | map('abs') | first }}{{ [1] | reverse | list }}"
        "{% for k, v in {'a': 1} | items %}{{ k }}{{ v }}{% endfor %}{{ 'a' in up }}{{ up is sequence }}"
        "{% for b in many | batch(2) %}{{ b }}{% endfor %}"
        "{% for one in many %}{{ (loop | default(1)).index }}{% endfor %}"
    )
    plain = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(template)
    assert templates.compiled(template).render(many=["a", "b", "c"]) == plain.render(many=["a", "b", "c"])


def test_dice_that_are_hidden_are_not_there():
    assert "random" not in templates.compiled("").environment.filters


def test_an_address_is_what_stands_nowhere_in_what_a_text_was_made_of():
    for value in ([].append, [{}.get], {}.items, str({}.items).upper(), str(object()).replace(" at ", "")):
        assert templates.address(f"a {value} b", "{{ x }}", {"x": value if not isinstance(value, str) else "y"}), value
    assert templates.address("<type object at 0x9cf6c0>", "") == "0x9cf6c0"
    made = "0xDEADBEEF at 0xdeadbeef01 0x12345678 0x7f"
    assert templates.address(made, "0x12345678", {"x": ["deadbeef01", {"y": "0xdeadbeef"}]}) is None
    assert templates.address(made, "0x12345678", {"x": [].append}) == "0xDEADBEEF"


def test_nothing_is_computed_while_a_template_is_compiled():
    templates.compiled("{{ 'a' * 10**10 }}{{ 'a' | center(10**10) }}{{ 3 ** 10**9 }}{{ 'a' ~ 1 // 0 }}")


def test_what_a_template_writes_is_what_plain_jinja2_writes():
    row = {"prompt": "a <b> & 'c'", "n": 3, "many": [1, "x", None, {"a": 1.5}], "none": None, "yes": True, "f": 0.1}
    template = (
        "{{ prompt }}|{{ n * 2 }}|{{ many }}|{{ none }}|{{ yes }}|{{ f }}|{{ many | length }}|{{ prompt | upper }}\n"
        "{% for one in many %}{{ loop.index }}: {{ one }}\n{% endfor %}{% if yes %}{{ 'a' ~ n }}{% endif %}"
        "{{ prompt | replace('a', 'b') }}{{ 7 // 2 }}{{ '%03d' | format(n) }}{{ {'a': (1, 2)} }}{# no #}\n\n"
    )
    plain = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(template)
    assert templates.compiled(template).render(row) == plain.render(row)


def test_front_matter_without_bounds_is_refused():
    bomb = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 10)}]" for i in range(9))
    for front in (bomb, "purpose: " + "[" * 1000 + "]" * 1000, "purpose: !!int x", "follow: 'a{99999999999}'"):
        with pytest.raises(ValueError, match="prompt p"):
            prompts.parse("p", f"---\n{front}\n---\n# system\n# user\n{{{{ prompt }}}}")

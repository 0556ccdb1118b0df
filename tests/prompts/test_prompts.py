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


@pytest.mark.parametrize("value", ["range", "prompt.upper", "[1] | map('upper')", "joiner()", "[range]"])
def test_what_has_an_address_in_its_name_is_not_written(value):
    with pytest.raises(TemplateError, match="another prompt each time"):
        templates.compiled(f"{{{{ {value} }}}}").render(prompt="?")


def test_dice_that_are_hidden_are_not_there():
    for hidden in ("{{ [[1]] | map('ran' ~ 'dom') | list }}", "{{ [1] | map(name) | list }}"):
        with pytest.raises(TemplateError, match="No filter named 'random'"):
            templates.compiled(hidden).render(name="random")


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

"""Prompts: a file each, identified by what reaches the model, with a rule that says whether it was followed."""

from __future__ import annotations

import re

import pytest

import prompts

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

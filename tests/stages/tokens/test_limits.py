"""A template that somebody else wrote ends within its limits, whatever it does, and whatever it raises is one line."""

from __future__ import annotations

import os
import signal
import time

import pytest
from jinja2 import TemplateError

from prompts import templates
from stages.errors import BadInput
from stages.job import Format
from stages.policy import models
from stages.tokens import chat, limits, prefix
from tests.models import CHATML, save

LOOPS = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
LONG = "{% set a = namespace(x='ab') %}{% for i in range(40) %}{% set a.x = a.x ~ a.x %}{% endfor %}{{ a.x }}"
ONE_CALL = "{% set n = 10 ** 9 %}{{ (3 ** n) // (7 ** n) }}"
RAISES = {
    "{{ 1 // 0 }}": "ZeroDivisionError",
    "{{ range(10**9) }}": "OverflowError",
    "{{ 'a' + 1 }}": "TypeError",
    "{{ [1] | sum(start='a') }}": "TypeError",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "RecursionError",
    "{{ '%d' | format('x') }}": "TypeError",
    "{{ '{:q}'.format(1) }}": "ValueError",
    "{{ (10 ** 5000) }}": "ValueError",
    "{{ nosuch }}": "'nosuch' is undefined",
    "{{ ''.__class__ }}": "unsafe",
}


def rendering(template, **row):
    return lambda: templates.compiled(template).render(row)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (LOOPS, "did not end within 1 s"),
        (ONE_CALL, "did not end within 1 s"),
        (LONG, "needs more than 1024 MiB"),
        ("{{ 'a' * 10**10 }}", "needs more than 1024 MiB"),
        ("{{ 'a' | center(10**10) }}", "needs more than 1024 MiB"),
        ("{{ 'a' * 2**25 }}", "writes more than 16777216 characters"),
    ],
)
def test_a_template_that_does_not_end_is_refused_before_it_runs_here(template, said):
    started = time.process_time()
    with pytest.raises(BadInput, match=said):
        limits.refuse_endless("the template", template, rendering(template), seconds=1.0)
    assert time.process_time() - started < 1.0, "it ran in a child"


def test_one_that_is_endless_for_some_rows_only_is_stopped_there():
    template = "{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}{{ n }}"
    limits.refuse_endless("the template", template, rendering(template, n=1), seconds=1.0)
    handler = signal.getsignal(signal.SIGALRM)
    with pytest.raises(BadInput, match=r"did not end within 0\.2 s"):
        limits.rendered("the template", rendering(template, n=100000), seconds=0.2)
    assert signal.getsignal(signal.SIGALRM) == handler and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert limits.rendered("the template", rendering(template, n=3)) == "3"


def test_a_pause_is_no_computing():
    def paused() -> str:
        time.sleep(0.5)
        return "done"

    assert limits.rendered("the template", paused, seconds=0.1) == "done"


def test_a_text_that_is_too_long_is_refused_in_later_renderings_too():
    with pytest.raises(BadInput, match="writes more than"):
        limits.rendered("the template", lambda: "a" * (limits.LONGEST + 1))


@pytest.mark.parametrize(("template", "said"), RAISES.items(), ids=RAISES)
def test_whatever_a_template_raises_is_one_line(template, said):
    limits.refuse_endless("the template", template, rendering(template))
    with pytest.raises(TemplateError) as error:
        limits.rendered("the template", rendering(template))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_child_of_a_killed_parent_ends(tmp_path):
    """The first rendering is in a child, which dies with its parent."""
    reads, writes = os.pipe()
    parent = os.fork()
    if not parent:
        os.close(reads)

        def render() -> str:
            os.write(writes, f"{os.getpid()}\n".encode())
            return rendering(LOOPS)()

        limits.refuse_endless("the template", "killed", render)
    os.close(writes)
    child = int(os.fdopen(reads).readline())
    ended = os.pidfd_open(child)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    import select

    assert select.select([ended], [], [], 60)[0]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return str(save(tmp_path_factory.mktemp("policy")))


def format_with(user="{{ prompt }}", chat_template=None):
    return Format(
        prompt="p",
        prompt_digest="",
        system_prompt="",
        user_template=user,
        response_prefix="",
        chat_template=chat_template,
    )


@pytest.mark.parametrize("template", ["{{ 1 // 0 }}", "{% include 'x' %}", "{{ range(10**9) }}", "{{ messages / 0 }}"])
def test_whatever_a_chat_template_raises_is_one_line(template, policy):
    tokenizer = models.load_tokenizer(policy, format_with(chat_template=template))
    with pytest.raises(BadInput, match="the chat template refuses a conversation of user") as refused:
        chat.render(tokenizer, [{"role": "user", "content": "?"}])
    assert "\n" not in str(refused.value)


def test_a_chat_template_that_does_not_fit_into_memory_is_refused_when_it_is_loaded(policy):
    with pytest.raises(BadInput, match="the chat template needs more than 1024 MiB"):
        models.load_tokenizer(policy, format_with(chat_template="{{ 'a' * 10**10 }}" + CHATML))


@pytest.mark.parametrize("dice", ["{{ [1, 2] | random }}", "{{ [[1]] | map('random') | list }}", "{{ lipsum() }}"])
def test_a_chat_template_that_rolls_dice_is_refused(dice, policy):
    with pytest.raises(BadInput, match=r"the chat template, line 1: (random|lipsum) is refused"):
        models.load_tokenizer(policy, format_with(chat_template=dice + CHATML))


@pytest.mark.parametrize("value", ["range", "[joiner()]", "'' ~ messages[0].keys", "cycler(1)"])
def test_a_chat_template_that_writes_an_address_is_refused(value, policy):
    with pytest.raises(BadInput, match="writes the address of an object"):
        models.load_tokenizer(policy, format_with(chat_template=f"{{{{ {value} }}}}" + CHATML))


@pytest.mark.parametrize(("template", "said"), RAISES.items(), ids=RAISES)
def test_whatever_a_user_template_raises_is_one_line(template, said):
    with pytest.raises(BadInput) as refused:
        prefix.messages(format_with(template), {"prompt": "?"})
    assert said in str(refused.value) and "a row has prompt" in str(refused.value)

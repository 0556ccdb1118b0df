"""A template that somebody else wrote ends within its limits, whatever it does, and whatever it raises is one line."""

from __future__ import annotations

import os
import resource
import signal
import time

import pytest
from jinja2 import TemplateError

from prompts import templates
from stages.errors import BadInput
from stages.job import Format
from stages.policy import models
from stages.runtime.process import die_with_parent, forked
from stages.tokens import chat, limits, prefix, sandbox
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


def test_one_call_that_does_not_end_on_a_later_row_ends_the_process():
    """Python's own timer is heard between two calls only."""
    nested = "[[[[{}] * 999] * 999] * 999] * 999"
    template = f"{{{{ {nested.format('a')} == {nested.format('b')} }}}}"
    assert limits.rendered("the template", rendering(template, a=1, b=2)) == "False"
    parent = os.getpid()

    def life() -> int:
        die_with_parent(parent)
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))  # so that the test ends, too
        limits.rendered("the template", rendering(template, a=int("9" * 20), b=int("9" * 20)), seconds=0.2)
        return 0

    _, status = os.waitpid(forked(life), 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGPROF


def test_the_kernels_timer_is_off_after_a_rendering_and_never_on_for_another_handler():
    def left() -> str:
        return str(signal.getitimer(signal.ITIMER_PROF)[0] > 0)

    assert limits.rendered("the template", left) == "True"
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
    before = signal.signal(signal.SIGPROF, lambda *_: None)
    try:
        assert limits.rendered("the template", left) == "False"
    finally:
        signal.signal(signal.SIGPROF, before)


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


DICE = ["[1, 2] | random", "[[1]] | map('random') | list", "lipsum()", "[[1]] | map(n) | list"]
DICE += ["[[1]] | map('ran' ~ 'dom')", "[[1]] | map(*['random']) | list", "[[[1]]] | map('map', 'random') | list"]


@pytest.mark.parametrize("dice", DICE)
def test_a_chat_template_that_rolls_dice_is_refused(dice, policy):
    with pytest.raises(BadInput, match=r"the chat template, line 1: (random|lipsum|a map whose filter .*) is refused"):
        models.load_tokenizer(policy, format_with(chat_template=f"{{{{ {dice} }}}}" + CHATML))


DAYS = ["strftime_now('%d %b %Y')", "strftime_now('100%% %-d. %B %y, %A %Ex')", "strftime_now(format='%Y-%m-%d')"]
DAYS += ["strftime_now('%F') if strftime_now is defined else ''", "[{'a': 1}] | map(attribute='a') | map('string')"]
TIMES = ["strftime_now('%Y-%m-%d %H:%M')", "strftime_now('%f')", "strftime_now('%%%-S')", "strftime_now('%Ec')"]
TIMES += ["strftime_now('%' ~ 'f')", "strftime_now(*['%d'])", "strftime_now(x)", "[strftime_now][0]('%f')"]


@pytest.mark.parametrize("call", DAYS)
def test_a_chat_template_may_write_the_day(call):
    sandbox.refuse_dice(f"{{{{ {call} }}}}" + CHATML)


@pytest.mark.parametrize("call", TIMES)
def test_a_chat_template_that_writes_the_time_is_refused(call, policy):
    with pytest.raises(BadInput, match=r"line 1: strftime_now with more than a day, .* is refused, because it makes"):
        models.load_tokenizer(policy, format_with(chat_template=f"{{{{ {call} }}}}" + CHATML))


ADDRESSES = ["range", "[joiner()]", "'' ~ messages[0].keys", "cycler(1)", "({}.items) | string | upper"]
ADDRESSES += ["'%s' | format([1] | map('upper'))", "[1] | map('upper') | string | replace('at', '')"]


@pytest.mark.parametrize("value", ADDRESSES)
def test_a_chat_template_that_writes_an_address_is_refused(value, policy):
    with pytest.raises(BadInput, match="writes the address of an object"):
        models.load_tokenizer(policy, format_with(chat_template=f"{{{{ {value} }}}}" + CHATML))


@pytest.mark.parametrize("value", ADDRESSES)
def test_a_user_template_that_writes_an_address_is_refused_in_one_line(value):
    with pytest.raises(BadInput, match="another prompt each time") as refused:
        prefix.messages(format_with(f"{{{{ {value} }}}}"), {"prompt": "?", "messages": [{}]})
    assert "\n" not in str(refused.value)


def test_numbers_of_a_row_or_a_template_are_no_address(policy):
    row = {"prompt": "What is at 0xDEADBEEF01?", "hex": "00c0ffee"}
    [message] = prefix.messages(format_with("{{ prompt }} 0x{{ hex }} {{ prompt | lower }} 0x12345678"), row)
    assert message["content"] == "What is at 0xDEADBEEF01? 0x00c0ffee what is at 0xdeadbeef01? 0x12345678"
    tokenizer = models.load_tokenizer(policy, format_with(chat_template="{{ '0xabcdef012' }}" + CHATML))
    text = chat.render(tokenizer, [message])
    assert message["content"] in text and "0xabcdef012" in text


def test_a_chat_template_that_writes_an_address_on_some_rows_is_refused_there(policy):
    template = "{% if messages[0].content == 'x' %}{{ range }}{% endif %}" + CHATML
    tokenizer = models.load_tokenizer(policy, format_with(chat_template=template))
    with pytest.raises(BadInput, match="the chat template writes the address of an object"):
        chat.render(tokenizer, [{"role": "user", "content": "x"}])


@pytest.mark.parametrize(("template", "said"), RAISES.items(), ids=RAISES)
def test_whatever_a_user_template_raises_is_one_line(template, said):
    with pytest.raises(BadInput) as refused:
        prefix.messages(format_with(template), {"prompt": "?"})
    assert said in str(refused.value) and "a row has prompt" in str(refused.value)

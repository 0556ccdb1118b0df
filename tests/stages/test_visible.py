"""Text that is not ours reaches a terminal or a log with an escape in place of each character that these obey."""

from __future__ import annotations

import subprocess
import sys
import unicodedata

from stages.guard.redaction import redacted
from stages.visible import visible
from tests.conftest import ROOT, environment

ATTACKS = {
    "a title by OSC": "\x1b]0;owned\x07",
    "a cleared screen": "\x1b[2J",
    "a colour by C1": "\x9b31m",
    "a line begun again": "good\rbad",
    "a bell and a backspace": "\x07\x08",
    "a form feed": "\x0c",
    "delete": "\x7f",
    "right to left": "\u202egnp.exe",
    "an isolate": "\u2066x\u2069",
    "marks of direction": "\u200e\u200f\u061c",
    "no width": "a\u200bb\u2060c\ufeff",
    "tags": "\U000e0041",
    "line separators": "\u2028\u2029\x85",
    "half a pair": "\ud800",
}
OBEYED = ("Cc", "Cf", "Cs", "Zl", "Zp", "Cn", "Co")


def test_each_attack_becomes_an_escape_that_says_what_it_was():
    for text in ATTACKS.values():
        shown = visible(text)
        assert not [char for char in shown if unicodedata.category(char) in OBEYED], ascii(shown)
        assert shown.encode("ascii", "backslashreplace").decode("unicode_escape").isprintable() is False


def test_words_of_every_script_stay():
    for text in ("", "über", "漢字", "🤔", "a\tb\nc", "a\u00a0b\u3000c", "e\u0301", "नमस्ते", "עברית"):
        assert visible(text) == text


def test_every_character_is_shown_or_escaped():
    text = "".join(map(chr, range(0x110000)))
    shown = visible(text, keep="")
    assert {unicodedata.category(char) for char in shown}.isdisjoint(OBEYED)
    assert visible(shown) == shown


def test_what_user_code_says_is_visible():
    assert redacted("it said \x1b[2J", {}) == "it said \\x1b[2J"


def test_the_streams_of_a_job_hold_no_control_character():
    code = (
        "import sys\nfrom stages.runtime import logs\nlogs.make_visible()\n"
        "print('out\\x1b[2J\\r50 %\\r', flush=True)\nprint('err\\u202e', file=sys.stderr)\n"
        "raise ValueError('\\x1b]0;x\\x07')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment(), cwd=ROOT)
    assert done.stdout == b"out\\x1b[2J\n50 %\n\n"
    assert b"err\\u202e" in done.stderr and b"ValueError: \\x1b]0;x\\x07" in done.stderr and b"\x1b" not in done.stderr

"""A command that starts from nothing, as users start it, says what one says that was forked with its imports done, as
most tests have it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from tests.conftest import PRELOADED, ROOT, environment, run_alone, run_cli

QUESTIONS = (
    ["--help"],
    ["schema"],
    ["plan", "RECIPE", "--json"],
    ["check", "RECIPE"],
    ["inspect", "RECIPE", "--stage", "warmup", "--json"],
    ["probe", "RECIPE", "--rows", "2", "--json"],
    ["audit", "RECIPE", "--json"],
    ["score", "arithmetic", "--rows", "ROWS", "--completions", "COMPLETIONS", "--json"],
    ["runs", "--json"],
    ["show", "--json"],
    ["ls", "--json"],
    ["verify"],
    ["lineage", "rl2"],
    ["diff", "rl1", "nothing"],
    ["export", "nothing", "OUT"],
    ["push", "nothing", "org/name"],
    ["promote", "nothing", "prod"],
    ["alias", "list"],
    ["pins"],
    ["gc"],
)


@pytest.mark.parametrize("arguments", QUESTIONS, ids=lambda arguments: arguments[0])
def test_it_makes_no_difference_who_did_the_imports(arguments, climbed, tmp_path):
    recipe, registry = climbed
    (tmp_path / "rows.jsonl").write_text(json.dumps({"a": 2, "operation": "*", "b": 3}))
    (tmp_path / "completions.jsonl").write_text(json.dumps({"row": 0, "completion": "6"}) + "\n")
    stands_for = {
        "RECIPE": recipe,
        "ROWS": tmp_path / "rows.jsonl",
        "COMPLETIONS": tmp_path / "completions.jsonl",
        "OUT": tmp_path / "out",
    }
    command = [stands_for.get(word, word) for word in arguments]
    if arguments[0] not in ("--help", "schema", "score"):
        command += ["--registry", registry]
    alone, forked = (ask(*command) for ask in (run_alone, run_cli))
    assert (alone.returncode, alone.stdout, alone.stderr) == (forked.returncode, forked.stdout, forked.stderr)


def test_what_a_library_reads_while_it_is_imported_makes_a_process_of_its_own():
    assert PRELOADED.too_late_for(environment(SWITCHBACK_REGISTRY="r", AWS_ENDPOINT_URL="http://x")) == set()
    assert not PRELOADED.can(environment(HF_ENDPOINT="http://x")) and not PRELOADED.can(
        environment(OMP_NUM_THREADS="7")
    )


def test_a_suite_that_was_started_where_ctrl_c_is_ignored_hears_it():
    """As the background job of a shell is; what the tests start inherits it."""
    code = "import signal, tests.conftest; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    assert done.stdout == "True\n", done.stderr

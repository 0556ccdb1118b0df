"""The command line. One file per noun; each parses, calls, prints, exits. No other folder imports it.

Exit codes: 0 done, 1 a stage failed, 2 bad input, 3 stopped by an audit or a comparison, 130/143 signals. What went
wrong is one line on stderr, never a traceback."""

from __future__ import annotations

import errno
import gc as garbage
import os
import sys
import traceback
from collections.abc import Iterable
from importlib import import_module
from typing import Annotated

import typer

from pipeline.cli.show.terminal import write, write_error
from pipeline.errors import Failed, Refused, RunInterrupted, Terminated
from pipeline.version import version
from stages.errors import BadInput
from stages.visible import visible

DEBUG = "SWITCHBACK_DEBUG"
"""Environment variable that lets an unexpected error show its traceback."""
COLLECT_EVERY = 100_000
"""Objects made between two looks for garbage; Python's 700 make it a third of the time of reading thousands of
manifests."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a write is refused with where there is no space."""
BARRED = (errno.EACCES, errno.EPERM, errno.EROFS)
"""What is refused to this user, or to everybody."""

FOLDER = "pipeline.cli.commands"
COMMANDS = {
    **{name: f"recipe.{name}" for name in ("init", "check", "plan")},
    "schema": "recipe.plan",
    **{name: f"recipe.{name}" for name in ("rows", "inspect", "probe", "audit", "score")},
    **{"run": "run.run", "resume": "run.run", "runs": "run.runs", "show": "run.runs"},
    **{"ls": "registry.artifacts", "verify": "registry.artifacts"},
    **{"lineage": "registry.lineage", "diff": "registry.diff", "export": "registry.export", "push": "registry.export"},
    **dict.fromkeys(("promote", "pin", "unpin", "pins"), "registry.aliases"),
    "gc": "registry.gc",
    "alias": "registry.aliases",
}
"""Command -> the module in FOLDER that has a function of its name, in the order of `--help`. A command line imports the
module of its own command only, so that `ls` does not wait for what `run` needs."""


def app(names: Iterable[str] = tuple(COMMANDS)) -> typer.Typer:
    """The command line with these commands."""
    made = typer.Typer(
        help="SFT, reinforcement learning, rejection sampling and reinforcement learning again, as one recipe.",
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    made.callback()(_before_every_command)
    for name in names:
        command = getattr(import_module(f"{FOLDER}.{COMMANDS[name]}"), name)
        if isinstance(command, typer.Typer):
            made.add_typer(command, name=name)
        else:
            made.command()(command)
    return made


def _named(arguments: list[str]) -> list[str]:
    """The command of a command line; all commands where it names none of them, for the help and for a suggestion."""
    first = next((word for word in arguments if not word.startswith("-")), None)
    return [first] if first in COMMANDS else list(COMMANDS)


def _show_version(wanted: bool) -> None:
    if wanted:
        write(version())
        raise typer.Exit


def _before_every_command(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Options of `switchback` itself."""


def main() -> None:
    """The `switchback` command. A letter that the terminal's encoding does not have is shown as its escape."""
    if sys.stdout is None:  # as some daemons start a program
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    garbage.set_threshold(COLLECT_EVERY, 50, 1_000)
    sys.exit(exit_code(sys.argv[1:]))


CODES: tuple[tuple[type[BaseException], int], ...] = (
    (BadInput, 2),
    (Failed, 1),
    (Refused, 3),
    (RunInterrupted, 130),
)
"""Exceptions whose line says all that a user needs -> exit code."""


def exit_code(arguments: list[str]) -> int:  # noqa: PLR0911 - one for each way to end
    """Run a command line. Every error becomes one line and a code."""
    try:
        code = app(_named(arguments))(arguments or ["--help"], prog_name="switchback", standalone_mode=False)
    except tuple(kind for kind, _ in CODES) as error:
        return complain(str(error), next(code for kind, code in CODES if isinstance(error, kind)))
    except typer.TyperException as error:
        return complain(error.format_message(), 2)  # its str lacks the dashes of an option
    except Terminated:
        return complain("terminated; run the same command to continue from what is done", 143)
    except (KeyboardInterrupt, typer.Abort):
        return complain("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes
        return 0
    except Exception as error:
        if os.environ.get(DEBUG):
            print(visible(traceback.format_exc()), file=sys.stderr)
        return _unexpected(error)
    return code if isinstance(code, int) else 0


def _unexpected(error: Exception) -> int:
    """The line of an exception that is not ours; a full or protected disk is the likeliest."""
    if isinstance(error, OSError) and error.errno in FULL:
        return complain(
            f"the disk is full ({error.strerror}); free some space (switchback gc) and run the same command again", 1
        )
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return complain(f"{str(error.filename)[:60]}...: {error.strerror}. Fix: give a shorter path", 2)
    if isinstance(error, OSError) and error.errno in BARRED:
        return complain(
            f"{error.filename}: {error.strerror}; give a place that can be written, or change its permissions", 2
        )
    return complain(f"{type(error).__name__}: {error} (this should not happen; {DEBUG}=1 shows the traceback)", 1)


def complain(message: str, code: int) -> int:
    """One line on stderr."""
    write_error(f"switchback: {message}")
    return code

"""The directory of one step's work, as the launcher, the worker and garbage collection know it.

<work root>/<first 12 digits of the key>/
job.json    what to do                      result.json  what was made, written last
error.json  what went wrong                 said.jsonl   what the stage has to say while it runs
lock        held by the job and its children   run.lock  held by the run that makes the step
out/        what will be published          logs/        one log an attempt
meeting/    where the processes of a job meet
attempts.json  how long earlier attempts took
checkpoint-<step>/, set-aside/, chunks/     what a stage resumes from (`checkpoints`, `chunks`)
files/      copies of the user's small files, as they were planned; the stage reads these
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

RESULT, ERROR = "result.json", "error.json"
LOCK = "lock"
"""Held by a job and all its children, from its start to its end."""
RUN_LOCK = "run.lock"
"""Held by the run that makes a step, from its look into the registry to its publication."""
ATTEMPTS = "attempts.json"
"""{"seconds", "started"}: how long the attempts before this one took, and when this one began (seconds since 1970)."""
WORDS = "said.jsonl"
"""JSON lines {"text"}: what a stage has to say about itself while it runs."""
MEETING = "meeting"
"""Directory through which the processes of a job meet."""
BUSY = 75
"""Exit code of a job that found another one in its directory. It touched nothing there."""
PATIENCE = 10.0
"""Seconds to wait for a directory that another job holds: a job whose launcher was killed needs a moment to end."""
KEY_DIGITS = 12
"""How much of a step's key names its directory."""


def directory_name(key: str) -> str:
    """The name of the directory of a step with this key."""
    return key[:KEY_DIGITS]


FILES = "files"
"""Directory of the copies."""
Copies = Mapping[str, str]
"""Absolute path of a user's file -> that of the copy which is read in its place."""
NO_COPIES: Copies = MappingProxyType({})
"""Every file is read where it lies, as an inspection does."""


def place(path: Path, copies: Copies) -> Path:
    """Where a user's file is read: its copy, or the file itself where it has none."""
    return Path(copies.get(str(path.absolute()), path.absolute()))

"""Digests of large files outside the registry, remembered from one plan to the next.

    path -> {state of the file: size, times, inode, device; sha256}

A digest counts only for a file whose state is the one that was hashed. `ctime` is part of it, and no program can set
it back, so a file that was changed in place is noticed even when its size and its mtime are what they were. What
cannot be read, or was written by somebody else, is as if it were not there: then the file is hashed. Nothing inside a
registry is looked up here, and `verify` always hashes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import time
from pathlib import Path
from typing import Any

from pipeline.registry.stores.download_cache import cache_directory
from stages.runtime import locks
from stages.runtime.disk import digest_file

FILE = "digests.json"
SMALLEST = 64 * 2**20
"""Bytes; a smaller file is hashed faster than it is worth remembering."""
SETTLED = 2 * 10**9
"""Nanoseconds that a file must have been left alone; a change within one tick of the clock of its file system would
not show in its times."""
ENTRIES = 1000
"""Files that are remembered; the oldest are forgotten."""
BYTES = 2**20
"""A longer file of digests was not written here."""

State = list[int]
Entries = dict[str, dict[str, Any]]


def digest_once(path: Path) -> str:
    """SHA-256 of a file's bytes; those of a large file that has not changed since are not read again."""
    path = path.absolute()
    before = path.stat()
    if before.st_size < SMALLEST:
        return digest_file(path)
    if known := _known(_read(), str(path), _state(before)):
        return known
    settled = time.time_ns() - max(before.st_mtime_ns, before.st_ctime_ns) >= SETTLED
    digest = digest_file(path)
    if settled and _state(path.stat()) == _state(before):
        with contextlib.suppress(OSError):  # a cache that cannot be written is one that is off
            _remember(str(path), _state(before), digest)
    return digest


def _state(seen: os.stat_result) -> State:
    return [seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino, seen.st_dev]


def _known(entries: Entries, path: str, state: State) -> str | None:
    entry = entries.get(path)
    if not isinstance(entry, dict) or entry.get("state") != state:
        return None
    digest = entry.get("sha256")
    if isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest):
        return digest
    return None


def _read() -> Entries:
    """What is remembered; nothing where the file is not ours alone, too long, or no JSON object."""
    try:
        with os.fdopen(os.open(cache_directory() / FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            content = json.loads(file.read(BYTES)) if _is_ours(os.fstat(file.fileno())) else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_ours(seen: os.stat_result) -> bool:
    others_write = seen.st_uid != os.getuid() or seen.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISREG(seen.st_mode) and not others_write and seen.st_size <= BYTES


def _remember(path: str, state: State, digest: str) -> None:
    """Add one entry to what is there now; processes take turns, and a reader sees the file before or after."""
    directory = cache_directory()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (directory / f".{FILE}.lock").open("a", encoding="utf-8") as lock:
        locks.lock(lock)
        entries = {name: entry for name, entry in _read().items() if name != path}
        entries[path] = {"state": state, "sha256": digest}
        newest = dict(list(entries.items())[-ENTRIES:])
        partial = directory / f".{FILE}.partial"
        partial.write_text(json.dumps(newest), encoding="utf-8")
        partial.chmod(0o600)
        partial.replace(directory / FILE)

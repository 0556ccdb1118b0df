"""Resume checkpoints, copied out while a stage runs, for machines that get lost. Off unless the recipe says `work:
{mirror: PLACE}`.

    resume/<first 12 digits of the key>/<n>-<step>-<digest>/    a complete checkpoint; n counts the copies,
                                                                  so the newest copy is the last by name

Only whole checkpoints are copied (`stages.runtime.checkpoints`), under names that say what is in them, their record
last: what another machine finds is whole, or is not there. The newest copy counts, whatever its step: a stage that had
to start again is not taken back to what it left."""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

from pydantic import ValidationError

from pipeline.errors import Damaged
from pipeline.registry.stores.open import open_store
from pipeline.registry.stores.store import Store
from stages.errors import BadInput
from stages.runtime import signals
from stages.runtime.checkpoints import COMPLETE, Record, directory, whole
from stages.runtime.disk import sync, sync_tree

KEPT = 2
"""Copies of a stage's checkpoints that stay out there."""
CLONE, RETURNING = ".mirrored-", ".returning-"
"""What lies in a work directory while something is copied out or back."""
LAST_REQUEST = 5.0
"""Seconds that a copy may still take once it has to end."""

Warn = Callable[[str], None]
"""Hears one line."""


class Copy(NamedTuple):
    """One checkpoint out there."""

    name: str
    number: int
    step: int
    digest: str
    """First digits of the SHA-256 of its record."""


class Mirror:
    """Copies a stage's newest checkpoint out, one at a time, in a thread of its own; from the start of the stage to
    `close`."""

    def __init__(self, store: Store, key12: str, work: Path, warn: Warn) -> None:
        """`warn` hears the first thing that went wrong; nothing that goes wrong with a copy ends a run."""
        self._store, self._key12, self._work, self._warn = store, key12, work, warn
        self._stop, self._wrong, self._warned = Event(), "", False
        self._seen: tuple[Path, int] | None = None
        self._thread: Thread | None = None

    def look(self) -> None:
        """Begin to copy the newest whole checkpoint, when it has not been and nothing else is being copied. Costs a
        look into one directory."""
        self._say()
        if self._thread and self._thread.is_alive():
            return
        complete = whole(self._work)
        seal = _seal(complete[-1]) if complete else None
        if seal not in (None, self._seen):
            self._seen = seal
            self._thread = Thread(target=self._copy, args=complete[-1:], name="mirror", daemon=True)
            self._thread.start()

    def close(self, seconds: float) -> None:
        """Let a copy under way come to its end, and what has been saved since be copied as well, but for no longer
        than this; 0 = at once."""
        ends = time.monotonic() + seconds
        try:
            self._wait(ends)
            if time.monotonic() < ends:
                self.look()
                self._wait(ends)
        finally:
            self._stop.set()
            self._wait(time.monotonic() + LAST_REQUEST)
        self._say()

    def _wait(self, until: float) -> None:
        if self._thread:
            self._thread.join(max(0.0, until - time.monotonic()))

    def _copy(self, checkpoint: Path) -> None:
        try:
            with _cloned(checkpoint) as clone:
                copy_out(self._store, self._key12, clone, self._stop.is_set)
            _prune(self._store, self._key12)
        except FileNotFoundError:
            return  # the stage has removed it, since it has a newer one
        except (BadInput, OSError) as error:
            self._wrong = "" if self._stop.is_set() else str(error)

    def _say(self) -> None:
        """Once, and from the thread that looks."""
        if self._wrong and not self._warned:
            self._warned = True
            self._warn(
                f"checkpoints are not mirrored: {self._wrong}; the stage goes on, and the next one is tried again"
            )


def open_mirror(place: str | None) -> Store | None:
    """A place for copies; None for none. Raises BadInput for one that cannot be written, so that it is known before
    anything runs."""
    if place is None:
        return None
    store = open_store(place)
    store.probe()
    return store


@contextmanager
def mirrored(store: Store | None, key12: str, work: Path, patience: float, say: Warn) -> Iterator[Callable[[], None]]:
    """Around a stage: brings its newest checkpoint back where it has none, and yields what is to be called again and
    again while it runs. A stage that does not end well gets `patience` seconds to copy what it saved last. None: no
    mirror."""
    if store is None:
        yield lambda: None
        return
    if name := bring_back(store, key12, work, say):
        say(f"brought {name} back from {store.url}")
    mirror = Mirror(store, key12, work, say)
    try:
        yield mirror.look
    except BaseException:
        with signals.heard():  # SIGTERM again is the same wish
            mirror.close(patience)
        raise
    mirror.close(0)


def copy_out(store: Store, key12: str, checkpoint: Path, stopped: Callable[[], bool]) -> None:
    """Copy a whole checkpoint to the mirror, unless it is there."""
    content = (checkpoint / COMPLETE).read_bytes()
    step, digest = Record.model_validate_json(content).step, sha256(content).hexdigest()[:12]
    there = copies(store, key12)
    if digest not in {copy.digest for copy in there if _record(store, copy)}:
        number = max((copy.number for copy in there), default=0) + 1
        store.copy_in(checkpoint, f"resume/{key12}/{number:06d}-{step}-{digest}", COMPLETE, stopped)


def bring_back(store: Store, key12: str, work: Path, warn: Warn) -> str | None:
    """Put the newest checkpoint of the mirror into a work directory that has none, or only older ones; returns its
    name. None when there is nothing to bring.

    A damaged copy is named to `warn`, and the one before it is taken. Raises BadInput when the mirror does not answer.
    """
    _sweep(work)
    for copy in reversed(_ahead(copies(store, key12), work)):
        if record := _record(store, copy):
            try:
                return _bring(store, copy, record, work).name
            except Damaged as error:
                warn(f"a mirrored checkpoint cannot be used: {error}")
    return None


def _ahead(there: list[Copy], work: Path) -> list[Copy]:
    """The copies that are newer than what a work directory has: another machine may have gone on from it. A checkpoint
    that was never copied, or whose copy has been pruned since, is compared by its step."""
    here = whole(work)
    if not here:
        return there
    content = (here[-1] / COMPLETE).read_bytes()
    digest, step = sha256(content).hexdigest()[:12], Record.model_validate_json(content).step
    known = [copy.number for copy in there if copy.digest == digest]
    if known:
        return [copy for copy in there if copy.number > max(known)]
    if there and there[-1].step > step:
        return there
    return []


def forget(store: Store | None, key12: str, warn: Warn) -> None:
    """Remove a stage's copies, once it has been published; where that fails they stay, which `warn` hears. None: no
    mirror."""
    try:
        if store is not None:
            names = [copy.name for copy in copies(store, key12)]
            for name in (*names, *store.abandoned(f"resume/{key12}", COMPLETE)):
                store.remove_tree(name, COMPLETE)
    except (BadInput, OSError) as error:
        warn(f"its mirrored checkpoints could not be removed: {error}")


def copies(store: Store, key12: str) -> list[Copy]:
    """What a mirror has of a stage, oldest first; those included that were never finished."""
    found = [_copy_of(f"resume/{key12}/{name}") for name in store.names(f"resume/{key12}")]
    return [copy for copy in found if copy is not None]


def _copy_of(name: str) -> Copy | None:
    found = re.fullmatch(r".*/(\d{6,18})-(\d{1,18})-([0-9a-f]{12})", name)
    return Copy(name, int(found[1]), int(found[2]), found[3]) if found else None


def _record(store: Store, copy: Copy) -> Record | None:
    """What makes a copy whole; None when it is not."""
    content = store.read(f"{copy.name}/{COMPLETE}")
    if content is None or sha256(content).hexdigest()[:12] != copy.digest:
        return None
    try:
        return Record.model_validate_json(content)
    except ValidationError:
        return None


def _prune(store: Store, key12: str) -> None:
    """Remove whole copies but the newest. What was never finished may be another machine's that is at it."""
    finished = [copy for copy in copies(store, key12) if _record(store, copy)]
    for copy in finished[:-KEPT]:
        store.remove_tree(copy.name, COMPLETE)


def _bring(store: Store, copy: Copy, record: Record, work: Path) -> Path:
    """Fetch a copy and rename it into place. A torn checkpoint of the same step gives way: this is it, whole."""
    partial, checkpoint = work / f"{RETURNING}{uuid.uuid4().hex}", directory(work, record.step)
    try:
        partial.mkdir(parents=True)
        store.copy_out(copy.name, record.files, COMPLETE, partial)
        sync_tree(partial)
        shutil.rmtree(checkpoint, ignore_errors=True)
        partial.rename(checkpoint)
        sync(work)
    except OSError as error:
        raise BadInput(
            f"work: {work} cannot be written: {error.strerror}; make room, or move SWITCHBACK_WORK"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return checkpoint


@contextmanager
def _cloned(checkpoint: Path) -> Iterator[Path]:
    """The same files under another name, as links, so that the stage may remove the checkpoint while it is copied.
    Raises FileNotFoundError when it already has."""
    clone = checkpoint.with_name(f"{CLONE}{checkpoint.name}")
    try:
        shutil.copytree(checkpoint, clone, copy_function=os.link)
        yield clone
    except shutil.Error as error:
        raise FileNotFoundError(checkpoint) if not checkpoint.exists() else OSError(str(error)) from None
    finally:
        shutil.rmtree(clone, ignore_errors=True)


def _seal(checkpoint: Path) -> tuple[Path, int] | None:
    """What tells a checkpoint from a later one of the same step; None when it has just been removed."""
    try:
        return checkpoint, (checkpoint / COMPLETE).stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _sweep(work: Path) -> None:
    """Remove what a killed process left."""
    for left in (*work.glob(f"{CLONE}*"), *work.glob(f"{RETURNING}*")):
        shutil.rmtree(left, ignore_errors=True)

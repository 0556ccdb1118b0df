"""What a registry writes takes the group of its root and the root's permissions for that group, as in git's
core.sharedRepository: the others of a team can read it, and move on what they may write.

root 2775, umask 022 or 077 -> directories 2775, files 664. A root that gives its group nothing changes nothing. The
permissions of the owner and of all others stay those of the umask.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

FOR_FILES = stat.S_IRGRP | stat.S_IWGRP
"""Permissions that a file may take; a directory takes all of the group's, and the bit that hands the group on."""


def make_directory(directory: Path, root: Path) -> None:
    """Make a directory at or below `root`, with those above it."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in missing:
        if path != root and path.is_relative_to(root):
            share(path, root)


def share_tree(directory: Path, root: Path) -> None:
    """`share` of a directory and of all below it."""
    for path in (directory, *directory.rglob("*")):
        with suppress(FileNotFoundError):  # a process that ends removes what it no longer needs
            share(path, root)


def share(path: Path, root: Path) -> None:
    """Give a file or a directory of this user the group and the group's permissions of `root`. What another user made
    is left alone, and so is a link."""
    of_root, status = root.stat(), path.lstat()
    is_directory = stat.S_ISDIR(status.st_mode)
    if status.st_uid != os.geteuid() or not (is_directory or stat.S_ISREG(status.st_mode)):
        return
    if of_root.st_mode & stat.S_IWGRP and status.st_gid != of_root.st_gid:
        with suppress(PermissionError):  # this user is not of that group
            os.chown(path, -1, of_root.st_gid)
    shared = of_root.st_mode & (stat.S_IRWXG | stat.S_ISGID if is_directory else FOR_FILES)
    if shared & ~status.st_mode:
        path.chmod(stat.S_IMODE(path.lstat().st_mode) | shared)

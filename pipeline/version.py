"""The version of switchback that runs, read where it was installed."""

from __future__ import annotations

DISTRIBUTION = "switchback-rl"
"""Its name for pip; `switchback` on the package index is a stranger's."""


def version() -> str:
    """Such as 0.1.0."""
    from importlib import metadata

    return metadata.version(DISTRIBUTION)

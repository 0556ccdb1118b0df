"""The local modules of a user's file: every .py file below its folder that it imports, and those that these import.

source of the file -> names that its import statements say -> files below its folder. Source is read and never run,
so a plan can ask. An import that no statement spells out is not found here: it is refused when it happens
(`stages.problems.custom.user_modules`)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

BY_CALL = ("import_module", "__import__")
"""Functions that import the module which their first argument names."""


def local_modules(file: Path) -> dict[str, Path]:
    """Dotted name -> file, sorted by name; the file itself is not among them."""
    found: dict[str, Path] = {}
    waiting = [(file, "")]
    while waiting:
        source, package = waiting.pop()
        for name in _imported(source, package):
            for module, path in _files(file.parent, name):
                if module not in found and path != file:
                    found[module] = path
                    waiting.append((path, module if path.name == "__init__.py" else module.rpartition(".")[0]))
    return dict(sorted(found.items()))


def _imported(source: Path, package: str) -> Iterator[str]:
    """Absolute names that a source imports; `package` is the one that it belongs to. None for what is no Python: its
    import says so."""
    try:
        tree = ast.parse(source.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            yield from _called(node)


def _absolute(node: ast.ImportFrom, package: str) -> str:
    """The name after `from`; each dot but the first goes one package up."""
    if not node.level:
        return node.module or ""
    parents = package.split(".")
    kept = parents[: len(parents) - node.level + 1]
    return ".".join(part for part in (*kept, node.module) if part)


def _called(node: ast.Call) -> Iterator[str]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name in BY_CALL and node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
        yield node.args[0].value


def _files(folder: Path, name: str) -> Iterator[tuple[str, Path]]:
    """(module, file) for the module of a name and the packages around it, as Python looks for them in a folder."""
    parts = name.split(".")
    for i, part in enumerate(parts, start=1):
        if not part.isidentifier():
            return
        within, module = folder.joinpath(*parts[: i - 1]), ".".join(parts[:i])
        if (package := within / part / "__init__.py").is_file():
            yield module, package
        elif (file := within / f"{part}.py").is_file():
            yield module, file
            return
        elif not (within / part).is_dir() or (i == 1 and _is_installed(part)):
            return


def _is_installed(name: str) -> bool:
    """Whether Python finds a package or module of that name, which comes before a folder without an __init__.py."""
    spec = PathFinder.find_spec(name)
    return spec is not None and spec.origin is not None

"""How a user's file is imported in the worker: from the copy that was digested, under the name that the user knows.

A copy of the file and of its local modules -> modules whose `__file__`, and whose lines in tracebacks, are the user's.
The invariant: a module that is neither installed, nor one of these, nor below `problem.files` refuses the call in which
it is imported, because its bytes are in no key."""

from __future__ import annotations

import importlib.util
import site
import sys
import sysconfig
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder, SourceLoader
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from stages.errors import CodeRefused
from stages.problems.custom.local_modules import local_modules

OURS = tuple(str(Path(__file__).parents[3] / half) for half in ("pipeline", "stages", "prompts"))
MAIN = ("__main__", "__mp_main__")


class FromCopy(SourceLoader):
    """Loads one module. No bytecode is read or written: a cached one might be of other source."""

    def __init__(self, path: str, copy: str) -> None:
        self.path, self.copy = path, copy

    def get_filename(self, fullname: str) -> str:
        """The user's path."""
        return self.path

    def get_data(self, path: str) -> bytes:
        """The copy's bytes for the module's own path; any other file as it is."""
        return Path(self.copy if path == self.path else path).read_bytes()


class UserModules(MetaPathFinder):
    """The local modules of user files, and the modules that may be imported besides."""

    def __init__(self, files: Sequence[str] = ()) -> None:
        """`files` is problem.files: files and folders whose bytes are in the key."""
        self._modules: dict[str, tuple[str, str]] = {}
        self._files, self._known = files, (*_installed(), *OURS, *files)
        self._seen = set(sys.modules)

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        """Where Python asks for a module. None for one that is neither local nor below problem.files."""
        if fullname in self._modules:
            shown, copy = self._modules[fullname]
            return _spec(fullname, shown, FromCopy(shown, copy))
        found = PathFinder.find_spec(fullname, path) if self._files else None
        if found and found.origin and found.origin.endswith(".py") and _below(found.origin, self._files):
            return _spec(fullname, found.origin, FromCopy(found.origin, found.origin))
        return None

    def add(self, path: str, copy: str) -> ModuleType:
        """The module of a user's file, not executed yet; its local modules are found from now on."""
        folder, copies = Path(path).parent, Path(copy).parent
        for name, module in local_modules(Path(copy)).items():
            shown = str(folder / module.relative_to(copies))
            known, _ = self._modules.setdefault(name, (shown, str(module)))
            if known != shown:
                raise CodeRefused(
                    f"{Path(path).name}: it imports {name} of its own folder, but another file has one of that name "
                    f"(found {known}, expected {shown}). Fix: rename one"
                )
        self._modules.setdefault(Path(path).stem, (path, copy))
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        sys.path.insert(0, str(folder))
        spec = _spec(Path(path).stem, path, FromCopy(path, copy))
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        return module

    def refuse_unknown(self, name: str) -> None:
        """Raise CodeRefused for a module whose bytes are in no key; `name` is the user's file."""
        if len(sys.modules) == len(self._seen):
            return
        local = {shown for shown, _ in self._modules.values()}
        for module in set(sys.modules) - self._seen - set(MAIN):
            file = getattr(sys.modules[module], "__file__", None)
            if file and file not in local and not _below(file, self._known):
                raise CodeRefused(
                    f"{name}: it imported {module}, whose bytes are in no key (found {file}, expected an installed "
                    "package, or a file that an import statement names in its folder). Fix: import it by name, or "
                    "add it to problem.files"
                )
        self._seen = set(sys.modules)

    def watched(self, name: str, call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """A call of user code that is refused where it imported such a module."""

        def watched(payload: Any) -> Any:
            value = call(payload)
            self.refuse_unknown(name)
            return value

        return watched


def _spec(name: str, shown: str, loader: Loader) -> ModuleSpec:
    folder = [str(Path(shown).parent)] if Path(shown).name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, shown, loader=loader, submodule_search_locations=folder)
    assert spec is not None, "a loader was given"
    return spec


def _installed() -> list[str]:
    """Folders of the standard library and of installed packages; versions of these are in the provenance."""
    paths = sysconfig.get_paths()
    user = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    return [*(paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")), *site.getsitepackages(), *user]


def _below(file: str, places: Sequence[str]) -> bool:
    """Whether a file is one of these, or lies in a folder that is."""
    paths = {Path(file).absolute(), Path(file).resolve()}
    roots = {root for place in places for root in (Path(place).absolute(), Path(place).resolve())}
    return any(path.is_relative_to(root) for path in paths for root in roots)

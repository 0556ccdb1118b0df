"""Modules of a user's own: which are found by reading, and which are imported all the same."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stages.errors import BadInput
from stages.problems import catalog
from stages.problems.base import Answer
from stages.problems.custom.local_modules import local_modules

PROBLEM = """
{imports}
REWARDS = {{"a": 1.0}}
def rows(rng):
    while True:
        yield {{"prompt": str(rng.random())}}
def rewards(row, completion):
    return {{"a": score(row, completion)}}
def score(row, completion):
    {body}
"""


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "mine.py"


def problem(folder: Path, imports: str = "", body: str = "return 1.0", **files: str) -> Path:
    return write(folder, {"mine.py": PROBLEM.format(imports=imports, body=body), **files})


def names(file: Path) -> list[str]:
    return list(local_modules(file))


@pytest.mark.parametrize(
    ("imports", "files", "found"),
    [
        ("import json, helpers", {"helpers.py": ""}, ["helpers"]),
        ("def late():\n    import helpers", {"helpers.py": ""}, ["helpers"]),
        ("from helpers import x", {"helpers.py": "import more", "more.py": "import mine"}, ["helpers", "more"]),
        ("import pkg.a.b", {"pkg/__init__.py": "", "pkg/a/__init__.py": "", "pkg/a/b.py": "", "pkg/c.py": ""},
         ["pkg", "pkg.a", "pkg.a.b"]),
        ("from pkg import a", {"pkg/__init__.py": "from . import c", "pkg/a.py": "from .c import d", "pkg/c.py": ""},
         ["pkg", "pkg.a", "pkg.c"]),
        ("import pkg.a.b", {"pkg/__init__.py": "", "pkg/a/__init__.py": "", "pkg/a/b.py": "from ..c import d",
                            "pkg/c.py": ""}, ["pkg", "pkg.a", "pkg.a.b", "pkg.c"]),
        ("import space.a", {"space/a.py": "", "space/b.py": ""}, ["space.a"]),
        ("import importlib\nimportlib.import_module('helpers')", {"helpers.py": ""}, ["helpers"]),
        ("import helpers", {"helpers.py": "def (", "helpers/__init__.py": ""}, ["helpers"]),
        ("import helpers", {"helpers.py": "def ("}, ["helpers"]),
        ("import json", {"other.py": ""}, []),
    ],
)  # fmt: skip
def test_a_local_module_is_found_by_reading(imports, files, found, tmp_path):
    assert names(write(tmp_path, {"mine.py": imports, **files})) == found


def test_a_package_comes_before_a_module_of_its_name(tmp_path):
    file = write(tmp_path, {"mine.py": "import a", "a.py": "", "a/__init__.py": ""})
    assert local_modules(file) == {"a": tmp_path / "a" / "__init__.py"}


def tree(rng: random.Random) -> dict[str, str]:
    """A random tree of packages that import each other in all ways, each import in a `try`."""
    packages = ["", "p", "q", "p.r"]
    modules = [f"{package}.{name}".strip(".") for package in packages for name in "abc"]

    def line(package: str) -> str:
        wanted = rng.choice([*modules, *packages[1:]])
        parent, _, last = wanted.rpartition(".")
        ways = [f"import {wanted}", f"from {parent} import {last}" if parent else f"import {wanted}"]
        if package:
            ways += [f"from . import {rng.choice('abc')}", f"from .{rng.choice('abc')} import nothing"]
        if "." in package:
            ways += [f"from .. import {rng.choice('abc')}", f"from ..{rng.choice('abc')} import nothing"]
        return f"try:\n    {rng.choice(ways)}\nexcept ImportError:\n    pass\n"

    files = {"mine.py": line("") + line("")}
    for package in packages[1:]:
        files[f"{package.replace('.', '/')}/__init__.py"] = line(package) if rng.random() < 0.4 else ""
    for module in modules:
        package = module.rpartition(".")[0]
        files[f"{module.replace('.', '/')}.py"] = "".join(line(package) for _ in range(rng.randrange(3)))
    return files


def test_everything_that_python_imports_is_found(tmp_path):
    """The oracle is Python: it imports 40 random trees, and says which files it read."""
    rng = random.Random(0)
    folders = [tmp_path / str(i) for i in range(40)]
    for folder in folders:
        write(folder, tree(rng))
    code = (
        "import json, sys\n"
        "for folder in json.loads(sys.argv[1]):\n"
        "    sys.path.insert(0, folder)\n"
        "    before = set(sys.modules)\n"
        "    import mine\n"
        "    new = set(sys.modules) - before\n"
        "    print(json.dumps(sorted(name for name in new if name != 'mine')))\n"
        "    for name in new: del sys.modules[name]\n"
        "    sys.path.remove(folder); sys.path_importer_cache.clear()\n"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, json.dumps([str(folder) for folder in folders])],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    imported = [set(json.loads(line)) for line in done.stdout.splitlines()]
    assert sum(len(one) for one in imported) > 100
    for folder, theirs in zip(folders, imported, strict=True):
        assert theirs <= set(names(folder / "mine.py")), folder


def judged(settings: dict, copies: dict[str, str] | None = None) -> list[float]:
    loaded = catalog.load({"workers": 1, **settings}, copies or {})
    rows = loaded.rows("train", 0, 2, 0)
    return [one.score for one in loaded.judge([Answer(row, "x") for row in rows])]


def test_modules_are_read_from_the_copies_and_named_as_the_users(tmp_path):
    """An edit after the copy changes no answer; `__file__` and the lines of errors are the user's own."""
    mine, copy = tmp_path / "mine", tmp_path / "copy"
    problem(
        mine, "import pkg.values", "return pkg.values.value()",
        **{"pkg/__init__.py": "", "pkg/values.py": "def value(): return 0.25"},
    )  # fmt: skip
    shutil.copytree(mine, copy)
    (mine / "pkg" / "values.py").write_text("def value(): return 0.75")
    copies = {str(mine / "mine.py"): str(copy / "mine.py")}
    assert judged({"file": str(mine / "mine.py")}, copies) == [0.25, 0.25]
    assert judged({"file": str(mine / "mine.py")}) == [0.75, 0.75]
    (copy / "mine.py").write_text("import pkg\nassert 'mine' in __file__ and 'copy' not in pkg.__file__\n1 / 0\n")
    with pytest.raises(BadInput, match=r"mine.py: its import failed: mine.py:3: ZeroDivisionError"):
        judged({"file": str(mine / "mine.py")}, copies)


HIDDEN = "__import__('importlib').import_module('hel' + 'pers')"


@pytest.mark.parametrize(("imports", "body"), [(HIDDEN, "return 1.0"), ("", f"return {HIDDEN}.value")])
def test_a_local_module_that_no_statement_names_is_refused(imports, body, tmp_path):
    """Also where it is imported by a call, long after the file."""
    file = problem(tmp_path, imports, body, **{"helpers.py": "value = 1.0"})
    with pytest.raises(BadInput, match=r"mine.py: it imported helpers, .*Fix: import it by name, or add it"):
        judged({"file": str(file)})
    assert judged({"file": str(file), "files": [str(tmp_path / "helpers.py")]}) == [1.0, 1.0]


def test_code_from_another_folder_is_refused_unless_the_recipe_names_it(tmp_path):
    imports = f"import sys; sys.path.append({str(tmp_path / 'lib')!r}); import shared"
    file = problem(tmp_path / "mine", imports, "return shared.value")
    write(tmp_path / "lib", {"shared.py": "value = 0.5"})
    with pytest.raises(BadInput, match=r"mine\.py: it imported shared, whose bytes are in no key"):
        judged({"file": str(file)})
    assert judged({"file": str(file), "files": [str(tmp_path / "lib")]}) == [0.5, 0.5]


def test_installed_packages_are_imported_whenever_code_likes(tmp_path):
    file = problem(tmp_path, "", "import fractions, yaml, numpy; return 1.0")
    assert judged({"file": str(file)}) == [1.0, 1.0]


def test_rewards_import_the_modules_of_their_own_folder(tmp_path):
    write(tmp_path, {"mine.py": "import values\ndef one(completions, **kwargs): return [values.v] * len(completions)",
                     "values.py": "v = 0.5"})  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": str(i)}) + "\n" for i in range(50)))
    rewards = [f"{tmp_path / 'mine.py'}:one"]
    assert judged({"dataset": str(tmp_path / "rows.jsonl"), "rewards": rewards}) == [0.5, 0.5]


def test_two_files_with_modules_of_one_name_are_refused(tmp_path):
    """Python would give the second file the first one's."""
    for folder, value in (("a", 1.0), ("b", 0.25)):
        code = f"import helper\ndef {folder}(completions, **kwargs): return [helper.v] * len(completions)\n"
        write(tmp_path / folder, {"mine.py": code, "helper.py": f"v = {value}"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": str(i)}) + "\n" for i in range(50)))
    rewards = [f"{tmp_path / folder / 'mine.py'}:{folder}" for folder in ("a", "b")]
    with pytest.raises(BadInput, match=r"mine.py: it imports helper of its own folder, but another file has one"):
        judged({"dataset": str(tmp_path / "rows.jsonl"), "rewards": rewards})


def test_a_folder_of_data_does_not_take_the_place_of_an_installed_package(tmp_path):
    file = problem(tmp_path, "from yaml.loader import SafeLoader", **{"yaml/loader.py": "raise RuntimeError"})
    assert names(file) == [] and judged({"file": str(file)}) == [1.0, 1.0]


def test_no_bytecode_stands_for_a_module_below_problem_files(tmp_path):
    """A copy that keeps times and size leaves bytecode of other source in place."""
    lib, cached = tmp_path / "lib", "import py_compile, sys; py_compile.compile(sys.argv[1])"
    imports = f"import sys; sys.path.append({str(lib)!r}); import shared"
    file = problem(tmp_path / "mine", imports, "return shared.value")
    write(lib, {"shared.py": "value = 0.5"})
    subprocess.run([sys.executable, "-c", cached, str(lib / "shared.py")], check=True)
    before = (lib / "shared.py").stat()
    (lib / "shared.py").write_text("value = 0.9")
    os.utime(lib / "shared.py", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert judged({"file": str(file), "files": [str(lib)]}) == [0.9, 0.9]

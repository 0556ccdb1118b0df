"""The architecture is in the folders: imports go one way, and what only reads stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY_BASE, environment

ORDER = ["pipeline", "stages", "prompts"]
"""Each may import those to its right."""
ONLY_IN = {
    "prefect": {"pipeline/flows/"},
    "wandb": set(),
    "obstore": {"pipeline/registry/stores/objects.py"},
    "fcntl": {"stages/runtime/locks.py"},
    "peft": {"stages/policy/lora.py"},
    "accelerate": {"stages/policy/publishing.py", "stages/trl/"},
    "pyarrow": {"stages/tokens/token_rows.py"},
    "datasets": {"stages/sft.py", "stages/grpo.py", "stages/problems/custom/dataset.py"},
    "torch": {
        "stages/policy/",
        "stages/sampling/",
        "stages/trl/",
        "stages/runtime/worker.py",
        "stages/runtime/ranks.py",
        "stages/rewards/compose.py",
        "stages/tokens/weights.py",
        "stages/training.py",
    },
    "trl": {
        "stages/trl",
        "stages/sft.py",
        "stages/grpo.py",
        "stages/training.py",
        "stages/problems/custom/rewards_worker.py",
    },
}
"""Library -> the only places that may import it."""
WITH_CONTENTS = ("pipeline/cli", "pipeline/registry", "pipeline/starter", "stages/sampling", "prompts")
HEAVY = ("torch", "transformers", "trl", "datasets", "numpy")


def imports(path: Path) -> set[str]:
    """Modules that a file imports; of `from a import b` both `a` and `a.b`, since b may be a module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def module_file(root: Path, name: str) -> Path | None:
    """The file of one of our modules; None for a name that is none."""
    path = root.joinpath(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def rooms(folder: Path, root: Path) -> dict[str, set[str]]:
    """Room of a folder (a module, or a folder with all below it) -> the other rooms of the folder that it imports."""
    arrows: dict[str, set[str]] = {}
    for path in folder.rglob("*.py"):
        room = path.relative_to(folder).parts[0]
        targets = {module_file(root, name) for name in imports(path)} - {None}
        inside = {file.relative_to(folder).parts[0] for file in targets if folder in file.parents}
        arrows.setdefault(room, set()).update(inside - {room, "__init__.py"})
    arrows.pop("__init__.py", None)
    return arrows


def circles(arrows: dict[str, set[str]]) -> list[str]:
    """Rooms that import each other, however far round; [] for a DAG."""
    left = dict(arrows)
    while free := [room for room, targets in left.items() if not targets & left.keys()]:
        for room in free:
            del left[room]
    return sorted(left)


def folders(root: Path) -> list[Path]:
    return sorted({path.parent for package in ORDER for path in (root / package).rglob("*.py")})


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def backward_imports(root: Path) -> list[str]:
    found = []
    for i, package in enumerate(ORDER):
        for path in sorted((root / package).rglob("*.py")):
            found += [
                f"{path.relative_to(root)} imports {name}" for name in imports(path) if name.split(".")[0] in ORDER[:i]
            ]
    return found


def test_imports_go_from_pipeline_to_stages_to_prompts_and_never_back():
    assert backward_imports(ROOT) == []


def test_a_reversed_arrow_is_noticed(tmp_path):
    """The test above can fail."""
    for package in ORDER:
        (tmp_path / package).mkdir()
    (tmp_path / "stages" / "bad.py").write_text("def run():\n    from pipeline.registry import Registry\n")
    assert "stages/bad.py imports pipeline.registry" in backward_imports(tmp_path)


def test_folders_form_a_dag_at_every_level():
    """No room imports one that imports it, whatever is on the way."""
    assert {
        str(folder.relative_to(ROOT)): found for folder in folders(ROOT) if (found := circles(rooms(folder, ROOT)))
    } == {}


def test_a_circle_of_folders_is_noticed(tmp_path):
    """The test above can fail."""
    for name, text in {
        "a/x": "from stages.b import y",
        "b/y": "from stages import c",
        "c": "import stages.a.x",
        "d": "import stages.c",
    }.items():
        file = tmp_path / "stages" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    assert circles(rooms(tmp_path / "stages", tmp_path)) == ["a", "b", "c.py", "d.py"]


def test_no_folder_holds_more_than_fifteen_modules():
    for folder in folders(ROOT):
        held = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(held) <= 15, folder


def test_every_folder_says_what_it_is_and_its_init_holds_no_more():
    """Importing a folder's module must not load its neighbours. `sampling`, `registry`, `starter` and `cli` have
    contents of their own."""
    for folder in folders(ROOT):
        tree = ast.parse((folder / "__init__.py").read_text())
        assert ast.get_docstring(tree), folder
        if folder.relative_to(ROOT).as_posix() not in WITH_CONTENTS:
            assert len(tree.body) == 1, folder


def test_each_heavy_library_is_imported_only_where_it_belongs():
    for library, places in ONLY_IN.items():
        for package in ORDER:
            for path in modules(package):
                relative = path.relative_to(ROOT).as_posix()
                if any(name.split(".")[0] == library for name in imports(path)):
                    assert relative.startswith(tuple(places)), f"{relative} imports {library}"


def test_a_module_of_the_process_around_a_stage_loads_next_to_nothing():
    """Else every import of a `stages` module would pay for all of them."""
    code = "import sys, stages.runtime.process; print(len(sys.modules), sorted({n.split('.')[0] for n in sys.modules}))"
    done = subprocess.run([sys.executable, "-S", "-P", "-c", f"import sys; sys.path += {sys.path!r}; {code}"],
                          capture_output=True, text=True, env=environment())  # fmt: skip
    count, _, names = done.stdout.partition(" ")
    assert int(count) <= 80, names
    assert not {"pydantic", "yaml", *HEAVY} & set(names.strip("[]\n'").split("', '"))


def test_pipeline_never_touches_a_tensor():
    for path in modules("pipeline"):
        assert not {name.split(".")[0] for name in imports(path)} & set(HEAVY), path


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "check RECIPE",
        "schema",
        "plan RECIPE",
        "audit RECIPE",
        "plan configs/demo.yaml",
        "ls",
        "show",
        "runs",
        "verify",
        "alias ls",
        "pins",
        "gc",
    ],
)
def test_commands_that_only_read_import_neither_torch_nor_trl_nor_prefect(command, climbed):
    """On a registry with a whole climb in it, so that there is something to read."""
    recipe, registry = climbed
    code = (
        "import sys\nfrom pipeline.cli import exit_code\ncode = exit_code(sys.argv[1:])\n"
        "heavy = ('torch', 'trl', 'prefect', 'transformers', 'numpy')\n"
        "print(code, [m for m in heavy if m in sys.modules], file=sys.stderr)"
    )
    arguments = command.replace("RECIPE", str(recipe)).split()
    env = environment(SWITCHBACK_REGISTRY=str(registry))
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.stderr.splitlines()[-1] == "0 []", done.stderr
    assert done.stdout


def test_the_tiny_base_is_under_a_megabyte():
    assert (TINY_BASE / "model.safetensors").stat().st_size < 1_000_000

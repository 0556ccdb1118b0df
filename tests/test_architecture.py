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
    "prefect": {"pipeline/flow.py"},
    "wandb": set(),
    "obstore": {"pipeline/registry/objects.py"},
    "trl": {
        "stages/trl",
        "stages/sft.py",
        "stages/grpo.py",
        "stages/training.py",
        "stages/problems/custom/rewards_worker.py",
    },
}
"""Library -> the only places that may import it."""
HEAVY = ("torch", "transformers", "trl", "datasets", "numpy")


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


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
    assert backward_imports(tmp_path) == ["stages/bad.py imports pipeline.registry"]


def test_prefect_wandb_and_trl_are_imported_only_where_they_belong():
    for library, places in ONLY_IN.items():
        for package in ORDER:
            for path in modules(package):
                relative = path.relative_to(ROOT).as_posix()
                if any(name.split(".")[0] == library for name in imports(path)):
                    assert relative.startswith(tuple(places)), f"{relative} imports {library}"


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

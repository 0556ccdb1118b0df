"""What keeping a model costs: publishing to the registry against W&B's and MLflow's artifact stores, in one run.

    python benchmarks/registry.py --mlflow-python PYTHON

PYTHON is of an environment with mlflow-skinny, sqlalchemy and alembic.

Contestants (benchmarks/storing.py): Registry.publish; wandb's `add_dir` + `log_artifact`, offline; the same with
policy="immutable", which hashes and keeps no copy, so it is another service and no target is set against it; MLflow's
`log_artifacts` with a SQLite store; and one sha256 pass over the files. Each gets a fresh directory of random bytes
in four safetensors files, which are in memory and on the disk, in a process of its own; they take turns. Start-up,
imports and migrations are not counted. Each round gives a ratio to publish; the table has medians and ranges.

Written: `write_bytes` of /proc/PID/io, of the process and its children: what they made dirty for the disk. Disk: what
the model takes afterwards, its source included where that is still there. To the disk: seconds of fsync before what
is kept survives a power cut, in a column of their own, because publish waits for them and the rivals do not: for
publish, of the source as it was just written; for the others, of their copy.

Then: verify against sha256sum, and opening an artifact against cp + sha256sum; `ls` and `plan`, as whole processes,
with 5,000 artifacts that the plan's stages have to be compared with. Exits 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from pipeline.plan.steps import Step, steps
from pipeline.recipe.recipe import load
from pipeline.registry import Artifact, File, Registry, Source
from pipeline.registry.artifact import now
from pipeline.registry.keys import key_of
from pipeline.registry.registry import FORMAT
from pipeline.registry.verify import verify
from stages.job import MANIFEST
from stages.runtime.disk import sync_tree

ROOT = Path(__file__).parent.parent
SWITCHBACK = Path(sys.executable).parent / "switchback"
RECIPE = ROOT / "configs" / "demo.yaml"
HASH, OURS, WANDB, IMMUTABLE, MLFLOW = "one sha256 pass", "switchback", "wandb", "wandb immutable", "mlflow"
FASTER, DISK, SECONDS, SAME = 2.0, 0.55, 1.0, 1.1
"""Targets: times faster than a store, share of its disk, seconds of `ls` and `plan`, ratio to the hash that still
counts as no more."""

Seen = dict[str, float]


def main() -> int:
    """Measure, print, judge."""
    options = parsed()
    with tempfile.TemporaryDirectory(prefix="registry-benchmark-", dir=options.directory) as directory:
        place = Path(directory)
        model = make_model(place / "model", options.size)
        publishing = take_turns(place, model, options)
        reading = reading_costs(place, model, options.rounds)
        listing = listing_costs(place / "many", options)
    print_tables(publishing, reading, listing, options)
    if options.json:
        results = {"publishing": publishing, "reading": reading, "listing": listing}
        options.json.write_text(json.dumps(results, indent=1))
    return verdict(publishing, listing)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=2.0, help="GB of the model")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--artifacts", type=int, default=5000, help="artifacts that ls and plan have to read")
    parser.add_argument(
        "--directory", type=Path, help="where to work, with room for three times the size. Default: the system's own"
    )
    parser.add_argument("--mlflow-python", default=sys.executable, help="interpreter that has mlflow")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    return parser.parse_args()


def make_model(directory: Path, gigabytes: float) -> Path:
    """Four safetensors files of one tensor each, and a config."""
    directory.mkdir(parents=True)
    length = int(gigabytes * 10**9 / 4)
    header = json.dumps({"weight": {"dtype": "U8", "shape": [length], "data_offsets": [0, length]}}).encode()
    for i in range(4):
        with (directory / f"model-{i + 1:05d}-of-00004.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for start in range(0, length, 2**24):
                file.write(os.urandom(min(2**24, length - start)))
    (directory / "config.json").write_text("{}")
    return directory


def take_turns(place: Path, model: Path, options: argparse.Namespace) -> dict[str, list[Seen]]:
    """Contestant -> what was seen in each round."""
    found: dict[str, list[Seen]] = {name: [] for name in contestants(options.mlflow_python)}
    for _ in range(options.rounds):
        for name, seen in found.items():
            seen.append(one_turn(name, place, model, options.mlflow_python if name == MLFLOW else sys.executable))
    return found


def contestants(mlflow_python: str) -> list[str]:
    """Those that are installed."""
    found = subprocess.run([mlflow_python, "-c", "import mlflow, sqlalchemy"], capture_output=True, check=False)
    if found.returncode == 0:
        return [HASH, OURS, WANDB, IMMUTABLE, MLFLOW]
    print("mlflow is left out; pip install mlflow-skinny sqlalchemy alembic, and say where with --mlflow-python")
    return [HASH, OURS, WANDB, IMMUTABLE]


def one_turn(name: str, place: Path, model: Path, python: str) -> Seen:
    """A contestant on a copy of the model that is in memory and on the disk, as seen from outside and inside."""
    source, store = place / "source", place / "store"
    shutil.copytree(model, source)
    store.mkdir()
    flushed = taken(lambda: sync_tree(source))
    command = [python, str(ROOT / "benchmarks" / "storing.py"), name, str(source), str(store)]
    env = {**os.environ, "PYTHONPATH": "" if name == MLFLOW else str(ROOT)}
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    seen: Seen = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"seconds"')))
    seen |= {
        "to_disk": flushed if name == OURS else taken(lambda: sync_tree(store)),
        "disk": disk(source) + disk(store),
    }
    shutil.rmtree(store)
    shutil.rmtree(source, ignore_errors=True)
    os.sync()
    return seen


def taken(work: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def disk(directory: Path) -> int:
    """Bytes of disk that a directory takes."""
    return sum(512 * path.lstat().st_blocks for path in directory.rglob("*"))


def reading_costs(place: Path, model: Path, turns: int) -> dict[str, list[float]]:
    """What a reader pays, seconds a turn."""
    registry = Registry(place / "reading")
    artifact = registry.publish(shutil.copytree(model, place / "source"), draft(0, {}, "warmup"), "user").artifact
    files = sorted(map(str, registry.path(artifact).glob("*.safetensors")))

    def copy_and_check() -> None:
        copy = shutil.copytree(registry.path(artifact), place / "copy")
        subprocess.run(["sha256sum", *map(str, copy.glob("*.safetensors"))], check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(copy)

    works: dict[str, Callable[[], object]] = {
        "sha256sum": lambda: subprocess.run(["sha256sum", *files], check=True, stdout=subprocess.DEVNULL),
        "verify": lambda: verify(registry, artifact),
        "cp + sha256sum": copy_and_check,
        "open": lambda: registry.path(Registry(place / "reading").open(artifact.id)),
    }
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(turns):
        for name, work in works.items():
            found[name].append(taken(work))
    return found


def draft(number: int, identity: dict[str, object], stage: str, kind: str = "sft") -> Artifact:
    """An artifact of a key of its own."""
    told = {**identity, "seed": number}
    return Artifact(
        id=f"{stage}-{number:08x}",
        key=key_of(told),
        kind=kind,
        stage=stage,
        created=now(),
        outputs={"policy": "."},
        files=(),
        inputs={},
        format=None,
        config={},
        identity=told,
        metrics={},
        provenance={},
    )


def listing_costs(root: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of whole processes, start-up included."""
    fill(root, options.artifacts)
    commands = {"ls": ["ls"], "ls --json": ["ls", "--json"], "plan": ["plan", str(RECIPE)], "--help": ["--help"]}
    found: dict[str, list[float]] = {f"{name}{what}": [] for name in commands for what in ("", ", CPU alone")}
    for _ in range(options.rounds):
        for name, arguments in commands.items():
            place = [] if name == "--help" else ["--registry", str(root)]
            command = [SWITCHBACK, *arguments, *place]
            before = cpu_of_children()
            found[name].append(
                taken(lambda c=command: subprocess.run(c, cwd=ROOT, check=True, stdout=subprocess.DEVNULL))
            )
            found[f"{name}, CPU alone"].append(cpu_of_children() - before)
    return found


def cpu_of_children() -> float:
    """Seconds; what other processes do at the same time is not in it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def fill(root: Path, count: int) -> None:
    """A registry of artifacts without files: those of the demo's steps, under other seeds. Written directly, without
    the fsyncs of publish."""
    (root / "artifacts").mkdir(parents=True)
    (root / "format.json").write_text(json.dumps(FORMAT))
    planned = steps(load(RECIPE), Registry(root))
    for number in range(count):
        step = planned[number % len(planned)]
        artifact = as_made(draft(number + 10**6, step.identity, step.name, step.kind), step)
        for place, name, content in (
            (root / "artifacts" / artifact.id, MANIFEST, artifact.model_dump_json(indent=1)),
            (root / "keys" / artifact.key, "000001.json", json.dumps({"artifact": artifact.id})),
        ):
            place.mkdir(parents=True)
            (place / name).write_text(content)


def as_made(artifact: Artifact, step: Step) -> Artifact:
    """With as much in its manifest as a stage leaves there."""
    files = tuple(File(path=f"file-{i}.json", size=1000 * i, sha256=artifact.key) for i in range(9))
    sources = {
        role: Source(id=f"{role}-00000000", output=ref.output, key=ref.key, name=ref.source, digest=ref.key)
        for role, ref in step.inputs.items()
    }
    seen = {
        "run": "demo",
        "host": "here",
        "processes": 1,
        "versions": dict.fromkeys(("torch", "transformers", "trl", "accelerate", "datasets"), "1.0"),
    }
    metrics = {f"metric/{i}": i / 7 for i in range(8)}
    return artifact.model_copy(
        update={
            "files": files,
            "inputs": sources,
            "format": step.format,
            "config": step.config.model_dump(mode="json"),
            "provenance": seen,
            "metrics": metrics,
        }
    )


def print_tables(
    publishing: dict[str, list[Seen]],
    reading: dict[str, list[float]],
    listing: dict[str, list[float]],
    options: argparse.Namespace,
) -> None:
    """One line a contestant, then one line a command."""
    print(f"{options.size:g} GB in 4 files, {options.rounds} rounds, {os.cpu_count()} cores; medians, [ranges]")
    print(f"{'':<17}{'seconds':>9}  {'times publish':<22}{'GB written':>11}{'GB of disk':>12}{'to the disk, s':>16}")
    for name, seen in publishing.items():
        ratio = spread(ratios(publishing, name))
        told = [median(one[part] for one in seen) for part in ("seconds", "written", "disk", "to_disk")]
        print(f"{name:<17}{told[0]:>9.2f}  {ratio:<22}{told[1] / 1e9:>11.2f}{told[2] / 1e9:>12.2f}{told[3]:>16.2f}")
    print()
    for title, found in (("reading it", reading), (f"with {options.artifacts} artifacts", listing)):
        print(f"{title:<24}{'seconds':>9}")
        for name, each in found.items():
            print(f"{name:<24}{spread(each, 3)}")


def spread(values: list[float], digits: int = 2) -> str:
    """Median and range."""
    return f"{median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def ratios(publishing: dict[str, list[Seen]], name: str) -> list[float]:
    """Seconds against publish, round by round."""
    return [a["seconds"] / b["seconds"] for a, b in zip(publishing[name], publishing[OURS], strict=True)]


def verdict(publishing: dict[str, list[Seen]], listing: dict[str, list[float]]) -> int:
    """Say of each target whether it is met."""
    ours = publishing[OURS]
    size = median(one["disk"] for one in ours)
    hashed = 1 / median(ratios(publishing, HASH))
    judged = [
        (f"publish takes {hashed:.2f}x one sha256 pass (at most {SAME})", hashed <= SAME),
        (
            f"publish writes {median(one['written'] for one in ours) / 1e6:.2f} MB",
            all(one["written"] < 1e6 for one in ours),
        ),
    ]
    for name in (store for store in (WANDB, MLFLOW) if store in publishing):
        faster, share = median(ratios(publishing, name)), size / median(one["disk"] for one in publishing[name])
        judged += [(f"{name} takes {faster:.1f}x (at least {FASTER:g})", faster >= FASTER)]
        judged += [(f"publish takes {share:.2f} of the disk of {name} (at most {DISK})", share <= DISK)]
    slowest = {name: median(listing[name]) for name in ("ls", "plan")}
    judged += [(f"{name} takes {each:.2f} s (under {SECONDS:g})", each < SECONDS) for name, each in slowest.items()]
    print()
    for told, met in judged:
        print(f"{'met    ' if met else 'NOT met'}  {told}")
    return int(not all(met for _, met in judged))


if __name__ == "__main__":
    sys.exit(main())

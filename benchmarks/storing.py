"""One contestant of benchmarks/registry.py, in a process of its own: put a directory into a store, and say what it
cost.

    python benchmarks/storing.py NAME SOURCE STORE    ->    {"seconds", "written"}

It needs the standard library and the contestant, so that it also runs where only that is installed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path


def main() -> None:
    """Set up, take the time of what remains to be done, and print it."""
    name, source, store = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    put, close = CONTESTANTS[name](source, store)
    before, start = written(), time.perf_counter()
    put()
    print(json.dumps({"seconds": time.perf_counter() - start, "written": written() - before}))
    sys.stdout.flush()
    close()


def written() -> int:
    """Bytes that this process and its descendants have made dirty for the disk."""
    return sum(_written(pid) for pid in _tree(os.getpid()))


def _written(pid: int) -> int:
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))


def _tree(pid: int) -> list[int]:
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return [pid, *(descendant for child in children for descendant in _tree(child))]


Contestant = tuple[Callable[[], object], Callable[[], object]]


def hash_only(source: Path, store: Path) -> Contestant:
    """One sha256 pass over the files, one after the other."""
    from pipeline.registry.keys import digest_file

    return lambda: [digest_file(path) for path in sorted(source.iterdir())], lambda: None


def switchback(source: Path, store: Path) -> Contestant:
    """Registry.publish."""
    from pipeline.registry import Artifact, Registry
    from pipeline.registry.keys import key_of

    registry = Registry(store)
    registry.initialise()
    draft = Artifact(
        id="", key=key_of({}), kind="sft", stage="warmup", created="", outputs={"policy": "."}, files=(), inputs={},
        format=None, config={}, identity={}, metrics={}, provenance={},
    )  # fmt: skip
    return lambda: registry.publish(source, draft, "user"), lambda: None


def wandb(source: Path, store: Path, policy: str = "mutable") -> Contestant:
    """`add_dir` copies into the staging directory unless the policy says that files stay as they are; `log_artifact`
    records it in the run's file."""
    os.environ.update(
        WANDB_MODE="offline",
        WANDB_SILENT="true",
        WANDB_DIR=str(store),
        WANDB_DATA_DIR=str(store),
        WANDB_CACHE_DIR=str(store),
    )
    import wandb

    run = wandb.init(project="benchmark")
    artifact = wandb.Artifact("model", type="model")

    def put() -> None:
        artifact.add_dir(str(source), policy=policy)
        run.log_artifact(artifact)

    return put, run.finish


def wandb_immutable(source: Path, store: Path) -> Contestant:
    """It hashes, and keeps no copy."""
    return wandb(source, store, "immutable")


def mlflow(source: Path, store: Path) -> Contestant:
    """`log_artifacts` into a local directory, with a SQLite store whose tables are there."""
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{store}/mlflow.db")
    experiment = mlflow.create_experiment("benchmark", artifact_location=f"file://{store}/artifacts")
    mlflow.start_run(experiment_id=experiment)
    return lambda: mlflow.log_artifacts(str(source), "model"), mlflow.end_run


CONTESTANTS: dict[str, Callable[[Path, Path], Contestant]] = {
    "one sha256 pass": hash_only,
    "switchback": switchback,
    "wandb": wandb,
    "wandb immutable": wandb_immutable,
    "mlflow": mlflow,
}

if __name__ == "__main__":
    main()

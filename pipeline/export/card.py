"""The card of an exported artifact: its README.md, with the front matter that the hub reads.

    artifact + what the registry knows around it (lineage, evaluations, the run's recipe) -> facts -> cards/*.md.jinja -> text

Nothing on a card is of this machine: no host, no user, and of a path only its last part. Scores stand with their
interval, n, seeds and decoding, from the base to the artifact; the evaluations they are read from are verified first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from pipeline.errors import Failed
from pipeline.recipe.recipe import BASE
from pipeline.registry import Artifact, Registry
from pipeline.registry.lineage import Ancestor, lineage
from pipeline.registry.verify import verify
from stages.job import HUB, Evaluation, read_evaluation
from stages.rejection import CONTROL

if TYPE_CHECKING:
    from jinja2 import Environment

SPLITS = ("validation", "held_out")
FUNNEL = "funnel/"
MACHINE = ("registry", "work", "track", "launch")
"""What of a recipe says where and with what means, and nothing about what was made; the execution that was seen is told
apart."""
SHA256 = re.compile("[0-9a-f]{64}")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class Scored(NamedTuple):
    """One line of the table of scores."""

    policy: str
    evaluation: Evaluation


def card(registry: Registry, artifact: Artifact, output: str) -> str:
    """README.md of an artifact of which `output` (policy, data or control) is exported. Raises Failed where a score is
    no longer what was published."""
    top = lineage(registry, artifact)
    nodes = list(_nodes(top))
    facts = {
        "artifact": artifact,
        "control": output == CONTROL,
        "front_matter": yaml.safe_dump(_front_matter(artifact, output, nodes), sort_keys=False, allow_unicode=True),
        "base": shown_name(_base(nodes).name),
        "lineage": list(_lineage_lines(registry, top, set())),
        "scores": list(_scores(registry, nodes)),
        "told": _without_places({name: value for name, value in artifact.config.items() if name != "execution"}),
        "recipe": _recipe(registry, artifact),
        "made": _made(artifact),
        "funnel": _funnel(artifact),
        "version": version("switchback"),
    }
    return _templates().get_template("policy.md.jinja" if output == "policy" else "data.md.jinja").render(facts)


def shown_name(place: str) -> str:
    """Where something is from, without this machine's directories."""
    if place.startswith(HUB):
        return place.removeprefix(HUB)
    return PurePath(place).name if PurePath(place).is_absolute() else place


def fenced(text: str, language: str = "") -> str:
    """A block of code that shows `text` as it is, whatever is in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.removesuffix(chr(10))}\n{fence}"


def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = Environment(  # noqa: S701 - markdown, whose code blocks show what is in them
        loader=PackageLoader("pipeline.export", "cards"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "fenced": fenced,
        "json": lambda value: json.dumps(value, ensure_ascii=False),
        "x100": lambda share: f"{100 * share:.1f}",
    }
    return found


def _funnel(artifact: Artifact) -> dict[str, int]:
    """Rule -> how many rollouts it left; empty for a policy."""
    return {name.removeprefix(FUNNEL): int(n) for name, n in artifact.metrics.items() if name.startswith(FUNNEL)}


def _nodes(top: Ancestor) -> Iterator[Ancestor]:
    yield top
    for inner in top.inputs:
        yield from _nodes(inner)


def _upwards(top: Ancestor) -> Iterator[Ancestor]:
    """What something was made from before itself: the base first."""
    for inner in top.inputs:
        yield from _upwards(inner)
    yield top


def _base(nodes: list[Ancestor]) -> Ancestor:
    """The end of the chain of policies."""
    node = nodes[0]
    while policy := next((inner for inner in node.inputs if inner.role == "policy"), None):
        node = policy
    return node


def _front_matter(artifact: Artifact, output: str, nodes: list[Ancestor]) -> dict[str, Any]:
    """What the hub reads. `base_model` and `datasets` are left out for what is not on the hub: it refuses any other
    name."""
    tags = ["switchback", "trl", artifact.kind, *(["lora"] if "adapter" in artifact.outputs else [])]
    if output != "policy":
        return {"tags": tags, "configs": [{"config_name": "default", "data_files": "rows.parquet"}]}
    base, dataset = _base(nodes).name, (artifact.identity.get("problem") or {}).get("dataset")
    found: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base.startswith(HUB):
        found |= {"base_model": base.removeprefix(HUB).partition("@")[0], "base_model_relation": "finetune"}
    if dataset and HUB_ID.fullmatch(dataset) and not SHA256.fullmatch(dataset):
        found |= {"datasets": [dataset]}
    return {**found, "tags": tags}


def _lineage_lines(registry: Registry, node: Ancestor, told: set[str], depth: int = 0) -> Iterator[str]:
    """Nested list; what an artifact was made from is told once."""
    role = f"{node.role}: " if node.role else ""
    indent = "  " * depth
    if node.id is None:
        yield f"{indent}- {role}`{shown_name(node.name)}`, digest `{node.key}`"
        return
    state = "" if node.whole else ", gone from the registry"
    if node.id in told:
        yield f"{indent}- {role}`{node.id}`, as above"
        return
    told.add(node.id)
    yield f"{indent}- {role}`{node.id}` ({node.kind}{state}), key `{node.key}`"
    artifact = registry.get(node.id) if node.whole else None
    if artifact and (problem := artifact.identity.get("problem")):
        yield f"{indent}  - problem: {_code(problem)}, rows: {_code(artifact.identity.get('rows'))}"
    for inner in node.inputs:
        yield from _lineage_lines(registry, inner, told, depth + 1)


def _code(value: Any) -> str:
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def _scores(registry: Registry, nodes: list[Ancestor]) -> Iterator[Scored]:
    """Newest evaluation of the base and of each policy on the way, both splits; nothing for a policy that was not
    evaluated."""
    for node in {(node.id, node.key): node for node in _upwards(nodes[0])}.values():
        names = {BASE, node.name} if node.id else {BASE}
        found = [one for name in sorted(names) for one in registry.artifacts(f"{name}.evaluate") if _is_of(one, node)]
        usable = [one for one in sorted(found, key=lambda one: one.created) if registry.usable(one)]
        if usable:
            name = node.name if node.id else BASE
            yield from (Scored(name, _evaluation(registry, usable[-1], split)) for split in SPLITS)


def _is_of(evaluation: Artifact, node: Ancestor) -> bool:
    policy = evaluation.inputs.get("policy")
    return policy is not None and (policy.id, policy.key) == (node.id, node.key)


def _evaluation(registry: Registry, artifact: Artifact, split: str) -> Evaluation:
    if wrong := verify(registry, artifact):
        raise Failed(f"{wrong[0]}; so its scores cannot be told: switchback verify {artifact.id} lets it be made again")
    return read_evaluation(registry.path(artifact, split))


def _recipe(registry: Registry, artifact: Artifact) -> str | None:
    """The recipe of the run that made it, without its places; None when the run is not in the registry any more."""
    content = registry.store.read(f"runs/{artifact.provenance.get('run')}/recipe.yaml")
    if content is None:
        return None
    recipe = {name: value for name, value in yaml.safe_load(content).items() if name not in MACHINE}
    return yaml.safe_dump(_without_places(recipe), sort_keys=False, allow_unicode=True, width=120)


def _without_places(value: Any, name: str = "") -> Any:
    if isinstance(value, Mapping):
        return {inner: _without_places(one, inner) for inner, one in value.items()}
    if isinstance(value, list):
        return [_without_places(one, name) for one in value]
    return shown_name(value) if isinstance(value, str) and name != "response_prefix" else value


def _made(artifact: Artifact) -> dict[str, Any]:
    """Versions and execution as they were seen; nothing that names a machine."""
    seen = artifact.provenance
    facts = {name: seen[name] for name in ("processes", "threads", "device", "seconds") if name in seen}
    return {
        "created": artifact.created[:10],
        "seed": artifact.identity.get("seed"),
        **facts,
        **seen.get("versions", {}),
    }

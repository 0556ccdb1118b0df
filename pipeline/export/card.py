"""The card of an exported artifact: its README.md, with the front matter that the hub reads.

    artifact + its lineage, evaluations and recipe -> facts -> cards/*.md.jinja -> text

A card names no host, no user, and only the last part of a path. It lists scores with their interval, n, seeds and
decoding, from the base to the artifact. The evaluations are verified first.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from pipeline.errors import Failed
from pipeline.recipe import bounds
from pipeline.registry import Artifact, Registry
from pipeline.registry.lineage import Ancestor, lineage
from pipeline.registry.verify import verify
from pipeline.version import version
from stages.errors import BadInput
from stages.job import HUB, Evaluation, read_evaluation
from stages.rejection import CONTROL
from stages.stage import BASE
from stages.visible import visible

if TYPE_CHECKING:
    from jinja2 import Environment

SPLITS = ("validation", "held_out")
FUNNEL = "funnel/"
MACHINE = ("registry", "work", "track", "launch")
"""Parts of a recipe that say where and on what hardware it ran; the card lists the execution separately."""
SHA256 = re.compile("[0-9a-f]{64}")
LONGEST = 100
"""Characters of a fact of a manifest that a card shows."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class Scored(NamedTuple):
    """One line of the table of scores."""

    policy: str
    evaluation: Evaluation


def card(registry: Registry, artifact: Artifact, output: str) -> str:
    """README.md for an exported output (policy, data or control) of an artifact. Raises Failed for a damaged score."""
    top = lineage(registry, artifact)
    nodes = list(_nodes(top))
    facts = {
        "artifact": artifact,
        "control": output == CONTROL,
        "front_matter": yaml.safe_dump(_front_matter(artifact, output, nodes), sort_keys=False, allow_unicode=True),
        "base": shown_name(_base(nodes).name),
        "lineage": list(_lineage_lines(registry, top, set())),
        "scores": list(_scores(registry, nodes)),
        "settings": _without_places({name: value for name, value in artifact.config.items() if name != "execution"}),
        "recipe": _recipe(registry, artifact),
        "made": _made(artifact),
        "funnel": _funnel(artifact),
        "version": version(),
    }
    return _templates().get_template("policy.md.jinja" if output == "policy" else "data.md.jinja").render(facts)


def shown_name(place: str) -> str:
    """The place of a model or a file, without this machine's directories."""
    if place.startswith(HUB):
        return place.removeprefix(HUB)
    return PurePath(place).name if PurePath(place).is_absolute() else place


def fenced(text: str, language: str = "") -> str:
    """A Markdown code block with `text`, whose fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.removesuffix(chr(10))}\n{fence}"


def coded(text: str) -> str:
    """Markdown's inline code with `text` on one line, whose fence is longer than any run of backticks in it."""
    line = visible(text, keep="")
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    blank = " " if line.startswith(("`", " ")) or line.endswith(("`", " ")) else ""
    return f"{fence}{blank}{line}{blank}{fence}"


def plain(text: object) -> str:
    """Words as Markdown shows them: on one line, no mark-up, no HTML, and no end of a table's cell."""
    return html.escape(re.sub(r"([\\`*\[\]|])", r"\\\1", visible(str(text), keep="")), quote=False)


def _in_cell(code: str) -> str:
    """Inline code inside a table, where a bar would end the cell."""
    return code.replace("|", "\\|")


def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(  # noqa: S701 - Markdown, whose code blocks show their text as it is
        loader=PackageLoader("pipeline.export", "cards"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "fenced": fenced,
        "coded": coded,
        "plain": plain,
        "in_cell": _in_cell,
        "json": lambda value: json.dumps(value, ensure_ascii=False),
        "x100": lambda share: "-" if share is None else f"{100 * share:.1f}",
    }
    return environment


def _funnel(artifact: Artifact) -> dict[str, int]:
    """Rule -> the number of rollouts left after it; empty for a policy."""
    return {name.removeprefix(FUNNEL): int(n) for name, n in artifact.metrics.items() if name.startswith(FUNNEL)}


def _nodes(top: Ancestor) -> Iterator[Ancestor]:
    yield top
    for inner in top.inputs:
        yield from _nodes(inner)


def _upwards(top: Ancestor) -> Iterator[Ancestor]:
    """The tree with inputs before the artifacts made from them: the base first."""
    for inner in top.inputs:
        yield from _upwards(inner)
    yield top


def _base(nodes: list[Ancestor]) -> Ancestor:
    """The end of the chain of policies."""
    base = nodes[0]
    policies = [inner for inner in base.inputs if inner.role == "policy"]
    while policies:
        base = policies[0]
        policies = [inner for inner in base.inputs if inner.role == "policy"]
    return base


def _front_matter(artifact: Artifact, output: str, nodes: list[Ancestor]) -> dict[str, Any]:
    """The hub's metadata. `base_model` and `datasets` name only what is on the hub: it refuses any other name."""
    tags = ["switchback", "trl", artifact.kind]
    if "adapter" in artifact.outputs:
        tags.append("lora")
    if output != "policy":
        return {"tags": tags, "configs": [{"config_name": "default", "data_files": "rows.parquet"}]}
    base, problem = _base(nodes).name, artifact.identity.get("problem")
    dataset = problem.get("dataset") if isinstance(problem, dict) else None
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base.startswith(HUB):
        metadata |= {"base_model": base.removeprefix(HUB).partition("@")[0], "base_model_relation": "finetune"}
    if isinstance(dataset, str) and HUB_ID.fullmatch(dataset) and not SHA256.fullmatch(dataset):
        metadata |= {"datasets": [dataset]}
    return {**metadata, "tags": tags}


def _lineage_lines(registry: Registry, node: Ancestor, listed: set[str], depth: int = 0) -> Iterator[str]:
    """Nested list of the lineage; `listed` holds the ids whose inputs are listed already."""
    role = f"{plain(node.role)}: " if node.role else ""
    indent = "  " * depth
    if node.id is None:
        yield f"{indent}- {role}{coded(shown_name(node.name))}, digest {coded(node.key)}"
        return
    state = "" if node.whole else ", gone from the registry"
    if node.id in listed:
        yield f"{indent}- {role}{coded(node.id)}, as above"
        return
    listed.add(node.id)
    yield f"{indent}- {role}{coded(node.id)} ({plain(node.kind)}{state}), key {coded(node.key)}"
    artifact = registry.get(node.id) if node.whole else None
    if artifact and artifact.identity.get("problem"):
        problem, rows = artifact.identity["problem"], artifact.identity.get("rows")
        yield f"{indent}  - problem: {_code(problem)}, rows: {_code(rows)}"
    for inner in node.inputs:
        yield from _lineage_lines(registry, inner, listed, depth + 1)


def _code(value: Any) -> str:
    return coded(json.dumps(value, ensure_ascii=False))


def _scores(registry: Registry, nodes: list[Ancestor]) -> Iterator[Scored]:
    """The newest evaluation of the base and of each policy after it, for both splits. A policy without an evaluation is
    left out."""
    for node in {(node.id, node.key): node for node in _upwards(nodes[0])}.values():
        policy = node.name if node.id else BASE
        evaluations = [
            artifact
            for name in sorted({BASE, policy})
            for artifact in registry.artifacts(f"{name}.evaluate")
            if _is_of(artifact, node) and registry.usable(artifact)
        ]
        if evaluations:
            newest = max(evaluations, key=lambda artifact: artifact.created)
            yield from (Scored(policy, _evaluation(registry, newest, split)) for split in SPLITS)


def _is_of(evaluation: Artifact, node: Ancestor) -> bool:
    policy = evaluation.inputs.get("policy")
    return policy is not None and (policy.id, policy.key) == (node.id, node.key)


def _evaluation(registry: Registry, artifact: Artifact, split: str) -> Evaluation:
    problems = verify(registry, artifact)
    if problems:
        raise Failed(
            f"{problems[0]}; its scores cannot be shown. switchback verify {artifact.id} lets it be made again"
        )
    return read_evaluation(registry.path(artifact, split))


def _recipe(registry: Registry, artifact: Artifact) -> str | None:
    """The recipe of the run that made an artifact, without its places; None when the registry no longer has the run, or
    holds something else under its name."""
    run = artifact.provenance.get("run")
    if not isinstance(run, str):
        return None
    try:
        content = registry.store.read(f"runs/{run}/recipe.yaml")
        found = None if content is None else bounds.load(content.decode())
    except (BadInput, UnicodeDecodeError, yaml.YAMLError):
        return None
    if not isinstance(found, dict):
        return None
    recipe = {name: value for name, value in found.items() if name not in MACHINE}
    return yaml.safe_dump(_without_places(recipe), sort_keys=False, allow_unicode=True, width=120)


def _without_places(value: Any, name: str = "") -> Any:
    if isinstance(value, Mapping):
        return {inner: _without_places(setting, inner) for inner, setting in value.items()}
    if isinstance(value, list):
        return [_without_places(item, name) for item in value]
    if isinstance(value, str) and name != "response_prefix":
        return shown_name(value)
    return value


def _made(artifact: Artifact) -> dict[str, Any]:
    """Versions and execution as the worker measured them, without the names of machines. A manifest may be somebody
    else's: what is no number and no short text is left out."""
    measured, versions = artifact.provenance, artifact.provenance.get("versions")
    facts = {name: measured.get(name) for name in ("processes", "threads", "device", "seconds")}
    named = versions if isinstance(versions, dict) else {}
    every = {"created": artifact.created[:10], "seed": artifact.identity.get("seed"), **facts, **named}
    return {name: value for name, value in every.items() if _is_short(name) and _is_short(value)}


def _is_short(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, str) and len(value) <= LONGEST)

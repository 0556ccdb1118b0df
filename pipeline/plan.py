"""The plan: Recipe + Registry -> for each step its key, whether it is reused or run, and why.

An evaluate step is put after the base and after every policy. Keys chain through the keys of inputs, so the whole plan is known before anything
runs. Only JSON and the digests of files are read: no tokenizer, no problem, no user code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import prompts
from pipeline import checks
from pipeline.identity import Payload, changes, digest_file, digest_model, key_of
from pipeline.recipe import DatasetProblem, FileProblem, Recipe, nearest
from pipeline.registry import Artifact, Registry
from stages import STAGES
from stages.config import Config, Frozen, StageConfig, identity_values
from stages.evaluate import EvaluateConfig
from stages.job import BadInput, Dtype, Format, RowRange, parse_rows
from stages.problems import PROBLEMS
from stages.sft import SftConfig

SAMPLER = "transformers"
"""What generates; part of the key, because another one gives other completions."""
TRAINED = ("sft", "grpo")
"""Kinds that make a policy; what they train (lora) is part of their key."""
EVALUATION_SEED = 0
"""Every policy of every seed is evaluated on the same rows with the same seed."""
REPLICATE_STRIDE = 10_007
"""How far apart the seeds of two replicates are."""


class InputRef(Frozen):
    """What a step reads: an output of an earlier step, or the base model."""

    step: str | None
    """Name of the step; None for a base model that is no step."""
    output: str
    key: str
    """The step's key, or what identifies the base model."""
    source: str
    """Where a base model is from; the step's name otherwise."""


class Step(Frozen):
    """One box: everything a job needs but the places, and its key."""

    name: str
    kind: str
    config: dict[str, Any]
    inputs: dict[str, InputRef]
    problem: dict[str, Any] | None
    rows: RowRange | None
    format: Format
    seed: int
    dtype: Dtype
    deadline: float | None
    """Seconds; None for none."""
    identity: dict[str, Any]
    """What the key is the digest of."""
    key: str

    @property
    def makes_policy(self) -> bool:
        """Whether an evaluate step follows."""
        return self.kind in TRAINED


class Planned(Frozen):
    """A step and what is to be done about it."""

    step: Step
    action: Literal["reuse", "run", "skip"]
    artifact: Artifact | None
    """What is reused."""
    why: str


class Selection(NamedTuple):
    """Which boxes may be run; what they need must be there already."""

    only: str | None = None
    start: str | None = None
    """`--from`: this box and all after it."""
    until: str | None = None
    """The last box."""


ALL = Selection()


class _Base(NamedTuple):
    """The recipe's model as an input."""

    ref: InputRef
    settings: dict[str, Any]
    """What of `model` is identity beside its bytes: dtype, lora."""


def plan(recipe: Recipe, registry: Registry, selection: Selection = ALL) -> list[Planned]:
    """What `run` would do. Raises BadInput for a recipe that does not hold together, or when a selected step needs one that is not there."""
    checks.check(recipe)
    chosen = _chosen(recipe, selection)
    artifacts = cache(registry.artifacts)  # read once, and only when something has to be explained
    planned = [
        _decide(step, registry, artifacts, step.name.partition(".")[0] in chosen) for step in steps(recipe, registry)
    ]
    there = {one.step.name for one in planned if one.action != "skip"}
    for one in planned:
        missing = [ref.step for ref in one.step.inputs.values() if ref.step and ref.step not in there]
        if one.action == "run" and missing:
            raise BadInput(
                f"{one.step.name} reads {missing[0]}, which is neither in {registry.root} nor selected to run; run {missing[0]} first"
            )
    return planned


def freshen(recipe: Recipe, registry: Registry, name: str, selection: Selection = ALL) -> Recipe:
    """The recipe with the stage's replicate raised to the first that the registry does not have. Raises BadInput for a stage that is unknown
    or not selected."""
    checks.check(recipe)
    _index(recipe, name)
    if name not in _chosen(recipe, selection):
        raise BadInput(f"--fresh {name}: {name} is not selected to run; select it too")
    base = _base(recipe, registry)
    while True:
        stages = tuple(
            stage.model_copy(update={"replicate": stage.replicate + 1}) if stage.name == name else stage
            for stage in recipe.stages
        )
        recipe = recipe.model_copy(update={"stages": stages})
        step = next(step for step in _steps(recipe, base) if step.name == name)
        if registry.find(step.key) is None:
            return recipe


def steps(recipe: Recipe, registry: Registry) -> list[Step]:
    """The recipe's steps in order, evaluations included."""
    return _steps(recipe, _base(recipe, registry))


def _steps(recipe: Recipe, base: _Base) -> list[Step]:
    format = _format(recipe)
    made: dict[str, Step] = {}
    ordered = [_evaluation(recipe, base, format, base.ref, checks.BASE)]
    for stage in recipe.stages:
        step = made[stage.name] = _step(recipe, base, format, stage, made)
        ordered.append(step)
        if step.makes_policy:
            ordered.append(_evaluation(recipe, base, format, _output(step, "policy"), step.name))
    return ordered


def _step(recipe: Recipe, base: _Base, format: Format, stage: SftConfig | StageConfig, made: dict[str, Step]) -> Step:
    """One box of the recipe."""
    inputs = {"policy": base.ref if stage.policy == checks.BASE else _output(made[stage.policy], "policy")}
    text = checks.rows_of(recipe, stage)  # type: ignore[arg-type]
    if isinstance(stage, SftConfig) and text is None:
        inputs["data"] = _output(made[stage.data], "data")
    rows = parse_rows(text, recipe.seed) if text else None
    problem = None if "data" in inputs else recipe.problem
    kind: str = stage.kind  # type: ignore[attr-defined]
    payload = _payload(kind, stage, inputs, base, format, problem, rows, recipe.seed, stage.replicate)
    return Step(
        name=stage.name,
        kind=kind,
        config=stage.model_dump(mode="json"),
        inputs=inputs,
        problem=problem.model_dump(mode="json") if problem else None,
        rows=rows,
        format=format,
        seed=recipe.seed + REPLICATE_STRIDE * stage.replicate,
        dtype=recipe.model.dtype,
        deadline=stage.deadline or recipe.deadline,
        identity=payload,
        key=key_of(payload),
    )


def _evaluation(recipe: Recipe, base: _Base, format: Format, policy: InputRef, of: str) -> Step:
    """The evaluate step of a policy."""
    config = EvaluateConfig(**dict(recipe.evaluate), validation=recipe.validation)
    inputs = {"policy": policy}
    payload = _payload("evaluate", config, inputs, base, format, recipe.problem, None, EVALUATION_SEED, 0)
    return Step(
        name=f"{of}.evaluate",
        kind="evaluate",
        config=config.model_dump(mode="json"),
        inputs=inputs,
        problem=recipe.problem.model_dump(mode="json"),
        rows=None,
        format=format,
        seed=EVALUATION_SEED,
        dtype=recipe.model.dtype,
        deadline=recipe.deadline,
        identity=payload,
        key=key_of(payload),
    )


def _payload(
    kind: str,
    config: Config,
    inputs: dict[str, InputRef],
    base: _Base,
    format: Format,
    problem: Config | None,
    rows: RowRange | None,
    seed: int,
    replicate: int,
) -> Payload:
    """Everything that decides what the step makes."""
    return {
        "kind": kind,
        "version": STAGES[kind].version,
        "config": identity_values(config),
        "inputs": {role: {"key": ref.key, "output": ref.output} for role, ref in inputs.items()},
        "model": base.settings if kind in TRAINED else {"dtype": base.settings["dtype"]},
        "problem": _problem_identity(problem) if problem else None,
        "rows": rows.model_dump() if rows else None,
        "format": {name: getattr(format, name) for name in ("system_prompt", "user_template", "response_prefix")},
        "sampler": None if kind == "sft" else SAMPLER,
        "seed": seed,
        "replicate": replicate,
    }


def _base(recipe: Recipe, registry: Registry) -> _Base:
    """What identifies the base model, and where it is from."""
    model, settings = recipe.model, identity_values(recipe.model)
    if model.artifact:
        artifact = registry.open(model.artifact)
        if "policy" not in artifact.outputs:
            raise BadInput(f"model.artifact: {artifact.id} is of kind {artifact.kind} and holds no policy")
        return _Base(
            InputRef(step=None, output="policy", key=artifact.key, source=str(registry.path(artifact, "policy"))),
            settings,
        )
    if model.hub:
        revision = f"@{model.revision}" if model.revision else ""
        identity: Payload = {"hub": model.hub, "revision": model.revision}
        return _Base(
            InputRef(step=None, output="policy", key=key_of(identity), source=f"hf://{model.hub}{revision}"), settings
        )
    path = Path(str(model.path)).absolute()
    return _Base(InputRef(step=None, output="policy", key=digest_model(path), source=str(path)), settings)


def _format(recipe: Recipe) -> Format:
    prompt = prompts.load(recipe.format.prompt)
    return Format(
        prompt=prompt.name,
        prompt_digest=prompt.digest,
        system_prompt=prompt.system_prompt,
        user_template=prompt.user_template,
        response_prefix=recipe.format.response_prefix,
    )


def _problem_identity(problem: Config) -> Payload:
    """A built-in problem by name, version and settings; user code and local data by the digest of their bytes."""
    if isinstance(problem, FileProblem):
        return {"file": digest_file(Path(problem.file))}
    if isinstance(problem, DatasetProblem):
        rewards = [_reward_identity(reward) for reward in problem.rewards]
        path = Path(problem.dataset)
        return {
            "dataset": digest_file(path) if path.is_file() else problem.dataset,
            **identity_values(problem),
            "rewards": rewards,
        }
    return {"version": PROBLEMS[problem.name].version, **identity_values(problem)}  # type: ignore[attr-defined]


def _reward_identity(reward: str) -> str:
    file, colon, function = reward.rpartition(":")
    return f"{digest_file(Path(file))}:{function}" if colon and Path(file).is_file() else reward


def _output(step: Step, output: str) -> InputRef:
    return InputRef(step=step.name, output=output, key=step.key, source=step.name)


def _chosen(recipe: Recipe, selection: Selection) -> set[str]:
    """Names of the boxes that may run; `base` stands for its evaluation."""
    names = [checks.BASE, *(stage.name for stage in recipe.stages)]
    if selection.only and (selection.start or selection.until):
        raise BadInput("--only names one stage; --from and --until name a range; give one or the other")
    if selection.only:
        return {names[_index(recipe, selection.only)]}
    first = _index(recipe, selection.start) if selection.start else 0
    last = _index(recipe, selection.until) if selection.until else len(names) - 1
    if first > last:
        raise BadInput(f"--from {selection.start} comes after --until {selection.until}; nothing is between them")
    return set(names[first : last + 1])


def _index(recipe: Recipe, name: str) -> int:
    names = [checks.BASE, *(stage.name for stage in recipe.stages)]
    if name not in names[1:]:
        raise BadInput(f"no stage is named {name}{nearest(name, names[1:])}")
    return names.index(name)


def _decide(step: Step, registry: Registry, artifacts: Callable[[], list[Artifact]], may_run: bool) -> Planned:
    if artifact := registry.find(step.key):
        return Planned(step=step, action="reuse", artifact=artifact, why=artifact.id)
    if not may_run:
        return Planned(step=step, action="skip", artifact=None, why="not selected")
    return Planned(step=step, action="run", artifact=None, why=reason(step, artifacts()))


def reason(step: Step, artifacts: Sequence[Artifact]) -> str:
    """Why a step is run: new, input changed, or which field changed from what to what against the nearest earlier artifact of the stage."""
    earlier = [artifact for artifact in artifacts if artifact.stage == step.name and artifact.kind == step.kind]
    if not earlier:
        return "new"
    diffs = [(changes(artifact.identity, step.identity), artifact) for artifact in reversed(earlier)]
    diff, closest = min(diffs, key=lambda pair: len(pair[0]))
    if not diff:
        return f"{closest.id} is there, but the registry no longer gives it for this key"
    return "; ".join(_said(diff, step)) + f" (against {closest.id})"


def _said(diff: dict[str, tuple[Any, Any]], step: Step) -> Iterator[str]:
    for field, (before, after) in diff.items():
        if field.startswith("inputs."):
            role = field.split(".")[1]
            yield (
                f"input changed: {role} ({step.inputs[role].source})" if role in step.inputs else f"input gone: {role}"
            )
        else:
            yield f"{field.removeprefix('config.')}: {before!r} -> {after!r}"

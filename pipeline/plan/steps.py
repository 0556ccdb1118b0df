"""The steps of a recipe, with their keys: everything that is to be computed, before anybody looks at what has been.

An evaluate step is put after the base and after every policy. Keys chain through the keys of inputs. Only JSON and the
digests of files are read: no tokenizer, no problem, no user code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.plan.digest_cache import digest_once
from pipeline.recipe import formats
from pipeline.recipe.recipe import Box, DatasetProblem, FileProblem, ProblemSettings, Recipe
from pipeline.registry import Registry
from pipeline.registry.aliases import resolve
from pipeline.registry.keys import Payload, digest_file, digest_model, key_of
from stages.config import Config, Frozen, identity_values
from stages.errors import BadInput
from stages.evaluate import EVALUATE, EvaluateConfig
from stages.job import Dtype, Format, Lora, RowRange, Sampler, parse_rows
from stages.kinds import STAGES
from stages.policy import positions
from stages.problems.catalog import PROBLEMS
from stages.problems.custom.settings import ALIASES, RewardSettings
from stages.stage import BASE

EVALUATION_SEED = 0
"""Every policy of every seed is evaluated on the same rows with the same seed."""
CONFIG = "config.json"
"""Where a model says of what architecture it is."""
REPLICATE_STRIDE = 10_007
"""How far apart the seeds of two replicates are."""


class InputRef(Frozen):
    """What a step reads: an output of an earlier step, the base model, or a file of rows."""

    step: str | None
    """Name of the step; None for a base model or a file of rows."""
    output: str
    key: str
    """The step's key, or what identifies the base model or the file."""
    source: str
    """Where a base model or a file is from; the step's name otherwise."""
    artifact: str | None = None
    """Id of a base model that is an artifact; None for any other."""


class Step(Frozen):
    """One stage or evaluation: everything a job needs but the places, and its key."""

    name: str
    kind: str
    config: Config
    inputs: dict[str, InputRef]
    problem: dict[str, Any] | None
    rows: RowRange | None
    format: Format
    seed: int
    dtype: Dtype
    lora: Lora | None
    own_positions: bool
    sampler: Sampler
    deadline: float | None
    """Seconds; None for none."""
    identity: dict[str, Any]
    """What the key is the digest of."""
    key: str

    @property
    def makes_policy(self) -> bool:
        """Whether an evaluate step follows."""
        return STAGES[self.kind].trains

    @property
    def evaluates(self) -> bool:
        """Whether it is the evaluation of a policy."""
        return self.kind == EVALUATE


class Base(NamedTuple):
    """The recipe's model as an input."""

    ref: InputRef
    settings: dict[str, Any]
    """What of `model` is identity beside its bytes: dtype, lora."""
    format: Format | None
    """What the model was trained with, where switchback made it."""
    own_positions: bool
    """Its architecture needs the own positions of rows that are padded on the left. False for a model on the hub,
    whose config.json is not here: a stage that needs them refuses it."""


def steps(recipe: Recipe, registry: Registry, base: Base | None = None) -> list[Step]:
    """The recipe's steps in order, evaluations included. `base` spares digesting the base model again."""
    base = base or base_of(recipe, registry)
    format = formats.of_base(recipe.format, base.format)
    made: dict[str, Step] = {}
    ordered = [_evaluation(recipe, base, format, base.ref, BASE)]
    for stage in recipe.stages:
        step = made[stage.name] = _step(recipe, base, format, stage, made)
        ordered.append(step)
        if step.makes_policy:
            ordered.append(_evaluation(recipe, base, step.format, _output(step, "policy"), step.name))
    return ordered


def _step(recipe: Recipe, base: Base, base_format: Format, stage: Box, made: dict[str, Step]) -> Step:
    """One stage of the recipe; `base_format` is the base's Format."""
    kind = STAGES[stage.kind]
    policy = None if stage.policy == BASE else made[stage.policy]
    inputs = {"policy": _output(policy, "policy") if policy else base.ref}
    for read in kind.reads(stage):
        inputs[read.role] = _output(made[read.source], read.output) if read.output else _file(read.source)
    maker = made.get(inputs["data"].step or "") if "data" in inputs else None
    data = (maker.name, maker.format) if maker else None
    format = formats.of_stage(stage.name, stage.format, policy.format if policy else base_format, data)
    rows = kind.rows(stage, {other.name: other for other in recipe.stages})
    work = _Work(
        kind=stage.kind,
        config=stage,
        inputs=inputs,
        problem=None if "data" in inputs else recipe.problem,
        rows=parse_rows(rows, recipe.seed) if rows else None,
        format=format,
        seed=recipe.seed,
        replicate=stage.replicate,
    )
    return _planned(stage.name, work, recipe, base, stage.deadline)


def _evaluation(recipe: Recipe, base: Base, format: Format, policy: InputRef, of: str) -> Step:
    """The evaluate step of a policy."""
    config = EvaluateConfig(**dict(recipe.evaluate), validation=recipe.validation)
    work = _Work(EVALUATE, config, {"policy": policy}, recipe.problem, None, format, EVALUATION_SEED, 0)
    return _planned(f"{of}.{EVALUATE}", work, recipe, base, None)


class _Work(NamedTuple):
    """What a step computes, but for what is the same in all steps of a recipe."""

    kind: str
    config: Config
    inputs: dict[str, InputRef]
    problem: ProblemSettings | None
    rows: RowRange | None
    format: Format
    seed: int
    """The recipe's."""
    replicate: int


def _planned(name: str, work: _Work, recipe: Recipe, base: Base, deadline: float | None) -> Step:
    payload = _payload(work, base, recipe.sampler)
    return Step(
        name=name,
        kind=work.kind,
        config=work.config,
        inputs=work.inputs,
        problem=work.problem.model_dump(mode="json") if work.problem else None,
        rows=work.rows,
        format=work.format,
        seed=work.seed + REPLICATE_STRIDE * work.replicate,
        dtype=recipe.model.dtype,
        lora=recipe.model.lora if STAGES[work.kind].trains else None,
        own_positions=base.own_positions and STAGES[work.kind].pads_left,
        sampler=recipe.sampler,
        deadline=deadline or recipe.deadline,
        identity=payload,
        key=key_of(payload),
    )


def _payload(work: _Work, base: Base, sampler: Sampler) -> Payload:
    """Everything that decides what the step makes."""
    kind = STAGES[work.kind]
    model = base.settings if kind.trains else {"dtype": base.settings["dtype"]}
    if base.own_positions and kind.pads_left:
        model = {**model, "own_positions": True}
    return {
        "kind": work.kind,
        "version": kind.version,
        "config": identity_values(work.config),
        "inputs": {role: {"key": ref.key, "output": ref.output} for role, ref in work.inputs.items()},
        "model": model,
        "problem": _problem_identity(work.problem) if work.problem else None,
        "rows": work.rows.model_dump() if work.rows else None,
        "format": formats.identity(work.format),
        "sampler": sampler if kind.samples(work.config) else None,
        "seed": work.seed,
        "replicate": work.replicate,
    }


def base_of(recipe: Recipe, registry: Registry) -> Base:
    """What identifies the base model, and where it is from."""
    model, settings = recipe.model, identity_values(recipe.model)
    if model.artifact:
        artifact = resolve(registry, model.artifact)
        if "policy" not in artifact.outputs:
            raise BadInput(f"model.artifact: {artifact.id} is of kind {artifact.kind} and holds no policy")
        return Base(
            InputRef(
                step=None,
                output="policy",
                key=artifact.key,
                source=registry.location(artifact, "policy"),
                artifact=artifact.id,
            ),
            settings,
            artifact.format,
            _needs_positions(registry.content(artifact, "policy", CONFIG), artifact.id),
        )
    if model.hub:
        revision = f"@{model.revision}" if model.revision else ""
        identity: Payload = {"hub": model.hub, "revision": model.revision}
        source = f"hf://{model.hub}{revision}"
        return Base(InputRef(step=None, output="policy", key=key_of(identity), source=source), settings, None, False)
    path = Path(str(model.path)).absolute()
    ref = InputRef(step=None, output="policy", key=digest_model(path, digest_once), source=str(path))
    found = (path / CONFIG).read_bytes()
    return Base(ref, settings, formats.carried_by(path), _needs_positions(found, str(path)))


def _needs_positions(config: bytes | None, where: str) -> bool:
    """Whether the architecture of a config.json needs the own positions of padded rows. Raises BadInput where it is no
    JSON object."""
    try:
        found = json.loads(config) if config is not None else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise BadInput(f"model: the {CONFIG} of {where} is no JSON object. Fix: save the model again")
    return positions.needed(found)


def _problem_identity(problem: ProblemSettings) -> Payload:
    """A built-in problem by name, version and settings; user code and local data by the digest of their bytes."""
    if isinstance(problem, FileProblem):
        return {"file": digest_file(Path(problem.file)), **identity_values(problem)}
    if isinstance(problem, DatasetProblem):
        rewards = [{**identity_values(reward), "name": _reward_identity(reward)} for reward in problem.components]
        dataset = digest_file(Path(problem.dataset)) if problem.is_file else problem.dataset
        return {"dataset": dataset, **identity_values(problem), "rewards": rewards}
    return {"version": PROBLEMS[problem.name].version, **identity_values(problem)}


def _reward_identity(reward: RewardSettings) -> str:
    """TRL's own by the name they have there; a user's by the bytes of its file."""
    if reward.file:
        return f"{digest_file(Path(reward.file))}:{reward.component}"
    return ALIASES.get(reward.name, reward.name)


def _file(path: str) -> InputRef:
    """A file of rows."""
    return InputRef(step=None, output="rows", key=digest_file(Path(path)), source=str(Path(path).absolute()))


def _output(step: Step, output: str) -> InputRef:
    return InputRef(step=step.name, output=output, key=step.key, source=step.name)

"""The steps of a recipe, with their keys: everything that is to be computed, before anybody looks at what has been.

An evaluate step is put after the base and after every policy. Keys chain through the keys of inputs. Only JSON and the digests of files are read: no
tokenizer, no problem, no user code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from pipeline.plan.digest_cache import digest_once
from pipeline.recipe import checks, formats
from pipeline.recipe.recipe import BASE, Box, DatasetProblem, FileProblem, ProblemSettings, Recipe
from pipeline.registry import Registry
from pipeline.registry.aliases import resolve
from pipeline.registry.keys import Payload, digest_file, digest_model, key_of
from stages.config import Config, Frozen, identity_values
from stages.errors import BadInput
from stages.evaluate import EvaluateConfig
from stages.grpo import GrpoConfig
from stages.job import Dtype, Format, Lora, RowRange, Sampler, parse_rows
from stages.kinds import STAGES
from stages.problems.catalog import PROBLEMS
from stages.problems.custom.settings import ALIASES, RewardSettings
from stages.rejection import RejectionConfig
from stages.sft import SftConfig

TRAINED = ("sft", "grpo")
"""Kinds that make a policy; what they train (lora) is part of their key."""
EVALUATION_SEED = 0
"""Every policy of every seed is evaluated on the same rows with the same seed."""
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
    lora: Lora | None
    sampler: Sampler
    deadline: float | None
    """Seconds; None for none."""
    identity: dict[str, Any]
    """What the key is the digest of."""
    key: str

    @property
    def makes_policy(self) -> bool:
        """Whether an evaluate step follows."""
        return self.kind in TRAINED


class Base(NamedTuple):
    """The recipe's model as an input."""

    ref: InputRef
    settings: dict[str, Any]
    """What of `model` is identity beside its bytes: dtype, lora."""
    format: Format | None
    """What the model was trained with, where switchback made it."""


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
    """One box of the recipe; `base_format` is the base's Format."""
    inputs = {"policy": base.ref if stage.policy == BASE else _output(made[stage.policy], "policy")}
    text = checks.rows_of(recipe, stage)
    data = None
    if isinstance(stage, SftConfig) and text is None:
        name, output = checks.data_of(stage)
        maker = made.get(name)
        inputs["data"] = _output(maker, output) if maker else _file(stage.data)
        data = (maker.name, maker.format) if maker else None
    if isinstance(stage, RejectionConfig) and stage.source != "fresh":
        inputs["training"] = _output(made[stage.policy], "rollouts")
    if isinstance(stage, SftConfig | GrpoConfig) and stage.mix:
        inputs["mix"] = _file(stage.mix.data)
    policy_format = base_format if stage.policy == BASE else made[stage.policy].format
    format = formats.of_stage(stage.name, stage.format, policy_format, data)
    rows = parse_rows(text, recipe.seed) if text else None
    problem = None if "data" in inputs else recipe.problem
    payload = _payload(
        stage.kind, stage, inputs, base, format, problem, rows, recipe.sampler, recipe.seed, stage.replicate
    )
    return Step(
        name=stage.name,
        kind=stage.kind,
        config=stage.model_dump(mode="json"),
        inputs=inputs,
        problem=problem.model_dump(mode="json") if problem else None,
        rows=rows,
        format=format,
        seed=recipe.seed + REPLICATE_STRIDE * stage.replicate,
        dtype=recipe.model.dtype,
        lora=recipe.model.lora if stage.kind in TRAINED else None,
        sampler=recipe.sampler,
        deadline=stage.deadline or recipe.deadline,
        identity=payload,
        key=key_of(payload),
    )


def _evaluation(recipe: Recipe, base: Base, format: Format, policy: InputRef, of: str) -> Step:
    """The evaluate step of a policy."""
    config = EvaluateConfig(**dict(recipe.evaluate), validation=recipe.validation)
    inputs = {"policy": policy}
    payload = _payload(
        "evaluate", config, inputs, base, format, recipe.problem, None, recipe.sampler, EVALUATION_SEED, 0
    )
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
        lora=None,
        sampler=recipe.sampler,
        deadline=recipe.deadline,
        identity=payload,
        key=key_of(payload),
    )


def _payload(
    kind: str,
    config: Config,
    inputs: dict[str, InputRef],
    base: Base,
    format: Format,
    problem: ProblemSettings | None,
    rows: RowRange | None,
    sampler: Sampler,
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
        "format": formats.identity(format),
        "sampler": sampler if _samples(kind, config) else None,
        "seed": seed,
        "replicate": replicate,
    }


def _samples(kind: str, config: Config) -> bool:
    """Whether the recipe's sampler is asked for anything."""
    return kind not in TRAINED and getattr(config, "source", None) != "training"


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
        )
    if model.hub:
        revision = f"@{model.revision}" if model.revision else ""
        identity: Payload = {"hub": model.hub, "revision": model.revision}
        source = f"hf://{model.hub}{revision}"
        return Base(InputRef(step=None, output="policy", key=key_of(identity), source=source), settings, None)
    path = Path(str(model.path)).absolute()
    ref = InputRef(step=None, output="policy", key=digest_model(path, digest_once), source=str(path))
    return Base(ref, settings, formats.carried_by(path))


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

"""The steps of a recipe, with their keys: everything that is to be computed, before anybody looks at what has been.

An evaluate step is put after the base and after every policy. Keys chain through the keys of inputs. Only JSON and the
digests of files are read: no tokenizer, no problem, no user code."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.plan import tokenizers, user_files
from pipeline.plan.base import Base, InputRef, base_of
from pipeline.plan.digest_cache import digest_once
from pipeline.plan.user_files import Digest, UserFile
from pipeline.recipe import formats
from pipeline.recipe.recipe import Box, DatasetProblem, FileProblem, ProblemSettings, Recipe
from pipeline.registry import Registry
from pipeline.registry.keys import Payload, key_of
from stages.config import Config, Frozen, identity_values
from stages.evaluate import EVALUATE, EvaluateConfig
from stages.job import Dtype, Evaluated, Format, Lora, RowRange, Sampler, parse_rows
from stages.kinds import STAGES
from stages.problems.catalog import PROBLEMS
from stages.problems.custom.settings import VERSION, RewardSettings
from stages.stage import BASE, Stage
from stages.training import NO_MIX

EVALUATION_SEED = 0
"""Every policy of every seed is evaluated on the same rows with the same seed."""
REPLICATE_STRIDE = 10_007
"""How far apart the seeds of two replicates are."""


class Step(Frozen):
    """One stage or evaluation: everything a job needs but the places, and its key."""

    name: str
    kind: str
    config: Config
    inputs: dict[str, InputRef]
    files: tuple[UserFile, ...]
    """The user's files that it reads, with the digests that are in its key."""
    problem: dict[str, Any] | None
    rows: RowRange | None
    evaluated: Evaluated | None
    """What its policy is scored on; None for a step that does not train."""
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


def steps(recipe: Recipe, registry: Registry, base: Base | None = None) -> list[Step]:
    """The recipe's steps in order, evaluations included. `base` spares digesting the base model again."""
    digest = cache(digest_once)
    base = base or base_of(recipe, registry)
    of_problem = user_files.of_problem(recipe.problem, digest)
    plan = _Plan(recipe, base, digest, of_problem, _problem_identity(recipe.problem, digest))
    format = formats.of_base(recipe.format, base.format)
    made: dict[str, Step] = {}
    ordered = [_evaluation(plan, format, base.ref, BASE)]
    for stage in recipe.stages:
        step = made[stage.name] = _step(plan, format, stage, made)
        ordered.append(step)
        if step.makes_policy:
            ordered.append(_evaluation(plan, step.format, _output(step, "policy"), step.name))
    return ordered


class _Plan(NamedTuple):
    """The same for all steps of a recipe."""

    recipe: Recipe
    base: Base
    digest: Digest
    """Of a user's file; every file is hashed once."""
    of_problem: tuple[UserFile, ...]
    """The files that the problem is made of."""
    problem: Payload
    """What of the problem is part of a key."""


def _step(plan: _Plan, base_format: Format, stage: Box, made: dict[str, Step]) -> Step:
    """One stage of the recipe; `base_format` is the base's Format."""
    recipe, kind = plan.recipe, STAGES[stage.kind]
    policy = None if stage.policy == BASE else made[stage.policy]
    inputs = {"policy": _output(policy, "policy") if policy else plan.base.ref}
    files: list[UserFile] = []
    for read in kind.reads(stage):
        if read.output:
            inputs[read.role] = _output(made[read.source], read.output)
        else:
            files.append(user_files.of_rows(read.source, plan.digest))
            inputs[read.role] = _file(files[-1])
    maker = made.get(inputs["data"].step or "") if "data" in inputs else None
    data = (maker.name, maker.format) if maker else None
    format = formats.of_stage(stage.name, stage.format, policy.format if policy else base_format, data)
    rows = kind.rows(stage, {other.name: other for other in recipe.stages})
    work = _Work(
        kind=stage.kind,
        config=stage,
        inputs=inputs,
        files=files,
        problem=None if "data" in inputs else recipe.problem,
        rows=parse_rows(rows, recipe.seed) if rows else None,
        format=format,
        seed=recipe.seed,
        replicate=stage.replicate,
    )
    return _planned(stage.name, work, plan, stage.deadline)


def _evaluation(plan: _Plan, format: Format, policy: InputRef, of: str) -> Step:
    """The evaluate step of a policy."""
    config = _evaluate_config(plan.recipe)
    work = _Work(EVALUATE, config, {"policy": policy}, [], plan.recipe.problem, None, format, EVALUATION_SEED, 0)
    return _planned(f"{of}.{EVALUATE}", work, plan, None)


def _evaluate_config(recipe: Recipe) -> EvaluateConfig:
    """What every evaluate step of the recipe is given."""
    return EvaluateConfig(**dict(recipe.evaluate), validation=recipe.validation)


class _Work(NamedTuple):
    """What a step computes, but for what is the same in all steps of a recipe."""

    kind: str
    config: Config
    inputs: dict[str, InputRef]
    files: list[UserFile]
    """Of rows; those of the problem come to them."""
    problem: ProblemSettings | None
    rows: RowRange | None
    format: Format
    seed: int
    """The recipe's."""
    replicate: int


def _planned(name: str, work: _Work, plan: _Plan, deadline: float | None) -> Step:
    recipe, kind, payload = plan.recipe, STAGES[work.kind], _payload(work, plan)
    if revised := kind.revised(work.config):
        payload["revised"] = dict(revised)
    if kind.drops_overlap(work.config):
        evaluated = {field: range.model_dump() for field, range in _evaluate_config(recipe).ranges.items()}
        payload["evaluated"] = {"problem": plan.problem, "rows": evaluated}
    reads_problem = work.problem is not None or kind.drops_overlap(work.config)
    return Step(
        name=name,
        kind=work.kind,
        config=work.config,
        inputs=work.inputs,
        files=(*work.files, *(plan.of_problem if reads_problem else ())),
        problem=work.problem.model_dump(mode="json") if work.problem else None,
        rows=work.rows,
        evaluated=_evaluated(recipe) if kind.trains else None,
        format=work.format,
        seed=work.seed + REPLICATE_STRIDE * work.replicate,
        dtype=recipe.model.dtype,
        lora=recipe.model.lora if kind.trains else None,
        own_positions=plan.base.own_positions and kind.pads_left,
        sampler=recipe.sampler,
        deadline=deadline or recipe.deadline,
        identity=payload,
        key=key_of(payload),
    )


def _evaluated(recipe: Recipe) -> Evaluated:
    """The rows that the recipe's policies are scored on."""
    ranges = tuple(_evaluate_config(recipe).ranges.values())
    return Evaluated(problem=recipe.problem.model_dump(mode="json"), ranges=ranges)


def _payload(work: _Work, plan: _Plan) -> Payload:
    """Everything that decides what the step makes."""
    kind, base, sampler = STAGES[work.kind], plan.base, plan.recipe.sampler
    tokens = tokenizers.identity(base.tokenizer, work.format.chat_template, kind, work.config)
    return {
        **({"tokens": tokens} if tokens else {}),
        "kind": work.kind,
        "version": kind.version,
        "config": identity_values(work.config),
        "inputs": {role: {"key": ref.key, "output": ref.output} for role, ref in work.inputs.items()},
        "model": _model_identity(base, kind),
        "problem": _problem_of(work, plan) if work.problem else None,
        "rows": work.rows.model_dump() if work.rows else None,
        "format": formats.identity(work.format),
        "sampler": sampler if kind.samples(work.config) else None,
        "seed": work.seed,
        "replicate": work.replicate,
    }


def _model_identity(base: Base, kind: Stage) -> dict[str, Any]:
    """What of the model is part of a step's key. A step that trains below float32 says that nothing autocasts: before,
    everything did. One that pads an architecture on the left that counts the padding says that it does not any more.
    """
    dtype = base.settings["dtype"]
    model = dict(base.settings) if kind.trains else {"dtype": dtype}
    if kind.trains and dtype != "float32":
        model["mixed_precision"] = NO_MIX
    if base.own_positions and kind.pads_left:
        model["own_positions"] = True
    return model


def _problem_of(work: _Work, plan: _Plan) -> Payload:
    """What of the problem is part of the step's key: the column of a dataset's demonstrations too, where the step is
    trained on them."""
    if isinstance(work.problem, DatasetProblem) and STAGES[work.kind].demonstrates(work.config):
        return {**plan.problem, "gold": work.problem.gold}
    return plan.problem


def _problem_identity(problem: ProblemSettings, digest: Digest) -> Payload:
    """A built-in problem by name, version and settings; user code and local data by the digest of their bytes."""
    if isinstance(problem, FileProblem):
        code = {"file": digest(Path(problem.file).absolute()), **user_files.modules_identity(problem.file, digest)}
        return {"version": VERSION, **code, **identity_values(problem), **user_files.opened_identity(problem, digest)}
    if isinstance(problem, DatasetProblem):
        rewards = [_reward_identity(reward, digest) for reward in problem.components]
        dataset = digest(Path(problem.dataset).absolute()) if problem.is_file else problem.dataset
        identity = {"version": VERSION, "dataset": dataset, **identity_values(problem), "rewards": rewards}
        return {**identity, **user_files.opened_identity(problem, digest)}
    return {"version": PROBLEMS[problem.name].version, **identity_values(problem)}


def _reward_identity(reward: RewardSettings, digest: Digest) -> Payload:
    """TRL's own by the name they have in logs; a user's by the bytes of its file and of its local modules."""
    if not reward.file:
        return {**identity_values(reward), "name": reward.component}
    name = f"{digest(Path(reward.file).absolute())}:{reward.component}"
    return {**identity_values(reward), "name": name, **user_files.modules_identity(reward.file, digest)}


def _file(file: UserFile) -> InputRef:
    """A file of rows."""
    return InputRef(step=None, output="rows", key=file.sha256, source=str(file.path))


def _output(step: Step, output: str) -> InputRef:
    return InputRef(step=step.name, output=output, key=step.key, source=step.name)

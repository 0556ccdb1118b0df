"""Everything that can be judged about a recipe without an accelerator, a tokenizer or user code.

`check` is the first thing `plan` and `run` do: a recipe that passes can be planned. It raises BadInput: what was
found, what was expected, what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

import prompts
from pipeline.recipe import bounds
from pipeline.recipe.recipe import Box, DatasetProblem, FileProblem, Recipe
from pipeline.recipe.validation_errors import nearest
from stages.config import RESERVED_NAMES, FormatSettings
from stages.errors import BadInput
from stages.kinds import STAGES
from stages.problems.custom.settings import NAME_GOLD
from stages.stage import BASE, ROWS
from stages.training import NO_MIX

ADAPTER = "adapter_config.json"
"""What makes `from_pretrained` load another model first, and its digest would not know that one."""
HUB_MODEL = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
"""What a model on the hub is called; the oldest have no owner."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
"""What a dataset on the hub is called; what has such a name and is a path here is none."""


def check(recipe: Recipe) -> None:
    """Raise BadInput for the first thing that cannot be planned."""
    _names(recipe)
    for i, stage in enumerate(recipe.stages):
        _inputs(recipe, i)
        STAGES[stage.kind].check(stage, {earlier.name: earlier for earlier in recipe.stages[:i]}, recipe.seed)
        _batch_divides(stage, recipe)
    _trainable(recipe)
    _files(recipe)


def _names(recipe: Recipe) -> None:
    seen: set[str] = set()
    for stage in recipe.stages:
        if stage.name in RESERVED_NAMES:
            raise BadInput(f"stages: the name {stage.name} is reserved ({', '.join(RESERVED_NAMES)}); choose another")
        if stage.name in seen:
            raise BadInput(f"stages: two stages are named {stage.name}; rename one")
        seen.add(stage.name)


def _inputs(recipe: Recipe, i: int) -> None:
    """A stage reads earlier stages that make what it needs."""
    stage = recipe.stages[i]
    _known(recipe, i, "policy", stage.policy, [BASE, *_makers(recipe, i, "policy")])
    for read in STAGES[stage.kind].reads(stage):
        if read.output is not None and read.field != "policy":
            _known(recipe, i, read.role, read.source, [*read.instead, *_makers(recipe, i, read.role)])


def _makers(recipe: Recipe, i: int, output: str) -> list[str]:
    """The stages before the one at `i` that make an output."""
    return [stage.name for stage in recipe.stages[:i] if output in STAGES[stage.kind].makes(stage)]


def _known(recipe: Recipe, i: int, role: str, name: str, known: list[str]) -> None:
    if name in known:
        return
    where = f"stages.{recipe.stages[i].name}.{role}"
    if name in [later.name for later in recipe.stages[i:]]:
        raise BadInput(f"{where}: {name} does not come before it; a stage reads earlier ones, so move {name} up")
    if name in [earlier.name for earlier in recipe.stages[:i]]:
        raise BadInput(f"{where}: {name} makes no {role}; there is {', '.join(known)}")
    raise BadInput(f"{where}: there is nothing called {name}{nearest(name, known)}")


def _batch_divides(stage: Box, recipe: Recipe) -> None:
    """A step's batch is made of whole micro-batches; the arithmetic is in the message."""
    batch = STAGES[stage.kind].batch(stage)
    processes, micro = recipe.launch.processes, recipe.launch.micro_batch
    unit = processes * (micro or 1)
    if batch and batch.size % unit:
        by = f"processes={processes}" + (f" x micro_batch={micro} (={unit})" if micro else "")
        raise BadInput(f"stages.{stage.name}: {batch.formula} does not divide by {by}; change one of them")


def _files(recipe: Recipe) -> None:
    if recipe.model.path:
        _model(Path(recipe.model.path))
    if recipe.model.hub and not HUB_MODEL.fullmatch(recipe.model.hub):
        raise BadInput(f"model.hub: found {recipe.model.hub!r:.200}, expected owner/name, such as Qwen/Qwen3-0.6B")
    for where, settings in _formats(recipe):
        try:
            prompts.load(settings.prompt or "plain")
        except ValueError as error:
            raise BadInput(f"{where}.prompt: {error}") from None
        if settings.chat_template:
            _is_file(f"{where}.chat_template", settings.chat_template)
    for stage in recipe.stages:
        for read in STAGES[stage.kind].reads(stage):
            if read.output is None:
                _is_file(f"stages.{stage.name}.{read.field}", read.source)
    _problem(recipe)
    if recipe.launch.accelerate:
        _is_file("launch.accelerate", recipe.launch.accelerate)
        _accelerate_agrees(recipe, Path(recipe.launch.accelerate))


def _model(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise BadInput(
            f"model.path: {path} holds no config.json; expected a model directory (paths count from {Path.cwd()})"
        )
    if (path / ADAPTER).is_file():
        raise BadInput(
            f"model.path: {path} is an adapter (found {ADAPTER}), which names another model. Fix: merge it into that "
            "model, and give the merged one"
        )


def _problem(recipe: Recipe) -> None:
    """The files of a problem of the user's own."""
    problem = recipe.problem
    if isinstance(problem, FileProblem):
        _is_file("problem.file", problem.file)
    if isinstance(problem, DatasetProblem):
        _dataset(recipe, problem)
    for path in problem.files if isinstance(problem, (FileProblem, DatasetProblem)) else ():
        if not Path(path).exists():
            raise BadInput(f"problem.files: {path} is not there (paths count from {Path.cwd()})")


def _dataset(recipe: Recipe, problem: DatasetProblem) -> None:
    """Its files are there, and nothing asks it for what it does not have."""
    if problem.is_file:
        _is_file("problem.dataset", problem.dataset)
    elif not HUB_ID.fullmatch(problem.dataset) or Path(problem.dataset).exists():
        raise BadInput(
            f"problem.dataset: found {problem.dataset!r}, expected a file whose name ends in {ROWS}, or a dataset on "
            f"the hub by owner and name, such as openai/gsm8k"
        )
    for reward in problem.components:
        if reward.file:
            _is_file(f"problem.rewards: {reward.name}", reward.file)
    for stage in recipe.stages:
        if STAGES[stage.kind].demonstrates(stage) and not problem.gold:
            raise BadInput(
                f"stages.{stage.name}.data: a dataset has no demonstrations without a gold column; {NAME_GOLD}"
            )


def _formats(recipe: Recipe) -> Iterator[tuple[str, FormatSettings]]:
    """Each place of a recipe that sets a Format, and its settings."""
    yield "format", recipe.format
    yield from ((f"stages.{stage.name}.format", stage.format) for stage in recipe.stages if stage.format)


def _is_file(where: str, path: str) -> None:
    if not Path(path).is_file():
        raise BadInput(f"{where}: {path} is not there (paths count from {Path.cwd()})")


def _accelerate_agrees(recipe: Recipe, path: Path) -> None:
    """An accelerate config says how many processes there are and how precisely they compute, and so does the recipe."""
    try:
        config = bounds.load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"launch.accelerate: {path} cannot be read: {' '.join(str(error).split())}") from None
    found = config.get("num_processes") if isinstance(config, dict) else None
    if found != recipe.launch.processes:
        raise BadInput(
            f"launch.accelerate: {path} is for num_processes: {found}, but launch.processes is "
            f"{recipe.launch.processes}; make them agree"
        )
    mixed = config.get("mixed_precision") or NO_MIX  # a bare `no` is False in YAML
    if mixed != NO_MIX:
        raise BadInput(
            f"launch.accelerate: {path} asks for mixed precision (found mixed_precision: {mixed}, expected no). Fix: "
            f"set it to 'no'; model.dtype, {recipe.model.dtype} here, is the precision of every stage"
        )
    deepspeed = config.get("deepspeed_config")
    if isinstance(deepspeed, dict) and deepspeed.get("deepspeed_config_file"):
        raise BadInput(
            f"launch.accelerate: {path} names a DeepSpeed file, which could choose another optimiser or schedule than "
            f"the stage (found deepspeed_config_file, expected zero_stage and its like). Fix: write the settings out"
        )
    if config.get("distributed_type") == "DEEPSPEED" and recipe.model.dtype != "float32":
        raise BadInput(
            f"launch.accelerate: DeepSpeed trains a {recipe.model.dtype} policy with float32 masters only, which is "
            f"mixed precision (found model.dtype {recipe.model.dtype}, expected float32). Fix: use FSDP, or float32"
        )


def _trainable(recipe: Recipe) -> None:
    """AdamW's epsilon is 0 in float16, and gradients vanish without a loss scale."""
    trained = [stage.name for stage in recipe.stages if STAGES[stage.kind].trains]
    if recipe.model.dtype == "float16" and trained:
        raise BadInput(
            f"model.dtype: {trained[0]} cannot be trained in float16 (found float16, expected float32 or bfloat16). "
            f"Fix: set model.dtype to bfloat16"
        )

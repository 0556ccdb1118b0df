"""Everything that can be judged about a recipe without an accelerator, a tokenizer or user code.

`check` is the first thing `plan` and `run` do: what it lets through can be planned. `refuse_unbuilt` names the first field whose work comes later, so
that nothing a recipe says is silently ignored. Both raise BadInput: what was found, what was expected, what to do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import yaml

import prompts
from pipeline.recipe.recipe import BASE, ROWS, Box, DatasetProblem, FileProblem, Recipe
from pipeline.recipe.validation_errors import nearest
from stages.config import RESERVED_NAMES, FormatSettings
from stages.errors import BadInput
from stages.grpo import GrpoConfig
from stages.job import RowRange, parse_rows
from stages.rejection import CONTROL, RejectionConfig
from stages.sft import DEMONSTRATIONS, SftConfig

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
"""What a dataset on the hub is called; what has such a name and is a path here is none."""
DEFAULT_DEMONSTRATIONS = "train[0:1000]"


def check(recipe: Recipe) -> None:
    """Raise BadInput for the first thing that cannot be planned."""
    _names(recipe)
    for i, stage in enumerate(recipe.stages):
        _inputs(recipe, i)
        if stage.rows is not None:
            _rows_fit(stage.name, stage, recipe)
        _batch_divides(stage, recipe)
    _files(recipe)


def refuse_unbuilt(recipe: Recipe) -> None:
    """Raise BadInput for the first field that parses but that this version cannot act on."""
    for name, asked in UNBUILT.items():
        if asked(recipe):
            raise BadInput(
                f"{name} comes in a later version of switchback and would have no effect here; remove it to run this recipe"
            )
    for stage in recipe.stages:
        if stage.gate:
            raise BadInput(
                f"stages.{stage.name}.gate comes in a later version of switchback; remove it to run this recipe"
            )
        if isinstance(stage, GrpoConfig) and stage.kl.reference != "policy":
            raise BadInput(
                f"stages.{stage.name}.kl.reference: found {stage.kl.reference!r}, but this version only has 'policy'; remove it to run this recipe"
            )


UNBUILT: dict[str, Callable[[Recipe], bool]] = {
    "track.wandb": lambda recipe: recipe.track.wandb is not None,
}
"""What parses and plans, and whether a recipe asks for it."""


def rows_of(recipe: Recipe, stage: Box) -> str | None:
    """The rows a stage works on: its own, else what follows from its data or policy; None for an sft stage whose rows another stage made."""
    if stage.rows:
        return stage.rows
    if isinstance(stage, SftConfig):
        return DEFAULT_DEMONSTRATIONS if stage.data == DEMONSTRATIONS else None
    policy = next((other for other in recipe.stages if other.name == stage.policy), None)
    if isinstance(policy, GrpoConfig):
        return policy.rows
    raise BadInput(
        f"stages.{stage.name}.rows is missing, and its policy {stage.policy} is no grpo stage to take them from; say which rows to sample"
    )


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
    makers = [BASE, *(earlier.name for earlier in recipe.stages[:i] if not isinstance(earlier, RejectionConfig))]
    _known(recipe, i, "policy", stage.policy, makers)
    if isinstance(stage, SftConfig) and not stage.data.endswith(ROWS):
        harvests = [earlier for earlier in recipe.stages[:i] if isinstance(earlier, RejectionConfig)]
        name, output = data_of(stage)
        _known(recipe, i, "data", name, [DEMONSTRATIONS, *(earlier.name for earlier in harvests)])
        if ":" in stage.data:
            _is_control(stage, name, output, [earlier.name for earlier in harvests if earlier.control])
    if isinstance(stage, RejectionConfig) and stage.source != "fresh":
        _has_a_log(recipe, stage)
    rows_of(recipe, stage)


def _is_control(stage: SftConfig, name: str, output: str, controls: Sequence[str]) -> None:
    where = f"stages.{stage.name}.data"
    if output != CONTROL:
        raise BadInput(f"{where}: found {stage.data}, but a stage trains on {name} or {name}:{CONTROL}")
    if name not in controls:
        raise BadInput(f"{where}: there is no {stage.data}; a rejection stage with control: random makes one")


def data_of(stage: SftConfig) -> tuple[str, str]:
    """(stage, output) that `data: harvest` or `data: harvest:control` names."""
    name, _, output = stage.data.partition(":")
    return name, output or "data"


def _has_a_log(recipe: Recipe, stage: RejectionConfig) -> None:
    """Only a grpo stage logs what it samples, dressed in its own Format."""
    if not any(isinstance(other, GrpoConfig) and other.name == stage.policy for other in recipe.stages):
        raise BadInput(
            f"stages.{stage.name}.source: found {stage.source!r}, but its policy {stage.policy} is no grpo stage, which would have logged what it sampled; set source: fresh"
        )
    trained = next(other for other in recipe.stages if isinstance(other, GrpoConfig) and other.name == stage.policy)
    if stage.training_steps and stage.training_steps[1] > trained.steps:
        raise BadInput(
            f"stages.{stage.name}.training_steps: found {list(stage.training_steps)}, but {stage.policy} has {trained.steps} steps;"
            f" expected two of 1 to {trained.steps}"
        )
    if stage.format is not None:
        raise BadInput(
            f"stages.{stage.name}.format: the rollouts of {stage.policy}'s training are dressed in its own Format; remove format, or set source: fresh"
        )


def _known(recipe: Recipe, i: int, role: str, name: str, known: list[str]) -> None:
    if name in known:
        return
    where = f"stages.{recipe.stages[i].name}.{role}"
    if name in [later.name for later in recipe.stages[i:]]:
        raise BadInput(f"{where}: {name} does not come before it; a stage reads earlier ones, so move {name} up")
    if name in [earlier.name for earlier in recipe.stages[:i]]:
        raise BadInput(f"{where}: {name} makes no {role}; there is {', '.join(known)}")
    raise BadInput(f"{where}: there is nothing called {name}{nearest(name, known)}")


def _rows_fit(name: str, stage: Box, recipe: Recipe) -> None:
    try:
        rows = parse_rows(stage.rows or "", recipe.seed)
    except BadInput as error:
        raise BadInput(f"stages.{name}.{error}") from None
    if rows.split != "train":
        raise BadInput(
            f"stages.{name}.rows: found {rows}, but stages work on train rows; {rows.split} rows are for evaluation only"
        )
    count = rows.stop - rows.start
    if isinstance(stage, GrpoConfig) and count < stage.prompts_per_step:
        raise BadInput(
            f"stages.{name}.rows: {rows} has {count} rows, fewer than one generation batch of prompts_per_step={stage.prompts_per_step};"
            " TRL would train 0 steps. Give it more rows, or lower prompts_per_step"
        )
    if isinstance(stage, RejectionConfig) and stage.source == "training":
        _were_trained_on(stage, rows, recipe)


def _were_trained_on(stage: RejectionConfig, rows: RowRange, recipe: Recipe) -> None:
    """A log has no other rows than those of the stage that wrote it."""
    trained = next(other for other in recipe.stages if isinstance(other, GrpoConfig) and other.name == stage.policy)
    theirs = parse_rows(trained.rows, recipe.seed)
    if not theirs.start <= rows.start < rows.stop <= theirs.stop:
        raise BadInput(
            f"stages.{stage.name}.rows: found {rows}, but {stage.policy} is trained on {theirs}, and source: training has no others;"
            " ask for some of these, or set source: both"
        )


def _batch_divides(stage: Box, recipe: Recipe) -> None:
    """A step's batch is made of whole micro-batches; the arithmetic is in the message."""
    processes, micro = recipe.launch.processes, recipe.launch.micro_batch
    if isinstance(stage, SftConfig):
        batch, what = stage.rows_per_step, f"rows_per_step={stage.rows_per_step}"
    elif isinstance(stage, GrpoConfig):
        batch = stage.prompts_per_step * stage.group_size
        what = f"prompts_per_step={stage.prompts_per_step} x group_size={stage.group_size} (={batch})"
    else:
        return
    unit = processes * (micro or 1)
    if batch % unit:
        by = f"processes={processes}" + (f" x micro_batch={micro} (={unit})" if micro else "")
        raise BadInput(f"stages.{stage.name}: {what} does not divide by {by}; change one of them")


def _files(recipe: Recipe) -> None:
    if recipe.model.path and not Path(recipe.model.path, "config.json").is_file():
        raise BadInput(
            f"model.path: {recipe.model.path} holds no config.json; expected a model directory (paths count from {Path.cwd()})"
        )
    for where, settings in _formats(recipe):
        try:
            prompts.load(settings.prompt or "plain")
        except ValueError as error:
            raise BadInput(f"{where}.prompt: {error}") from None
        if settings.chat_template:
            _is_file(f"{where}.chat_template", settings.chat_template)
    for stage in recipe.stages:
        if isinstance(stage, SftConfig) and stage.data.endswith(ROWS):
            _is_file(f"stages.{stage.name}.data", stage.data)
        if isinstance(stage, SftConfig | GrpoConfig) and stage.mix:
            _is_file(f"stages.{stage.name}.mix.data", stage.mix.data)
    if isinstance(recipe.problem, FileProblem):
        _is_file("problem.file", recipe.problem.file)
    if isinstance(recipe.problem, DatasetProblem):
        _dataset(recipe, recipe.problem)
    if recipe.launch.accelerate:
        _is_file("launch.accelerate", recipe.launch.accelerate)
        _processes_agree(recipe.launch.processes, Path(recipe.launch.accelerate))


def _dataset(recipe: Recipe, problem: DatasetProblem) -> None:
    """Its files are there, and nothing asks it for what it does not have."""
    if problem.is_file:
        _is_file("problem.dataset", problem.dataset)
    elif not HUB_ID.fullmatch(problem.dataset) or Path(problem.dataset).exists():
        raise BadInput(
            f"problem.dataset: found {problem.dataset!r}, expected a file whose name ends in {ROWS}, or a dataset on the hub by owner and name, such as openai/gsm8k"
        )
    for reward in problem.components:
        if reward.file:
            _is_file(f"problem.rewards: {reward.name}", reward.file)
    for stage in recipe.stages:
        if isinstance(stage, SftConfig) and stage.data == DEMONSTRATIONS:
            raise BadInput(
                f"stages.{stage.name}.data: a dataset problem has no demonstrations; give the stage a {ROWS} file of conversations, or what a rejection stage keeps"
            )


def _formats(recipe: Recipe) -> Iterator[tuple[str, FormatSettings]]:
    """Where text is dressed, and how."""
    yield "format", recipe.format
    yield from ((f"stages.{stage.name}.format", stage.format) for stage in recipe.stages if stage.format)


def _is_file(where: str, path: str) -> None:
    if not Path(path).is_file():
        raise BadInput(f"{where}: {path} is not there (paths count from {Path.cwd()})")


def _processes_agree(processes: int, path: Path) -> None:
    """An accelerate config says how many processes there are, and so does the recipe."""
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"launch.accelerate: {path} cannot be read: {' '.join(str(error).split())}") from None
    found = config.get("num_processes") if isinstance(config, dict) else None
    if found != processes:
        raise BadInput(
            f"launch.accelerate: {path} is for num_processes: {found}, but launch.processes is {processes}; make them agree"
        )

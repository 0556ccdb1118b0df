"""The recipe: YAML and overrides -> a frozen Recipe. What it says about files and other stages is judged in
`pipeline.recipe.checks`.

The order is the list; inputs are named; there is no graph language. Relative paths count from the working directory.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Union

import yaml
from pydantic import AfterValidator, Discriminator, Field, Tag, ValidationError, model_validator

from pipeline.recipe import bounds
from pipeline.recipe.validation_errors import complaint, nearest
from pipeline.registry.stores.open import check
from stages.config import Config, FormatSettings, FromList, Seconds, UserPath, execution, identity, resolved
from stages.errors import BadInput
from stages.evaluate import Evaluate, Validation
from stages.grpo import GrpoConfig
from stages.job import Dtype, Execution, Lora, Sampler
from stages.kinds import STAGES, recipe_kinds
from stages.problems.catalog import PROBLEMS, BuiltInSettings, DatasetProblem, FileProblem
from stages.rejection import RejectionConfig
from stages.sft import SftConfig


class Model(Config):
    """The base policy: exactly one of path, hub and artifact."""

    path: UserPath | None = resolved(None)
    """A model directory; identified by the digest of its files."""
    hub: str | None = resolved(None)
    """A model on the Hugging Face hub; identified by its name and revision as written."""
    revision: str | None = resolved(None)
    """Commit of the hub model. Off: whatever is newest when a stage runs."""
    artifact: str | None = resolved(None)
    """Id of a policy in the registry."""
    dtype: Dtype = identity("float32")
    """Precision of the weights in memory and of the computation."""
    lora: Lora | None = identity(None)
    """Train adapters instead of all weights. Off: none."""

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        given = [name for name in ("path", "hub", "artifact") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"found {' and '.join(given) or 'none'} of path, hub and artifact, expected exactly one")
        if self.revision and not self.hub:
            raise ValueError("revision belongs to hub; remove it")
        return self


def _which_problem(value: Any) -> str | None:
    given: dict[str, Any] = {}
    if isinstance(value, dict):
        given = value
    elif isinstance(value, Config):
        given = vars(value)
    return next((name for name in ("name", "file", "dataset") if name in given), None)


ProblemSettings = BuiltInSettings | FileProblem | DatasetProblem
Problem = Annotated[
    Annotated[BuiltInSettings, Tag("name")]
    | Annotated[FileProblem, Tag("file")]
    | Annotated[DatasetProblem, Tag("dataset")],
    Discriminator(
        _which_problem,
        custom_error_type="problem",
        custom_error_message="expected one of {name: scheduling}, {file: my_problem.py} and {dataset: ..., rewards: "
        "[...]}",
    ),
]


def _place(place: str) -> str:
    check(place)
    return place


Place = Annotated[UserPath, AfterValidator(_place)]
"""A directory, or a URL of an object store."""


class Work(Config):
    """Work in progress, which lies in SWITCHBACK_WORK."""

    mirror: Place | None = execution(None)
    """Directory or URL that resume checkpoints are copied to while a stage runs, and brought back from where they are
    missing. Off: none."""


Box = SftConfig | GrpoConfig | RejectionConfig
"""The Configs of `STAGES` that a recipe may hold, for the type checker, which cannot read the table. A test holds the
two equal."""
if TYPE_CHECKING:
    StageSettings = Box
else:
    StageSettings = Annotated[Union[*(STAGES[kind].config for kind in recipe_kinds())], Field(discriminator="kind")]


class Recipe(Config):
    """A model, a problem, and the stages that train the one on the other."""

    LATER: ClassVar[tuple[str, ...]] = ("track",)

    name: str = execution(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")
    """What runs of it are called."""
    seed: int = identity(0, ge=0, lt=2**31)
    """Names the stream of training rows, and seeds demonstrations, order and sampling. Evaluations do not depend on
    it."""
    registry: Place | None = execution(None)
    """Directory or URL of the registry. Off: SWITCHBACK_REGISTRY, else ./registry."""
    model: Model = identity()
    """The policy that is called `base`."""
    problem: Problem = resolved()
    """Rows, rewards, score."""
    format: FormatSettings = resolved(FormatSettings())
    """Prompt and response prefix."""
    evaluate: Evaluate = identity(Evaluate())
    """How every policy is evaluated on held-out rows, which only report."""
    validation: Validation = identity(Validation())
    """The same on validation rows, which decide."""
    sampler: Sampler = identity("transformers")
    """What generates where rollouts are kept or judged: rejection, evaluate, probe. grpo has TRL's generation."""
    stages: Annotated[tuple[StageSettings, ...], FromList] = identity(min_length=1)
    """The stages, in order."""
    launch: Execution = execution(Execution())
    """Processes, threads, device."""
    work: Work = execution(Work())
    """What becomes of work in progress."""
    deadline: Seconds | None = execution(None, gt=0)
    """Seconds (or "90m", "2h") that any one stage may take. Off: none."""


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and put `a.b=value` overrides over it. Raises BadInput, one line, on anything that is wrong with
    it."""
    if not path.is_file():
        raise BadInput(f"{path}: there is no such recipe file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read as text: {error}") from None
    return parse(text, str(path), overrides)


def parse(text: str, where: str, overrides: Sequence[str] = ()) -> Recipe:
    """`load` of a recipe's text; `where` names it in errors."""
    data = _yaml(text, where)
    if not isinstance(data, dict):
        raise BadInput(f"{where}: found {type(data).__name__}, expected a mapping that starts with name: and model:")
    for override in overrides:
        _override(data, override)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise BadInput(f"{where}: {complaint(error, data)}") from None


class _OneProblem(Config):
    """As in a recipe."""

    problem: Problem = resolved()


def problem(name: str, overrides: Sequence[str] = ()) -> ProblemSettings:
    """The settings of a problem by its name, or by the path of its .py file, with `field=value` overrides. Raises
    BadInput, one line."""
    data = {"problem": {"file": name} if name.endswith(".py") else {"name": name}}
    for override in overrides:
        if "=" not in override:
            raise BadInput(f"--set {override}: expected a setting of the problem, = and a value, such as form=compact")
        _override(data, f"problem.{override}")
    try:
        return _OneProblem.model_validate(data).problem
    except ValidationError as error:
        own = "" if name in PROBLEMS or name.endswith(".py") else " (or give the path of a .py file)"
        raise BadInput(f"{complaint(error, data)}{own}") from None


def is_text_of(text: str, recipe: Recipe) -> bool:
    """Whether a recorded recipe is this one; an earlier version may have written it otherwise."""
    try:
        return parse(text, "recorded recipe") == parse(dump(recipe), recipe.name)
    except BadInput:
        return False


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load` reads back."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False, width=120)


class _Loader(bounds.BoundedLoader):
    """YAML with the numbers of version 1.2: 1e-4 is one, 10:00 and 010 are text. A date is text, and a key given twice
    is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


NUMBERS = {
    "int": r"^(?:[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+)$",
    "float": r"^(?:[-+]?(?:(?:0|[1-9][0-9]*)\.[0-9]*|\.[0-9]+|(?:0|[1-9][0-9]*)(?=[eE]))(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
}
"""The type of a plain scalar -> its form, as in YAML 1.2's core schema, but for leading zeros, which are text."""
OF_YAML_1_1 = {f"tag:yaml.org,2002:{name}" for name in (*NUMBERS, "timestamp", "value")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag not in OF_YAML_1_1]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _type, _form in NUMBERS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_type}", re.compile(_form), list("-+.0123456789"))


def _yaml(text: str, where: str) -> Any:
    try:
        return bounds.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
        raise BadInput(f"{at}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise BadInput(f"{where}: {' '.join(str(error).split())}") from None


def _override(data: dict[str, Any], override: str) -> None:
    """`stages.rl1.kl.beta=0.1`: stages are addressed by name, the value is YAML. What is missing on the way is made."""
    path, equals, value = override.partition("=")
    names = path.strip().split(".")
    if not equals or not all(names):
        raise BadInput(f"--set {override}: expected a path, = and a value, such as stages.rl1.kl.beta=0.1")
    here: Any = data
    for i, name in enumerate(names[:-1]):
        here = _named(here, name) if isinstance(here, list) else _inside(here, name)
        if not isinstance(here, (dict, list)):
            raise BadInput(f"--set {override}: {'.'.join(names[: i + 1])} is {here!r} and has nothing inside")
    if isinstance(here, list):
        raise BadInput(f"--set {override}: expected a field of {names[-1]}, such as {path}.learning_rate")
    here[names[-1]] = _yaml(value, f"--set {override}")


def _inside(mapping: dict[str, Any], name: str) -> Any:
    """What lies under a name; an empty mapping where there is nothing."""
    if mapping.get(name) is None:
        mapping[name] = {}
    return mapping[name]


def _named(stages: list[Any], name: str) -> Any:
    found = [stage for stage in stages if isinstance(stage, dict) and stage.get("name") == name]
    if not found:
        names = [str(stage.get("name")) for stage in stages if isinstance(stage, dict)]
        raise BadInput(f"--set: no stage is named {name}{nearest(name, names)}")
    return found[0]

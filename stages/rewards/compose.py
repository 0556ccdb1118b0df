"""Rewards: from the components of a judgement to the one number that an advantage is made of.

(rollouts, components) as the problem and the penalties gave them -> normalised per component -> clipped -> summed by
weight. NaN is a component that does not apply, or a rollout that could not be judged: it takes no part in any mean,
and adds nothing to a sum. What TRL makes of the sum (centred and scaled within the group) is TRL's. docs/rewards.md
has the formulas. Cheap to import: torch comes with the functions that need it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from stages.config import MAPPING, WORD, Config, FromList, WordOrMapping, identity
from stages.errors import BadInput
from stages.problems.base import LARGEST_WEIGHT
from stages.problems.custom.settings import by_component

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 1e-4
"""Added to a standard deviation before it divides; TRL's own."""
Normalise = Literal["none", "group", "batch", "running"]


class LengthPenalty(Config):
    """The soft overlong punishment of DAPO (arXiv 2503.14476 equation 13): 0 up to `start` tokens, then linear to -1
    at `end` and beyond."""

    weight: float = identity(1.0, gt=0, le=LARGEST_WEIGHT)
    """Of the component `length_penalty`."""
    start: int = identity(ge=0)
    """Tokens of a completion, the prefix not counted, that cost nothing."""
    end: int = identity(ge=1)
    """Tokens from which the whole weight is lost."""

    @model_validator(mode="after")
    def _rises(self) -> LengthPenalty:
        if self.start >= self.end:
            raise ValueError(f"start: found {self.start}, expected less than end ({self.end})")
        return self


class RepetitionPenalty(Config):
    """Minus the share of a completion's token n-grams that it has said before (arXiv 2502.03373 appendix, on ids in
    place of words), in -1..0."""

    weight: float = identity(1.0, gt=0, le=LARGEST_WEIGHT)
    """Of the component `repetition_penalty`."""
    ngram: int = identity(3, ge=1)
    """Tokens of a piece."""


class Rewards(Config):
    """What a grpo stage makes of the problem's components."""

    weights: dict[str, Annotated[float, Field(ge=-LARGEST_WEIGHT, le=LARGEST_WEIGHT)]] = identity({})
    """Component -> its weight, in place of the problem's. Those that are not named keep theirs; 0 = only logged."""
    normalise: Annotated[Annotated[Normalise, WORD] | Annotated[dict[str, Normalise], MAPPING], WordOrMapping] = (
        identity("none")
    )
    """Centre and scale components before they are summed, all or by name: by mean and standard deviation of the row's
    `group`, of the step's `batch`, or of all rollouts of the stage so far (`running`). none = off."""
    clip: Annotated[tuple[float, float], FromList] | None = identity(None)
    """Bounds of every component after that, before the sum. Off: none."""
    length_penalty: LengthPenalty | None = identity(None)
    """A component against long completions. Off: none."""
    repetition_penalty: RepetitionPenalty | None = identity(None)
    """A component against repetition. Off: none."""

    @model_validator(mode="after")
    def _clip_is_a_range(self) -> Rewards:
        if self.clip and not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip: found {list(self.clip)}, expected the least and the greatest, such as [-5, 5]")
        return self

    @property
    def as_they_are(self) -> bool:
        """Nothing is normalised or clipped."""
        kinds = self.normalise.values() if isinstance(self.normalise, dict) else [self.normalise]
        return self.clip is None and set(kinds) <= {"none"}


PENALTIES = ("length_penalty", "repetition_penalty")


def weights_of(stage: str, settings: Rewards, problem: Mapping[str, float]) -> dict[str, float]:
    """Component -> the weight that the stage trains with: the problem's, the stage's own in their place, and its
    penalties.

    Raises BadInput for a component that there is not, and for a penalty of the stage that the problem has a component
    of the same name for."""
    own = {name: getattr(settings, name).weight for name in PENALTIES if getattr(settings, name)}
    if twice := [name for name in own if name in problem]:
        raise BadInput(
            f"stages.{stage}.rewards.{twice[0]}: the problem has a component of this name; remove the penalty here, "
            f"or rename the component there"
        )
    weights = by_component(settings.weights, problem)
    if len(weights) < len(settings.weights):
        raise BadInput(f"stages.{stage}.rewards.weights: {', '.join(settings.weights)} name one reward twice; keep one")
    _known(f"stages.{stage}.rewards.weights", weights, problem)
    if isinstance(settings.normalise, dict):
        normalised = by_component(settings.normalise, {**problem, **own})
        _known(f"stages.{stage}.rewards.normalise", normalised, {**problem, **own})
    return {**problem, **weights, **own}


def _known(where: str, named: Mapping[str, Any], known: Mapping[str, float]) -> None:
    for name in named:
        if name not in known:
            raise BadInput(f"{where}: there is no component {name}; there is {', '.join(known)}")


def penalties(settings: Rewards, ids: Sequence[int]) -> dict[str, float]:
    """The stage's own components of a completion, by the ids that were sampled."""
    found: dict[str, float] = {}
    if length := settings.length_penalty:
        found["length_penalty"] = -min(1.0, max(0.0, (len(ids) - length.start) / (length.end - length.start)))
    if repetition := settings.repetition_penalty:
        found["repetition_penalty"] = -repeated(ids, repetition.ngram)
    return found


def repeated(ids: Sequence[int], ngram: int) -> float:
    """Share of the n-grams that are not the first of their kind, 0..1; 0 for a completion shorter than one."""
    pieces = [tuple(ids[i : i + ngram]) for i in range(len(ids) - ngram + 1)]
    return 1 - len(set(pieces)) / len(pieces) if pieces else 0.0


class Running(NamedTuple):
    """Count, mean and sum of squared differences of each component over all rollouts so far (Welford; merged as by
    Chan et al. 1983). (components,) each, in float64 on the CPU, wherever the rollouts are."""

    seen: Tensor
    mean: Tensor
    squares: Tensor

    def with_batch(self, values: Tensor) -> Running:
        """After a further (rollouts, components) of values; NaN is left out."""
        values = values.detach().to(self.mean.device)
        there = ~values.isnan()
        more = there.sum(0).to(self.seen)
        known = values.double().nan_to_num()
        mean = (known * there).sum(0) / more.clamp(min=1)
        squares = (((known - mean) ** 2) * there).sum(0)
        count, apart = self.seen + more, mean - self.mean
        of_all = more / count.clamp(min=1)
        return Running(count, self.mean + apart * of_all, self.squares + squares + apart**2 * self.seen * of_all)

    @property
    def deviation(self) -> Tensor:
        """Standard deviation, with n - 1; 0 for fewer than two values."""
        return (self.squares / (self.seen - 1).clamp(min=1)).sqrt()


def nothing_seen(components: int) -> Running:
    """Before the first batch."""
    import torch

    zeros = torch.zeros(components, dtype=torch.float64)
    return Running(zeros, zeros.clone(), zeros.clone())


def composed(values: Tensor, names: Sequence[str], settings: Rewards, group_size: int, running: Running) -> Tensor:
    """(rollouts, components), whole groups one after another, as they are to be summed by weight. `running` has seen
    these values already."""
    import torch

    columns = zip(_kinds(settings, names), values.unbind(1), running.mean, running.deviation, strict=True)
    made = [_normalised(column, kind, group_size, *past) for kind, column, *past in columns]
    found = torch.stack(made, dim=1)
    return found.clamp(*settings.clip) if settings.clip else found  # clamp keeps NaN


def _kinds(settings: Rewards, names: Sequence[str]) -> list[Normalise]:
    """How each component is normalised."""
    if not isinstance(settings.normalise, dict):
        return [settings.normalise] * len(names)
    by_name = by_component(settings.normalise, names)
    return [by_name.get(name, "none") for name in names]


def _normalised(column: Tensor, kind: Normalise, group_size: int, mean: Tensor, deviation: Tensor) -> Tensor:
    """(rollouts,) of one component; `mean` and `deviation` are those of its past."""
    if kind == "none":
        return column
    if kind == "running":
        return ((column.double() - mean) / (deviation + EPSILON)).to(column)
    return _scaled(column.view(-1, group_size if kind == "group" else len(column))).flatten()


def _scaled(rows: Tensor) -> Tensor:
    """Every row of (rows, n) centred, and divided by its standard deviation (n - 1)."""
    there = ~rows.isnan()
    count = there.sum(1, keepdim=True)
    mean = rows.nan_to_num().sum(1, keepdim=True) / count.clamp(min=1)
    squares = ((rows - mean).nan_to_num() ** 2).sum(1, keepdim=True)
    return (rows - mean) / ((squares / (count - 1).clamp(min=1)).sqrt() + EPSILON)


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """(rollouts,); NaN where no component applies."""
    total = (values * weights).nansum(1)
    total[values.isnan().all(1)] = float("nan")
    return total

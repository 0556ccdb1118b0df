"""Whether a row's scores depend on that row alone, in the ways in which TRL puts several rows into one forward pass.

a policy's config and a device -> nats by which a token's log-probability differs from the row's own, on a small model
of the architecture (`stages.policy.small_copy`) -> a refusal of what is not exact. The ways are those of sft stages
(padded on the right, or end to end in one sequence) and of GRPO's scoring (padded on the left)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from stages.errors import BadInput, NoSmallCopy
from stages.job import Finding, Job
from stages.policy.models import pick_device
from stages.policy.positions import longest_exact, needed
from stages.policy.small_copy import small_model
from stages.trl.positions import positioned

Way = Literal["end to end", "right", "left", "left with positions"]
SAYS: dict[Way, str] = {
    "end to end": "lets rows of one sequence see each other",
    "right": "is scored otherwise by TRL than by itself",
    "left": "scores rows that are padded on the left otherwise than each alone, as they are sampled",
    "left with positions": "scores rows that are padded on the left otherwise than each alone, as they are sampled",
}
"""How rows lie in a forward pass -> what is wrong with a model whose scores are then not its own."""
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 1.0}
"""Nats that rounding may make; a token that sees another row is off by several."""
ROWS = ((17, 101, 64, 230, 7, 88, 199, 54, 31, 142, 5), (211, 13, 77, 160, 90, 41, 123), (61, 250, 9))
"""Ids of the small vocabulary. The lengths differ, and the first row is longer than a small window."""
CANNOT = (AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
"""What a model raises that does not take what it is given."""


class Apart(NamedTuple):
    """What came out."""

    off: float
    """The largest difference of a token's log-probability from that of the row alone, in nats."""
    exact: bool
    """It is rounding."""


def sft(job: Job, path: str, field: str | None) -> Iterator[Finding]:
    """What is to be said of the rows of an sft stage. `path` is the policy's, `field` the setting that lays rows end to
    end. None: they are padded. Yields a warning where a padded policy cannot be tried. Raises BadInput where a row's
    loss depends on another row."""
    if field is None:
        yield from _said(job, path, "right", f"stages.{job.name}", OTHER_MODEL)
        return
    where, advice = f"stages.{job.name}.{field}", f"remove {field}"
    for finding in _said(job, path, "end to end", where, advice):
        raise BadInput(f"{where}: {finding.advice}. Fix: {advice}")


def grpo(job: Job, path: str) -> Iterator[Finding]:
    """What is to be said of how GRPO scores what it samples. `path` is the policy's. Yields a warning where that cannot
    be tried. Raises BadInput where a rollout would be scored otherwise than it was sampled."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    where = f"stages.{job.name}"
    if needed(config.to_dict()) and not job.own_positions:
        raise BadInput(
            f"{where}: {config.model_type} has to be given the positions of each row, which enters the key, and no "
            f"plan reads the config.json of a model on the hub. Fix: download it, and set model.path to its directory"
        )
    yield from _said(job, path, "left with positions" if job.own_positions else "left", where, OTHER_MODEL)


OTHER_MODEL = "choose a model of another architecture"


def _said(job: Job, path: str, way: Way, where: str, advice: str) -> Iterator[Finding]:
    """A warning where there is no small model. Raises BadInput for one that cannot be scored, or not exactly."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    try:
        found = tried(way, config, pick_device(job.execution))
    except NoSmallCopy as error:
        yield Finding(
            rule="scores_not_tried",
            severity="warn",
            stage=job.name,
            evidence={},
            advice=f"there is no small model of a {config.model_type} ({error}) that shows whether rows stay apart",
        )
        return
    except CANNOT as error:
        raise BadInput(
            f"{where}: TRL cannot score a {config.model_type} here ({_line(error)}). Fix: {advice}"
        ) from None
    if not found.exact:
        raise BadInput(
            f"{where}: {config.model_type} {SAYS[way]} (a token's log-probability is off by {found.off:.2g} nats, "
            f"expected 0). Fix: {advice}"
        )


def refuse_stretched(where: str, path: str, longest: int, advice: str) -> None:
    """Raise BadInput where a row of `longest` tokens changes the rotary positions of the rows beside it."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    limit = longest_exact(config)
    if limit is not None and longest > limit:
        raise BadInput(
            f"{where}: the rotary positions of this {config.model_type} follow the longest row of a batch (found rows "
            f"of up to {longest} tokens, expected {limit} at most). Fix: {advice}"
        )


def tried(way: Way, config: Any, device: torch.device) -> Apart:
    """The outcome for a PreTrainedConfig, tried once in a process. Raises NoSmallCopy for an architecture of which
    there is no small model, and whatever a model raises that does not take what TRL gives it."""
    asked = way, config.to_json_string(use_diff=False), str(device)
    if asked not in _KNOWN:
        try:
            model = small_model(config, device)
        except CANNOT as error:
            raise NoSmallCopy(_line(error)) from error
        _KNOWN[asked] = _tried(way, model)
    return _KNOWN[asked]


_KNOWN: dict[tuple[Way, str, str], Apart] = {}
"""Filled by `tried`. The versions of libraries are those of this process."""


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@torch.no_grad()
def _tried(way: Way, model: PreTrainedModel) -> Apart:
    model.train()  # as trainers have it; the copy has no dropout
    there = [torch.tensor([row], device=model.device) for row in ROWS]
    logits = [model(input_ids=ids, use_cache=False).logits[0] for ids in there]
    add_fused_lm_head(model)
    alone = [own_scores(one, row) for one, row in zip(logits, ROWS, strict=True)]
    if way == "end to end":
        found = _of_one_sequence(model)
    else:
        batch = padded(ROWS, model.device, on_the_left=way != "right")
        lines = scores(positioned(model) if way == "left with positions" else model, batch)
        kept = batch["attention_mask"].bool()
        found = [line[there] for line, there in zip(lines, kept[:, :-1] & kept[:, 1:], strict=True)]
    off = max((one - own).abs().max().item() for one, own in zip(found, alone, strict=True))
    return Apart(off, off < ROUNDING[model.dtype])


def _of_one_sequence(model: PreTrainedModel) -> list[Tensor]:
    """Scores of each row of a padding-free batch, its first token left out."""
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collate([{"input_ids": list(row)} for row in ROWS])
    there = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    line = scores(model, there)[0]
    ends = torch.tensor([len(row) for row in ROWS]).cumsum(0).tolist()
    return [line[end - len(row) : end - 1] for row, end in zip(ROWS, ends, strict=True)]


def padded(rows: Sequence[Sequence[int]], device: torch.device, on_the_left: bool) -> dict[str, Tensor]:
    """Rows padded to the longest, as TRL gives them to a model."""
    width = max(map(len, rows))
    sides = [([0] * (width - len(row)), []) if on_the_left else ([], [0] * (width - len(row))) for row in rows]
    ids = [[*left, *row, *right] for row, (left, right) in zip(rows, sides, strict=True)]
    mask = [[*left, *[1] * len(row), *right] for row, (left, right) in zip(rows, sides, strict=True)]
    batch = {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def scores(model: Callable[..., Any], batch: Mapping[str, Any]) -> Tensor:
    """(B, T) inputs -> (B, T - 1) log-probabilities by TRL's head, which the model has."""
    return model(**batch, fused_lm_head=True).log_probs.float()


def own_scores(logits: Tensor, row: Sequence[int]) -> Tensor:
    """(T, V) logits of a row -> (T - 1,) log-probabilities of its tokens after the first."""
    chosen = torch.tensor(row[1:], device=logits.device)
    return logits[:-1].float().log_softmax(-1).gather(1, chosen[:, None])[:, 0]

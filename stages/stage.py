"""A kind of stage: everything that planning, checking, preflight and the worker ask of it, in one value.

One file per kind (`stages.sft`, `stages.grpo`, ...) ends in its `STAGE`, and `stages.kinds` lists them. A function of
a Stage gets values: the kind's own Config, the Configs of earlier stages by name, the seed. It never sees a Recipe, a
registry or a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.config import Config, StageConfig
from stages.job import Finding, Job, Result, RowRange

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.rewards.compose import Rewards
    from stages.tokens.token_rows import TokenRow

BASE = "base"
"""What a recipe calls the policy that it starts from."""
ROWS = ".jsonl"
"""How the name of a file of rows ends."""
Earlier = Mapping[str, StageConfig]
"""Name -> Config of the stages before one, in the recipe's order."""


class Read(NamedTuple):
    """Something that a stage reads besides its policy."""

    role: str
    """Its name in the job's inputs."""
    field: str
    """The field of the stage that names it, such as `data` or `mix.data`."""
    source: str
    """An earlier stage, or the path of a file."""
    output: str | None
    """Which output of that stage. None: `source` is a file."""
    instead: tuple[str, ...] = ()
    """What the field may say in place of a stage."""


class Batch(NamedTuple):
    """Rows (sft) or completions (grpo) of one optimiser step."""

    size: int
    formula: str
    """How the recipe's fields make it, such as rows_per_step=32."""


class Inspected(NamedTuple):
    """What a kind's preflight read and found."""

    own: Sequence[TokenRow] = ()
    """Rows of its data that can be read already."""
    general: Sequence[TokenRow] = ()
    """Rows of its mix."""
    findings: Sequence[Finding] = ()
    steps: int | None = None
    """Optimiser steps that it will run. None: not known, or it does not train."""


@dataclass(frozen=True)
class Stage:
    """A kind of stage. What a field leaves out, the kind does not do."""

    config: type[Config]
    run: Callable[[Job], Result]
    version: int
    """Part of every key: raised when the same config gives another result."""
    revised: Callable[[Any], Mapping[str, int]] = lambda config: {}
    """Settings that mean something else than before -> the version of their meaning: part of the keys of the recipes
    that use them, and of no others."""
    trains: bool = False
    """It makes a policy: an evaluation follows, and the model's dtype and adapters are part of its key."""
    saves: bool = False
    """It writes checkpoints, from which it is resumed."""
    pads_left: bool = False
    """It scores rows that are padded on the left. Where an architecture needs their own positions for that, these are
    part of the key."""
    torch: bool = True
    """It needs torch, which takes seconds to import."""
    makes: Callable[[Any], tuple[str, ...]] = lambda config: ()
    """The outputs that later stages may read."""
    reads: Callable[[Any], tuple[Read, ...]] = lambda config: ()
    """What it reads besides its policy."""
    rows: Callable[[Any, Earlier], str | None] = lambda config, earlier: None
    """The rows of the problem that it works on. None: none. Raises BadInput where the recipe does not say."""
    demonstrates: Callable[[Any], bool] = lambda config: False
    """It trains on the problem's demonstrations."""
    samples: Callable[[Any], bool] = lambda config: False
    """The recipe's sampler generates for it."""
    rewards: Callable[[Any], Rewards | None] = lambda config: None
    """The rewards it is trained by."""
    audited: Callable[[Any], bool] = lambda config: False
    """An audit of its rewards comes before it."""
    drops_overlap: Callable[[Any], bool] = lambda config: False
    """It leaves out rows that ask what policies are evaluated on, so what these are is part of its key."""
    weighs_tokens: bool = False
    """Every token has a loss weight, which `switchback inspect` shows."""
    batch: Callable[[Any], Batch | None] = lambda config: None
    """What the processes share at each optimiser step."""
    check: Callable[[Any, Earlier, int], None] = lambda config, earlier, seed: None
    """Raises BadInput for what cannot work, as far as Configs tell. `seed` is the recipe's."""
    ranges: Callable[[Any], Mapping[str, RowRange]] = lambda config: {}
    """Rows that it works on besides the job's: the recipe's field -> range."""
    preflight: Callable[[Job, Any, PreTrainedTokenizerBase, str], Inspected] | None = None
    """Reads its rows with the tokenizer, before anything is trained: (job, config, tokenizer, path of the policy).
    Raises BadInput. None: only the problem's rows are looked at."""

"""The types that cross the boundary between `pipeline` and `stages`: frozen, typed, JSON.

Job goes in, Result comes out; Format and Evaluation travel inside. Nothing else crosses: no globals, no live models,
no environment look-ups. Cheap to import: no torch, no trl."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import ConfigDict, Field

from stages.config import LIST, WORD, Config, FromList, Frozen, Seconds, UserPath, WordOrList, execution, identity
from stages.errors import BadInput
from stages.intervals import of_equal_scores

Dtype = Literal["float32", "bfloat16", "float16"]
Sampler = Literal["transformers", "continuous", "vllm"]
Split = Literal["train", "validation", "held_out"]
MANIFEST = "artifact.json"
"""A published artifact's own file, written last: its existence means the artifact is whole. A copy of a policy keeps
it."""
HUB = "hf://"
"""How a job's input names a model on the hub: hf://org/name@revision."""
SPLITS: tuple[Split, ...] = ("train", "validation", "held_out")
"""Training stages read `train`; `validation` decides between settings; `held_out` only reports."""


MOST_PROCESSES = 4096
"""More than any machine has cores or accelerators; a number beyond it is a slip."""


class Execution(Config):
    """How a stage is run. None of it is identity: the key says what was asked, not which machine did it."""

    processes: int = execution(1, ge=1, le=MOST_PROCESSES)
    """Processes of one stage (data parallel)."""
    threads: int | None = execution(None, ge=1, le=MOST_PROCESSES)
    """CPU threads of each process. Off: torch's default, or 1 where there are several processes. Tiny models are
    fastest with 1."""
    device: Literal["auto", "cpu", "cuda"] = execution("auto")
    """`auto` takes the GPU where there is one."""
    accelerate: UserPath | None = execution(None)
    """An accelerate config file (FSDP, DeepSpeed) that starts the processes, as `accelerate launch` takes it. Off:
    the job's own process forks them."""
    grace: Seconds = execution(20.0, ge=0)
    """Seconds (or "1m") that a stage has, after Ctrl-C or SIGTERM, to save at its next optimiser step. 0 = it is
    killed at once."""
    sampler_tokens: int = execution(2**17, ge=1)
    """Tokens (prompt and longest completion) of the sequences that a process samples side by side: what keys and
    values in memory are for. With a 7B model, 131072 are about 7.5 GB in bfloat16. Never less than one sequence."""
    micro_batch: int | None = execution(None, ge=1)
    """Rows (sft) or completions (grpo) of one forward pass in one process; the rest of the step's batch is
    accumulated. Off: the whole batch at once."""


class Lora(Config):
    """Low-rank adapters (`stages.policy.lora`)."""

    r: int = identity(32, ge=1)
    """Rank."""
    alpha: float = identity(32.0, gt=0)
    """Scale: the update is multiplied by alpha / r."""
    dropout: float = identity(0.0, ge=0, lt=1)
    """0 = off; in RL it makes the ratio noisy."""
    targets: Annotated[
        Annotated[Literal["all-linear"], WORD] | Annotated[tuple[str, ...], FromList, LIST], WordOrList
    ] = identity("all-linear")
    """Modules that get an adapter: `all-linear` (all but the LM head), or names such as [q_proj, v_proj]."""
    quantize: Literal["nf4"] | None = identity(None)
    """Hold the frozen weights in 4 bits while training (QLoRA, arXiv 2305.14314); needs bitsandbytes. What is
    published is the full-precision policy with the adapter merged into it: a finding says how far it is from the
    policy that was trained. Off: none."""


class Format(Frozen):
    """How text is rendered, from SFT to serving."""

    prompt: str
    """Name of the prompt file, for reading; its content is what counts."""
    prompt_digest: str
    system_prompt: str
    """"" when there is none."""
    user_template: str
    """jinja2; sees the fields of a row, `prompt` among them."""
    response_prefix: str
    """What every completion starts with: trained in SFT, given in RL, evaluation and serving. "" is a prefix too."""
    per_row: str | None = None
    """Column that gives each row a prefix of its own; `response_prefix` is then "", and the serving template adds
    none. None: one prefix for all."""
    chat_template: str | None = None
    """A training template to use in place of the one the policy carries, which later policies then carry. None: the
    policy's own."""
    training_template: str | None = None
    """SHA-256 of the chat template everything is rendered with. The worker finds it, so it is None before a job has
    run."""


COMPARED = ("system_prompt", "user_template", "response_prefix", "per_row", "chat_template")
"""What of a Format can be compared without a tokenizer; the digest of the template that is really used is only known
to a worker."""


def different(a: Format, b: Format) -> list[str]:
    """Fields in which two Formats dress text differently."""
    return [name for name in COMPARED if getattr(a, name) != getattr(b, name)]


class RowRange(Frozen):
    """Rows start..stop of a split; `seed` names the stream of training rows."""

    split: Split
    start: int
    stop: int
    seed: int

    def __str__(self) -> str:
        return f"{self.split}[{self.start}:{self.stop}]"


def parse_rows(text: str, seed: int) -> RowRange:
    """Read a range such as train[0:1000]. Raises BadInput on anything else, and on an empty range."""
    match = re.fullmatch(r"(\w+)\[(\d+):(\d+)\]", text)
    if not match or match[1] not in SPLITS or int(match[2]) >= int(match[3]):
        raise BadInput(f"rows: found {text!r}, expected a range such as train[0:1000] of {', '.join(SPLITS)}")
    return RowRange(split=cast(Split, match[1]), start=int(match[2]), stop=int(match[3]), seed=seed)


def train_rows(stage: str, text: str, seed: int) -> RowRange:
    """`parse_rows` of a stage's `rows`. Raises BadInput for rows of another split than train."""
    try:
        rows = parse_rows(text, seed)
    except BadInput as error:
        raise BadInput(f"stages.{stage}.{error}") from None
    if rows.split != "train":
        raise BadInput(
            f"stages.{stage}.rows: found {rows}, but stages work on train rows; {rows.split} rows are for evaluation "
            f"only"
        )
    return rows


class Evaluated(Frozen):
    """The rows that policies are scored on."""

    problem: dict[str, Any]
    """The recipe's `problem`."""
    ranges: tuple[RowRange, ...]


class Job(Frozen):
    """Marching orders of one step. A stage is a function of this file and a directory."""

    kind: str
    name: str
    config: dict[str, Any]
    """The kind's Config as JSON."""
    inputs: dict[str, str]
    """Role -> absolute path."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Role -> the name of an input in files that a stage writes: an artifact's id, a hub's name, or a file's name."""
    copies: dict[str, str] = Field(default_factory=dict)
    """Absolute path of a user's file -> that of the copy which is read in its place."""
    work: str
    """The step's own directory: job, lock, logs, result."""
    out: str
    """What will be published; inside `work`, emptied before the stage starts."""
    problem: dict[str, Any] | None
    """The recipe's `problem`, where the step uses one."""
    rows: RowRange | None
    evaluated: Evaluated | None = None
    """What policies are scored on, for a stage that trains: its rows are compared with them. None: not compared."""
    format: Format | None
    seed: int
    dtype: Dtype
    lora: Lora | None = None
    """The adapters that a stage trains; None: all weights."""
    own_positions: bool = False
    """Score rows that are padded on the left with their own positions: the plan has found that the policy's
    architecture needs them (`stages.policy.positions`)."""
    sampler: Sampler = "transformers"
    """What generates where a stage samples rollouts to keep or to judge; grpo has TRL's generation."""
    execution: Execution

    def save(self) -> Path:
        """Write `job.json` into `work`."""
        path = Path(self.work, "job.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.model_dump_json(indent=1), encoding="utf-8")
        return path


class Finding(Frozen):
    """Something about a stage that its user should know."""

    rule: str
    """What was looked at."""
    severity: Literal["note", "warn", "stop"]
    """`stop`: nothing is trained on it (exit 3). What cannot work at all is no finding: it is refused."""
    stage: str
    subject: str | None = None
    """The baseline or reward component that it is about, with which `advice` begins. None: it is about the stage."""
    step: int | None = None
    """Optimiser step; None for what is known before training."""
    evidence: dict[str, float]
    """What was measured."""
    advice: str
    """One line: what it means and what to do."""
    override: str | None = None
    """A `--set` that would follow the advice."""
    source: str | None = None
    """Where the rule is from."""


class Result(Frozen):
    """What the worker says it made; written last, by rank 0."""

    outputs: dict[str, str]
    """Name -> path relative to the job's `out`; a policy lies at "."."""
    metrics: dict[str, float]
    findings: tuple[Finding, ...] = ()
    """What its user should know."""
    format: Format | None = None
    """The job's Format, with the digest of the training template filled in."""
    seen: dict[str, Any] = Field(default_factory=dict)
    """The execution as it really was: processes, threads, device, library versions."""


class Evaluation(Frozen):
    """How good a policy is on one split. All shares and scores in 0..1."""

    model_config = ConfigDict(protected_namespaces=())

    policy: str
    """Id of the artifact, or the name of the model; no path of a machine."""
    split: Split
    decoding: dict[str, float]
    """Temperature and max_completion_length of the samples; greedy decoding has the same length."""
    rows: int
    samples: int
    """Samples per row."""
    seeds: list[int]
    unscored: int = 0
    """Rows that have no score, whatever is answered: they are left out of every mean."""
    greedy: float | None
    """Mean score of the most likely completion. None, as all that follow: no row has a score."""
    mean: float | None
    """Mean score of the samples."""
    interval: tuple[float, float] | None
    """95 % of `mean`: percentile bootstrap, resampling rows; Wilson's where all rows are alike."""
    solved: float | None
    """Share of the samples that are optimal."""
    format: float | None
    """Share of the samples that have the right form."""
    format_digest: str
    """SHA-256 of the Format that rendered prompt and completion."""
    pass_at_k: dict[str, float]
    """k -> chance that at least one of k samples passes; empty where no row has a score."""
    outcomes: dict[str, float]
    """Share of all samples per outcome."""
    per_row: str
    """File in this file's directory, a line a row."""


def read_evaluation(path: Path) -> Evaluation:
    """An Evaluation from its file, where an earlier version may have written an empty interval for rows that are all
    alike. Raises pydantic's ValidationError on anything else."""
    found = Evaluation.model_validate_json(path.read_text(encoding="utf-8"))
    if found.interval is None or found.mean is None or found.interval[0] < found.interval[1]:
        return found
    return found.model_copy(update={"interval": of_equal_scores(found.mean, found.rows - found.unscored)})

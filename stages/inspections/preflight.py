"""What can be known about stages before an accelerator starts, with their tokenizer, template, problem and data, but
without their weights.

the jobs of steps that are about to run -> findings. What cannot work is refused in one line (BadInput); what is
probably not meant is a warning, with what was measured. A policy that is not made yet has the tokenizer and template
of the policy it comes from, which stands in for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from stages.config import Config, FromList, identity
from stages.errors import BadInput, TooFew
from stages.job import Evaluated, Finding, Job, Result, Split
from stages.kinds import STAGES
from stages.rewards.compose import weights_of
from stages.stage import Inspected
from stages.tokens.token_rows import TokenRow
from stages.training import TrainingConfig, only_warm_up, refuse_unknown_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.problems.base import Problem, Row

RowsOf = Callable[[Evaluated], Mapping[Split, Sequence["Row"]]]


class PreflightConfig(Config):
    """The steps to look at."""

    jobs: Annotated[tuple[Job, ...], FromList] = identity()
    """Their jobs; an sft job without problem and data has data that are not made yet."""
    policies_there: Annotated[tuple[str, ...], FromList] = identity(())
    """Stages whose policy is there; for the others an ancestor of it stands in, which may have had another Format."""


def run(job: Job) -> Result:
    """What was found. Raises BadInput for the first thing that cannot work."""
    config = PreflightConfig.model_validate(job.config)
    rows_of = _made_once()
    found = [finding for one in config.jobs for finding in look_at(one, one.name in config.policies_there, rows_of)]
    return Result(outputs={}, metrics={"findings": len(found)}, findings=tuple(found))


def _made_once() -> RowsOf:
    """Evaluated rows, made once for all jobs that have the same."""
    from stages.data import overlap

    made: dict[str, Mapping[Split, Sequence[Row]]] = {}

    def rows_of(evaluated: Evaluated) -> Mapping[Split, Sequence[Row]]:
        name = evaluated.model_dump_json()
        if name not in made:
            made[name] = overlap.rows_of(evaluated)
        return made[name]

    return rows_of


def look_at(job: Job, policy_is_there: bool = True, rows_of: RowsOf | None = None) -> list[Finding]:
    """Everything about one step; of an evaluation its rows. `rows_of` makes evaluated rows."""
    from stages.inspections import format_rules, rehearsal, token_rules
    from stages.policy import loadable, lora, models
    from stages.problems import catalog
    from stages.sampling import vllm_engine
    from stages.tokens import prefix

    stage = STAGES[job.kind]
    config = stage.config.model_validate(job.config)
    if job.problem is not None:
        _problem(job, config, catalog.load(job.problem, job.copies))
    assert job.format is not None, "the plan gives every stage a Format"
    path = models.local_path(job.inputs["policy"], weights=False)
    loadable.refuse_config(path)
    tokenizer = models.load_tokenizer(path, job.format)
    if stage.preflight is None:
        token_rules.refuse_beyond_embedding(job, tokenizer, path, _prompts(job, config, tokenizer))
        loadable.refuse_weights(job.inputs["policy"], path)
        return []
    models.pick_device(job.execution)
    if job.sampler == "vllm":
        vllm_engine.refuse_what_it_cannot(job.execution.processes)
    if isinstance(config, TrainingConfig):
        refuse_unknown_settings(job.name, config)
    if job.lora is not None:
        lora.refuse_targets(path, job.lora)
        lora.quantization(job.lora)
    prefix.prefix_ids(tokenizer, job.format.response_prefix)
    if policy_is_there:
        format_rules.refuse_other_formats(job, path, tokenizer)
    inspected = stage.preflight(job, config, tokenizer, path)
    found = [*_of_formats(job, tokenizer, inspected), *_of_rows(job, config, tokenizer, path, inspected)]
    found += _of_tokens(job, config, tokenizer, path, inspected)
    found += _of_overlap(job, tokenizer, inspected, rows_of or _made_once())
    loadable.refuse_weights(job.inputs["policy"], path)
    return [*found, *rehearsal.rehearse(job, config, path)] if isinstance(config, TrainingConfig) else found


def _prompts(job: Job, config: Config, tokenizer: PreTrainedTokenizerBase) -> list[TokenRow]:
    """The first prompts that a step samples from, each with its prefix; [] for a step that asks no problem."""
    from stages.inspections.format_rules import LOOKED_AT
    from stages.problems import catalog
    from stages.tokens import prefix

    assert job.format is not None, "the plan gives every stage a Format"
    range = job.rows or next(iter(STAGES[job.kind].ranges(config).values()), None)
    if job.problem is None or range is None:
        return []
    range = range.model_copy(update={"stop": min(range.stop, range.start + LOOKED_AT)})
    rows = catalog.rows(catalog.load(job.problem, job.copies), range)
    made: list[TokenRow] = []
    for row, (ids, roles) in zip(rows, prefix.prompts(tokenizer, job.format, rows), strict=True):
        start, letters = prefix.answer(prefix.prefix_ids(tokenizer, prefix.of_row(job.format, row)), [])
        made.append(TokenRow(row.id, [*ids, *start], roles + letters))
    return made


def _of_tokens(
    job: Job, config: Config, tokenizer: PreTrainedTokenizerBase, path: str, inspected: Inspected
) -> Iterator[Finding]:
    """What the template made of its rows, and what stands in them. Raises BadInput for tokens without an embedding."""
    from stages.inspections import token_rules
    from stages.policy import models

    own, declared = inspected.own or _prompts(job, config, tokenizer), models.declared_ends(path)
    token_rules.refuse_beyond_embedding(job, tokenizer, path, [*own, *inspected.general])
    for rows, what in ((own, "rows"), (inspected.general, "rows of its mix")):
        yield from token_rules.as_the_template_writes(job, rows, what)
        yield from token_rules.control_tokens(job, tokenizer, rows, declared, what)


def _of_formats(job: Job, tokenizer: PreTrainedTokenizerBase, inspected: Inspected) -> Iterator[Finding]:
    """The chat template, and the response prefixes of every row."""
    from stages.inspections import format_rules

    assert job.format is not None, "the plan gives every stage a Format"
    prompts_with_prefix = format_rules.prompts_with_prefix(job, job.format, tokenizer, inspected.own)
    if inspected.general:
        prompts_with_prefix += format_rules.prompts_with_prefix(job, job.format, tokenizer, inspected.general)
    yield from format_rules.template(job, tokenizer)
    yield from format_rules.prefixes(job, tokenizer, prompts_with_prefix)


def _of_rows(
    job: Job, config: Config, tokenizer: PreTrainedTokenizerBase, path: str, inspected: Inspected
) -> Iterator[Finding]:
    """The rows themselves, and how long they are trained on."""
    from stages.inspections import format_rules

    yield from inspected.findings
    if isinstance(config, TrainingConfig):
        yield from _generation_settings(job, path)
    yield from _positions(job, path, [*inspected.own, *inspected.general])
    if isinstance(config, TrainingConfig) and inspected.steps is not None:
        yield from only_warm_up(job.name, config, inspected.steps)
    yield from format_rules.boundaries(job, tokenizer, inspected.own, "rows")
    yield from format_rules.boundaries(job, tokenizer, inspected.general, "rows of its mix")
    yield from format_rules.system_prompts(job, tokenizer, inspected.own)


def _of_overlap(
    job: Job, tokenizer: PreTrainedTokenizerBase, inspected: Inspected, rows_of: RowsOf
) -> Iterator[Finding]:
    """Training rows that ask what policies are evaluated on."""
    from stages.data import overlap

    sources = {"data": inspected.own, "mix": inspected.general}
    if job.evaluated is None or job.format is None or not any(sources.values()):
        return
    evaluated = overlap.asked(rows_of(job.evaluated), job.format, tokenizer)
    questions = {
        _name_of(job, role): [overlap.of_row(tokenizer, row) for row in rows] for role, rows in sources.items() if rows
    }
    yield from overlap.findings(job.name, questions, evaluated)


def _name_of(job: Job, role: str) -> str:
    """A source of rows, as the recipe names it."""
    settings = job.config.get(role)
    named = settings["data"] if isinstance(settings, dict) else settings
    return Path(named).name if named else role


def _problem(job: Job, config: Config, problem: Problem) -> None:
    """Raise BadInput for a reward component that the problem does not have, and for fewer rows than are asked for."""
    from stages.problems import catalog

    stage = STAGES[job.kind]
    if rewards := stage.rewards(config):
        weights_of(job.name, rewards, problem.reward_weights)
    ranges = dict(stage.ranges(config))
    if job.rows:
        ranges[f"stages.{job.name}.rows"] = job.rows
    for field, range in ranges.items():
        last = range.model_copy(update={"start": range.stop - 1})
        try:
            catalog.rows(problem, last)
        except TooFew as error:
            raise BadInput(f"{field}: {error}") from None


def _generation_settings(job: Job, path: str) -> Iterator[Finding]:
    """Those that contradict each other, which could not be saved after training."""
    from transformers import GenerationConfig

    from stages.policy.generation_settings import saveable

    if not Path(path, "generation_config.json").is_file():
        return
    if left_out := saveable(GenerationConfig.from_pretrained(path)).left_out:
        yield Finding(
            rule="generation_settings",
            severity="warn",
            stage=job.name,
            evidence={"left_out": len(left_out)},
            advice=f"its policy's generation settings contradict each other ({', '.join(left_out)} with do_sample "
            f"false) and could not be saved; the new policy is published without {', '.join(left_out)}",
        )


def _positions(job: Job, path: str, rows: Sequence[TokenRow]) -> Iterator[Finding]:
    """Rows that the model has positions for."""
    from transformers import AutoConfig

    most = getattr(AutoConfig.from_pretrained(path, trust_remote_code=False), "max_position_embeddings", None)
    longest = max((len(row.ids) for row in rows), default=0)
    if most and longest > most:
        yield Finding(
            rule="row_longer_than_positions",
            severity="warn",
            stage=job.name,
            evidence={"longest": longest, "positions": most},
            advice=f"a row has {longest} tokens, and the model has positions for {most}; rows are never cut, so "
            f"shorten it or remove it",
        )

"""A row's scores depend on that row alone: packed, padding-free and padded on the left. What is not so is refused, and
the probe says so exactly where it is so."""

from __future__ import annotations

import time

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.sft_config import SFTConfig

from stages import grpo
from stages.errors import BadInput
from stages.inspections.preflight import look_at
from stages.policy import positions
from stages.tokens.token_rows import labelled
from stages.trl import apart
from stages.trl.prefill import prefilled
from stages.trl.sft_loss import WeightedSFTTrainer
from tests import architectures
from tests.architectures import ARCHITECTURES
from tests.conftest import TINY_BASE
from tests.models import make_tokenizer, token_rows
from tests.stages.inspections.test_preflight import GRPO, SFT, job
from tests.stages.test_grpo import Recording, what_is_trained_is_what_was_sampled

CPU = torch.device("cpu")
TOKENIZER = make_tokenizer()


def each(*quick):
    """All architectures that TRL can score, of which the fast suite tries a few."""
    names = [name for name in ARCHITECTURES if name not in ("llama4", "recurrent_gemma")]
    return [pytest.param(name, marks=() if name in quick else pytest.mark.full) for name in names]


def save(name, path):
    """A policy directory of an architecture."""
    architectures.model(name, TOKENIZER).save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


class Sampling(Recording):
    """Recording with the positions that the plan would ask for."""

    def __init__(self, *, model, **arguments):
        super().__init__(model=model, **arguments)
        self.own_positions = positions.needed(model.config.to_dict())


def sampled_and_scored(name, tmp_path, kind=Sampling):
    """A step of GRPO on prompts of different lengths, padded on the left by up to 15 tokens."""
    prompts = [prefilled([{"role": "user", "content": "1" + " + 1" * (3 * i)}], "") for i in range(2)]
    settings = {
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 8,
        "max_steps": 1,
        "beta": 0.0,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 7,
    }
    trainer = kind(
        model=architectures.model(name, TOKENIZER),
        reward_funcs=lambda completion_ids, **_: [float(len(set(ids))) for ids in completion_ids],
        args=GRPOConfig(output_dir=str(tmp_path), **settings),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", each("llama", "llama dynamic", "gpt2"))
def test_what_grpo_scores_is_what_it_sampled_whatever_the_architecture(name, tmp_path):
    what_is_trained_is_what_was_sampled(sampled_and_scored(name, tmp_path))
    config = architectures.config(name)
    assert apart.tried("left with positions" if positions.needed(config.to_dict()) else "left", config, CPU).exact
    assert apart.tried("right", config, CPU).exact


@pytest.mark.parametrize("name", ["gpt2"])
def test_a_model_that_counts_the_padding_is_noticed(name, tmp_path):
    """The test above can fail, and so can the probe."""
    with pytest.raises(AssertionError):
        what_is_trained_is_what_was_sampled(sampled_and_scored(name, tmp_path, Recording))
    assert apart.tried("left", architectures.config(name), CPU).off > 0.1


WEIGHTS = {"system": 0.1, "user": 0.1, "template": 0.1, "prefix": 1.0, "completion": 1.0}
BY_ROLE = {"u": 0.1, "c": 1.0}


class Gradients(TrainerCallback):
    """Keeps what the optimiser is given."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.seen = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def gradient(name, tmp_path, rows, **how):
    """What sft makes of all rows in one step."""
    settings = {
        "per_device_train_batch_size": len(rows),
        "max_steps": 1,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "max_length": None,
        "router_aux_loss_coef": 0.0,
        **how,
    }
    trainer = WeightedSFTTrainer(
        model=architectures.model(name, TOKENIZER),
        args=SFTConfig(output_dir=str(tmp_path), **settings),
        train_dataset=Dataset.from_list([labelled(row) for row in rows]),
        processing_class=make_tokenizer(),
        weights=WEIGHTS,
    )
    trainer.add_callback(gradients := Gradients())
    trainer.train()
    return gradients.seen


def one_by_one(name, rows):
    """The same gradient by a loop over rows, each alone, from full logits."""
    model = architectures.model(name, TOKENIZER).train()
    total = sum(BY_ROLE[role] for row in rows for role in row.roles[1:])
    for row in rows:
        log_probs = torch.log_softmax(model(torch.tensor([row.ids])).logits[0, :-1].float(), -1)
        chosen = log_probs.gather(1, torch.tensor(row.ids[1:])[:, None])[:, 0]
        (-(torch.tensor([BY_ROLE[role] for role in row.roles[1:]]) * chosen).sum() / total).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def off(a, b):
    """Relative difference of two gradients."""
    difference = sum((a[name] - b[name]).square().sum() for name in b).sqrt()
    return (difference / sum(value.square().sum() for value in b.values()).sqrt()).item()


@pytest.mark.parametrize("name", each("llama", "bloom", "lfm2"))
def test_the_probe_says_exactly_where_rows_of_one_sequence_see_each_other(name, tmp_path):
    """Against the gradient of the whole model, by a loop over single rows."""
    rows = [row for row in token_rows(8) if len(row.ids) <= 30]
    alone = one_by_one(name, rows)
    assert off(gradient(name, tmp_path, rows), alone) < 1e-4
    try:
        exact = apart.tried("end to end", architectures.config(name), CPU).exact
    except ValueError as error:
        exact = False
        assert "can't keep packed sequences apart" in str(error)
    for how in ({"padding_free": True}, {"packing": True, "packing_strategy": "bfd", "max_length": 128}):
        try:
            found = off(gradient(name, tmp_path, rows, **how), alone)
        except (TypeError, ValueError):
            found = 1.0
        assert (found < 1e-4) == exact, (name, found)


TOGETHER = [
    ({"padding_free": True}, "padding_free"),
    ({"packing": {"strategy": "bfd", "max_length": 256}}, "packing"),
    ({"packing": {"strategy": "bfd_split", "max_length": 256}}, "packing"),
]


@pytest.mark.parametrize(("how", "field"), TOGETHER)
@pytest.mark.parametrize("name", ["opt", "bloom"])
def test_an_sft_stage_whose_rows_would_see_each_other_is_refused(name, how, field, tmp_path):
    with pytest.raises(BadInput, match=f"stages.sft.{field}: {name} lets rows of one sequence see each other") as said:
        look_at(job(save(name, tmp_path / name), {**SFT, **how}, tmp_path, ""))
    assert f"Fix: remove {field}" in str(said.value)


@pytest.mark.parametrize(
    "how", [*(how for how, _ in TOGETHER), {"packing": {"strategy": "wrapped", "max_length": 256}}, {}]
)
def test_an_sft_stage_whose_rows_stay_apart_is_not(how, tmp_path):
    assert look_at(job(save("llama", tmp_path / "llama"), {**SFT, **how}, tmp_path, "")) == []


@pytest.mark.parametrize("config", [SFT, GRPO])
def test_a_model_that_trl_cannot_score_is_refused_beforehand(config, tmp_path):
    """Its first step would have failed, after the evaluation of the base."""
    with pytest.raises(BadInput, match="TRL cannot score a llama4_text here"):
        look_at(job(save("llama4", tmp_path / "llama4"), config, tmp_path, ""))


def test_a_model_whose_logits_trl_computes_otherwise_is_refused(tmp_path):
    """TRL's head leaves out the soft cap of RecurrentGemma, which has a name of its own in its config."""
    with pytest.raises(BadInput, match="recurrent_gemma is scored otherwise by TRL than by itself"):
        look_at(job(save("recurrent_gemma", tmp_path / "rg"), SFT, tmp_path, ""))


@pytest.mark.parametrize("how", [{"packing": {"strategy": "wrapped", "max_length": 256}}, {}])
def test_rows_that_are_padded_or_that_see_each_other_on_purpose_are_not_asked_about(how, tmp_path):
    assert look_at(job(save("opt", tmp_path / "opt"), {**SFT, **how}, tmp_path, "")) == []


def test_a_grpo_stage_whose_plan_has_not_asked_for_positions_is_refused(tmp_path):
    """As for a model on the hub, whose config.json no plan reads."""
    one = job(save("gpt2", tmp_path / "gpt2"), GRPO, tmp_path, "")
    with pytest.raises(BadInput, match="gpt2 has to be given the positions of each row") as said:
        look_at(one)
    assert "set model.path" in str(said.value)
    assert look_at(one.model_copy(update={"own_positions": True})) == []


def test_a_grpo_stage_gives_the_model_the_positions_that_its_plan_asks_for(tmp_path):
    """Prompts of different lengths: with the padding counted, another policy comes out."""
    path = save("gpt2", tmp_path / "gpt2")
    short = {**GRPO, "steps": 1, "prompts_per_step": 4, "group_size": 4, "max_completion_length": 16}
    reward = {"rewards": {"repetition_penalty": {"ngram": 1}}}
    published = []
    for own in (True, True, False):
        out = tmp_path / str(len(published))
        out.mkdir()
        one = job(path, {**short, **reward, "learning_rate": 0.01, "warmup_steps": 0.0}, out, "")
        (out / "out").mkdir()
        grpo.run(one.model_copy(update={"own_positions": own, "sources": {"policy": "gpt2"}}))
        published.append((out / "out" / "model.safetensors").read_bytes())
    assert published[0] == published[1] != published[2]


def test_rows_that_stretch_the_positions_of_the_rows_beside_them_are_refused(tmp_path):
    """`llama dynamic` has positions for 64 tokens, and scales them for the longest row of a batch beyond."""
    path = save("llama dynamic", tmp_path / "dynamic")
    sft, rl = job(path, SFT, tmp_path, ""), job(path, GRPO, tmp_path, "")
    with pytest.raises(BadInput, match=r"follow the longest row of a batch .*expected 64 at most"):
        look_at(sft)
    with pytest.raises(BadInput, match=r"lower max_completion_length"):
        look_at(rl)
    alone = sft.model_copy(update={"execution": sft.execution.model_copy(update={"micro_batch": 1})})
    assert [finding.rule for finding in look_at(alone)] == ["row_longer_than_positions"]


def test_a_config_is_asked_about_once_and_in_under_3_seconds(monkeypatch):
    """CPU seconds, for the tiny base."""
    config = AutoConfig.from_pretrained(TINY_BASE)
    monkeypatch.setattr(apart, "_KNOWN", {})
    start = time.process_time()
    first = apart.tried("end to end", config, CPU)
    assert time.process_time() - start < 3 and first.exact
    monkeypatch.setattr(apart, "small_model", None)
    assert apart.tried("end to end", config, CPU) is first

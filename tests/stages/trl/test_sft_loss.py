"""The loss is what we say: weights by role, three normalisers, equal to TRL's own at (0, 1) and (1, 1), and the same
however rows are batched."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from stages.errors import BadInput
from stages.tokens.token_rows import CODES, TokenRow, labelled
from stages.tokens.weights import answered_a_step, normaliser, row_weights, token_weights
from stages.trl.sft_loss import WeightedSFTTrainer
from tests.models import make_model, make_tokenizer, token_rows

TOKENIZER = make_tokenizer()
ROWS = token_rows()
DATA = [labelled(row) for row in ROWS]
COMPLETION_ONLY = [
    {"input_ids": row.ids, "labels": [id if role == "c" else -100 for id, role in zip(row.ids, row.roles, strict=True)]}
    for row in ROWS
]
FULL_SEQUENCE = [{"input_ids": row.ids, "labels": row.ids} for row in ROWS]
MIXED = [
    {**data, "labels": [CODES["sutpc"[min(4, 5 * i // len(data["labels"]))]] for i in range(len(data["labels"]))]}
    for data in DATA
]
"""All five roles in every row."""
BY_ROLE = {"system": 0.3, "user": 0.1, "template": 0.05, "prefix": 0.5, "completion": 1.0}


def by_part(prompt, completion):
    return {"system": prompt, "user": prompt, "template": prompt, "prefix": completion, "completion": completion}


def trainer(tmp_path, weights=None, data=None, lora=False, normaliser="weight_sum", **settings):
    """TRL's SFTTrainer (on completions), or ours with weights; SGD with a large step, so that a small difference
    shows."""
    settings = {
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "learning_rate": 0.5,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 7,
        "max_length": None,
        **settings,
    }
    ours = (
        {}
        if weights is None
        else {"weights": by_part(*weights) if isinstance(weights, tuple) else weights, "normaliser": normaliser}
    )
    kind = SFTTrainer if weights is None else WeightedSFTTrainer
    return kind(
        model=make_model(TOKENIZER),
        args=SFTConfig(output_dir=str(tmp_path), **settings),
        train_dataset=Dataset.from_list(data or (COMPLETION_ONLY if weights is None else DATA)),
        processing_class=TOKENIZER,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
        **ours,
    )


def trained(made):
    made.train()
    return {name: parameter.detach().clone() for name, parameter in made.model.named_parameters()}


def difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("weights", "theirs"), [((0.0, 1.0), COMPLETION_ONLY), ((1.0, 1.0), FULL_SEQUENCE)])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"padding_free": True},
        *({"packing": True, "packing_strategy": s, "max_length": 64} for s in ("bfd", "bfd_split", "wrapped")),
    ],
    ids=["padded", "padding_free", "bfd", "bfd_split", "wrapped"],
)
def test_two_steps_are_bit_equal_to_trl(weights, theirs, how, lora, tmp_path):
    """(0, 1) to completion-only, (1, 1) to full-sequence training, whatever way rows become sequences."""
    if how.get("packing"):
        how = {**how, "per_device_train_batch_size": 2}
    ours = trained(trainer(tmp_path, weights, lora=lora, **how))
    assert difference(ours, trained(trainer(tmp_path, data=theirs, lora=lora, **how))) == 0.0
    assert difference(ours, trained(trainer(tmp_path, (0.5, 0.2), lora=lora, **how))) > 0.0  # the comparison can fail


def test_what_is_logged_at_0_1_is_what_trl_logs(tmp_path):
    logs = []
    for weights in (None, (0.0, 1.0)):
        made = trainer(tmp_path, weights)
        made.train()
        logs.append([line for line in made.state.log_history if "loss" in line])
    for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm"):
        assert [line[name] for line in logs[0]] == pytest.approx([line[name] for line in logs[1]], rel=1e-6), name


class Gradients(TrainerCallback):
    """Keeps what the optimiser is given."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.seen = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def gradient(tmp_path, weights, kind="weight_sum", lora=False, rows=16, **settings):
    """The gradient of one fixed set of rows."""
    made = trainer(tmp_path, weights, data=MIXED[:rows], lora=lora, normaliser=kind, max_steps=1, **settings)
    if lora:  # a fresh adapter's B is zero and so is the gradient of its A; start somewhere else
        generator = torch.Generator().manual_seed(0)
        for name, parameter in made.model.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    made.add_callback(gradients := Gradients())
    made.train()
    return gradients.seen


def relative(a, b):
    return (
        sum((a[name] - b[name]).square().sum() for name in a).sqrt().item()
        / sum(g.square().sum() for g in a.values()).sqrt().item()
    )


WAYS = {
    "micro 1": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16},
    "micro 2": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8},
    "micro 4": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "micro 8": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
    "padding-free": {"padding_free": True, "per_device_train_batch_size": 16},
    "padding-free micro 4": {"padding_free": True, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "packed bfd": {
        "packing": True,
        "max_length": 128,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 32,
    },
    "packed bfd_split": {
        "packing": True,
        "packing_strategy": "bfd_split",
        "max_length": 128,
        "per_device_train_batch_size": 32,
    },
}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["weight_sum", "nonzero_count", "completion_count"])
def test_the_gradient_does_not_depend_on_how_rows_are_batched(kind, lora, tmp_path):
    """To relative 1e-5 in float32, under every normaliser."""
    whole = gradient(tmp_path, BY_ROLE, kind, lora, per_device_train_batch_size=16)
    for name, how in WAYS.items():
        assert relative(whole, gradient(tmp_path, BY_ROLE, kind, lora, **how)) < 1e-5, name
    assert relative(whole, gradient(tmp_path, (0.1, 1.0), kind, lora, per_device_train_batch_size=16)) > 1e-3


def naive(made, batch, weights, kind):
    """The loss over full logits, written another way: a loop over tokens."""
    logits = made.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    log_probs = torch.log_softmax(logits.float(), -1)
    letters = {code: letter for letter, code in CODES.items()}
    names = dict(zip("sutpc", weights, strict=True))
    total, by_kind = 0.0, {"weight_sum": 0.0, "nonzero_count": 0, "completion_count": 0}
    for b, codes in enumerate(batch["labels"].tolist()):
        for t in range(1, len(codes)):
            if codes[t] != -100:
                w = weights[names[letters[codes[t]]]]
                total -= w * log_probs[b, t - 1, batch["input_ids"][b, t]].item()
                by_kind["weight_sum"] += w
                by_kind["nonzero_count"] += w != 0
                by_kind["completion_count"] += letters[codes[t]] in "pc"
    return total / by_kind[kind]


@pytest.mark.parametrize("kind", ["weight_sum", "nonzero_count", "completion_count"])
@pytest.mark.parametrize(
    "weights", [BY_ROLE, {**BY_ROLE, "system": 0.0}, by_part(0.1, 1.0), by_part(1.0, 0.3), by_part(0.5, 0.0)]
)
def test_the_loss_equals_a_naive_one_over_full_logits(weights, kind, tmp_path):
    made = trainer(tmp_path, weights, data=MIXED, normaliser=kind)
    batch = made.data_collator([made.train_dataset[i] for i in range(8)])
    assert made.compute_loss(made.model, batch).item() == pytest.approx(naive(made, batch, weights, kind), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "by_hand"),
    [
        ("weight_sum", lambda s: s / (0.25 + 0.5 + 1 + 1)),
        ("nonzero_count", lambda s: s / 4),
        ("completion_count", lambda s: s / 3),
    ],
)
def test_the_loss_of_five_tokens_is_the_one_computed_by_hand(kind, by_hand, tmp_path):
    """user, user, prefix, completion, completion. The first token has nothing before it and is not predicted."""
    made = trainer(
        tmp_path, {"system": 9.0, "user": 0.25, "template": 9.0, "prefix": 0.5, "completion": 1.0}, normaliser=kind
    )
    ids = torch.tensor([[10, 11, 12, 13, 14]])
    batch = {
        "input_ids": ids,
        "labels": torch.tensor([[CODES[r] for r in "uupcc"]]),
        "attention_mask": torch.ones_like(ids),
    }
    log_probs = torch.log_softmax(made.model(input_ids=ids).logits[0], -1)
    nll = [-log_probs[i, ids[0, i + 1]].item() for i in range(4)]
    expected = by_hand(0.25 * nll[0] + 0.5 * nll[1] + nll[2] + nll[3])
    assert made.compute_loss(made.model, batch).item() == pytest.approx(expected, rel=1e-6)


def test_under_weight_sum_only_the_ratio_of_weights_matters_and_under_counts_their_size_does(tmp_path):
    """What papers.md calls the difference between the normalisers: halving every weight halves the gradient, or
    changes nothing."""
    for kind, factor in (("weight_sum", 1.0), ("nonzero_count", 0.5), ("completion_count", 0.5)):
        whole = gradient(tmp_path, (0.2, 1.0), kind, per_device_train_batch_size=16)
        half = gradient(tmp_path, (0.1, 0.5), kind, per_device_train_batch_size=16)
        assert relative({name: factor * g for name, g in whole.items()}, half) < 1e-5, kind


def test_under_completion_count_the_response_has_the_same_gradient_whatever_the_prompt_weighs(tmp_path):
    """gradient(w_p, 1) is linear in w_p, and at 0 it is completion-only training."""
    at = {w: gradient(tmp_path, (w, 1.0), "completion_count", per_device_train_batch_size=16) for w in (0.0, 0.5, 1.0)}
    middle = {name: (at[0.0][name] + at[1.0][name]) / 2 for name in at[0.0]}
    assert relative(at[0.5], middle) < 1e-5
    assert (
        relative(at[0.0], gradient(tmp_path, (0.0, 1.0), per_device_train_batch_size=16)) < 1e-6
    )  # every normaliser agrees


@pytest.mark.parametrize("kind", ["nonzero_count", "completion_count"])
def test_a_step_without_what_is_counted_is_no_explosion(kind, tmp_path):
    made = trainer(tmp_path, (0.1, 1.0) if kind == "completion_count" else (0.0, 1.0), normaliser=kind)
    ids = torch.tensor([[10, 11, 12, 13]])
    batch = {"input_ids": ids, "labels": torch.full_like(ids, CODES["u"]), "attention_mask": torch.ones_like(ids)}
    assert made.compute_loss(made.model, batch).item() < 10


def test_a_step_without_a_completion_token_is_divided_by_the_mean_of_the_stage(tmp_path):
    """Two rows a step, in the order of the rows; the second step has no completion token. Against a loss by hand, and
    the other steps are as they were."""
    prompts = [{**data, "labels": [CODES["u"]] * len(data["labels"])} for data in DATA[2:4]]
    data, weights = [*DATA[:2], *prompts, *DATA[4:6]], by_part(0.1, 1.0)
    losses = {}
    for mean in (None, 7.5):
        made = trainer(
            tmp_path, weights, data=data, normaliser="completion_count", per_device_train_batch_size=2, max_steps=3,
            learning_rate=1e-9, train_sampling_strategy="sequential",
        )  # fmt: skip
        made.answered_a_step = mean
        made.train()
        losses[mean] = [line["loss"] for line in made.state.log_history if "loss" in line]
    batch = made.data_collator([made.train_dataset[i] for i in (2, 3)])
    by_hand = 0.0
    for row in prompts:
        log_probs = torch.log_softmax(made.model(input_ids=torch.tensor([row["input_ids"]])).logits[0].float(), -1)
        by_hand -= 0.1 * sum(log_probs[t - 1, id].item() for t, id in enumerate(row["input_ids"]) if t)
    assert losses[None][1] == pytest.approx(by_hand, rel=1e-4), "what it was: divided by 1"
    assert losses[7.5][1] == pytest.approx(by_hand / 7.5, rel=1e-4)
    assert losses[None][::2] == losses[7.5][::2]
    assert made.compute_loss(made.model, batch).item() == pytest.approx(by_hand / 7.5, rel=1e-4)


def test_the_mean_of_a_stage_is_its_completion_tokens_divided_by_its_steps():
    """Three rows of 2, 3 and 0 completion tokens after their first, four times, in five steps."""
    rows = [TokenRow("1", list(range(4)), "uupc"), TokenRow("2", list(range(4)), "cccc"), TokenRow("3", [1, 2], "uu")]
    assert answered_a_step(rows, 4.0, 5) == 4 * 5 / 5


def test_gpt2_differs_from_trl_by_the_first_token_that_trl_counts(tmp_path):
    """As docs/loss.md says: N of TRL is larger by one a row, and only for a class that is named otherwise."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(TOKENIZER), n_embd=32, n_layer=1, n_head=2, n_positions=64,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip
    losses = {}
    for name, kind, data, more in (
        ("theirs", SFTTrainer, FULL_SEQUENCE, {}),
        ("ours", WeightedSFTTrainer, DATA, {"weights": by_part(1.0, 1.0)}),
    ):
        made = trainer(tmp_path, data=data)
        rows = Dataset.from_list(data[:8])
        again = copy.deepcopy(model)
        made = kind(model=again, args=made.args, train_dataset=rows, processing_class=TOKENIZER, **more)
        made.train()
        losses[name] = made.state.log_history[0]["loss"]
    tokens = sum(len(row["input_ids"]) for row in DATA[:8])
    assert losses["theirs"] == pytest.approx(losses["ours"] * (tokens - 8) / tokens, rel=1e-5)


def test_nothing_weighs_where_nothing_is_to_be_learned():
    codes = torch.tensor([[-100, CODES["u"], CODES["c"], CODES["c"]], [CODES["u"], CODES["p"], CODES["c"], -100]])
    weights = {**by_part(0.5, 2.0), "prefix": 3.0}
    assert token_weights(codes, weights).tolist() == [[0.0, 0.5, 2.0, 2.0], [0.5, 3.0, 2.0, 0.0]]
    assert normaliser(codes, weights, "weight_sum").item() == 4.5 + 5.0  # the first column is never predicted
    assert normaliser(codes, weights, "nonzero_count").item() == 5
    assert normaliser(codes, weights, "completion_count").item() == 4


def test_the_weights_of_a_row_are_those_of_the_batch():
    row = TokenRow("1", list(range(9)), "tssutpccu")
    batch = token_weights(torch.tensor([labelled(row)["labels"]]), BY_ROLE)[0]
    batch[0] = 0
    assert row_weights(row, BY_ROLE) == pytest.approx(batch.tolist())


def test_the_loss_of_each_part_is_logged_without_its_weight(tmp_path):
    made = trainer(tmp_path, (0.1, 1.0), max_steps=1, per_device_train_batch_size=16)
    batch = made.data_collator([dict(row) for row in DATA])
    expected = {
        "prompt_loss": naive(made, batch, by_part(1, 0), "weight_sum"),
        "completion_loss": naive(made, batch, by_part(0, 1), "weight_sum"),
    }
    made.train()
    log = next(line for line in made.state.log_history if "loss" in line)
    assert {name: log[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_the_full_logits_are_never_built(tmp_path, monkeypatch):
    """The LM head runs inside TRL's fused kernel; were the model's own head called on the sequence, this would see
    it."""
    made = trainer(tmp_path, (0.1, 1.0), max_steps=1)
    called = []
    made.model.lm_head.register_forward_hook(lambda *_: called.append(1))
    made.train()
    assert not called
    made.model(input_ids=torch.tensor([[1, 2, 3]]))
    assert called


def test_what_would_change_the_loss_behind_our_back_is_refused(tmp_path):
    for settings in ({"loss_type": "dft"}, {"label_smoothing_factor": 0.1}):
        with pytest.raises(BadInput, match="loss_type nll, no label smoothing"):
            trainer(tmp_path, (0.1, 1.0), **settings)


def test_a_mixture_of_experts_keeps_its_balancing_loss(tmp_path):
    """(0, 1) is bit-equal to TRL on a model with routers, too."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    def model():
        torch.manual_seed(0)
        config = Qwen3MoeConfig(
            vocab_size=len(TOKENIZER),
            hidden_size=16,
            intermediate_size=32,
            moe_intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_experts=4,
            num_experts_per_tok=2,
            head_dim=8,
            output_router_logits=True,
            router_aux_loss_coef=0.5,
        )
        return Qwen3MoeForCausalLM(config)

    results = []
    for weights, coefficient in ((None, None), ((0.0, 1.0), None), ((0.0, 1.0), 0.0)):
        made = trainer(tmp_path, weights, max_steps=1, router_aux_loss_coef=coefficient)
        kind, args = type(made), made.args
        ours = {} if weights is None else {"weights": by_part(*weights)}
        data = Dataset.from_list(COMPLETION_ONLY if weights is None else DATA)
        results.append(trained(kind(model=model(), args=args, train_dataset=data, processing_class=TOKENIZER, **ours)))
    assert difference(results[0], results[1]) == 0.0
    assert difference(results[1], results[2]) > 0.0

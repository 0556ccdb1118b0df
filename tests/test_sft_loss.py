"""The loss is what we say: a weighted mean over prompt and completion tokens, equal to TRL's own at (0, 1) and (1, 1)."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from stages.tokens import labelled
from stages.trl.sft_loss import WeightedSFTTrainer
from stages.weighting import token_weights
from tests.models import make_model, make_tokenizer, token_rows

TOKENIZER = make_tokenizer()
DATA = [labelled(row) for row in token_rows()]


def trainer(tmp_path, weights=None, data=DATA, **settings):
    """TRL's SFTTrainer, or ours with (prompt, completion) weights; SGD with a large step, so that a small difference shows."""
    settings = {
        "per_device_train_batch_size": 8, "max_steps": 2, "learning_rate": 0.5, "optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant",
        "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "gradient_checkpointing": False,
        "disable_tqdm": True, "seed": 7, "max_length": None, **settings,
    }  # fmt: skip
    arguments = SFTConfig(output_dir=str(tmp_path), **settings)
    ours = {} if weights is None else {"prompt_loss_weight": weights[0], "completion_loss_weight": weights[1]}
    kind = SFTTrainer if weights is None else WeightedSFTTrainer
    return kind(
        model=make_model(TOKENIZER),
        args=arguments,
        train_dataset=Dataset.from_list(data),
        processing_class=TOKENIZER,
        **ours,
    )


def trained(made):
    made.train()
    return {name: parameter.detach().clone() for name, parameter in made.model.named_parameters()}


def difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_weights_0_1_are_bit_equal_to_completion_only_training(tmp_path):
    assert difference(trained(trainer(tmp_path)), trained(trainer(tmp_path, (0.0, 1.0)))) == 0.0


def test_what_is_logged_at_0_1_is_what_trl_logs(tmp_path):
    logs = []
    for weights in (None, (0.0, 1.0)):
        made = trainer(tmp_path, weights)
        made.train()
        logs.append([line for line in made.state.log_history if "loss" in line])
    for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm"):
        assert [line[name] for line in logs[0]] == pytest.approx([line[name] for line in logs[1]], rel=1e-6), name


def test_weights_1_1_are_bit_equal_to_full_sequence_training(tmp_path):
    whole = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in DATA]
    assert difference(trained(trainer(tmp_path, data=whole)), trained(trainer(tmp_path, (1.0, 1.0)))) == 0.0


@pytest.mark.parametrize(("micro", "accumulation"), [(4, 2), (2, 4), (1, 8)])
def test_the_gradient_does_not_depend_on_the_micro_batch(micro, accumulation, tmp_path):
    whole = trained(trainer(tmp_path, (0.1, 1.0)))
    pieces = trained(
        trainer(tmp_path, (0.1, 1.0), per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation)
    )
    assert difference(whole, pieces) < 1e-6
    assert difference(whole, trained(trainer(tmp_path, (0.0, 1.0)))) > 1e-3  # the comparison can tell weights apart


@pytest.mark.parametrize("weights", [(0.1, 1.0), (1.0, 0.3), (0.5, 0.5), (1.0, 0.0)])
def test_the_loss_equals_a_naive_one_over_full_logits(weights, tmp_path):
    made = trainer(tmp_path, weights)
    batch = made.data_collator([made.train_dataset[i] for i in range(8)])
    w = token_weights(batch, *weights)[:, 1:]
    logits = made.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    log_probs = torch.log_softmax(logits[:, :-1], -1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    naive = -(log_probs * w).sum() / w.sum()
    assert made.compute_loss(made.model, batch).item() == pytest.approx(naive.item(), rel=1e-6)


def test_the_loss_of_five_tokens_is_the_one_computed_by_hand(tmp_path):
    """Prompt tokens 1, 2; completion tokens 3, 4, 5. The first token has nothing before it and is not predicted."""
    made = trainer(tmp_path, (0.25, 1.0))
    ids = torch.tensor([[10, 11, 12, 13, 14]])
    batch = {
        "input_ids": ids,
        "labels": torch.tensor([[-100, -100, 12, 13, 14]]),
        "attention_mask": torch.ones_like(ids),
    }
    log_probs = torch.log_softmax(made.model(input_ids=ids).logits[0], -1)
    nll = [-log_probs[i, ids[0, i + 1]].item() for i in range(4)]
    by_hand = (0.25 * nll[0] + nll[1] + nll[2] + nll[3]) / 3.25
    assert made.compute_loss(made.model, batch).item() == pytest.approx(by_hand, rel=1e-6)


def test_padding_weighs_nothing_on_either_side():
    batch = {
        "input_ids": torch.tensor([[0, 5, 6, 7], [5, 6, 7, 0]]),
        "labels": torch.tensor([[-100, -100, 6, 7], [-100, 6, 7, -100]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]]),
    }
    assert token_weights(batch, 0.5, 2.0).tolist() == [[0.0, 0.5, 2.0, 2.0], [0.5, 2.0, 2.0, 0.0]]


def test_the_loss_of_each_part_is_logged_without_its_weight(tmp_path):
    made = trainer(tmp_path, (0.1, 1.0), max_steps=1, per_device_train_batch_size=16)
    made.train()
    log = next(line for line in made.state.log_history if "loss" in line)
    batch = made.data_collator([dict(row) for row in DATA])
    model = make_model(TOKENIZER)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    nll = -torch.log_softmax(logits[:, :-1], -1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    for name, weights in (("prompt_loss", (1.0, 0.0)), ("completion_loss", (0.0, 1.0))):
        w = token_weights(batch, *weights)[:, 1:]
        assert log[name] == pytest.approx(((nll * w).sum() / w.sum()).item(), rel=1e-4)


def test_what_would_change_the_loss_behind_our_back_is_refused(tmp_path):
    with pytest.raises(ValueError, match="loss_type nll"):
        trainer(tmp_path, (0.1, 1.0), loss_type="dft")

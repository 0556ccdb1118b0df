"""GRPO with a prefix: the prefix is prompt to the policy and completion to the rewards, and the KL reference is where the stage starts."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from stages import models, prefix
from stages.problems.scheduling import Scheduling
from stages.rewards import reward_functions
from stages.trl.prefill import PrefillGRPOTrainer
from tests.conftest import TINY_BASE
from tests.models import CHATML, save

PREFIX = "<think>\n"


def trained(policy, tmp_path, response_prefix=PREFIX, kind=PrefillGRPOTrainer, template=None, **settings):
    """(trainer, what the reward saw, parameters) after two steps."""
    settings = {
        "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 12, "max_steps": 2, "learning_rate": 1e-2, "beta": 0.0,
        "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "gradient_checkpointing": False,
        "disable_tqdm": True, "seed": 7, **settings,
    }  # fmt: skip
    seen = []

    def variety(completions, completion_ids, **_):
        seen.extend(zip([turns[0]["content"] for turns in completions], completion_ids, strict=True))
        return [float(len(set(ids))) for ids in completion_ids]

    tokenizer = models.load_tokenizer(str(policy))
    if template:
        tokenizer.chat_template = template
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": f"What is {i} + 1?"}]} for i in range(16)])
    ours = {"response_prefix": response_prefix} if kind is PrefillGRPOTrainer else {}
    trainer = kind(
        model=models.load_policy(str(policy), "float32"), reward_funcs=variety, args=GRPOConfig(output_dir=str(tmp_path), **settings),
        train_dataset=data, processing_class=tokenizer, **ours,
    )  # fmt: skip
    trainer.train()
    return trainer, seen, {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save(tmp_path_factory.mktemp("policy"))


def test_rewards_see_the_prefix_and_the_loss_does_not(policy, tmp_path):
    trainer, seen, _ = trained(policy, tmp_path)
    tokenizer = trainer.processing_class
    for text, ids in seen:
        assert text == PREFIX + tokenizer.decode(ids, skip_special_tokens=True)
    batch = trainer._buffered_inputs[0]
    prompt = batch["prompt_ids"][0][batch["prompt_mask"][0].bool()].tolist()
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n" + PREFIX)
    assert prompt[-len(trainer._prefix_ids) :] == trainer._prefix_ids


def test_the_ids_that_are_trained_are_the_ids_that_were_sampled(policy, tmp_path):
    trainer, seen, _ = trained(policy, tmp_path, max_steps=1)
    batch = trainer._buffered_inputs[0]
    in_loss = [
        ids[mask.bool()].tolist() for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    assert sorted(in_loss) == sorted(list(ids) for _, ids in seen)


def test_it_trains_as_plain_trl_does_with_the_prefix_in_the_chat_template(policy, tmp_path):
    """An independent road to the same gradient: TRL's own trainer, the prefix at the end of the template's generation prompt."""
    in_template = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    _, _, ours = trained(policy, tmp_path)
    _, _, plain = trained(policy, tmp_path, kind=GRPOTrainer, template=in_template)
    _, _, without = trained(policy, tmp_path, kind=GRPOTrainer)
    assert max((ours[name] - plain[name]).abs().max().item() for name in ours) == 0.0
    assert max((ours[name] - without[name]).abs().max().item() for name in ours) > 0.0


def test_the_first_kl_of_a_stage_is_zero(policy, tmp_path):
    """The reference is the policy the stage starts from."""
    trainer, _, _ = trained(policy, tmp_path, beta=0.1)
    kls = [line["kl"] for line in trainer.state.log_history if "kl" in line]
    assert kls[0] == pytest.approx(0.0, abs=1e-7) and kls[1] > 1e-6


def test_the_gradient_does_not_depend_on_the_micro_batch(policy, tmp_path):
    """One step of plain SGD on the same completions, whole and in quarters."""
    sgd = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0}
    _, _, start = trained(policy, tmp_path, **sgd | {"learning_rate": 1e-12})
    _, _, whole = trained(policy, tmp_path, **sgd)
    quarters = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 4}
    _, _, pieces = trained(policy, tmp_path, **sgd, **quarters)
    moved = max((whole[name] - start[name]).abs().max().item() for name in whole)
    assert moved > 1e-3
    assert max((whole[name] - pieces[name]).abs().max().item() for name in whole) < 1e-4 * moved


def test_an_empty_prefix_is_plain_trl(policy, tmp_path):
    _, _, ours = trained(policy, tmp_path, response_prefix="")
    _, _, plain = trained(policy, tmp_path, kind=GRPOTrainer)
    assert all(torch.equal(ours[name], plain[name]) for name in ours)


def test_a_reward_function_is_a_component_under_its_own_name():
    problem = Scheduling("compact")
    rows = problem.rows("train", 0, 4, seed=0)
    texts = [problem.demonstration(row, __import__("random").Random(i)) for i, row in enumerate(rows)]
    functions, weights = reward_functions(problem, rows)
    assert [function.__name__ for function in functions] == ["format", "sorted", "score"] and weights == [0.1, 0.2, 0.7]
    order = [2, 0, 3]
    completions = [[{"role": "assistant", "content": texts[i]}] for i in order]
    for function in functions:
        expected = [problem.rewards(rows[i], texts[i])[function.__name__] for i in order]
        assert function(completions=completions, row=order, prompts=None, trainer_state=None) == expected


def test_prompts_are_rendered_once_a_group_and_come_out_as_if_rendered_one_by_one(policy, tmp_path):
    trainer, _, _ = trained(policy, tmp_path, max_steps=1)
    turns = [[{"role": "user", "content": text}] for text in ("a", "a", "a", "a", "b", "b", "b", "b")]
    trainer.model.train()
    grouped, _, _ = trainer._tokenize_prompts(copy.deepcopy(turns))
    single = [prefix.prompt_ids(trainer.processing_class, [turn])[0] + trainer._prefix_ids for turn in turns]
    assert grouped == single
    shuffled = [turns[0], turns[4], turns[1]]
    assert trainer._tokenize_prompts(shuffled)[0] == [single[0], single[4], single[1]]


def test_the_tiny_base_loads_as_users_load_models():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(TINY_BASE), AutoTokenizer.from_pretrained(TINY_BASE)
    assert sum(p.numel() for p in model.parameters()) == 170_528
    text = "A* 12:00-13:00\nB 11:00-14:00\n</think>\n<schedule>\nB 11:00-14:00\n</schedule>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

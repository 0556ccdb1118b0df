"""GRPO with a prefix: the prefix is prompt to the policy and completion to the rewards, and the KL reference is where
the stage starts."""

from __future__ import annotations

import copy
import json
import random
from statistics import mean, stdev

import pytest
import torch
from datasets import Dataset
from trl.chat_template_utils import qwen3_template
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from stages.errors import BadInput
from stages.job import Lora
from stages.policy import models
from stages.policy.lora import peft_config
from stages.problems.base import Judgement, Row
from stages.rewards.compose import RepetitionPenalty, Rewards, weights_of
from stages.tokens import chat, prefix
from stages.trl.prefill import PrefillGRPOTrainer, prefilled
from stages.trl.rewarding import Judging, RewardedGRPOTrainer
from tests.conftest import TINY_BASE
from tests.models import CHATML, save
from tests.templates import TEMPLATES

PREFIX = "<think>\n"


def trained(
    policy, tmp_path, response_prefix=PREFIX, kind=PrefillGRPOTrainer, template=None, lora=None, resume=None, **settings
):
    """(trainer, what the reward saw, parameters) after two steps; `resume` is a checkpoint to go on from."""
    settings = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 12,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "beta": 0.0,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 7,
        **settings,
    }
    seen = []

    def variety(completions, completion_ids, **_):
        seen.extend(zip([turns[0]["content"] for turns in completions], completion_ids, strict=True))
        return [float(len(set(ids))) for ids in completion_ids]

    tokenizer = models.load_tokenizer(str(policy))
    if template:
        tokenizer.chat_template = template
    prompts = [[{"role": "user", "content": f"What is {i} + 1?"}] for i in range(16)]
    if issubclass(kind, PrefillGRPOTrainer):
        prompts = [prefilled(prompt, response_prefix) for prompt in prompts]
    data = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    trainer = kind(
        model=models.load_policy(str(policy), "float32"),
        reward_funcs=variety,
        args=GRPOConfig(output_dir=str(tmp_path), **settings),
        train_dataset=data,
        eval_dataset=data.select(range(4)) if "eval_strategy" in settings else None,
        processing_class=tokenizer,
        peft_config=lora,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, seen, {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save(tmp_path_factory.mktemp("policy"))


def said(tokenizer, ids):
    """This tokenizer has no special tokens but those that end a turn, begin one, or pad."""
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_rewards_see_the_prefix_and_the_loss_does_not(policy, tmp_path):
    trainer, seen, _ = trained(policy, tmp_path)
    tokenizer = trainer.processing_class
    for text, ids in seen:
        assert text == PREFIX + said(tokenizer, ids)
    batch = trainer._buffered_inputs[0]
    prompt = batch["prompt_ids"][0][batch["prompt_mask"][0].bool()].tolist()
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n" + PREFIX)
    start = prefix.prefix_ids(tokenizer, PREFIX)
    assert prompt[-len(start) :] == start


def test_the_ids_that_are_trained_are_the_ids_that_were_sampled(policy, tmp_path):
    trainer, seen, _ = trained(policy, tmp_path, max_steps=1)
    batch = trainer._buffered_inputs[0]
    in_loss = [
        ids[mask.bool()].tolist() for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    assert sorted(in_loss) == sorted(list(ids) for _, ids in seen)


def test_it_trains_as_plain_trl_does_with_the_prefix_in_the_chat_template(policy, tmp_path):
    """An independent road to the same gradient: TRL's own trainer, the prefix at the end of the template's generation
    prompt."""
    in_template = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    _, _, ours = trained(policy, tmp_path)
    _, _, plain = trained(policy, tmp_path, kind=GRPOTrainer, template=in_template)
    _, _, without = trained(policy, tmp_path, kind=GRPOTrainer)
    assert max((ours[name] - plain[name]).abs().max().item() for name in ours) == 0.0
    assert max((ours[name] - without[name]).abs().max().item() for name in ours) > 0.0


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_first_kl_of_a_stage_is_zero(lora, policy, tmp_path):
    """The reference is the policy the stage starts from: its files, or itself with the adapter off."""
    trainer, _, _ = trained(policy, tmp_path, beta=0.1, lora=adapter() if lora else None)
    kls = [line["kl"] for line in trainer.state.log_history if "kl" in line]
    assert kls[0] == pytest.approx(0.0, abs=1e-7) and kls[1] > 1e-6


def adapter():
    return peft_config(Lora(r=4, alpha=8.0))


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


def test_prompts_are_rendered_once_a_group_and_come_out_as_if_rendered_one_by_one(policy, tmp_path):
    trainer, _, _ = trained(policy, tmp_path, max_steps=1)
    start = prefix.prefix_ids(trainer.processing_class, PREFIX)
    turns = [[{"role": "user", "content": text}] for text in ("a", "a", "a", "a", "b", "b", "b", "b")]
    single = [prefix.prompt_ids(trainer.processing_class, [turn])[0] + start for turn in turns]
    turns = [prefilled(turn, PREFIX) for turn in turns]
    trainer.model.train()
    grouped, _, _ = trainer._tokenize_prompts(copy.deepcopy(turns))
    assert grouped == single
    shuffled = [turns[0], turns[4], turns[1]]
    assert trainer._tokenize_prompts(shuffled)[0] == [single[0], single[4], single[1]]


def test_the_tiny_base_loads_as_users_load_models():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(TINY_BASE), AutoTokenizer.from_pretrained(TINY_BASE)
    assert sum(p.numel() for p in model.parameters()) == 170_528
    text = "A* 12:00-13:00\nB 11:00-14:00\n</think>\n<schedule>\nB 11:00-14:00\n</schedule>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


class Recording(PrefillGRPOTrainer):
    """Keeps what the sampler was given, what it sampled and how likely that was, and what the loss was then given."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sampled, self.in_loss = {}, []

    def _generate_single_turn(self, prompt_ids, *args):
        generate = type(self.model).generate
        scores = []

        def recording(model, *a, **k):
            out = generate(model, *a, **k, return_dict_in_generate=True, output_logits=True)
            scores.append(torch.stack(out.logits, 1).float().log_softmax(-1))
            return out.sequences

        type(self.model).generate = recording
        try:
            ids, logprobs = super()._generate_single_turn(prompt_ids, *args)
        finally:
            type(self.model).generate = generate
        for row, (given, chosen) in enumerate(zip(prompt_ids, ids, strict=True)):
            self.sampled[tuple(given), tuple(chosen)] = [scores[0][row, t, id].item() for t, id in enumerate(chosen)]
        return ids, logprobs

    def _compute_loss(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        with torch.no_grad():
            now, _, _ = self._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].size(1))
        old = inputs.get("old_per_token_logps")
        for i in range(len(ids)):
            here, there = inputs["prompt_mask"][i].bool(), inputs["completion_mask"][i].bool()
            key = tuple(inputs["prompt_ids"][i][here].tolist()), tuple(inputs["completion_ids"][i][there].tolist())
            self.in_loss.append(
                (self.state.global_step, key, now[i][there].tolist(), None if old is None else old[i][there].tolist())
            )
        return super()._compute_loss(model, inputs)


class TrainsThePrefix(Recording):
    """The known bug (ms-swift #10106): the prefix is given to the sampler, and then trained as if it had been
    sampled."""

    def _generate(self, prompts):
        out = list(super()._generate(prompts))
        start = [prefix.prefix_ids(self._tokenizer, prompt[-1]["response_prefix"]) for prompt in prompts]
        out[0] = [ids[: -len(first)] for ids, first in zip(out[0], start, strict=True)]
        out[1] = [[*first, *ids] for ids, first in zip(out[1], start, strict=True)]
        return tuple(out)


def what_is_trained_is_what_was_sampled(trainer):
    """Ids token for token, and the first step's log-probabilities to 1e-5."""
    assert trainer.in_loss
    for step, key, now, old in trainer.in_loss:
        assert key in trainer.sampled
        if step == 0:
            assert now == pytest.approx(trainer.sampled[key], abs=1e-5)
        if old is not None:
            assert old == pytest.approx(trainer.sampled[key], abs=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    "settings", [{"max_steps": 1}, {"num_iterations": 2}, {"per_device_train_batch_size": 4, "steps_per_generation": 2}]
)
def test_the_first_log_probabilities_are_the_samplers(settings, lora, policy, tmp_path):
    trainer, _, _ = trained(policy, tmp_path, kind=Recording, lora=adapter() if lora else None, **settings)
    what_is_trained_is_what_was_sampled(trainer)
    assert any(old is not None for *_, old in trainer.in_loss) == ("max_steps" not in settings), (
        "old ones are stored where a sample is used again"
    )


def test_a_prefix_that_is_trained_as_completion_is_noticed(policy, tmp_path):
    """The test above can fail."""
    trainer, _, _ = trained(policy, tmp_path, kind=TrainsThePrefix, max_steps=1)
    with pytest.raises(AssertionError):
        what_is_trained_is_what_was_sampled(trainer)


def random_prefix(rng):
    pieces = [
        "<think>",
        "\n",
        "\n\n",
        "The answer",
        " is",
        ": ",
        "{",
        '"x"',
        "é",
        "🤔",
        "42",
        "</s>",
        "\t",
        "[INST]",
        "Okay",
        ",",
    ]
    return "".join(rng.choices(pieces, k=rng.randint(1, 4)))


@pytest.mark.parametrize("number", range(50))
def test_the_ids_in_the_loss_are_the_ids_that_were_sampled_for_any_prefix_and_template(number, policy, tmp_path):
    """50 random prefixes over the chat templates that TRL ships: what was sampled after is rendered prompt + prefix,
    and goes into the loss as it is."""
    rng = random.Random(number)
    name, template = list(TEMPLATES.items())[number % len(TEMPLATES)]
    start = random_prefix(rng)
    trainer, seen, _ = trained(
        policy, tmp_path, start, kind=Recording, template=template, max_steps=1, max_completion_length=4
    )
    what_is_trained_is_what_was_sampled(trainer)
    tokenizer = trainer.processing_class
    for _, (given, chosen), *_ in trainer.in_loss:
        after = tokenizer(start, add_special_tokens=False)["input_ids"]
        assert list(given[-len(after) :]) == after, name
        rendered = tokenizer.decode(given[: -len(after)])
        asked = rendered[rendered.index("What is") : rendered.index(" + 1?") + 5]
        turn = [{"role": "user", "content": asked}]
        alone = tokenizer.apply_chat_template(
            turn, chat_template=template, add_generation_prompt=True, return_dict=True
        )
        assert list(given[: -len(after)]) == list(alone["input_ids"]), name
        opened = "<think>\n" if rendered.endswith("<think>\n") else ""
        assert (opened + start + said(tokenizer, chosen), list(chosen)) in [(text, list(ids)) for text, ids in seen]


def test_every_row_may_have_a_prefix_of_its_own(policy, tmp_path):
    starts = ["", "<think>\n", "Okay"]

    class PerRow(Recording):
        def __init__(self, *args, train_dataset, **kwargs):
            rows = [{"prompt": prefilled([{"role": "user", "content": f"{i}?"}], starts[i % 3])} for i in range(12)]
            super().__init__(*args, train_dataset=Dataset.from_list(rows), **kwargs)

    trainer, seen, _ = trained(policy, tmp_path, kind=PerRow, max_steps=3)
    what_is_trained_is_what_was_sampled(trainer)
    tokenizer, used = trainer.processing_class, set()
    for text, ids in seen:
        assert text.removesuffix(said(tokenizer, ids)) in starts
    for _, (given, _), *_ in trainer.in_loss:
        row, _, start = tokenizer.decode(given).partition("?<|im_end|>\n<|im_start|>assistant\n")
        assert start == starts[int(row.rpartition("\n")[2]) % 3]
        used.add(start)
    assert used == set(starts)


def test_a_prompt_that_ends_in_an_assistant_turn_is_refused(policy, tmp_path):
    """TRL itself renders it malformed, without a word."""
    trainer, _, _ = trained(policy, tmp_path, max_steps=1)
    turns = prefilled([{"role": "user", "content": "?"}, {"role": "assistant", "content": "<think>"}], "")
    with pytest.raises(BadInput, match="ends in an assistant turn"):
        trainer._tokenize_prompts([turns] * 4)
    assert chat.render(trainer.processing_class, turns[:1]).endswith("assistant\n")


def test_a_tokenizer_that_parses_responses_does_not_take_the_prefix_away(policy, tmp_path):
    """With a response template TRL would give rewards a parsed message; they judge text."""
    kind = type("Parsing", (PrefillGRPOTrainer,), {})
    trainer, _, _ = trained(policy, tmp_path, kind=kind, max_steps=1)
    trainer._tokenizer.response_template = qwen3_template
    turns = [prefilled([{"role": "user", "content": "?"}], PREFIX)] * 4
    trainer.model.train()
    theirs = GRPOTrainer._generate(trainer, turns)
    assert "reasoning_content" in theirs[3][0][0]
    out = trainer._generate(turns)
    texts = [PREFIX + said(trainer.processing_class, ids) for ids in out[1]]
    assert out[3] == [[{"role": "assistant", "content": text}] for text in texts]


def test_adapters_are_sampled_with_the_same_settings_as_whole_policies(policy, tmp_path):
    """A model's own repetition penalty must not be in what is sampled, on a wrapped model either."""
    from stages.sampling.generation_config import own_settings

    texts = []
    for penalty in (1.0, 5.0):
        _, seen, _ = trained(policy, tmp_path, kind=_penalised(penalty, own_settings), lora=adapter(), max_steps=1)
        texts.append([list(ids) for _, ids in seen])
    assert texts[0] == texts[1]


def test_running_components_see_every_generation_and_penalties_but_no_rollout_that_was_not_judged(policy, tmp_path):
    """The second of two generations, from the log of both; an evaluation changes nothing of it."""
    own = Rewards(normalise="running", repetition_penalty=RepetitionPenalty(weight=0.3, ngram=1))
    trainer, lines = judged(policy, tmp_path, own, steps=2, scale_rewards="none", temperature=5.0)
    weights = {"variety": 1.0, "first": 0.5, "repetition_penalty": 0.3}
    past = {name: [one["rewards"][name] for one in lines if not one["failure"]] for name in weights}
    assert len(past["first"]) == 10 and all(len(set(values)) > 1 for values in past.values())

    def made(one):
        scaled = (
            (one[name] - mean(past[name])) / (stdev(past[name]) + 1e-4) * weight for name, weight in weights.items()
        )
        return sum(scaled)

    assert all(one["rewards"] == dict.fromkeys(weights) for one in lines if one["failure"])
    rewards = [None if one["failure"] else made(one["rewards"]) for one in lines if one["step"] == 2]
    expected = []
    for group in (rewards[:4], rewards[4:]):
        baseline = mean(value for value in group if value is not None)
        expected += [0.0 if value is None else value - baseline for value in group]
    assert sorted(trainer._buffered_inputs[0]["advantages"].tolist()) == pytest.approx(sorted(expected), abs=1e-4)
    held = trainer.held()["components"]
    assert held[0] == [10.0] * 3 and held[1] == pytest.approx([mean(values) for values in past.values()])
    trainer.evaluate(trainer.train_dataset.select(range(2)))
    assert trainer.held()["components"] == held


def _penalised(penalty, own_settings):
    class Penalised(PrefillGRPOTrainer):
        def train(self, *args, **kwargs):
            model = self.model.get_base_model()
            model.generation_config.repetition_penalty = penalty
            with own_settings(model):
                return super().train(*args, **kwargs)

    return Penalised


class Flaky:
    """A problem that pays for how many different ids an answer has and for its first one, and cannot judge every third
    one that it is asked about."""

    reward_weights = {"variety": 1.0, "first": 0.5}  # noqa: RUF012

    def __init__(self):
        self.asked = 0

    def judge(self, answers):
        self.asked += len(answers)
        return [self.one(answer, failed=i % 3 == 1) for i, answer in enumerate(answers)]

    def one(self, answer, failed):
        if failed:
            return Judgement(0.0, "failed", False, False, dict.fromkeys(self.reward_weights), "timeout")
        return Judgement(
            0.0, "fine", False, True, {"variety": float(len(set(answer.ids))), "first": float(answer.ids[0] % 5) - 1.5}
        )


def judged(policy, tmp_path, own, steps=1, **settings):
    """(trainer, lines of the log) after steps of two groups of four, judged by Flaky."""
    problem, tokenizer = Flaky(), models.load_tokenizer(str(policy))
    rows = [Row(str(i), f"What is {i} + 1?") for i in range(16)]
    prompts = [prefilled([{"role": "user", "content": row.prompt}], PREFIX) for row in rows]
    weights = weights_of("rl1", own, problem.reward_weights)
    arguments = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=12,
        max_steps=steps,
        beta=0.0,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        gradient_checkpointing=False,
        disable_tqdm=True,
        seed=7,
        reward_weights=[*weights.values()],
        logging_steps=1,
        **settings,
    )
    log = tmp_path / "rollouts"
    log.mkdir(parents=True)
    trainer = RewardedGRPOTrainer(
        judging=Judging(problem, rows, weights, own, frozenset({tokenizer.eos_token_id}), log),
        model=models.load_policy(str(policy), "float32"),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": p, "row": i} for i, p in enumerate(prompts)]),
        processing_class=tokenizer,
    )
    trainer.train()
    assert problem.asked == 8 * steps, "judged once for all components"
    return trainer, [json.loads(line) for line in (log / "rollouts.jsonl").read_text().splitlines()]


def by_hand(values):
    """TRL's advantages of a group, those that are None left out of the mean and 0 themselves."""
    there = [value for value in values if value is not None]
    mean = sum(there) / len(there)
    deviation = (sum((value - mean) ** 2 for value in there) / (len(there) - 1)) ** 0.5
    return [0.0 if value is None else (value - mean) / (deviation + 1e-4) for value in values]


def test_a_rollout_that_was_not_judged_moves_nothing_and_nobodys_baseline(policy, tmp_path):
    trainer, lines = judged(policy, tmp_path, Rewards())
    advantages = trainer._buffered_inputs[0]["advantages"].tolist()
    rewards = [None if one["failure"] else one["rewards"]["variety"] + 0.5 * one["rewards"]["first"] for one in lines]
    assert [one["failure"] for one in lines] == [None, "timeout", None, None, "timeout", None, None, "timeout"]
    # rollouts are shuffled between generation and training
    assert sorted(advantages) == pytest.approx(sorted([*by_hand(rewards[:4]), *by_hand(rewards[4:])]), abs=1e-4)
    (logged,) = [line for line in trainer.state.log_history if "rewards/failed" in line]
    assert logged["rewards/failed"] == pytest.approx(3 / 8)
    assert logged["reward"] == pytest.approx(sum(one for one in rewards if one is not None) / 5)


def test_penalties_and_normalised_components_make_the_advantages_that_the_formula_says(policy, tmp_path):
    own = Rewards(weights={"first": 0.5}, normalise={"variety": "batch"}, clip=(-1.0, 1.0))
    trainer, lines = judged(policy, tmp_path, own, scale_rewards="none")
    judged_lines = [one["rewards"] for one in lines if not one["failure"]]
    variety = [one["variety"] for one in judged_lines]
    mean = sum(variety) / len(variety)
    deviation = (sum((value - mean) ** 2 for value in variety) / (len(variety) - 1)) ** 0.5

    def made(one):
        scaled = max(-1.0, min(1.0, (one["variety"] - mean) / (deviation + 1e-4)))
        return scaled + 0.5 * max(-1.0, min(1.0, one["first"]))

    rewards = [None if one["failure"] else made(one["rewards"]) for one in lines]
    expected = []
    for group in (rewards[:4], rewards[4:]):
        there = [value for value in group if value is not None]
        expected += [0.0 if value is None else value - sum(there) / len(there) for value in group]
    assert sorted(trainer._buffered_inputs[0]["advantages"].tolist()) == pytest.approx(sorted(expected), abs=1e-4)
    (logged,) = [line for line in trainer.state.log_history if "rewards/failed" in line]
    assert logged["rewards/variety/mean"] == pytest.approx(mean), "as it was, not as it was made"

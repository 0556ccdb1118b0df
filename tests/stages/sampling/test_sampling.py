"""The sampler: ids in, ids out, from the model's distribution, and the same whatever stands beside a sequence."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from json import dumps

import numpy as np
import pytest
import torch
from transformers import Lfm2Config, Lfm2ForCausalLM, Qwen2Config, Qwen2ForCausalLM

from stages.errors import BadInput
from stages.runtime.chunks import Chunks, count
from stages.sampling import Decoding, batches, sample, turn_ends, vllm_engine
from stages.sampling.continuous_engine import Continuous
from stages.sampling.draws import draw
from stages.sampling.transformers_engine import Transformers
from tests.conftest import run_cli
from tests.models import make_model, make_tokenizer

TOKENIZER = make_tokenizer()
PROMPTS = [TOKENIZER("What is 1 + 2?" + " please" * n)["input_ids"] for n in (4, 0, 2, 9, 1)]
KEYS = ["a", "b", "c", "d", "e"]


def engine_of(model, batch_tokens=2**17, kind=Transformers):
    return kind(model, turn_ends(TOKENIZER, model.generation_config), TOKENIZER.pad_token_id, batch_tokens)


def ending():
    """A model that ends with about every twentieth token: most completions end early and some late."""
    model = make_model(TOKENIZER, seed=3).eval()
    head = torch.nn.Linear(model.config.hidden_size, len(TOKENIZER))
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()[TOKENIZER.eos_token_id] = math.log(len(TOKENIZER) / 20)
    model.lm_head = head
    return model


MODEL = make_model(TOKENIZER, seed=3).eval()
ENGINE = engine_of(MODEL)
DECODING = Decoding(1.0, 40, samples=5)


def step_by_step(model, prompt, length, choose):
    """Decoding by the definition: no cache, no padding, no batch."""
    ids = list(prompt)
    for step in range(length):
        ids.append(choose(step, model(input_ids=torch.tensor([ids])).logits[0, -1]))
        if ids[-1] == TOKENIZER.eos_token_id:
            break
    return ids[len(prompt) :]


def inverse(seed, key, number, temperature):
    """What the docstring of `draws` says, for one sequence, in numpy."""
    seed = int(sha256(dumps([seed, key, number]).encode()).hexdigest()[:32], 16)
    uniforms = (np.random.Philox(key=seed).random_raw(1000) >> 11) / 2**53

    def choose(step, logits):
        odds = np.exp((logits.double() / temperature).detach().numpy())
        return int(np.nonzero(np.cumsum(odds / odds.sum()) > uniforms[step])[0][0])

    return choose


def with_window():
    """One layer sees everything, the other eight tokens."""
    torch.manual_seed(5)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(TOKENIZER),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=1,
            eos_token_id=TOKENIZER.eos_token_id,
        )
    ).eval()


@pytest.mark.parametrize("model", [MODEL, with_window(), ending()], ids=["full", "sliding window", "early ends"])
def test_a_sequence_is_what_full_forwards_and_its_own_numbers_give(model):
    """Against an implementation that knows no cache, padding, batch or leaving, at 70 tokens: past a block of numbers
    and past the room of the cache."""
    sampled = sample(engine_of(model), PROMPTS, KEYS, Decoding(0.8, 70, samples=2), seed=11)
    for prompt, key, group in zip(PROMPTS, KEYS, sampled, strict=True):
        assert group == [step_by_step(model, prompt, 70, inverse(11, key, number, 0.8)) for number in range(2)]


def test_greedy_decoding_is_the_argmax_at_every_token_whatever_the_batch():
    sampled = sample(ENGINE, PROMPTS, KEYS, Decoding(0.0, 10), seed=0)
    assert sampled == [
        [step_by_step(MODEL, prompt, 10, lambda _, logits: logits.argmax().item())] for prompt in PROMPTS
    ]


def test_a_row_gets_the_same_in_batches_of_one_of_seven_and_of_all():
    prompts, keys = PROMPTS * 3, [f"{key}{n}" for n in range(3) for key in KEYS]
    longest = max(map(len, prompts)) + DECODING.max_completion_length
    one, seven, every = (
        sample(engine_of(ending(), lines * longest), prompts, keys, DECODING, seed=4) for lines in (1, 7, 1000)
    )
    assert one == seven == every


def test_a_row_gets_the_same_in_another_order_among_others_and_with_more_samples():
    every = sample(ENGINE, PROMPTS, KEYS, DECODING, seed=4)
    assert sample(ENGINE, PROMPTS[::-1], KEYS[::-1], DECODING, seed=4) == every[::-1]
    assert sample(ENGINE, PROMPTS[2:3], KEYS[2:3], DECODING, seed=4) == every[2:3]
    assert [g[:2] for g in every] == sample(ENGINE, PROMPTS, KEYS, replace(DECODING, samples=2), seed=4)


def test_another_seed_key_or_sample_number_gives_another_completion():
    first = sample(ENGINE, PROMPTS, KEYS, DECODING, seed=1)
    seeded = sample(ENGINE, PROMPTS, KEYS, DECODING, seed=2)
    renamed = sample(ENGINE, PROMPTS, [key + "x" for key in KEYS], DECODING, seed=1)
    assert len({tuple(ids) for groups in (first, seeded, renamed) for group in groups for ids in group}) == 75


SETTINGS = [{"top_k": 5, "top_p": 0.3}, {"min_p": 0.9}, {"repetition_penalty": 5.0}, {"num_beams": 3}]


@pytest.mark.parametrize(
    ("kind", "setting"), [*((Transformers, setting) for setting in SETTINGS), (Continuous, SETTINGS[2])], ids=str
)
def test_the_models_own_generation_settings_play_no_part(kind, setting):
    greedy = [Decoding(0.0, 5)] + [Decoding(1.0, 5, 2)] * (kind is Transformers)
    opinionated = make_model(TOKENIZER, seed=3).eval()
    for name, value in setting.items():
        setattr(opinionated.generation_config, name, value)
    for decoding in greedy:
        plain, other = (
            sample(engine_of(model, kind=kind), PROMPTS, KEYS, decoding, seed=0)
            for model in (make_model(TOKENIZER, seed=3), opinionated)
        )
        assert plain == other
    assert all(getattr(opinionated.generation_config, name) == value for name, value in setting.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_follow_the_models_distribution(dtype):
    """The first token of 20,000 samples against the softmax."""
    model, prompt = make_model(TOKENIZER, seed=3).to(dtype).eval(), PROMPTS[0]
    keys = [str(i) for i in range(400)]
    sampled = sample(engine_of(model), [prompt] * 400, keys, Decoding(1.0, 1, samples=50), seed=0)
    counts = torch.bincount(torch.tensor([ids[0] for group in sampled for ids in group]), minlength=len(TOKENIZER))
    expected = 20_000 * torch.softmax(model(input_ids=torch.tensor([prompt])).logits[0, -1].float(), -1)
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    degrees = len(TOKENIZER) - 1
    assert abs(chi2 - degrees) < 5 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature):
    prompt, keys = PROMPTS[1], [str(i) for i in range(100)]
    sampled = sample(ENGINE, [prompt] * 100, keys, Decoding(temperature, 1, samples=50), seed=0)
    log_probs = torch.log_softmax(MODEL(input_ids=torch.tensor([prompt])).logits[0, -1], -1)
    tempered = torch.softmax(log_probs / temperature, -1)
    mean = sum(log_probs[ids[0]].item() for group in sampled for ids in group) / 5000
    spread = (tempered * (log_probs - (tempered * log_probs).sum()) ** 2).sum().sqrt().item()
    assert mean == pytest.approx((tempered * log_probs).sum().item(), abs=5 * spread / 5000**0.5)


def test_a_number_at_either_end_draws_a_token_that_can_be():
    logits = torch.tensor([[-math.inf, 1.0, -math.inf, 2.0, -math.inf]])
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(logits.expand(2, -1), 1.0, ends).tolist() == [1, 3]


@pytest.mark.parametrize("kind", [Transformers, Continuous])
def test_a_completion_stops_with_its_first_end_or_is_cut(kind):
    groups = sample(engine_of(ending(), kind=kind), PROMPTS, KEYS, Decoding(1.5, 30, samples=4), seed=0)
    completions = [ids for group in groups for ids in group]
    assert [len(group) for group in groups] == [4] * 5
    assert all(TOKENIZER.eos_token_id not in ids[:-1] for ids in completions)
    assert {ids[-1] == TOKENIZER.eos_token_id for ids in completions if len(ids) < 30} == {True}
    assert {ids[-1] == TOKENIZER.eos_token_id for ids in completions} == {True, False}


@contextmanager
def forwards(model):
    """(B, T) of every forward pass inside."""
    seen = []
    hook = model.register_forward_pre_hook(
        lambda _, args, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    yield seen
    hook.remove()


def test_a_prompt_is_read_once_and_who_has_finished_leaves():
    model = ending()
    with forwards(model) as seen:
        groups = sample(engine_of(model), PROMPTS, KEYS, Decoding(1.0, 60, samples=40), seed=0)
    lengths = [len(ids) for group in groups for ids in group]
    assert seen[0] == (5, max(map(len, PROMPTS))) and seen[1][0] > 150
    assert len(seen) == max(lengths), "it stops with the last sequence"
    needed = sum(lengths) - len(lengths)
    assert needed <= sum(lines for lines, _ in seen[1:]) < 1.15 * needed


def test_batches_hold_as_many_tokens_as_they_may_and_the_longest_prompts_come_first():
    from stages.sampling import SequenceRequest

    asked = [SequenceRequest(i, 0, range(length), 0, str(i)) for i, length in enumerate([5, 30, 20, 5, 100, 1])]
    cut = batches(asked, longest=10, tokens=80)
    assert [[one.row for one in batch] for batch in cut] == [[4], [1, 2], [0, 3, 5]], (
        "one that is too long on its own is a batch of its own"
    )


def test_progress_tells_how_many_prompts_are_done():
    heard = []
    engine = engine_of(MODEL, 512 * (max(map(len, PROMPTS)) + 2))
    sample(engine, [PROMPTS[0]] * 5, KEYS, Decoding(1.0, 2, samples=256), seed=0, on_progress=heard.append)
    assert heard == sorted(heard) and heard[-1] == 5 and len(heard) > 1


@dataclass(frozen=True)
class Recording(Transformers):
    """Keeps what it was asked for, and dies when it is asked once too often."""

    lives: int = 1000
    asked: list = field(default_factory=list)

    def complete(self, batch, decoding):
        if len(self.asked) == self.lives:
            raise KeyboardInterrupt
        self.asked.append([(one.row, one.sample) for one in batch])
        return super().complete(batch, decoding)


def test_what_was_sampled_before_a_death_is_found_in_other_batches_too(tmp_path):
    def engine(lines, **more):
        made = engine_of(ending(), lines * 100)
        return Recording(made.model, made.ends, made.pad, made.batch_tokens, **more)

    chunks, whole = Chunks(tmp_path, "policy"), sample(ENGINE_ENDING, PROMPTS, KEYS, DECODING, seed=0)
    dies = engine(4, lives=3)
    with pytest.raises(KeyboardInterrupt):
        sample(dies, PROMPTS, KEYS, DECODING, 0, chunks=chunks)
    before = {one for batch in dies.asked for one in batch}
    assert count(tmp_path) == 3 and 0 < len(before) < 25
    again = engine(9)
    assert sample(again, PROMPTS, KEYS, DECODING, 0, chunks=chunks) == whole
    assert before.isdisjoint(one for batch in again.asked for one in batch)
    for other in ({"seed": 1}, {"decoding": replace(DECODING, temperature=0.9)}, {"chunks": Chunks(tmp_path, "other")}):
        asked = {"decoding": DECODING, "seed": 0, "chunks": chunks, **other}
        fresh = engine(100)
        sample(fresh, PROMPTS, KEYS, **asked)
        assert sum(map(len, fresh.asked)) == 25, f"{other} is another question"


@pytest.mark.parametrize(
    ("change", "samples"),
    [
        ({}, 0),
        ({"seed": 1}, 2),
        ({"keys": ["a", "x"]}, 1),
        ({"prompts": [PROMPTS[0], PROMPTS[2]]}, 1),
        ({"policy": "other"}, 2),
        ({"decoding": Decoding(0.9, 4)}, 2),
        ({"decoding": Decoding(1.0, 5)}, 2),
        ({"decoding": Decoding(1.0, 4, samples=2)}, 2),
        ({"engine": {"name": "another"}}, 2),
        ({"engine": {"ends": frozenset({1})}}, 2),
        ({"engine": {"batch_tokens": 1}}, 0),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_committed_answers_only_the_very_same_question(change, samples, tmp_path):
    """How many of two sequences are sampled anew when one thing is another; two samples of each need the second
    ones."""

    def sampled(policy="policy", engine=None, **question):
        asking = {"prompts": PROMPTS[:2], "keys": KEYS[:2], "decoding": Decoding(1.0, 4), "seed": 0, **question}
        asked = Recording(MODEL, **{"ends": ENGINE.ends, "pad": ENGINE.pad, "batch_tokens": 2**17, **(engine or {})})
        sample(asked, **asking, chunks=Chunks(tmp_path, policy))
        return sum(map(len, asked.asked))

    assert sampled() == 2
    assert sampled(**change) == samples


ENGINE_ENDING = engine_of(ending())


def test_a_torn_chunk_counts_as_not_committed(tmp_path):
    chunks = Chunks(tmp_path, "policy")
    whole = sample(ENGINE, PROMPTS, KEYS, DECODING, 0, chunks=chunks)
    (file,) = (tmp_path / "chunks").glob("*.json")
    file.write_bytes(file.read_bytes()[:-5])
    assert sample(ENGINE, PROMPTS, KEYS, DECODING, 0, chunks=chunks) == whole


@pytest.mark.parametrize("kind", [Transformers, Continuous])
def test_a_model_with_recurrent_layers_is_refused_in_one_line(kind):
    config = Lfm2Config(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )
    with pytest.raises(BadInput, match=r"^sampler: [a-z]+ cannot take the state of lfm2 apart[^\n]+$"):
        sample(engine_of(Lfm2ForCausalLM(config).eval(), kind=kind), PROMPTS, KEYS, DECODING, seed=0)


def test_continuous_batching_is_greedy_where_it_is_told_and_is_seeded_by_the_batch():
    engine = engine_of(MODEL, kind=Continuous)
    greedy = sample(engine, PROMPTS, KEYS, Decoding(0.0, 10), seed=0)
    assert greedy == sample(ENGINE, PROMPTS, KEYS, Decoding(0.0, 10), seed=0)
    first, again, other = (sample(engine, PROMPTS, KEYS, Decoding(1.0, 10, 3), seed) for seed in (1, 1, 2))
    assert first == again != other


def test_vllm_is_refused_where_it_is_missing_before_anything_runs(settings, write, tmp_path):
    if vllm_engine.find_spec("vllm") is not None:
        pytest.skip("vllm is installed")
    settings["sampler"] = "vllm"
    done = run_cli("run", write(settings), "--registry", tmp_path / "r", "--no-prefect")
    assert done.returncode == 2 and "sampler: vllm is not installed here" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not list((tmp_path / "r" / "artifacts").glob("*"))


def test_the_sampler_moves_the_keys_of_what_it_samples_and_no_others(settings, write, tmp_path):
    from pipeline.plan.steps import steps
    from pipeline.recipe.recipe import Recipe
    from pipeline.registry import Registry

    def keys(**more):
        return {
            one.name: one.identity["sampler"] for one in steps(Recipe(**settings, **more), Registry(tmp_path / "r"))
        }

    plain = keys()
    assert plain["warmup"] is plain["rl1"] is None and plain["harvest"] == plain["rl1.evaluate"] == "transformers"
    assert keys(sampler="continuous") == {name: used and "continuous" for name, used in plain.items()}

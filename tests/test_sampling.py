"""The sampler: ids in, ids out, the same whatever stands beside a prompt where nothing is random."""

from __future__ import annotations

import pytest
import torch

from stages.sampling import Decoding, sample
from tests.models import make_model, make_tokenizer

TOKENIZER = make_tokenizer()
MODEL = make_model(TOKENIZER, seed=3).eval()
PROMPTS = [TOKENIZER("What is 1 + 2?" + " please" * n)["input_ids"] for n in (4, 0, 2, 9, 1)]


def argmax_one_by_one(prompt, length):
    """Greedy decoding by the definition: no cache, no padding, no batch."""
    ids = list(prompt)
    for _ in range(length):
        ids.append(MODEL(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == TOKENIZER.eos_token_id:
            break
    return ids[len(prompt) :]


def test_greedy_decoding_is_the_argmax_at_every_token_whatever_the_batch():
    sampled = sample(MODEL, TOKENIZER, PROMPTS, Decoding(0.0, 10), seed=0)
    assert sampled == [[argmax_one_by_one(prompt, 10)] for prompt in PROMPTS]


def test_the_same_seed_gives_the_same_samples_and_another_gives_others():
    decoding = Decoding(1.0, 10, samples=3)
    first = sample(MODEL, TOKENIZER, PROMPTS, decoding, seed=1)
    assert first == sample(MODEL, TOKENIZER, PROMPTS, decoding, seed=1)
    assert first != sample(MODEL, TOKENIZER, PROMPTS, decoding, seed=2)
    assert [len(group) for group in first] == [3] * len(PROMPTS)


SETTINGS = [{"top_k": 5, "top_p": 0.3}, {"min_p": 0.9}, {"repetition_penalty": 5.0}, {"num_beams": 3}]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_models_own_generation_settings_play_no_part(setting):
    plain = [
        sample(MODEL, TOKENIZER, PROMPTS, decoding, seed=0) for decoding in (Decoding(0.0, 10), Decoding(1.0, 10, 2))
    ]
    opinionated = make_model(TOKENIZER, seed=3).eval()
    for name, value in setting.items():
        setattr(opinionated.generation_config, name, value)
    assert plain == [
        sample(opinionated, TOKENIZER, PROMPTS, decoding, seed=0)
        for decoding in (Decoding(0.0, 10), Decoding(1.0, 10, 2))
    ]
    assert getattr(opinionated.generation_config, next(iter(setting))) == next(iter(setting.values())), (
        "and they are left as they were"
    )


def test_samples_follow_the_models_distribution():
    """The first token of 20,000 samples against the softmax."""
    prompt = PROMPTS[0]
    sampled = sample(MODEL, TOKENIZER, [prompt] * 400, Decoding(1.0, 1, samples=50), seed=0)
    counts = torch.bincount(torch.tensor([ids[0] for group in sampled for ids in group]), minlength=len(TOKENIZER))
    expected = 20_000 * torch.softmax(MODEL(input_ids=torch.tensor([prompt])).logits[0, -1], -1)
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    degrees = len(TOKENIZER) - 1
    assert abs(chi2 - degrees) < 5 * (2 * degrees) ** 0.5


def test_a_completion_stops_with_its_first_end():
    biased = make_model(TOKENIZER, seed=3).eval()
    with torch.no_grad():
        biased.lm_head.weight[TOKENIZER.eos_token_id] = 3 * biased.lm_head.weight.mean(0)
    for group in sample(biased, TOKENIZER, PROMPTS * 4, Decoding(1.5, 30, samples=4), seed=0):
        for ids in group:
            assert TOKENIZER.eos_token_id not in ids[:-1]


def test_progress_tells_how_many_prompts_are_done():
    heard = []
    sample(MODEL, TOKENIZER, PROMPTS, Decoding(1.0, 2, samples=256), seed=0, on_progress=heard.append)
    assert heard == [2, 4, 5]


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature):
    prompt = PROMPTS[1]
    sampled = sample(MODEL, TOKENIZER, [prompt] * 100, Decoding(temperature, 1, samples=50), seed=0)
    log_probs = torch.log_softmax(MODEL(input_ids=torch.tensor([prompt])).logits[0, -1], -1)
    tempered = torch.softmax(log_probs / temperature, -1)
    mean = sum(log_probs[ids[0]].item() for group in sampled for ids in group) / 5000
    spread = (tempered * (log_probs - (tempered * log_probs).sum()) ** 2).sum().sqrt().item()
    assert mean == pytest.approx((tempered * log_probs).sum().item(), abs=5 * spread / 5000**0.5)

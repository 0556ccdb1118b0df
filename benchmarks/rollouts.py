"""What the sampler gives: tokens per second of each backend against plain `model.generate` and against TRL's
generation, in one run.

    python benchmarks/rollouts.py

The mix: 24 prompts of 16 to 256 tokens (log-uniform, in no order) x 8 samples at temperature 1. Lengths of completions
have a long tail, as those of models that reason: each token is the last with a chance of 1/128 (the random model's
logit for "end" is raised until it is), so half of the completions have less than 90 tokens, and 2 in 100 are cut at
512. All contestants sample from this same model; lengths are what they turn out to be, and are printed.

Contestants: - `generate`: what a script does first. The prompts in the order of the data set, padded into one big
batch, `num_return_sequences=8`. - `trl`: `GRPOTrainer._generate_single_turn`, which generates in training: the same
prompts, each 8 times, in one batch. - `transformers`, `continuous`: the backends, at their default settings. `vllm` is
not measured: it has not been run.

Tokens are those up to and including the end; padding after it counts for nobody. Rounds alternate, each with a seed of
its own, and each gives a ratio to `generate`; the table has median and range. CPU time of the process, with one
thread, on a CPU; wall time on a GPU. Exits 1 when the median ratio of `transformers` is below its bound."""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import Any, cast

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
import trl
from datasets import Dataset, disable_progress_bars
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from stages.job import Execution
from stages.sampling import Decoding, Engine, sample, until_end
from stages.sampling.continuous_engine import Continuous
from stages.sampling.transformers_engine import Transformers
from tests.models import make_tokenizer

BASELINE, BOUND = "generate", 2.0
PROMPTS, SAMPLES, LONGEST, MEAN = 24, 8, 512, 128
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPU = torch.cuda.is_available()
TOKENIZER = make_tokenizer()
END, PAD = cast(int, TOKENIZER.eos_token_id), cast(int, TOKENIZER.pad_token_id)
DECODING = Decoding(1.0, LONGEST, SAMPLES)

Contestant = Callable[[int], list[list[int]]]
"""Seed -> the completions of all prompts, each to its end."""


def main() -> int:
    """Take turns, then print the table."""
    options = parsed()
    torch.set_num_threads(1)
    disable_progress_bars()
    prompts = mix(options.prompts)
    with tempfile.TemporaryDirectory() as directory:
        rounds = turns(contestants(prompts, directory), options.rounds)
    print_setting(prompts, rounds)
    return 0 if print_table(rounds) >= BOUND else 1


def mix(count: int) -> list[list[int]]:
    """Prompts, log-uniform in length, of any tokens but the special ones."""
    numbers = random.Random(0)
    lengths = [round(math.exp(numbers.uniform(math.log(16), math.log(256)))) for _ in range(count)]
    return [[numbers.randrange(3, len(TOKENIZER)) for _ in range(length)] for length in lengths]


def random_model() -> Qwen2ForCausalLM:
    """Small, random, and with a chance of 1 in MEAN to end at any token."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(TOKENIZER),
        max_position_embeddings=1024,
        eos_token_id=END,
        pad_token_id=PAD,
        bos_token_id=None,
        **SHAPE,
    )
    model = Qwen2ForCausalLM(config)
    head = torch.nn.Linear(config.hidden_size, len(TOKENIZER))
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()[END] = math.log(len(TOKENIZER) / (MEAN - 1))
    model.lm_head = head
    return model.to("cuda" if GPU else "cpu").eval()


def contestants(prompts: list[list[int]], directory: str) -> dict[str, Contestant]:
    """By name, in the order of a round; each with a model of its own, because trainers change theirs."""
    ends, tokens = frozenset([END]), Execution().sampler_tokens
    return {
        BASELINE: plain(prompts, random_model()),
        "trl": of_trl(prompts, random_model(), directory),
        "transformers": of_engine(prompts, Transformers(random_model(), ends, PAD, tokens)),
        "continuous": of_engine(prompts, Continuous(random_model(), ends, PAD, tokens)),
    }


def plain(prompts: list[list[int]], model: Any) -> Contestant:
    """One big batch, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    config = GenerationConfig(
        max_new_tokens=LONGEST, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=SAMPLES,
        eos_token_id=END, pad_token_id=PAD,
    )  # fmt: skip

    def completions(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        with torch.inference_mode():
            generated = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        return [until_end(line, frozenset([END])) for line in generated[:, width:].tolist()]

    return completions


def of_trl(prompts: list[list[int]], model: Any, directory: str) -> Contestant:
    """The generation of a GRPOTrainer, which repeats a prompt for each of its samples."""
    arguments = GRPOConfig(
        output_dir=directory,
        max_completion_length=LONGEST,
        num_generations=SAMPLES,
        per_device_train_batch_size=SAMPLES,
        report_to=[],
        use_cpu=not GPU,
        bf16=False,
    )
    trainer: Any = GRPOTrainer(
        model=model,
        reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "x"}]),
        processing_class=TOKENIZER,
    )
    repeated = [prompt for prompt in prompts for _ in range(SAMPLES)]

    def completions(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return trainer._generate_single_turn(repeated, None, {}, SAMPLES)[0]

    return completions


def of_engine(prompts: list[list[int]], engine: Engine) -> Contestant:
    """A backend, as a stage calls it, with nothing to resume from."""
    keys = [str(i) for i in range(len(prompts))]
    return lambda seed: [ids for group in sample(engine, prompts, keys, DECODING, seed) for ids in group]


def turns(contestants: dict[str, Contestant], rounds: int) -> list[dict[str, tuple[float, list[int]]]]:
    """Round by round, name -> (tokens per second, lengths)."""
    return [{name: measured(one, seed) for name, one in contestants.items()} for seed in range(rounds)]


def measured(contestant: Contestant, seed: int) -> tuple[float, list[int]]:
    """(tokens per second, lengths of the completions)"""
    start = now()
    lengths = [len(ids) for ids in contestant(seed)]
    return sum(lengths) / (now() - start), lengths


def now() -> float:
    """Seconds."""
    if GPU:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def print_setting(prompts: Sequence[Sequence[int]], rounds: list[dict[str, tuple[float, list[int]]]]) -> None:
    """What was measured, and on what."""
    device = torch.cuda.get_device_name() if GPU else "one CPU thread"
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}, {device}, float32"
    )
    print(f"model {SHAPE}, vocabulary {len(TOKENIZER)}; {len(prompts)} prompts x {SAMPLES}, {len(rounds)} rounds")
    print(f"prompts: {spread([len(prompt) for prompt in prompts])} tokens")
    for name in rounds[0]:
        print(f"completions of {name}: {spread([n for one in rounds for n in one[name][1]])} tokens")


def spread(lengths: list[int]) -> str:
    """Where lengths lie."""
    return (
        f"mean {sum(lengths) / len(lengths):.0f}, quartiles {' '.join(f'{n:.0f}' for n in quantiles(lengths))}, "
        f"most {max(lengths)}"
    )


def print_table(rounds: list[dict[str, tuple[float, list[int]]]]) -> float:
    """A line a contestant; returns the median ratio of `transformers`."""
    print(f"\n{'':14s}{'tokens/s':>10s}   ratio to {BASELINE}: median (range over rounds)")
    middle: dict[str, float] = {}
    for name in rounds[0]:
        ratios = [one[name][0] / one[BASELINE][0] for one in rounds]
        middle[name] = median(ratios)
        speed = median(one[name][0] for one in rounds)
        print(f"{name:14s}{speed:10.0f}   {middle[name]:.2f} ({min(ratios):.2f} - {max(ratios):.2f})")
    return middle["transformers"]


def parsed() -> argparse.Namespace:
    """Options; the defaults are the stated mix."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

"""What token weights cost: a training step of our loss against TRL's own two, in one run.

    python benchmarks/weighted_loss.py

Contestants: WeightedSFTTrainer (a prompt token weighs 0.1), and TRL's SFTTrainer with full-sequence and with
completion-only loss. All train the same random Qwen2 model, with Qwen's vocabulary, on the same rows, half of each row
prompt. The model is small on a CPU and of 0.5B shape on a GPU. A step is what Trainer does between two updates: count
the tokens, compute the loss, go backward. There is no optimiser.

Time: all three in one process, in turns; each round gives one ratio to full-sequence. The table has the median and a
95 % bootstrap interval. On a CPU it is CPU time of the process, on a GPU wall time with a synchronise. Memory: each in
a process of its own, what a step adds at its peak, after one to warm up. On a CPU it is resident memory, on a GPU what
PyTorch allocates. Exits 1 when the time, its median, or the memory is above its bound."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig, SFTTrainer

from stages.tokens.token_rows import TokenRow, labelled
from stages.trl.sft_loss import WeightedSFTTrainer

ROOT = Path(__file__).parent.parent
OURS, FULL, COMPLETION = "switchback weighted", "TRL full-sequence", "TRL completion-only"
CONTESTANTS = (OURS, FULL, COMPLETION)
WEIGHTS = {"system": 0.1, "user": 0.1, "template": 0.1, "prefix": 1.0, "completion": 1.0}
TIME_BOUND, MEMORY_BOUND = 1.05, 1.02
TIMES = "times"
KEEP_FREED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""For glibc. Else half of the CPU time is page faults of large tensors, and that half depends on what else the machine
does."""
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
"""For glibc. Else it keeps some freed tensors, not the same ones in every run, and peaks differ by 7 %."""
GPU = torch.cuda.is_available()
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
QWEN2_0_5B = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}


def main() -> int:
    """Start a process for each measurement, or be one."""
    options = parsed()
    if options.measure:
        print(json.dumps(measured(options)))
        return 0
    peaks = {name: in_a_process(name, RETURN_FREED) for name in CONTESTANTS}
    results = figures(in_a_process(TIMES, KEEP_FREED), peaks)
    print_table(results, options)
    if options.json:
        options.json.write_text(json.dumps({"setting": setting(options), "results": results}, indent=1))
    return verdict(results[OURS])


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8, help="rows of a step")
    parser.add_argument("--length", type=int, default=2048 if GPU else 128, help="tokens of a row")
    parser.add_argument("--vocabulary", type=int, default=151_936, help="tokens of the vocabulary")
    parser.add_argument("--rounds", type=int, default=30 if GPU else 12, help="steps of each contestant")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch on the CPU")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--measure", choices=(TIMES, *CONTESTANTS), help=argparse.SUPPRESS)
    return parser.parse_args()


def in_a_process(what: str, environment: dict[str, str]) -> Any:
    """What `measured` found in a new process. A peak is of a process's whole life, so no two contestants can share
    one."""
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", what]
    done = subprocess.run(command, env={**os.environ, **environment}, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured(options: argparse.Namespace) -> Any:
    """The times of all, or the memory of one."""
    torch.set_num_threads(options.threads)
    disable_progress_bars()
    return times(options) if options.measure == TIMES else memory(options.measure, options)


class Contestant:
    """A trainer with its model, and the one batch it sees."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        data = dataset(name, options)
        self.trainer = trainer(name, data, options.vocabulary)
        self.batch = self.trainer._prepare_inputs(self.trainer.data_collator(list(data)))
        self.model = self.trainer.accelerator.prepare_model(self.trainer.model)  # Trainer.train does this and the next
        if GPU:
            self.model.activation_checkpointing_enable()

    def step(self) -> None:
        """Forward and backward. The gradients stay until the next step, as in training they stay until the update."""
        self.model.zero_grad()
        count = self.trainer._get_num_items_in_batch([self.batch], self.trainer.args.device)
        self.trainer.training_step(self.model, dict(self.batch), count)

    def warm_up(self) -> None:
        """One step. Raises RuntimeError where it leaves a parameter without a gradient."""
        self.step()
        for name, parameter in self.model.named_parameters():
            gradient = parameter.grad
            if gradient is None or not gradient.isfinite().all() or not gradient.any():
                raise RuntimeError(f"{name} got no gradient, or one that is zero or not finite")


def dataset(name: str, options: argparse.Namespace) -> Dataset:
    """The same random tokens for everyone, with the labels that this contestant reads."""
    rng, prompt = random.Random(0), options.length // 2
    roles = "u" * prompt + "c" * (options.length - prompt)
    ids = [rng.choices(range(options.vocabulary), k=options.length) for _ in range(options.rows)]
    if name == OURS:
        return Dataset.from_list([labelled(TokenRow("", one, roles)) for one in ids])
    ignored = prompt if name == COMPLETION else 0
    return Dataset.from_list([{"input_ids": one, "labels": [-100] * ignored + one[ignored:]} for one in ids])


def trainer(name: str, data: Dataset, vocabulary: int) -> Any:
    """As switchback's sft stage makes it: on a GPU, bfloat16 and activation checkpointing."""
    settings = SFTConfig(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=len(data),
        max_length=None,
        use_cpu=not GPU,
        bf16=GPU,
        activation_checkpointing=GPU,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    kind, ours = (WeightedSFTTrainer, {"weights": WEIGHTS}) if name == OURS else (SFTTrainer, {})
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "configs" / "tiny-base")
    return kind(model=model(vocabulary), args=settings, train_dataset=data, processing_class=tokenizer, **ours)


def model(vocabulary: int) -> Qwen2ForCausalLM:
    """Random weights, the same for everyone."""
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=vocabulary, tie_word_embeddings=True, **(QWEN2_0_5B if GPU else SMALL))
    return Qwen2ForCausalLM(config).to(torch.bfloat16 if GPU else torch.float32)


def times(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each contestant in each round."""
    contestants = {name: Contestant(name, options) for name in CONTESTANTS}
    for one in contestants.values():
        one.warm_up()
    taken: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for _ in range(options.rounds):
        for name, one in contestants.items():
            start = now()
            one.step()
            taken[name].append(now() - start)
    return taken


def now() -> float:
    """Seconds. CPU time does not count the time that other processes take."""
    if not GPU:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def memory(name: str, options: argparse.Namespace) -> float:
    """MB that a step adds at its peak to the model and its data."""
    contestant = Contestant(name, options)
    contestant.warm_up()
    contestant.model.zero_grad()
    reset_peak()
    baseline = peak()
    contestant.step()
    return peak() - baseline


def reset_peak() -> None:
    """From here on, `peak` starts at what is held now."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """MB."""
    if GPU:
        return torch.cuda.max_memory_allocated() / 2**20
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 2**10


def figures(taken: dict[str, list[float]], peaks: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Contestant -> its line of the table."""
    ratios = {name: [a / b for a, b in zip(taken[name], taken[FULL], strict=True)] for name in CONTESTANTS}
    return {
        name: {
            "ms": 1000 * median(taken[name]),
            "time": median(ratios[name]),
            "interval": interval(ratios[name]),
            "mb": peaks[name],
            "memory": peaks[name] / peaks[FULL],
        }
        for name in CONTESTANTS
    }


def interval(values: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    rng = random.Random(0)
    medians = sorted(median(rng.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[1949]


def setting(options: argparse.Namespace) -> str:
    """What was measured, and on what."""
    where = torch.cuda.get_device_name() if GPU else f"CPU, {options.threads} thread(s)"
    return (
        f"{options.rows} rows x {options.length} tokens, vocabulary {options.vocabulary}, {options.rounds} "
        f"rounds; {where}"
    )


def print_table(results: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """One line a contestant."""
    print(setting(options))
    print(f"{'contestant':<22}{'ms/step':>9}  {'ratio to full [95 %]':<24}{'peak MB over baseline':>21}{'ratio':>8}")
    for name, seen in results.items():
        low, high = seen["interval"]
        ratio = f"{seen['time']:.3f} [{low:.3f}, {high:.3f}]"
        print(f"{name:<22}{seen['ms']:>9.0f}  {ratio:<24}{seen['mb']:>21.1f}{seen['memory']:>8.3f}")


def verdict(ours: dict[str, Any]) -> int:
    """Say whether the targets are met."""
    print(f"targets: at most {TIME_BOUND}x time and {MEMORY_BOUND}x memory of TRL's full-sequence loss")
    met = ours["time"] <= TIME_BOUND and ours["memory"] <= MEMORY_BOUND
    sure = ours["interval"][1] <= TIME_BOUND or ours["interval"][0] > TIME_BOUND
    doubt = "" if sure else " (but the bound lies inside the interval of time: more --rounds would tell)"
    print(f"targets {'met' if met else 'NOT met'}: {ours['time']:.3f}x time, {ours['memory']:.3f}x memory{doubt}")
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())

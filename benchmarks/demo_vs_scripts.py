"""What the orchestration costs: the demo through switchback against the same work as one plain TRL script, CPU time,
in one run.

    python benchmarks/demo_vs_scripts.py

The rival (`plain`) is what one would write by hand: one process that imports TRL once, trains and samples stage after
stage, evaluates after each, and imports of switchback only the problem. Both print five held-out scores. Prefect's own
seconds are measured beside, on one cheap stage. Exits 1 when switchback takes more than 1.15 times the rival's CPU
time."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
BOUND = 1.15
PREFIX, LENGTH = "<think>\n", 36


def main() -> int:
    """Run both, print the ratio."""
    with tempfile.TemporaryDirectory() as directory:
        registry = Path(directory, "registry")
        switchback = [
            str(Path(sys.executable).parent / "switchback"),
            "run",
            "configs/demo.yaml",
            "--registry",
            str(registry),
        ]
        ours = timed("switchback --no-prefect", [*switchback, "--no-prefect"])
        theirs = timed("plain TRL script", [sys.executable, __file__, "plain", f"{directory}/plain"])
        print_scores("switchback", held_out(registry))
        print_scores("plain", json.loads(Path(directory, "plain", "scores.json").read_text()))
        harvest = [*switchback, "--only", "harvest", "--set"]
        without = timed("harvest alone, without Prefect", [*harvest, "stages.harvest.replicate=1", "--no-prefect"])
        with_it = timed("harvest alone, with Prefect", [*harvest, "stages.harvest.replicate=2"])
    ratio = ours[0] / theirs[0]
    print(
        f"Prefect's own: {with_it[0] - without[0]:.1f} s CPU, {with_it[1] - without[1]:.1f} s wall, server start "
        f"included"
    )
    print(f"switchback / plain: {ratio:.3f} CPU, {ours[1] / theirs[1]:.3f} wall (at most {BOUND} CPU wanted)")
    return int(ratio > BOUND)


def timed(what: str, command: list[str]) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of a command and of all processes it started and reaped."""
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
    }
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu, wall = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, time.monotonic() - start
    print(f"{what:<32} {cpu:7.1f} s CPU {wall:7.1f} s wall", flush=True)
    return cpu, wall


def held_out(registry: Path) -> dict[str, float]:
    """The five scores of the demo's run."""
    switchback = str(Path(sys.executable).parent / "switchback")
    shown = subprocess.run(
        [switchback, "show", "--registry", str(registry), "--json"], check=True, capture_output=True, text=True
    ).stdout
    return {one["name"]: one["evaluation"]["mean"] for one in json.loads(shown)["stages"] if one["evaluation"]}


def print_scores(who: str, scores: dict[str, float]) -> None:
    print(f"{who:<12}", "  ".join(f"{name} {100 * score:.2f}" for name, score in scores.items()))


def plain(out: Path) -> None:
    """The demo by hand. Settings are those of configs/demo.yaml."""
    import torch
    import yaml
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, set_seed
    from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    from stages.problems.base import Answer
    from stages.problems.scheduling.problem import Scheduling

    torch.set_num_threads(1)
    stage = {box["name"]: box for box in yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())["stages"]}
    problem, base = Scheduling("compact", overlap="zero"), str(ROOT / "configs" / "tiny-base")
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    scores: dict[str, float] = {}
    common = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 0,
        "data_seed": 0,
        "dataloader_pin_memory": False,
    }

    def train_rows(box):
        start, stop = map(int, box["rows"].partition("[")[2].rstrip("]").split(":"))
        return problem.rows("train", start, stop, seed=0)

    def rendered(row):
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": row.prompt}], tokenize=False, add_generation_prompt=True
        )

    def load(path):
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def generate(model, rows, samples):
        """[row][sample] of ids, shortest prompts first."""
        torch.manual_seed(0)
        model.eval()
        how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if samples > 1 else {"do_sample": False}
        config = GenerationConfig(
            max_new_tokens=LENGTH,
            num_return_sequences=samples,
            eos_token_id=[tokenizer.eos_token_id],
            pad_token_id=tokenizer.pad_token_id,
            disable_compile=True,
            **how,
        )
        prompts = [rendered(row) + PREFIX for row in rows]
        lengths = [len(ids) for ids in tokenizer(prompts)["input_ids"]]
        order = sorted(range(len(rows)), key=lengths.__getitem__)
        done = [[] for _ in rows]
        size = 512 // samples
        for at in range(0, len(order), size):
            batch = order[at : at + size]
            inputs = tokenizer([prompts[i] for i in batch], return_tensors="pt", padding=True)
            with torch.inference_mode():
                ids = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :].tolist()
            for j, i in enumerate(batch):
                done[i] = [cut(one) for one in ids[j * samples : (j + 1) * samples]]
        return done

    def cut(ids):
        return ids[: ids.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in ids else ids

    def text(ids):
        return PREFIX + tokenizer.decode(ids, skip_special_tokens=True)

    def judge(row, completion):
        return problem.judge([Answer(row, completion)])[0]

    def evaluate(name, path):
        """Greedy and eight samples on validation and held-out rows; the held-out mean is kept."""
        model = load(path)
        for split, count in (("validation", 200), ("held_out", 1000)):
            rows = problem.rows(split, 0, count, seed=0)
            for samples in (1, 8):
                judged = [
                    judge(row, text(ids)).score
                    for row, group in zip(rows, generate(model, rows, samples), strict=True)
                    for ids in group
                ]
            scores[name] = sum(judged) / len(judged)

    class WeightedTrainer(SFTTrainer):
        """SFTTrainer with 0.1 for prompt tokens."""

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            real, completion = inputs["attention_mask"].bool(), inputs["labels"] != -100
            weights = (0.1 * (real & ~completion) + 1.0 * completion)[:, 1:]
            out = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False,
                        labels=inputs["input_ids"].masked_fill(~real, -100), fused_lm_head=True)  # fmt: skip
            return -(weights * out.log_probs).sum() / weights.sum()

    def sft(box, path, pairs):
        set_seed(0)
        data = [
            {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}
            for prompt, completion in pairs
        ]
        settings = SFTConfig(
            output_dir=str(out / box["name"]),
            per_device_train_batch_size=32,
            num_train_epochs=box["epochs"],
            learning_rate=box["learning_rate"],
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            weight_decay=box["weight_decay"],
            max_length=None,
            **common,
        )
        return save(
            WeightedTrainer(
                model=load(path), args=settings, train_dataset=Dataset.from_list(data), processing_class=tokenizer
            ),
            box,
        )

    def grpo(box, path):
        set_seed(0)
        rows = train_rows(box)

        def component(name):
            def reward(completions, row, **_):
                return [
                    judge(rows[i], PREFIX + completion).rewards[name]
                    for i, completion in zip(row, completions, strict=True)
                ]

            reward.__name__ = name
            return reward

        settings = GRPOConfig(
            output_dir=str(out / box["name"]),
            per_device_train_batch_size=128,
            steps_per_generation=1,
            num_generations=8,
            max_steps=box["steps"],
            learning_rate=box["learning_rate"],
            lr_scheduler_type=box["lr_scheduler"],
            warmup_steps=5,
            beta=0.001,
            epsilon_high=0.28,
            max_completion_length=LENGTH,
            reward_weights=list(problem.reward_weights.values()),
            **common,
        )
        data = Dataset.from_list([{"prompt": rendered(row) + PREFIX, "row": i} for i, row in enumerate(rows)])
        functions = [component(name) for name in problem.reward_weights]
        return save(
            GRPOTrainer(
                model=load(path), reward_funcs=functions, args=settings, train_dataset=data, processing_class=tokenizer
            ),
            box,
        )

    def save(trainer, box):
        trainer.train()
        path = str(out / box["name"])
        trainer.model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        evaluate(box["name"], path)
        return path

    evaluate("base", base)
    rng, rows = random.Random("demonstrations-0"), train_rows(stage["warmup"])
    encode = lambda string: tokenizer(string)["input_ids"]  # noqa: E731
    warmup = sft(
        stage["warmup"],
        base,
        [(encode(rendered(row)), [*encode(problem.demonstration(row, rng)), tokenizer.eos_token_id]) for row in rows],
    )
    rl1 = grpo(stage["rl1"], warmup)
    kept, rows = [], train_rows(stage["rl1"])
    for row, group in zip(rows, generate(load(rl1), rows, 8), strict=True):
        best = [ids for ids in group if judge(row, text(ids)).score >= 1.0][:1]
        kept += [(encode(rendered(row)), encode(PREFIX) + ids) for ids in best]
    distill = sft(stage["distill"], warmup, kept)
    grpo(stage["rl2"], distill)
    (out / "scores.json").write_text(json.dumps(scores))


if __name__ == "__main__":
    if sys.argv[1:2] == ["plain"]:
        Path(sys.argv[2]).mkdir(parents=True)
        plain(Path(sys.argv[2]))
    else:
        sys.exit(main())

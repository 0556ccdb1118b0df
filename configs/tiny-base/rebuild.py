"""Rebuilds the tiny base model of the demo, from nothing, in about five minutes on one core: python
configs/tiny-base/rebuild.py

A Qwen3 of 170,528 parameters and a 160-word tokenizer. It reads lists of events and is taught three things about them:
to copy, to sort by start, and to name the weighted hours. It never sees a chat turn, a <think> or <schedule> tag, or a
solved instance, and scores 0 on the task."""

from __future__ import annotations

import math
import os
import random
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed

from stages.problems.scheduling import compact
from stages.problems.scheduling.intervals import Event, Instance

STEPS, BATCH, LEARNING_RATE, SEED = 6000, 32, 4e-3, 0

SPECIAL = ["<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>"]
HOURS = range(compact.FIRST_HOUR, compact.LAST_HOUR + 1)
WORDS = [
    *("<think>", "</think>\n", "<schedule>\n", "</think>", "<schedule>", "</schedule>"),
    *("system", "user", "assistant", "Events:", "Copy:", "Hours:", "Sorted:", "\n"),
    *(f" {hour:02d}:00" for hour in HOURS),
    *(f"-{hour:02d}:00\n" for hour in HOURS),
    *(f" {number}" for number in range(21)),
    *(chr(code) for code in range(32, 127)),
]
PIECES = (
    r"</think>\n|<schedule>\n|</?think>|</?schedule>|system|user|assistant|Events:|Copy:|Hours:|Sorted:"
    r"| \d\d:00|-\d\d:00\n| \d\d?(?![\d:])|[\s\S]"
)
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a clock time, number or tag; every other printable ASCII character is a token of its own."""
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*SPECIAL, *WORDS]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Three layers of width 64, embeddings tied."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        intermediate_size=192,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config).float()


def document(rng: random.Random) -> str:
    """An event list, then two of: a copy of some lines, the weighted hours, the list sorted by start."""
    instance = random_instance(rng)
    events = list(instance.events)
    parts = [compact.prompt(instance)]
    for task in rng.sample(range(3), 2):
        if task == 0:
            rng.shuffle(shuffled := list(events))
            parts.append("Copy:\n" + lines(shuffled[: rng.randint(1, len(events))]))
        elif task == 1:
            hours = "".join(f"{event.name} {instance.weight(event) // 60}" for event in events)
            parts.append(f"Hours:\n{hours}\n")
        else:
            parts.append("Sorted:\n" + lines(sorted(events, key=lambda e: (e.start, e.end))))
    return "".join(parts)


def random_instance(rng: random.Random) -> Instance:
    """Two to five events, under any names, up to half of them priorities."""
    count = rng.randint(2, 5)
    names = list(compact.NAMES[:count]) if rng.random() < 0.5 else rng.sample(compact.NAMES, count)
    events = []
    for name in names:
        hours = rng.randint(1, compact.LONGEST)
        start = rng.randint(compact.FIRST_HOUR, compact.LAST_HOUR - hours)
        events.append(Event(name, 60 * start, 60 * (start + hours)))
    return Instance(tuple(events), frozenset(rng.sample(names, rng.randint(0, count // 2))))


def lines(events: list[Event]) -> str:
    """Events as compact lines, none marked."""
    return compact.prompt(Instance(tuple(events), frozenset()))


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Plain language modelling of documents, AdamW, cosine to a twentieth of the learning rate."""
    rng = random.Random(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    for step in range(STEPS):
        cosine = 0.5 * (1 + math.cos(math.pi * step / STEPS)) * 0.95 + 0.05
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, (step + 1) / 50) * cosine
        texts = [document(rng) + "<|im_end|>" for _ in range(BATCH)]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 500 == 0:
            print(f"step {step + 1}/{STEPS} | loss {loss.item():.3f}", flush=True)


def main(out: Path) -> None:
    """Write model and tokenizer to `out`."""
    torch.set_num_threads(1)
    set_seed(SEED)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    train(model, tokenizer)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)

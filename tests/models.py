"""A model of two small layers and a byte-level tokenizer, made here, for tests that compare losses: random weights are
good enough."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from stages.tokens.token_rows import TokenRow

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on two sentences; it merges across <think> and newlines as real ones do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [
        "What is 12 + 30? The answer is 42.\n",
        "<think>\nOkay, so I add the numbers.\n\n</think>\n<answer>42</answer>\n\n",
    ] * 50
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
    )
    fast.chat_template = CHATML
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )


def save(path: Path, seed: int = 0) -> Path:
    """A policy directory."""
    tokenizer = make_tokenizer()
    make_model(tokenizer, seed).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def token_rows(count: int = 16) -> list[TokenRow]:
    """Sums, of different lengths."""
    tokenizer = make_tokenizer()
    rows = []
    for i in range(count):
        prompt = tokenizer(f"What is {i} + {i * 7}?" + " please" * (i % 5))["input_ids"]
        completion = tokenizer(f" The answer is {i * 8}." + " ok" * (i % 7))["input_ids"]
        ids = [*prompt, *completion, tokenizer.eos_token_id]
        rows.append(TokenRow(str(i), ids, "u" * len(prompt) + "c" * (len(completion) + 1)))
    return rows

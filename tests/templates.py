"""Real chat templates, as TRL ships them: text models only, each with a tiny tokenizer that has the special tokens, the
eos token and the generation settings of the model it is from."""

# ruff: noqa: RUF001, the names of tokens are what they are
from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

DIRECTORY = Path(trl.__file__).parent / "chat_templates"
VISION = ("idefics3", "llava_next", "smolvlm")
TEMPLATES = {
    path.stem: path.read_text()
    for path in sorted(DIRECTORY.glob("*.jinja"))
    if not path.stem.endswith("_training") and path.stem not in VISION
}
"""Name -> template; 38 of them in TRL 1.16."""
WITHOUT_SYSTEM = ("gemma",)
"""They refuse a system message."""
ADDS = ("gptoss", "glm4moe", "muse_glimmer", "qwen3", "qwen3_8")
"""They put something before an answer that has no reasoning."""
OPENS = [
    "deepseek_r1_distill",
    "deepseekv3",
    "nemotron_3_5_lightning",
    "nemotron_3_nano",
    "nemotron_3_super",
    "nemotron_3_ultra",
    "qwen3_5_think",
    "qwen3_6",
    "qwen3_8",
]
"""Their generation prompt ends in <think>."""


class Real(NamedTuple):
    """What of a model's tokenizer matters here."""

    eos: str
    pad: str
    bos: str | None
    special: tuple[str, ...]
    """Further control tokens."""
    ends: tuple[str, ...]
    """Of its generation settings."""
    added: tuple[str, ...] = ()
    """Tokens that stand alone and are not special."""


THINK = ("<think>", "</think>")
CALLS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
COHERE = Real(
    "<|END_OF_TURN_TOKEN|>",
    "<PAD>",
    "<BOS_TOKEN>",
    ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
    ("<|END_OF_TURN_TOKEN|>",),
)
DEEPSEEK = Real(
    "<｜end▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜begin▁of▁sentence｜>",
    ("<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
    ("<｜end▁of▁sentence｜>",),
    ("<｜User｜>", "<｜Assistant｜>", *THINK),
)
GEMMA = Real("<eos>", "<pad>", "<bos>", ("<start_of_turn>", "<end_of_turn>"), ("<eos>", "<end_of_turn>"))
GEMMA4 = Real(
    "<eos>",
    "<pad>",
    "<bos>",
    ("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>", "<|tool_response>", "<tool_response|>"),
    ("<eos>", "<turn|>", "<|tool_response>"),
)
LFM2 = Real("<|im_end|>", "<|pad|>", "<|startoftext|>", ("<|im_start|>", "<|endoftext|>"), ("<|im_end|>",), THINK)
LLAMA = Real(
    "<|end_of_text|>",
    "<|end_of_text|>",
    "<|begin_of_text|>",
    ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
    ("<|end_of_text|>", "<|eot_id|>"),
)
NEMOTRON = Real(
    "<|im_end|>", "<|im_end|>", "<s>", ("<|im_start|>", "</s>", "<unk>"), ("</s>", "<|im_end|>"), (*THINK, *CALLS)
)
PHI = Real(
    "<|endoftext|>",
    "<|endoftext|>",
    "<s>",
    ("<|assistant|>", "<|user|>", "<|system|>", "<|end|>"),
    ("<|endoftext|>", "<|assistant|>", "<|end|>"),
)
QWEN = Real(
    "<|im_end|>",
    "<|endoftext|>",
    None,
    ("<|im_start|>", "<|object_ref_start|>", "<|vision_start|>", "<|vision_end|>"),
    ("<|im_end|>", "<|endoftext|>"),
    CALLS,
)
QWEN3 = QWEN._replace(added=(*CALLS, *THINK))
REAL = {
    "cohere2": COHERE._replace(special=(*COHERE.special, "<|START_RESPONSE|>", "<|END_RESPONSE|>")),
    "cohere": COHERE,
    "deepseek": DEEPSEEK,
    "diffusion_gemma": GEMMA4,
    "gemma4": GEMMA4,
    "gemma": GEMMA,
    "glm4moe": Real(
        "<|endoftext|>",
        "<|endoftext|>",
        None,
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        ("<|endoftext|>", "<|user|>", "<|observation|>"),
        (*THINK, *CALLS),
    ),
    "gptoss": Real(
        "<|return|>",
        "<|endoftext|>",
        "<|startoftext|>",
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"),
        ("<|return|>", "<|endoftext|>", "<|call|>"),
    ),
    "lfm2": LFM2,
    "llama3_": LLAMA._replace(eos="<|eot_id|>", ends=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")),
    "llama3": LLAMA,
    "muse": Real(
        "<|end_of_text|>",
        "<|pad|>",
        "<|begin_of_text|>",
        ("<|start|>", "<|message|>", "<|eot|>", "<|eom|>"),
        ("<|eot|>", "<|end_of_text|>"),
    ),
    "nemotron": NEMOTRON,
    "phi3": PHI,
    "qwen2": QWEN,
    "qwen3": QWEN3,
}
"""Beginning of a template's name -> the tokenizer of the models that ship it; the first that fits counts."""


def real(name: str) -> Real:
    return next(tokenizer for start, tokenizer in REAL.items() if name.startswith(start))


@lru_cache(maxsize=1)
def _bytes() -> str:
    """Byte-level BPE without special tokens, as JSON; it merges across newlines as real ones do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = ["What is 12 + 30? The answer is 42.\n", "<think>\nOkay, so I add the numbers.\n</think>\n\n42"] * 50
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer.to_str()


def save_tokenizer(directory: Path, name: str) -> Path:
    """A directory with the template's tokenizer, as the model has it, and the model's generation settings."""
    known = real(name)
    core = Tokenizer.from_str(_bytes())
    named = {"bos_token": known.bos, "eos_token": known.eos, "pad_token": known.pad}
    special = dict.fromkeys((*(token for token in named.values() if token), *known.special, *known.ends))
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in known.added])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **{key: token for key, token in named.items() if token})
    tokenizer.chat_template = TEMPLATES[name]
    tokenizer.save_pretrained(directory)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in known.ends]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return directory

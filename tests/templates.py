"""Real chat templates, as TRL ships them: text models only, each with what it lacks of the tiny tokenizer."""

from __future__ import annotations

import re
from pathlib import Path

import trl
from transformers import PreTrainedTokenizerFast

from tests.models import make_tokenizer

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
REWRITES = [
    "deepseek_r1_distill",
    "deepseekv3",
    "glm4moe",
    "lfm2_2_5",
    "lfm2_2_5_v2",
    "lfm2_2_5_vl",
    "nemotron_3_5_lightning",
    "nemotron_3_nano",
    "nemotron_3_super",
    "nemotron_3_ultra",
    "qwen3",
    "qwen3_5_nothink",
    "qwen3_5_think",
    "qwen3_6",
]
"""They take the reasoning out of earlier assistant turns."""
ADDS_TO_TURNS = ("gptoss", "muse_glimmer", "qwen3_8")
"""They write more around an earlier assistant turn than its words and its end."""
NO_TURN_END = ("glm4moe",)
"""An assistant turn ends where the next one begins."""


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a template, and what ends the template's assistant turns as its eos token."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    ending = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("!")[2]
    token = re.match(r"\s*(<[^>]+>|\[[^\]]+\])", ending)
    tokenizer.add_special_tokens({"eos_token": token[1] if token else "<|im_end|>"})
    return tokenizer

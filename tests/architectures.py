"""Tiny models of many architectures, with random weights and the vocabulary of `tests.models`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

USUAL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
HEADS = {"head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
ROPE = {"rope_theta": 10000.0}

ARCHITECTURES: dict[str, Mapping[str, Any]] = {
    "llama": {"model_type": "llama", **USUAL},
    "llama yarn": {"model_type": "llama", **USUAL, "rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0}},
    "llama dynamic": {
        "model_type": "llama",
        **USUAL,
        "max_position_embeddings": 64,
        "rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 4.0},
    },
    "mistral": {"model_type": "mistral", **USUAL, "sliding_window": 8},
    "mixtral": {"model_type": "mixtral", **USUAL, "num_local_experts": 4},
    "qwen2": {"model_type": "qwen2", **USUAL},
    "qwen3": {"model_type": "qwen3", **USUAL, **HEADS},
    "qwen3_moe": {"model_type": "qwen3_moe", **USUAL, **HEADS, **EXPERTS, "num_experts": 4},
    "gemma": {"model_type": "gemma", **USUAL, **HEADS},
    "gemma2": {"model_type": "gemma2", **USUAL, **HEADS, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3": {"model_type": "gemma3_text", **USUAL, **HEADS, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "phi": {"model_type": "phi", **USUAL},
    "phi3": {"model_type": "phi3", **USUAL},
    "phi3 longrope": {
        "model_type": "phi3",
        **USUAL,
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            **ROPE,
            "rope_type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 64,
        },
    },
    "gpt2": {"model_type": "gpt2", **GPT, **NO_DROPOUT},
    "gpt_bigcode": {"model_type": "gpt_bigcode", **GPT, **NO_DROPOUT},
    "gpt_neo": {
        "model_type": "gpt_neo",
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "max_position_embeddings": 512,
        "resid_dropout": 0.0,
        "embed_dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "gpt_neox": {"model_type": "gpt_neox", **USUAL},
    "gptj": {"model_type": "gptj", **GPT, **NO_DROPOUT, "rotary_dim": 8},
    "codegen": {"model_type": "codegen", **GPT, **NO_DROPOUT, "n_head": 8, "rotary_dim": 4},
    "opt": {"model_type": "opt", **USUAL, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
    "bloom": {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"model_type": "falcon", **USUAL},
    "falcon alibi": {"model_type": "falcon", **USUAL, "alibi": True},
    "mpt": {"model_type": "mpt", "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512},
    "olmo2": {"model_type": "olmo2", **USUAL},
    "cohere": {"model_type": "cohere", **USUAL},
    "cohere2": {"model_type": "cohere2", **USUAL, "sliding_window": 8},
    "granite": {"model_type": "granite", **USUAL},
    "starcoder2": {"model_type": "starcoder2", **USUAL, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "stablelm": {"model_type": "stablelm", **USUAL},
    "smollm3": {"model_type": "smollm3", **USUAL},
    "glm4": {"model_type": "glm4", **USUAL, **HEADS},
    "exaone4": {"model_type": "exaone4", **USUAL, "sliding_window": 8},
    "gpt_oss": {"model_type": "gpt_oss", **USUAL, **HEADS, "num_local_experts": 4, "sliding_window": 8},
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        **USUAL,
        **EXPERTS,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "llama4": {
        "model_type": "llama4_text",
        **USUAL,
        **HEADS,
        "intermediate_size_mlp": 64,
        "num_local_experts": 2,
        "attention_chunk_size": 8,
        "no_rope_layers": [1, 0],
        "layer_types": ["chunked_attention", "full_attention"],
    },
    "recurrent_gemma": {
        "model_type": "recurrent_gemma",
        **USUAL,
        "num_hidden_layers": 3,
        "lru_width": 32,
        "attention_window_size": 16,
    },
    "lfm2": {"model_type": "lfm2", **USUAL, "block_multiple_of": 8, "layer_types": ["conv", "full_attention"]},
    "qwen3_next": {
        "model_type": "qwen3_next",
        **USUAL,
        **HEADS,
        **EXPERTS,
        "num_experts": 4,
        "shared_expert_intermediate_size": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "mamba2": {
        "model_type": "mamba2",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 8,
        "state_size": 8,
        "n_groups": 2,
        "chunk_size": 8,
    },
    "falcon_h1": {
        "model_type": "falcon_h1",
        **USUAL,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
}
"""Name -> what its config.json says."""


def config(name: str, vocabulary: int = 256, **more: Any) -> Any:
    """The config of an architecture, with special tokens inside the vocabulary."""
    settings = dict(ARCHITECTURES[name])
    kind = settings.pop("model_type")
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model(kind, vocab_size=vocabulary, **{**special, **settings, **more})


def model(name: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> PreTrainedModel:
    """A model of an architecture for a tokenizer. Its weights are larger than those of a new model, so that whatever
    a token sees shows in its logits."""
    special = {key: getattr(tokenizer, key) for key in ("pad_token_id", "eos_token_id", "bos_token_id")}
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config(name, len(tokenizer), **special))
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.2)
    return made

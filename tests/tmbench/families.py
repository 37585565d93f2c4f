"""Families of decoder-only models, and what a small one of each needs beside ``make_model``'s sizes."""

from __future__ import annotations

from typing import Any

MOE: dict[str, Any] = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "mistral": {"sliding_window": None, "head_dim": 128},
    "gemma": {},
    "olmo2": {"num_key_value_heads": 4},
    "granite": {"attention_multiplier": 0.3},
    "cohere": {},
    "gpt_neox": {"num_key_value_heads": 4},
    "phi3": {"sliding_window": None},
    "mixtral": {"sliding_window": None, **MOE},
    "gemma2": {"sliding_window": 24, "attn_logit_softcapping": 5.0},
    "gpt_oss": {"sliding_window": 24, **MOE},
}

"""A small model of each family that docs/models.md speaks of: what its config has beside ``make_model``'s sizes.

``python tests/tmbench/served_families.py`` writes how each is served to benchmarks/families.csv; a test holds that it is so.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from conftest import SMALL
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from tmbench.engine.decode_kind import step_kind
from tmbench.engine.prefill import COMPILED, PLAIN, Kind
from tmbench.engine.prefill_kind import obstacle_of
from tmbench.errors import UnsupportedModelError
from tmbench.methods.layer_kinds import FULL, kind_words, layer_kinds

TABLE = Path(__file__).resolve().parents[2] / "benchmarks" / "families.csv"
COLUMNS = ("family", "layers", "prompts", "answers", "static cache", "refused")

MOE: dict[str, Any] = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED: dict[str, Any] = MOE | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
SLIDING: dict[str, Any] = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "shared_expert_intermediate_size": 32,
}
MAMBA: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}
INDEXER: dict[str, Any] = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
NESTED: dict[str, Any] = {
    "intermediate_size": [96] * 4,
    "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0],
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 97,
    "laurel_rank": 8,
    "altup_num_inputs": 3,
}
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
MROPE: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "mistral, with a window": {"sliding_window": 60},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": MOE,
    "qwen3_next": MOE | DELTA,
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": MOE | DELTA,
    "gemma3_text": SLIDING,
    "gemma4_text": SLIDING | {"global_head_dim": 32, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    "gemma4_text, with experts": MOE
    | SLIDING
    | {
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "enable_moe_block": True,
        "top_k_experts": 2,
    },
    "gemma4_text, with shared keys": SLIDING
    | {
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 97,
        "num_kv_shared_layers": 2,
    },
    "gemma3n_text": SLIDING | NESTED | {"num_kv_shared_layers": 0},
    "gemma3n_text, with shared keys": SLIDING | NESTED | {"num_kv_shared_layers": 2},
    "llama4_text": MOE | {"attention_chunk_size": 16, "intermediate_size_mlp": 96, "no_rope_layers": [1, 0, 1, 0]},
    "deepseek_v3": ROUTED | LATENT,
    "glm4_moe": ROUTED,
    "glm4_moe_lite": ROUTED | LATENT,
    "phi3": {"sliding_window": None},
    "granite": {"attention_multiplier": 0.3},
    "granitemoehybrid": MOE
    | MAMBA
    | {"layer_types": ["mamba", "attention", "mamba", "attention"], "shared_intermediate_size": 32, "mamba_chunk_size": 16},
    "olmo3": SLIDING,
    "cohere2": SLIDING,
    "exaone4": SLIDING,
    "smollm3": {},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "block_ff_dim": 96},
    "nemotron_h": ROUTED
    | {
        "layers_block_type": ["mamba", "attention", "moe", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "ssm_state_size": 16,
        "n_groups": 1,
        "chunk_size": 16,
        "moe_shared_expert_intermediate_size": 32,
    },
    "minimax": MOE | {"layer_types": ["linear_attention", "full_attention"] * 2, "block_size": 16},
    "minimax_m2": MOE,
    "seed_oss": {},
    "gpt_oss": MOE | SLIDING,
    "gpt_oss, with wide windows": MOE | SLIDING | {"sliding_window": 600},
    "gemma2": SLIDING | {"attn_logit_softcapping": 5.0},
    "gemma2, with wide windows": SLIDING | {"attn_logit_softcapping": 5.0, "sliding_window": 600},
    "mimo_v2_flash": ROUTED
    | SLIDING
    | {"v_head_dim": 8, "swa_num_key_value_heads": 4, "swa_head_dim": 16, "swa_v_head_dim": 8},
    "kimi_linear": ROUTED | LATENT | {"layer_types": ["linear_attention", "full_attention"] * 2},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 128, "mamba_chunk_size": 16},
    "jamba": {
        "num_experts": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
}
"""Two layers at least are of full attention, so that the deeper one alone has triangle attention."""

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "deepseek_v32": (ROUTED | LATENT, "natively sparse: layer 0 .* chooses its keys"),
    "deepseek_v4": (ROUTED | LATENT, "natively sparse: layer 0 .* chooses its keys"),
    "glm_moe_dsa": (ROUTED | LATENT, "natively sparse: layer 0 .* chooses its keys"),
    "minimax_m3_vl_text": (
        ROUTED | {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
        "natively sparse: layer 1 .* chooses its keys",
    ),
    "qwen4_exp_text": (MOE | DELTA | {"layer_types": None} | INDEXER, "natively sparse: layer 3 .* chooses its keys"),
}
"""Families that no method is applied to, and why."""

WRAPPED: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": SMALL | SLIDING | {"model_type": "gemma3_text", "initializer_range": 0.2},
        "vision_config": VISION | {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
    },
    "qwen2_5_vl": {
        "text_config": SMALL | MROPE | {"model_type": "qwen2_5_vl_text", "initializer_range": 0.2},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "depth": 1,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [0],
        },
    },
}
"""Models that read images too, of which the language model is used."""

NO_STATIC_CACHE = {"minimax"}
"""Families for which transformers has no static cache."""


def small(family: str) -> Any:
    """A small model of a family, in evaluation mode, float32, on the CPU."""
    torch.manual_seed(0)
    if family in WRAPPED:
        return AutoModelForImageTextToText.from_config(CONFIG_MAPPING[family](**WRAPPED[family])).eval()
    changes = FAMILIES[family] if family in FAMILIES else REFUSED[family][0]
    config = CONFIG_MAPPING[family.partition(",")[0]](**(SMALL | changes))
    # As in ``make_model``: random weights of the usual size would hide a wrong mask.
    config.initializer_range = 0.2
    # Transformers 5.17 chooses SDPA for a model with soft caps, and leaves them out there.
    capped = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
    return AutoModelForCausalLM.from_config(config, **capped).eval()


def found_of(family: str) -> dict[str, str]:
    """How a family is served, as the table has it."""
    model = small(family)
    kinds = layer_kinds(model.config)
    # Full attention first, whatever the order in the model.
    row = dict.fromkeys(COLUMNS, "") | {"family": family, "layers": kind_words(sorted(kinds, key=lambda kind: kind != FULL))}
    try:
        obstacle = obstacle_of(model)
    except UnsupportedModelError as error:
        return row | {"refused": str(error)}
    prefill: Kind = PLAIN if obstacle else COMPILED
    together, why = step_kind(model, prefill)
    return row | {
        "prompts": f"as transformers, {obstacle}" if obstacle else prefill,
        "answers": "together" if together else f"one by one, {why}",
        "static cache": "no" if family in NO_STATIC_CACHE else "yes",
    }


def main() -> None:
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found_of(family) for family in (*FAMILIES, *WRAPPED, *REFUSED))


if __name__ == "__main__":
    main()

"""The density of dynamic patterns on structured weights: run by hand on a CPU, a few minutes for each length and model.

    .venv/bin/python benchmarks/structured_density.py llama-3.1-8b 131072 >> benchmarks/structured_density.csv

Layers have the preset's heads of 128, its rotary embedding, its groups and its experts, but 32 heads and a hidden size of
1024: what a head selects does not depend on how wide the model around it is. Hidden states go from layer to layer by
streaming attention, which takes no time. One line of CSV for each pattern and layer; without the first argument, the header.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tmbench.engine.attention import applied
from tmbench.engine.density import causal_pairs
from tmbench.models import structured
from tmbench.models.presets import read_preset
from tmbench_kernels import FlashPrefill, FlexPrefill, Pattern, VerticalSlash

HEADS, VOCABULARY, LAYERS = 32, 32768, 3
EXPERTS = ("num_experts", "num_experts_per_tok", "norm_topk_prob", "moe_intermediate_size")
PATTERNS: dict[str, Pattern] = {
    "vertical_slash 512 2048": VerticalSlash(((512, 2048),)),
    "vertical_slash 1000 6096": VerticalSlash(),
    "flex_prefill 0.95": FlexPrefill(),
    "flash_prefill 0.1": FlashPrefill(),
}


def main() -> None:
    if len(sys.argv) == 1:
        print("model,length,layer,pattern,density")
        return
    name, length = sys.argv[1], int(sys.argv[2])
    model = _model(name)

    def look(layer: int, pattern: Pattern, q: Tensor, k: Tensor, scale: float | None) -> None:
        causal = q.shape[1] * causal_pairs(q.shape[2])
        for label, candidate in PATTERNS.items():
            print(name, length, layer, label, f"{candidate.pairs(q, k, scale=scale) / causal:.4f}", sep=",", flush=True)

    ids = torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), applied(model, "streaming") as session:
        session.observer = look
        model.model(input_ids=ids, use_cache=False)


def _model(name: str) -> Any:
    fields = read_preset(name)
    groups = fields["num_attention_heads"] // fields["num_key_value_heads"]
    config = AutoConfig.for_model(
        fields["model_type"],
        hidden_size=1024,
        intermediate_size=1024,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 4 if HEADS % groups else HEADS // groups,
        head_dim=128,
        vocab_size=VOCABULARY,
        rope_theta=fields["rope_theta"],
        rope_scaling=fields.get("rope_scaling"),
        max_position_embeddings=fields["max_position_embeddings"],
        **{name: fields[name] for name in EXPERTS if name in fields},
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    structured.fill(model)
    return model


if __name__ == "__main__":
    main()

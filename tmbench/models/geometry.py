"""A model's attention in numbers, read from its config: what plans, rooflines and backends must know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tmbench.methods.layer_kinds import FULL, layer_kinds

PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "experts_per_token")
"""Where configs say how many experts work on a token."""


@dataclass(frozen=True)
class Geometry:
    """The decoder of a transformers model. Head sizes are those of q, k and v as attention receives them."""

    layers: int
    heads: int
    kv_heads: int
    qk_head_dim: int
    v_head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, model: Any, layer: int | None = None) -> Geometry:
        """The geometry of a transformers model or config, in one layer: the first one of full attention, if none is said.

        Under multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434, section 2.1) q and k have a rotary part and
        one without, v a size of its own, and every query head gets a key head, whatever the config says of key heads.
        """
        text = getattr(model, "config", model).get_text_config()
        kinds = layer_kinds(text)
        if layer is None:
            layer = kinds.index(FULL) if FULL in kinds else 0
        # Some families have heads of another size, or another number of them, in each kind of layer.
        own = text.per_layer_config[layer]
        heads = int(own.num_attention_heads)
        if has_latents(own):
            qk = int(getattr(own, "qk_nope_head_dim", 0)) + int(own.qk_rope_head_dim)
            return cls(len(kinds), heads, heads, qk, int(own.v_head_dim), text.vocab_size)
        dim = int(getattr(own, "head_dim", None) or text.hidden_size // heads)
        kv_heads = int(getattr(own, "num_key_value_heads", None) or heads)
        return cls(len(kinds), heads, kv_heads, dim, int(getattr(own, "v_head_dim", None) or dim), text.vocab_size)

    @property
    def flop_per_pair(self) -> float:
        """Operations of one (query, key) pair of one head: a product of q and k, and one of its weight with v."""
        return 2.0 * (self.qk_head_dim + self.v_head_dim)


def has_latents(config: Any) -> bool:
    """Whether keys and values are made from a compressed latent, which transformers caches in their place."""
    text = config.get_text_config()
    return bool(getattr(text, "kv_lora_rank", None) and getattr(text, "qk_rope_head_dim", None))


def shares_keys(config: Any) -> bool:
    """Whether the last layers attend to keys and values of layers before them, and have none of their own."""
    return bool(getattr(config.get_text_config(), "num_kv_shared_layers", None))


def is_experts(module: object) -> bool:
    """Whether a module holds the experts of a mixture, by transformers' names."""
    return "Experts" in type(module).__name__


def experts_per_token(config: Any) -> int:
    """How many experts work on a token, those that are shared by all tokens aside; 0 for a model without experts."""
    text = config.get_text_config()
    return next((int(found) for name in PER_TOKEN if (found := getattr(text, name, None))), 0)


def max_positions(config: Any) -> int | None:
    """The most positions a model reads, prompt and answer together; None where its config sets no limit.

    A scaled rotary embedding reads ``factor`` times the positions that it was trained on. Configs give the trained ones in
    ``original_max_position_embeddings`` (as Qwen documents it for YaRN, where ``max_position_embeddings`` stays as trained),
    or else in ``max_position_embeddings``; where that is the scaled number already, as in Llama 3.1, it stands.
    """
    text = config.get_text_config()
    own = getattr(text, "max_position_embeddings", None)
    if own is None:
        return None
    # Families whose kinds of layer have rotary parameters of their own, as Gemma 3, are published with the scaled number.
    return max(int(own), _scaled(getattr(text, "rope_parameters", None) or {}, int(own)))


def _scaled(rope: dict[str, Any], own: int) -> int:
    kind, factor = rope.get("rope_type", rope.get("type", "default")), rope.get("factor")
    # longrope and llama3 configs give the scaled number themselves.
    if kind not in ("yarn", "linear", "dynamic") or not isinstance(factor, (int, float)) or factor < 1:
        return 0
    return int(factor * int(rope.get("original_max_position_embeddings") or own))

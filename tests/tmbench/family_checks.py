"""What each family is held to on any device: dense attention is its own, and so is the triangle under its mask."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from served_families import FAMILIES, NO_STATIC_CACHE, TABLE, WRAPPED
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from plans import plan_of
from tmbench import applied
from tmbench.engine.attention import applied_plan
from tmbench.engine.calls import cache_name
from tmbench.engine.prefill import PLAIN, Kind, tensors_of
from tmbench.engine.prefill_kind import obstacle_of
from tmbench.engine.session import running
from tmbench.methods.plan import Plan
from tmbench.models.attention_modules import attention_modules

TRANSFORMERS = tuple(int(part) for part in transformers.__version__.split(".")[:2])
LENGTH = 45
"""Longer than the windows and chunks, and than three blocks of a recurrence."""
NEW = 5
TRIANGLE = {"n_init": 3, "n_local": 7, "last_n": 5}
SERVED = [*FAMILIES, *WRAPPED]


def served_table() -> dict[str, dict[str, str]]:
    """How docs/models.md says that each family is served, by its name."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return {line["family"]: line for line in csv.DictReader(file)}


def near(got: Tensor, expected: Tensor) -> None:
    """Equal up to 1e-4 of the root mean square."""
    off, size = (got - expected).norm(), expected.norm()
    assert off <= 1e-4 * size, f"off by {off:.1e} where the norm is {size:.1e}"


def triangle_mask(length: int, keys: int, device: torch.device) -> Tensor:
    """The mask by its definition, pair by pair; keys beyond the prompt are those of an empty static cache."""
    i, j = torch.arange(length, device=device)[:, None], torch.arange(keys, device=device)
    kept = (j < TRIANGLE["n_init"]) | (i - j < TRIANGLE["n_local"]) | (i >= length - TRIANGLE["last_n"])
    # In numbers, as some families add their masks to the logits.
    lowest = torch.finfo(torch.float32).min
    return torch.zeros(length, keys, device=device).masked_fill(~(kept & (j <= i)), lowest)[None, None]


@contextmanager
def masked(model: PreTrainedModel, layers: list[int], keys: int = LENGTH) -> Iterator[None]:
    """Inside, transformers' own attention of these layers sees the pairs of the triangle alone, in prompts."""

    def mask(module: Any, args: Any, kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] > 1:
            kwargs["attention_mask"] = triangle_mask(hidden.shape[1], keys, hidden.device)
        return args, kwargs

    chosen = [module for module in attention_modules(model) if module.layer_idx in layers]
    hooks = [module.register_forward_pre_hook(mask, with_kwargs=True) for module in chosen]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def written(model: Any, ids: Tensor, **options: Any) -> list[int]:
    """What transformers' own greedy decoding writes."""
    if model.config.model_type == "llama4_text" and "cache_implementation" in options and TRANSFORMERS < (5, 18):
        pytest.skip("transformers 5.17 fails to make the masks of Llama 4 for a static cache")
    config = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0, **options)
    tokens: list[int] = model.generate(ids, generation_config=config)[0, ids.shape[1] :].tolist()
    return tokens


def deep_triangle(model: PreTrainedModel) -> tuple[Plan, list[int]]:
    """The plan with triangle attention in half of the full layers, and the numbers of these."""
    plan = plan_of(model, "tri_mix", **TRIANGLE)
    return plan, [layer for layer, pattern in plan.by_layer.items() if pattern.name == "triangle"]


@torch.inference_mode()
def check_dense(model: Any, ids: Tensor) -> None:
    """Dense attention of ``ids`` ``[batch, LENGTH]`` is the model's own."""
    expected = model(ids).logits
    with applied(model, "dense") as session:
        near(model(ids).logits, expected)
        session.check_complete()


@torch.inference_mode()
def check_triangle(model: Any, ids: Tensor) -> None:
    """The deeper full layers read ``ids`` ``[batch, LENGTH]`` as the model does under the triangle's mask."""
    deep, layers = deep_triangle(model)
    assert layers, "half of the full layers, the deeper ones"
    assert len(layers) == (len(deep.by_layer) + 1) // 2
    dense = model(ids).logits
    with masked(model, layers):
        expected = model(ids).logits
    with applied_plan(model, deep):
        near(model(ids).logits, expected)
    assert (expected - dense).norm() > 0.01 * dense.norm(), "the mask must make a difference for this test to mean anything"


@torch.inference_mode()
def check_generate(family: str, model: Any, ids: Tensor, cache: str) -> None:
    """transformers' ``generate`` reads ``ids`` ``[1, LENGTH]`` under the mask and decodes densely, with either cache."""
    if cache == "static" and family in NO_STATIC_CACHE:
        pytest.skip("transformers has no such cache for it")
    options = {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
    plan, layers = deep_triangle(model)
    # The last token that is written is never read.
    with masked(model, layers, keys=LENGTH if cache == "dynamic" else LENGTH + NEW - 1):
        expected = written(model, ids, **options)
    with applied_plan(model, plan):
        got = written(model, ids, **options)
    assert got == expected, f"wrote {got}, not {expected}"


@torch.inference_mode()
def check_prefill(family: str, model: Any, ids: Tensor, kind: Kind) -> None:
    """A prefill of ``ids`` ``[1, LENGTH]`` leaves the model's own logits and cache under the mask, and decodes after."""
    found: Kind = PLAIN if (obstacle := obstacle_of(model)) else kind
    told = served_table()[family]["prompts"]
    assert (found == PLAIN) == told.startswith("as transformers, "), f"the table says {told}, found was: {obstacle}"
    plan, layers = deep_triangle(model)
    with masked(model, layers):
        output = model(ids, use_cache=True)
        cache = getattr(output, "cache", None) or output.past_key_values
        held = [tensor.clone() for tensor in tensors_of(cache)]
        after = model(torch.tensor([[5]], device=ids.device), use_cache=True, **{cache_name(model): cache}).logits[:, -1]
    with running(model, plan, found) as session:
        decoding = session.read(ids)
        near(decoding.logits, output.logits[:, -1])
        kept = tensors_of(decoding.cache)
        assert len(kept) == len(held)
        for got, expected in zip(kept, held, strict=True):
            near(got, expected)
        near(decoding.read([5]), after)

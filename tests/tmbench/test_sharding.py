"""How a model's layers are cut into the parts of several ranks: what they make together, and what cannot be cut."""

from __future__ import annotations

import gc

import pytest
import torch
from served_families import FAMILIES, small
from torch import nn

from tmbench.errors import UserError
from tmbench.models import parallel
from tmbench.models.loading import load, load_tokenizer
from tmbench.models.sharding import draw, plan_of


def test_a_model_that_is_drawn_is_never_held_whole(monkeypatch):
    """While it is drawn a rank holds its part, and one module of the whole."""

    def held() -> int:
        return sum(one.numel() for one in gc.get_objects() if type(one) is nn.Parameter and not one.is_meta)

    monkeypatch.setattr(parallel, "size", lambda: 2)
    model = load("tiny", plan_only=True, device="cpu").model
    plan = plan_of("tiny", model, 2)
    largest = max(parameter.numel() for parameter in model.parameters())
    whole = sum(parameter.numel() for parameter in model.parameters())
    most, init = [], model._init_weights
    monkeypatch.setattr(model, "_init_weights", lambda module: (most.append(held()), init(module)))
    # What is there already is not looked at.
    gc.freeze()
    try:
        draw(model, plan, torch.device("cpu"), 0)
    finally:
        gc.unfreeze()
    part = sum(parameter.numel() for parameter in model.parameters())
    assert part < 0.75 * whole
    assert part / 2 < max(most) <= part + largest < whole


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["checkpoint", "random"])
@pytest.mark.parametrize(
    "family",
    ["llama", "qwen2", "qwen3", "gemma3_text", "gemma3n_text", "gemma4_text", "granite", "cohere2", "exaone4", "smollm3"],
)
def test_the_parts_of_a_model_make_the_whole(tmp_path, monkeypatch, family, weights):
    """Its weights, what else a checkpoint holds, and the tables that are computed."""
    saved = small(family)
    if family == "gemma3n_text":
        saved.config.activation_sparsity_pattern = [0.0] * 4
    with torch.no_grad():
        # Ones and zeros would be the same if nothing were read.
        for tensor in saved.state_dict().values():
            tensor += 0.1 * torch.rand_like(tensor)
    saved.save_pretrained(tmp_path)
    load_tokenizer("tiny").save_pretrained(tmp_path)

    def tensors() -> dict[str, torch.Tensor]:
        model = load(str(tmp_path), weights=weights, device="cpu", dtype="float32").model
        return dict([*model.named_parameters(), *model.named_buffers()])

    whole, parts = tensors(), []
    monkeypatch.setattr(parallel, "size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        parts.append(tensors())
    assert whole.keys() == parts[0].keys() == parts[1].keys()
    split = set()
    for name, expected in whole.items():
        both = [part[name] for part in parts]
        for axis in range(expected.ndim):
            if both[0].shape[axis] < expected.shape[axis]:
                both = [torch.cat(both, axis)]
                split.add(name)
        for got in both:
            torch.testing.assert_close(got, expected, rtol=0, atol=0, msg=f"{name} is another one")
    assert len(split) >= 7 * 4


@pytest.mark.parametrize(("ranks", "reason"), [(3, "evenly: give --nproc-per-node"), (4, "4 query heads and 2 key heads")])
def test_heads_that_cannot_be_shared_are_refused(ranks, reason):
    with pytest.raises(UserError, match=reason):
        plan_of("tiny", load("tiny", plan_only=True, device="cpu").model, ranks)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gemma3n_text", {}, r"has model.layers.0.mlp.activation_sparsity, which takes together what no GPU"),
        ("cohere", {"use_qk_norm": True}, r"has model.layers.0.self_attn.q_norm.weight, which takes together"),
        ("gemma4_text", {"num_key_value_heads": 1, "num_global_key_value_heads": 2}, "4 query heads and 1 key heads"),
    ],
)
def test_models_whose_parts_would_answer_otherwise_are_refused(make_model, family, changes, reason):
    model = make_model(family, **(FAMILIES.get(family, {}) | changes))
    with pytest.raises(UserError, match=reason):
        plan_of("small", model, 2)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gemma4_text", "cohere", "apertus", "nanochat"])
def test_norms_of_single_heads_and_single_numbers_are_no_reason_to_refuse(make_model, family):
    assert plan_of("small", make_model(family, **FAMILIES.get(family, {})), 2)

"""A plain model whose layers attend by masks that a test writes down: what methods are held against."""

from __future__ import annotations

import torch
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

NAME = "tests-masked"


@torch.inference_mode()
def logits_under(model, ids, masks):
    """Logits ``[length, vocabulary]`` of a prompt ``[1, length]``; ``masks`` are bool ``[length, length]`` by layer."""

    def attend(module, q, k, v, mask, *, scaling=None, **kwargs):
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        logits = q @ k.mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        weights = logits.masked_fill(~masks[module.layer_idx], -torch.inf).softmax(-1)
        return (weights @ v).transpose(1, 2), None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        return model(input_ids=ids, use_cache=False).logits[0]
    finally:
        model.config._attn_implementation = before


def masks_of(plan, length, chunks=None):
    """The masks ``[length, length]`` of a plan of static patterns by layer, of a prompt in chunks ``[(start, end)]``."""
    whole = torch.empty(1, 1, length, 1)
    found = []
    for pattern in plan.patterns:
        mask = torch.zeros(length, length, dtype=torch.bool)
        for start, end in chunks or [(0, length)]:
            mask[start:end, :end] = pattern.mask(whole[:, :, start:end], whole[:, :, :end])[0, 0]
        found.append(mask)
    return found

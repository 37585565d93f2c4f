"""Batches of texts of different lengths, padded in front: each text is read as it would be alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tmbench.errors import UnsupportedModelError

OFFSETS = "_tmbench_offsets"
"""The attribute of a mask that says how much left padding each row has; empty where the batch has none."""


def offsets(mask: Tensor, length: int) -> list[int]:
    """How many tokens of padding stand in front of each text.

    Args:
        mask: ``[batch, length]`` or longer, nonzero for tokens of a text; what comes behind ``length`` does not count.
        length: of the prompt, padding included.

    Raises UnsupportedModelError for padding anywhere else, and for a row that holds nothing but padding.
    """
    real = mask[:, :length].bool()
    found = length - real.sum(1)
    if real.shape[1] != length or not torch.equal(real, torch.arange(length, device=mask.device) >= found[:, None]):
        raise UnsupportedModelError(
            "the batch has padding behind its texts or within them: pad in front of each alone (padding_side='left')"
        )
    listed = [int(offset) for offset in found.tolist()]
    if length in listed:
        raise UnsupportedModelError(f"row {listed.index(length)} of the batch is padding alone: leave it out")
    return listed


def positions(mask: Tensor) -> Tensor:
    """The place of each token in its own text, as of texts without padding; 0 for padding. As transformers counts them."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def by_text(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, padding: Sequence[int]
) -> Tensor:
    """Attention of each row's text alone, ``[batch, queries, heads, v_dim]``, zero for padding; of all rows where none is.

    Args:
        attend: takes q, k, v ``[batch, heads, length, dim]`` of texts without padding, and returns their output
            ``[batch, length, heads, v_dim]``.
        padding: as ``offsets`` returns it.
    """
    if not padding:
        return attend(q, k, v)
    out = q.new_zeros(len(padding), q.shape[2], q.shape[1], v.shape[3])
    for row, offset in enumerate(padding):
        out[row : row + 1, offset:] = attend(*(x[row : row + 1, :, offset:] for x in (q, k, v)))
    return out

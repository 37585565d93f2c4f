"""Batches of texts of different lengths, padded in front: each text is read as it would be alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tmbench.errors import UnsupportedModelError
from tmbench.methods.plan import Plan
from tmbench.methods.table import STATIC_PATTERNS

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


def no_padding(plan: Plan, name: str) -> UnsupportedModelError:
    """The error to raise for a padded batch under a method with a pattern of this name."""
    return UnsupportedModelError(
        f"the batch is padded, which {plan.method} does not serve with {name} attention: give it prompts of one length, or "
        "one by one"
    )


def check_padding(plan: Plan) -> None:
    """Raise UnsupportedModelError for a method that does not serve left-padded batches."""
    for pattern in plan.by_layer.values():
        if pattern.name not in STATIC_PATTERNS:
            raise no_padding(plan, pattern.name)


def by_text(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: Sequence[int],
    *,
    before: int = 0,
    last_row: bool = False,
) -> Tensor:
    """Attention of each row's text alone, ``[batch, queries, heads, v_dim]``, zero for padding; of all rows where none is.

    Args:
        attend: takes q, k, v ``[batch, heads, length, dim]`` of texts without padding, and returns their output
            ``[batch, length, heads, v_dim]``, or the last row of it alone.
        padding: as ``offsets`` returns it, of the queries.
        before: how many keys of every row stand in front of the padding.
        last_row: whether ``attend`` returns that, and so does this.
    """
    if not padding:
        return attend(q, k, v)
    out = q.new_zeros(len(padding), 1 if last_row else q.shape[2], q.shape[1], v.shape[3])
    for row, offset in enumerate(padding):
        keys, values = (_without(x[row : row + 1], before, offset) for x in (k, v))
        own = attend(q[row : row + 1, :, offset:], keys, values)
        out[row : row + 1, -own.shape[1] :] = own
    return out


def _without(x: Tensor, before: int, padding: int) -> Tensor:
    """``[1, heads, length, dim]`` without so many that follow the first ones; no copy where nothing is kept in front."""
    behind = x[:, :, before + padding :]
    return behind if before == 0 else x if padding == 0 else torch.cat([x[:, :, :before], behind], dim=2)

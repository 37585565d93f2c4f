"""Attention over block lists by FlashAttention 4, whose kernel for Hopper takes lists of key blocks.

It walks two lists for each block of queries: blocks that are masked, here the queries' own, and blocks that are not. Lists
that end with the own block need no copy for that: without their last entry they are the second list.
"""

from __future__ import annotations

from typing import Any

import torch
from cutlass import cute
from flash_attn.cute import flash_attn_func
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
from torch import Tensor

from tmbench_kernels.block_sparse.lists import BlockLists
from tmbench_kernels.dense.libraries import FLASH_4_LSE, call_flash
from tmbench_kernels.launch import positive


@cute.jit
def _causal(batch: Any, head: Any, query: Any, key: Any, lengths: Any, tensors: Any) -> Any:
    """Which keys a query of a masked block sees. It captures nothing, so that it is compiled once."""
    return key <= query


def attend_lists(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, *, lse: Tensor | None = None) -> Tensor:
    """Attention over the listed blocks, ``[batch, heads, length, dim]``, a view of ``[batch, length, heads, dim]``."""
    q, scale = positive(q, scale)
    own = lists.own_listed().int()
    blocks = own.shape[2]
    asked: dict[str, Any] = {} if lse is None else {"lse": lse, FLASH_4_LSE: True}
    return call_flash(
        flash_attn_func,
        q,
        k,
        v,
        scale,
        mask_mod=_causal,
        block_sparse_tensors=BlockSparseTensorsTorch(
            mask_block_cnt=own,
            mask_block_idx=torch.arange(blocks, dtype=torch.int32, device=q.device).view(1, 1, blocks, 1),
            full_block_cnt=lists.counts - own,
            full_block_idx=lists.indices,
            block_size=(lists.block, lists.block),
        ),
        **asked,
    )

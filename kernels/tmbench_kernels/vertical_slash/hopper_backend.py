"""Vertical-slash attention on Hopper: an index, handed to the kernel over listed keys."""

from __future__ import annotations

from torch import Tensor

from tmbench_kernels.block_sparse import hopper_backend
from tmbench_kernels.vertical_slash.runs import BLOCK
from tmbench_kernels.vertical_slash.triton_backend import gathered
from tmbench_kernels.vertical_slash.triton_index import Index


def attend_index(q: Tensor, k: Tensor, v: Tensor, index: Index, scale: float, *, lse: Tensor | None = None) -> Tensor:
    """Attention over an index, ``[batch, heads, length, v_dim]``, a view of ``[batch, length, heads, v_dim]``.

    The index must be of a selection with distance 0: then no selected column lies in a block of queries outside its runs.
    """
    tables = index.kept, index.before, index.reach, index.sinks
    lists = hopper_backend.Lists(index.starts, index.counts, 1, BLOCK, gathered(k, v, index), tables)
    return hopper_backend.attend(q, k, v, lists, scale, lse=lse)

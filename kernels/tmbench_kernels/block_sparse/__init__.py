"""Patterns that attend to whole blocks of keys: what they share is the way from a selection to a backend.

A pattern writes its index rule twice: ``rule``, plainly and for one head, is the definition; ``block_map`` is the same for
all heads at once, made for the GPU. Both yield a bool map of blocks, which travels to the backends as ``BlockLists``.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from tmbench_kernels.block_sparse.lists import BLOCK, BlockLists, token_mask
from tmbench_kernels.block_sparse.torch_backend import attend_lists
from tmbench_kernels.cuda import for_hopper, for_triton, imported
from tmbench_kernels.dense.libraries import FLASH_4, missing_module, refuses
from tmbench_kernels.pattern import Backend, Pattern, asked_of, default_scale

AttendLists = Callable[..., Tensor]
"""``attend(q, k, v, lists, scale)`` returns ``[batch, heads, length, v_dim]`` in q's type; by keyword as a ``Backend``'s."""


def over_lists(attend: AttendLists) -> Callable[..., Tensor]:
    """A backend's function from one that attends over lists: the pattern selects, then the lists are attended over."""

    def select_and_attend(pattern: BlockSparse, q: Tensor, k: Tensor, v: Tensor, scale: float, **asked: Any) -> Tensor:
        return attend(q, k, v, pattern.select(q, k, scale=scale), scale, **asked)

    return select_and_attend


def by_head(rule: Callable[[Tensor, Tensor, float], Tensor], q: Tensor, k: Tensor, scale: float) -> Tensor:
    """A rule's maps for one head each, ``[batch, heads, ...]``."""
    groups = q.shape[1] // k.shape[1]
    return torch.stack(
        [torch.stack([rule(qh, k[b, h // groups], scale) for h, qh in enumerate(qb)]) for b, qb in enumerate(q)]
    )


def _flash_limits(major: int, dim: int) -> str:
    """On newer GPUs its kernel takes two of our blocks of queries at a time; larger heads take smaller tiles of keys."""
    if major != 9:
        return f"takes lists of such blocks on a GPU of compute capability 9, not {major}"
    return "" if dim <= 128 else f"takes lists of such blocks for head sizes up to 128, not {dim}"


class Listed(NamedTuple):
    """Stands for a pattern where a backend asks for the lists of one."""

    lists: BlockLists

    def select(self, q: Tensor, k: Tensor, *, scale: float) -> BlockLists:
        return self.lists


class BlockSparse(Pattern):
    """A dynamic pattern of whole key blocks. Every backend attends over the same lists, whatever pattern selected them."""

    dynamic: ClassVar[bool] = True
    block: ClassVar[int] = BLOCK
    backends: ClassVar[tuple[Backend, ...]] = (
        Backend(
            "flash-attn-4",
            ("cuda",),
            over_lists(imported("block_sparse.flash_attn_backend", "attend_lists")),
            missing=partial(missing_module, *FLASH_4),
            refuses=partial(refuses, _flash_limits),
            lse=True,
        ),
        for_hopper(over_lists(imported("block_sparse.hopper_backend", "attend_lists"))),
        for_triton(over_lists(imported("block_sparse.triton_backend", "attend_lists"))),
        Backend("torch-blocks", ("cpu", "cuda"), over_lists(attend_lists), softcap=True, lse=True, chunks=True),
    )

    @abc.abstractmethod
    def rule(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """The definition for one head, q ``[queries, dim]`` and k ``[keys, dim]``: the key blocks of each query block.

        Bool ``[q_blocks, k_blocks]``; what it holds for key blocks after the query block's own does not count.
        """

    @abc.abstractmethod
    def block_map(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """``rule`` for all heads, bool ``[batch, heads, q_blocks, k_blocks]``: the future does not count here either.

        Reads nothing back to the host, loops over no head for its own sake, and holds a few GiB at most for 32 heads of 128K
        tokens. Sums run in float32 in another order than the rule's, so that a near tie may fall the other way.
        """

    def select(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> BlockLists:
        """The key blocks of these q and k."""
        start = k.shape[2] - q.shape[2]
        return BlockLists.from_map(self.block_map(q, k, default_scale(q, scale)), k.shape[2], self.block, start)

    def mask(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> Tensor:
        """Bool ``[batch, heads, queries, keys]``: the rule's blocks, up to each query."""
        block_map = by_head(self.rule, q, k, default_scale(q, scale))
        return token_mask(block_map, k.shape[2], self.block, k.shape[2] - q.shape[2])

    def pairs(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> int:
        """Counted from the selection of these q and k, at the cost of a selection."""
        return self.select(q, k, scale=scale).pairs()

    def compute_last_row(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, softcap: float = 0.0, lse: Tensor | None = None
    ) -> Tensor:
        """The last query over the last of the lists, where its block of queries does not choose by itself."""
        if self.last_row_queries is not None:
            return super().compute_last_row(q, k, v, scale, softcap=softcap, lse=lse)
        row, listed = q[:, :, -1:], Listed(self.select(q, k, scale=scale).last_row())
        backend = self.backend(row, k, v, softcap=softcap, lse=lse is not None)
        return backend.attend(listed, row, k, v, scale, **asked_of(softcap, lse))

"""Delta correction: every delta-th row of a triangle also dense, and its difference carried to the rows up to the next.

Willette et al. 2025, arXiv 2505.11254. Each row whose position is a multiple of ``delta`` differs from dense attention by
d = dense - triangle. That row and those behind it, up to the next such row, get triangle + d. The last rows are dense in any
case: as many as the length has beyond a multiple of ``delta``, and before them at least ``LAST``, as in the released code.
That code has a window of 2048 and corrects all layers; here both are the triangle's own.

A chunk that starts between two such rows has lost the one before. Its own first row is dense in that row's place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tmbench_kernels.cuda import refuses_triton, runs_triton
from tmbench_kernels.pattern import add_sinks, empty_output, new_lse
from tmbench_kernels.sdpa import attention

if TYPE_CHECKING:
    from tmbench_kernels.triangle import Triangle

CARRY, RECOMPUTE = "carry", "recompute"
"""What becomes of the dense rows: their difference is carried on, or they take the place of the triangle's rows alone."""
LAST = 128
"""The fewest of the last rows that are dense."""
_STEP = 32
"""Dense rows that torch attends together: they see the keys up to the last of them."""


@dataclass(frozen=True)
class Rows:
    """The dense rows of one call: row r is at position ``max(first + r * delta, start)``, for r below ``count``."""

    first: int
    delta: int
    count: int
    start: int
    """The position of the first query of all."""

    def positions(self) -> list[int]:
        """Where they are, ascending."""
        return [max(self.first + row * self.delta, self.start) for row in range(self.count)]

    def take(self, x: Tensor) -> Tensor:
        """Them of ``[batch, heads, queries, dim]``: a view, or a copy where a chunk's first row is among them."""
        if not self.count or self.first >= self.start:
            return x[:, :, self.first - self.start :: self.delta][:, :, : self.count]
        return torch.cat([x[:, :, :1], x[:, :, self.first + self.delta - self.start :: self.delta]], dim=2)[
            :, :, : self.count
        ]


def rows_of(start: int, tail: int, delta: int, mode: str) -> Rows:
    """The dense rows among those from ``start`` on that are not the last, which begin at ``tail``."""
    first = start // delta * delta if mode == CARRY else -(-start // delta) * delta
    return Rows(first, delta, max(-(-(tail - first) // delta), 0) if start < tail else 0, start)


def rows_in_triton(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel in Triton computes the dense rows."""
    return runs_triton(q.device) and not refuses_triton(None, q, k, v)


def attend_delta(
    pattern: Triangle, q: Tensor, k: Tensor, v: Tensor, scale: float, *, softcap: float = 0.0, sinks: Tensor | None = None
) -> Tensor:
    """The triangle with its dense rows and what they change, ``[batch, heads, queries, v_dim]``."""
    start = k.shape[2] - q.shape[2]
    base = pattern.base(k.shape[2])
    out = base.attend(q, k, v, scale=scale, softcap=softcap, sinks=sinks)
    tail = max(k.shape[2] - base.last_n, start)
    rows = pattern.rows(start, tail)
    if not rows.count:
        return out
    dense = _dense_rows(rows, q, k, v, scale, softcap, sinks)
    if pattern.mode == RECOMPUTE:
        out[:, :, rows.first - start : tail - start : rows.delta] = dense
        return out
    _carry(out[:, :, : tail - start], dense.to(_wide(q)).sub_(rows.take(out)), rows)
    return out


def _wide(q: Tensor) -> torch.dtype:
    """The type that differences are taken in."""
    return torch.promote_types(q.dtype, torch.float32)


def _carry(out: Tensor, differences: Tensor, rows: Rows) -> None:
    """Add to each row the difference of the last dense row up to it; out begins with the first query."""
    head = min(-rows.start % rows.delta, out.shape[2])
    if head:
        out[:, :, :head].add_(differences[:, :, :1])
        differences = differences[:, :, 1:]
    whole = (out.shape[2] - head) // rows.delta
    end = head + whole * rows.delta
    if whole:
        torch.unflatten(out[:, :, head:end], 2, (whole, rows.delta)).add_(differences[:, :, :whole, None])
    if end < out.shape[2]:
        out[:, :, end:].add_(differences[:, :, whole:])


def _dense_rows(rows: Rows, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, sinks: Tensor | None) -> Tensor:
    """Dense attention of the rows alone, ``[batch, heads, rows.count, v_dim]``."""
    lse = None if sinks is None else new_lse(q[:, :, : rows.count])
    if rows_in_triton(q, k, v):
        # Imported when it is first used: it takes Triton.
        from tmbench_kernels.triangle.delta.triton_backend import attend_rows

        out = attend_rows(rows, q, k, v, scale, softcap=softcap, lse=lse)
    else:
        out = attend_rows_in_torch(rows, q, k, v, scale, softcap=softcap, lse=lse)
    return out if sinks is None or lse is None else add_sinks(out, lse, sinks)


def attend_rows_in_torch(
    rows: Rows, q: Tensor, k: Tensor, v: Tensor, scale: float, *, softcap: float = 0.0, lse: Tensor | None = None
) -> Tensor:
    """Dense attention of the rows, some at a time over the keys up to the last of them; fills ``lse`` where it is given."""
    queries, positions = rows.take(q), torch.tensor(rows.positions())
    out = empty_output(queries, v)
    for low in range(0, rows.count, _STEP):
        part = slice(low, low + _STEP)
        here = positions[part]
        seen = int(here[-1]) + 1
        later = torch.arange(seen) > here[:, None]
        bias = torch.zeros(later.shape, dtype=q.dtype).masked_fill_(later, -torch.inf).to(q.device)
        sums = None if lse is None else lse[:, :, part]
        out[:, :, part] = attention(
            queries[:, :, part], k[:, :, :seen], v[:, :, :seen], scale, bias=bias, softcap=softcap, lse=sums
        )
    return out

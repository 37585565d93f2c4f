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

from tmbench_kernels.cuda import for_hopper, for_triton, imported, triton_serves
from tmbench_kernels.pattern import Backend, add_sinks, asked_of, empty_output, new_lse
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

    def position(self, row: int) -> int:
        """Where a row is."""
        return max(self.first + row * self.delta, self.start)

    def positions(self) -> list[int]:
        """Where they are, ascending."""
        return [self.position(row) for row in range(self.count)]

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
    dense = dense_rows(rows, q, k, v, scale, softcap=softcap, sinks=sinks)
    if pattern.mode == RECOMPUTE:
        out[:, :, rows.first - start : tail - start : rows.delta] = dense
        return out
    carry(out[:, :, : tail - start], dense.to(_wide(q)).sub_(rows.take(out)), rows)
    return out


def _wide(q: Tensor) -> torch.dtype:
    """The type that differences are taken in."""
    return torch.promote_types(q.dtype, torch.float32)


def carry(out: Tensor, differences: Tensor, rows: Rows) -> None:
    """Add to each row of ``out``, which begins with the first query, the difference of the last dense row up to it."""
    if triton_serves(out):
        # Torch finds and converts one number at a time where two tensors differ in type and lie apart.
        from tmbench_kernels.triangle.delta.triton_backend import carry as carry_in_triton

        carry_in_triton(out, differences, rows)
    else:
        carry_in_torch(out, differences, rows)


def carry_in_torch(out: Tensor, differences: Tensor, rows: Rows) -> None:
    """As ``carry``, on any device and in any type."""
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


def dense_rows(
    rows: Rows, q: Tensor, k: Tensor, v: Tensor, scale: float, *, softcap: float = 0.0, sinks: Tensor | None = None
) -> Tensor:
    """Dense attention of the rows alone, ``[batch, heads, rows.count, v_dim]``."""
    lse = None if sinks is None else new_lse(q[:, :, : rows.count])
    backend = rows_backend(q, k, v, softcap=softcap, lse=lse is not None)
    out = backend.attend(rows, q, k, v, scale, **asked_of(softcap, lse))
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


ROWS_BACKENDS = (
    for_hopper(imported("triangle.delta.hopper_backend", "attend_rows")),
    for_triton(imported("triangle.delta.triton_backend", "attend_rows")),
    Backend("torch", ("cpu", "cuda"), attend_rows_in_torch, softcap=True, lse=True, chunks=True),
)
"""Of the dense rows alone, in order of preference. Each is called with the rows in a pattern's place."""


def rows_backend(q: Tensor, k: Tensor, v: Tensor, *, softcap: float = 0.0, lse: bool = False) -> Backend:
    """The first that serves these tensors; torch does in any case."""
    *others, last = ROWS_BACKENDS
    return next((one for one in others if not one.obstacle(None, q, k, v, softcap=softcap, lse=lse)), last)

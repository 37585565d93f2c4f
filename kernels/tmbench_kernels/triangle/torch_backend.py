"""Triangle attention in torch: sinks and windows gathered, block of queries by block of queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tmbench_kernels.pattern import empty_output
from tmbench_kernels.sdpa import attention

if TYPE_CHECKING:
    from tmbench_kernels.triangle import Triangle

_WINDOW_ELEMENTS = 2**20
"""Size of the buffers that windows are copied to: several windows a call keep the cores busy, and they fit the cache."""


def attend(
    pattern: Triangle,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    softcap: float = 0.0,
    lse: Tensor | None = None,
) -> Tensor:
    """Blocks of queries, each over the sinks and the keys that its windows span: linear in length, in time and memory."""
    length = k.shape[2]
    first = length - q.shape[2]
    if max(pattern.n_init, pattern.n_local) >= length or pattern.last_n >= q.shape[2]:
        return attention(q, k, v, scale, causal=True, softcap=softcap, lse=lse)
    out = empty_output(q, v)
    rows = _rows_per_block(pattern.n_local)
    tail = length - pattern.last_n
    settled = tail
    if pattern.n_init or pattern.n_local:
        # From the settled query on, windows have left the sinks behind: all blocks have the same mask.
        settled = min(max(pattern.n_init + _reach(pattern), first), tail)
        blocks = (tail - settled) // rows
        for b in range(q.shape[0] if blocks else 0):
            regular = slice(settled - first, settled - first + blocks * rows)
            sums = None if lse is None else lse[b, :, regular]
            _attend_windows(pattern, q[b, :, regular], k[b], v[b], scale, settled, rows, out[b, :, regular], softcap, sums)
        irregular = [range(first, settled), range(settled + blocks * rows, tail), range(tail, length)]
    else:
        out[:, :, : tail - first] = 0
        if lse is not None:
            lse[:, :, : tail - first] = -torch.inf
        irregular = [range(tail, length)]
    for part in irregular:
        for start in part[::rows]:
            end = min(start + rows, part.stop)
            _attend_block(pattern, q, k, v, scale, start, end, out, softcap, lse)
    return out


def _rows_per_block(n_local: int) -> int:
    """A block of R queries spans R - 1 keys beyond its windows: few rows waste little, many rows multiply faster."""
    return 192 if n_local < 3072 else 768


def _reach(pattern: Triangle) -> int:
    """How many keys before its own a window holds."""
    return max(pattern.n_local - 1, 0)


def _attend_windows(
    pattern: Triangle,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    settled: int,
    rows: int,
    out: Tensor,
    softcap: float,
    lse: Tensor | None,
) -> None:
    """Blocks of ``rows`` queries from ``settled`` on; q and out are ``[heads, blocks * rows, dim]``, k and v the whole."""
    sinks, reach = pattern.n_init, _reach(pattern)
    width = sinks + reach + rows
    blocks = q.shape[1] // rows
    batch = min(blocks, max(1, _WINDOW_ELEMENTS // (k.shape[0] * width * k.shape[2])))
    keys = torch.cat([torch.arange(sinks), torch.arange(settled - reach, settled + rows)])
    bias = _bias(pattern, q, range(settled, settled + rows), keys, 2**62)
    buffers = []
    for x in (k, v):
        buffers.append(x.new_empty(batch, x.shape[0], width, x.shape[2]))
        buffers[-1][:, :, :sinks] = x[:, :sinks]
    q, out = (x.view(x.shape[0], blocks, rows, -1).transpose(0, 1) for x in (q, out))
    if lse is not None:
        lse = lse.view(lse.shape[0], blocks, rows).transpose(0, 1)
    for first in range(0, blocks, batch):
        count = min(batch, blocks - first)
        start = settled + first * rows
        for x, buffer in zip((k, v), buffers, strict=True):
            windows = x[:, start - reach : start + count * rows].unfold(1, reach + rows, rows)
            buffer[:count, :, sinks:] = windows.permute(1, 0, 3, 2)
        near_k, near_v = (buffer[:count] for buffer in buffers)
        part = slice(first, first + count)
        sums = None if lse is None else lse[part]
        out[part] = attention(q[part], near_k, near_v, scale, bias=bias, softcap=softcap, lse=sums)


def _attend_block(
    pattern: Triangle,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    start: int,
    end: int,
    out: Tensor,
    softcap: float,
    lse: Tensor | None,
) -> None:
    """The queries at positions start..end-1, which are either all or none among the last ones."""
    length = k.shape[2]
    rows = slice(start - length + q.shape[2], end - length + q.shape[2])
    low = 0 if end > length - pattern.last_n else max(start - _reach(pattern), 0)
    sinks = min(pattern.n_init, low)
    bias = _bias(pattern, q, range(start, end), torch.cat([torch.arange(sinks), torch.arange(low, end)]), length)
    k, v = (torch.cat([x[:, :, :sinks], x[:, :, low:end]], dim=2) if sinks else x[:, :, low:end] for x in (k, v))
    sums = None if lse is None else lse[:, :, rows]
    out[:, :, rows] = attention(q[:, :, rows], k, v, scale, bias=bias, softcap=softcap, lse=sums)


def _bias(pattern: Triangle, q: Tensor, rows: range, keys: Tensor, length: int) -> Tensor:
    """0 where the pattern attends and -inf elsewhere, ``[rows, keys]``, in q's type."""
    positions = torch.arange(rows.start, rows.stop)[:, None]
    allowed = pattern.attends(positions, keys, length)
    return torch.zeros(allowed.shape, dtype=q.dtype).masked_fill_(~allowed, -torch.inf).to(q.device)

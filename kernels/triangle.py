"""Triangle attention: attention sinks, a sliding window, and full attention for the last queries.

TriangleMix (He et al. 2025, arXiv 2507.21526) gives it to the deep layers of a model and leaves the shallow ones dense.
Without last queries it is the A-shape of streaming attention (Xiao et al. 2023, arXiv 2309.17453). The window is strict,
as in the released code of TriangleMix: ``n_local`` keys, the query's own among them. ``last_n`` does what it says; the
released code never reads it, and its effective value there is always 128.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tmbench_kernels.cuda import hopper_backend, imported, triton_backend
from tmbench_kernels.pattern import Backend, Pattern, check_shapes, default_scale, empty_output
from tmbench_kernels.sdpa import sdpa

_WINDOW_ELEMENTS = 2**20
"""Size of the buffers that windows are copied to: several windows a call keep the cores busy, and they fit the cache."""


def _attend_banded(pattern: Triangle, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Blocks of queries, each over the sinks and the keys that its windows span: linear in length, in time and memory."""
    length = q.shape[2]
    if max(pattern.n_init, pattern.n_local, pattern.last_n) >= length:
        return sdpa(q, k, v, scale, causal=True)
    out = empty_output(q, v)
    rows = _rows_per_block(pattern.n_local)
    tail = length - pattern.last_n
    settled = tail
    if pattern.n_init or pattern.n_local:
        # From the settled query on, windows have left the sinks behind: all blocks have the same mask.
        settled = min(pattern.n_init + _reach(pattern), tail)
        blocks = (tail - settled) // rows
        for b in range(q.shape[0] if blocks else 0):
            regular = slice(settled, settled + blocks * rows)
            _attend_windows(pattern, q[b, :, regular], k[b], v[b], scale, settled, rows, out[b, :, regular])
        irregular = [range(settled), range(settled + blocks * rows, tail), range(tail, length)]
    else:
        out[:, :, :tail] = 0
        irregular = [range(tail, length)]
    for part in irregular:
        for start in part[::rows]:
            end = min(start + rows, part.stop)
            _attend_block(pattern, q, k, v, scale, start, end, out)
    return out


def _rows_per_block(n_local: int) -> int:
    """A block of R queries spans R - 1 keys beyond its windows: few rows waste little, many rows multiply faster."""
    return 192 if n_local < 3072 else 768


def _reach(pattern: Triangle) -> int:
    """How many keys before its own a window holds."""
    return max(pattern.n_local - 1, 0)


def _attend_windows(
    pattern: Triangle, q: Tensor, k: Tensor, v: Tensor, scale: float, settled: int, rows: int, out: Tensor
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
    for first in range(0, blocks, batch):
        count = min(batch, blocks - first)
        start = settled + first * rows
        for x, buffer in zip((k, v), buffers, strict=True):
            windows = x[:, start - reach : start + count * rows].unfold(1, reach + rows, rows)
            buffer[:count, :, sinks:] = windows.permute(1, 0, 3, 2)
        near_k, near_v = (buffer[:count] for buffer in buffers)
        out[first : first + count] = sdpa(q[first : first + count], near_k, near_v, scale, bias=bias)


def _attend_block(
    pattern: Triangle, q: Tensor, k: Tensor, v: Tensor, scale: float, start: int, end: int, out: Tensor
) -> None:
    """The queries start..end-1, which are either all or none among the last ones."""
    length = q.shape[2]
    low = 0 if end > length - pattern.last_n else max(start - _reach(pattern), 0)
    sinks = min(pattern.n_init, low)
    bias = _bias(pattern, q, range(start, end), torch.cat([torch.arange(sinks), torch.arange(low, end)]), length)
    k, v = (torch.cat([x[:, :, :sinks], x[:, :, low:end]], dim=2) if sinks else x[:, :, low:end] for x in (k, v))
    out[:, :, start:end] = sdpa(q[:, :, start:end], k, v, scale, bias=bias)


def _bias(pattern: Triangle, q: Tensor, rows: range, keys: Tensor, length: int) -> Tensor:
    """0 where the pattern attends and -inf elsewhere, ``[rows, keys]``, in q's type."""
    positions = torch.arange(rows.start, rows.stop)[:, None]
    allowed = pattern.attends(positions, keys, length)
    return torch.zeros(allowed.shape, dtype=q.dtype).masked_fill_(~allowed, -torch.inf).to(q.device)


@dataclass(frozen=True)
class Triangle(Pattern):
    """Query i attends to key j <= i when ``j < n_init``, or ``i - j < n_local``, or ``i >= length - last_n``.

    All three count tokens; 0 switches a part off and a value beyond the length makes the pattern dense. With neither sinks
    nor a window the queries before the last attend to nothing, and their output is zero. Raises ValueError for a negative.
    """

    n_init: int = 8
    n_local: int = 512
    last_n: int = 128

    name: ClassVar[str] = "triangle"
    backends: ClassVar[tuple[Backend, ...]] = (
        hopper_backend(imported("hopper_triangle", "attend")),
        triton_backend(imported("triton_triangle", "attend")),
        Backend("torch-banded", ("cpu", "cuda"), _attend_banded),
    )

    def __post_init__(self) -> None:
        for field in ("n_init", "n_local", "last_n"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must not be negative, but it is {getattr(self, field)}")

    @classmethod
    def streaming(cls, n_init: int, n_local: int) -> Triangle:
        """The A-shape: sinks and window, no last queries."""
        return cls(n_init, n_local, last_n=0)

    def attends(self, i: Tensor, j: Tensor, length: int) -> Tensor:
        """The definition: whether query i attends to key j, bool, for positions that broadcast."""
        return (j <= i) & ((j < self.n_init) | (i - j < self.n_local) | (i >= length - self.last_n))

    def mask(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> Tensor:
        """Bool ``[1, 1, length, length]``; the values of q and k do not matter."""
        positions = torch.arange(q.shape[2], device=q.device)
        return self.attends(positions[:, None], positions, q.shape[2])[None, None]

    def pairs(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> int:
        """In closed form: a query before the last attends to ``min(i + 1, n_init + n_local)`` keys."""
        batch, heads, length = q.shape[:3]
        tail = max(length - self.last_n, 0)
        width = self.n_init + self.n_local
        ramp = min(width, tail)
        before = ramp * (ramp + 1) // 2 + (tail - ramp) * width
        last = (length * (length + 1) - tail * (tail + 1)) // 2
        return batch * heads * (before + last)

    def last_row(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        """The last query over its keys, the sinks and the window where it is not among ``last_n``; reads no other query."""
        check_shapes(q, k, v)
        length = q.shape[2]
        start = 0 if self.last_n else max(length - self.n_local, 0)
        sinks = min(self.n_init, start)
        if sinks:
            k, v = (torch.cat([x[:, :, :sinks], x[:, :, start:]], dim=2) for x in (k, v))
        elif start == length:
            return v.new_zeros(*q.shape[:2], 1, v.shape[3])
        else:
            k, v = k[:, :, start:], v[:, :, start:]
        return sdpa(q[:, :, -1:], k, v, default_scale(q, scale))

"""How much three sections of the attention matrix matter to a result: dense attention whose backward pass adds it up.

TriangleMix (He et al. 2025, arXiv 2507.21526) parts the causal triangle into three sections that do not overlap:

- streaming: query i and key j with ``j < n_init`` or ``i - j < n_local``, also in the last rows;
- last: the rest of the last ``last_n`` rows;
- middle: everything else, which is what triangle attention leaves out.

Let z be the scalar that is differentiated, ``s_ij`` the scaled attention logits, ``p = softmax(s)`` row by row, ``o = p v``
and ``g = dz/do``. Two derivatives are added up over each section, in absolute value and signed:

- ``dz/dp_ij = g_i . v_j``, after the softmax;
- ``dz/ds_ij = p_ij (g_i . v_j - g_i . o_i)``, before it.

The second says what leaving one pair out changes, to first order: without pair (i, j), and with the row renormalised,
``o_i`` moves by ``-p_ij / (1 - p_ij) (v_j - o_i)``, so z moves by ``-dz/ds_ij / (1 - p_ij)``. The first ignores how much
weight a pair has, and does not vanish for pairs that have none.

The publication says "gradient" and "averaged" and no more, so both are kept. The backward pass recomputes probabilities in
blocks of query rows: nothing of the size length x length is ever held, for no head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from tmbench_kernels.dense import Dense
from tmbench_kernels.pattern import check_shapes, default_scale
from tmbench_kernels.triangle import Triangle

SECTIONS = ("streaming", "middle", "last")
MEASURES = ("logits", "logits_signed", "probabilities", "probabilities_signed")
"""What is added up over a section: |dz/ds|, dz/ds, |dz/dp| and dz/dp, in the order of the last dimension of the sums."""

_BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
"""Logits of a block of query rows, over the heads of one key head: a few such buffers live at a time, in float32."""


@dataclass(frozen=True)
class Sections:
    """The three sections, by the parameters of the triangle pattern that drops the middle one."""

    n_init: int = 8
    n_local: int = 512
    last_n: int = 128

    def __post_init__(self) -> None:
        Triangle(self.n_init, self.n_local, self.last_n)  # refuses what is negative

    def labels(self, length: int, device: torch.device | None = None) -> Tensor:
        """The definition: int8 ``[length, length]``, the index in ``SECTIONS`` of each pair, -1 above the diagonal."""
        i, j = torch.arange(length, device=device)[:, None], torch.arange(length, device=device)
        streaming = Triangle.streaming(self.n_init, self.n_local).attends(i, j, length)
        kept = Triangle(self.n_init, self.n_local, self.last_n).attends(i, j, length)
        return torch.where(j > i, -1, torch.where(streaming, 0, torch.where(kept, 2, 1))).to(torch.int8)

    def pairs(self, length: int) -> tuple[int, int, int]:
        """How many pairs of one head each section has, in the order of ``SECTIONS``, in closed form."""
        one = torch.empty(1, 1, length, 1, device="meta")
        streaming = Triangle.streaming(self.n_init, self.n_local).pairs(one, one)
        kept = Triangle(self.n_init, self.n_local, self.last_n).pairs(one, one)
        return streaming, Dense().pairs(one, one) - kept, kept - streaming


@dataclass(frozen=True)
class DenseProbe(Dense):
    """Dense attention that can be differentiated, and whose backward pass hands ``record`` the sums over sections.

    ``record`` gets float64 ``[batch, heads, len(SECTIONS), len(MEASURES)]`` once for every backward pass. The forward pass
    is that of ``Dense``, by the same backends. The backward pass computes in float32, in float64 for float64 tensors; its
    memory is linear in the length, and its arithmetic that of two and a half forward passes.
    """

    sections: Sections = Sections()
    record: Callable[[Tensor], None] = field(default=lambda sums: None, compare=False)

    name: ClassVar[str] = "dense"

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """As ``Dense.attend``, with gradients for q, k and v; raises ValueError for capped logits and learned sinks."""
        _check_whole(q, k, v)
        if softcap or sinks is not None:
            asked = "soft-capped logits" if softcap else "learned sinks"
            raise ValueError(f"the probe differentiates plain softmax attention, not {asked}: probe a model without")
        out: Tensor = _Attention.apply(q, k, v, default_scale(q, scale), self)  # type: ignore[no-untyped-call]
        return out


def _check_whole(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_shapes(q, k, v)
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"the probe differentiates whole prompts, not {q.shape[2]} queries over {k.shape[2]} keys")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, probe: DenseProbe) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.probe = scale, probe
        return probe.backend(q, k, v).attend(probe, q, k, v, scale)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v = ctx.saved_tensors
        grad_q, grad_k, grad_v, sums = section_gradients(q, k, v, grad_out, ctx.probe.sections, scale=ctx.scale)
        ctx.probe.record(sums)
        return grad_q, grad_k, grad_v, None, None


def section_gradients(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, sections: Sections, *, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward pass of dense causal attention, and the sums over the sections of its attention matrix.

    Args:
        q, k, v: one prefill, in the shapes of this package.
        grad_out: dz/do, ``[batch, heads, length, v_dim]``.
        sections: where the sections are.
        scale: what multiplies the logits; None means ``head_dim ** -0.5``.

    Returns:
        dz/dq, dz/dk and dz/dv in their tensors' types, and float64 ``[batch, heads, len(SECTIONS), len(MEASURES)]``.

    Raises ValueError for shapes that do not fit.
    """
    _check_whole(q, k, v)
    if grad_out.shape != (*q.shape[:3], v.shape[3]):
        raise ValueError(f"the gradient of the output must be {(*q.shape[:3], v.shape[3])}, not {tuple(grad_out.shape)}")
    scale = default_scale(q, scale)
    batch, heads = q.shape[:2]
    groups = heads // k.shape[1]
    sums = torch.zeros(batch, heads, len(SECTIONS), len(MEASURES), dtype=torch.float64, device=q.device)
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for b in range(batch):
        for shared in range(k.shape[1]):
            own = slice(shared * groups, (shared + 1) * groups)
            grad_q, grad_k, grad_v = _one_group(
                q[b, own], k[b, shared], v[b, shared], grad_out[b, own], sections, scale, sums[b, own]
            )
            grads[0][b, own], grads[1][b, shared], grads[2][b, shared] = grad_q, grad_k, grad_v
    return *grads, sums


def _one_group(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, sections: Sections, scale: float, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The heads that share a key head: q and grad_out ``[heads, length, dim]``, k and v ``[length, dim]``.

    Adds to ``sums`` ``[heads, sections, measures]`` and returns the gradients of q, k and v.
    """
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v, grad_out = (x.to(kind) for x in (q, k, v, grad_out))
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    heads, length, dim = q.shape
    for start, end in _blocks(heads, length, sections.last_n, q.device):
        rows, keys = q[:, start:end], k[:end]
        given = grad_out[:, start:end]
        p = (rows.reshape(-1, dim) @ keys.T).view(heads, end - start, end).mul_(scale)
        later = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu_(1)
        p[:, :, start:].masked_fill_(later, -torch.inf)
        p = p.softmax(-1)
        wide = given.reshape(-1, given.shape[2])
        grad_v[:end].addmm_(p.view(-1, end).T, wide)
        grad_p = (wide @ v[:end].T).view_as(p)
        grad_p[:, :, start:].masked_fill_(later, 0)
        _add(sums, 2, grad_p, sections, start, length)
        # The rows' own sum in place of g . o: the output need not be kept, and the sum of ds over a row is zero to rounding.
        mean = (p * grad_p).sum(-1, keepdim=True)
        grad_s = grad_p.sub_(mean).mul_(p)
        _add(sums, 0, grad_s, sections, start, length)
        flat = grad_s.view(-1, end)
        grad_q[:, start:end] = (flat @ keys).view_as(rows).mul_(scale)
        grad_k[:end].addmm_(flat.T, rows.reshape(-1, dim), alpha=scale)
    return grad_q, grad_k, grad_v


def _blocks(heads: int, length: int, last_n: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Consecutive query rows, all or none of them among the last ones, as many as the buffers hold."""
    room = _BLOCK_ELEMENTS.get(device.type, _BLOCK_ELEMENTS["cpu"])
    tail = max(length - last_n, 0)
    start = 0
    while start < length:
        # rows * keys with keys = start + rows: early blocks, which see few keys, have more rows.
        rows = max(1, int((start * start / 4 + room / heads) ** 0.5 - start / 2))
        end = min(start + rows, tail if start < tail else length)
        yield start, end
        start = end


def _add(sums: Tensor, at: int, values: Tensor, sections: Sections, start: int, length: int) -> None:
    """Add |values| and values over each section to ``sums[:, :, at]`` and ``sums[:, :, at + 1]``.

    ``values`` is ``[heads, rows, keys]`` of the query rows from ``start`` on, zero above the diagonal.
    """
    rows, keys = values.shape[1:]
    rest = SECTIONS.index("last" if start >= length - sections.last_n else "middle")
    sinks = min(sections.n_init, keys)
    # Left of the band no window reaches; within it each row has its own.
    band = max(sinks, min(keys, start - sections.n_local + 1))
    i, j = (torch.arange(*span, device=values.device) for span in ((start, start + rows), (band, keys)))
    near = (i[:, None] - j < sections.n_local).to(values.dtype)
    for offset in range(2):
        some = values.abs() if offset == 0 else values
        within = some[:, :, band:]
        sums[:, 0, at + offset] += _total(some[:, :, :sinks]) + _total(within * near)
        sums[:, rest, at + offset] += _total(some[:, :, sinks:band]) + _total(within * (1 - near))


def _total(values: Tensor) -> Tensor:
    """The sum over all but the first dimension: rows in their own type, as a copy in float64 costs more than the sum."""
    return values.sum(-1).sum(-1, dtype=torch.float64)

"""The heaviest of probabilities, in Triton: so many, as many as fit a limit, or as it takes to reach one. Nothing is sorted.

The bits of floats that are not negative are in the order of the floats. A threshold is searched for: the largest number of
which the probabilities from it on hold more than the limit, or are as many as wanted. Its bits are found two at a time, and
each two take one pass over the probabilities, whose sums run in float64. Those above the threshold are taken; of those that
equal it, as many as fit, or as it takes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDE = 4096
"""Probabilities in a part, of which ties are counted for themselves; fewer where a row has fewer."""
PARTS = 4
"""Parts that are read at once."""


@triton.jit
def _load(weights, place, n):
    w = tl.load(weights + place, mask=place < n, other=0.0)
    return w, w.to(tl.int32, bitcast=True)


@triton.jit
def _held_from(bits, w, least):
    return tl.sum(tl.where(bits >= least, w, 0), 0)


@triton.jit
def _count_ties(weights, threshold, ties, n, parts, PARTS: tl.constexpr, WIDE: tl.constexpr):
    """How many are above the threshold, and how many equal it; ``ties`` gets the latter for each part, unless it is None."""
    tile = tl.arange(0, PARTS)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
    larger = tl.zeros([WIDE], tl.int32)
    equal = tl.zeros([WIDE], tl.int32)
    for first in range(0, n, PARTS * WIDE):
        _, bits = _load(weights, first + tile, n)
        larger += tl.sum((bits > threshold).to(tl.int32), 0)
        found = ((bits == threshold) & (first + tile < n)).to(tl.int32)
        equal += tl.sum(found, 0)
        if ties is not None:
            part = first // WIDE + tl.arange(0, PARTS)
            tl.store(ties + part, tl.sum(found, 1), mask=part < parts)
    return tl.sum(larger, 0), tl.sum(equal, 0)


@triton.jit(do_not_specialize=["parts"])
def _search(
    weights_ptr, limit_ptr, held_ptr, thresholds_ptr, fitting_ptr, counts_ptr, ties_ptr, n, parts,
    REACH: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One row. ties_ptr, for the ties of each part, is None where they are not wanted: then none are noted.

    Under REACH the limit is a share of the row's sum, and what is taken is not to fall short of it. held_ptr, what counts as
    taken before, may be None.
    """
    row = tl.program_id(0).to(tl.int64)
    weights = weights_ptr + row * n
    limit = tl.load(limit_ptr)
    tile = tl.arange(0, PARTS)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
    if REACH:
        every = tl.zeros([WIDE], tl.float64)
        for first in range(0, n, PARTS * WIDE):
            every += tl.sum(_load(weights, first + tile, n)[0].to(tl.float64), 0)
        held = tl.full([], 0.0, tl.float64)
        if held_ptr is not None:
            held = tl.load(held_ptr + row)
        limit = limit * (tl.sum(every, 0) + held) - held
    threshold = tl.full([], 0, tl.int32)
    above = tl.full([], 0.0, tl.float64)
    for step in range(15):
        shift = 28 - 2 * step
        held_1 = tl.zeros([WIDE], tl.float64)
        held_2 = tl.zeros([WIDE], tl.float64)
        held_3 = tl.zeros([WIDE], tl.float64)
        for first in range(0, n, PARTS * WIDE):
            w, bits = _load(weights, first + tile, n)
            w = w.to(tl.float64)
            held_1 += _held_from(bits, w, threshold + (1 << shift))
            held_2 += _held_from(bits, w, threshold + (2 << shift))
            held_3 += _held_from(bits, w, threshold + (3 << shift))
        sum_1 = tl.sum(held_1, 0)
        sum_2 = tl.sum(held_2, 0)
        sum_3 = tl.sum(held_3, 0)
        much_1 = sum_1 > limit
        much_2 = sum_2 > limit
        much_3 = sum_3 > limit
        # What fits is held from the next larger number on; where all three are too much, the last step's still is.
        above = tl.where(much_1, tl.where(much_2, tl.where(much_3, above, sum_3), sum_2), sum_1)
        threshold += (much_1.to(tl.int32) + much_2.to(tl.int32) + much_3.to(tl.int32)) << shift

    # All that is zero fits, if it comes to that: then everything does.
    weight = tl.where(threshold == 0, 1.0, threshold.to(tl.float32, bitcast=True)).to(tl.float64)
    fitting = tl.floor((limit - above) / weight)
    fitting += (above + (fitting + 1.0) * weight <= limit).to(tl.float64)
    fitting -= (above + fitting * weight > limit).to(tl.float64)
    if REACH:
        # One more, unless these come to the limit.
        fitting += (above + fitting * weight < limit).to(tl.float64)
    fitting = tl.where(threshold == 0, 0 if REACH else n, tl.minimum(fitting, n).to(tl.int32))

    if ties_ptr is not None:
        ties_ptr += row * parts
    larger, equal = _count_ties(weights, threshold, ties_ptr, n, parts, PARTS, WIDE)
    tl.store(thresholds_ptr + row, threshold)
    tl.store(fitting_ptr + row, fitting)
    tl.store(counts_ptr + row, larger + tl.minimum(equal, fitting))


@triton.jit(do_not_specialize=["parts"])
def _search_count(
    weights_ptr, wanted_ptr, thresholds_ptr, fitting_ptr, ties_ptr, n, parts,
    PARTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One row: the largest number of which as many as wanted are there from it on."""
    row = tl.program_id(0).to(tl.int64)
    weights = weights_ptr + row * n
    wanted = tl.load(wanted_ptr + row)
    # Where none is wanted, the threshold is that of one, and none that equals it fits.
    enough = tl.maximum(wanted, 1)
    tile = tl.arange(0, PARTS)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
    threshold = tl.full([], 0, tl.int32)
    for step in range(16):
        # Infinity takes 31 bits. The last one is found for itself: from the next but one on there are too few by then.
        shift = tl.maximum(29 - 2 * step, 0)
        count_1 = tl.zeros([WIDE], tl.int32)
        count_2 = tl.zeros([WIDE], tl.int32)
        count_3 = tl.zeros([WIDE], tl.int32)
        for first in range(0, n, PARTS * WIDE):
            _, bits = _load(weights, first + tile, n)
            count_1 += _held_from(bits, 1, threshold + (1 << shift))
            count_2 += _held_from(bits, 1, threshold + (2 << shift))
            count_3 += _held_from(bits, 1, threshold + (3 << shift))
        enough_1 = (tl.sum(count_1, 0) >= enough).to(tl.int32)
        enough_2 = (tl.sum(count_2, 0) >= enough).to(tl.int32)
        enough_3 = (tl.sum(count_3, 0) >= enough).to(tl.int32)
        threshold += (enough_1 + enough_2 + enough_3) << shift
    larger, _ = _count_ties(weights, threshold, ties_ptr + row * parts, n, parts, PARTS, WIDE)
    tl.store(thresholds_ptr + row, threshold)
    tl.store(fitting_ptr + row, wanted - larger)


@triton.jit(do_not_specialize=["parts"])
def _mark(
    weights_ptr, thresholds_ptr, fitting_ptr, ties_ptr, marks_ptr, n, parts,
    WIDE: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """One part of one row."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    place = part * WIDE + tl.arange(0, WIDE)
    _, bits = _load(weights_ptr + row * n, place, n)
    threshold = tl.load(thresholds_ptr + row)
    before = tl.zeros([COUNTED], tl.int32)
    for first in range(0, part, COUNTED):
        earlier = first + tl.arange(0, COUNTED)
        before += tl.load(ties_ptr + row * parts + earlier, mask=earlier < part, other=0)
    tie = bits == threshold
    rank = tl.sum(before, 0) + tl.cumsum(tie.to(tl.int32), 0)
    taken = (bits > threshold) | (tie & (rank <= tl.load(fitting_ptr + row)))
    tl.store(marks_ptr + row * n + place, taken.to(tl.uint8), mask=place < n)


def heaviest(shares: Tensor, limit: float) -> Tensor:
    """``scores.heaviest``."""
    return _taken(shares, limit, reach=False)


def reaching(shares: Tensor, share: float, held: Tensor | None = None) -> Tensor:
    """``scores.heaviest_reaching``."""
    return _taken(shares, share, reach=True, held=None if held is None else held.contiguous())


def _taken(shares: Tensor, limit: float, *, reach: bool, held: Tensor | None = None) -> Tensor:
    shares = shares.contiguous()
    ties = _ties(shares)
    thresholds, fitting, _ = _searched(shares, limit, ties, reach=reach, held=held)
    return _marked(shares, thresholds, fitting, ties)


def largest(shares: Tensor, counts: Tensor) -> Tensor:
    """``scores.largest_of_positive``."""
    shares = shares.contiguous()
    ties = _ties(shares)
    thresholds, fitting = (shares.new_empty(shares.shape[:-1], dtype=torch.int32) for _ in range(2))
    wanted = counts.expand(shares.shape[:-1]).contiguous()
    n, parts = shares.shape[-1], ties.shape[-1]
    _search_count[(wanted.numel(),)](shares, wanted, thresholds, fitting, ties, n, parts, **_reading(n))
    return _marked(shares, thresholds, fitting, ties)


def _width(n: int) -> int:
    """Probabilities in a part of rows of n."""
    return min(WIDE, max(128, 1 << (n - 1).bit_length()))


def _reading(n: int) -> dict[str, int]:
    """How a program reads a row of n."""
    parts = PARTS if n > WIDE else 1
    return {"PARTS": parts, "WIDE": _width(n), "num_warps": max(_width(n) * parts // 512, 1)}


def _ties(shares: Tensor) -> Tensor:
    """Room for how many of each part of a row equal its threshold."""
    n = shares.shape[-1]
    return shares.new_empty(*shares.shape[:-1], triton.cdiv(n, _width(n)), dtype=torch.int32)


def _marked(shares: Tensor, thresholds: Tensor, fitting: Tensor, ties: Tensor) -> Tensor:
    """What is above a row's threshold, and the first of those that equal it. Bool."""
    marks = torch.empty_like(shares, dtype=torch.uint8)
    n, parts = shares.shape[-1], ties.shape[-1]
    _mark[(thresholds.numel(), parts)](
        shares, thresholds, fitting, ties, marks, n, parts,
        WIDE=_width(n), COUNTED=256, num_warps=max(_width(n) // 512, 1),
    )  # fmt: skip
    return marks.view(torch.bool)


def heaviest_count(shares: Tensor, limit: float) -> Tensor:
    """``scores.heaviest_count``."""
    return _searched(shares.contiguous(), limit, None, reach=False)[2]


def _searched(
    shares: Tensor, limit: float, ties: Tensor | None, *, reach: bool, held: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of every row the bits of its threshold, how many that equal it fit, and how many are taken in all; fills ``ties``."""
    n = shares.shape[-1]
    thresholds, fitting, counts = (shares.new_empty(shares.shape[:-1], dtype=torch.int32) for _ in range(3))
    # A number is handed to a kernel in float32, which is not enough here.
    limits = shares.new_full((), limit, dtype=torch.float64)
    _search[(counts.numel(),)](
        shares, limits, held, thresholds, fitting, counts, ties, n, triton.cdiv(n, _width(n)), REACH=reach, **_reading(n)
    )
    return thresholds, fitting, counts

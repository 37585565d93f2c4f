"""Skip-softmax: tiles of dense attention whose largest logits lie far below the running maximum keep their values unread.

Yuan et al. 2025 (BLASST), arXiv 2512.12087. It is a step of a dense kernel, no choice before one: the product of queries and
keys is computed for every tile, and a tile that cannot weigh much is spared its softmax, its product with the values and
their load. So at most about half of the arithmetic is saved.

What is skipped depends on the order in which tiles come, as the maximum runs with them. TensorRT-LLM goes from the first key
to the last, FlashAttention from the diagonal back; ``order`` says which. Skipped tiles raise no maximum, so what is skipped
follows from the maxima of all tiles before, whether these were skipped or not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tmbench_kernels.block_sparse import BlockSparse, over_lists
from tmbench_kernels.block_sparse.lists import BLOCK, block_count, split_blocks
from tmbench_kernels.block_sparse.torch_backend import attend_lists
from tmbench_kernels.cuda import for_hopper, for_triton, imported, refuses_hopper, refuses_tensors, runs_triton
from tmbench_kernels.parameters import Parameter, ParameterError, parameter
from tmbench_kernels.pattern import Backend, Computed, default_scale
from tmbench_kernels.reference import causal_mask, masked_logits
from tmbench_kernels.skip_softmax.calibration import Calibration
from tmbench_kernels.skip_softmax.margins import margins

ASCENDING = "ascending"
ORDERS = (ASCENDING, "descending")
SCALE_FACTOR = 1000.0
"""What TensorRT-LLM's documentation shows for prefill."""
TRITON_SIZES = ((8, 128), (9, 256), (10, 256), (11, 128), (12, 128))
"""Capabilities and largest head sizes of the kernel in Triton, which holds 128 queries and as many keys at a time."""
HOPPER_SIZES = (192, 128)
"""The largest head sizes of queries and of values that the kernel for Hopper has room for."""

_THRESHOLD = Parameter(default=0.01, help="", above=0, at_most=1)
_FACTOR = Parameter(default=SCALE_FACTOR, help="", above=0)
_TARGET = Parameter(default=0.5, help="", above=0, at_most=1)


def _refuses_hopper(pattern: Any, q: Tensor, k: Tensor, v: Tensor) -> str:
    if q.shape[-1] > HOPPER_SIZES[0] or v.shape[-1] > HOPPER_SIZES[1]:
        return f"takes head sizes up to {HOPPER_SIZES[0]}, and of values up to {HOPPER_SIZES[1]}"
    return refuses_hopper(pattern, q, k, v)


def _refuses_triton(pattern: Any, q: Tensor, k: Tensor, v: Tensor) -> str:
    return refuses_tensors(q.device, q.dtype, max(q.shape[-1], v.shape[-1]), TRITON_SIZES)


@dataclass(frozen=True)
class SkipSoftmax(BlockSparse):
    """All tiles of 128 queries and 128 keys but those that every query of the tile finds too light.

    A query finds a tile too light where its largest logit there lies more than ``ln(1 / threshold)`` below its largest logit
    in the tiles before, in ``order``. The first tile is never skipped. The threshold is given, or is
    ``threshold_scale_factor`` over the number of keys, at most 1: the form of the engines that ship the method. ``target``
    has the factor follow from a ``calibration`` of the model, as ``a * exp(b * target)``. One of the three is given, or the
    factor is 1000. A chunk of a prompt has the keys up to its end. Raises ValueError for more than one of them, for a target
    without a calibration, and for values out of range.
    """

    threshold: float | None = parameter(
        None,
        help="The share of the largest weight so far below which a tile is skipped.",
        read=lambda given: _THRESHOLD.value("threshold", given),
        shown_default="threshold_scale_factor / keys",
    )
    threshold_scale_factor: float | None = parameter(
        None,
        help="The threshold times the number of keys, as engines have it.",
        read=lambda given: _FACTOR.value("threshold_scale_factor", given),
        shown_default=f"{SCALE_FACTOR:g}",
    )
    target: float | None = parameter(
        None,
        help="The share of tiles to skip, by a calibration.",
        read=lambda given: _TARGET.value("target", given),
        shown_default="none",
    )
    calibration: Calibration | None = parameter(  # noqa: RUF009 - frozen, and its default is None
        None,
        help="A file that tmbench patterns calibrate wrote, or a config.json with such an entry.",
        read=Calibration.read,
        shown_default="none",
    )
    order: str = parameter(ASCENDING, help=f"How tiles of keys follow each other: {' or '.join(ORDERS)}.", choices=ORDERS)

    name: ClassVar[str] = "skip_softmax"
    last_row_queries: ClassVar[int | None] = 1
    backends: ClassVar[tuple[Backend, ...]] = (
        replace(for_hopper(imported("skip_softmax.hopper_backend", "attend")), refuses=_refuses_hopper),
        replace(for_triton(imported("skip_softmax.triton_backend", "attend")), refuses=_refuses_triton),
        Backend("torch-blocks", ("cpu", "cuda"), over_lists(attend_lists), softcap=True, lse=True, chunks=True),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.target is None) != (self.calibration is None):
            missing, given = ("calibration", "target") if self.calibration is None else ("target", "calibration")
            raise ParameterError(given, f" takes a {missing} beside it: add {missing}=...")
        if self.calibration is not None and (made := self.calibration.order) not in ("", self.order):
            raise ParameterError("order", f" {self.order} is not the one that {self.calibration.path} is for: give {made}")
        for about, name in ((_THRESHOLD, "threshold"), (_FACTOR, "threshold_scale_factor"), (_TARGET, "target")):
            if (value := getattr(self, name)) is not None:
                about.check(name, value)
        factor = SCALE_FACTOR
        if self.target is not None and self.calibration is not None:
            factor = self.calibration.factor(self.target)
        asked = [name for name in ("threshold", "target") if getattr(self, name) is not None]
        if self.threshold_scale_factor is not None and (self.target is None or self.threshold_scale_factor != factor):
            asked.append("threshold_scale_factor")
        if len(asked) > 1:
            raise ParameterError(asked[0], f" and {asked[1]} both say what to skip: give one of them")
        if self.threshold is None and self.threshold_scale_factor is None:
            object.__setattr__(self, "threshold_scale_factor", factor)

    def least(self, keys: int) -> float:
        """How far above its running maximum, in logits, a query's largest one must lie for a tile to be kept; at most 0."""
        if self.threshold is not None:
            return math.log(self.threshold)
        assert self.threshold_scale_factor is not None
        return min(math.log(self.threshold_scale_factor / keys), 0.0)

    def rule(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        keys, start = len(k), len(k) - len(q)
        mask = causal_mask(keys, q.device, queries=len(q))
        logits = masked_logits(q[None, None], k[None, None], mask, scale=scale)[0, 0]
        rows = split_blocks(logits, start=start)
        kept = torch.zeros(len(rows), block_count(keys), dtype=torch.bool, device=q.device)
        for number, row in enumerate(rows):
            own = start // BLOCK + number
            running = row.new_full((len(row),), -torch.inf)
            for tile in range(own + 1) if self.order == ASCENDING else range(own, -1, -1):
                top = row[:, tile * BLOCK : (tile + 1) * BLOCK].amax(1)
                kept[number, tile] = not bool((top < running + self.least(keys)).all())
                running = torch.maximum(running, top)
        return kept

    def block_map(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        return self.margins(q, k, scale) >= self.least(k.shape[2])

    def margins(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """How far each tile's highest query is above its running maximum, float32 ``[batch, heads, q_blocks, k_blocks]``.

        In logits; inf for the first tile, -inf for tiles of later keys. By Triton where it serves, else in torch.
        """
        if runs_triton(q.device) and not _refuses_triton(self, q, k, k):
            # Imported when it is first used: it takes Triton.
            from tmbench_kernels.skip_softmax.triton_backend import margins as in_triton

            return in_triton(self.order == ASCENDING, q, k, scale)
        return margins(self.order == ASCENDING, q, k, scale)

    def computed(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> Computed:
        """At the cost of the products of q and k. A pair of a skipped tile counts half, for its first product alone."""
        batch, heads, queries = q.shape[:3]
        first, blocks = (k.shape[2] - queries) // BLOCK, block_count(k.shape[2])
        lists = self.select(q, k, scale=default_scale(q, scale))
        every = batch * heads * queries * (2 * k.shape[2] - queries + 1) // 2
        tiles = batch * heads * (blocks * (blocks + 1) - first * (first + 1)) // 2
        return Computed((every + lists.pairs()) // 2, tiles, tiles - int(lists.counts.sum()))

    def pairs(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> int:
        """See ``computed``."""
        return self.computed(q, k, scale=scale).pairs

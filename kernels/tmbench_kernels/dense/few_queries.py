"""Dense attention of few queries behind many keys, such as a question's behind its context: their keys are cut into splits.

A library that walks over all keys in one program for each tile of queries leaves most of the GPU idle then, as
FlashAttention 4 does on Hopper, which has no splits there. Flash decoding cuts the keys (Dao et al. 2023,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html). So do the triangle's kernels for the last rows of a prompt,
which see all keys. Here every query is such a row.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from tmbench_kernels.cuda import imported, refuses_hopper
from tmbench_kernels.launch import multiprocessors
from tmbench_kernels.pattern import Pattern
from tmbench_kernels.triangle import Triangle
from tmbench_kernels.triangle.splits import ONE_LAUNCH

TILE = 128
"""Queries of a program of FlashAttention's."""

_attend_hopper = imported("triangle.hopper_backend", "attend")


def many(q: Tensor, k: Tensor, of: int = 1) -> str:
    """ "" for few queries behind many keys, otherwise why these are not, as a backend says it.

    Few have fewer tiles than one part ``of`` so many of the multiprocessors.
    """
    if k.shape[2] <= ONE_LAUNCH:
        return f"takes more than {ONE_LAUNCH} keys, not {k.shape[2]}"
    programs, slots = math.prod(q.shape[:2]) * -(-q.shape[2] // TILE), multiprocessors(q.device) // of
    return "" if programs < slots else f"takes queries of fewer than {slots} tiles of {TILE}, not {programs}"


def refuses(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> str:
    """What the kernel for Hopper says of these tensors. With more tiles FlashAttention 4 is as fast."""
    return many(q, k, of=2) or refuses_hopper(pattern, q, k, v)


def as_last_rows(q: Tensor) -> Triangle:
    """The triangle of which all queries are last rows."""
    return Triangle(0, 0, q.shape[2])


def attend(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, scale: float, **asked: Any) -> Tensor:
    """By the triangle's kernel for Hopper."""
    return _attend_hopper(as_last_rows(q), q, k, v, scale, **asked)

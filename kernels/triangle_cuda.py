"""Triangle attention by the kernels for CUDA, and which tensors each serves. They are imported when they are first used."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tmbench_kernels.cuda import missing_hopper, missing_triton, refuses_hopper, refuses_triton
from tmbench_kernels.pattern import Backend


def _attend_triton(pattern: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from tmbench_kernels.triton_triangle import attend

    return attend(pattern, q, k, v, scale)


def _attend_hopper(pattern: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from tmbench_kernels.hopper_triangle import attend

    return attend(pattern, q, k, v, scale)


CUDA_BACKENDS = (
    Backend("cuda-hopper", ("cuda",), _attend_hopper, missing=missing_hopper, refuses=refuses_hopper),
    Backend("triton", ("cuda",), _attend_triton, missing=missing_triton, refuses=refuses_triton),
)
"""Fastest first, as benchmarks/attention.csv has them."""

"""Triangle attention by the kernels for CUDA, and which tensors each serves. They are imported when they are first used."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tmbench_kernels.cuda import import_failure, missing_triton, refuses_tensors, refuses_triton
from tmbench_kernels.pattern import Backend

if TYPE_CHECKING:
    from tmbench_kernels.triangle import Triangle


@cache
def _missing_hopper() -> str:
    try:
        from tmbench_kernels.hopper import compiler_version

        compiler_version()
    except Exception as error:
        return f"{import_failure(error)}: pip install cuda-bindings nvidia-cuda-nvrtc"
    return missing_triton()


def _refuses_hopper(pattern: Triangle, q: Tensor, k: Tensor, v: Tensor) -> str:
    if v.shape[-1] % 8:
        return f"writes outputs of a head size that is a multiple of 8, not {v.shape[-1]}"
    return refuses_tensors(q.device, q.dtype, max(q.shape[-1], v.shape[-1]), (9,), 128)


def _attend_triton(pattern: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from tmbench_kernels.triton_triangle import attend

    return attend(pattern, q, k, v, scale)


def _attend_hopper(pattern: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from tmbench_kernels.hopper_triangle import attend

    return attend(pattern, q, k, v, scale)


CUDA_BACKENDS = (
    Backend("cuda-hopper", ("cuda",), _attend_hopper, missing=_missing_hopper, refuses=_refuses_hopper),
    Backend("triton", ("cuda",), _attend_triton, missing=missing_triton, refuses=refuses_triton),
)
"""Fastest first, as benchmarks/attention.csv has them."""

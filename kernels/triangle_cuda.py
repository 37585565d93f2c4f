"""Triangle attention by the kernels for CUDA, and which tensors each serves. They are imported when they are first used."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tmbench_kernels.cuda import capability, import_failure, refuses_dtype
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
    return _missing_triton()


@cache
def _missing_triton() -> str:
    try:
        import triton  # noqa: F401
    except Exception as error:
        return f"{import_failure(error)}: pip install triton>=3.6"
    return ""


@cache
def _refuses(device: torch.device, dtype: torch.dtype, widest: int, capabilities: tuple[int, ...], largest: int) -> str:
    if torch.version.hip is not None:
        return "takes an NVIDIA GPU"
    if capability(device) not in capabilities:
        wanted = " or ".join(map(str, capabilities))
        return f"takes a GPU of compute capability {wanted}, not {capability(device)}"
    if reason := refuses_dtype(dtype):
        return reason
    return "" if widest <= largest else f"takes head sizes up to {largest}, not {widest}"


def _refuses_triton(pattern: Triangle, q: Tensor, k: Tensor, v: Tensor) -> str:
    return _refuses(q.device, q.dtype, max(q.shape[-1], v.shape[-1]), (8, 9, 10, 11, 12), 256)


def _refuses_hopper(pattern: Triangle, q: Tensor, k: Tensor, v: Tensor) -> str:
    if v.shape[-1] % 8:
        return f"writes outputs of a head size that is a multiple of 8, not {v.shape[-1]}"
    return _refuses(q.device, q.dtype, max(q.shape[-1], v.shape[-1]), (9,), 128)


def _attend_triton(pattern: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from tmbench_kernels.triton_triangle import attend

    return attend(pattern, q, k, v, scale)


def _attend_hopper(pattern: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from tmbench_kernels.hopper_triangle import attend

    return attend(pattern, q, k, v, scale)


CUDA_BACKENDS = (
    Backend("cuda-hopper", ("cuda",), _attend_hopper, missing=_missing_hopper, refuses=_refuses_hopper),
    Backend("triton", ("cuda",), _attend_triton, missing=_missing_triton, refuses=_refuses_triton),
)
"""Fastest first, as benchmarks/attention.csv has them."""

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
def _missing(module: str) -> str:
    import importlib

    try:
        importlib.import_module(module)
    except Exception as error:
        # What is called Gluon is part of Triton, and still changes from one version to the next.
        return f"{import_failure(error)}: pip install triton>=3.6"
    return ""


def _missing_triton() -> str:
    return _missing("triton")


def _missing_gluon() -> str:
    return _missing("triton.experimental.gluon.language.nvidia.hopper")


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


def _refuses_gluon(pattern: Triangle, q: Tensor, k: Tensor, v: Tensor) -> str:
    return _refuses(q.device, q.dtype, max(q.shape[-1], v.shape[-1]), (9,), 128)


def _attend_triton(pattern: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from tmbench_kernels.triton_triangle import attend

    return attend(pattern, q, k, v, scale)


def _attend_gluon(pattern: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from tmbench_kernels.gluon_triangle import attend

    return attend(pattern, q, k, v, scale)


CUDA_BACKENDS = (
    Backend("gluon-hopper", ("cuda",), _attend_gluon, missing=_missing_gluon, refuses=_refuses_gluon),
    Backend("triton", ("cuda",), _attend_triton, missing=_missing_triton, refuses=_refuses_triton),
)
"""Fastest first, as benchmarks/attention.csv has them."""

"""The backends of our own kernels for CUDA, and what all backends there say of a GPU and of libraries, in the same words."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tmbench_kernels.pattern import Backend

TRITON_SIZES = ((8, 256), (9, 512), (10, 512), (11, 256), (12, 256))
"""The major compute capabilities that the kernels in Triton take, and the largest head size on each.

A tile of 64 queries of size 512, and two of 32 keys and values, take 196 KiB of shared memory.
"""
TRITON_CAPABILITIES = tuple(major for major, _ in TRITON_SIZES)
HOPPER_SIZES = ((9, 256),)
"""The same of the kernels in CUDA C++."""


@cache
def capability(device: torch.device) -> int:
    """The major compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)[0]


def refuses_dtype(dtype: torch.dtype) -> str:
    """ "" for the 16-bit types, otherwise why kernels on tensor cores refuse it."""
    if dtype in (torch.float16, torch.bfloat16):
        return ""
    return f"takes float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"


def import_failure(error: Exception) -> str:
    """Why a library that is there cannot be used, on one line."""
    return f"cannot be imported ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"


@cache
def missing_triton() -> str:
    """ "" where Triton can be imported, otherwise why not and how to install it."""
    try:
        import triton  # noqa: F401
    except Exception as error:
        return f"{import_failure(error)}: pip install triton>=3.6"
    return ""


@cache
def refuses_device(device: torch.device, capabilities: tuple[int, ...]) -> str:
    """ "" where a CUDA device has one of these compute capabilities, otherwise why a kernel for them refuses it."""
    if torch.version.hip is not None:
        return "takes an NVIDIA GPU"
    if capability(device) not in capabilities:
        wanted = " or ".join(map(str, capabilities))
        return f"takes a GPU of compute capability {wanted}, not {capability(device)}"
    return ""


@cache
def refuses_tensors(device: torch.device, dtype: torch.dtype, widest: int, sizes: tuple[tuple[int, int], ...]) -> str:
    """ "" where a kernel for these compute capabilities and head sizes serves such tensors, otherwise why it does not."""
    if reason := refuses_device(device, tuple(major for major, _ in sizes)) or refuses_dtype(dtype):
        return reason
    largest = dict(sizes)[capability(device)]
    return "" if widest <= largest else f"takes head sizes up to {largest}, not {widest}"


def refuses_triton(pattern: Any, q: Tensor, k: Tensor, v: Tensor) -> str:
    """What the kernels in Triton say of these tensors."""
    return refuses_tensors(q.device, q.dtype, max(q.shape[-1], v.shape[-1]), TRITON_SIZES)


def runs_triton(device: torch.device) -> bool:
    """Whether Triton is there and has this device, for a step that torch does elsewhere and that multiplies nothing."""
    return device.type == "cuda" and not missing_triton() and not refuses_device(device, TRITON_CAPABILITIES)


def triton_serves(x: Tensor) -> bool:
    """Whether kernels in Triton are there and take such a tensor, for a step that torch does elsewhere."""
    return runs_triton(x.device) and not refuses_triton(None, x, x, x)


@cache
def missing_hopper() -> str:
    """ "" where kernels in CUDA C++ can be compiled and launched, otherwise why not and what to install."""
    try:
        from tmbench_kernels.hopper import compiler_version

        compiler_version()
    except Exception as error:
        return f"{import_failure(error)}: pip install cuda-bindings nvidia-cuda-nvrtc"
    return missing_triton()


def refuses_hopper(pattern: Any, q: Tensor, k: Tensor, v: Tensor) -> str:
    """What the kernels for Hopper say of these tensors."""
    if v.shape[-1] % 8:
        return f"writes outputs of a head size that is a multiple of 8, not {v.shape[-1]}"
    return refuses_tensors(q.device, q.dtype, max(q.shape[-1], v.shape[-1]), HOPPER_SIZES)


def imported(module: str, name: str) -> Callable[..., Tensor]:
    """A function of a module of this package, which is imported when it is first called: it takes Triton or more."""

    def call(*given: Any, **asked: Any) -> Tensor:
        out: Tensor = getattr(import_module(f"tmbench_kernels.{module}"), name)(*given, **asked)
        return out

    return call


def for_hopper(attend: Callable[..., Tensor]) -> Backend:
    """A pattern's kernel in CUDA C++ for Hopper."""
    return Backend("cuda-hopper", ("cuda",), attend, missing=missing_hopper, refuses=refuses_hopper, lse=True, chunks=True)


def for_triton(attend: Callable[..., Tensor]) -> Backend:
    """A pattern's kernel in Triton."""
    return Backend(
        "triton", ("cuda",), attend, missing=missing_triton, refuses=refuses_triton, softcap=True, lse=True, chunks=True
    )

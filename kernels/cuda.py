"""What the backends for CUDA say of a GPU and of libraries, in the same words."""

from __future__ import annotations

from functools import cache

import torch


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

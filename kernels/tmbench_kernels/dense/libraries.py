"""Dense causal attention by the libraries that are fastest on CUDA: FlashAttention 4, 3 and 2, and cuDNN through torch.

None of them is required. Each says whether it is installed and which tensors it serves, as far as its own checks tell:
FlashAttention 4 in ``flash_attn/cute/interface.py``, FlashAttention 3 and 2 in their ``flash_api.cpp``, and cuDNN in torch's
``sdp_utils.cpp``, by which cuDNN takes grouped heads natively, as the others do.

With fewer queries than keys FlashAttention aligns the last query with the last key, as chunks of prompts are defined here
(its documentation says so of 3 and of 2 from 2.1 on, the mask's offset in ``flash_attn/cute/mask.py`` of 4). torch's
``is_causal`` aligns the first ones, so cuDNN takes whole prompts alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tmbench_kernels.cuda import capability, import_failure, refuses_dtype
from tmbench_kernels.pattern import Backend, Pattern
from tmbench_kernels.shared import DENSE_BACKENDS

Refuses = Callable[[int, int], str]
"""``(capability, head_dim)``: "" or why this GPU has no kernel of that head size; capability 9 is Hopper."""
LATENT = (192, 128)
"""Head sizes of queries and values under multi-head latent attention: of unequal ones those that some libraries take."""
FLASH_4 = ("flash_attn.cute", "pip install flash-attn-4")
"""FlashAttention 4's module, and how to install it."""
FLASH_4_LSE = "return_lse"
"""FlashAttention 4's argument that asks for the log-sum-exp."""


@cache
def function(module: str) -> tuple[Callable[..., Any] | None, str]:
    """``flash_attn_func`` of a module and "", or None and why it cannot be had."""
    try:
        # FlashAttention 2 and 4 share the package flash_attn, so only the module itself tells which of them is there.
        if importlib.util.find_spec(module) is None:
            return None, "is not installed"
        found = importlib.import_module(module).flash_attn_func
        # FlashAttention 4 warns of an argument of its own at every compilation.
        warnings.filterwarnings("ignore", message="Argument aux_data .* cannot be converted", module="cutlass")
        return found, ""
    except Exception as error:
        # A library that was built for another torch, CUDA or Python fails to load in ways of its own.
        if isinstance(error, ModuleNotFoundError) and error.name and module.startswith(error.name):
            return None, "is not installed"
        return None, import_failure(error)


@cache
def missing_module(module: str, install: str) -> str:
    """ "" where a module with ``flash_attn_func`` is installed, otherwise why it cannot be used and how to install it."""
    _, reason = function(module)
    return f"{reason} ({install})" if reason else ""


@cache
def cudnn_version() -> int:
    """The version of torch's cuDNN, such as 91501 for 9.15.1; 0 where torch has none."""
    cudnn: Any = torch.backends.cudnn
    return (cudnn.version() or 0) if cudnn.is_available() else 0


def _missing_cudnn() -> str:
    return "" if cudnn_version() >= 90000 else "is not installed (it comes with torch's builds for CUDA)"


@cache
def _refuses_type(
    limits: Refuses, latent: tuple[int, ...], device: torch.device, dtype: torch.dtype, dim: int, v_dim: int
) -> str:
    if reason := refuses_dtype(dtype):
        return reason
    if (dim, v_dim) == LATENT and capability(device) in latent:
        return ""
    if v_dim != dim:
        return f"takes values as wide as queries, not {v_dim} and {dim}"
    if dim % 8:
        return f"takes head sizes that are multiples of 8, not {dim}"
    return limits(capability(device), dim)


def refuses(limits: Refuses, pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, *, latent: tuple[int, ...] = ()) -> str:
    """What a library's kernel says of these tensors: of their type and head size, within its own limits.

    ``latent`` holds the compute capabilities for which it has a kernel of latent attention's head sizes.
    """
    return _refuses_type(limits, latent, q.device, q.dtype, q.shape[-1], v.shape[-1])


def _flash_4_limits(major: int, dim: int) -> str:
    if major < 9:
        return f"takes a GPU of compute capability 9 or newer, not {major}"
    # Hopper serves every size up to 256, the newer ones every size up to 128 and, data-centre Blackwell only, 256 itself.
    served = dim <= (256 if major == 9 else 128) or (major in (10, 11) and dim == 256)
    return "" if served else f"has no kernel of head size {dim} for compute capability {major}"


def _flash_3_limits(major: int, dim: int) -> str:
    if major != 9:
        return f"takes a GPU of compute capability 9, not {major}"
    return "" if dim <= 256 else f"takes head sizes up to 256, not {dim}"


def _flash_2_limits(major: int, dim: int) -> str:
    if major < 8:
        return f"takes a GPU of compute capability 8 or newer, not {major}"
    return "" if dim <= 256 else f"takes head sizes up to 256, not {dim}"


def _cudnn_limits(major: int, dim: int) -> str:
    if major < 8:
        return f"takes a GPU of compute capability 8 or newer, not {major}"
    return "" if dim <= 128 else f"takes head sizes up to 128, not {dim}"


def _refuses_cudnn(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> str:
    if reason := refuses(_cudnn_limits, pattern, q, k, v):
        return reason
    if q.shape[2] == 1:
        return "takes prompts of 2 tokens or more"
    if torch.are_deterministic_algorithms_enabled():
        return "is not deterministic, and torch.use_deterministic_algorithms is on"
    # torch itself trusts such lengths to cuDNN only from 9.15.1 on.
    if q.shape[2] % 128 and cudnn_version() <= 91500:
        return "takes lengths that are multiples of 128 in this version of cuDNN"
    return ""


def _length_first(x: Tensor) -> Tensor:
    """``[batch, heads, length, dim]`` as ``[batch, length, heads, dim]``, mostly without a copy."""
    x = x.transpose(1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


def call_flash(
    flash: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    lse: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """A ``flash_attn_func`` over tensors as they are everywhere else here: ``[batch, heads, length, dim]``, in and out.

    ``lse`` is filled from what it returns beside the output, where ``options`` say that it does.
    """
    # Some versions return the log-sum-exp even where it is not asked for.
    out = flash(*(_length_first(x) for x in (q, k, v)), softmax_scale=scale, **options)
    tensor: Tensor = out[0] if isinstance(out, tuple) else out
    if lse is not None:
        lse.copy_(out[1])
    return tensor.transpose(1, 2)


def _attend_flash(
    module: str, returns_lse: str, pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, scale: float, **asked: Any
) -> Tensor:
    flash, reason = function(module)
    if flash is None:
        raise ValueError(f"{module} {reason}")
    if "lse" in asked:
        asked[returns_lse] = True
    return call_flash(flash, q, k, v, scale, causal=True, **asked)


def _attend_cudnn(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _flash(
    name: str, module: str, install: str, limits: Refuses, *, returns_lse: str, latent: tuple[int, ...] = ()
) -> Backend:
    """``returns_lse`` is the argument of that library by which the log-sum-exp comes second; ``latent`` is as above."""
    return Backend(
        name,
        ("cuda",),
        partial(_attend_flash, module, returns_lse),
        softcap=True,
        lse=True,
        chunks=True,
        missing=partial(missing_module, module, install),
        refuses=partial(refuses, limits, latent=latent),
    )


_FLASH_4, _FLASH_3, _CUDNN, _FLASH_2, *_ = DENSE_BACKENDS

CUDA_BACKENDS = (
    _flash(_FLASH_4, *FLASH_4, _flash_4_limits, returns_lse=FLASH_4_LSE, latent=(9, 10, 11)),
    _flash(
        _FLASH_3,
        "flash_attn_interface",
        "build the folder hopper of Dao-AILab/flash-attention",
        _flash_3_limits,
        returns_lse="return_attn_probs",
        latent=(9,),
    ),
    Backend(_CUDNN, ("cuda",), _attend_cudnn, missing=_missing_cudnn, refuses=_refuses_cudnn),
    _flash(
        _FLASH_2,
        "flash_attn.flash_attn_interface",
        "pip install flash-attn",
        _flash_2_limits,
        returns_lse="return_attn_probs",
    ),
)
"""Fastest first, as benchmarks/attention.csv has them: milliseconds on an H200 of one layer with 32 query and 8 key heads of
size 128, bfloat16. FlashAttention 3 was not measured; it is built for the same GPU as 4.

=====================================  ====  =======  =========
tokens                                  32K    64K      128K
=====================================  ====  =======  =========
flash-attn-4                           12.9   52.0     217
cudnn                                  12.9   58-60    244-252
FlashAttention 2, as torch carries it  26.6    102      440
=====================================  ====  =======  =========
"""

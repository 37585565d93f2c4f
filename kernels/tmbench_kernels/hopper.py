"""Kernels in CUDA C++ for Hopper: compiled when first needed, and launched with tensor maps.

NVRTC, which comes with PyTorch's CUDA builds, compiles them; no CUDA toolkit is needed. All calls go through NVIDIA's own
cuda-bindings.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import driver, nvrtc

ARCHITECTURE = "sm_90a"
HEADERS = (Path(__file__).with_name("hopper.cuh"),)
"""What the kernels' sources include."""
MAP_BYTES = 128
WARPGROUP_ROWS = 64
"""Query rows of a consumer warpgroup: what one wgmma multiplies."""
KEYS = 64
"""Keys of a tile."""
SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory that a program can have."""


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel on one device."""

    function: Any
    shared_bytes: int
    threads: int

    def launch(self, programs: int, device: torch.device, *parameters: bytes) -> None:
        """Run ``programs`` blocks on the current stream; every parameter is the bytes of one struct."""
        buffers = [ctypes.create_string_buffer(parameter, len(parameter)) for parameter in parameters]
        pointers = (ctypes.c_void_p * len(buffers))(*(ctypes.addressof(buffer) for buffer in buffers))
        stream = torch.cuda.current_stream(device).cuda_stream
        with torch.cuda.device(device):
            _checked(
                driver.cuLaunchKernel(
                    self.function,
                    programs,
                    1,
                    1,
                    self.threads,
                    1,
                    1,
                    self.shared_bytes,
                    stream,
                    ctypes.addressof(pointers),
                    0,
                )
            )


def compiler_version() -> tuple[int, int]:
    """The version of NVRTC; raises where it cannot be loaded."""
    error, major, minor = nvrtc.nvrtcVersion()
    _checked((error,))
    return major, minor


def compile_source(source: Path, settings: Mapping[str, int]) -> bytes:
    """The machine code for Hopper of a CUDA C++ file, with ``settings`` as its macros; needs no GPU.

    Raises RuntimeError with the compiler's messages.
    """
    return _compile(source, settings)[0]


def compile_log(source: Path, settings: Mapping[str, int]) -> str:
    """What the compiler and the assembler say of a file: registers, spills, and what they could not do well."""
    return _compile(source, settings, "--ptxas-options=-v")[1]


def _compile(source: Path, settings: Mapping[str, int], *extra: str) -> tuple[bytes, str]:
    headers = [header.read_bytes() for header in HEADERS]
    names = [header.name.encode() for header in HEADERS]
    program = _checked(nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), len(headers), headers, names))
    options = [f"--gpu-architecture={ARCHITECTURE}", "--std=c++17", "-default-device", *extra]
    options += [f"-D{name}={value}" for name, value in settings.items()]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
    _checked(nvrtc.nvrtcGetProgramLog(program, log))
    text = log.decode(errors="replace").strip("\0 \n")
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"{source.name} does not compile: {text}")
    code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return code, text


@cache
def load_kernel(
    device: torch.device, source: Path, name: str, shared_bytes: int, threads: int, settings: tuple[tuple[str, int], ...]
) -> Kernel:
    """The kernel ``name`` of a CUDA C++ file, compiled with these macros and loaded on the device."""
    code = compile_source(source, dict(settings))
    with torch.cuda.device(device):
        module = _checked(driver.cuModuleLoadData(code))
        function = _checked(driver.cuModuleGetFunction(module, name.encode()))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(function, limit, shared_bytes))
    return Kernel(function, shared_bytes, threads)


def tensor_map(
    pointer: int, dtype: torch.dtype, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> bytes:
    """How the tensor memory accelerator finds a box of a tensor of 16-bit numbers; rows of a box are 64 numbers, swizzled.

    Sizes, strides (in numbers) and box are given from the outermost dimension to the innermost, whose stride must be 1. What
    lies outside of the sizes is read as zero and never written.
    """
    kind = driver.CUtensorMapDataType
    result = driver.cuTensorMapEncodeTiled(
        kind.CU_TENSOR_MAP_DATA_TYPE_FLOAT16 if dtype == torch.float16 else kind.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        len(sizes),
        pointer,
        _reversed(sizes, driver.cuuint64_t),
        _reversed([stride * 2 for stride in strides[:-1]], driver.cuuint64_t),
        _reversed(box, driver.cuuint32_t),
        [driver.cuuint32_t(1)] * len(sizes),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    return ctypes.string_at(int(_checked(result).getPtr()), MAP_BYTES)


def header_macros(dim: int, v_dim: int, dtype: torch.dtype, **more: int) -> dict[str, int]:
    """The macros of hopper.cuh for these head sizes and this type, fp16 or bf16, and ``more`` beside them."""
    sizes = {"DIM": padded(dim), "V_DIM": padded(v_dim), "HALF": int(dtype == torch.float16)}
    return sizes | {"WARPGROUP_ROWS": WARPGROUP_ROWS, "KEYS": KEYS} | more


def consumers(dim: int, v_dim: int) -> int:
    """Consumer warpgroups of a program: three, or two where their registers or their queries leave no room for three."""
    return 3 if max(padded(dim), padded(v_dim)) <= 128 else 2


def padded(dim: int) -> int:
    """A head size as these kernels work with it, a multiple of 64; what is beyond the real one reads as zero."""
    return -(-dim // 64) * 64


def _reversed(numbers: Sequence[int], kind: Any) -> list[Any]:
    return [kind(number) for number in reversed(numbers)]


def _checked(result: tuple[Any, ...]) -> Any:
    """What a call of the bindings returned; raises RuntimeError with the name of its error."""
    error, *values = result
    if error.value:
        raise RuntimeError(f"CUDA: {error.name}")
    return values[0] if values else None

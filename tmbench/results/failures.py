"""Which failures of a run are measurements: out of memory is a row, and the rest goes on."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch

from tmbench.results.rows import FAILED, OUT_OF_MEMORY, Status

_MEMORY_PHRASES = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class Failure:
    """What a row says in place of figures."""

    status: Status
    error: str


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that memory ran out, as torch does in several ways."""
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(phrase in text for phrase in _MEMORY_PHRASES)


def describe(error: Exception) -> str:
    """The first line of an error, with its type; of NCCL's the last one too, which alone says what was wrong."""
    first, *more = str(error).splitlines() or [""]
    reason = f"; {more[-1]}" if more and first.startswith("NCCL error") else ""
    return f"{type(error).__name__}: {first}{reason}"


def release_memory() -> None:
    """Give back what a failed run left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

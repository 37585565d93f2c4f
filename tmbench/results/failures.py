"""Which failures of a run are measurements: out of memory is a row, and the rest goes on."""

from __future__ import annotations

import gc

import torch

from tmbench.errors import UserError
from tmbench.results.rows import FAILED, OUT_OF_MEMORY, Status

_MEMORY_PHRASES = ("out of memory", "can't allocate memory", "not enough memory")


def status_of(error: Exception) -> Status:
    """The row status of an exception raised while a model ran; re-raises what the user must mend."""
    if isinstance(error, UserError):
        raise error
    return OUT_OF_MEMORY if is_out_of_memory(error) else FAILED


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that memory ran out, as torch does in several ways."""
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(phrase in text for phrase in _MEMORY_PHRASES)


def describe(error: Exception) -> str:
    """The first line of an error, with its type."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def release_memory() -> None:
    """Give back what a failed run left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

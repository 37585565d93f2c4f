"""A device's memory at its peak."""

from __future__ import annotations

import torch

from tmbench.models import parallel


class PeakMemory:
    """Counts from when it is made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @property
    def bytes(self) -> int | None:
        """The most that torch has held since, the model included, of several ranks on any; None on a CPU."""
        held = most_held(self._device)
        return None if held is None else max(parallel.exchanged(held))


def most_held(device: torch.device) -> int | None:
    """The most bytes that torch has held since a peak was last counted from; None on a CPU."""
    return _held(device, "peak")


def held(device: torch.device) -> int | None:
    """The bytes that torch holds now; None on a CPU."""
    return _held(device, "current")


def _held(device: torch.device, when: str) -> int | None:
    if device.type != "cuda":
        return None
    # torch.cuda.memory_allocated has all numbers named and sorted first, which takes as long as many kernels, for each text.
    number: int = torch.cuda.memory_stats_as_nested_dict(device)["allocated_bytes"]["all"][when]
    return number

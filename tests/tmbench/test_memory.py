"""A device's memory, read from torch's statistics: the same numbers as torch's own functions for them yield."""

from __future__ import annotations

import pytest
import torch

from tmbench.engine.memory import PeakMemory, held, most_held

GPU = torch.cuda.is_available()


def test_a_cpu_counts_none():
    cpu = torch.device("cpu")
    assert (held(cpu), most_held(cpu), PeakMemory(cpu).bytes) == (None, None, None)


def test_the_numbers_are_those_of_torchs_own_functions(monkeypatch):
    kinds = ("current", "peak", "allocated", "freed")
    pools = ("all", "small_pool", "large_pool")
    names = ("active_bytes", "allocated_bytes", "allocation", "requested_bytes", "reserved_bytes")
    places = [(name, pool, kind) for name in names for pool in pools for kind in kinds]
    stats: dict = {name: {pool: {} for pool in pools} for name in names}
    for number, (name, pool, kind) in enumerate(places):
        stats[name][pool][kind] = number
    # torch.cuda has the function for us, and torch.cuda.memory for torch's own.
    for module in (torch.cuda, torch.cuda.memory):
        monkeypatch.setattr(module, "memory_stats_as_nested_dict", lambda device=None: stats)
    device = torch.device("cuda", 0)
    assert held(device) == torch.cuda.memory_allocated(device) == places.index(("allocated_bytes", "all", "current"))
    assert most_held(device) == torch.cuda.max_memory_allocated(device)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_on_a_gpu_they_are_torchs_too():
    device = torch.device("cuda", 0)
    torch.empty(1, device=device)  # torch has no statistics of a device that it has not begun to use
    peak = PeakMemory(device)
    tensor = torch.empty(2**20, device=device)
    assert held(device) == torch.cuda.memory_allocated(device) >= tensor.nbytes
    del tensor
    assert peak.bytes == most_held(device) == torch.cuda.max_memory_allocated(device)

"""What makes the sparse patterns worth having: time and memory. The report of real times is benchmarks/cpu_attention.py."""

import subprocess
import sys
import time

import pytest
import torch

from tmbench_kernels import Dense, Triangle


def processor_seconds(*calls, repeats=2):
    """Processor time of each call on one thread, the least of interleaved runs: other processes hardly disturb it."""
    best = [float("inf")] * len(calls)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(repeats):
        for n, call in enumerate(calls):
            start = time.thread_time()
            call()
            best[n] = min(best[n], time.thread_time() - start)
    torch.set_num_threads(threads)
    return best


@pytest.mark.slow
def test_triangle_is_several_times_faster_than_dense_and_linear():
    """8 heads of 64. On a calm machine the factors are about 7 and 2; the limits leave room for a shared cache."""
    x = torch.randn(1, 8, 16384, 64)
    y = torch.randn(1, 8, 32768, 64)
    dense, short, long = processor_seconds(
        lambda: Dense().attend(x, x, x), lambda: Triangle().attend(x, x, x), lambda: Triangle().attend(y, y, y)
    )
    assert dense / short > 4
    assert long / short < 2.6


MEASURE_PEAK = """
import resource, torch
from tmbench_kernels import Dense, Triangle, VerticalSlash
from tmbench_kernels.vertical_slash.torch_backend import attend_selected
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
q = torch.randn(1, 2, LENGTH, 16)
k = torch.randn(1, 1, LENGTH, 16)
PATTERN.attend(q[:, :, :3000], k[:, :, :3000], k[:, :, :3000])
before = peak()
ATTEND
print(peak() - before)
"""
SELECTED = """
sets = torch.rand(2, 1, 2, LENGTH) < 1e-3
sets[1, ..., 0] = True
attend_selected(q, k, k, sets[0], sets[1], 0.25)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss differs")
@pytest.mark.parametrize(
    ("length", "pattern", "attend", "limit_mib"),
    [
        (131072, "Triangle(8, 64, 16)", "PATTERN.attend(q, k, k)", 120),
        (32768, "Dense()", "PATTERN.attend(q, k, k)", 60),
        (32768, "VerticalSlash()", SELECTED, 500),
    ],
)
def test_memory_is_far_from_quadratic(length, pattern, attend, limit_mib):
    """One matrix of logits at these lengths takes 4 GiB (32768) or 64 GiB (131072) for each head."""
    script = MEASURE_PEAK.replace("ATTEND", attend).replace("PATTERN", pattern).replace("LENGTH", str(length))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < limit_mib

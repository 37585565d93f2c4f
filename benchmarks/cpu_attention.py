"""Times the patterns' CPU backends side by side and writes a CSV with the error beside every time.

    python benchmarks/cpu_attention.py OUTPUT.csv [--lengths 4096 8192] [--heads 8] [--kv-heads 8] [--repeats 5]

Patterns are interleaved and the least, median and greatest of the repeats are kept. The error is the RMS difference from
softmax in float64 on 32 sampled queries, over the RMS of the exact output. q, k and v are Gaussian, under which
vertical_slash selects nearly everything: its time here is its worst case.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from tmbench_kernels import Dense, Pattern, Triangle, VerticalSlash
from tmbench_kernels.reference import masked_attention
from tmbench_kernels.vertical_slash import Selection
from tmbench_kernels.vertical_slash.runs import BLOCK, visible_keys

PATTERNS: tuple[Pattern, ...] = (
    Dense(),
    Triangle(),
    VerticalSlash(),
    VerticalSlash(((30, 800),)),
    VerticalSlash(((3500, 100),)),
)

COLUMNS = [
    "pattern",
    "backend",
    "length",
    "heads",
    "kv_heads",
    "head_dim",
    "dtype",
    "threads",
    "torch",
    "density",
    "relative_error",
    "seconds_min",
    "seconds_median",
    "seconds_max",
    "speedup_over_dense",
]


def sampled_mask(pattern: Pattern, q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """Those rows of the pattern's mask, without the rest: bool, broadcasting to ``[1, heads, rows, length]``."""
    positions = torch.arange(q.shape[2])
    causal = positions <= rows[:, None]
    if isinstance(pattern, Triangle):
        return pattern.attends(rows[:, None], positions, q.shape[2])
    if isinstance(pattern, VerticalSlash):
        chosen: Selection = pattern.select(q, k)
        mask = torch.zeros(1, q.shape[1], len(rows), q.shape[2], dtype=torch.bool)
        for n, block in enumerate((rows // BLOCK).tolist()):
            seen = visible_keys(chosen.columns, chosen.distances, block, block + 1)[:, :, 0]
            mask[:, :, n, : seen.shape[2]] = seen
        return mask & causal
    return causal


def relative_error(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> float:
    """RMS error on 32 queries spread over the prompt, relative to the exact output."""
    rows = torch.linspace(0, q.shape[2] - 1, 32).long()
    exact = masked_attention(q[:, :, rows], k, v, sampled_mask(pattern, q, k, rows))
    error = pattern.attend(q, k, v)[:, :, rows] - exact
    return float(error.square().mean().sqrt() / exact.square().mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the attention patterns on the CPU.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for length in options.lengths:
            for row in measure(length, options):
                writer.writerow(row)
                print(*row, sep="\t", flush=True)
            file.flush()


def measure(length: int, options: argparse.Namespace) -> list[list[object]]:
    """One row per pattern at that length."""
    torch.manual_seed(0)
    shapes = [(1, heads, length, options.head_dim) for heads in (options.heads, options.kv_heads, options.kv_heads)]
    q, k, v = (torch.randn(shape).to(getattr(torch, options.dtype)) for shape in shapes)
    errors = [relative_error(pattern, q, k, v) for pattern in PATTERNS]
    seconds: list[list[float]] = [[] for _ in PATTERNS]
    for _ in range(options.repeats):
        for pattern, samples in zip(PATTERNS, seconds, strict=True):
            start = time.perf_counter()
            pattern.attend(q, k, v)
            samples.append(time.perf_counter() - start)
    dense_pairs = Dense().pairs(q, k)
    shape = [length, options.heads, options.kv_heads, options.head_dim, options.dtype]
    return [
        [str(pattern), pattern.backend(q, k, v).name, *shape, torch.get_num_threads(), torch.__version__]
        + [f"{pattern.pairs(q, k) / dense_pairs:.4f}", f"{error:.2e}"]
        + [f"{f(samples):.4f}" for f in (min, statistics.median, max)]
        + [f"{min(seconds[0]) / min(samples):.2f}"]
        for pattern, error, samples in zip(PATTERNS, errors, seconds, strict=True)
    ]


if __name__ == "__main__":
    main()

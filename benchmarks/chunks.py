"""Times attention over a prompt in chunks beside the same prompt in one piece, per computed pair; writes a CSV.

    python benchmarks/chunks.py OUTPUT.csv [--lengths 131072] [--chunk 8192] [--heads 32] [--kv-heads 8]

Every backend that takes chunks is timed on the tensors of benchmarks/structured_qkv.py, selection included: all chunks of a
prompt, one after the other, then the whole prompt, in turn. On a GPU those in plain PyTorch are left out: they take minutes.
A pattern may compute other pairs in chunks than in one piece, so "ns_per_mpair" tells what a kernel loses by the shorter
queries: nanoseconds for a million pairs. A triangle's last rows are those of each chunk, as where the prompt's length is not
known.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from structured_qkv import structured_qkv
from timing import written
from torch import Tensor

from tmbench_kernels import Dense, FlashPrefill, FlexPrefill, Pattern, Triangle, VerticalSlash, XAttention
from tmbench_kernels.pattern import Backend

PATTERNS: tuple[Pattern, ...] = (
    Dense(),
    Triangle(8, 512, 128),
    VerticalSlash(),
    FlexPrefill(),
    XAttention(),
    FlashPrefill(),
)
COLUMNS = (
    "time", "device", "torch", "pattern", "backend", "length", "chunk", "heads", "kv_heads", "head_dim", "pairs",
    "ms_median", "ms_min", "ms_max", "ns_per_mpair", "times_one_piece",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[131072])
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rows = (row for length in options.lengths for row in measure(length, options))
    for row in written(options.output, COLUMNS, rows):
        print(*row.values(), flush=True)


def measure(length: int, options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Two rows of each pattern and backend: the whole prompt, and its chunks."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = structured_qkv(length, options.heads, options.kv_heads, device=device, dtype=dtype)
    for pattern in PATTERNS:
        for backend in pattern.backends:
            if not backend.chunks or backend.obstacle(pattern, q, k, v) or (q.is_cuda and backend.name.startswith("torch")):
                continue
            sizes = (length, options.chunk)
            taken: dict[int, list[float]] = {size: [] for size in sizes}
            for round_ in range(options.rounds + 1):
                for size in sizes:
                    seconds = _timed(pattern, backend, q, k, v, size)
                    if round_ > 0:
                        taken[size].append(1000 * seconds)
            whole = 0.0
            for size, ms in taken.items():
                pairs = sum(pattern.pairs(*chunk[:2]) for chunk in _chunks(q, k, v, size))
                per_pair = 1e12 * statistics.median(ms) / pairs
                whole = whole or per_pair
                yield {
                    "time": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
                    "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
                    "torch": torch.__version__,
                    "pattern": pattern.name,
                    "backend": backend.name,
                    "length": length,
                    "chunk": size,
                    "heads": options.heads,
                    "kv_heads": options.kv_heads,
                    "head_dim": q.shape[3],
                    "pairs": pairs,
                    "ms_median": f"{statistics.median(ms):.3f}",
                    "ms_min": f"{min(ms):.3f}",
                    "ms_max": f"{max(ms):.3f}",
                    "ns_per_mpair": f"{per_pair:.2f}",
                    "times_one_piece": f"{per_pair / whole:.3f}",
                }


def _chunks(q: Tensor, k: Tensor, v: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for start in range(0, q.shape[2], size):
        end = min(start + size, q.shape[2])
        yield q[:, :, start:end], k[:, :, :end], v[:, :, :end]


def _timed(pattern: Pattern, backend: Backend, q: Tensor, k: Tensor, v: Tensor, size: int) -> float:
    """Seconds for a prompt in chunks of so many tokens."""
    if q.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for chunk in _chunks(q, k, v, size):
        backend.attend(pattern, *chunk, q.shape[-1] ** -0.5)
    if q.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

"""Times attention over a prompt in chunks beside the same prompt in one piece, per computed pair; writes a CSV.

    python benchmarks/chunks.py OUTPUT.csv [--lengths 131072] [--chunk 8192] [--heads 32] [--kv-heads 8]

Every backend that takes chunks is timed on the tensors of benchmarks/structured_qkv.py, selection included: all chunks of a
prompt, and the whole prompt, interleaved. On a GPU those in plain PyTorch are left out: they take minutes.
A pattern may compute other pairs in chunks than in one piece, so "ns_per_mpair" tells what a kernel loses by the shorter
queries: nanoseconds for a million pairs. Patterns with last rows of a prompt are timed twice: where its length is known, and
where it is not and the last rows are those of each chunk.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from structured_qkv import structured_qkv
from timing import mean_ms, written
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
Chunk = tuple[Pattern, Tensor, Tensor, Tensor]
"""A pattern as it is for a chunk, with its q, k and v."""
COLUMNS = (
    "time", "device", "torch", "pattern", "backend", "length", "chunk", "prompt_length", "heads", "kv_heads", "head_dim",
    "pairs", "ms_median", "ms_min", "ms_max", "ns_per_mpair", "times_one_piece",
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
    """Rows of each pattern and backend: the whole prompt, and its chunks."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = structured_qkv(length, options.heads, options.kv_heads, device=device, dtype=dtype)
    for pattern in PATTERNS:
        depends = pattern.of_chunk(min(options.chunk, length), length) != pattern
        ways = [(length, ""), *((options.chunk, known) for known in (("known", "unknown") if depends else ("",)))]
        parts = {way: list(_chunks(pattern, q, k, v, *way)) for way in ways}
        for backend in pattern.backends:
            if not backend.chunks or backend.obstacle(pattern, q, k, v) or (q.is_cuda and backend.name.startswith("torch")):
                continue
            taken: dict[tuple[int, str], list[float]] = {way: [] for way in ways}
            for round_ in range(options.rounds + 1):
                for way in ways:
                    ms = mean_ms(partial(_attend, backend, parts[way]), 1, device)
                    if round_ > 0:
                        taken[way].append(ms)
            whole = 0.0
            for (size, known), times in taken.items():
                pairs = sum(own.pairs(*tensors[:2]) for own, *tensors in parts[size, known])
                per_pair = 1e12 * statistics.median(times) / pairs
                whole = whole or per_pair
                yield {
                    "time": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
                    "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
                    "torch": torch.__version__,
                    "pattern": pattern.name,
                    "backend": backend.name,
                    "length": length,
                    "chunk": size,
                    "prompt_length": known,
                    "heads": options.heads,
                    "kv_heads": options.kv_heads,
                    "head_dim": q.shape[3],
                    "pairs": pairs,
                    "ms_median": f"{statistics.median(times):.3f}",
                    "ms_min": f"{min(times):.3f}",
                    "ms_max": f"{max(times):.3f}",
                    "ns_per_mpair": f"{per_pair:.2f}",
                    "times_one_piece": f"{per_pair / whole:.3f}",
                }


def _chunks(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, size: int, known: str) -> Iterator[Chunk]:
    length = q.shape[2]
    for start in range(0, length, size):
        end = min(start + size, length)
        own = pattern.of_chunk(end, length) if known == "known" else pattern
        yield own, q[:, :, start:end], k[:, :, :end], v[:, :, :end]


def _attend(backend: Backend, chunks: Iterable[Chunk]) -> None:
    """A prompt in these chunks."""
    for pattern, q, k, v in chunks:
        backend.attend(pattern, q, k, v, q.shape[-1] ** -0.5)


if __name__ == "__main__":
    main()

"""Times attention over a prompt in chunks beside the same prompt in one piece, per computed pair; writes a CSV.

    python benchmarks/chunks.py OUTPUT.csv [--lengths 131072] [--chunk 8192] [--heads 32] [--kv-heads 8]

Every backend that takes chunks is timed on the tensors of benchmarks/structured_qkv.py: all chunks of a prompt, and the
whole prompt, interleaved. On a GPU those in plain PyTorch are left out: they take minutes.
"ms" is the device's own time, selection included, with all launches queued before it begins, and "select_ms" that of the
selection alone. "host_ms" is how long the host takes to launch all, and "wall_ms" how long all takes from the first launch
on, as it is served. A time is empty where a run waits for the device, so that the two cannot be told apart.
A pattern may compute other pairs in chunks than in one piece, so "ns_per_mpair" tells what a kernel loses by the shorter
queries: nanoseconds for a million pairs, without the selection. Patterns with last rows of a prompt are timed twice: where
its length is known, and where it is not and the last rows are those of each chunk.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from structured_qkv import structured_qkv
from timing import measured_on, queued_ms, wall_and_host_ms, written
from torch import Tensor

from tmbench_kernels import Dense, FlashPrefill, FlexPrefill, Pattern, Triangle, VerticalSlash, XAttention
from tmbench_kernels.block_sparse import BlockSparse
from tmbench_kernels.pattern import Backend
from tmbench_kernels.vertical_slash import INDEX_BACKENDS

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
    "pairs", "ms_median", "ms_min", "ms_max", "select_ms", "host_ms", "wall_ms", "ns_per_mpair", "times_one_piece",
)  # fmt: skip


@dataclass
class Times:
    """Milliseconds of a prompt that is read one way, of each round; None where the device's own cannot be told."""

    attend: list[Callable[[], object]]
    """Of each chunk, selection included."""
    select: list[Callable[[], object]]
    """The selection alone; empty for a pattern that selects nothing."""
    device: list[float | None] = field(default_factory=list)
    selection: list[float | None] = field(default_factory=list)
    host: list[float | None] = field(default_factory=list)
    wall: list[float | None] = field(default_factory=list)

    def take(self, device: str) -> None:
        """One more round."""
        wall, host = wall_and_host_ms(self.run, device)
        self.wall.append(wall)
        self.host.append(host)
        self.device.append(queued_ms(self.attend, host, device))
        if self.select:
            self.selection.append(queued_ms(self.select, host, device))

    def run(self) -> None:
        """The whole prompt."""
        for chunk in self.attend:
            chunk()

    @property
    def alone(self) -> float | None:
        """Attention without the selection."""
        device, selection = median(self.device), median(self.selection) if self.select else 0.0
        return None if device is None or selection is None else device - selection


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
            taken = {way: Times(*_runs(backend, parts[way])) for way in ways}
            for times in taken.values():
                times.run()
            for _ in range(options.rounds):
                for times in taken.values():
                    times.take(device)
            whole: float | None = None
            for (size, known), times in taken.items():
                pairs = sum(own.pairs(*tensors[:2]) for own, *tensors in parts[size, known])
                per_pair = None if times.alone is None else 1e12 * times.alone / pairs
                whole = per_pair if size == length else whole
                yield {
                    **measured_on(device),
                    "pattern": pattern.name,
                    "backend": backend.name,
                    "length": length,
                    "chunk": size,
                    "prompt_length": known,
                    "heads": options.heads,
                    "kv_heads": options.kv_heads,
                    "head_dim": q.shape[3],
                    "pairs": pairs,
                    "ms_median": _text(median(times.device)),
                    "ms_min": _text(_known(min, times.device)),
                    "ms_max": _text(_known(max, times.device)),
                    "select_ms": _text(median(times.selection)),
                    "host_ms": _text(median(times.host)),
                    "wall_ms": _text(median(times.wall)),
                    "ns_per_mpair": "" if per_pair is None else f"{per_pair:.2f}",
                    "times_one_piece": _text(per_pair / whole if per_pair is not None and whole else None),
                }


def median(times: Sequence[float | None]) -> float | None:
    """None where there is none, or where a round has none."""
    return _known(statistics.median, times)


def _known(make: Callable[[list[float]], float], times: Sequence[float | None]) -> float | None:
    known = [one for one in times if one is not None]
    return make(known) if known and len(known) == len(times) else None


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _chunks(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, size: int, known: str) -> Iterator[Chunk]:
    length = q.shape[2]
    for start in range(0, length, size):
        end = min(start + size, length)
        own = pattern.of_chunk(end, length) if known == "known" else pattern
        yield own, q[:, :, start:end], k[:, :, :end], v[:, :, :end]


def _runs(backend: Backend, chunks: Sequence[Chunk]) -> tuple[list[Callable[[], object]], list[Callable[[], object]]]:
    """Of each chunk, its attention and its selection, which is made as the backend makes it."""
    attend: list[Callable[[], object]] = []
    select: list[Callable[[], object]] = []
    for pattern, q, k, v in chunks:
        scale = q.shape[-1] ** -0.5
        attend.append(partial(backend.attend, pattern, q, k, v, scale))
        if isinstance(pattern, VerticalSlash) and backend in INDEX_BACKENDS:
            select.append(partial(pattern.index, q, k, scale))
        elif isinstance(pattern, VerticalSlash | BlockSparse):
            select.append(partial(pattern.select, q, k, scale=scale))
    return attend, select


if __name__ == "__main__":
    main()

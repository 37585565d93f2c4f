"""Times dense attention of few queries behind many keys on a GPU, by every backend that serves them, and writes a CSV.

    python benchmarks/few_queries.py OUTPUT.csv [--lengths 8192 32768 131072] [--queries 1 16 64 256 512 1024 2048]

Backends are interleaved, in rounds. "ms_median" is the device's own time for a launch. "read_gb_s" is how fast keys and
values are read by that, each once: a device's memory bounds it. "error" is the RMS difference from softmax in float32
over the RMS of the exact output, on the last 64 queries.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from structured_qkv import structured_qkv
from timing import measured_on, turn_ms, written

from tmbench_kernels import Dense
from tmbench_kernels.reference import masked_attention

COLUMNS = (
    "time", "device", "torch", "backend", "queries", "length", "heads", "kv_heads", "head_dim", "dtype", "launches",
    "ms_median", "ms_min", "ms_max", "read_gb_s", "error",
)  # fmt: skip
TURN_MS = 20.0


def main() -> None:
    options = _options()
    for row in written(options.output, COLUMNS, measure(options)):
        place = f"{row['queries']:>6} of {row['length']:>7}"
        print(f"{place} {row['backend']:<14}{row['ms_median']:>9} ms {row['read_gb_s']:>6} GB/s")


def measure(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """A row of every backend that serves so many queries behind so many keys."""
    device, dtype, dense = options.device, getattr(torch, options.dtype), Dense()
    for length in options.lengths:
        whole, k, v = structured_qkv(length, options.heads, options.kv_heads, device=device, dtype=dtype)
        read = 2 * k.numel() * k.element_size()
        for queries in options.queries:
            q = whole[:, :, -queries:]
            scale = q.shape[-1] ** -0.5
            serving = [backend for backend in dense.backends if not backend.obstacle(dense, q, k, v)]
            serving = [backend for backend in serving if backend.name not in options.skip]
            runs = {backend.name: partial(backend.attend, dense, q, k, v, scale) for backend in serving}
            last = q[:, :, -64:]
            exact = masked_attention(last, k, v, dense.mask(last, k), scale=scale, dtype=torch.float32)
            errors = {name: _error(run(), exact) for name, run in runs.items()}
            ms: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(options.rounds):
                for name, run in runs.items():
                    found = turn_ms(run, TURN_MS, device)
                    if found is None:
                        raise RuntimeError(f"{name} waits for the device, whose time cannot be told from the host's")
                    ms[name] += found
            for name, times in ms.items():
                median = statistics.median(times)
                yield {
                    **measured_on(device),
                    "backend": name,
                    "queries": queries,
                    "length": length,
                    "heads": q.shape[1],
                    "kv_heads": k.shape[1],
                    "head_dim": q.shape[3],
                    "dtype": options.dtype,
                    "launches": len(times),
                    "ms_median": f"{median:.4f}",
                    "ms_min": f"{min(times):.4f}",
                    "ms_max": f"{max(times):.4f}",
                    "read_gb_s": f"{read / median / 1e6:.0f}",
                    "error": f"{errors[name]:.2e}",
                }


def _error(out: object, exact: torch.Tensor) -> float:
    assert isinstance(out, torch.Tensor)
    return float((out[:, :, -exact.shape[2] :].float() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 16, 64, 256, 512, 1024, 2048])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip", nargs="+", default=["torch"], help="Backends that are not timed.")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


if __name__ == "__main__":
    main()

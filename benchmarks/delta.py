"""Times triangle attention with its delta correction, and the correction's parts; writes a CSV.

    python benchmarks/delta.py OUTPUT.csv [--lengths 32768 65536 131072] [--heads 32] [--kv-heads 8] [--head-dim 128]

On random q, k and v, all interleaved, in an order that turns: the chip slows as it warms, and then for all. "what" is

- dense: the fastest dense attention that is installed, and triangle: the triangle alone;
- carry and recompute: the triangle with its correction, as it runs, and with every other backend of the dense rows;
- rows: the dense rows alone, by every backend that serves;
- differences: taking dense rows' differences from the triangle and carrying them, in Triton and in torch.

Under a correction "backend" computes the dense rows, and "carried_by" carries their differences. "ms" is the mean of a
round's launches: its median, least and greatest are those of the rounds. "added" is the share of dense attention's pairs
that a correction has beyond the triangle. "error" is the RMS difference from softmax in float32 over the RMS of that, on
some of the dense rows. Dense rows in plain torch are left out on a GPU: they take long. Without a GPU it runs on the CPU,
for short lengths.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from timing import mean_ms, measured_on, written
from torch import Tensor

from tmbench_kernels import Backend, Dense, Triangle
from tmbench_kernels.cuda import triton_serves
from tmbench_kernels.reference import masked_attention
from tmbench_kernels.triangle import delta as correction
from tmbench_kernels.triangle.delta import Rows

Carry = Callable[[Tensor, Tensor, Rows], None]
COLUMNS = (
    "time", "device", "torch", "triton", "what", "backend", "carried_by", "length", "delta", "n_init", "n_local", "last_n",
    "heads", "kv_heads", "head_dim", "dtype", "rows", "pairs", "added", "rounds", "launches", "ms_median", "ms_min",
    "ms_max", "tflops", "times_triangle", "error",
)  # fmt: skip
SAMPLED = 16
"""Dense rows whose error is taken."""
ROUND_TOKENS = 131072
"""A round takes as many launches of dense attention as make this many tokens, and MORE times as many of all else."""
MORE = 4


@dataclass
class Entry:
    """One thing that is timed."""

    what: str
    backend: str
    run: Callable[[], Tensor | None]
    pairs: int | None = None
    carried_by: str = ""
    place: Callable[[Tensor], Tensor] | None = None
    """Where its output has the dense rows."""
    ms: list[float] = field(default_factory=list)
    error: float | None = None


def main() -> None:
    options = _options()
    rows = (row for length in options.lengths for row in measure(length, options))
    for row in written(options.output, COLUMNS, rows):
        print(*(row[column] for column in ("length", "what", "backend", "carried_by", *COLUMNS[-6:])), flush=True)


def measure(length: int, options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Rows of one length."""
    q, k, v = random_qkv(length, options)
    plain = Triangle(options.n_init, options.n_local, options.last_n)
    corrected = {mode: Triangle(options.n_init, options.n_local, options.last_n, options.delta, mode) for mode in MODES}
    tail = length - corrected[correction.CARRY].base(length).last_n
    rows = corrected[correction.CARRY].rows(0, tail)
    if not rows.count:
        raise SystemExit(f"--lengths {length}: there is no dense row before the last {length - tail}, so take more tokens")
    entries = list(entries_of(plain, corrected, rows, tail, q, k, v))
    sampled = torch.linspace(0, rows.count - 1, min(SAMPLED, rows.count), device=q.device).long()
    at = torch.tensor(rows.positions(), device=q.device)[sampled]
    exact = masked_attention(q[:, :, at], k, v, torch.arange(length, device=q.device) <= at[:, None], dtype=torch.float32)
    for entry in entries:
        out = entry.run()
        if entry.place is not None and out is not None:
            entry.error = float(
                (entry.place(out)[:, :, sampled] - exact).square().mean().sqrt() / exact.square().mean().sqrt()
            )
    dense_launches = max(1, ROUND_TOKENS // length)
    for round_ in range(options.rounds):
        turn = round_ % len(entries)
        for entry in entries[turn:] + entries[:turn]:
            launches = dense_launches * (1 if entry.what == Dense.name else MORE)
            entry.ms.append(mean_ms(entry.run, launches, options.device))
    triangle = next(statistics.median(entry.ms) for entry in entries if entry.what == plain.name)
    dense_pairs, plain_pairs = Dense().pairs(q, k), plain.pairs(q, k)
    for entry in entries:
        median = statistics.median(entry.ms)
        yield {
            **measured_on(q.device.type),
            "triton": triton.__version__,
            "what": entry.what,
            "backend": entry.backend,
            "carried_by": entry.carried_by,
            "length": length,
            "delta": options.delta,
            "n_init": plain.n_init,
            "n_local": plain.n_local,
            "last_n": plain.last_n,
            "heads": q.shape[1],
            "kv_heads": k.shape[1],
            "head_dim": q.shape[3],
            "dtype": str(q.dtype).removeprefix("torch."),
            "rows": rows.count,
            "pairs": "" if entry.pairs is None else entry.pairs,
            "added": f"{(entry.pairs - plain_pairs) / dense_pairs:.5f}" if entry.pairs and entry.what in MODES else "",
            "rounds": len(entry.ms),
            "launches": dense_launches * (1 if entry.what == Dense.name else MORE),
            "ms_median": f"{median:.4f}",
            "ms_min": f"{min(entry.ms):.4f}",
            "ms_max": f"{max(entry.ms):.4f}",
            "tflops": f"{4 * q.shape[3] * entry.pairs / median / 1e9:.0f}" if entry.pairs else "",
            "times_triangle": f"{median / triangle:.3f}",
            "error": "" if entry.error is None else f"{entry.error:.2e}",
        }


MODES = (correction.CARRY, correction.RECOMPUTE)


def entries_of(
    plain: Triangle, corrected: dict[str, Triangle], rows: Rows, tail: int, q: Tensor, k: Tensor, v: Tensor
) -> Iterator[Entry]:
    """All that is timed, as the head of this file says."""
    scale = q.shape[-1] ** -0.5
    by = [one for one in correction.ROWS_BACKENDS if not one.obstacle(None, q, k, v)]
    by = [one for one in by if not (q.is_cuda and one.name == "torch")]
    # Differences are carried in Triton wherever it serves, and were carried in torch before.
    carries: dict[str, Carry] = {"triton": correction.carry} if triton_serves(q) else {}
    carries["torch"] = correction.carry_in_torch
    now, before = next(iter(carries)), next(reversed(carries))

    def dense_rows(out: Tensor) -> Tensor:
        return rows.take(out)

    dense = Dense().backend(q, k, v)
    yield Entry(
        Dense.name, dense.name, partial(dense.attend, Dense(), q, k, v, scale), Dense().pairs(q, k), place=dense_rows
    )
    triangle = plain.backend(q, k, v)
    yield Entry(plain.name, triangle.name, partial(triangle.attend, plain, q, k, v, scale), plain.pairs(q, k))
    for mode, pattern in corrected.items():
        for one in by:
            name = now if one is by[0] else before
            run = partial(attend_by, one, carries[name], pattern, q, k, v)
            carried = name if mode == correction.CARRY else ""
            yield Entry(mode, one.name, run, pattern.pairs(q, k), carried, dense_rows)
    row_pairs = q.shape[1] * sum(position + 1 for position in rows.positions())
    for one in by:
        run = partial(one.attend, rows, q, k, v, scale)
        yield Entry("rows", one.name, run, row_pairs, place=lambda out: out)
    out, dense_out = triangle.attend(plain, q, k, v, scale), by[0].attend(rows, q, k, v, scale)
    for name, carry in carries.items():
        yield Entry("differences", "", partial(add_differences, carry, out[:, :, :tail], dense_out, rows), None, name)


def attend_by(rows_by: Backend, carry: Carry, pattern: Triangle, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A pattern's attention with the dense rows by this backend, their differences carried by this function."""
    with ExitStack() as changed:
        changed.enter_context(patch.object(correction, "rows_backend", lambda *_, **__: rows_by))
        changed.enter_context(patch.object(correction, "carry", carry))
        return pattern.attend(q, k, v)


def add_differences(carry: Carry, out: Tensor, dense: Tensor, rows: Rows) -> None:
    """What follows the dense rows: out becomes corrected."""
    carry(out, dense.float().sub_(rows.take(out)), rows)


def random_qkv(length: int, options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian, as a projection yields them: views of ``[1, length, heads, head_dim]``."""
    generator = torch.Generator(options.device).manual_seed(length)
    dtype = getattr(torch, options.dtype)

    def normal(heads: int) -> Tensor:
        shape = (1, length, heads, options.head_dim)
        return torch.randn(shape, device=options.device, generator=generator).to(dtype).transpose(1, 2)

    return normal(options.heads), normal(options.kv_heads), normal(options.kv_heads)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 65536, 131072])
    parser.add_argument("--delta", type=int, default=64)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], default=None, help="bfloat16 on a GPU, otherwise float32"
    )
    parser.add_argument("--n-init", type=int, default=8)
    parser.add_argument("--n-local", type=int, default=512)
    parser.add_argument("--last-n", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    return options


if __name__ == "__main__":
    main()

"""Times skip-softmax and dense attention at given shares of skipped tiles; writes a CSV.

    python benchmarks/skip_softmax.py OUTPUT.csv [--lengths 32768 131072] [--shares 0 0.5 0.7 0.9 1] [--heads 32]
        [--kv-heads 8]

Tiles of keys lie at two levels, and all queries find those of the low one too light. Of every ten tiles as many are low as
a share says, drawn at random for each key head; at 1 all but the first one are. "skipped" is what comes of it, counted for
one query head of every key head, in four blocks of queries each at a quarter, at half and at the end of the prompt. Every
backend that serves is timed, and the fastest dense attention on the same keys, all interleaved: the chip slows as it
warms, and then for all. "ms" is the mean of a round's launches: its median, least and greatest are those of the rounds.
"difference" is the RMS difference from the Triton backend's output over the RMS of that, for dense attention only where
nothing is skipped. Without a GPU it runs on the CPU, for short lengths and with --skip alone.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
import triton
from timing import mean_ms, written
from torch import Tensor

from tmbench_kernels import Dense, SkipSoftmax
from tmbench_kernels.block_sparse.lists import BLOCK

Implementation = tuple[str, str]
"""The names of a pattern and of its backend."""
Runs = dict[Implementation, Callable[[Tensor], Tensor]]
"""What is timed, given keys."""
COLUMNS = (
    "date", "device", "torch", "triton", "pattern", "backend", "threshold", "order", "length", "skipped", "heads",
    "kv_heads", "head_dim", "dtype", "rounds", "launches", "ms_median", "ms_min", "ms_max", "times_dense", "difference",
)  # fmt: skip
LEVEL = 8.0
"""Every query's first number, by which a key's first number becomes its level."""
DROP = 20.0
"""How far, in logits, low tiles lie below the others: further than logits spread and the threshold reaches together."""
ROUND_TOKENS = 131072
"""A round takes as many launches as make this many tokens."""


def main() -> None:
    options = _options()
    rows = (row for length in options.lengths for row in measure(length, options))
    for row in written(options.output, COLUMNS, rows):
        print(*(row[column] for column in COLUMNS[5:]), flush=True)


def measure(length: int, options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Rows of one length: at each share every backend, and dense attention."""
    pattern = SkipSoftmax(threshold=options.threshold, order=options.order)
    q, k, v = leveled_qkv(length, options)
    scale, launches = q.shape[-1] ** -0.5, max(1, ROUND_TOKENS // length)
    keys = [with_low_tiles(k, share) for share in options.shares]
    skipped = [skipped_share(pattern, q, k, scale) for k in keys]
    dense = Dense().backend(q, k, v)
    serving = [one for one in pattern.backends if one.name not in options.skip and not one.obstacle(pattern, q, k, v)]
    runs: Runs = {(pattern.name, one.name): partial(_attend, one.attend, pattern, q, v, scale) for one in serving}
    runs[Dense.name, dense.name] = partial(_attend, dense.attend, Dense(), q, v, scale)
    differences = [_differences(runs, *at) for at in zip(keys, skipped, strict=True)]
    turns = [(number, about) for number in range(len(keys)) for about in runs]
    taken: dict[tuple[int, Implementation], list[float]] = {turn: [] for turn in turns}
    for round_ in range(options.rounds):
        for number, about in turns[round_ % len(turns) :] + turns[: round_ % len(turns)]:
            taken[number, about].append(mean_ms(partial(runs[about], keys[number]), launches, options.device))
    for number, about in turns:
        ms = taken[number, about]
        base = statistics.median(taken[number, (Dense.name, dense.name)])
        skips = about[0] == pattern.name
        yield {
            "date": datetime.now(UTC).date().isoformat(),
            "device": torch.cuda.get_device_name() if q.is_cuda else "cpu",
            "torch": torch.__version__,
            "triton": triton.__version__,
            "pattern": about[0],
            "backend": about[1],
            "threshold": options.threshold if skips else "",
            "order": options.order if skips else "",
            "length": length,
            "skipped": f"{skipped[number]:.4f}",
            "heads": q.shape[1],
            "kv_heads": k.shape[1],
            "head_dim": q.shape[3],
            "dtype": str(q.dtype).removeprefix("torch."),
            "rounds": len(ms),
            "launches": launches,
            "ms_median": f"{statistics.median(ms):.4f}",
            "ms_min": f"{min(ms):.4f}",
            "ms_max": f"{max(ms):.4f}",
            "times_dense": f"{base / statistics.median(ms):.3f}",
            "difference": f"{differences[number][about]:.2e}" if about in differences[number] else "",
        }


def leveled_qkv(length: int, options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Random q ``[1, heads, length, head_dim]`` and k, v ``[1, kv_heads, length, head_dim]``; all keys at the high level."""
    generator = torch.Generator(options.device).manual_seed(0)

    def normal(heads: int) -> Tensor:
        shape = (1, heads, length, options.head_dim)
        return torch.randn(shape, device=options.device, generator=generator).to(getattr(torch, options.dtype))

    q, k, v = normal(options.heads), normal(options.kv_heads), normal(options.kv_heads)
    q[..., 0], k[..., 0] = LEVEL, 0.0
    return q, k, v


def with_low_tiles(k: Tensor, share: float) -> Tensor:
    """The keys with this share of their tiles at the low level, the first tile never."""
    generator, k = torch.Generator().manual_seed(1), k.clone()
    tiles = -(-k.shape[2] // BLOCK)
    for head in range(k.shape[1]):
        tens = [torch.randperm(10, generator=generator) < round(10 * share) for _ in range(-(-tiles // 10))]
        low = torch.cat(tens)[:tiles]
        low[0] = False
        rows = low.repeat_interleave(BLOCK)[: k.shape[2]].to(k.device)
        k[:, head, :, 0] = rows.to(k.dtype) * (-DROP * k.shape[3] ** 0.5 / LEVEL)
    return k


def skipped_share(pattern: SkipSoftmax, q: Tensor, k: Tensor, scale: float) -> float:
    """The share of tiles that the pattern skips, counted as the head of this file says."""
    length, groups = q.shape[2], q.shape[1] // k.shape[1]
    kept = every = 0
    for end in (length // 4, length // 2, length):
        margins = pattern.margins(q[:, ::groups, max(end - 4 * BLOCK, 0) : end], k[:, :, :end], scale)
        kept += int((margins >= pattern.least(length)).sum())
        every += int((margins > -torch.inf).sum())
    return 1 - kept / every


def _attend(attend: Callable[..., Tensor], pattern: object, q: Tensor, v: Tensor, scale: float, k: Tensor) -> Tensor:
    return attend(pattern, q, k, v, scale)


def _differences(runs: Runs, k: Tensor, skipped: float) -> dict[Implementation, float]:
    """How far each one that computes the same as Triton's is from its output."""
    outputs = {about: run(k) for about, run in runs.items() if about[0] == SkipSoftmax.name or not skipped}
    expected = outputs.pop((SkipSoftmax.name, "triton"), None)
    return {} if expected is None else {about: _difference(out, expected) for about, out in outputs.items()}


def _difference(out: Tensor, expected: Tensor) -> float:
    squares = every = 0.0
    for head in range(out.shape[1]):
        one, other = out[:, head].double(), expected[:, head].double()
        squares += float((one - other).square().sum())
        every += float(other.square().sum())
    return float((squares / every) ** 0.5)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.5, 0.7, 0.9, 1.0], help="in tenths")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--threshold", type=float, default=0.01)
    parser.add_argument("--order", default="ascending", choices=["ascending", "descending"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--skip", nargs="*", default=["torch-blocks"], help="backends to leave out")
    options = parser.parse_args()
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


if __name__ == "__main__":
    main()

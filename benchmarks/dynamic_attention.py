"""Times the patterns that choose keys by the data, selection and attention apart, on structured tensors; writes a CSV.

    python benchmarks/dynamic_attention.py OUTPUT.csv [--lengths 32768 65536 131072] [--heads 32] [--kv-heads 8]

Every backend that serves the tensors is timed, and the fastest dense attention beside them, all interleaved: the chip slows
as it warms, and then for all. "ms" is selection and attention together, "select_ms" the selection alone, and "attend_ms"
attention over what was selected before. The throughput is that of attention alone, over the selected pairs. Of PBS-Attn the
selection is the order of the keys and the choice of blocks, with a copy of the keys that its attention has to make too. The
error is the RMS difference from softmax in float32 over the same pairs, on sampled queries, over the RMS of the exact
output. Without a GPU it runs on the CPU, for short lengths.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from structured_qkv import structured_qkv
from timing import mean_ms, written
from torch import Tensor

from tmbench_kernels import PBS, BlockLists, Dense, FlashPrefill, FlexPrefill, Pattern, VerticalSlash, XAttention
from tmbench_kernels.block_sparse import BlockSparse
from tmbench_kernels.block_sparse.lists import block_count
from tmbench_kernels.pbs import sorted_tokens
from tmbench_kernels.reference import masked_attention
from tmbench_kernels.scores import reaching
from tmbench_kernels.vertical_slash import Selection
from tmbench_kernels.vertical_slash.runs import BLOCK, visible_keys

PUBLISHED = ((30, 800), (100, 800), (500, 700), (1000, 6096), (3500, 100))
"""Budgets of MInference's search on Llama-3.1-8B, dealt out to the heads in turn."""
SHARES = ((0.05,), (0.1,), (0.2,), (0.5,), (1.0,), (0.02, 0.05, 0.2, 1.0))
"""Shares of the causal blocks, drawn at random, for the kernels' throughput alone; the last one has heads that differ."""
SELECT, ALONE = "select", "alone"
COLUMNS = [
    "device", "torch", "pattern", "parameters", "backend", "length", "heads", "kv_heads", "head_dim", "density",
    "ms_median", "ms_min", "ms_max", "select_ms", "attend_ms", "tflops", "times_dense", "error",
]  # fmt: skip


@dataclass(frozen=True)
class RandomBlocks(BlockSparse):
    """Blocks at random, the query block's own among them; each head has the next of the ``shares`` in turn."""

    shares: tuple[float, ...]

    name: ClassVar[str] = "random_blocks"

    def rule(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        raise NotImplementedError("blocks drawn at random have no rule")

    def block_map(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        blocks, heads = block_count(q.shape[2]), q.shape[1]
        shares = torch.tensor([self.shares[head % len(self.shares)] for head in range(heads)], device=q.device)
        random = torch.Generator(q.device).manual_seed(0)
        drawn = torch.rand(q.shape[0], heads, blocks, blocks, generator=random, device=q.device) < shares[:, None, None]
        return drawn | torch.eye(blocks, dtype=torch.bool, device=q.device)


@dataclass(frozen=True)
class SortingXAttention(XAttention):
    """XAttention as it was first: every row of blocks is sorted by its shares."""

    name: ClassVar[str] = "xattention by sorting"

    def _covers(self, mass: Tensor, rows: range) -> Tensor:
        row = torch.arange(rows.start, rows.stop, device=mass.device)[:, None]
        column = torch.arange(mass.shape[3], device=mass.device)
        forced = (column == row) | (column == 0)
        ranked, order = mass.masked_fill(forced, torch.inf).sort(dim=3, descending=True, stable=True)
        # What is forced comes first: there infinity stands for what it holds.
        ranked[..., :2] = mass.gather(3, order[..., :2])
        taken = reaching(ranked, self.threshold)
        return torch.zeros_like(taken).scatter_(3, order, taken) | forced


def main() -> None:
    options = _options()
    rows = (row for length in options.lengths for row in measure(length, options))
    for row in written(options.output, COLUMNS, rows):
        print(*(row[column] for column in COLUMNS[2:]), flush=True)


def measure(length: int, options: argparse.Namespace) -> list[dict[str, object]]:
    """Rows of one length: dense attention, then every backend of every pattern."""
    q, k, v = structured_qkv(length, options.heads, options.kv_heads, device=options.device, dtype=options.dtype)
    scale, causal = q.shape[-1] ** -0.5, q.shape[1] * length * (length + 1) // 2
    budgets = tuple(PUBLISHED[head % len(PUBLISHED)] for head in range(options.heads))
    patterns: list[Pattern] = [Dense(), VerticalSlash(budgets), FlexPrefill(), FlashPrefill(), XAttention()]
    patterns += [SortingXAttention(), PBS()]
    patterns += [RandomBlocks(shares) for shares in SHARES]
    timed: list[tuple[Pattern, str, Callable[[], object], list[float]]] = []
    for pattern in patterns:
        serving = [backend for backend in pattern.backends if not backend.obstacle(pattern, q, k, v)]
        given = _given(pattern, q, k)
        for backend in serving[:1] if isinstance(pattern, Dense) else serving:
            if backend.name not in options.skip:
                timed.append((pattern, backend.name, partial(backend.attend, pattern, q, k, v, scale), []))
                timed.append((pattern, f"{backend.name} {ALONE}", partial(backend.attend, given, q, k, v, scale), []))
        if pattern.dynamic:
            timed.append((pattern, SELECT, partial(_select, pattern, q, k), []))
    for _, _, run, _ in timed:
        run()
    for _ in range(options.rounds):
        for _, _, run, ms in timed:
            ms.append(_timed(run, options.device))
    medians = {(pattern, name): statistics.median(ms) for pattern, name, _, ms in timed}
    dense = min(ms for (pattern, _), ms in medians.items() if pattern == Dense())
    rows = []
    for pattern, name, run, ms in timed:
        if name == SELECT or name.endswith(ALONE):
            continue
        pairs = pattern.pairs(q, k)
        median, alone = medians[pattern, name], medians[pattern, f"{name} {ALONE}"]
        rows.append({
            "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
            "torch": torch.__version__,
            "pattern": pattern.name,
            "parameters": _parameters(pattern),
            "backend": name,
            "length": length,
            "heads": q.shape[1],
            "kv_heads": k.shape[1],
            "head_dim": q.shape[3],
            "density": f"{pairs / causal:.4f}",
            "ms_median": f"{median:.3f}",
            "ms_min": f"{min(ms):.3f}",
            "ms_max": f"{max(ms):.3f}",
            "select_ms": f"{medians[pattern, SELECT]:.3f}" if pattern.dynamic else "",
            "attend_ms": f"{alone:.3f}",
            "tflops": f"{4 * q.shape[3] * pairs / alone / 1e9:.0f}",
            "times_dense": f"{dense / median:.2f}",
            "error": f"{_error(pattern, run, q, k, v):.2e}",
        })  # fmt: skip
    return rows


def _parameters(pattern: Pattern) -> str:
    if isinstance(pattern, VerticalSlash):
        return "published budgets"
    if isinstance(pattern, RandomBlocks):
        return ", ".join(f"{share:.0%}" for share in pattern.shares)
    return repr(pattern).partition("(")[2].removesuffix(")")


@dataclass(frozen=True, eq=False)
class _GivenLists(BlockSparse):
    """What another pattern selected: attention over it is attention alone."""

    lists: BlockLists

    name: ClassVar[str] = "given_lists"

    def rule(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        raise NotImplementedError("these lists were selected before")

    block_map = rule

    def select(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> BlockLists:
        return self.lists


@dataclass(frozen=True, eq=False)
class _GivenSelection(VerticalSlash):
    """The same for columns and distances."""

    chosen: Selection | None = None

    def select(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> Selection:
        assert self.chosen is not None
        return self.chosen


@dataclass(frozen=True, eq=False)
class _GivenOrder(PBS):
    """The same for an order of the keys and blocks of sorted ones."""

    chosen: tuple[Tensor, BlockLists] | None = None

    def sort(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        assert self.chosen is not None
        return self.chosen[0]

    def lists(self, q: Tensor, keys: Tensor, scale: float, order: Tensor) -> BlockLists:
        assert self.chosen is not None
        return self.chosen[1]


def _given(pattern: Pattern, q: Tensor, k: Tensor) -> Pattern:
    """The pattern with its selection made, or itself where it selects nothing."""
    if isinstance(pattern, PBS):
        return _GivenOrder(pattern.segment, pattern.score, _ordered(pattern, q, k))
    if isinstance(pattern, VerticalSlash):
        return _GivenSelection(pattern.budgets, pattern.select(q, k))
    return _GivenLists(pattern.select(q, k)) if isinstance(pattern, BlockSparse) else pattern


def _select(pattern: Pattern, q: Tensor, k: Tensor) -> object:
    if isinstance(pattern, PBS):
        return _ordered(pattern, q, k)
    assert isinstance(pattern, VerticalSlash | BlockSparse)
    return pattern.select(q, k)


def _ordered(pattern: PBS, q: Tensor, k: Tensor) -> tuple[Tensor, BlockLists]:
    """The order of the keys, and the blocks of sorted ones that each block of queries sees."""
    scale = q.shape[-1] ** -0.5
    order = pattern.sort(q, k, scale)
    return order, pattern.lists(q, sorted_tokens(k, order), scale, order)


def _timed(run: Callable[[], object], device: str) -> float:
    """Milliseconds of one run after one that is not counted."""
    run()
    return mean_ms(run, 1, device)


def _error(pattern: Pattern, run: Callable[[], object], q: Tensor, k: Tensor, v: Tensor) -> float:
    """Relative RMS error on one query of every 16th part of the prompt, over the pairs that the pattern selected."""
    length = q.shape[2]
    out = run()
    assert isinstance(out, Tensor)
    numbers = sorted({min(length - 1, length * part // 16 + 37) for part in range(16)} | {length - 1})
    keys = torch.arange(length, device=q.device)
    seen = []
    if isinstance(pattern, BlockSparse):
        lists = pattern.select(q, k)
        blocks = lists.to_map()
        seen = [blocks[..., number // lists.block, :].repeat_interleave(lists.block, -1)[..., :length] for number in numbers]
    elif isinstance(pattern, PBS):
        order, lists = _ordered(pattern, q, k)
        blocks, whole = lists.to_map(), order.shape[2]
        for number in numbers:
            listed = blocks[..., number // lists.block, :].repeat_interleave(lists.block, -1)[..., :whole]
            own = (keys >= number // pattern.segment * pattern.segment).expand(*q.shape[:2], -1)
            seen.append(own.clone().scatter_(2, order, own.gather(2, order) | listed))
    elif isinstance(pattern, VerticalSlash):
        chosen = pattern.select(q, k)
        for number in numbers:
            row = visible_keys(chosen.columns, chosen.distances, number // BLOCK, number // BLOCK + 1)[:, :, 0]
            seen.append(torch.nn.functional.pad(row, (0, length - row.shape[-1])))
    else:
        seen = [torch.ones(*q.shape[:2], length, dtype=torch.bool, device=q.device) for _ in numbers]
    mask = torch.stack([row & (keys <= number) for row, number in zip(seen, numbers, strict=True)], dim=2)
    exact = masked_attention(q[:, :, numbers], k, v, mask, dtype=torch.float32)
    return float((out[:, :, numbers] - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 65536, 131072])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--rounds", "--turns", type=int, default=5)
    parser.add_argument(
        "--skip", nargs="*", default=["torch-gathered", "torch-blocks", "torch"], help="backends to leave out"
    )
    options = parser.parse_args()
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    return options


if __name__ == "__main__":
    main()

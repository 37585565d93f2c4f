"""MInference's vertical-slash pattern: the key columns and the diagonals that the last queries attend to most.

Jiang et al. 2024, arXiv 2407.02490, sections 3.2 and 3.3. A *column* is a key, a *distance* is query minus key: all pairs
of one distance form a diagonal, the "slash". The rule is that of the released code: 64 last queries estimate, 30 columns
and 100 distances are forced, and for every block of 64 queries the diagonals widen to runs of 64 keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from tmbench_kernels.cuda import for_hopper, for_triton, imported, runs_triton
from tmbench_kernels.pattern import Backend, Pattern, default_scale
from tmbench_kernels.scores import largest_of_positive, last_query_mass
from tmbench_kernels.vertical_slash.runs import BLOCK, count_pairs
from tmbench_kernels.vertical_slash.torch_backend import attend_selected

if TYPE_CHECKING:
    from tmbench_kernels.vertical_slash.triton_index import Index

DEFAULT_BUDGET = (1000, 6096)
"""Columns and distances of a head for which no search result exists, as published."""
LAST_QUERIES = 64
FORCED_COLUMNS = 30
FORCED_DISTANCES = 100
MIN_DISTANCES = 50

Counts = tuple["Counts | int", ...]
"""How many entries of each row, nested as a tensor of them would be."""


@dataclass(frozen=True)
class Selection:
    """What one prefill attends to. Both are sets, bool ``[batch, heads, keys]``: entry n tells whether n is selected."""

    columns: Tensor
    distances: Tensor


def _attend_torch(pattern: VerticalSlash, q: Tensor, k: Tensor, v: Tensor, scale: float, **asked: Any) -> Tensor:
    chosen = pattern.select(q, k, scale=scale)
    return attend_selected(q, k, v, chosen.columns, chosen.distances, scale, **asked)


def _over_index(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A backend's function from one that attends over an index."""

    def index_and_attend(pattern: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, **asked: Any) -> Tensor:
        return attend(q, k, v, pattern.index(q, k, scale), scale, **asked)

    return index_and_attend


INDEX_BACKENDS = (
    for_hopper(_over_index(imported("vertical_slash.hopper_backend", "attend_index"))),
    for_triton(_over_index(imported("vertical_slash.triton_backend", "attend_index"))),
)
"""The kernels over runs and columns, for patterns whose ``index(q, k, scale)`` says where they lie."""


@dataclass(frozen=True)
class VerticalSlash(Pattern):
    """``budgets`` holds (columns, distances) for each query head, or one pair for all heads.

    Budgets clamp as published: at least 30 columns and 50 distances, at most the length. Raises ValueError for a budget
    that is no pair of counts, and, where tensors come in, for a number of budgets that is not the number of query heads.
    """

    budgets: tuple[tuple[int, int], ...] = (DEFAULT_BUDGET,)

    name: ClassVar[str] = "vertical_slash"
    dynamic: ClassVar[bool] = True
    last_row_queries: ClassVar[int | None] = LAST_QUERIES
    backends: ClassVar[tuple[Backend, ...]] = (
        *INDEX_BACKENDS,
        Backend("torch-gathered", ("cpu", "cuda"), _attend_torch, softcap=True, lse=True, chunks=True),
    )

    def __post_init__(self) -> None:
        if not self.budgets:
            raise ValueError("budgets must hold at least one (columns, distances) pair")
        for head, budget in enumerate(self.budgets):
            if len(budget) != 2 or any(type(n) is not int or n < 0 for n in budget):
                raise ValueError(f"budgets[{head}] must be two counts (columns, distances), not {budget!r}")

    def of_heads(self, heads: range) -> Pattern:
        """The budgets of these heads."""
        return self if len(self.budgets) == 1 else VerticalSlash(tuple(self.budgets[head] for head in heads))

    def select(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> Selection:
        """The columns and distances with the most attention from the last 64 queries, for each head of its budget.

        In a chunk these are the chunk's, or all of them where it has fewer.

        Probabilities are taken in float32, whatever the type of q and k: where the released code rounds logits to bf16,
        near ties can fall the other way. Ties go to the smaller column and the smaller distance.
        """
        mass = last_query_mass(q, k, default_scale(q, scale), LAST_QUERIES)
        mass[0, ..., :FORCED_COLUMNS] = torch.inf
        mass[1, ..., :FORCED_DISTANCES] = torch.inf
        columns, distances = self.counts(q.shape[1], k.shape[2])
        return Selection(*top_entries(mass, ((columns,), (distances,))))

    def counts(self, heads: int, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """How many columns and how many distances each of so many heads selects of so many keys."""
        budgets = self._head_budgets(heads)
        columns = tuple(min(length, max(columns, FORCED_COLUMNS)) for columns, _ in budgets)
        return columns, tuple(min(length, max(distances, MIN_DISTANCES)) for _, distances in budgets)

    def mask(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> Tensor:
        """Bool ``[batch, heads, queries, keys]``: the selection of these q and k, widened to runs."""
        return selection_mask(self.select(q, k, scale=scale), k.shape[2] - q.shape[2])

    def pairs(self, q: Tensor, k: Tensor, *, scale: float | None = None) -> int:
        """Counted from the selection of these q and k, at the cost of a selection; memory linear in length."""
        start = k.shape[2] - q.shape[2]
        if runs_triton(q.device):
            from tmbench_kernels.vertical_slash import triton_index

            return triton_index.count_pairs(self.index(q, k, default_scale(q, scale)), k.shape[2], start)
        chosen = self.select(q, k, scale=scale)
        return count_pairs(chosen.columns, chosen.distances, start)

    def index(self, q: Tensor, k: Tensor, scale: float) -> Index:
        """The selection of these q and k as the kernels take it, with room for the largest of the heads' budgets."""
        from tmbench_kernels.vertical_slash.triton_index import build_index

        chosen = self.select(q, k, scale=scale)
        columns, distances = self.counts(q.shape[1], k.shape[2])
        return build_index(chosen.columns, chosen.distances, max(columns), max(distances), k.shape[2] - q.shape[2])

    def _head_budgets(self, heads: int) -> tuple[tuple[int, int], ...]:
        if len(self.budgets) not in (1, heads):
            raise ValueError(
                f"the pattern has budgets for {len(self.budgets)} head{'s' * (len(self.budgets) != 1)}, but q has {heads}"
            )
        return self.budgets * heads if len(self.budgets) == 1 else self.budgets


def selection_mask(chosen: Selection, start: int = 0) -> Tensor:
    """The definition of which pairs a selection stands for, for the queries from position ``start`` on.

    Bool ``[batch, heads, queries, keys]``.

    For the block of 64 queries that ends before e: each selected distance s < e names the 64 keys that end at e - s, or the
    first 64. In ascending order these join into runs: a range that ends inside the current run adds nothing, one that ends
    up to 64 keys later extends the run by a whole 64 keys, and one beyond starts a new run. Query i of the block attends to
    every key <= i that lies in a run or is a selected column.
    """
    batch, heads, length = chosen.columns.shape
    mask = chosen.columns[:, :, None, :].repeat(1, 1, length - start, 1)
    for b in range(batch):
        for h in range(heads):
            distances = chosen.distances[b, h].nonzero().flatten().tolist()
            for first in range(start // BLOCK * BLOCK, length, BLOCK):
                end = first + BLOCK
                for low, high in _runs([max(end - s, BLOCK) for s in reversed(distances) if s < end]):
                    mask[b, h, max(first - start, 0) : end - start, low:high] = True
    return mask.tril_(start)


def _runs(ends: Sequence[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for end in ends:
        if not runs or end > runs[-1][1] + BLOCK:
            runs.append((end - BLOCK, end))
        elif end > runs[-1][1]:
            runs[-1] = (runs[-1][0], runs[-1][1] + BLOCK)
    return runs


def top_entries(scores: Tensor, counts: Counts) -> Tensor:
    """Which entries of ``[..., length]``, none negative, are among the largest, bool; ties go to the first.

    ``counts`` broadcasts to ``[...]``.
    """
    return largest_of_positive(scores, _on_device(counts, scores.device))


@lru_cache(maxsize=256)
def _on_device(counts: Counts, device: torch.device) -> Tensor:
    """Kept on the device: to send them there again would wait for all that it has to do."""
    return torch.tensor(counts, dtype=torch.int32, device=device)

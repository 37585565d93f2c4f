"""How much time a set of layers saves: as it was timed where it was, else by the roofline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tmbench.measure.ttft import expected_flop
from tmbench.methods.plan import Plan
from tmbench.methods.table import METHODS
from tmbench.models.loading import LoadedModel
from tmbench.results.rows import OK, TtftRow
from tmbench.results.tables import read_all
from tmbench.results.variants import dense_of, identity

ROOFLINE, TTFT_ROWS = "roofline", "ttft rows"


def timed_rows(root: Path, known: Mapping[str, Any]) -> list[TtftRow]:
    """The times to first token of single prompts of this model on this device, read in this kind of prefill."""
    rows = [row for row in read_all(root, TtftRow) if row.status == OK and row.batch_size == 1]
    about = {name: known[name] for name in TtftRow.SHARED_KEY if name in known and name != "seed"}
    return [row for row in rows if all(getattr(row, name) == value for name, value in about.items())]


def time_vs_dense(loaded: LoadedModel, plan: Plan, lengths: Sequence[int], rows: Sequence[TtftRow]) -> tuple[float, str]:
    """A prefill's time against dense attention's, as a part of it, the mean over lengths, and what says so.

    Times count where the plan was interleaved with dense at every length. The roofline takes a dynamic pattern to keep all
    pairs, so it says of one nothing but what its triangle saves.
    """
    found = [_timed(plan, length, rows) for length in lengths]
    measured = [ratio for ratio in found if ratio is not None]
    if len(measured) == len(lengths):
        return math.fsum(measured) / len(measured) - 1, TTFT_ROWS
    dense = METHODS["dense"].plan(loaded.shape)
    ratios = [expected_flop(loaded, plan, length) / expected_flop(loaded, dense, length) for length in lengths]
    return math.fsum(ratios) / len(ratios) - 1, ROOFLINE


def _timed(plan: Plan, length: int, rows: Sequence[TtftRow]) -> float | None:
    here = [row for row in rows if row.length == length and row.ttft_median_s]
    own = [row for row in here if identity(row) == identity(plan)]
    for row in sorted(own, key=lambda row: row.time, reverse=True):
        beside = (row.prompt, row.prompt_hash, *row.rounds)
        dense = dense_of([other for other in here if (other.prompt, other.prompt_hash, *other.rounds) == beside])
        if dense is not None:
            assert row.ttft_median_s is not None
            assert dense.ttft_median_s is not None
            return row.ttft_median_s / dense.ttft_median_s
    return None

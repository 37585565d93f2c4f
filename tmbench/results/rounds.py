"""Rounds of interleaved prefills that no row has yet, kept one by one: a killed ``tmbench ttft`` goes on with the next round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tmbench.results.row_sets import PREFIX
from tmbench.results.rows import FAILED, OK, OUT_OF_MEMORY, TtftRow, short_hash
from tmbench.results.sample_files import Kept


@dataclass(frozen=True)
class TimedPass:
    """One method's prefill in one round: a line of the JSONL file. Of one that failed no more than why, and what ran."""

    what: ClassVar[str] = "a timed prefill"

    index: int
    """Counted through all methods of a round, one round after the other."""
    environment: str
    """The name of the environment that it was timed in."""
    throughput: float
    """GEMM throughput in operations per second, measured after its round; 0 where nothing ran."""
    backends: str
    """What ran until then, as "pattern:backend" joined by "+"."""
    seconds: float = 0.0
    status: str = OK
    error: str = ""
    warmup_s: float = 0.0
    """Of its process's first warm-up, less what counting took."""
    density: float = 0.0
    skipped_share: float | None = None
    flop: float = 0.0
    token: int = 0
    """Of the first prompt."""
    same_token: bool | None = None
    """Whether every prompt's is dense's; None where dense did not run."""
    logit_error: str = ""
    """A text, as it may be infinite, which JSON has no number for; "" where dense did not run."""
    peak_memory: int | None = None
    communication_s: float | None = None

    def __post_init__(self) -> None:
        if self.status not in (OK, FAILED, OUT_OF_MEMORY):
            raise ValueError("a status is one of three")
        if self.logit_error:
            float(self.logit_error)


def kept_rounds(root: Path, rows: Sequence[TtftRow]) -> Kept[TimedPass]:
    """The file of the rounds of rows that are interleaved: beside their CSVs, until these have the rows."""
    name = f"{PREFIX}{short_hash(*(str((row.key, row.warmup)) for row in rows))}.jsonl"
    return Kept.at(root, rows[0], name, TimedPass)

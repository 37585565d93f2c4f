"""The files of losses that ``tmbench probe --loss`` keeps: what paired differences of losses are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tmbench.results.rows import OK, LossRow
from tmbench.results.sample_files import Kept, read_samples_of


@dataclass(frozen=True)
class LossSample:
    """One prompt and its answer: a line of the JSONL file. Losses are means over tokens, in nats."""

    index: int
    nll_prompt: float
    nll_answer: float
    nll_first: float
    prompt_tokens: int
    answer_tokens: int
    source: str
    backends: str
    seconds: float
    prompt_hash: str = ""
    """A hash of the prompt's token ids, and of the answer's; "" in files of older versions."""
    answer_hash: str = ""
    peak_memory: int | None = None
    """Device memory at its peak in bytes, model included; None on the CPU."""

    def same(self, other: LossSample) -> bool:
        """Whether both are of one prompt and one answer, as far as is known."""
        pairs = ((self.prompt_hash, other.prompt_hash), (self.answer_hash, other.answer_hash))
        return all(own == told or "" in (own, told) for own, told in pairs)


def kept_losses(root: Path, row: LossRow) -> Kept[LossSample]:
    """The file of the losses of a row's samples."""
    return Kept(root, row, row.task, LossSample)


def losses_of(root: Path, row: LossRow) -> Mapping[int, LossSample]:
    """The samples behind a row by their number; none where the file is missing or does not make the row's losses.

    Raises UserError for a file that tmbench did not write.
    """
    if row.status != OK or not row.sample_files:
        return {}
    known = read_samples_of(root / row.device / LossRow.kind / row.sample_files, LossSample)
    found = {index: known[index] for index in range(row.samples) if index in known}
    if len(found) < row.samples:
        return {}
    for name in ("nll_prompt", "nll_answer", "nll_first"):
        own, mean = math.fsum(getattr(sample, name) for sample in found.values()) / len(found), getattr(row, name)
        if mean is None or not math.isclose(own, mean, rel_tol=1e-9, abs_tol=1e-12):
            return {}
    return found

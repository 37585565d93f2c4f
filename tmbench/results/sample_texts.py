"""What was answered to single samples, and where in the prompt the answer lay: for people to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmbench.results.files import read_lines
from tmbench.results.rows import RulerRow
from tmbench.results.sample_files import index_of

DECIMALS = 4


@dataclass(frozen=True)
class SampleText:
    """The texts of one sample; "" for what its line does not have."""

    prediction: str
    prompt: str
    depths: Sequence[float | None]
    """As ``depths_of`` makes them, one for each reference; none in lines of older versions."""


def depths_of(prompt: str, references: Sequence[str]) -> list[float | None]:
    """The share of a prompt's characters before each reference; None for one that does not stand in it exactly once."""
    return [
        round(prompt.index(reference) / len(prompt), DECIMALS) if reference and prompt.count(reference) == 1 else None
        for reference in references
    ]


def read_texts(root: Path, row: RulerRow) -> Mapping[int, SampleText]:
    """The texts of a row's samples by their number; none where the row names no file, or it is gone.

    Raises UserError for a file that tmbench did not write.
    """
    if not row.predictions:
        return {}
    path = root / row.device / row.kind / row.predictions
    return dict(read_lines(path, _entry, "a prediction", "move it out of the results folder"))


def _entry(entry: Any) -> tuple[int, SampleText]:
    depths = list(entry.get("depths", ()))
    if not all(depth is None or (type(depth) in (int, float) and 0 <= depth <= 1) for depth in depths):
        raise ValueError("a depth is from 0 to 1")
    return index_of(entry), SampleText(str(entry.get("prediction", "")), str(entry.get("prompt", "")), depths)

"""What was answered to single samples, and to which prompt where that was kept: for people to read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmbench.results.files import read_lines
from tmbench.results.rows import RulerRow
from tmbench.results.sample_files import index_of


@dataclass(frozen=True)
class SampleText:
    """The texts of one sample; "" for what its line does not have."""

    prediction: str
    prompt: str


def read_texts(root: Path, row: RulerRow) -> Mapping[int, SampleText]:
    """The texts of a row's samples by their number; none where the row names no file, or it is gone.

    Raises UserError for a file that tmbench did not write.
    """
    if not row.predictions:
        return {}
    path = root / row.device / row.kind / row.predictions
    return dict(read_lines(path, _entry, "a prediction", "move it out of the results folder"))


def _entry(entry: Any) -> tuple[int, SampleText]:
    return index_of(entry), SampleText(str(entry.get("prediction", "")), str(entry.get("prompt", "")))

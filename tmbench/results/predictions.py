"""The files of predictions that an accuracy measurement keeps: what each method answered, and its score."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tmbench.results.rows import PLAIN_LOOP, RulerRow
from tmbench.results.sample_files import Kept, read_samples_of


@dataclass(frozen=True)
class Prediction:
    """What a model answered to one sample: a line of the JSONL file."""

    what: ClassVar[str] = "a prediction"

    index: int
    prediction: str
    outputs: tuple[str, ...]
    """The references that it was scored by."""
    score: float
    """0 to 1."""
    prompt_tokens: int
    new_tokens: int
    seconds: float
    """Of its prefill and its decoding; where several decode together, of its share of that."""
    coverage: float | None = None
    """The density: the share of the causal pairs computed in the prefill; counted for a task's first sample only."""
    backends: str = ""
    """What ran, as "pattern:backend" joined by "+"."""
    prompt_hash: str = ""
    """A hash of the prompt's token ids; "" in files of older versions."""
    peak_memory: int | None = None
    """Device memory at its peak in bytes, model included; None on the CPU."""
    decode: str = PLAIN_LOOP
    """How it was decoded, see ``RulerRow.decode``."""
    batch_size: int = 1
    """How many samples decoded together at most, itself among them."""
    skipped_share: float | None = None
    """See ``RulerRow.skipped_share``."""

    def __post_init__(self) -> None:
        if not 0 <= self.score <= 1:
            raise ValueError("a score is from 0 to 1")


def kept_predictions(root: Path, row: RulerRow) -> Kept[Prediction]:
    """The file of what was answered to a row's samples."""
    return Kept(root, row, row.task, Prediction, "predictions")


def read_predictions(path: Path) -> dict[int, Prediction]:
    """The predictions of a JSONL file by sample index; raises UserError for a file that tmbench did not write."""
    return read_samples_of(path, Prediction)

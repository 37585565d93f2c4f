"""The files of choices that ``tmbench agree`` keeps: what each method would have written at each place of dense's text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tmbench.results.rows import OK, PLAIN_LOOP, AgreeRow
from tmbench.results.sample_files import Kept, read_samples_of


@dataclass(frozen=True)
class Choices:
    """One sample: a line of the JSONL file."""

    what: ClassVar[str] = "a sample's choices"
    remedy: ClassVar[str] = "move the file away"

    index: int
    chosen: tuple[int, ...]
    """The method's likeliest token at each place."""
    reference: tuple[int, ...]
    """Dense's text, as long."""
    seconds: float
    """Of its prefill and of reading the text; where several decode together, of its share of that."""
    backends: str = ""
    """What ran, as "pattern:backend" joined by "+"."""
    prompt_hash: str = ""
    """A hash of the prompt's token ids; "" in files of older versions."""
    peak_memory: int | None = None
    """Device memory at its peak in bytes, model included; None on the CPU."""
    decode: str = PLAIN_LOOP
    """How it was decoded, see ``AgreeRow.decode``."""
    batch_size: int = 1
    """How many samples decoded together at most, itself among them."""

    def __post_init__(self) -> None:
        if not self.chosen or len(self.chosen) != len(self.reference):
            raise ValueError("as many choices as tokens of dense belong into a line")

    @property
    def agreement(self) -> float:
        """The part of the places, 0 to 1, at which the method's choice is dense's."""
        return sum(own == other for own, other in zip(self.chosen, self.reference, strict=True)) / len(self.reference)

    @property
    def divergence(self) -> int:
        """How many tokens greedy decoding has in common with dense before the first that differs; all where none does."""
        pairs = enumerate(zip(self.chosen, self.reference, strict=True))
        return next((place for place, (own, other) in pairs if own != other), len(self.reference))


def kept_choices(root: Path, row: AgreeRow) -> Kept[Choices]:
    """The file of what was chosen in a row's samples."""
    return Kept(root, row, row.prompt, Choices, "choices")


def read_choices(path: Path) -> dict[int, Choices]:
    """The choices of a JSONL file by sample, the newest of each; raises UserError for a file that tmbench did not write."""
    return read_samples_of(path, Choices)


def choices_of(root: Path, row: Mapping[str, Any]) -> list[Choices]:
    """The samples behind a row, given its columns by name; none where the file does not make its agreement."""
    if row["status"] != OK or row["agreement"] is None:
        return []
    known = read_choices(root / row["device"] / AgreeRow.kind / row["choices"])
    found = [known[number] for number in range(row["samples"]) if number in known]
    makes_it = found and abs(sum(one.agreement for one in found) / len(found) - row["agreement"]) < 1e-9
    return found if makes_it and len(found) == row["samples"] else []

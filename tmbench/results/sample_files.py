"""Samples of a run, kept one by one in JSONL files as they are made: a killed run goes on with the next one."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Container, Sequence
from dataclasses import MISSING, asdict
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Protocol, Self, TypeVar, get_args, get_origin, get_type_hints

from tmbench.results.files import append_line, read_lines, writable
from tmbench.results.rows import FAILED, OK, AgreeRow, Row, RulerRow
from tmbench.results.tables import csv_path


class Sample(Protocol):
    """A frozen dataclass with the number of the sample in ``index``; lists in it come back as lists."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def index(self) -> int: ...


S = TypeVar("S", bound=Sample)


def measured_before(row: RulerRow | AgreeRow, known: Container[int], wanted: Sequence[int]) -> bool:
    """Whether a row needs nothing new to answer for these samples, of which those in ``known`` are kept.

    A killed ``--overwrite`` leaves the older row without the samples that it was made of.
    """
    if row.status == FAILED or row.samples < len(wanted):
        return False
    return row.status != OK or all(index in known for index in wanted)


def is_of(row: RulerRow | AgreeRow, seconds: Sequence[float]) -> bool:
    """Whether a row is of the samples that are kept, the first of which took so many seconds each.

    An ``--overwrite`` that is killed before its row leaves the older row beside newer samples; a row is made of those again.
    """
    if row.status != OK or row.seconds_per_sample is None:
        return True
    own = seconds[: row.samples]
    return len(own) == row.samples and math.isclose(statistics.mean(own), row.seconds_per_sample, rel_tol=1e-9)


def index_of(entry: Any) -> int:
    """The number of a sample, of a line's JSON; raises ValueError for what is none. Of two lines the later one counts."""
    index = entry["index"]
    if type(index) is not int or index < 0:
        raise ValueError("a sample has a number from 0 on")
    return index


def score_of(entry: Any) -> float:
    """The score of a sample, from 0 to 1; raises ValueError for what is none."""
    score = entry["score"]
    if type(score) not in (int, float) or not 0 <= score <= 1:
        raise ValueError("a score is from 0 to 1")
    return float(score)


def seconds_of(entry: Any) -> float:
    """How long a sample took; raises ValueError for what is no time."""
    seconds = entry["seconds"]
    if type(seconds) not in (int, float) or seconds < 0:
        raise ValueError("seconds are 0 or more")
    return float(seconds)


class Kept:
    """The file of one row's samples; its name holds a hash of everything that was measured.

    Args:
        task: what the samples are of.
        folder: what they are called.
    """

    def __init__(self, root: Path, row: Row, task: str, folder: str = "samples") -> None:
        self._folder = csv_path(root, type(row), row.device, row.method).parent
        self.path = self._folder / folder / row.method / f"{task}-{row.length}-{row.digest}.jsonl"

    @property
    def name(self) -> str:
        """The path as a row beside it gives it."""
        return str(self.path.relative_to(self._folder))

    def clear(self) -> Self:
        """Take the file away; raises UserError where the folder does not let it go."""
        with writable(self.path):
            self.path.unlink(missing_ok=True)
        return self

    def read(self, kind: type[S]) -> dict[int, S]:
        """The samples by their number; raises UserError for a file that tmbench did not write."""

        hints = get_type_hints(kind)

        def parse(entry: Any) -> tuple[int, S]:
            # Files of older versions lack what has a default.
            given = kind.__dataclass_fields__.items()
            fields = {name: entry[name] for name, about in given if name in entry or about.default is MISSING}
            for name, value in fields.items():
                if not _fits(value, hints[name]):
                    raise ValueError(f"{name} is of another type")
            seconds_of(entry)
            return index_of(entry), kind(**fields)

        return dict(read_lines(self.path, parse, "a sample", "move the file away, or use --overwrite"))

    def add(self, sample: Any, **more: Any) -> None:
        """Append a sample, with whatever else its line is to say, whole or not at all."""
        append_line(self.path, json.dumps(asdict(sample) | more, ensure_ascii=False))


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON can be that of a field; what is in a list is not looked at."""
    kinds = [get_origin(kind) or kind for kind in (get_args(hint) if isinstance(hint, UnionType) else (hint,))]
    return type(value) in kinds or (float in kinds and type(value) is int)

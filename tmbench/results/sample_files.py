"""Samples of a run, kept one by one in JSONL files as they are made: a killed run goes on with the next one."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import MISSING, asdict
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar, get_args, get_origin, get_type_hints

from tmbench.results.files import append_line, read_lines, writable
from tmbench.results.rows import Row
from tmbench.results.tables import csv_path


class Sample(Protocol):
    """A frozen dataclass of what was measured of one sample: numbers, texts, lists, and tuples of numbers or texts.

    Two attributes of the class are optional: ``what``, by which messages call it, and ``remedy``, what to do about a file
    that holds another thing.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def index(self) -> int: ...

    @property
    def seconds(self) -> float: ...

    @property
    def backends(self) -> str: ...


S = TypeVar("S", bound=Sample)


def highest(peaks: Iterable[int | None]) -> int | None:
    """The highest of samples' peaks of memory; None where one is not known."""
    found = list(peaks)
    known = [peak for peak in found if peak is not None]
    return max(known) if known and len(known) == len(found) else None


class Decoded(Protocol):
    """A sample whose text was decoded."""

    @property
    def seconds(self) -> float: ...

    @property
    def peak_memory(self) -> int | None: ...

    @property
    def decode(self) -> str: ...

    @property
    def batch_size(self) -> int: ...


def decoded(samples: Sequence[Decoded]) -> dict[str, Any]:
    """The columns that say how the samples of a row were decoded, and what that took."""
    return {
        "decode": "+".join(sorted({sample.decode for sample in samples})),
        "batch_size": max(sample.batch_size for sample in samples),
        "seconds_per_sample": statistics.mean(sample.seconds for sample in samples),
        "peak_memory_bytes": highest(sample.peak_memory for sample in samples),
    }


class Kept(Generic[S]):
    """The file of one row's samples; its name holds a hash of everything that was measured.

    Args:
        task: what the samples are of.
        kind: the dataclass of a sample.
        folder: what the samples are called.
    """

    def __init__(self, root: Path, row: Row, task: str, kind: type[S], folder: str = "samples") -> None:
        self._root = root
        self._folder = csv_path(root, type(row), row.device, row.method).parent
        self.kind = kind
        self.path = self._folder / folder / row.method / f"{task}-{row.length}-{row.digest}.jsonl"

    @property
    def name(self) -> str:
        """The path as a row beside it gives it."""
        return str(self.path.relative_to(self._folder))

    @classmethod
    def at(cls, root: Path, row: Row, name: str, kind: type[S]) -> Self:
        """The file that a row of this results folder gives this name."""
        made = cls(root, row, "", kind)
        made.path = made._folder / name
        return made

    def within(self, root: Path) -> Self:
        """The file of the same samples in another results folder."""
        other = copy(self)
        other._root = root
        other._folder, other.path = (root / path.relative_to(self._root) for path in (self._folder, self.path))
        return other

    def clear(self) -> None:
        """Take the file away; raises UserError where the folder does not let it go."""
        with writable(self.path):
            self.path.unlink(missing_ok=True)

    def read(self) -> dict[int, S]:
        """The samples by their number; raises UserError for a file that tmbench did not write."""
        return read_samples_of(self.path, self.kind)

    def join(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Append lines of other files of such samples, all or none; raises UserError where the folder does not take them."""
        if lines := [json.dumps(entry, ensure_ascii=False) for entry in entries]:
            append_line(self.path, "\n".join(lines))

    def add(self, sample: Any, **more: Any) -> None:
        """Append a sample, with whatever else its line is to say, whole or not at all."""
        append_line(self.path, json.dumps(asdict(sample) | more, ensure_ascii=False))


def read_samples_of(path: Path, kind: type[S]) -> dict[int, S]:
    """The samples of a JSONL file by their number, of two lines the later one; raises UserError for a file that is not ours.

    Lines of older versions lack what has a default.
    """
    what = getattr(kind, "what", "a sample")
    remedy = getattr(kind, "remedy", "move the file away, or use --overwrite")
    return {sample.index: sample for sample in read_lines(path, _parser(kind), what, remedy)}


def read_entries_of(path: Path, kind: type[S]) -> dict[int, tuple[S, dict[str, Any]]]:
    """As ``read_samples_of``, each sample with all that its line says, of which the sample is a part."""
    parse = _parser(kind)
    remedy = getattr(kind, "remedy", "move the file away")
    lines = read_lines(path, lambda entry: (parse(entry), entry), getattr(kind, "what", "a sample"), remedy)
    return {sample.index: (sample, entry) for sample, entry in lines}


def _parser(kind: type[S]) -> Callable[[Any], S]:
    hints = get_type_hints(kind)
    given = kind.__dataclass_fields__.items()

    def parse(entry: Any) -> S:
        index_of(entry)
        seconds_of(entry)
        named = [name for name, about in given if name in entry or about.default is MISSING]
        return kind(**{name: _value(entry[name], hints[name], name) for name in named})

    return parse


def _value(value: Any, hint: Any, name: str) -> Any:
    """A field's value, made from that of JSON; raises ValueError for one of another type. Lists are not looked into."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    origins = [get_origin(kind) or kind for kind in kinds]
    if type(value) is list and tuple in origins:
        (of, *_) = get_args(kinds[origins.index(tuple)])
        if all(type(one) is of for one in value):
            return tuple(value)
    elif type(value) in origins:
        return value
    elif type(value) is int and float in origins:
        return float(value)
    raise ValueError(f"{name} is of another type")


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

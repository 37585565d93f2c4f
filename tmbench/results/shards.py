"""Shards: runs that measure a part of the samples each, and what they leave for ``tmbench merge``.

Shard 3 of 16 writes to ``<root>/shards/3-of-16`` and nowhere else, so that shards may share a results folder on a file system
whose locks do not reach from one machine to another. In there samples lie as in the results folder itself. There are no
CSVs: of each row that a run would make, a shard keeps a record once it has measured its samples, ``<device>/<kind>/records``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from tmbench.errors import UserError, shortened
from tmbench.results.files import read_file, readable, replace_file, writable
from tmbench.results.rows import OK, SCHEMA_VERSION, Row, short_hash
from tmbench.results.tables import csv_path
from tmbench.results.values import field_text

R = TypeVar("R", bound=Row)
FOLDER, RECORDS = "shards", "records"
MOST = 10_000
"""Shards of a run."""


@dataclass(frozen=True, order=True)
class Shard:
    """One of several runs that together measure what one would. Counted from 1, as the tasks of a job array are."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """The shard of a text such as 3/16; raises UserError for another text."""
        number, _, of = text.partition("/")
        if all(part.isascii() and part.isdigit() and len(part) <= len(str(MOST)) for part in (number, of)):
            shard = cls(int(number), int(of))
            if 1 <= shard.number <= shard.of <= MOST:
                return shard
        raise UserError(f"--shard {shortened(text)} is no part of a run: give for instance 3/16, from 1/16 to 16/16")

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def folder(self) -> Path:
        """Where it writes, in the results folder."""
        return Path(FOLDER) / f"{self.number}-of-{self.of}"

    def takes(self, place: int, length: int, task: str) -> bool:
        """Whether the sample at this place among those of a task is its own, whatever else the run measures.

        Each task begins with a shard of its own, so that tasks of few samples do not all fall to the first ones.
        """
        first = int(short_hash(str(length), task), 16)
        return (place + first) % self.of == self.number - 1


@dataclass(frozen=True)
class Record(Generic[R]):
    """What a shard has measured of a row."""

    shard: Shard
    row: R
    """Without figures: what is known before anything is measured. Its ``samples`` are those of all shards."""
    files: Mapping[str, str]
    """The files of samples by the names that items know them by, as paths within ``<device>/<kind>``."""
    own: Mapping[str, Mapping[int, str]]
    """By those names: the hash of the prompt of each of the shard's own samples, by number, in their order."""
    status: str = OK
    error: str = ""
    """Why it has not all of them."""
    backends: str = ""
    """What ran of those that failed."""
    wish: Mapping[str, Any] = field(default_factory=dict)
    """What else the row is made by."""
    settings: Sequence[str] = ()
    """The ``parameters`` of all rows of its method that the shard's run makes; none in an older record."""

    def write(self, root: Path) -> None:
        """Keep it in the shard's folder; raises UserError where that does not take it."""
        entry = asdict(self) | {
            "shard": str(self.shard),
            "schema_version": SCHEMA_VERSION,
            "row": {name: field_text(value, name) for name, value in asdict(self.row).items()},
        }
        path = record_path(root, self.shard, self.row)
        with writable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps(entry, indent=1, ensure_ascii=False) + "\n")


def record_path(root: Path, shard: Shard, row: Row) -> Path:
    """Where a shard's record of a row lies in a results folder."""
    folder = csv_path(root / shard.folder, type(row), row.device, row.method).parent
    return folder / RECORDS / f"{row.method}-{row.length}-{row.digest}.json"


def forget(root: Path, shard: Shard, row: Row) -> None:
    """Take a record away, as there is more to measure; raises UserError where the folder does not let it go."""
    path = record_path(root, shard, row)
    with writable(path):
        path.unlink(missing_ok=True)


def read_records(root: Path, kind: type[R]) -> Iterator[Record[R]]:
    """All records of a kind of row in a results folder, in a stable order; raises UserError for one that is damaged."""
    with readable(root):
        found = sorted(root.glob(f"{FOLDER}/*-of-*/*/{kind.kind}/{RECORDS}/*.json"))
    for path in found:
        with readable(path):
            content = read_file(path)
        try:
            entry = json.loads(content)
            newer = entry["schema_version"] > SCHEMA_VERSION
            record = None if newer else _record(entry, kind)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is no record of a shard: move it away, and run the shard again") from error
        if record is None:
            raise UserError(f"{path} was written by a newer tmbench: update tmbench, or move the file away")
        yield record


def sample_files(root: Path, kind: type[Row]) -> Iterator[tuple[Shard, Path]]:
    """The files of samples of a kind of row that shards of a results folder have, as paths within that of the shard.

    Raises UserError for a folder that cannot be read.
    """
    with readable(root):
        found = sorted(root.glob(f"{FOLDER}/*-of-*/*/{kind.kind}/**/*.jsonl"))
    for path in found:
        folder, *within = path.relative_to(root / FOLDER).parts
        number, _, of = folder.partition("-of-")
        if number.isdigit() and of.isdigit():
            yield Shard(int(number), int(of)), Path(*within)


def _record(entry: Any, kind: type[R]) -> Record[R]:
    texts = {str(name): str(text) for name, text in entry["row"].items()}
    if not kind.is_header(list(texts)):
        raise ValueError("its columns differ")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in entry["files"].values()):
        raise ValueError("samples lie in the results folder")
    return Record(
        Shard.parse(entry["shard"]),
        kind.parse(texts),
        {str(name): str(path) for name, path in entry["files"].items()},
        {str(name): {int(index): str(known) for index, known in own.items()} for name, own in entry["own"].items()},
        str(entry["status"]),
        str(entry["error"]),
        str(entry["backends"]),
        dict(entry["wish"]),
        [str(parameters) for parameters in entry.get("settings", ())],
    )

"""Result files: one CSV per device, command and method; every row complete in itself and written whole.

``<root>/<device>/<kind>/<method>.csv``, the kind being ttft, ruler, agree, probe, loss or tune. A row is appended by one write to
a file opened for appending, under a lock, and taken back if the disk takes only a part, so that a kill or a full disk leaves
whole rows. Measuring the same thing again appends a newer row, which readers prefer; rows are never changed. A file from
before a column was added, or one that a spreadsheet saved with its columns in another order, is read by the names of its
columns, and is written as this version writes it when a row is next appended. A file of an older schema stays as it is: new
rows go to ``<method>.schema2.csv`` beside it, and readers read both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from tmbench.errors import UserError, shortened
from tmbench.results import schema_1
from tmbench.results.csv_text import OpenEndError, Table, header_text, line_text, read_table
from tmbench.results.files import append_text, read_file, readable, replace_file, writable
from tmbench.results.rows import SCHEMA_VERSION, Row
from tmbench.results.values import field_text

R = TypeVar("R", bound=Row)


class CorruptResultsError(UserError):
    """A file in the results folder that tmbench did not write, or that was damaged since."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is not a results file of this version ({reason}): move it out of the results folder")


class OpenEndResultsError(UserError):
    """A file in the results folder whose last line may be whole or cut: tmbench neither reads nor deletes it."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} {reason}")


class NewerResultsError(UserError):
    """A file in the results folder whose rows have a newer schema than this version reads."""

    def __init__(self, path: Path, number: int, version: int) -> None:
        super().__init__(
            f"{path} line {number} was written by a newer tmbench (schema_version {version}, where this one reads up to "
            f"{SCHEMA_VERSION}): update tmbench, or move the file out of the results folder"
        )


def csv_path(root: Path, row: type[Row], device: str, method: str) -> Path:
    return root / device / row.kind / f"{method}.csv"


def append(root: Path, *rows: Row) -> Path:
    """Append rows of one kind, device and method to their CSV, all of them or none; the path of the file that has them.

    Raises UserError where the folder cannot be written.
    """
    row = rows[0]
    path = csv_path(root, type(row), row.device, row.method)
    assert all(csv_path(root, type(other), other.device, other.method) == path for other in rows)
    return _append_rows(path, type(row), rows)


def prepare(root: Path, row: type[Row], device: str, method: str) -> None:
    """Leave a CSV with the header of this version, so that what is measured next can be appended to it.

    Raises UserError where the folder cannot be written, and CorruptResultsError for a file that is not ours.
    """
    _append_rows(csv_path(root, row, device, method), row, ())


def _append_rows(path: Path, kind: type[Row], rows: Sequence[Row]) -> Path:
    lines = "".join(map(_line_of, rows))
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            append_text(path, header_text(kind.columns()), lines, lambda: _upgrade(path, kind))
        except _OlderSchema:
            path = _beside(path)
            append_text(path, header_text(kind.columns()), lines, lambda: _upgrade(path, kind))
    return path


class _OlderSchema(Exception):  # noqa: N818 - what is found, and no error
    """A file has rows of an older schema: it stays as it is, and new rows go beside it."""


def _beside(path: Path) -> Path:
    """Where the rows of this schema go while a method's CSV has those of an older one."""
    return path.with_suffix(f".schema{SCHEMA_VERSION}.csv")


def read(path: Path, row: type[R]) -> list[R]:
    """All rows of one CSV, oldest first.

    Raises CorruptResultsError for anything that is not one of ours, UserError where the file system refuses.
    """
    with readable(path):
        return _rows(path, row)


def kind_of(path: Path, *kinds: type[Row]) -> type[Row]:
    """Which of these kinds the columns of a CSV are of; the first where they are of none, which ``read`` then refuses.

    Raises UserError where the file system refuses.
    """
    with readable(path):
        header = read_file(path).partition(b"\n")[0].decode(errors="replace").removeprefix("\ufeff")
    names = header.strip().replace('"', "").split(",")
    return next((kind for kind in kinds if kind.is_header(names)), kinds[0])


def _rows(path: Path, row: type[R]) -> list[R]:
    return _read(path, row)[1]


def _read(path: Path, row: type[R]) -> tuple[int, list[R]]:
    """The schema of a file, and its rows; that of this version where the file has no whole header."""
    content = read_file(path)
    try:
        table = read_table(content, [schema.columns(row) for schema in _SCHEMAS.values()], _tells_end)
    except OpenEndError as error:
        raise OpenEndResultsError(path, str(error)) from error
    except ValueError as error:
        raise CorruptResultsError(path, str(error)) from error
    if not table.header:
        return SCHEMA_VERSION, []
    versions = _versions(path, table)
    found = [version for version, schema in _SCHEMAS.items() if schema.is_header(row, table.header)]
    if not found:
        columns = _SCHEMAS[max(versions, default=SCHEMA_VERSION)].columns(row)
        unknown = ", ".join(repr(name) for name in table.header if name not in columns)
        raise CorruptResultsError(path, "its columns differ" + f": {shortened(unknown)} unknown" * bool(unknown))
    rows: list[R] = []
    for (number, values), version in zip(table.lines, versions, strict=True):
        if len(values) != len(table.header):
            raise CorruptResultsError(path, f"line {number} has {len(values)} fields, not {len(table.header)}")
        if version != found[0]:
            raise CorruptResultsError(
                path, f"line {number}: schema_version is {version}, where its columns are of {found[0]}"
            )
        try:
            rows.append(row.parse(_SCHEMAS[version].translate(dict(zip(table.header, values, strict=True)))))
        except ValueError as error:
            raise CorruptResultsError(path, f"line {number}: {error}") from error
    return found[0], rows


def _versions(path: Path, table: Table) -> list[int]:
    """The schema of each line, which says how its other columns are read; raises for one that there is no reader of."""
    if "schema_version" not in table.header:
        raise CorruptResultsError(path, "its columns differ: schema_version is missing")
    column = table.header.index("schema_version")
    versions = []
    for number, values in table.lines:
        try:
            version = int(values[column]) if column < len(values) else SCHEMA_VERSION
        except ValueError:
            version = 0
        if version > SCHEMA_VERSION:
            raise NewerResultsError(path, number, version)
        if version not in _SCHEMAS:
            raise CorruptResultsError(path, f"line {number}: schema_version is {shortened(values[column])!r}, which is none")
        versions.append(version)
    return versions


def _tells_end(column: str, value: str) -> bool:
    """Whether a value cannot be the beginning of a longer one: numbers can, the name of a file of samples cannot."""
    return column in ("predictions", "choices") and value.endswith(".jsonl")


def read_all(root: Path, row: type[R]) -> list[R]:
    """The newest row of every key under a results folder, all devices and methods, in a stable order."""
    found: dict[tuple[Any, ...], R] = {}
    for path in csv_paths(root, row):
        _add_newest(found, read(path, row))
    return list(found.values())


def _add_newest(found: dict[tuple[Any, ...], R], rows: Sequence[R]) -> None:
    """Add the newest row of every key of a file to those of others: of a file the last one, of several files the latest."""
    for key, row in {row.key: row for row in rows}.items():
        if key not in found or row.time >= found[key].time:
            found[key] = row


def csv_paths(root: Path, row: type[Row]) -> list[Path]:
    """The CSVs of one kind under a results folder, all devices and methods; raises UserError for a folder that is shut."""
    return [path for device in _listed(root) for path in _listed(device / row.kind) if path.suffix == ".csv"]


def _listed(folder: Path) -> list[Path]:
    """What is in a folder, in order. A glob would pass over one that may not be read, and a report would lack a device."""
    with readable(folder):
        try:
            return sorted(folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []


def newest(root: Path, row: type[R], device: str, method: str) -> dict[tuple[Any, ...], R]:
    """The newest row of every key of one method, in files of any schema; empty where there is none yet."""
    found: dict[tuple[Any, ...], R] = {}
    path = csv_path(root, row, device, method)
    for file in (path, _beside(path)):
        with readable(file):
            try:
                _add_newest(found, _rows(file, row))
            except FileNotFoundError:
                continue
    return found


def csv_text(kind: type[Row], rows: Sequence[Row]) -> str:
    """What a file holds that has these rows."""
    return header_text(kind.columns()) + "".join(map(_line_of, rows))


def _upgrade(path: Path, row: type[Row]) -> None:
    """Write a file of this schema as this version writes it: with all columns, in its order.

    Raises _OlderSchema for one of an older schema, which stays as it is, and CorruptResultsError for one that is not ours.
    """
    with readable(path):
        version, rows = _read(path, row)
    if version != SCHEMA_VERSION:
        raise _OlderSchema
    replace_file(path, csv_text(row, rows))


def _line_of(row: Row) -> str:
    return line_text([field_text(value, name) for name, value in asdict(row).items()])


@dataclass(frozen=True)
class _Schema:
    """How rows of one schema lie in a file."""

    columns: Callable[[type[Row]], Sequence[str]]
    is_header: Callable[[type[Row], Sequence[str]], bool]
    translate: Callable[[dict[str, str]], dict[str, str]]
    """A line's texts by column as today's rows have them; raises ValueError, naming the column, for one that is none."""


_SCHEMAS: Final[Mapping[int, _Schema]] = {
    schema_1.VERSION: _Schema(
        columns=lambda kind: schema_1.columns(kind.kind),
        is_header=lambda kind, names: schema_1.is_header(kind.kind, names),
        translate=lambda texts: schema_1.translate(texts) | {"schema_version": str(SCHEMA_VERSION)},
    ),
    SCHEMA_VERSION: _Schema(
        columns=lambda kind: kind.columns(),
        is_header=lambda kind, names: kind.is_header(names),
        translate=lambda texts: texts,
    ),
}
"""All schemas that a file may have."""

"""Rows of several files that belong together, as interleaved ones do: kept whole before each goes where it belongs.

A row that is measured again without the others has nothing to be held against. So the rows of a set are first written to one
file, ``unfinished-<hash>.rows`` beside their CSVs, which goes when all of them are appended. A process that dies in between
leaves it, and the next run appends what is missing.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tmbench.errors import UserError
from tmbench.results.files import readable, writable
from tmbench.results.rows import Row, short_hash
from tmbench.results.tables import append, csv_path, csv_text, newest, read

PREFIX, SUFFIX = "unfinished-", ".rows"


@contextmanager
def kept_together(root: Path, rows: Sequence[Row]) -> Iterator[bool]:
    """Inside, append rows of one kind and device one by one; what an error or a kill leaves out is kept for ``finish``.

    A disk that does not take the set may still take rows: what it refuses of them, appending says. Yields whether it took it.
    """
    path = _folder(root, type(rows[0]), rows[0].device) / f"{PREFIX}{short_hash(*map(repr, rows))}{SUFFIX}"
    try:
        descriptor = _write(path, csv_text(type(rows[0]), rows))
    except OSError:
        yield False
        return
    try:
        yield True
        path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def known(root: Path, kind: type[Row], device: str, method: str) -> dict[tuple[Any, ...], Row]:
    """The newest row of every key of a method: in its CSV, or in a set that was not appended to the end.

    Raises UserError where the folder cannot be read, and CorruptResultsError for a file that is not ours.
    """
    sets = [row for path in _paths(root, kind, device) for row in _rows_of(path, kind) if row.method == method]
    have = newest(root, kind, device, method)
    return have | {row.key: row for row in sets if _is_newer(row, have)}


def finish(root: Path, kind: type[Row], device: str) -> None:
    """Append what processes that died have left out; a set whose process is still at it is left to it.

    Raises UserError where the folder cannot be written, and CorruptResultsError for a file that is not ours.
    """
    for path in (*_paths(root, kind, device), *_paths(root, kind, device, ".")):
        with writable(path):
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not path.name.startswith("."):
                    _append_missing(root, kind, _rows_of(path, kind))
                path.unlink(missing_ok=True)
            except BlockingIOError:
                continue
            finally:
                os.close(descriptor)


def _append_missing(root: Path, kind: type[Row], rows: Sequence[Row]) -> None:
    """Append those rows of which the files have neither this measurement nor a later one."""
    for row in rows:
        if _is_newer(row, newest(root, kind, row.device, row.method)):
            append(root, row)


def _is_newer(row: Row, have: Mapping[tuple[Any, ...], Row]) -> bool:
    return row.key not in have or have[row.key].time < row.time


def _rows_of(path: Path, kind: type[Row]) -> list[Row]:
    try:
        return read(path, kind)
    except UserError:
        if path.exists():
            raise
        return []  # appended to the end since the folder was listed


def _folder(root: Path, kind: type[Row], device: str) -> Path:
    return csv_path(root, kind, device, "").parent


def _paths(root: Path, kind: type[Row], device: str, hidden: str = "") -> list[Path]:
    """The sets; with "." for ``hidden`` those that were never there whole."""
    folder = _folder(root, kind, device)
    with readable(folder):
        try:
            return sorted(folder.glob(f"{hidden}{PREFIX}*{SUFFIX}{'.*' * bool(hidden)}"))
        except (FileNotFoundError, NotADirectoryError):
            return []


def _write(path: Path, text: str) -> int:
    """Write a file that is there whole or not at all; the descriptor holds its lock."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        content = text.encode()
        if os.write(descriptor, content) < len(content):
            raise OSError("No space left on device")
        os.fsync(descriptor)
        unfinished.replace(path)
    except BaseException:
        os.close(descriptor)
        unfinished.unlink(missing_ok=True)
        raise
    return descriptor

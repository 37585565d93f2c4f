"""The text of a results CSV: lines that show when they were cut, and what editors and spreadsheets make of such a file.

The first and the last field of a line stand in double quotes. So a line without its line end is whole where the last one is
closed, as an editor leaves it, and was being written when its process died where it is not.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tmbench.results.files import BYTE_ORDER_MARK


class OpenEndError(ValueError):
    """A last line of which nobody can say whether it is whole."""


@dataclass(frozen=True)
class Table:
    """The lines of a CSV that are whole."""

    header: Sequence[str]
    """The columns; none where the file has no whole line."""
    lines: Sequence[tuple[int, list[str]]]
    """The number of each other line that is not empty, from 2 on, and its fields."""


def line_text(values: Sequence[str]) -> str:
    """One line with its line end. The last value holds no quotes: a cut between two of them would look like an end."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow(values[1:-1])
    return f'"{values[0]}",{buffer.getvalue()},"{values[-1]}"\n'


def header_text(columns: Sequence[str]) -> str:
    """The first line of a file with these columns."""
    return ",".join(columns) + "\n"


def read_table(content: bytes, headers: Sequence[Sequence[str]], tells_end: Callable[[str, str], bool]) -> Table:
    """The whole lines of a CSV, a byte-order mark and the line ends of other systems aside.

    Args:
        headers: the columns that files are written with. One that holds a part of such names alone was cut there.
        tells_end: whether a column's value, not in quotes, cannot be the beginning of a longer one.

    Raises:
        ValueError: with the number of the line, for what is no CSV.
        OpenEndError: likewise, for a line without its line end that cannot be told from one that was cut.
    """
    content = content.removeprefix(BYTE_ORDER_MARK)
    start = content.rfind(b"\n") + 1
    try:
        found = _fields(content[:start].decode())
    except UnicodeDecodeError:
        raise ValueError("not text") from None
    tail = content[start:]
    if not found:
        if any(header_text(columns).encode().startswith(tail) for columns in headers):
            return Table((), ())
        header = next(csv.reader([tail.decode(errors="replace")]), [])
        return Table(header, ())
    header = found[0][1]
    if tail.strip() and b"\0" not in tail:
        number = content.count(b"\n") + 1
        found += [(number, values) for values in _last(tail, number, header, tells_end)]
    return Table(header, found[1:])


def _fields(text: str) -> list[tuple[int, list[str]]]:
    """The number and the fields of each line that is not empty."""
    reader = csv.reader(io.StringIO(text, newline=""))
    found: list[tuple[int, list[str]]] = []
    try:
        found.extend((reader.line_num, values) for values in reader)
    except csv.Error as error:
        raise ValueError(f"line {found[-1][0] + 1 if found else 1}: {error}") from None
    return [(number, values) for number, values in found if values]


def _last(tail: bytes, number: int, header: Sequence[str], tells_end: Callable[[str, str], bool]) -> list[list[str]]:
    """The fields of a line without its line end, in a list; none where it was cut."""
    try:
        text = tail.decode()
    except UnicodeDecodeError:
        return []
    line = text.removesuffix("\r")
    try:
        values = next(csv.reader([line]))
    except csv.Error as error:
        raise ValueError(f"line {number}: {error}") from None
    if len(values) < len(header) or line.count('"') % 2:
        return []
    if line.endswith('"') or line != text or len(values) > len(header) or tells_end(header[-1], values[-1]):
        return [values]
    if line.startswith('"'):
        return []
    raise OpenEndError(
        f"line {number} has no line end, so {header[-1]}, its last value, may be cut: "
        "end the line if it is whole, else delete it"
    )

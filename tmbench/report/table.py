"""A table of texts: what sections are made of, and what every writer renders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """A column by its name; texts stand on the left, figures on the right."""

    name: str
    text: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of texts, each as long as there are columns."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    details: bool = False
    """Whether a page may fold it."""

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"a row of the table {self.caption!r} has not {len(self.columns)} cells")


def columns(*names: str, texts: Sequence[str] = ()) -> list[Column]:
    """Columns in order; those named in ``texts`` hold no figures."""
    return [Column(name, name in texts) for name in names]

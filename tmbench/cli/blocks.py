"""Tables whose cells are never cut: columns that do not fit beside each other stand in blocks below each other.

The first column, which names the lines, begins every block. Texts are wrapped between words, and figures not at all; where
even one word is wider than the screen, the line is longer than the screen. Where the output is no terminal and its width
was not asked for, every line is whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

GAP = 3
"""Characters between two columns."""


@dataclass
class Blocks:
    """A table for the screen, printed like any of rich's."""

    title: str
    columns: Sequence[str]
    right: Sequence[str] = ()
    """The columns that hold figures."""
    rows: list[Sequence[str]] = field(default_factory=list)
    sections: set[int] = field(default_factory=set)
    """A line is drawn below so many rows."""

    def add_row(self, *cells: str) -> None:
        """Add a line; cells that are left out are empty."""
        self.rows.append([*cells, *[""] * (len(self.columns) - len(cells))])

    def add_section(self) -> None:
        """Draw a line below the last row."""
        self.sections.add(len(self.rows))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        whole = not console.is_terminal and "COLUMNS" not in os.environ
        widest, least = ([max(widths) for widths in self._widths(each)] for each in (True, False))
        room = sum(widest) + GAP * len(widest) if whole else options.max_width
        if self.title:
            yield Text(self.title, style="bold", no_wrap=True, overflow="ignore")
        yield ""
        for block in _blocks(least, room):
            widths = _spread([least[at] for at in block], [widest[at] for at in block], room)
            made = self._table(block, widths)
            yield from console.render(made, options.update(width=sum(widths) + GAP * (len(block) - 1)))
            yield ""

    def _widths(self, whole: bool) -> Iterator[list[int]]:
        """What each cell of a column takes, the header's words among them: on one line, or wrapped between words."""
        for at, name in enumerate(self.columns):
            cells = [row[at] for row in self.rows]
            unbroken = whole or name in self.right
            texts = [*(cells if unbroken else _words(cells)), *([name] if whole else _words([name]))]
            yield [0, *map(cell_len, texts)]

    def _table(self, block: Sequence[int], widths: Sequence[int]) -> Table:
        made = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for at, width in zip(block, widths, strict=True):
            name = self.columns[at]
            made.add_column(name, justify="right" if name in self.right else "left", width=width, overflow="fold")
        for number, row in enumerate(self.rows, start=1):
            made.add_row(*(row[at] for at in block), end_section=number in self.sections)
        return made


def _words(texts: Sequence[str]) -> list[str]:
    return [word for text in texts for word in text.split()]


def _blocks(least: Sequence[int], room: int) -> list[list[int]]:
    """The columns of each block by their places, the first column in every one."""
    found = [[0]]
    for at in range(1, len(least)):
        if len(found[-1]) > 1 and sum(least[other] + GAP for other in found[-1]) + least[at] > room:
            found.append([0])
        found[-1].append(at)
    return found


def _spread(least: Sequence[int], widest: Sequence[int], room: int) -> list[int]:
    """Widths between the two, as wide as there is room: what wants more gets more of it."""
    spare = max(0, room - sum(least) - GAP * (len(least) - 1))
    wanted = [most - few for few, most in zip(least, widest, strict=True)]
    part = min(1.0, spare / max(1, sum(wanted)))
    return [few + int(part * more) for few, more in zip(least, wanted, strict=True)]

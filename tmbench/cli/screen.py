"""What the commands show: tables on standard output, and what is said of them on standard error."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from tmbench.cli.blocks import Blocks
from tmbench.results.json_text import json_text
from tmbench.results.variants import labels

if TYPE_CHECKING:
    from tmbench.results.rows import Row


CELLS = re.compile(r"(?<!\\)\|")
"""What stands between the cells of a table of Markdown."""


class _Screen(Console):
    """A console that prints lines which are too long as they are: what is cut off of a figure makes another figure."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*objects, **{"crop": False} | options)


def console() -> Console:
    """Where results go."""
    return _console(stderr=False)


def error_console() -> Console:
    """Where everything else goes, so that results can be piped."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    # Paths, names and labels are shown as they are: nothing in them is markup or the name of an emoji.
    return (Console if stderr else _Screen)(stderr=stderr, markup=False, emoji=False)


def table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Blocks:
    """A table for the terminal, whose cells are never cut; the columns named in ``right`` hold figures."""
    return Blocks(title, columns, right)


def markdown(text: str) -> None:
    """Print Markdown for the terminal, its tables as all others."""
    from rich.markdown import Markdown

    for is_table, lines in groupby(text.splitlines(), key=lambda line: line.startswith("|")):
        if not is_table:
            console().print(Markdown("\n".join(lines)))
            continue
        header, rule, *body = ([cell.strip().replace(r"\|", "|") for cell in CELLS.split(line)[1:-1]] for line in lines)
        shown = table("", *header, right=tuple(name for name, side in zip(header, rule, strict=True) if side.endswith(":")))
        for cells in body:
            shown.add_row(*cells)
        console().print(shown)


def print_rows(rows: Sequence[Row]) -> None:
    """The rows as JSON on standard output: what ``--json`` asks for."""
    typer.echo(json_text([asdict(row) for row in rows]))


def say_nothing_measured(rows: int, remedy: str = "--overwrite measures again") -> None:
    """Tell the user that what is shown was there before."""
    there = "the row is" if rows == 1 else f"all {rows} rows are"
    say(f"nothing was measured: {there} there already; {remedy}")


def say_failures(rows: Sequence[Row]) -> None:
    """Why those of these rows that have no figures have none, a line each: their tables only say that they failed."""
    for row, name in zip(rows, labels(rows), strict=True):
        if row.status != "ok":
            place = f" on {task}" if (task := getattr(row, "task", "")) else ""
            say(f"{name}{place} at {row.length} {row.status.replace('_', ' ')}: {row.error or 'no reason is known'}")


def say(text: str) -> None:
    """One line to the user about what is done on their behalf."""
    error_console().print(text, soft_wrap=True, highlight=False, style="dim")

"""No table on the screen cuts a figure or a name, however narrow the screen is."""

from __future__ import annotations

import io
import re

import pytest

from tmbench.cli import screen
from tmbench.cli.blocks import Blocks
from tmbench.cli.screen import markdown
from tmbench.methods.table import METHODS

METHOD_NAMES = tuple(METHODS)
TASKS = ("niah_multikey_1", "vt")


def scores():
    shown = Blocks("RULER at 4096 tokens", ("task", *METHOD_NAMES), METHOD_NAMES)
    for row, task in enumerate(TASKS):
        shown.add_row(task, *(f"{100 - row - column / 10:.1f}" for column in range(len(METHOD_NAMES))))
    shown.add_section()
    shown.add_row("mean of 2", *["100.0"] * len(METHOD_NAMES))
    return shown


def printed(shown, monkeypatch, width=None, columns=None):
    """The lines as a terminal of that width shows them, or as they go through a pipe."""
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", str(columns))
    out = io.StringIO()
    console = screen._Screen(file=out, width=width, force_terminal=width is not None, no_color=True, markup=False)
    console.print(shown)
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).splitlines()]


def read(lines):
    """{(first cell, column): cell} of all blocks, whose cells hold no blanks but the first."""
    found: dict[tuple[str, str], str] = {}
    header: list[str] = []
    for line in lines:
        cells = re.split(r" {2,}", line.strip())
        if cells[0] == "task":
            header = cells
        elif header and cells[0] in (*TASKS, "mean of 2"):
            found |= {(cells[0], name): cell for name, cell in zip(header[1:], cells[1:], strict=True)}
    return found


@pytest.mark.parametrize(("width", "columns"), [(40, None), (80, None), (320, None), (None, None), (None, 40), (None, 80)])
def test_every_score_is_whole_below_its_method(width, columns, monkeypatch):
    lines = printed(scores(), monkeypatch, width, columns)
    expected = {
        (task, name): f"{100 - row - column / 10:.1f}"
        for row, task in enumerate(TASKS)
        for column, name in enumerate(METHOD_NAMES)
    }
    assert read(lines) == expected | {("mean of 2", name): "100.0" for name in METHOD_NAMES}
    assert "…" not in "".join(lines)
    if width or columns:
        assert max(map(len, lines)) <= (width or columns)
    headers = [line for line in lines if line.startswith("task")]
    assert (len(headers) == 1) == (width == 320 or (width, columns) == (None, None)), "a pipe is given whole lines"


def test_what_is_wider_than_the_screen_is_longer_than_it(monkeypatch):
    lines = printed(scores(), monkeypatch, width=10)
    assert len(read(lines)) == 3 * len(METHOD_NAMES)


def test_texts_are_wrapped_between_words_and_figures_are_not(monkeypatch):
    shown = Blocks("", ("method", "points", "what it does"), ("points",))
    shown.add_row(
        "tri_mix (layers 2,4,6-7)", "-2.1 (-3.8 to -0.8)", "dense shallow layers and triangle attention in deep ones"
    )
    lines = printed(shown, monkeypatch, width=50)
    assert any("-2.1 (-3.8 to -0.8)" in line for line in lines)
    words = " ".join(lines).split()
    assert {"tri_mix", "(layers", "2,4,6-7)", "attention", "triangle"} <= set(words)
    assert max(map(len, lines)) <= 50


def test_rows_that_lack_cells_are_filled(monkeypatch):
    shown = Blocks("Agreement", ("method", "a", "b"), ("a", "b"))
    shown.add_row("tri_mix", "out of memory")
    assert [line for line in printed(shown, monkeypatch) if line][-1] == "tri_mix   out of memory"


def test_a_report_on_the_screen_cuts_nothing_either(monkeypatch):
    out = io.StringIO()
    console = screen._Screen(file=out, width=60, force_terminal=True, no_color=True, markup=False)
    monkeypatch.setattr(screen, "console", lambda: console)
    cells = "| " + " | ".join(f"{number}.123 (-12 %)" for number in range(8)) + " |"
    header = "| method | " + " | ".join(f"{2**number}K" for number in range(8)) + " |"
    rule = "|:-------|" + "|".join(["---:"] * 8) + "|"
    markdown(f"# tmbench report\n\nSeconds:\n\n{header}\n{rule}\n| a\\|b {cells}\n\n- a note\n")
    text = out.getvalue()
    assert all(f"{number}.123 (-12 %)" in text for number in range(8))
    assert "a|b" in text
    assert "a note" in text

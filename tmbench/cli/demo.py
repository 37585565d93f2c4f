"""``tmbench demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tmbench.cli import options as o
from tmbench.cli.screen import say
from tmbench.results.words import length_name

LENGTHS = (2048, 4096, 8192, 16384)
RULER_LENGTH = 2048
SECONDS = 200.0
"""What all times together may take on two cores, so that the whole demo takes six minutes."""
FIRST, FEWEST, MOST = 8, 3, 12
"""Repeats of the first length, and of the others at least and at most."""


def demo(
    length: Annotated[list[int] | None, o.length_option(" ".join(map(length_name, LENGTHS)))] = None,
    repeats: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Timed repeats.",
            rich_help_panel=o.MEASURED,
            show_default="as many as the time allows: more of short prompts",
        ),
    ] = None,
    ruler_length: Annotated[
        int | None,
        typer.Option(
            parser=o.parse_length,
            metavar="TOKENS",
            help="Tokens of the samples.",
            rich_help_panel=o.MEASURED,
            show_default=length_name(RULER_LENGTH),
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples of each task.", rich_help_panel=o.MEASURED)] = 2,
    output_dir: o.OutputDirOption = Path("demo"),
) -> None:
    """Time four methods, ask the 13 RULER tasks and render the report, on the embedded model, in about six minutes.

    Each step is a command that is shown before it runs.
    """
    where = ("--output-dir", str(output_dir))
    lengths = sorted(set(length or LENGTHS))
    before: int | None = None
    for tokens in lengths:
        times = repeats or _repeats(output_dir, before, tokens, SECONDS / len(lengths))
        _step("ttft", "--length", length_name(tokens), "--repeats", str(times), *where)
        before = tokens
    _step("ruler", "--length", length_name(ruler_length or RULER_LENGTH), "--samples", str(samples), "--offline", *where)
    report, plots, pages = (str(output_dir / name) for name in ("report.md", "plots", "pages"))
    _step("report", "--results", str(output_dir), "--output", report, "--plots", plots, "--html", pages)
    _step("report", "--results", str(output_dir))


def _repeats(root: Path, before: int | None, length: int, seconds: float) -> int:
    """How many rounds of all methods fit into the seconds, from the time that one took at a shorter length."""
    from tmbench.results.rows import TtftRow
    from tmbench.results.tables import read_all

    if before is None:
        return FIRST
    took = sum(row.ttft_median_s or 0.0 for row in read_all(root, TtftRow) if row.length == before)
    # Attention, which is nearly all of a long prompt's time, grows with the square; the warm-up is a round too.
    rounds = seconds / took / (length / before) ** 2 - 1 if took else FEWEST
    return max(FEWEST, min(MOST, int(rounds)))


def _step(*arguments: str) -> None:
    from tmbench.cli import app

    say(f"$ tmbench {' '.join(arguments)}")
    if code := app(list(arguments), standalone_mode=False):
        raise typer.Exit(code)

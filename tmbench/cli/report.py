"""``tmbench report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tmbench.cli import options as o
from tmbench.cli.screen import console, markdown, say
from tmbench.errors import UserError

MARGIN = 1.0
"""``tmbench.report.intervals.MARGIN``, which help must not import numpy for."""


def report(
    results: Annotated[Path, typer.Option("--results", help="Folder of result files.")] = o.RESULTS,
    form: Annotated[
        Literal["md", "csv", "json"], typer.Option("--format", help="Tables, or every figure in long form.")
    ] = "md",
    margin: Annotated[
        float, typer.Option(help="The loss in points of a hundred that nobody minds; above 0 and at most 100.")
    ] = MARGIN,
    output: Annotated[Path | None, typer.Option(help="Write to this file.", show_default="the terminal")] = None,
    plots: Annotated[Path | None, typer.Option(help="Draw the plots into this folder too.")] = None,
) -> None:
    """Render what was measured, from the result files alone: TTFT, break-even lengths and RULER, one section per device."""
    from tmbench.report.rendering import build
    from tmbench.results.files import writable, write_whole

    if not 0 < margin <= 100:
        raise UserError(f"--margin must be above 0 and at most 100 points, not {margin:g}: 1 is usual")
    built = build(results, margin)
    text = {"md": built.markdown, "csv": built.csv, "json": built.json}[form]()
    if plots is not None:
        from tmbench.report.plots import draw
        from tmbench.report.probe_plot import draw_all

        with writable(plots, "--plots"):
            for path in (*draw(built, plots), *draw_all(results, plots)):
                say(f"drew {path}")
    if output is not None:
        with writable(output, "--output"):
            write_whole(output, text)
        say(f"wrote {output}")
    elif form == "md" and console().is_terminal:
        markdown(text)
    else:
        typer.echo(text)

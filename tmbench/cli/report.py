"""``tmbench report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tmbench.cli import options as o
from tmbench.cli.progress import late_bar
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
        float, typer.Option(help="The non-inferiority margin, in points of a hundred; above 0 and at most 100.")
    ] = MARGIN,
    output: Annotated[Path | None, typer.Option(help="Write to this file.", show_default="the terminal")] = None,
    plots: Annotated[Path | None, typer.Option(help="Draw the plots into this folder too.")] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write pages to look at into this folder, in place of the text in the terminal."),
    ] = None,
) -> None:
    """Render what was measured, from the result files alone: TTFT, RULER, token agreement, losses, probes and choices of
    layers, by device.
    """
    from tmbench.report import writers
    from tmbench.report.report import build
    from tmbench.results.files import writable, write_whole

    if not 0 < margin <= 100:
        raise UserError(f"--margin must be above 0 and at most 100 points, not {margin:g}: 1 is usual")
    if html is not None and output is None and form != "md":
        raise UserError(f"--html writes pages, so --format {form} needs a file of its own: add --output")
    with late_bar("reading results") as tell:
        built = build(results, margin, tell)
    if plots is not None:
        from tmbench.report.pictures import figures, save_all

        with writable(plots, "--plots"):
            for path in save_all(figures(built), plots):
                say(f"drew {path}")
    if html is not None:
        from tmbench.report.html.pages import written

        with writable(html, "--html"), late_bar("writing pages") as tell:
            first = list(written(built, results, html, tell))[-1]
        say(f"wrote {first}")
    if html is not None and output is None:
        return
    if output is None and form == "md" and console().is_terminal:
        markdown(writers.report_markdown(built, folds=False))
        return
    text = {"md": writers.report_markdown, "csv": writers.report_csv, "json": writers.report_json}[form](built)
    if output is None:
        typer.echo(text)
        return
    with writable(output, "--output"):
        write_whole(output, text)
    say(f"wrote {output}")

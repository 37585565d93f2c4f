"""A picture of accuracy kept against time saved."""

from __future__ import annotations

import textwrap

from matplotlib.figure import Figure

from tmbench.report.plot_style import (
    COLOURS,
    GREY,
    LABEL_PT,
    MARGINS_INCH,
    MARKERS,
    PALE,
    ROW_INCH,
    method_look,
    plain_axes,
    titles,
)
from tmbench.report.tradeoff import TradeOff


def trade_off_figure(section: TradeOff) -> Figure:
    """Points against dense over the time saved; the Pareto front as steps, the methods by number, listed at the side."""
    names = [f"{number} {cell.label}" for number, cell in enumerate(section.cells, start=1)]
    words = [textwrap.wrap(name, 44, subsequent_indent="   ") for name in names]
    height = max(4.9, MARGINS_INCH + ROW_INCH * sum(len(lines) + 0.3 for lines in words))
    figure = Figure(figsize=(8.4, height), layout="constrained")
    axes = figure.subplots()
    heading, _, about = section.title.partition(": ")
    titles(figure, heading, f"{about}, {section.cells[0].row.device_name}")
    axes.axhline(-section.scores.answers.margin, color=PALE, linewidth=1.2, linestyle=":")
    front = [(0.0, 0.0), *((cell.saved_percent, cell.difference.mean) for cell in section.cells if cell.front)]
    # A corner of the front holds up to the next one: nothing measured keeps more at so much time saved.
    axes.step(*zip(*front, strict=True), where="pre", color=PALE, linewidth=1.5, zorder=1)
    axes.plot(0, 0, color=COLOURS[0], marker=MARKERS[0], markersize=7)
    axes.annotate("dense", (0, 0), (6, 6), textcoords="offset points", fontsize=LABEL_PT, weight="bold")
    row_height = ROW_INCH / (height - MARGINS_INCH)
    top = 1.0
    for number, (cell, lines) in enumerate(zip(section.cells, words, strict=True), start=1):
        x, y = cell.saved_percent, cell.difference.mean
        left, right = (x if end is None else end for end in (cell.saved_low, cell.saved_high))
        colour, marker, _ = method_look(cell.row.method)
        axes.errorbar(
            x,
            y,
            xerr=[[max(x - left, 0)], [max(right - x, 0)]],
            yerr=[[max(y - cell.difference.low, 0)], [max(cell.difference.high - y, 0)]],
            color=colour,
            marker=marker,
            markersize=6,
            markerfacecolor=colour if cell.front else "white",
            elinewidth=1,
            alpha=0.9,
        )
        axes.annotate(
            str(number), (x, y), (5, 4), textcoords="offset points", fontsize=LABEL_PT, color=colour, weight="bold"
        )
        for line in lines:
            bold = "bold" if cell.front else "normal"
            axes.annotate(
                line, (1.03, top), xycoords="axes fraction", va="center", annotation_clip=False, color=colour, weight=bold,
                size=LABEL_PT - 1,
            )  # fmt: skip
            top -= row_height
        top -= 0.3 * row_height
    apart = any(cell.saved_low is None for cell in section.cells)
    below = "filled: on the Pareto front" + "; without a bar: not timed in the same rounds as dense" * apart
    axes.set_xlabel(f"time saved against dense, %, 95 % interval\n{below}", color=GREY, fontsize=LABEL_PT)
    axes.set_ylabel(
        f"RULER points against dense, 95 % interval\ndotted: a loss of {section.scores.answers.margin:g}",
        color=GREY,
        fontsize=LABEL_PT,
    )
    plain_axes(axes)
    return figure

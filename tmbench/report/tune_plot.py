"""A picture of a search for layers: the sets that were tried one after the other, and what sets lose and save."""

from __future__ import annotations

import textwrap

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from tmbench.methods.layers import parse_layers
from tmbench.report.plot_style import COLOURS, GREY, LABEL_PT, PALE, plain_axes, titles
from tmbench.report.tune import TuneCell, TuneSection
from tmbench.results.tune_rows import CHECK, COMPARISON, SEARCH
from tmbench.results.words import counted

VERDICTS = {"accepted": COLOURS[3], "refused": COLOURS[2], "undecided": GREY}


def tune_figure(section: TuneSection) -> Figure:
    """On the left a column for each trial of search and check, on the right loss and time of what was compared."""
    figure = Figure(figsize=(10.4, 5.2), layout="constrained")
    path, compared = figure.subplots(1, 2, width_ratios=(3, 2))
    _path(path, section)
    _compared(compared, section)
    about = f"{section.title.partition(': ')[2]}; {section.cells[0].row.device_name}"
    titles(figure, "Layers tried, and what they lose", about)
    return figure


def _layers(cell: TuneCell) -> tuple[int, ...]:
    return parse_layers(cell.layers, cell.row.model_layers)


def _path(axes: Axes, section: TuneSection) -> None:
    """A column for each trial: its layers, coloured by how it ended."""
    tried = [*section.stage(SEARCH), *section.stage(CHECK)]
    for place, cell in enumerate(tried, 1):
        colour = VERDICTS.get(cell.row.verdict, PALE)
        for layer in _layers(cell):
            axes.add_patch(Rectangle((place - 0.42, layer - 0.42), 0.84, 0.84, facecolor=colour))
    count = max(cell.row.model_layers for cell in tried)
    searched = len(section.stage(SEARCH))
    axes.axvline(searched + 0.5, color=GREY, linewidth=0.9)
    axes.text(searched + 0.6, count - 0.4, "check", fontsize=LABEL_PT, color=GREY, va="bottom")
    axes.set(xlim=(0.4, len(tried) + 0.6), ylim=(-0.6, count + 0.6), xlabel="trial", ylabel="layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    plain_axes(axes)
    axes.legend(
        handles=[Patch(color=colour, label=word) for word, colour in VERDICTS.items()],
        fontsize=LABEL_PT, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3,
    )  # fmt: skip


def _compared(axes: Axes, section: TuneSection) -> None:
    """Time against the capped difference, the margin as a line."""
    cells = [cell for cell in section.stage(COMPARISON) if cell.figure is not None]
    margin = section.cells[0].row.margin
    axes.axvline(margin, color=GREY, linewidth=0.9, linestyle="--")
    axes.annotate(
        "margin ", (margin, 1.0), xycoords=("data", "axes fraction"), fontsize=LABEL_PT, color=GREY, ha="right", va="top"
    )
    for name, wanted, colour, marker, size in (
        ("random", [cell for cell in cells if cell.is_random], GREY, "o", 22),
        ("rules", [cell for cell in cells if not cell.is_random and not cell.row.chosen], COLOURS[1], "s", 34),
        ("chosen", [cell for cell in cells if cell.row.chosen], COLOURS[3], "*", 150),
    ):
        points = [
            (cell.figure, cell.row.time_vs_dense)
            for cell in wanted
            if cell.figure is not None and cell.row.time_vs_dense is not None
        ]
        if points:
            label = f"{name}: {counted(len(points), 'set')}"
            axes.scatter(
                [x for x, _ in points], [y for _, y in points], color=colour, marker=marker, s=size, label=label, alpha=0.85
            )
    axes.set(xlabel="capped difference to dense, nats per token", ylabel="time against dense")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    plain_axes(axes)
    if cells:
        axes.legend(fontsize=LABEL_PT, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=1)
    else:
        words = textwrap.fill("nothing was chosen, so nothing was compared", 26)
        axes.text(0.5, 0.5, words, ha="center", color=GREY, transform=axes.transAxes, fontsize=LABEL_PT)

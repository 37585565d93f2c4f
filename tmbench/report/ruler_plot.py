"""A picture of RULER scores: a heat map of tasks and methods."""

from __future__ import annotations

import textwrap
from math import nan

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tmbench.report.plot_style import LABEL_PT, TEXT_PT, titles
from tmbench.report.ruler import MANY_METHODS, RulerSection
from tmbench.report.section import STATUS_WORDS


def ruler_figure(section: RulerSection) -> Figure:
    """Scores by task and method."""
    scores, averages = section.scores, section.averages
    rows = [*section.tasks, f"average of {len(section.common_tasks)}"]
    # Many methods are lines, as in the report's table, and few are columns.
    turned = len(section.labels) > MANY_METHODS
    columns, lines = (rows, section.labels) if turned else (section.labels, rows)
    width, height = 3.2 + 1.15 * len(columns), 2.0 + 0.34 * len(lines)
    figure = Figure(figsize=(max(width, 6.4), height), layout="constrained")
    axes = figure.subplots()
    heading, _, about = section.title.partition(": ")
    titles(figure, f"{heading}: scores from 0 to 100", f"{about}, {section.cells[0].row.device_name}")
    colours = colormaps["Blues"]
    statuses = {(cell.row.task, cell.label): cell.row.status for cell in section.cells}
    for x, label in enumerate(section.labels):
        for y, task in enumerate(rows):
            last = y == len(rows) - 1
            value = averages.get(label, nan) if last else scores[label].get(task, nan)
            known = value == value
            place = y + 0.25 * last
            fill = colours(0.04 + 0.0084 * value) if known else (0.93, 0.93, 0.93, 1.0)
            dark = known and 0.3 * fill[0] + 0.59 * fill[1] + 0.11 * fill[2] < 0.5
            status = STATUS_WORDS.get(statuses.get((task, label), ""), "-").replace("out of ", "out of\n")
            score = f"{value:.1f}" if last else f"{round(value, 2):g}"
            text = score if known else status
            left, top = (place, x) if turned else (x, place)
            axes.add_patch(Rectangle((left - 0.5, top - 0.5), 1, 1, facecolor=fill, edgecolor="white", linewidth=1.5))
            size = TEXT_PT if known else 7.0
            axes.text(left, top, text, ha="center", va="center", fontsize=size, color="white" if dark else "black")
    places = [*range(len(rows) - 1), len(rows) - 0.75]
    if turned:
        axes.set(xlim=(-0.5, len(rows) - 0.2), ylim=(len(section.labels) - 0.5, -0.5))
        axes.set_xticks(places, rows)
        axes.set_yticks(range(len(section.labels)), section.labels)
    else:
        axes.set(xlim=(-0.5, len(section.labels) - 0.5), ylim=(len(rows) - 0.2, -0.5))
        axes.set_xticks(
            range(len(section.labels)), [textwrap.fill(label.replace(" (", "\n("), 22) for label in section.labels]
        )
        axes.set_yticks(places, rows)
    axes.tick_params(length=0, labelsize=LABEL_PT)
    axes.tick_params(axis="x", top=True, labeltop=True, bottom=False, labelbottom=False)
    (axes.get_xticklabels() if turned else axes.get_yticklabels())[-1].set_fontweight("bold")
    axes.spines[:].set_visible(False)
    return figure

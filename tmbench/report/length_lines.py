"""Lines over the prompt's length, labelled where they end."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from math import log2

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from tmbench.report.plot_style import GREY, LABEL_PT, MARGINS_INCH, ROW_INCH, Look, method_look, plain_axes, titles
from tmbench.report.section import STATUS_WORDS
from tmbench.report.ttft import TtftSection
from tmbench.results.words import length_name

NAME_WIDTH = 0.06
"""What the name of a length takes of the axis of lengths."""


@dataclass(frozen=True)
class Line:
    """One method's line: how it looks, its points, and the words at its end."""

    look: Look
    lengths: Sequence[int]
    values: Sequence[float]
    words: Sequence[str]

    def draw(self, axes: Axes) -> None:
        axes.plot(
            self.lengths,
            self.values,
            color=self.look.colour,
            marker=self.look.marker,
            linestyle=self.look.line,
            linewidth=2,
            markersize=5.5,
            markeredgecolor="white",
            markeredgewidth=0.8,
        )


def line_of(section: TtftSection, label: str, values: dict[int, float], words: Sequence[str]) -> Line:
    method = next(cell.row.method for cell in section.cells if cell.label == label)
    variants = list(dict.fromkeys(cell.label for cell in section.cells if cell.row.method == method))
    return Line(method_look(method, variants.index(label)), list(values), list(values.values()), words)


def canvas(heading: str, section: TtftSection, lines: Sequence[Line]) -> tuple[Figure, Axes]:
    """A figure high enough for the words at the ends of the lines."""
    height = max(4.9, MARGINS_INCH + ROW_INCH * sum(len(line.words) + 0.3 for line in lines))
    figure = Figure(figsize=(8.4, height), layout="constrained")
    axes = figure.subplots()
    titles(figure, heading, f"{section.title.partition(': ')[2]}, {section.cells[0].row.device_name}")
    return figure, axes


def finish(figure: Figure, axes: Axes, section: TtftSection, lines: Sequence[Line]) -> None:
    """Everything that both line plots share: the lines and their labels, the length axis, the grid."""
    for line in lines:
        line.draw(axes)
    lengths = sorted({cell.row.length for cell in section.cells})
    axes.set_xscale("log", base=2)
    axes.set_xlim(lengths[0] / 1.12, lengths[-1] * 1.12)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    named = named_lengths(lengths)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: length_name(round(n)) if round(n) in named else ""))
    bad: dict[str, list[str]] = {}
    for cell in section.cells:
        if cell.row.status in STATUS_WORDS:
            bad.setdefault(STATUS_WORDS[cell.row.status], []).append(f"{cell.label} at {length_name(cell.row.length)}")
    below = [textwrap.fill(f"{words}: {', '.join(places)}", 100) for words, places in bad.items()]
    axes.set_xlabel("\n".join(["prompt length, tokens", *below]), color=GREY, fontsize=LABEL_PT)
    plain_axes(axes)
    _label_ends(figure, axes, lines)


def named_lengths(lengths: Sequence[int]) -> list[int]:
    """Of these lengths on a logarithmic axis those whose names do not overlap; powers of two come first."""
    gap = NAME_WIDTH * log2(lengths[-1] / lengths[0])
    named: list[int] = []
    for length in sorted(lengths, key=lambda length: (length.bit_count() > 1, length)):
        if all(abs(log2(length / other)) > gap for other in named):
            named.append(length)
    return named


def _label_ends(figure: Figure, axes: Axes, lines: Sequence[Line]) -> None:
    """Write each line's words to the right of the plot, level with its end, and moved apart where they would overlap."""
    row = ROW_INCH / (figure.get_figheight() - MARGINS_INCH)  # in heights of the axes
    axes.autoscale_view()  # the limits must be final before anything is placed by them
    to_axes = axes.transData + axes.transAxes.inverted()
    points = [to_axes.transform((line.lengths[-1], line.values[-1])) for line in lines]
    ends = [(float(point[0]), float(point[1]), line) for point, line in zip(points, lines, strict=True)]
    ends.sort(key=lambda end: end[1])
    tops: list[float] = []
    lowest = -0.02
    for _, y, line in ends:
        below = row * (len(line.words) - 0.4)
        tops.append(max(y, lowest + below))
        lowest = tops[-1] + row * 0.6
    # What was pushed out at the top moves everything below it down again.
    highest = 1.04
    for index in range(len(ends) - 1, -1, -1):
        tops[index] = min(tops[index], highest - row * 0.6)
        highest = tops[index] - row * (len(ends[index][2].words) - 0.4)
    for (x, y, line), top in zip(ends, tops, strict=True):
        leader = {"arrowstyle": "-", "color": line.look.colour, "alpha": 0.45, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 4}
        axes.annotate("", xy=(x, y), xytext=(1.025, top), xycoords="axes fraction", arrowprops=leader)
        for index, words in enumerate(line.words):
            axes.annotate(
                words,
                (1.03, top - row * index),
                xycoords="axes fraction",
                va="center",
                annotation_clip=False,
                color=GREY if index else line.look.colour,
                weight="normal" if index else "bold",
                size=LABEL_PT - 1.5 * (index > 0),
            )

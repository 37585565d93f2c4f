"""Plots of a report: TTFT and speed-up against the prompt's length, RULER scores as a heat map, and accuracy against time.

A method has the same colour and marker in every plot. Lines are labelled where they end; a speed-up carries what the method
kept, as everywhere. Figures are drawn without pyplot, so that no global state is touched and no display is needed.
"""

from __future__ import annotations

import hashlib
import io
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from math import log2
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from tmbench.methods.table import METHODS
from tmbench.report.groups import MANY_METHODS, STATUS_WORDS, RulerGroup, TtftGroup
from tmbench.report.rendering import Report
from tmbench.report.time_intervals import FASTER, SLOWER
from tmbench.report.tradeoff import TradeOff
from tmbench.results.files import write_whole
from tmbench.results.words import length_name

COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's palette, told apart with any kind of colour blindness; black is for dense, the first of the methods."""
MARKERS = "osD^vPX"
DASHES = ("-", "--", ":", "-.")
GREY, PALE = "#5f6368", "#dadce0"
TEXT_PT, LABEL_PT = 10.0, 9.0
ROW_INCH, MARGINS_INCH = 0.17, 1.45
"""The height of a line of words, and what the titles and the axis take of a figure's height."""
NAME_WIDTH = 0.06
"""What the name of a length takes of the axis of lengths."""


def draw(report: Report, directory: Path) -> list[Path]:
    """Draw every group of a report as PNG files into a folder, made where it does not exist; returns their paths.

    A group's file names are always the same. Raises OSError where the folder cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Figure] = {}
    for times in report.ttft:
        if times.measured():
            figures[_name("ttft", times)] = _ttft(times)
        if any(row["percent_vs_dense"] is not None for row in times.rows):
            figures[_name("speed-up", times)] = _speed_up(report, times)
    for scores in report.ruler:
        if scores.measured():
            figures[_name("ruler", scores)] = _heat_map(scores)
    for trade_off in report.trade_offs:
        figures[_name("trade-off", trade_off)] = _trade_off(trade_off)
    paths = []
    for name, figure in figures.items():
        paths.append(directory / name)
        save(figure, paths[-1])
    return paths


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file, its folder made where there is none: whole, or the file stays as it was.

    Raises OSError where the file cannot be written.
    """
    picture = io.BytesIO()
    # Without a date and a version the same figure makes the same file.
    figure.savefig(picture, format="png", dpi=160, metadata={"Software": None})
    write_whole(path, picture.getvalue())


@dataclass(frozen=True)
class _Line:
    """One method's line: how it looks, its points, and the words at its end."""

    colour: str
    marker: str
    dashes: str
    lengths: Sequence[int]
    values: Sequence[float]
    words: Sequence[str]

    def draw(self, axes: Axes) -> None:
        axes.plot(
            self.lengths,
            self.values,
            color=self.colour,
            marker=self.marker,
            linestyle=self.dashes,
            linewidth=2,
            markersize=5.5,
            markeredgecolor="white",
            markeredgewidth=0.8,
        )


def _line(group: TtftGroup, label: str, values: dict[int, float], words: Sequence[str]) -> _Line:
    method = next(row["method"] for row in group.rows if row["label"] == label)
    variants = list(dict.fromkeys(row["label"] for row in group.rows if row["method"] == method))
    place = list(METHODS).index(method) if method in METHODS else len(METHODS)
    # Beyond seven methods colours return with other markers.
    marker = MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]
    dashes = DASHES[variants.index(label) % len(DASHES)]
    return _Line(COLOURS[place % len(COLOURS)], marker, dashes, list(values), list(values.values()), words)


def _ttft(group: TtftGroup) -> Figure:
    times = {label: group.measured(label) for label in group.labels if group.measured(label)}
    lines = [_line(group, label, {row["length"]: row["ttft_median_s"] for row in times[label]}, [label]) for label in times]
    figure, axes = _canvas("Time to first token", group, lines)
    axes.set_yscale("log")
    for line, rows in zip(lines, times.values(), strict=True):
        low, high = [row["ttft_min_s"] for row in rows], [row["ttft_max_s"] for row in rows]
        axes.fill_between(line.lengths, low, high, color=line.colour, alpha=0.15, linewidth=0)
        axes.vlines(line.lengths, low, high, color=line.colour, alpha=0.5, linewidth=1)
    _finish(figure, axes, group, lines)
    bottom, top = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if top / bottom < 1000 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("seconds, median; band from minimum to maximum", color=GREY, fontsize=LABEL_PT)
    return figure


def _speed_up(report: Report, group: TtftGroup) -> Figure:
    lines = []
    for label in group.labels:
        percents = {row["length"]: 0 if label == "dense" else row["percent_vs_dense"] for row in group.measured(label)}
        ratios = {length: 1 / (1 + percent / 100) for length, percent in percents.items() if percent is not None}
        if ratios:
            fidelity = [] if label == "dense" else report.fidelity(group, label).split("; ")
            words = [label, *(["fidelity not measured"] if fidelity == ["not measured"] else fidelity)]
            lines.append(_line(group, label, ratios, [*words, *_unsure(group, label)]))
    figure, axes = _canvas("Speed-up over dense attention", group, lines)
    values = [value for line in lines for value in line.values]
    axes.set_ylim(min(0.9, *values) * 0.92, max(1.1, *values) * 1.08)
    if max(values) / min(1, *values) > 4:
        axes.set_yscale("log", base=2)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    _finish(figure, axes, group, lines)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))  # noqa: RUF001 the sign is meant
    axes.set_ylabel("dense time / method's time: above 1 is faster", color=GREY, fontsize=LABEL_PT)
    return figure


def _unsure(group: TtftGroup, label: str) -> list[str]:
    """Where a time is neither faster nor slower than dense's, in words."""
    places: dict[str, list[str]] = {}
    for row in group.measured(label):
        if row["time_verdict"] not in ("", FASTER, SLOWER):
            places.setdefault(row["time_verdict"], []).append(length_name(row["length"]))
    return [f"{words} at {', '.join(names)}" for words, names in places.items()]


def _heat_map(group: RulerGroup) -> Figure:
    scores, averages = group.scores, group.averages
    rows = [*scores.index, f"average of {len(group.common_tasks)}"]
    # Many methods are lines, as in the report's table, and few are columns.
    turned = len(group.labels) > MANY_METHODS
    columns, lines = (rows, group.labels) if turned else (group.labels, rows)
    width, height = 3.2 + 1.15 * len(columns), 2.0 + 0.34 * len(lines)
    figure = Figure(figsize=(max(width, 6.4), height), layout="constrained")
    axes = figure.subplots()
    heading, _, about = group.title.partition(": ")
    _titles(figure, f"{heading}: scores from 0 to 100", f"{about}, {group.rows[0]['device_name']}")
    colours = colormaps["Blues"]
    statuses = {(row["task"], row["label"]): row["status"] for row in group.rows}
    for x, label in enumerate(group.labels):
        for y, task in enumerate(rows):
            last = y == len(rows) - 1
            value = averages.get(label, float("nan")) if last else float(scores.loc[task, label])
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
        axes.set(xlim=(-0.5, len(rows) - 0.2), ylim=(len(group.labels) - 0.5, -0.5))
        axes.set_xticks(places, rows)
        axes.set_yticks(range(len(group.labels)), group.labels)
    else:
        axes.set(xlim=(-0.5, len(group.labels) - 0.5), ylim=(len(rows) - 0.2, -0.5))
        axes.set_xticks(range(len(group.labels)), [textwrap.fill(label.replace(" (", "\n("), 22) for label in group.labels])
        axes.set_yticks(places, rows)
    axes.tick_params(length=0, labelsize=LABEL_PT)
    axes.tick_params(axis="x", top=True, labeltop=True, bottom=False, labelbottom=False)
    (axes.get_xticklabels() if turned else axes.get_yticklabels())[-1].set_fontweight("bold")
    axes.spines[:].set_visible(False)
    return figure


def _trade_off(group: TradeOff) -> Figure:
    """Points against dense over the time saved; the front as steps, and the methods by number, listed at the side."""
    names = [f"{number} {row['label']}" for number, row in enumerate(group.rows, start=1)]
    words = [textwrap.wrap(name, 44, subsequent_indent="   ") for name in names]
    height = max(4.9, MARGINS_INCH + ROW_INCH * sum(len(lines) + 0.3 for lines in words))
    figure = Figure(figsize=(8.4, height), layout="constrained")
    axes = figure.subplots()
    heading, _, about = group.title.partition(": ")
    _titles(figure, heading, f"{about}, {group.rows[0]['device_name']}")
    axes.axhline(-group.scores.margin, color=PALE, linewidth=1.2, linestyle=":")
    front = [(0.0, 0.0), *((row["saved_percent"], row["difference"]) for row in group.rows if row["front"])]
    # A corner of the front holds up to the next one: nothing measured keeps more at so much time saved.
    axes.step(*zip(*front, strict=True), where="pre", color=PALE, linewidth=1.5, zorder=1)
    axes.plot(0, 0, color=COLOURS[0], marker=MARKERS[0], markersize=7)
    axes.annotate("dense", (0, 0), (6, 6), textcoords="offset points", fontsize=LABEL_PT, weight="bold")
    row_height = ROW_INCH / (height - MARGINS_INCH)
    top = 1.0
    for number, (row, lines) in enumerate(zip(group.rows, words, strict=True), start=1):
        x, y = row["saved_percent"], row["difference"]
        left, right = (x if row[end] is None else row[end] for end in ("saved_low", "saved_high"))
        place = list(METHODS).index(row["method"]) if row["method"] in METHODS else len(METHODS)
        colour = COLOURS[place % len(COLOURS)]
        axes.errorbar(
            x,
            y,
            xerr=[[max(x - left, 0)], [max(right - x, 0)]],
            yerr=[[max(y - row["difference_low"], 0)], [max(row["difference_high"] - y, 0)]],
            color=colour,
            marker=MARKERS[(place + place // len(COLOURS)) % len(MARKERS)],
            markersize=6,
            markerfacecolor=colour if row["front"] else "white",
            elinewidth=1,
            alpha=0.9,
        )
        axes.annotate(
            str(number), (x, y), (5, 4), textcoords="offset points", fontsize=LABEL_PT, color=colour, weight="bold"
        )
        for line in lines:
            bold = "bold" if row["front"] else "normal"
            axes.annotate(
                line, (1.03, top), xycoords="axes fraction", va="center", annotation_clip=False, color=colour, weight=bold,
                size=LABEL_PT - 1,
            )  # fmt: skip
            top -= row_height
        top -= 0.3 * row_height
    apart = any(row["saved_low"] is None for row in group.rows)
    below = "filled: on the front" + "; without a bar: not timed in the same rounds as dense" * apart
    axes.set_xlabel(f"time saved against dense, %, 95 % interval\n{below}", color=GREY, fontsize=LABEL_PT)
    axes.set_ylabel(
        f"RULER points against dense, 95 % interval\ndotted: a loss of {group.scores.margin:g}",
        color=GREY,
        fontsize=LABEL_PT,
    )
    axes.grid(color=PALE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE)
    axes.tick_params(which="both", color=PALE, labelsize=LABEL_PT)
    return figure


def _canvas(heading: str, group: TtftGroup, lines: Sequence[_Line]) -> tuple[Figure, Axes]:
    """A figure high enough for the words at the ends of the lines."""
    height = max(4.9, MARGINS_INCH + ROW_INCH * sum(len(line.words) + 0.3 for line in lines))
    figure = Figure(figsize=(8.4, height), layout="constrained")
    axes = figure.subplots()
    _titles(figure, heading, f"{group.title.partition(': ')[2]}, {group.rows[0]['device_name']}")
    return figure, axes


def _titles(figure: Figure, heading: str, about: str) -> None:
    """A bold heading and grey lines below it, from the left edge on."""
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(about, int(width * 13))
    # The layout makes room for the one heading only: its empty lines keep a place for what is written below it.
    figure.suptitle(heading + "\n" * len(lines), x=0.012, ha="left", fontsize=13, weight="bold")
    figure.text(0.012, 1 - 0.33 / height, "\n".join(lines), va="top", fontsize=LABEL_PT, color=GREY)


def _finish(figure: Figure, axes: Axes, group: TtftGroup, lines: Sequence[_Line]) -> None:
    """Everything that both line plots share: the lines and their labels, the length axis, the grid."""
    for line in lines:
        line.draw(axes)
    lengths = sorted({row["length"] for row in group.rows})
    axes.set_xscale("log", base=2)
    axes.set_xlim(lengths[0] / 1.12, lengths[-1] * 1.12)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    named = _named_lengths(lengths)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: length_name(round(n)) if round(n) in named else ""))
    bad: dict[str, list[str]] = {}
    for row in group.rows:
        if row["status"] in STATUS_WORDS:
            bad.setdefault(STATUS_WORDS[row["status"]], []).append(f"{row['label']} at {length_name(row['length'])}")
    below = [textwrap.fill(f"{words}: {', '.join(places)}", 100) for words, places in bad.items()]
    axes.set_xlabel("\n".join(["prompt length, tokens", *below]), color=GREY, fontsize=LABEL_PT)
    axes.grid(color=PALE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE)
    axes.tick_params(which="both", color=PALE, labelsize=LABEL_PT)
    _label_ends(figure, axes, lines)


def _named_lengths(lengths: Sequence[int]) -> list[int]:
    """Of these lengths on a logarithmic axis those whose names do not overlap; powers of two come first."""
    gap = NAME_WIDTH * log2(lengths[-1] / lengths[0])
    named: list[int] = []
    for length in sorted(lengths, key=lambda length: (length.bit_count() > 1, length)):
        if all(abs(log2(length / other)) > gap for other in named):
            named.append(length)
    return named


def _label_ends(figure: Figure, axes: Axes, lines: Sequence[_Line]) -> None:
    """Write each line's words to the right of the plot, level with its end, and moved apart where they would overlap."""
    row = ROW_INCH / (figure.get_figheight() - MARGINS_INCH)  # in heights of the axes
    axes.autoscale_view()  # the limits must be final before anything is placed by them
    to_axes = axes.transData + axes.transAxes.inverted()
    points = [to_axes.transform((line.lengths[-1], line.values[-1])) for line in lines]
    ends = [(float(point[0]), float(point[1]), line) for point, line in zip(points, lines, strict=True)]
    ends.sort(key=lambda end: end[1])
    tops: list[float] = []
    floor = -0.02
    for _, y, line in ends:
        below = row * (len(line.words) - 0.4)
        tops.append(max(y, floor + below))
        floor = tops[-1] + row * 0.6
    # What was pushed out at the top moves everything below it down again.
    ceiling = 1.04
    for index in range(len(ends) - 1, -1, -1):
        tops[index] = min(tops[index], ceiling - row * 0.6)
        ceiling = tops[index] - row * (len(ends[index][2].words) - 0.4)
    for (x, y, line), top in zip(ends, tops, strict=True):
        leader = {"arrowstyle": "-", "color": line.colour, "alpha": 0.45, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 4}
        axes.annotate("", xy=(x, y), xytext=(1.025, top), xycoords="axes fraction", arrowprops=leader)
        for index, words in enumerate(line.words):
            axes.annotate(
                words,
                (1.03, top - row * index),
                xycoords="axes fraction",
                va="center",
                annotation_clip=False,
                color=GREY if index else line.colour,
                weight="normal" if index else "bold",
                size=LABEL_PT - 1.5 * (index > 0),
            )


def _name(kind: str, group: TtftGroup | RulerGroup | TradeOff) -> str:
    """A file name for a group: readable, safe on any file system, and different for different settings."""
    about = group.setting
    # What older rows have not leaves the names of their pictures as they were.
    bare = (("model_hash", ""), ("older_prompt", 0), ("samples_as", "tmbench"), ("chat_template_kwargs", ""))
    told = sorted(item for item in about.items() if item not in bare)
    digest = hashlib.sha256(repr(told).encode()).hexdigest()[:6]
    words = [kind, about["device"], str(about["model"]).rstrip("/").rpartition("/")[2]]
    words += [length_name(about["length"])] if "length" in about else [about["prompt"]]
    slug = re.sub(r"[^a-z0-9.]+", "-", "-".join(words).lower()).strip("-.")
    return f"{slug[:120]}-{digest}.png"

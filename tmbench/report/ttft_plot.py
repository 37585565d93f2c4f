"""Pictures of times: TTFT, and speed-up over dense attention, against the prompt's length."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from tmbench.report.length_lines import Line, canvas, finish, line_of
from tmbench.report.plot_style import GREY, LABEL_PT
from tmbench.report.time_intervals import FASTER, SLOWER, TimeDifference
from tmbench.report.ttft import TtftCell, TtftSection
from tmbench.results.words import length_name


def ttft_figure(section: TtftSection) -> Figure:
    """Seconds by length."""
    times = {label: section.measured(label) for label in section.labels if section.measured(label)}
    lines = [
        line_of(section, label, {cell.row.length: cell.seconds for cell in own}, [label]) for label, own in times.items()
    ]
    figure, axes = canvas("Time to first token", section, lines)
    axes.set_yscale("log")
    for line, cells in zip(lines, times.values(), strict=True):
        low, high = _ends(cells)
        axes.fill_between(line.lengths, low, high, color=line.look.colour, alpha=0.15, linewidth=0)
        axes.vlines(line.lengths, low, high, color=line.look.colour, alpha=0.5, linewidth=1)
    finish(figure, axes, section, lines)
    bottom, top = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if top / bottom < 1000 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("seconds, median; band from minimum to maximum", color=GREY, fontsize=LABEL_PT)
    return figure


def _ends(cells: Sequence[TtftCell]) -> tuple[list[float], list[float]]:
    """The fastest and the slowest repeats."""
    ends = [(cell.row.ttft_min_s, cell.row.ttft_max_s) for cell in cells]
    return [nan if low is None else low for low, _ in ends], [nan if high is None else high for _, high in ends]


def speed_up_figure(section: TtftSection) -> Figure:
    """Dense's time over each method's by length, and at the end of a line what the method kept."""
    lines = []
    spans: list[tuple[Line, list[int], list[float], list[float]]] = []
    for label in section.labels:
        percents = {cell.row.length: 0 if label == "dense" else cell.percent_vs_dense for cell in section.measured(label)}
        ratios = {length: 1 / (1 + percent / 100) for length, percent in percents.items() if percent is not None}
        if ratios:
            fidelity = [] if label == "dense" else section.fidelity(label).split("; ")
            words = [label, *(["fidelity not measured"] if fidelity == ["not measured"] else fidelity)]
            lines.append(line_of(section, label, ratios, [*words, *_unsure(section, label)]))
            spans.append((lines[-1], *_ratio_ends(section.measured(label))))
    figure, axes = canvas("Speed-up over dense attention", section, lines)
    values = [value for line in lines for value in line.values]
    for line, lengths, low, high in spans:
        axes.vlines(lengths, low, high, color=line.look.colour, alpha=0.5, linewidth=1.5)
    axes.set_ylim(min(0.9, *values) * 0.92, max(1.1, *values) * 1.08)
    if max(values) / min(1, *values) > 4:
        axes.set_yscale("log", base=2)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    finish(figure, axes, section, lines)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))  # noqa: RUF001 the sign is meant
    axes.set_ylabel("dense time / method's time, 95 % interval: above 1 is faster", color=GREY, fontsize=LABEL_PT)
    return figure


def _ratio_ends(cells: Sequence[TtftCell]) -> tuple[list[int], list[float], list[float]]:
    """Lengths at which a method was interleaved with dense, and the ends of the 95 % intervals of its speed-up."""
    found = [cell.against for cell in cells if isinstance(cell.against, TimeDifference)]
    lengths = [cell.row.length for cell in cells if isinstance(cell.against, TimeDifference)]
    return lengths, [1 / (1 + one.high / 100) for one in found], [1 / (1 + one.low / 100) for one in found]


def _unsure(section: TtftSection, label: str) -> list[str]:
    """Where a time is neither faster nor slower than dense's, in words."""
    places: dict[str, list[str]] = {}
    for cell in section.measured(label):
        if cell.verdict not in ("", FASTER, SLOWER):
            places.setdefault(cell.verdict, []).append(length_name(cell.row.length))
    return [f"{words} at {', '.join(names)}" for words, names in places.items()]

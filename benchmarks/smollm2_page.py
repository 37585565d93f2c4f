"""docs/smollm2.md: what a small trained model keeps under every method, pictures first. It is there once its rows are.

Rows stand in benchmarks/smollm2-135m, and of methods at one density in benchmarks/equal-density, as ``tmbench`` wrote them.
They are read as a report reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import density_tables
from claim_sources import ABOVE, LAYERS_OF, layers_of, rows_of, tasks_of
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tmbench.report.intervals import Difference
from tmbench.report.loss import LossCell, LossSection
from tmbench.report.pictures import figures, file_name
from tmbench.report.plot_style import COLOURS, GREY, LABEL_PT, MARKERS, plain_axes, titles
from tmbench.report.report import Report
from tmbench.report.ruler import RulerSection
from tmbench.report.table import Table, columns
from tmbench.report.words import NOTHING, figure_text, interval_text
from tmbench.report.writers import captioned, report_markdown
from tmbench.results.words import counted, length_name

NAME = "smollm2.md"
HEAD = """# What SmolLM2 keeps

Rendered by `make figures` from [benchmarks/smollm2-135m](../benchmarks/smollm2-135m) and
[benchmarks/equal-density](../benchmarks/equal-density); do not edit.

SmolLM2-135M-Instruct is a trained language model of 30 layers, 135 million parameters and 8192 positions. `make smollm2`
makes its checkpoint. [What was asked](../benchmarks/smollm2-135m/README.md) stands beside the rows. It cannot do every
task of RULER. So methods are compared over the tasks on which dense attention scores more than {above:g}. Intervals are of
95 %. [The page of claims](claims.md) says what this supports and what it refutes."""
KINDS = {
    "ruler": "RULER scores by task and method",
    "loss": "Loss against dense by starting layer",
    "probe": "Gradients by layer",
    "tune": "Sets of layers that a search tried, and what they lose",
}
"""What a picture shows, by the beginning of its name."""
PARTS = {"prompt": "in the prompt", "answer": "of the answer behind it"}


def page(report: Report, density: Report | None = None) -> str:
    """The page as Markdown; ``density`` has the rows of methods at one density."""
    shown = _pictures(report)
    gradients = [name for name in shown if name.startswith("probe")]
    lines = [HEAD.format(above=ABOVE), *(_picture(name) for name in shown if name not in gradients)]
    scores = list(map(captioned, _scores(report)))
    lines += ["## Points against dense", *scores] if scores else []
    lines += ["## At equal density", density_tables.text(density)]
    lines += ["## Gradients by layer", *map(_picture, gradients)] if gradients else []
    _, _, tables = report_markdown(report).partition("\n")
    return (
        "\n\n".join([*lines, "## All tables", tables.replace("\n### ", "\n#### ").replace("\n## ", "\n### ").strip()]) + "\n"
    )


def pictures(report: Report, density: Report | None = None) -> dict[str, Figure]:
    """All of the page, by the names of their files."""
    return _pictures(report) | density_tables.pictures(density)


def _pictures(report: Report) -> dict[str, Figure]:
    """Scores first, then losses by depth, then gradients, by the names of their files."""
    found = figures(report)
    scores = {name: figure for name, figure in found.items() if name.startswith("ruler")}
    return scores | dict(_depths(report)) | found


def _picture(name: str) -> str:
    return f"![{KINDS[name.partition('-')[0]]}, SmolLM2-135M-Instruct](figures/{name})"


def _scores(report: Report) -> Iterator[Table]:
    """For each section of scores its methods against dense, with words that are confirmed together."""
    for section in report.ruler:
        labels = [label for label in section.labels if label != "dense"]
        tasks = {label: tasks_of(section, (label,)) for label in labels}
        wanted = [label for label in labels if tasks[label]]
        # Methods that were asked the same tasks make one family.
        for own in dict.fromkeys(tuple(tasks[label]) for label in wanted):
            alike = [label for label in wanted if tuple(tasks[label]) == own]
            yield _points(section, alike, own)


def _points(section: RulerSection, labels: Sequence[str], tasks: Sequence[str]) -> Table:
    rows = rows_of(section)
    lines = []
    for label, found in zip(labels, section.answers.compare_all([(label, "dense", tasks) for label in labels]), strict=True):
        assert isinstance(found, Difference), found
        interval = interval_text(found.mean, found.low, found.high)
        # A label has what tells methods of its section apart. Another length may have another setting.
        setting = density_tables.setting_of(rows[label])
        name = label if setting == NOTHING or "(" in label else f"{label} ({setting})"
        lines.append([name, figure_text(section.densities.get(label), ".0%"), interval, str(found.pairs), found.verdict])
    about = f"{length_name(section.setting.length)}, {section.setting.words}, {section.setting.device}"
    return Table(
        f"{about}: {counted(len(tasks), 'task')} of {len(section.scores['dense'])} ({', '.join(tasks)})",
        columns("method", "density", "points against dense", "samples", "in words", texts=("method", "in words")),
        lines,
    )


def _depths(report: Report) -> Iterator[tuple[str, Figure]]:
    """A picture of each section of losses with several starting layers of one task and length."""
    for section in report.losses:
        for task, length in sorted({(cell.row.task, cell.row.length) for cell in section.cells}):
            cells = _from_a_depth_on(section, task, length)
            if len(cells) > 1:
                name = file_name("loss", section.setting, task, length_name(length), told=(section.setting, task, length))
                yield name, _loss_figure(section, cells)


def _from_a_depth_on(section: LossSection, task: str, length: int) -> dict[int, LossCell]:
    """The cells with triangle attention in every layer from one on, by that layer."""
    found = {}
    for cell in section.measured():
        if cell.row.method != "tri_mix" or (cell.row.task, cell.row.length) != (task, length) or cell.prompt is None:
            continue
        layers, count = layers_of(cell.row), LAYERS_OF[cell.row.model]
        if layers == tuple(range(layers[0], count)):
            found[layers[0]] = cell
    return dict(sorted(found.items()))


def _loss_figure(section: LossSection, cells: Mapping[int, LossCell]) -> Figure:
    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    axes: Axes = figure.subplots()
    for number, (part, words) in enumerate(PARTS.items()):
        found = [getattr(cell, part) for cell in cells.values()]
        # An interval need not be even about its mean, and one of a single sample is not there.
        ends = [(one.mean, one.mean) if one.ends is None else one.ends for one in found]
        reach = [[one.mean - low for one, (low, _) in zip(found, ends, strict=True)]]
        reach += [[high - one.mean for one, (_, high) in zip(found, ends, strict=True)]]
        axes.errorbar(
            list(cells),
            [one.mean for one in found],
            yerr=reach,
            color=COLOURS[1 + number],
            marker=MARKERS[number],
            capsize=3,
            label=words,
        )
    first = next(iter(cells.values())).row
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xticks(list(cells))
    axes.set_xlabel("triangle attention from this layer on", color=GREY, fontsize=LABEL_PT)
    axes.set_ylabel("nats a token against dense", color=GREY, fontsize=LABEL_PT)
    axes.legend(frameon=False, fontsize=LABEL_PT)
    plain_axes(axes)
    about = f"{section.setting.subject}; {first.task} at {length_name(first.length)}, {counted(first.samples, 'prompt')}"
    titles(figure, "Loss in and after the prompt", f"{about}; bars: 95 % intervals; {first.device_name}")
    return figure

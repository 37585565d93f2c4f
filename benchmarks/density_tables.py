"""What docs/smollm2.md says of methods at equal density: each against dense attention, and against an oracle of key blocks.

Rows stand in benchmarks/equal-density, and are read as a report reads them. Scores count on tasks where dense attention has
more than ``ABOVE``. All differences of a table are one family: its words are confirmed together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from claim_sources import ABOVE, rows_of, tasks_of
from matplotlib.figure import Figure
from served_tables import MISSING, listed, words_of

from tmbench.methods.plan import HALF
from tmbench.methods.table import LAYERS, METHODS
from tmbench.report.intervals import GAIN, LOSS, NO_LOSS, Difference
from tmbench.report.pictures import file_name
from tmbench.report.plot_style import GREY, LABEL_PT, method_look, plain_axes, titles
from tmbench.report.report import Report
from tmbench.report.ruler import RulerSection
from tmbench.report.table import Table, columns
from tmbench.report.words import NOTHING, figure_text, interval_text
from tmbench.report.writers import captioned
from tmbench.results.rows import Row
from tmbench.results.variants import pattern_settings
from tmbench.results.words import counted, length_name

EQUAL = 0.02
"""How far apart densities may lie that count as equal."""
ORACLE = "oracle_blocks"
ABOUT = """The density is the share of the causal pairs that a method computes, over all layers and heads. Every method was
asked at the setting that comes nearest to one density: [the folder of the rows](../benchmarks/equal-density/README.md) says
how it was searched. The oracle, `oracle_blocks`, knows dense attention. It takes for each block of 128 queries the blocks of
128 keys that hold most of it. Where the oracle loses against dense attention, and nothing of that density does better, the
budget does not do. Where a method loses against the oracle, it chooses badly. Where one is above it, what holds most of the
attention is not what the answer needs.

Under `p` the oracle holds the same share of the attention of every block of queries. Under `like` it has as many blocks of
keys there as a method of such blocks takes, and the method is held against that. An oracle bounds the attention that such
blocks can hold, not the score. Triangles, windows, columns with diagonals and sorted keys are not made of such blocks: it is
no bound for them."""


@dataclass(frozen=True)
class Line:
    """A method of the table."""

    label: str
    row: Row
    density: float
    score: float
    """Averaged over the tasks."""
    dense: Difference | None
    """Points against dense attention; None for itself."""
    oracle: str
    """The label of the oracle that it is held against; "" where none has its density."""
    below: Difference | None
    """Points against that."""


@dataclass(frozen=True)
class EqualDensity:
    """The scores of one model at one length, of methods about as dense as an oracle."""

    section: RulerSection
    oracle: str
    """The label of one whose query blocks all have one share."""

    @cached_property
    def rows(self) -> dict[str, Row]:
        """One of each label's."""
        return rows_of(self.section)

    @property
    def density(self) -> float:
        """That of the oracle."""
        return self.section.densities[self.oracle]

    @cached_property
    def near(self) -> list[str]:
        """Dense attention, and all labels whose density comes nearer to this oracle's than to that of others."""
        densities = self.section.densities
        others = [densities[other] for other in oracles_of(self.section)]
        return [
            label
            for label, own in densities.items()
            if label == "dense" or min(others, key=lambda other: abs(own - other)) == self.density
        ]

    @cached_property
    def tasks(self) -> list[str]:
        """Those that count."""
        return tasks_of(self.section, ("dense", self.oracle))

    @cached_property
    def labels(self) -> list[str]:
        """Those near of which every sample of these tasks is known."""
        scores, answers = self.section.scores, self.section.answers
        asked = [label for label in self.near if all(task in scores[label] for task in self.tasks)]
        return [label for label in asked if answers.complete(self.tasks, (label,)) == self.tasks]

    @cached_property
    def lines(self) -> list[Line]:
        """All methods, the best score first."""
        references = {label: self._reference(label) for label in self.labels}
        wanted = [(label, "dense") for label in self.labels if label != "dense"]
        wanted += [(label, oracle) for label, oracle in references.items() if oracle]
        compared = self.section.answers.compare_all([(*both, self.tasks) for both in wanted])
        found = {both: one for both, one in zip(wanted, compared, strict=True) if isinstance(one, Difference)}
        lines = [
            Line(
                label,
                self.rows[label],
                self.section.densities[label],
                sum(self.section.scores[label][task] for task in self.tasks) / len(self.tasks),
                found.get((label, "dense")),
                references[label],
                found.get((label, references[label])),
            )
            for label in self.labels
        ]
        return sorted(lines, key=lambda line: -line.score)

    def _reference(self, label: str) -> str:
        """The oracle that takes as many blocks as the method, else the one of a share; "" where none has its density."""
        row = self.rows[label]
        if label in ("dense", self.oracle):
            return ""
        like = [
            other
            for other in self.labels
            if self.rows[other].method == ORACLE and str(self.rows[other].settings.get("like")).startswith(f"{row.method}:")
        ]
        near = [
            one for one in (*sorted(like, key=partial(self._apart, label)), self.oracle) if self._apart(label, one) <= EQUAL
        ]
        return near[0] if near else ""

    def _apart(self, label: str, other: str) -> float:
        return abs(self.section.densities[label] - self.section.densities[other])

    def table(self) -> Table:
        """A line for each method."""
        rows = [
            [
                line.row.method,
                setting_of(line.row),
                figure_text(line.density, ".1%"),
                f"{line.score:.1f}",
                NOTHING if line.dense is None else words_of(line.dense),
                NOTHING if line.below is None else words_of(line.below),
                "like" if line.oracle not in ("", self.oracle) else "p" if line.oracle else NOTHING,
            ]
            for line in self.lines
        ]
        samples = sorted({line.dense.pairs for line in self.lines if line.dense is not None})
        about = f"{counted(len(self.tasks), 'task')} ({', '.join(self.tasks)}), {' or '.join(map(str, samples))} samples"
        place = f"{self.section.setting.model} at {length_name(self.section.setting.length)}, about {self.density:.0%}"
        names = ["method", "setting", "density", "score", "points against dense", "points against an oracle", "which"]
        return Table(
            f"{place}, {about}, on tasks where dense attention has more than {ABOVE:g}; 95 % intervals, words confirmed "
            "together:",
            columns(*names, texts=(*names[:2], *names[4:])),
            rows,
        )

    def sentences(self) -> Iterator[str]:
        """Whether the budget does, which methods choose badly, and which are not held against an oracle."""
        own = next(line for line in self.lines if line.label == self.oracle)
        assert own.dense is not None
        held = [line for line in self.lines if line.below is not None and line.row.method != ORACLE]
        worse, better = (_named(held, verdict) for verdict in (LOSS, GAIN))
        above = [line for line in self.lines if line.oracle == self.oracle and line.below and line.below.verdict == GAIN]
        yield f"At {own.density:.0%} {_of_budget(own.dense, surpassed=bool(above))}"
        kinds = "the oracle's" if all(line.oracle in ("", self.oracle) for line in held) else "their oracles'"
        if worse:
            yield f"Surely below {kinds} scores, so that they choose badly: {worse}."
        elif held:
            yield f"No method is surely below {kinds} score."
        if better:
            yield f"Surely above: {better}."
        apart = [line for line in self.lines if not line.oracle and line.label not in ("dense", self.oracle)]
        if apart:
            names = [f"`{line.row.method}` ({line.density:.0%})" for line in apart]
            yield f"Of another density, and so against no oracle: {listed(names)}."
        if missing := [label for label in self.near if label not in self.labels]:
            yield f"Not every task is there of {listed([f'`{label}`' for label in missing])}."

    def figure(self) -> Figure:
        """Points against dense, one line below the other."""
        lines = [(line, line.dense) for line in self.lines if line.dense is not None]
        figure = Figure(figsize=(8.4, 1.6 + 0.3 * len(lines)), layout="constrained")
        axes = figure.subplots()
        for place, (line, found) in enumerate(lines):
            look = method_look(line.row.method)
            reach = [[found.mean - found.low], [found.high - found.mean]]
            axes.errorbar(found.mean, place, xerr=reach, color=look.colour, marker=look.marker, capsize=3)
        axes.axvline(0, color=GREY, linewidth=0.8)
        # What follows a colon are the parameters of another method, or the hash of a file.
        names = [f"{line.row.method}, {setting_of(line.row).partition(':')[0]} ({line.density:.0%})" for line, _ in lines]
        axes.set_yticks(range(len(lines)), names)
        axes.invert_yaxis()
        axes.set_xlabel("points against dense attention", color=GREY, fontsize=LABEL_PT)
        plain_axes(axes)
        about = f"{self.section.setting.subject}; average of {counted(len(self.tasks), 'task')}; bars: 95 % intervals"
        titles(figure, f"Scores at a density of about {self.density:.0%}", f"{about}; {self.rows['dense'].device_name}")
        return figure


def found_in(report: Report | None) -> list[EqualDensity]:
    """Of each oracle what is about as dense, where there is dense attention and a task that counts; the sparsest first."""
    sections = [] if report is None else [one for one in report.ruler if "dense" in one.labels]
    found = [EqualDensity(one, oracle) for one in sections for oracle in oracles_of(one)]
    return sorted((one for one in found if one.tasks), key=lambda one: one.density)


def oracles_of(section: RulerSection) -> list[str]:
    """The labels of oracles whose query blocks all have one share."""
    rows = rows_of(section)
    return [label for label in section.densities if rows[label].method == ORACLE and "p" in rows[label].settings]


def pictures(report: Report | None) -> dict[str, Figure]:
    """One of each table, by the names of their files."""
    return {_name(one): one.figure() for one in found_in(report)}


def text(report: Report | None) -> str:
    """What stands below the heading: what is compared, a picture, a table and what follows from it."""
    parts = []
    for one in found_in(report):
        parts += [f"![Points against dense attention at equal density](figures/{_name(one)})", " ".join(one.sentences())]
        parts += [captioned(one.table())]
    return "\n\n".join([ABOUT, *(parts or [MISSING])])


def setting_of(row: Row) -> str:
    """The parameters that have another value than their default, and the deep layers where they are not the default's."""
    method = METHODS[row.method]
    defaults = {name: about.named(about.default) for name, about in method.declared.items()}
    if row.layers_source == HALF:
        defaults[LAYERS] = row.settings[LAYERS]
    given = [f"{name} {value}" for name, value in pattern_settings(row).items() if defaults.get(name) != value]
    return ", ".join(given) or NOTHING


def _of_budget(found: Difference, *, surpassed: bool) -> str:
    """What an oracle's difference to dense attention says of the budget, where others of its density are above it or not."""
    points = interval_text(found.mean, found.low, found.high)
    if found.verdict == LOSS and surpassed:
        return (
            f"the oracle of one share is surely below dense attention, {points}, and others of its density are surely above "
            "it: the most attention in every block of queries is not what the answers need. Of the budget that says nothing."
        )
    if found.verdict == LOSS:
        return f"the oracle is surely below dense attention, {points}: the budget itself does not do."
    if found.verdict in (NO_LOSS, GAIN):
        return f"no loss of the oracle is measurable against dense attention, {points}: the budget does."
    return f"it is open whether the oracle loses against dense attention, {points}: {found.verdict}."


def _named(lines: Sequence[Line], verdict: str) -> str:
    found = [f"`{line.label}`" for line in lines if line.below is not None and line.below.verdict == verdict]
    return listed(found) if found else ""


def _name(one: EqualDensity) -> str:
    return file_name("equal-density", one.section.setting, length_name(one.section.setting.length), f"{one.density:.0%}")

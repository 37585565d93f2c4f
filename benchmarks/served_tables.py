"""What docs/serving.md says that an engine may use: each method in chunks and asked later, against itself in one piece.

Rows stand in benchmarks/served, and are read as a report reads them. Scores count on tasks where dense attention in one
piece has more than ``ABOVE``. A method loses where the interval of its paired differences says so, and nothing else decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from claim_sources import tasks_of
from sources import Block

from tmbench.report.agreement import AgreeSection
from tmbench.report.intervals import GAIN, LOSS, NO_LOSS, POSSIBLE, Difference, family
from tmbench.report.loss import LossSection
from tmbench.report.report import Report
from tmbench.report.ruler import RulerSection, ServedScore, served_scores
from tmbench.report.served import CAPTION
from tmbench.report.table import Table, columns
from tmbench.report.ttft import TtftSection
from tmbench.report.words import NOTHING, interval_text
from tmbench.report.writers import captioned, filled, table_markdown
from tmbench.results.parameters_text import Value
from tmbench.results.variants import Variant, identity, labels, own_label
from tmbench.results.words import counted, length_name

MISSING = "Not measured yet."
KEEPS = (NO_LOSS, GAIN, POSSIBLE[GAIN])
"""What is said of a method that an engine may use."""


def scores(report: Report) -> str:
    """A table for each model and length."""
    return "\n\n".join(map(captioned, filled(map(_scores, sections(report)))))


def sections(report: Report) -> list[RulerSection]:
    """Those of prompts in one piece that were fed otherwise too."""
    return [section for section in report.ruler if section.served and "dense" in section.labels]


def _scores(section: RulerSection) -> Table:
    """A line for each method: its score in one piece, and the points against that."""
    tasks = tasks_of(section, ("dense",))
    # Those of all ways: a score in one piece then stands for each of them.
    tasks = [task for task in tasks if all(task in one.tasks for one in served_scores(section, tasks))]
    found = served_scores(section, tasks)
    names = reads(found)
    lines = {one.label: [f"{one.whole:.1f}", *[NOTHING] * len(names)] for one in reversed(found)}
    for one in found:
        lines[one.label][1 + names.index(one.read)] = words_of(one.difference)
    samples = sorted({one.difference.pairs for one in found if isinstance(one.difference, Difference)})
    about = f"{counted(len(tasks), 'task')} ({', '.join(tasks)}), {' or '.join(map(str, samples))} samples"
    rows = [[label, *lines[label]] for label in section.labels if label in lines]
    names = ["method", "in one piece", *names]
    place = f"{section.setting.model} at {length_name(section.setting.length)}"
    return Table(
        f"{place}, {about}: scores, and points against them with their 95 % intervals:",
        columns(*names, texts=["method", *names[2:]]),
        rows,
    )


def together(report: Report) -> str:
    """A line for each method and way over all that was measured, its words confirmed together."""
    lines = [
        [label, read, interval_text(one.mean, one.low, one.high), str(one.tasks), str(one.pairs), one.verdict]
        for (read, label), one in pooled(report).items()
    ]
    names = ("method", "read", "points against one piece", "tasks", "samples", "in words")
    return table_markdown(Table("", columns(*names, texts=("method", "read", "in words")), lines))


def may_use(report: Report) -> str:
    """For each way which methods an engine may use, and what is still open of the others.

    In brackets stand the densities that a method has in one piece, over all models and lengths.
    """
    computed = densities(report)
    found = {key: one for key, one in pooled(report).items() if key[1] != "dense"}
    lines = []
    for read in dict.fromkeys(read for read, _ in found):
        said = {label: one for (own, label), one in found.items() if own == read}
        called = {label: f"`{label}`" + (f" ({computed[label]})" if label in computed else "") for label in said}
        kept = [called[label] for label, one in said.items() if one.verdict in KEEPS]
        lost = [called[label] for label, one in said.items() if one.verdict == LOSS]
        rest = [f"{called[label]}, {-one.low:.2f}" for label, one in said.items() if one.verdict not in (*KEEPS, LOSS)]
        lines.append(f"- **{read[0].upper()}{read[1:]}**")
        lines += [f"    - An engine may use {listed(kept)}: against one piece no loss is measurable."] if kept else []
        lines += [f"    - Against one piece {listed(lost)} {'loses' if len(lost) == 1 else 'lose'}."] if lost else []
        lines += [f"    - A loss is still open, of up to so many points: {'; '.join(rest)}."] if rest else []
    return "\n".join(lines)


def losses(report: Report) -> str:
    """What the report says of losses as they are served."""
    return "\n\n".join(_of_report(report.losses)) or MISSING


def times(report: Report) -> str:
    """What the report says of times in chunks and of second turns."""
    return "\n\n".join(_of_report(report.ttft)) or MISSING


def agreement(report: Report) -> str:
    """What the report says of token agreement as it is served."""
    return "\n\n".join(_of_report(report.agree)) or MISSING


def densities(report: Report) -> dict[str, str]:
    """The least and the most of the causal pairs that a label computed in one piece; only where they were counted."""
    shares: dict[str, list[float]] = {}
    for section, names in named(report):
        for label, density in section.densities.items():
            shares.setdefault(names[label], []).append(100 * density)
    ends = {label: dict.fromkeys(f"{end:.0f}" for end in (min(own), max(own))) for label, own in shares.items()}
    return {label: f"{' to '.join(each)} %" for label, each in ends.items()}


def pooled(report: Report) -> dict[tuple[str, str], Difference]:
    """By (way, method) the points against one piece over the tasks of all models and lengths, confirmed together."""
    strata: dict[tuple[str, str], list[Sequence[float]]] = {}
    order: list[str] = []
    found = list(named(report))
    method_of = {names[cell.label]: cell.row.method for section, names in found for cell in section.cells}
    every = [
        replace(one, label=names[one.label])
        for section, names in found
        for one in served_scores(section, tasks_of(section, ("dense",)))
    ]
    for one in every:
        strata.setdefault((one.read, one.label), []).extend(one.strata)
        order += [one.label] * (one.label not in order)
    places = {read: place for place, read in enumerate(reads(every))}
    # Settings of one method together.
    methods = [method_of[label] for label in order]
    keys = sorted(
        (key for key, own in strata.items() if own),
        key=lambda key: (places[key[0]], methods.index(method_of[key[1]]), order.index(key[1])),
    )
    return dict(zip(keys, family([strata[key] for key in keys]), strict=True))


def named(report: Report) -> Iterator[tuple[RulerSection, dict[str, str]]]:
    """Sections, and by the labels of each what tells a method's settings apart in any, and between any two: one names fewer.

    Layers are a model's own, and tell nothing apart between models.
    """
    found = sections(report)
    anywhere = {identity(one): one for section in found for one in (_OfAnyModel.of(cell.row) for cell in section.cells)}
    among = {label for section in found for label in section.labels} | set(labels(list(anywhere.values())))
    for section in found:
        yield section, {cell.label: own_label(cell.row, among) for cell in section.cells}


@dataclass(frozen=True)
class _OfAnyModel:
    """A method with those of its settings that models can have in common."""

    method: str
    settings: Mapping[str, Value]

    @classmethod
    def of(cls, one: Variant) -> _OfAnyModel:
        return cls(one.method, {name: value for name, value in one.settings.items() if name != "layers"})


def reads(found: Sequence[ServedScore]) -> list[str]:
    """The ways in which prompts were fed, chunks first, and there those of a known length."""
    return sorted({one.read for one in found}, key=lambda read: ("later" in read, "unknown" in read, read))


def words_of(found: Difference | str) -> str:
    """A difference with its interval and what it says; why there is none."""
    if not isinstance(found, Difference):
        return found
    return f"{interval_text(found.mean, found.low, found.high)}, {found.verdict}"


def listed(names: Sequence[str]) -> str:
    """Some names in a sentence."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _of_report(found: Sequence[AgreeSection] | Sequence[LossSection] | Sequence[TtftSection]) -> Iterator[str]:
    """The tables of sections against one piece, as the report has them, below what the sections are called."""
    begin = CAPTION.partition("{")[0]
    for section in found:
        for table in filled(section.tables()):
            if table.caption.startswith(begin):
                yield f"{section.title}.\n\n{captioned(table)}"


def _block(make: Callable[..., str]) -> Block:
    """A block that says so where there are no rows."""
    return lambda sources, *words: MISSING if sources.served is None else make(sources.served, *words)


SERVED_TABLES: dict[str, Block] = {
    "served-scores": _block(scores),
    "served-together": _block(together),
    "served-may-use": _block(may_use),
    "served-losses": _block(losses),
    "served-agreement": _block(agreement),
    "served-times": _block(times),
}

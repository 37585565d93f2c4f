"""What was found of the publication's claims: figures with intervals from committed rows, by kind of row."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from accuracy_tables import CHOSEN_BY
from claims import Found
from sources import ROOT, Line, Sources

from tmbench.methods.layers import layers_text, parse_layers
from tmbench.report.intervals import Difference
from tmbench.report.loss import LossCell, LossDifference, LossSection
from tmbench.report.probe import ProbeSection
from tmbench.report.report import Report
from tmbench.report.ruler import RulerSection
from tmbench.report.settings import Setting
from tmbench.report.student import mean_interval
from tmbench.report.time_intervals import TimeDifference, compare_rows
from tmbench.report.ttft import TtftSection
from tmbench.report.words import interval_text, percent_text
from tmbench.results.rows import Row
from tmbench.results.variants import pattern_settings
from tmbench.results.words import counted, length_name

LAYERS_OF = {"tiny": 8, "smollm2": 30}
"""How many layers the models have whose rows are read here."""
SHOWN = {"nvidia-h100-80gb-hbm3": "H100", "nvidia-h200": "H200"}
SHAPE = {"n_init": 8, "n_local": 512, "last_n": 128}
"""The published triangle."""
WIDER = SHAPE | {"n_local": 640, "last_n": 0}
"""As many pairs without last queries: it is the window that has their 128 keys, for every query."""
ABOVE = 20.0
"""Dense must score more on a task, or there is nothing to lose."""
FEW_TASKS = 5
"""Sections with fewer tasks say nothing about RULER."""


def where(setting: Setting, length: int, *more: str) -> str:
    """A place in words."""
    device = SHOWN.get(setting.device, "CPU" if setting.device.startswith("cpu") else setting.device)
    return ", ".join([f"{setting.model} at {length_name(length)}", *more, device])


def reports(sources: Sources) -> list[tuple[Path, Report]]:
    """The folders of rows whose models answer questions, each with its report."""
    found = [(ROOT / "results", sources.results)]
    return found + ([(sources.smollm2_rows, sources.smollm2)] if sources.smollm2 is not None else [])


def sections(sources: Sources) -> list[RulerSection]:
    """All scores of models whose number of layers is known here."""
    return [one for _, report in reports(sources) for one in report.ruler if one.setting.model in LAYERS_OF]


def layers_of(row: Row) -> tuple[int, ...]:
    """The layers with triangle attention."""
    return parse_layers(str(row.settings["layers"]), LAYERS_OF[row.model])


def has_shape(row: Row, shape: Mapping[str, int]) -> bool:
    """Whether a row's triangle has this shape."""
    given = pattern_settings(row)
    return all(given.get(name) == value for name, value in shape.items())


def half(row: Row) -> bool:
    """Whether triangle attention starts at half the depth, as published."""
    count = LAYERS_OF[row.model]
    return "layers" in row.settings and layers_of(row) == tuple(range(count // 2, count))


def deep(row: Row) -> bool:
    """Whether triangle attention is in layers of the deep half alone, or in those that a probe chose."""
    return probed(row) or min(layers_of(row)) >= LAYERS_OF[row.model] // 2


def probed(row: Row) -> bool:
    """Whether a probe chose the layers."""
    given = row.model == "tiny" and "layers" in row.settings and layers_of(row) in CHOSEN_BY
    return row.layers_source.startswith("probe") or given


def rows_of(section: RulerSection) -> dict[str, Row]:
    """A row of each label: that of its first task."""
    return {cell.label: cell.row for cell in reversed(section.cells)}


def variants(section: RulerSection, method: str, shape: Mapping[str, int] = SHAPE) -> Iterator[tuple[str, Row]]:
    """The labels of a method, those with triangles of one shape and without a delta, each with one of its rows."""
    rows = rows_of(section)
    for label in section.labels:
        row = rows[label]
        shaped = "layers" not in row.settings or has_shape(row, shape)
        if row.method == method and shaped and "delta" not in row.settings:
            yield label, row


def tasks_of(section: RulerSection, labels: Sequence[str]) -> list[str]:
    """The tasks on which dense scores more than ``ABOVE``, and of which every sample of these labels is known."""
    scored = [section.scores[label] for label in (*labels, "dense")]
    tasks = [task for task in section.tasks if all(task in own for own in scored)]
    return [task for task in section.answers.complete(tasks, labels) if section.scores["dense"][task] > ABOVE]


def compared(section: RulerSection, label: str, reference: str, *more: str, few: int = FEW_TASKS) -> Found | None:
    """A method against another in points, over the tasks where dense scores; None where these are too few."""
    tasks = tasks_of(section, (label, reference))
    if len(tasks) < few:
        return None
    found = section.answers.compare(label, reference, tasks)
    return _points(found, where(section.setting, section.setting.length, *more), len(tasks))


def task_found(section: RulerSection, label: str, task: str, *more: str) -> Found | None:
    """A method against dense on one task; None where dense scores too little to lose."""
    cells = [cell for cell in section.measured(label) if cell.row.task == task]
    if not cells or section.scores["dense"].get(task, 0.0) <= ABOVE:
        return None
    return _points(cells[0].difference, where(section.setting, section.setting.length, *more), 1)


def _points(found: Difference | str, place: str, tasks: int) -> Found | None:
    if not isinstance(found, Difference):
        return None
    over = f"{counted(found.pairs, 'sample')}, {counted(tasks, 'task')}"
    return Found(place, f"{interval_text(found.mean, found.low, found.high)} points", (found.low, found.high), over)


def timed(section: TtftSection, label: str, length: int, reference: str = "dense") -> Found | None:
    """The time of a method against another's over the same interleaved rounds, in percent."""
    rows = {one: cell.row for one in (label, reference) for cell in section.measured(one) if cell.row.length == length}
    if len(rows) < 2:
        return None
    found = compare_rows(rows[label], rows[reference])
    place = where(section.setting, length, f"{section.setting.weights} weights")
    if not isinstance(found, TimeDifference):
        return Found(place, f"no interval: {found}", None)
    ends = f"{percent_text(found.low)} to {percent_text(found.high)}"
    over = counted(rows[label].repeats, "interleaved round")
    return Found(place, f"{percent_text(found.percent)} ({ends})", (found.low, found.high), over)


def faster(lines: Sequence[Line], implementation: str, length: int) -> Found:
    """How many times faster one layer's triangle attention is than the fastest dense attention of the same run.

    Its interval is between the slowest and the fastest launches of either: all that was seen, and so wider than 95 %.
    """
    here = [line for line in lines if line["length"] == str(length)]
    dense = min((line for line in here if line["pattern"] == "dense" and line["ms_median"]), key=_median)
    (own,) = (line for line in here if (line["pattern"], line["implementation"]) == ("triangle", implementation))
    low, high = float(dense["ms_min"]) / float(own["ms_max"]), float(dense["ms_max"]) / float(own["ms_min"])
    times = _median(dense) / _median(own)
    place = f"one layer of Llama-3.1-8B's geometry at {length_name(length)}, {implementation}, {own['device'].split()[-1]}"
    return Found(
        place, f"{times:.1f} times ({low:.1f} to {high:.1f})", (low, high), f"{own['launches']} launches, their range"
    )


def _median(line: Line) -> float:
    return float(line["ms_median"])


def deep_half(root: Path, section: ProbeSection) -> Found:
    """The share of the middle's gradient that the deep half of the layers holds, in percent, prompt by prompt."""
    row = next(iter(section.layers.values())).row
    files = [root / row.device / "probe" / name for name in row.sample_files.split("+")]
    prompts = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    shares = [_share(one["means"]) for one in prompts if one["index"] < row.samples]
    place = where(section.setting, section.setting.length, f"prompts of {section.setting.task}")
    mean, over = statistics.fmean(shares), counted(len(shares), "prompt")
    if len(shares) == 1:
        return Found(place, f"{mean:.1f} %", None, over)
    low, high = mean_interval(shares)
    return Found(place, f"{mean:.1f} % ({low:.1f} to {high:.1f})", (low, high), over)


def _share(means: Sequence[Sequence[Sequence[Sequence[float | None]]]]) -> float:
    """Of one prompt's ``[layers, heads, sections, measures]``: the mean over heads of the middle's derivative by logits."""
    by_layer = [statistics.fmean(head[1][0] or 0.0 for head in layer) for layer in means]
    return 100 * sum(by_layer[len(by_layer) // 2 :]) / sum(by_layer)


def lost(section: LossSection, cell: LossCell, part: str) -> Found | None:
    """A loss against dense's over the same prompts, in nats a token: in the prompt, or of the answer behind it."""
    found: LossDifference | None = getattr(cell, part)
    if found is None:
        return None
    layers = layers_text(layers_of(cell.row), LAYERS_OF[cell.row.model])
    place = where(section.setting, cell.row.length, cell.row.task, f"layers {layers}")
    return Found(place, f"{found.text} nats", found.ends, counted(cell.row.samples, "prompt"))

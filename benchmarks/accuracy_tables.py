"""Tables and figures of what the embedded model shows, for docs/accuracy.md, docs/probe.md, its card and the README."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from sources import H100, INTEL, Block, Sources, only

from ruler_tasks import TASKS
from tmbench.methods.layers import layers_text, parse_layers
from tmbench.report.effects import SHAPE
from tmbench.report.intervals import LOSS, Difference
from tmbench.report.table import Table, columns
from tmbench.report.words import figure_text, interval_text
from tmbench.report.writers import table_markdown
from tmbench.results.rows import Row
from tmbench.results.variants import pattern_settings

LAYERS = 8
"""Of the embedded model."""
CHOSEN_BY = {
    (2, 7): "a probe of vt, accuracy budget 0.02",
    (2, 4, 7): "a probe of vt, accuracy budget 0.05",
    (2, 4, 6, 7): "a probe of vt, accuracy budget 0.1",
    (4, 6, 7): "a probe of four tasks, accuracy budget 0.1",
}
"""How layers that rows call given were found: the probes in results/ and benchmarks/probes."""


def deep_layers(row: Row) -> tuple[int, ...]:
    """The layers of the embedded model that a row's triangle is in."""
    return parse_layers(str(row.settings["layers"]), LAYERS)


def _points(found: Difference | str | None) -> str:
    return interval_text(found.mean, found.low, found.high) if isinstance(found, Difference) else ""


def _verdict(found: Difference | str | None) -> str:
    return found.verdict if isinstance(found, Difference) else ""


def _table(names: Sequence[str], texts: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return table_markdown(Table("", columns(*names, texts=texts), rows))


def all_methods(sources: Sources) -> str:
    """Every method on 13 tasks at 4K: density, average, points against dense, and the tasks that lose by themselves."""
    section = only(sources.results.ruler, device=H100, length=4096)
    rows = []
    for label in section.labels:
        found = section.average_differences.get(label)
        lost = [
            f"{cell.row.task} {cell.difference.mean:+.1f}"
            for cell in section.measured(label)
            if isinstance(cell.difference, Difference) and cell.difference.verdict == LOSS
        ]
        density, average = f"{section.densities[label]:.0%}", f"{section.averages[label]:.1f}"
        rows.append([label, density, average, _points(found), _verdict(found), ", ".join(lost)])
    names = ("method", "density", "average", "points against dense", "in words", "tasks that lose")
    return _table(names, ("method", "in words", "tasks that lose"), rows)


def budgets(sources: Sources) -> str:
    """Choices of layers on other prompts of the same 13 tasks."""
    section = only(sources.results.ruler, device=INTEL, length=4096, seed=43)
    rows = []
    for label in section.labels[1:]:
        row = section.measured(label)[0].row
        layers, window = deep_layers(row), pattern_settings(row)["n_local"]
        chosen = "at random" if row.layers_source == "random" else CHOSEN_BY[layers]
        found = section.average_differences[label]
        density = f"{section.densities[label]:.0%}"
        rows.append([layers_text(layers, LAYERS), str(window), chosen, density, _points(found), _verdict(found)])
    names = ("triangle layers", "window", "chosen by", "density", "points against dense", "in words")
    return _table(names, ("triangle layers", "chosen by", "in words"), sorted(rows, key=lambda row: (row[2], row[0])))


def single_task(sources: Sources) -> str:
    """niah_multivalue alone by the triangle's layers, the best first."""
    section = only(sources.results.ruler, device=INTEL, length=4096, seed=42, threads=1)
    rows = []
    for cell in sorted(section.cells, key=lambda cell: -(cell.row.score or 0.0)):
        layers = () if cell.label == "dense" else deep_layers(cell.row)
        held = " and ".join(str(layer) for layer in (1, 5) if layer in layers)
        name = "none: dense" if not layers else ",".join(map(str, layers))
        given = "by a probe of vt" if layers in CHOSEN_BY else "one alone"
        origin = "" if not layers else "at random" if cell.row.layers_source == "random" else given
        found = cell.difference
        rows.append([name, origin, held, figure_text(cell.row.score, "g"), _points(found), _verdict(found)])
    names = ("triangle layers", "chosen", "of layers 1 and 5", "score", "points against dense", "in words")
    return _table(names, ("triangle layers", "chosen", "of layers 1 and 5", "in words"), rows)


def sweep(sources: Sources) -> str:
    """What one change does over the layers that a probe chose."""
    section = only(sources.results.trade_offs, device=INTEL, seed=42)
    wanted = [one for name in ("last_n", SHAPE, "n_local") for one in section.effects if one.parameter == name]
    rows = [[one.parameter, one.before, one.after, one.elsewhere, one.points_text, one.points.verdict] for one in wanted]
    names = ("what changes", "from", "to", "elsewhere", "points", "in words")
    return _table(names, ("what changes", "from", "to", "elsewhere", "in words"), rows)


def longer(sources: Sources) -> str:
    """Two tasks of keys and values at 16K by the triangle's layers."""
    section = only(sources.results.ruler, device=INTEL, length=16384)
    tasks = ("niah_multikey_2", "niah_multikey_3")
    rows = []
    for label in section.labels:
        cells = {cell.row.task: cell for cell in section.measured(label)}
        first = next(iter(cells.values())).row
        name, window = "none: dense", ""
        if label != "dense":
            name, window = layers_text(deep_layers(first), LAYERS), str(pattern_settings(first)["n_local"])
        scores = [figure_text(cells[task].row.score if task in cells else None, "g") for task in tasks]
        rows.append([name, window, f"{section.densities[label]:.0%}", *scores])
    return _table(("triangle layers", "window", "density", *tasks), ("triangle layers",), rows)


def losses(sources: Sources) -> str:
    """Losses by the triangle's layers, and the share of the middle's gradient that these lose."""
    section = only(sources.results.losses, device=INTEL)
    probe = only(sources.results.probes, device=INTEL)
    middles = {layer: cell.gradients(probe.derivative).middle or 0.0 for layer, cell in probe.layers.items()}
    rows = []
    for cell in section.cells:
        share = ""
        if cell.label == "dense":
            name = "none: dense"
        elif cell.row.method == "tri_mix":
            layers = deep_layers(cell.row)
            what = {probe.proposed: "the proposal", tuple(range(LAYERS)): "all"}.get(layers, cell.row.layers_source)
            name = f"{layers_text(layers, LAYERS)}: {what}"
            share = f"{sum(middles[layer] for layer in layers) / sum(middles.values()):.3f}"
        else:
            name = f"{cell.row.method}, no last rows"
        own = (cell.row.nll_prompt, cell.row.nll_answer, cell.row.nll_first)
        found = (cell.prompt, cell.answer, cell.first)
        texts = [figure_text(nll, ".4f") if one is None else one.text for nll, one in zip(own, found, strict=True)]
        rows.append([name, share, *texts])
    names = ("triangle layers", "share of the middle lost", "loss in the prompt", "of the answer", "of its first token")
    return _table(names, ("triangle layers",), rows)


def card(sources: Sources) -> str:
    """The embedded model's accuracy by task and length, with dense attention."""
    lines = sources.lines("training/accuracy.csv")
    found: dict[int, dict[str, float]] = {}
    for line in lines:
        found.setdefault(int(line["length"]), {})[line["task"]] = float(line["accuracy"])
    for length in (8192, 16384):
        scores = only(sources.results.ruler, device=H100, length=length).scores["dense"]
        found[length] = dict(scores)
    lengths = sorted(found)
    rows = [[task, *(f"{found[length][task]:.1f}" for length in lengths)] for task in TASKS]
    means = [statistics.fmean(found[length].values()) for length in lengths]
    rows.append(["**mean of 13**", *(f"**{mean:.1f}**" for mean in means)])
    return _table(("task", *map(str, lengths)), ("task",), rows)


ACCURACY: dict[str, Block] = {
    "tiny-methods": all_methods,
    "tiny-budgets": budgets,
    "tiny-layers": single_task,
    "tiny-sweep": sweep,
    "tiny-longer": longer,
    "tiny-losses": losses,
    "tiny-card": card,
}

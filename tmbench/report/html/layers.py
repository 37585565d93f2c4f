"""The page of layers: what a probe found of each, what it proposes, which sets were searched, and what methods took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tmbench.methods.table import LAYERS
from tmbench.report.html.blocks import block_of, filters_of
from tmbench.report.html.charts import Axis, Chart, Point, Series, chart_of
from tmbench.report.plot_style import COLOURS, MARKERS
from tmbench.report.probe import DERIVATIVES, ProbeCell, ProbeSection, SectionGradients
from tmbench.report.records import SECTIONS
from tmbench.report.report import Report
from tmbench.report.table import Table, columns
from tmbench.report.words import NOTHING
from tmbench.results.rows import Row, RulerRow, TtftRow
from tmbench.results.words import length_name


def content(report: Report, root: Path) -> Mapping[str, Any]:
    """What the page's template is given."""
    blocks = [block_of(section, _charts(section), lengths=[section.setting.length]) for section in report.probes]
    blocks += [block_of(section) for section in report.tunes]
    data = [block.charts for block in blocks]
    taken = _taken([cell.row for section in (*report.ttft, *report.scores) for cell in section.measured()])
    return {"blocks": blocks, "filters": filters_of(blocks), "data": data, "taken": taken}


def _charts(section: ProbeSection) -> list[Chart]:
    layers, length = section.layers, section.setting.length
    if not layers:
        return []
    gradients = {layer: cell.gradients(section.derivative) for layer, cell in layers.items()}
    series = [_gradients(number, name, gradients, length) for number, name in enumerate(SECTIONS)]
    bands = [(layer - 0.5, layer + 0.5) for layer in section.proposed]
    ends = (-0.5, max(layers) + 0.5)
    axis = Axis("layer", ends=ends)
    by = f"mean {DERIVATIVES[section.derivative]}"
    name = "Gradients by section; marked: the layers proposed for triangle attention; what is 0 has no place"
    found = [chart_of(name, axis, Axis(by, "log"), series, bands=bands)]
    densities = [_density(layer, cell, length) for layer, cell in layers.items() if cell.row.kept_share is not None]
    if section.proposed and densities:
        line = Series("density", "currentColor", MARKERS[0], 0, densities)
        name = "Density by layer under the proposal: the share of the causal pairs that is computed"
        found.append(chart_of(name, axis, Axis("density, %", ends=(0.0, 100.0)), [line], bands=bands))
    return [chart for chart in found if chart.series]


def _gradients(number: int, name: str, gradients: Mapping[int, SectionGradients], length: int) -> Series:
    values = {layer: getattr(found, name) for layer, found in gradients.items()}
    points = [
        Point(layer, value, f"layer {layer}, {name}: {value:.2e}", length)
        for layer, value in values.items()
        if value is not None
    ]
    return Series(name, COLOURS[1:][number], MARKERS[number], 0, points)


def _density(layer: int, cell: ProbeCell, length: int) -> Point:
    """What a layer computes: triangle attention leaves the middle section out, dense attention nothing."""
    assert cell.row.kept_share is not None
    share = cell.row.kept_share if cell.row.triangle else 1.0
    words = f"layer {layer}, {'triangle' if cell.row.triangle else 'dense'}: density {share:.1%}"
    return Point(layer, 100 * share, words, length)


def _taken(rows: Sequence[Row]) -> Table:
    """The deep layers of methods, where the choice is from, and the density over all layers at each length."""
    found: dict[tuple[str, ...], dict[int, float]] = {}
    for row in rows:
        if LAYERS in row.settings:
            place = _place(row)
            densities = found.setdefault(place, {})
            if isinstance(row, TtftRow | RulerRow) and row.coverage is not None:
                densities.setdefault(row.length, row.coverage)
    lines = []
    for place, densities in found.items():
        by_length = ", ".join(f"{length_name(length)} {densities[length]:.1%}" for length in sorted(densities))
        lines.append([*place, by_length or NOTHING])
    names = ("method", "model", "device", "layers", "chosen", "other parameters", "density over all layers")
    return Table("The layers that methods gave their deep pattern:", columns(*names, texts=names), lines)


def _place(row: Row) -> tuple[str, ...]:
    given = dict(row.settings)
    layers = str(given.pop(LAYERS))
    others = ", ".join(f"{name} {value}" for name, value in given.items())
    return row.method, row.model, row.device_name or row.device, layers, row.layers_source or NOTHING, others

"""The pictures of a report, and files of pictures that are there whole or not at all."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from tmbench.report.probe_plot import probe_figure
from tmbench.report.report import Report
from tmbench.report.ruler_plot import ruler_figure
from tmbench.report.settings import ProbeSetting, Setting
from tmbench.report.tradeoff_plot import trade_off_figure
from tmbench.report.ttft_plot import speed_up_figure, ttft_figure
from tmbench.report.tune import shows
from tmbench.report.tune_plot import tune_figure
from tmbench.results.files import write_whole
from tmbench.results.rows import ProbeRow
from tmbench.results.words import length_name


def figures(report: Report) -> dict[str, Figure]:
    """The figures of all sections by the names of their files: a section's names are always the same."""
    found: dict[str, Figure] = {}
    for times in report.ttft:
        if times.measured():
            found[file_name("ttft", times.setting, times.setting.prompt)] = ttft_figure(times)
        if any(cell.percent_vs_dense is not None for cell in times.cells):
            found[file_name("speed-up", times.setting, times.setting.prompt)] = speed_up_figure(times)
    for scores in report.scores:
        if scores.measured():
            kind = scores.cells[0].row.kind
            found[file_name(kind, scores.setting, length_name(scores.setting.length))] = ruler_figure(scores)
    for both in report.trade_offs:
        found[file_name("trade-off", both.setting, length_name(both.setting.length))] = trade_off_figure(both)
    for probe in report.probes:
        if probe.layers:
            about = (probe.setting.task, length_name(probe.setting.length))
            rows = [cell.row for cell in probe.layers.values()]
            name = file_name("probe", probe.setting, *about, told=_probed(rows[0], probe.setting))
            found[name] = probe_figure(rows, probe.derivative)
    for tune in report.tunes:
        if shows(tune):
            row = tune.cells[0].row
            found[file_name("tune", tune.setting, tune.setting.method, row.task, row.lengths)] = tune_figure(tune)
    return found


def save_all(figures: Mapping[str, Figure], directory: Path) -> list[Path]:
    """Write figures as PNG files into a folder, made where it does not exist; returns their paths.

    Raises OSError where the folder cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        save(figure, directory / name)
    return [directory / name for name in figures]


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file, its folder made where there is none: whole, or the file stays as it was.

    Raises OSError where the file cannot be written.
    """
    picture = io.BytesIO()
    # Without a date and a version the same figure makes the same file.
    figure.savefig(picture, format="png", dpi=160, metadata={"Software": None})
    write_whole(path, picture.getvalue())


def file_name(kind: str, setting: Setting, *words: str, told: Sequence[object] = ()) -> str:
    """A file name for a picture: readable, safe on any file system, and different for different settings.

    Args:
        told: what tells the setting apart, where that is not its fields.
    """
    told = told or sorted(item for item in vars(setting).items() if item not in setting.BARE)
    digest = hashlib.sha256(repr(told).encode()).hexdigest()[:6]
    slug = _slug((kind, setting.device, setting.model.rstrip("/").rpartition("/")[2], *words))
    return f"{slug[:120]}-{digest}.png"


def _probed(row: ProbeRow, setting: ProbeSetting) -> tuple[object, ...]:
    """What tells a probe apart: names of its pictures are made of the same columns whatever the schema of its rows."""
    columns = (item for item in row.key_columns.items() if item[0] not in ("layer", "head"))
    return tuple(value for name, value in columns if (name, value) not in setting.BARE)


def _slug(words: Iterable[str]) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", "-".join(words).lower()).strip("-.")

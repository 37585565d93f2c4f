"""A picture of a probe: each layer's mean gradient of the three sections, and the layers that are proposed."""

from __future__ import annotations

import hashlib
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tmbench.report.plots import COLOURS, GREY, LABEL_PT, MARKERS, PALE, save
from tmbench.results.rows import OK, ProbeRow
from tmbench.results.tables import read_all
from tmbench.results.words import counted, length_name
from tmbench_kernels import SECTIONS

NAMES = {"logits": "|dz/ds|", "probabilities": "|dz/dp|"}


def draw(rows: Sequence[ProbeRow], derivative: str, path: Path) -> None:
    """Draw the layers' rows of one probe as a PNG; single heads are left out.

    The axis is logarithmic: sections and layers differ by orders of magnitude. A gradient of exactly zero has no place on it
    and is named below it. Raises OSError where the file cannot be written.
    """
    layers = {row.layer: row for row in rows if row.head is None and row.layer is not None}
    first = layers[0]
    figure = Figure(figsize=(8.4, 4.9), layout="constrained")
    axes = figure.subplots()
    zeros = []
    for number, section in enumerate(SECTIONS):
        values = {layer: getattr(row, f"{section}_{derivative}") for layer, row in layers.items()}
        shown = {layer: value for layer, value in values.items() if value}
        zeros += [f"{section} of layer {layer}" for layer, value in values.items() if value == 0]
        axes.plot(
            list(shown),
            list(shown.values()),
            color=COLOURS[1:][number],
            marker=MARKERS[number],
            linewidth=2,
            markersize=5.5,
            markeredgecolor="white",
            markeredgewidth=0.8,
            label=section,
        )
    axes.set_yscale("log")
    for layer, row in layers.items():
        if row.triangle:
            axes.axvspan(layer - 0.5, layer + 0.5, color=PALE, alpha=0.45, linewidth=0, zorder=0)
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    below = ["layer; grey: proposed for triangle attention"]
    if zeros:
        below.append(textwrap.fill(f"zero, and not shown: {', '.join(zeros)}", 100))
    axes.set_xlabel("\n".join(below), color=GREY, fontsize=LABEL_PT)
    axes.set_ylabel(f"{NAMES[derivative]}, mean over pairs, heads and samples", color=GREY, fontsize=LABEL_PT)
    figure.suptitle("Gradient of the true next token's logit by section", x=0.012, ha="left", fontsize=13, weight="bold")
    contents = f" (files {first.model_hash[:8]})" if first.model_hash else ""
    about = (
        f"{first.model}{contents}, {first.weights} weights, {first.dtype}; {first.task} at {length_name(first.length)}, "
        f"{counted(first.samples, 'sample')}; "
        f"{', '.join(f'{name} {value}' for name, value in first.settings.items())}; {first.device_name}"
    )
    axes.set_title("\n".join(textwrap.wrap(about, 110)), loc="left", fontsize=LABEL_PT, color=GREY)
    axes.legend(frameon=False, fontsize=LABEL_PT)
    axes.grid(color=PALE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE)
    axes.tick_params(which="both", color=PALE, labelsize=LABEL_PT)
    save(figure, path)


def draw_all(root: Path, directory: Path) -> list[Path]:
    """Draw every probe under a results folder into another one, by the derivative that its proposal goes by.

    A probe's file name is always the same. Raises OSError where the folder cannot be written, and CorruptResultsError for a
    file of probe results that is not ours.
    """
    probes: dict[tuple[Any, ...], list[ProbeRow]] = {}
    for row in read_all(root, ProbeRow):
        if isinstance(row, ProbeRow) and row.status == OK:
            probes.setdefault(row.probed, []).append(row)
    paths = []
    for rows in probes.values():
        first = rows[0]
        words = ["probe", first.device, first.model.rstrip("/").rpartition("/")[2], first.task, length_name(first.length)]
        slug = re.sub(r"[^a-z0-9.]+", "-", "-".join(words).lower()).strip("-.")
        # What older rows have not leaves the names of their pictures as they were.
        later = {"model_hash": "", "prefill": "plain"}
        columns = {name: value for name, value in first.key_columns.items() if name not in ("layer", "head")}
        told = tuple(value for name, value in columns.items() if name not in later or value != later[name])
        digest = hashlib.sha256(repr(told).encode()).hexdigest()[:6]
        paths.append(directory / f"{slug[:120]}-{digest}.png")
        draw(rows, next(row.proposal for row in rows if row.proposal).rpartition(", ")[2], paths[-1])
    return paths

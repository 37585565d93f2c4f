"""A picture of a probe: each layer's mean gradient of the three sections, and the layers that are proposed."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tmbench.report.plot_style import COLOURS, GREY, LABEL_PT, MARKERS, PALE, plain_axes
from tmbench.report.probe import DERIVATIVES, Derivative, ProbeCell
from tmbench.results.rows import ProbeRow
from tmbench.results.words import counted, length_name


def probe_figure(rows: Sequence[ProbeRow], derivative: Derivative) -> Figure:
    """The layers' rows of one probe; single heads are left out.

    The axis is logarithmic: sections and layers differ by orders of magnitude. A gradient of exactly zero has no place on it
    and is named below it.
    """
    layers = {row.layer: row for row in rows if row.head is None and row.layer is not None}
    first = next(iter(layers.values()))
    figure = Figure(figsize=(8.4, 4.9), layout="constrained")
    axes = figure.subplots()
    gradients = {layer: asdict(ProbeCell(row, row.method).gradients(derivative)) for layer, row in layers.items()}
    zeros = []
    for number, section in enumerate(next(iter(gradients.values()))):
        values = {layer: found[section] for layer, found in gradients.items()}
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
    axes.set_xlim(-0.5, max(layers) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    below = ["layer; grey: proposed for triangle attention"]
    if zeros:
        below.append(textwrap.fill(f"zero, and not shown: {', '.join(zeros)}", 100))
    axes.set_xlabel("\n".join(below), color=GREY, fontsize=LABEL_PT)
    axes.set_ylabel(f"{DERIVATIVES[derivative]}, mean over pairs, heads and samples", color=GREY, fontsize=LABEL_PT)
    figure.suptitle("Gradient of the true next token's logit by section", x=0.012, ha="left", fontsize=13, weight="bold")
    contents = f" (files {first.model_hash[:8]})" if first.model_hash else ""
    parameters = ", ".join(f"{name} {value}" for name, value in first.settings.items())
    about = (
        f"{first.model}{contents}, {first.weights} weights, {first.dtype}; {first.task} at {length_name(first.length)}, "
        f"{counted(first.samples, 'sample')}; {parameters}; {first.device_name}"
    )
    axes.set_title("\n".join(textwrap.wrap(about, 110)), loc="left", fontsize=LABEL_PT, color=GREY)
    axes.legend(frameon=False, fontsize=LABEL_PT)
    plain_axes(axes)
    return figure

"""A picture of a file of head patterns: layers down, heads across, a colour for each type and budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from tmbench.report.plot_style import COLOURS, GREY, PALE
from tmbench_kernels import HeadPattern

LETTERS = {"vertical_and_slash": "", "stream_llm": "s", "block_sparse": "b"}
CELL_INCH = 0.18
Kind = tuple[str, int, int]
"""A head's type and its two numbers."""


def pattern_figure(layers: Sequence[Mapping[int, HeadPattern]]) -> Figure:
    """A file's heads; those that the file leaves out stay empty.

    Where there are more kinds than colours, a cell's colour is how much a head may keep, columns and distances together, and
    a letter marks streaming and block-sparse heads.
    """
    heads = max((max(layer, default=-1) for layer in layers), default=-1) + 1
    figure = Figure(figsize=(3.0 + CELL_INCH * heads, 2.4 + CELL_INCH * len(layers)), layout="constrained")
    axes = figure.add_subplot()
    kinds = Counter((head.type, head.vertical, head.slash) for layer in layers for head in layer.values())
    if len(kinds) < len(COLOURS):
        colours = {kind: COLOURS[number + 1] for number, (kind, _) in enumerate(kinds.most_common())}
        _cells(axes, layers, {kind: (colour, "") for kind, colour in colours.items()})
        names = {kind: kind[0] if kind[0] == "block_sparse" else f"{kind[0]} {kind[1]}, {kind[2]}" for kind in colours}
        patches = [Patch(color=colour, label=f"{names[kind]} ({kinds[kind]})") for kind, colour in colours.items()]
        figure.legend(handles=patches, loc="outside lower left", frameon=False, fontsize=8)
    else:
        sizes = {kind: max(1, kind[1] + kind[2]) for kind in kinds}
        scale = ScalarMappable(LogNorm(min(sizes.values()), max(sizes.values()) + 1), colormaps["viridis"])
        colour_of = dict(zip(sizes, map(tuple, scale.to_rgba(np.array(list(sizes.values())))), strict=True))
        _cells(axes, layers, {kind: (colour, LETTERS[kind[0]]) for kind, colour in colour_of.items()})
        figure.colorbar(scale, ax=axes, label="columns and distances that a head may keep")
    axes.set(xlim=(-0.5, heads - 0.5), ylim=(len(layers) - 0.5, -0.5), xlabel="head", ylabel="layer", aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(colors=GREY)
    axes.spines[:].set_color(PALE)
    return figure


def _cells(axes: Axes, layers: Sequence[Mapping[int, HeadPattern]], looks: Mapping[Kind, tuple[Any, str]]) -> None:
    for row, layer in enumerate(layers):
        for column, head in layer.items():
            colour, letter = looks[head.type, head.vertical, head.slash]
            axes.add_patch(Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, facecolor=colour))
            if letter:
                axes.text(column, row, letter, ha="center", va="center", color="white", fontsize=7)

"""What all pictures have in common: colours, markers, headings and axes.

A method has the same colour and marker in every picture. Figures are drawn without pyplot, so that no global state is
touched and no display is needed.
"""

from __future__ import annotations

import textwrap

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tmbench.methods.table import METHODS

COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's palette, told apart with any kind of colour blindness; black is for dense, the first of the methods."""
MARKERS = "osD^vPX"
GREY, PALE = "#5f6368", "#dadce0"
TEXT_PT, LABEL_PT = 10.0, 9.0
ROW_INCH, MARGINS_INCH = 0.17, 1.45
"""The height of a line of words, and what the titles and the axis take of a figure's height."""


def method_look(method: str) -> tuple[str, str]:
    """A method's colour and marker: beyond seven methods colours return with other markers."""
    place = list(METHODS).index(method) if method in METHODS else len(METHODS)
    return COLOURS[place % len(COLOURS)], MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]


def titles(figure: Figure, heading: str, about: str) -> None:
    """A bold heading and grey lines below it, from the left edge on."""
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(about, int(width * 13))
    # The layout makes room for the one heading only: its empty lines keep a place for what is written below it.
    figure.suptitle(heading + "\n" * len(lines), x=0.012, ha="left", fontsize=13, weight="bold")
    figure.text(0.012, 1 - 0.33 / height, "\n".join(lines), va="top", fontsize=LABEL_PT, color=GREY)


def plain_axes(axes: Axes) -> None:
    """A pale grid behind the data, and no frame above and on the right."""
    axes.grid(color=PALE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE)
    axes.tick_params(which="both", color=PALE, labelsize=LABEL_PT)

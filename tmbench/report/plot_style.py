"""What all pictures have in common: colours, markers, headings and axes.

A method looks the same in every picture. Methods that choose keys by one rule have one hue: the line is dashed where the
rule has all layers, and solid where triangle attention has the deep ones. Figures are drawn without pyplot, so that no
global state is touched and no display is needed.
"""

from __future__ import annotations

import textwrap
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tmbench.methods.table import METHODS, Method

COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#808000", "#7a4a12", "#6a3d9a")
"""Okabe and Ito's palette, told apart with any kind of colour blindness, then olive, brown, purple; black is for dense."""
MARKERS = "osD^vPXp"
SOLID, DASHED = "-", "--"
GREY, PALE = "#5f6368", "#dadce0"
TEXT_PT, LABEL_PT = 10.0, 9.0
ROW_INCH, MARGINS_INCH = 0.17, 1.45
"""The height of a line of words, and what the titles and the axis take of a figure's height."""


class Look(NamedTuple):
    """How a method is drawn."""

    colour: str
    marker: str
    line: str
    """As matplotlib writes it."""


def method_look(name: str, variant: int = 0) -> Look:
    """A method's look; ``variant`` is its number among those of the method in one picture, which differ in their marker."""
    method = METHODS.get(name)
    if method is None:
        return Look(GREY, MARKERS[variant % len(MARKERS)], DASHED)
    families = list(dict.fromkeys(map(_family, METHODS.values())))
    place = families.index(_family(method))
    # Beyond the palette, hues come again, but never dense's black.
    hue = place if place < len(COLOURS) else 1 + (place - 1) % (len(COLOURS) - 1)
    alone = method.deep is None and place > 0
    return Look(COLOURS[hue], MARKERS[(place + variant) % len(MARKERS)], DASHED if alone else SOLID)


def _family(method: Method) -> tuple[object, bool]:
    """What has one hue: the rule of the shallow layers, and for triangle attention below dense layers that alone."""
    rule = method.shallow.declaration
    return rule, method.deep is not None and rule == "Dense"


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

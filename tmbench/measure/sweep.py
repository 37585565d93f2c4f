"""Ablations: one method at many settings, each timed and asked, with dense beside it.

A sweep is nothing but rows of TTFT and of RULER. What was measured before, by this command or by the two others, is not
measured again, and the report makes of the rows what they say together. A variant is a ``Settings``, and which layers are
deep is one axis, ``where``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from tmbench.errors import UserError
from tmbench.measure.ruler import RulerJob
from tmbench.measure.ttft import TtftJob
from tmbench.methods.table import METHODS, Method, Plan, Settings, parse_method
from tmbench_kernels import Triangle


def swept_method(text: str) -> tuple[Method, dict[str, int | float]]:
    """The method of ``--method``, and the parameters that follow its name; raises UserError for one without a triangle."""
    method, own = parse_method(text)
    if "last_n" not in method.parameters:
        choices = ", ".join(name for name, other in METHODS.items() if "last_n" in other.parameters)
        raise UserError(f"--method {method.name} has no triangle whose parameters could be swept: choose from {choices}")
    return method, own


def variants(
    where: Sequence[Mapping[str, Any]],
    n_init: Sequence[int],
    n_local: Sequence[int],
    last_n: Sequence[int],
    own: Mapping[str, int | float],
) -> list[Settings]:
    """Every combination, each once; an axis without values is left at its default.

    Args:
        where: which layers are deep, each as fields of Settings: ``{"starting_layer": 16}`` or ``{"layers": "auto"}``.
        own: what all variants have in common.
    """
    axes = {"n_init": n_init, "n_local": n_local, "last_n": last_n}
    given = {name: values for name, values in axes.items() if values}
    points = product(where or [{}], *given.values())
    made: list[Settings] = []
    for deep, *values in points:
        fields: dict[str, Any] = {**own, **deep, **dict(zip(given, values, strict=True))}
        made.append(Settings(**fields))
    return list(dict.fromkeys(made))


def same_cost(settings: Settings, length: int) -> Settings | None:
    """The same without last queries, its window so much wider that it computes as many pairs of a prompt of this length.

    If that keeps as much, the last queries buy nothing that any other pairs would not. None where there is nothing to
    exchange: no last queries, or a triangle that covers the whole prompt.
    """
    shape = torch.empty(1, 1, length, 1, device="meta")

    def pairs(window: int, last: int) -> int:
        return Triangle(settings.n_init, window, last).pairs(shape, shape)

    wanted = pairs(settings.n_local, settings.last_n)
    if settings.last_n == 0 or wanted == length * (length + 1) // 2:
        return None
    low, high = settings.n_local, length
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if pairs(middle, 0) >= wanted else (middle + 1, high)
    nearest = min((low - 1, low), key=lambda window: abs(pairs(window, 0) - wanted))
    return replace(settings, n_local=nearest, last_n=0) if nearest > settings.n_local else None


@dataclass(frozen=True)
class SweepJob:
    """What one ``tmbench sweep`` measures; the two jobs say how, and their plans and lengths are set here."""

    method: Method
    settings: Sequence[Settings]
    ttft: TtftJob
    ruler: RulerJob
    lengths: Sequence[int]
    controls: bool = False
    """Whether each variant is also measured without last queries at the same cost."""

    def plans(self, length: int) -> list[Plan]:
        """Dense and every variant at this length, each once; raises UserError for settings that do not fit the model."""
        shape = self.ttft.loaded.shape
        controls = [control for one in self.settings if self.controls and (control := same_cost(one, length))]
        made = [METHODS["dense"].plan(shape, Settings())]
        made += [self.method.plan(shape, one) for one in [*self.settings, *controls]]
        once = {(plan.method, *sorted(plan.parameters.items())): plan for plan in reversed(made)}
        return list(reversed(once.values()))

    def timing(self, length: int) -> TtftJob | None:
        """What is still to be timed at this length, in turns with dense, which is timed anew; None where nothing is."""
        whole = replace(self.ttft, plans=self.plans(length), lengths=(length,))
        pending = [plan for plan in whole.pending().get(length, []) if plan.method != "dense"]
        dense = [plan for plan in whole.plans if plan.method == "dense"]
        return replace(whole, plans=[*dense, *pending], overwrite=True) if pending else None

    def asking(self, length: int) -> RulerJob:
        """The questions at this length: samples that were answered before are not asked again."""
        return replace(self.ruler, plans=self.plans(length), lengths=(length,))

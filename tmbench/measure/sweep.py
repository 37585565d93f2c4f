"""Ablations: one method at many settings, each timed and asked, with dense beside it.

A sweep is nothing but rows of TTFT and of RULER. What was measured before, by this command or by the two others, is not
measured again, and the report makes of the rows what they say together. A variant is a ``Settings``, and which layers are
deep is one axis, ``where``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from tmbench.errors import UserError
from tmbench.measure.accuracy import AccuracySpec
from tmbench.measure.spec import Part, RowSpec
from tmbench.measure.ttft import TtftSpec
from tmbench.methods.table import METHODS, Method, ModelShape, Plan, Settings, parse_method
from tmbench.models.loading import LoadedModel
from tmbench.results.rows import Row
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


def swept_plans(
    method: Method, settings: Sequence[Settings], shape: ModelShape, length: int, *, controls: bool = False
) -> list[Plan]:
    """Dense and every variant at this length, each once; raises UserError for settings that do not fit the model.

    With ``controls`` each variant is also there without last queries at the same cost.
    """
    added = [control for one in settings if controls and (control := same_cost(one, length))]
    made = [METHODS["dense"].plan(shape, Settings())]
    made += [method.plan(shape, one) for one in [*settings, *added]]
    once = {(plan.method, *sorted(plan.parameters.items())): plan for plan in reversed(made)}
    return list(reversed(once.values()))


@dataclass(frozen=True, kw_only=True)
class SweepSpec(RowSpec[Row]):
    """What one ``tmbench sweep`` measures: at each length two halves, times and answers."""

    plans: Mapping[int, Sequence[Plan]]
    """By length: dense and every variant."""
    ttft: TtftSpec
    """How they are timed; its plans and lengths do not count, nor do those of ``accuracy``."""
    accuracy: AccuracySpec

    def timing(self, length: int) -> TtftSpec:
        """What is timed at this length: dense anew, in turns with what has not been timed yet."""
        return replace(self.ttft, plans=self.plans[length], lengths=(length,), beside_dense=True)

    def asking(self, length: int) -> AccuracySpec:
        """What is asked at this length."""
        return replace(self.accuracy, plans=self.plans[length], lengths=(length,))

    def check(self, loaded: LoadedModel) -> None:
        """Raise UserError where one of the halves cannot be measured at one of the lengths."""
        for half in (self.ttft, self.accuracy):
            replace(half, lengths=tuple(self.plans)).check(loaded)

    def parts(self, loaded: LoadedModel) -> Iterator[Part[Any]]:
        """The two halves of each length, times first."""
        for length in self.plans:
            for times in self.timing(length).parts(loaded):
                yield replace(times, title=f"times at {length}", finished=f"timed at {length}")
            for answers in self.asking(length).parts(loaded):
                yield replace(answers, title=f"{answers.title} at {length}", finished=f"asked at {length}")

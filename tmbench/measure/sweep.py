"""Ablations: one method at many settings, each timed and asked, with dense beside it.

A sweep is nothing but rows of TTFT and of RULER. What was measured before, by this command or by the two others, is not
measured again, and the report makes of the rows what they say together.
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
from tmbench.methods.plan import ModelShape, Plan
from tmbench.methods.spec import MethodSpec
from tmbench.methods.table import METHODS, Method
from tmbench.models.loading import LoadedModel
from tmbench.results.rows import Row
from tmbench.results.variants import identity
from tmbench_kernels import Triangle


def swept_method(text: str) -> MethodSpec:
    """The method of ``--method``, with the values that follow its name; raises UserError for one without a triangle."""
    spec = MethodSpec.of(text)
    if not _has_triangle(spec.method):
        choices = ", ".join(name for name, other in METHODS.items() if _has_triangle(other))
        raise UserError(
            f"--method {spec.method.name} has no triangle whose parameters could be swept: choose from {choices}"
        )
    return spec


def _has_triangle(method: Method) -> bool:
    return method.deep is not None and method.deep.kind is Triangle


def variants(spec: MethodSpec, axes: Mapping[str, Sequence[int]]) -> list[MethodSpec]:
    """Every combination, each once: a method with one value of every axis, which is a parameter with several.

    Raises UserError for a value that a parameter cannot have.
    """
    found: list[MethodSpec] = []
    for values in product(*axes.values()):
        made = replace(spec, values=spec.method.read({**spec.values, **dict(zip(axes, values, strict=True))}))
        if made not in found:
            found.append(made)
    return found


def same_cost(spec: MethodSpec, length: int) -> MethodSpec | None:
    """The same without last queries, its window so much wider that it computes as many pairs of a prompt of this length.

    If that keeps as much, the last queries buy nothing that any other pairs would not. None where there is nothing to
    exchange: no last queries, or a triangle that covers the whole prompt.
    """
    assert spec.method.deep is not None
    triangle = spec.method.deep.make(spec.values)
    assert isinstance(triangle, Triangle)
    shape = torch.empty(1, 1, length, 1, device="meta")

    def pairs(window: int, last: int) -> int:
        return replace(triangle, n_local=window, last_n=last).pairs(shape, shape)

    wanted = pairs(triangle.n_local, triangle.last_n)
    if triangle.last_n == 0 or wanted == length * (length + 1) // 2:
        return None
    low, high = triangle.n_local, length
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if pairs(middle, 0) >= wanted else (middle + 1, high)
    nearest = min((low - 1, low), key=lambda window: abs(pairs(window, 0) - wanted))
    if nearest <= triangle.n_local:
        return None
    return replace(spec, values={**spec.values, "n_local": nearest, "last_n": 0})


def swept_plans(specs: Sequence[MethodSpec], shape: ModelShape, length: int, *, controls: bool = False) -> list[Plan]:
    """Dense and every variant at this length, each once; raises UserError for values that do not fit the model.

    With ``controls`` each variant is also there without last queries at the same cost.
    """
    added = [control for one in specs if controls and (control := same_cost(one, length))]
    made = [METHODS["dense"].plan(shape), *(one.plan(shape) for one in [*specs, *added])]
    once = {identity(plan): plan for plan in reversed(made)}
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
        """What is timed at this length: dense anew, interleaved with what has not been timed yet."""
        return replace(self.ttft, plans=self.plans[length], lengths=(length,), beside_dense=True)

    def asking(self, length: int) -> AccuracySpec:
        """What is asked at this length."""
        return replace(self.accuracy, plans=self.plans[length], lengths=(length,))

    def check(self, loaded: LoadedModel) -> None:
        """Raise UserError where one of the halves cannot be measured at one of the lengths."""
        plans = [plan for some in self.plans.values() for plan in some]
        for half in (self.ttft, self.accuracy):
            replace(half, lengths=tuple(self.plans), plans=plans).check(loaded)

    def notes(self, loaded: LoadedModel) -> Sequence[str]:
        """Of its answers."""
        return replace(self.accuracy, lengths=tuple(self.plans)).notes(loaded)

    def parts(self, loaded: LoadedModel) -> Iterator[Part[Any]]:
        """The two halves of each length, times first; of a shard only the answers, as times are interleaved."""
        for length in self.plans:
            for times in self.timing(length).parts(loaded) if self.shard is None else ():
                yield replace(times, title=f"times at {length}", finished=f"timed at {length}")
            for answers in self.asking(length).parts(loaded):
                yield replace(answers, title=f"{answers.title} at {length}", finished=f"asked at {length}")

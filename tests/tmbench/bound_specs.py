"""A spec together with a small model that no name loads: what tests measure in this process."""

from __future__ import annotations

from typing import Any

from tmbench.measure.executor import InProcess
from tmbench.measure.loop import run
from tmbench.measure.spec import ModelSource, Spec, Step
from tmbench.measure.ttft import TtftSpec
from tmbench.models.loading import LoadedModel


class Bound:
    """What a spec measures of one loaded model; an attribute that it has not is the spec's."""

    def __init__(self, kind: type[Spec[Any]], loaded: LoadedModel, **about: Any) -> None:
        self.loaded = loaded
        self.spec = kind(model=ModelSource.of(loaded), **about)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.spec, name)

    def check(self) -> None:
        """Raise UserError for what cannot be measured."""
        self.spec.check(self.loaded)

    def pending_plans(self) -> dict[int, list[Any]]:
        """What a TTFT has still to measure at each length."""
        assert isinstance(self.spec, TtftSpec)
        return {length: lacks.plans for length, lacks in self.spec.pending(self.loaded).items()}

    def run(self) -> list[Any]:
        """Measure what is missing; the rows of all that was asked for."""
        return run(self.spec, InProcess(self.loaded))

    def steps(self) -> list[Step[Any]]:
        """Measure what is missing; how it got on."""
        return self.run_and_steps()[1]

    def run_and_steps(self) -> tuple[list[Any], list[Step[Any]]]:
        """Measure what is missing; what was asked for, and how it got on."""
        steps: list[Step[Any]] = []
        return run(self.spec, InProcess(self.loaded), steps.append), steps

"""A spec together with a small model that no name loads: what tests measure in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from plans import plan_of
from tmbench.engine.prefill import EAGER
from tmbench.measure.executor import InProcess
from tmbench.measure.loop import run
from tmbench.measure.spec import ModelSource, Spec, Step
from tmbench.measure.ttft import TtftSpec
from tmbench.models.loading import LoadedModel
from tmbench.results import environment


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


def timed(loaded: LoadedModel, names: Sequence[str], root: Path, settings: Mapping[str, Any], **changes: Any) -> Bound:
    """A TTFT of these methods on a CPU: two repeats on random prompts, read eagerly, unless changed."""
    plans = [plan_of(loaded.model, name, **settings) for name in names]
    about: dict[str, Any] = {"environment": environment.current(torch.device("cpu")), "root": root, "plans": plans}
    return Bound(TtftSpec, loaded, **(about | {"prompt": "random", "repeats": 2, "prefill": EAGER} | changes))

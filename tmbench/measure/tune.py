"""Which layers can do without the middle of attention, found by measuring: a search, and a check on fresh prompts.

The loss of known answers is measured with triangle attention in a set of layers, and held against dense attention's on the
same prompts. ``tmbench.measure.choosing`` says which sets are tried. A trial reads prompts until ``tmbench.measure.betting``
can tell on which side of the margin the mean difference is.

**What is sure.** Of many sets that are tried, one looks better than it is. So trials of the search may err, each with
``SEARCH_RISK``, and nothing rests on them. What the search accepted is checked on prompts that it did not read, the largest
set first, and the first set that the check accepts is chosen. The k-th checked set has the share ``1 / (k (k + 1))`` of the
risk. The shares add up to the whole, so with the confidence asked for the chosen set's mean capped difference, over the
mixture of tasks and lengths, is below the margin, whatever the search did and whenever a trial stopped.

**Budget.** Prompts that search and check read, dense attention's among them, and the seconds that these took. Both are
counted from the samples, whether measured now or kept before. So a run that is repeated takes the same way and measures
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from tmbench.errors import UserError
from tmbench.measure.choosing import Layers
from tmbench.measure.draws import Draws
from tmbench.measure.executor import Worker
from tmbench.measure.loss import check_model, loss_sample
from tmbench.measure.spec import ItemSpec, Part, RowSpec
from tmbench.measure.tuning import SEARCH_SHARE, TuneItem, Tuning
from tmbench.methods.installed import get_method
from tmbench.methods.plan import DeepLayers, ModelShape, Plan
from tmbench.models.loading import LoadedModel
from tmbench.results.rows import short_hash
from tmbench.results.tune_rows import HELD_OUT, TuneRow
from tmbench.suites.prompts import Kind
from tmbench.suites.questions import check_task

FEWEST = 8
"""A file of fewer prompts leaves nothing for the check and the comparison."""


@dataclass(frozen=True)
class Limits:
    """What a choice has to keep, and how sure it is to be. Raises UserError for limits that no test can keep."""

    margin: float
    """The mean difference to dense attention, in nats per token of the answer, that is still taken for none."""
    cap: float
    """A prompt's difference counts for no more than this."""
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.margin < float("inf"):
            raise UserError(f"--margin must be above 0 nats, not {self.margin:g}")
        if not self.margin < self.cap < float("inf"):
            raise UserError(f"--cap {self.cap:g} must be above --margin {self.margin:g}: several times as much")
        if not 0.5 <= self.confidence < 1:
            raise UserError(f"--confidence must be from 0.5 to below 1, not {self.confidence:g}")

    @property
    def risk(self) -> float:
        return 1 - self.confidence


@dataclass(frozen=True)
class Choice:
    """A set of layers that the chosen one is held against."""

    rule: str
    layers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TuneSpec(RowSpec[TuneRow], ItemSpec[TuneRow]):
    """What one ``tmbench tune`` measures."""

    method: str
    """One with a deep pattern, whose layers are searched."""
    values: Mapping[str, Any]
    """Of its parameters, as ``Method.read`` returns them."""
    tasks: Sequence[Kind]
    lengths: Sequence[int]
    limits: Limits
    order: Sequence[int]
    """The layers that may be chosen, those that need the middle of attention least first."""
    order_source: str
    """Where that is from, in words."""
    rules: Sequence[Choice] = ()
    """Sets of fixed rules, to compare with."""
    random: int = 0
    """How many sets of the same size are drawn at random, to compare with."""
    compared: int = 32
    """Prompts that sets are compared on."""
    budget: int
    """Prompts that search and check may read."""
    minutes: float | None = None
    """How long that may take, of all workers together."""
    held_tasks: Sequence[Kind] = ()
    held_lengths: Sequence[int] = ()
    step: int = 8
    """Prompts that a trial asks for at a time."""

    def check(self, loaded: LoadedModel) -> None:
        """Raise UserError before anything is measured where the model, a task or a length does not do."""
        check_model(loaded.model)
        for task, length in [*product(self.tasks, self.lengths), *self.held]:
            check_task(task, length, loaded, FEWEST)
        asked = set(product(map(str, self.tasks), self.lengths))
        if seen := [(task, length) for task, length in self.held if (str(task), length) in asked]:
            task, length = seen[0]
            raise UserError(
                f"--held-out-task {task} at {length} tokens is what the search reads: hold out a task or a length of its own"
            )
        if self.minutes is not None and not self.minutes > 0:
            raise UserError(f"--budget-minutes must be above 0, not {self.minutes:g}")
        if not self.order:
            raise UserError(
                f"{loaded.name} has no layer in which a pattern saves time, so none can be chosen: see tmbench list"
            )
        if self.budget < 2 * self.step:
            raise UserError(f"--budget-prefills {self.budget} is less than one trial: give at least {2 * self.step}")

    @property
    def held(self) -> list[tuple[Kind, int]]:
        """The tasks and lengths that neither search nor check reads."""
        if not self.held_tasks and not self.held_lengths:
            return []
        return list(product(self.held_tasks or self.tasks, self.held_lengths or self.lengths))

    @property
    def searching(self) -> int:
        """The part of the budget that the search may take."""
        return int(SEARCH_SHARE * self.budget)

    @property
    def seconds(self) -> float:
        """How long search and check may take."""
        return math.inf if self.minutes is None else 60 * self.minutes

    @property
    def tuning(self) -> str:
        """A hash of all that decides how the run goes."""
        told = (
            self.method, sorted(self.values.items()), list(map(str, self.tasks)), list(self.lengths), self.limits,
            list(self.order), list(self.rules), self.random, self.compared, self.budget, self.minutes,
            list(map(str, self.held_tasks)), list(self.held_lengths), self.step,
        )  # fmt: skip
        return short_hash(repr(told))

    @property
    def most_compared(self) -> int:
        """How many prompts a comparison reads at most: dense attention's, the chosen set's, and those of all others."""
        return self.compared * (len(self.rules) + self.random + 4)

    @property
    def tries_empty(self) -> bool:
        """Whether the method differs from dense attention where no layer is deep."""
        return get_method(self.method).shallow.declaration != "Dense"

    def plan(self, shape: ModelShape, layers: Layers, rule: str) -> Plan:
        """The method with these deep layers."""
        return get_method(self.method).plan(shape, self.values, DeepLayers(layers, rule))

    def draws(self, stage: str, loaded: LoadedModel) -> Draws:
        """The prompts of a stage, which no other stage reads."""
        return Draws(self.held if stage == HELD_OUT else list(product(self.tasks, self.lengths)), stage, self.seed, loaded)

    def parts(self, loaded: LoadedModel) -> Iterator[Part[TuneRow]]:
        """The search, the check, and once a set was chosen what it is compared with."""
        run = Tuning(self, loaded)
        yield Part(self, "Search", "Searched", self.searching, run.search())
        yield Part(self, "Check", "Checked", self.budget - run.prefills, run.check())
        if run.chosen is not None:
            for stage, title, finished in run.comparisons():
                yield Part(self, title, finished, run.to_compare(stage), run.compare(stage))

    def measure(self, item: TuneItem, worker: Worker) -> None:
        """Have one plan read one prompt and its answer."""
        worker.keep(loss_sample(worker.loaded, item.plan, self.prefill, item.question, worker.ran))

"""Which prompts a trial reads: drawn from several tasks and lengths, so that every prompt is one of their mixture.

The task and the length of each prompt are drawn, each pair as likely as another. So a mean over prompts estimates the mean
over all pairs, one prompt at a time. The search takes the even numbers of a task's prompts; check and comparison take the
odd ones in turns. That keeps them apart in a file of prompts too, whose order is drawn first.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from tmbench.models.loading import LoadedModel
from tmbench.results.tune_rows import CHECK, COMPARISON, HELD_OUT, SEARCH
from tmbench.suites.prompt_files import PromptFile
from tmbench.suites.prompts import Kind

NUMBERS = {SEARCH: (0, 2), CHECK: (1, 4), COMPARISON: (3, 4), HELD_OUT: (0, 1)}
"""The first number that a stage takes of each task's prompts, and the step to the next."""


@dataclass(frozen=True)
class Draw:
    """One prompt."""

    task: Kind
    length: int
    index: int


@dataclass
class Draws:
    """Prompts in the order in which trials read them, as many as there are."""

    kinds: Sequence[tuple[Kind, int]]
    """Tasks with their lengths."""
    stage: str
    seed: int
    loaded: LoadedModel
    _made: list[Draw] = field(default_factory=list)
    _more: Iterator[Draw] | None = None

    def first(self, count: int) -> list[Draw]:
        """The first so many, or all where there are fewer."""
        self._more = self._more or self._drawn()
        self._made += islice(self._more, max(0, count - len(self._made)))
        return self._made[:count]

    def _drawn(self) -> Iterator[Draw]:
        source, taken = random.Random(f"{self.seed}/{self.stage}"), Counter[int]()
        first, step = NUMBERS[self.stage]
        orders = [self._order(task, length) for task, length in self.kinds]
        while True:
            kind = source.randrange(len(self.kinds))
            index = first + step * taken[kind]
            order = orders[kind]
            if order is not None and index >= len(order):
                return
            taken[kind] += 1
            yield Draw(*self.kinds[kind], index if order is None else order[index])

    def _order(self, task: Kind, length: int) -> list[int] | None:
        """The order of a file's prompts, the same for all stages: who wrote it may have sorted it. None for other tasks."""
        if not isinstance(task, PromptFile):
            return None
        numbers = list(range(task.count(self.loaded, length)))
        random.Random(f"{self.seed}/{task}/{length}").shuffle(numbers)
        return numbers

"""The one loop: an executor measures what a spec asks for, samples are kept as they come, the kept rows handed over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, Generic

from tmbench.measure.executor import Executor, Job, Message
from tmbench.measure.keeping import Target
from tmbench.measure.spec import Item, R, Spec, Step
from tmbench.results.words import counted


def run(spec: Spec[R], executor: Executor, show: Callable[[Step[R]], None] = lambda step: None) -> list[R]:
    """Measure what is missing; the rows of all that was asked for, those that were there before among them.

    ``show`` is given every step. A killed run goes on where it was when it is run again. An item that fails, or runs out of
    memory, makes its row say so, and the rest goes on.

    Raises UserError for what cannot be measured, and for a folder or a file that cannot be used. What was kept until then
    stays.
    """
    rows: list[R] = []

    def told(step: Step[R]) -> None:
        rows.extend(step.rows)
        show(step)

    loaded = executor.open(spec)
    spec.check(loaded)
    for part in spec.parts(loaded):
        told(Step(part=part))
        for targets in part.rounds:
            if isinstance(targets, Step):
                told(targets)
            else:
                part.spec.prepare()
                here = _Round(targets, part.spec.overwrite, told)
                executor.run(part.spec, here.jobs(), here.hear)
    return rows


class _Round(Generic[R]):
    """Targets whose items may be measured in any order. They are opened one by one, as jobs are asked for."""

    def __init__(self, targets: Sequence[Target[R, Any]], overwrite: bool, show: Callable[[Step[R]], None]) -> None:
        self.targets = targets
        self.overwrite = overwrite
        self.show = show
        self.running: dict[int, tuple[Target[R, Any], Item]] = {}

    def jobs(self) -> Iterator[Job]:
        numbers = count()
        for target in self.targets:
            there = target.open(self.overwrite)
            before = sum(item.work for item in target.items) - sum(item.work for item in target.waiting)
            if there or before:
                many = f" {counted(int(before), target.unit)}" if target.waiting else ""
                self.show(Step(f"{target.title}:{many} measured before", before, tuple(there)))
            if not there:
                self._settle(target)
            while target.waiting:
                number, item = next(numbers), target.waiting.popleft()
                self.running[number] = target, item
                target.running += 1
                yield number, item

    def hear(self, message: Message) -> None:
        target, item = self.running[message.number]
        if message.sample is not None:
            target.add(item, message.sample)
        if not message.ended:
            self.show(Step(message.text, message.work))
            return
        del self.running[message.number]
        target.running -= 1
        dropped = target.end(message.failure, message.backends)
        self.show(Step(work=sum(one.work for one in (item, *dropped) if not one.tells), measured=1))
        self._settle(target)

    def _settle(self, target: Target[R, Any]) -> None:
        """Keep what the target makes once nothing of it is left to be measured."""
        if not target.waiting and not target.running:
            self.show(Step(rows=tuple(target.finish())))

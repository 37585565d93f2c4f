"""The one loop: an executor measures what a spec asks for, samples are kept as they come, the kept rows handed over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import chain, count
from typing import Any, Generic

from tmbench.measure.ahead import ahead
from tmbench.measure.executor import Executor, Job, Message
from tmbench.measure.keeping import Target
from tmbench.measure.spec import Item, R, Spec, Step, Turns
from tmbench.results.words import counted

_Told = Step[R] | Target[R, Any] | Turns[R]


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

    loaded = executor.open(spec.model)
    spec.check(loaded)
    for part in spec.parts(loaded):
        told(Step(part=part))
        with ExitStack() as stack:
            rounds: Iterable[Step[R] | Iterable[_Told[R]]] = part.rounds
            if part.independent:
                # By rounds: one is made while the targets of the one before are measured, however many these are.
                rounds = [_together(stack.enter_context(closing(ahead(rounds))) if executor.elsewhere else rounds)]
            for targets in rounds:
                if isinstance(targets, Step):
                    told(targets)
                else:
                    part.spec.prepare()
                    here = _Round(targets, part.spec.overwrite, show)
                    executor.run(part.spec, here.jobs(), here.hear)
                    rows.extend(here.in_order())
    return rows


def _together(rounds: Iterable[Step[R] | Iterable[_Told[R]]]) -> Iterator[_Told[R]]:
    """The targets of all rounds as those of one."""
    for one in rounds:
        yield from [one] if isinstance(one, Step) else one


class _Round(Generic[R]):
    """Targets whose items may be measured in any order.

    They are opened one by one, as jobs are asked for, and those that take turns at once.
    """

    def __init__(self, targets: Iterable[_Told[R]], overwrite: bool, show: Callable[[Step[R]], None]) -> None:
        self.targets = targets
        self.overwrite = overwrite
        self.show = show
        self.running: dict[int, tuple[int, Target[R, Any], Item]] = {}
        self.rows: dict[int, Sequence[R]] = {}
        """By the number of their target."""

    def in_order(self) -> Iterator[R]:
        """All rows, in the order of the targets, whichever ended first."""
        return chain.from_iterable(self.rows[place] for place in sorted(self.rows))

    def jobs(self) -> Iterator[Job]:
        numbers, places = count(), count()
        for told in self.targets:
            if isinstance(told, Step):
                self._tell(next(places), told)
                continue
            opened = [(next(places), target) for target in (told.targets if isinstance(told, Turns) else [told])]
            for place, target in opened:
                self._open(place, target)
            while waiting := [one for one in opened if one[1].waiting]:
                place, target = min(waiting, key=lambda one: one[1].waiting[0].turn)
                number, item = next(numbers), target.waiting.popleft()
                self.running[number] = place, target, item
                target.running += 1
                yield number, item

    def _open(self, place: int, target: Target[R, Any]) -> None:
        there = target.open(self.overwrite)
        before = sum(item.work for item in target.items) - sum(item.work for item in target.waiting)
        if there or before:
            many = f" {counted(int(before), target.unit)}" if target.waiting else ""
            self._tell(place, Step(f"{target.title}:{many} measured before", before, tuple(there)))
        if not there:
            self._settle(place, target)

    def hear(self, message: Message) -> None:
        place, target, item = self.running[message.number]
        if message.sample is not None:
            target.add(item, message.sample)
        if not message.ended:
            self.show(Step(message.text, message.work))
            return
        del self.running[message.number]
        target.running -= 1
        dropped = target.end(message.failure, message.backends)
        self.show(Step(work=sum(one.work for one in (item, *dropped) if not one.tells), measured=1))
        self._settle(place, target)

    def _settle(self, place: int, target: Target[R, Any]) -> None:
        """Keep what the target makes once nothing of it is left to be measured."""
        if not target.waiting and not target.running:
            self._tell(place, Step(rows=tuple(target.finish())))

    def _tell(self, place: int, step: Step[R]) -> None:
        self.rows[place] = step.rows or self.rows.get(place, ())
        self.show(step)

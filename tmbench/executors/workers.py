"""Items measured by several workers, each with the model loaded once; what they run in, a transport knows.

A worker that is lost is replaced, and what it was measuring is measured again, each item alone, so that one of which a
worker is lost twice is known for it, and fails. Files are the driver's alone, which is this process.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, TypeVar

from tmbench.errors import UserError
from tmbench.executors.worker_loop import Answer, Ask, Done, Lost, Measure, Ready, Refused, Told, Wanted
from tmbench.measure.executor import Job, Message, Tell, UntilError
from tmbench.measure.spec import Item, ItemSpec, ModelSource, Place
from tmbench.models.loading import LoadedModel
from tmbench.results.failures import Failure
from tmbench.results.rows import FAILED
from tmbench.results.words import counted

T = TypeVar("T")
TRIES = 2
"""How many workers may be lost to an item, or in a row before they measure, before no other is tried."""


class Handle(Protocol):
    """One worker, as the driver has it."""

    def send(self, order: Any) -> None:
        """Give it an order, or a job; one that is lost is not told."""

    def kill(self) -> None:
        """End it, whatever it does."""


class Transport(Protocol):
    """Starts workers somewhere, each of which runs ``tmbench.executors.worker_loop.serve``."""

    count: int
    """How many there are to be."""

    def start(self, number: int, source: ModelSource) -> Handle:
        """Start the worker of this number, or the one that takes its place; raises UserError where that cannot be."""

    def wait(self, handles: Sequence[Any]) -> Sequence[tuple[Any, Told]]:
        """Wait until one of the workers has told something; what was told, by whom. A dead worker tells ``Lost``, once."""

    def close(self) -> None:
        """Give back what was started for all workers together."""


@dataclass(eq=False)
class _Worker:
    number: int
    handle: Handle
    loaded: bool = False
    order: Ask | Measure | None = None
    """What it is doing with the model."""
    answered: int = 0
    """How many of the run's questions."""
    begun: bool = False
    """Whether it was given a job under that order."""
    running: dict[int, Item] = field(default_factory=dict)
    alone: bool = False
    """Whether it measures an item again that a worker was lost to."""
    lost: int = 0
    """How many were lost at this place since one was last ordered to measure here."""
    own: deque[Job] = field(default_factory=deque)
    """Jobs of the same turn as the last one that it was given, which no other worker is to measure."""

    @property
    def waits(self) -> bool:
        """Whether it has the model, and nothing to do."""
        return self.loaded and self.order is None

    def obey(self, order: Ask | Measure) -> None:
        """Give it an order, which it has to fulfil before the next."""
        self.order = order
        self.handle.send(order)


class _Jobs:
    """The jobs of a run: those that were never given out, and those that have to be done again."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._new = iter(jobs)
        self._again: deque[Job] = deque()
        self._last: tuple[_Worker, tuple[int | str, ...]] | None = None
        """Who was given the last new job, and its turn, unless that worker was told since that there is no more."""
        self._kept: dict[int, set[Place]] = defaultdict(set)
        self._lost: dict[int, int] = defaultdict(int)
        self._exhausted = False

    @property
    def more(self) -> bool:
        """Whether a worker that is free should ask."""
        return bool(self._again) or not self._exhausted

    def next_for(self, worker: _Worker) -> Job | None:
        """The next job of a worker; None where it has to end what it holds first, or there is none."""
        if worker.own:
            return worker.own.popleft()
        job = self._found_for(worker)
        if job is not None:
            worker.begun = True
        elif self._last is not None and self._last[0] is worker:
            self._last = None
        return job

    def _found_for(self, worker: _Worker) -> Job | None:
        if self._again and not worker.running:
            worker.alone = not worker.begun
            return None if worker.begun else self._again.popleft()
        while not worker.alone and not self._exhausted:
            job = next(self._new, None)
            if job is None:
                self._exhausted = True
                break
            turn = job[1].turn
            if turn and self._last is not None and self._last[0] is not worker and self._last[1] == turn:
                self._last[0].own.append(job)
                continue
            self._last = worker, turn
            return job
        return None

    def kept(self, number: int, item: Item, sample: Any) -> None:
        self._kept[number].add((item.file, sample.index))

    def left(self, worker: _Worker) -> None:
        """A worker is gone: others are given what it alone was to be given next."""
        self._again.extend(worker.own)
        if self._last is not None and self._last[0] is worker:
            self._last = None

    def lost(self, number: int, item: Item, reason: str) -> Message | None:
        """A worker was lost while it measured this item; what is to be told of it, None where it is measured again."""
        left = item.without(self._kept.pop(number, set()))
        if left is None:
            return Message(number, ended=True)
        self._lost[number] += 1
        if self._lost[number] == TRIES:
            why = f"{counted(TRIES, 'worker')} ended while measuring it, the last one {reason}"
            return Message(number, ended=True, failure=Failure(FAILED, why))
        self._again.append((number, left))
        return None


class Workers:
    """Measures items elsewhere: an executor for as many workers as its transport has."""

    elsewhere: ClassVar[bool] = True

    def __init__(self, transport: Transport, say: Callable[[str], None] = lambda text: None) -> None:
        self._transport = transport
        self._say = say
        self._workers: list[_Worker] = []
        self._asked: ModelSource | None = None
        self._questions: list[Callable[[LoadedModel], Any]] = []
        """All that was asked of the model. Every worker answers them before it measures."""
        self._ready: Ready | None = None
        """Of the first that was ready."""
        self._loaded: LoadedModel | None = None

    def open(self, source: ModelSource) -> LoadedModel:
        """Have every worker load the model; its tokenizer and its geometry on the CPU, without weights, once one has.

        Raises as ``Executor.open``, and UserError where a worker cannot load it.
        """
        if self._asked is None:
            self._asked = source
            try:
                for number in range(self._transport.count):
                    self._workers.append(_Worker(number, self._transport.start(number, source)))
                while self._ready is None:
                    self._listen()
            except BaseException:
                self.close()
                raise
        assert self._ready is not None, "no worker could be opened"
        own = self._ready.source
        if source not in (self._asked, own):
            raise ValueError(f"this executor holds {own}, not {source}")
        if self._loaded is None:
            # Prompts are made on the CPU: this process uses no GPU.
            on_cpu = replace(own, device="cpu").load(plan_only=True)
            self._check_facts(self._ready.facts | on_cpu.row_fields(), "this process")
            self._loaded = on_cpu
        return self._loaded

    def ask(self, question: Callable[[LoadedModel], T]) -> T:
        """What a function says of the model, by the worker that answers first; raises UserError where none is left.

        All are asked at once, since each needs what it tries for its answer: how the model decodes takes seconds.
        """
        self._questions.append(question)
        self._question()
        while True:
            for worker, answer in self._listen():
                if worker.answered == len(self._questions):
                    found: T = answer.value
                    return found

    def run(self, spec: ItemSpec[Any], jobs: Iterable[Job], tell: Tell) -> None:
        """Have every job measured by whoever is free first; raises as ``Executor.run``."""
        until = UntilError(jobs)
        given = _Jobs(until)
        while spec.undisturbed and not all(worker.waits for worker in self._workers):
            self._listen()
        while True:
            for worker in self._workers:
                if worker.waits and given.more:
                    worker.begun, worker.alone, worker.lost = False, False, 0
                    worker.obey(Measure(spec))
            if not given.more and not any(isinstance(worker.order, Measure) for worker in self._workers):
                until.check()
                return
            self._listen(given, tell)

    def close(self) -> None:
        """End all workers, whatever they are doing."""
        for worker in self._workers:
            worker.handle.kill()
        self._workers.clear()
        self._transport.close()

    def _listen(self, given: _Jobs | None = None, tell: Tell | None = None) -> list[tuple[_Worker, Answer]]:
        """Hear what workers tell, once one of them tells something; what is an answer to a question.

        Who waits when this returns has answered all questions.
        """
        by_handle = {id(worker.handle): worker for worker in self._workers}
        answers = []
        for handle, told in self._transport.wait([worker.handle for worker in self._workers]):
            worker = by_handle[id(handle)]
            match told:
                case Ready():
                    if self._ready is None:
                        self._ready = told
                    self._check_facts(told.facts, f"worker {worker.number}")
                    worker.loaded = True
                case Answer():
                    worker.order = None
                    worker.answered += 1
                    answers.append((worker, told))
                case Refused(sentence) if worker.loaded or self._ready is None:
                    raise UserError(sentence)
                case Refused(reason) | Lost(reason):
                    self._replace(worker, reason, given, tell)
                case Done():
                    worker.order = None
                case _:
                    assert given is not None
                    assert tell is not None
                    _hear(worker, told, given, tell)
        self._question()
        return answers

    def _question(self) -> None:
        """Have whoever waits answer what it has not yet been asked."""
        for worker in self._workers:
            if worker.waits and worker.answered < len(self._questions):
                worker.obey(Ask(self._questions[worker.answered]))

    def _check_facts(self, facts: dict[str, Any], who: str) -> None:
        """Raise UserError where someone's rows would differ: of another device, other versions or another model."""
        assert self._ready is not None
        for name in facts | self._ready.facts:
            own, other = facts.get(name) or "nothing", self._ready.facts.get(name) or "nothing"
            if own != other:
                raise UserError(
                    f"the workers differ in {name}, which is {own} for {who} and {other} for another, and rows cannot say "
                    "both: run on devices of one kind, with the same versions and files"
                )

    def _replace(self, worker: _Worker, reason: str, given: _Jobs | None, tell: Tell | None) -> None:
        """Start another worker at the place of one that was lost, and have its items measured again."""
        self._workers.remove(worker)
        worker.handle.kill()
        again = 0
        if given is not None:
            given.left(worker)
        for number, item in worker.running.items():
            assert given is not None
            assert tell is not None
            if message := given.lost(number, item, reason):
                tell(message)
            else:
                again += 1
        what = f", and {counted(again, 'item')} will be measured again" if again else ""
        lost = worker.lost + 1
        if lost < TRIES:
            self._say(f"worker {worker.number} ended, {reason}: another takes its place{what}")
            source = self._ready.source if self._ready else self._asked
            assert source is not None
            self._workers.append(_Worker(worker.number, self._transport.start(worker.number, source), lost=lost))
        elif self._workers:
            self._say(f"worker {worker.number} ended, {reason}, as the one before: the others go on{what}")
        elif self._ready is None:
            assert self._asked is not None
            raise UserError(f"no worker can load {self._asked.name}: the last one ended, {reason}")
        else:
            raise UserError(f"no worker is left, the last one ended, {reason}: what was measured is kept, so run again")


def _hear(worker: _Worker, told: Told, given: _Jobs, tell: Tell) -> None:
    """What a worker tells while it measures."""
    if isinstance(told, Wanted):
        job = given.next_for(worker)
        if job is not None:
            worker.running[job[0]] = job[1]
        worker.handle.send(job)
        return
    assert isinstance(told, Message)
    if told.sample is not None:
        given.kept(told.number, worker.running[told.number], told.sample)
    if told.ended:
        del worker.running[told.number]
    tell(told)

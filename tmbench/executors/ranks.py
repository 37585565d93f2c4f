"""One model on several GPUs: rank 0 runs the loop as ever, and the others do the same work as it, order by order.

Rank 0 alone decides what is measured, keeps it and shows it. It gives out every order and every item before it begins one
itself, so all ranks measure the same items in the same order, and tell nobody but it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar

from tmbench.errors import UserError
from tmbench.executors.worker_loop import Ask, Measure
from tmbench.measure.attempt import attempt
from tmbench.measure.executor import Job, Message, Tell, work
from tmbench.measure.spec import ItemSpec, ModelSource
from tmbench.models import parallel
from tmbench.models.loading import LoadedModel
from tmbench.results.failures import Failure, describe
from tmbench.results.rows import OUT_OF_MEMORY

T = TypeVar("T")


@dataclass(frozen=True)
class Load:
    """An order: load this rank's part of a model."""

    source: ModelSource


@dataclass(frozen=True)
class Stop:
    """The last order: the run has ended, with this exit code."""

    code: int
    reason: str = ""
    """The sentence that rank 0 has said; "" where it has said none."""


class AcrossRanks:
    """Rank 0: measures one item after the other, with its part of the model, as all other ranks do with theirs."""

    elsewhere: ClassVar[bool] = False

    def __init__(self) -> None:
        self._loaded: LoadedModel | None = None
        self._asked: ModelSource | None = None

    def open(self, source: ModelSource) -> LoadedModel:
        """This rank's part of the model, loaded once; raises as ``Executor.open``."""
        if self._loaded is None:
            parallel.send(Load(source))
            self._loaded, self._asked = _together(source.load), source
        if source not in (self._asked, ModelSource.of(self._loaded)):
            raise ValueError(f"this executor holds {ModelSource.of(self._loaded)}, not {source}")
        return self._loaded

    def ask(self, question: Callable[[LoadedModel], T]) -> T:
        """What a function says of the model, on this rank."""
        assert self._loaded is not None, "no model was opened"
        parallel.send(Ask(question))
        return _together(partial(question, self._loaded))

    def run(self, spec: ItemSpec[Any], jobs: Iterable[Job], tell: Tell) -> None:
        """Have every job measured on all ranks."""
        loaded = self.open(spec.model)
        parallel.send(Measure(spec))

        def told(message: Message) -> None:
            try:
                tell(message)
            except UserError as error:
                raise _NotKeptError(error) from error

        try:
            work(spec, _given(jobs), loaded, told)
        except _NotKeptError as error:
            raise error.sentence from error

    def close(self) -> None:
        """The others wait for orders until rank 0 ends."""


class _NotKeptError(BaseException):
    """What was told cannot be kept, which ends the run.

    No Exception, of which an attempt would ask the other ranks: they know nothing of it, and are at work.
    """

    def __init__(self, sentence: UserError) -> None:
        super().__init__()
        self.sentence = sentence


def _given(jobs: Iterable[Job]) -> Iterator[Job]:
    for job in jobs:
        parallel.send(job)
        yield job
    parallel.send(None)


def _together(step: Callable[[], T]) -> T:
    """What all ranks do at once; raises UserError, for whatever reason one of them fails."""
    done = attempt(step)
    if isinstance(done, Failure):
        remedy = "give it more of them" if done.status == OUT_OF_MEMORY else "see that nothing else uses them"
        raise UserError(f"{parallel.size()} GPUs cannot share this model, {done.error}: {remedy}, or leave torchrun out")
    return done


class _EndedError(Exception):
    """Rank 0 has ended."""

    def __init__(self, stop: Stop) -> None:
        super().__init__()
        self.stop = stop


def follow() -> Stop:
    """What every rank but 0 does until rank 0 ends, and how it does; raises GoneError where it has gone without a word."""
    loaded: LoadedModel | None = None
    while True:
        order = parallel.receive()
        try:
            if isinstance(order, Stop):
                return order
            if isinstance(order, Load):
                loaded = _together(order.source.load)
            else:
                assert loaded is not None, "no model was opened"
                if isinstance(order, Ask):
                    _together(partial(order.question, loaded))
                else:
                    work(order.spec, _received(), loaded, lambda message: None)
        except _EndedError as end:
            return end.stop
        except UserError:
            # Rank 0 has the same, and says it.
            continue
        except parallel.GoneError:
            raise
        except Exception as error:
            # Rank 0 is elsewhere and cannot go on: what it is told ends the run.
            said = describe(error)
            parallel.exchanged((-1, None, said), said, ended=True)


def _received() -> Iterator[Job]:
    while (job := parallel.receive()) is not None:
        if isinstance(job, Stop):
            raise _EndedError(job)
        yield job

"""Who measures items: this process, the first of the executors. Whatever passes between it and the loop is plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

from tmbench.measure.contexts import LastContext
from tmbench.measure.spec import Item, ItemSpec, ModelSource
from tmbench.methods.plan import backends_name
from tmbench.models.loading import LoadedModel
from tmbench.results.failures import Failure


@dataclass(frozen=True)
class Message:
    """What a worker says of an item: that it gets on, that it has a sample, or that it has ended."""

    number: int
    """Of the item, as the loop gave it out."""
    text: str = ""
    work: float = 0.0
    sample: Any = None
    ended: bool = False
    failure: Failure | None = None
    """Of an item that ended: why it has not all of its samples."""
    backends: str = ""
    """Of an item that ended: what ran, also where it failed, as "pattern:backend" joined by "+"."""


T = TypeVar("T")
Tell = Callable[[Message], None]
Job = tuple[int, Item]
"""An item, and its number in the run of a round."""


class Executor(Protocol):
    """Has items measured, here or elsewhere; what was measured counts once it was told.

    ``run`` takes the next job only when a worker is free for it, since a target that has failed gives out none. It takes
    jobs and tells messages in the thread that called it.
    """

    elsewhere: ClassVar[bool]
    """Whether items are measured by other processes: this one may then prepare more of them meanwhile."""

    def open(self, source: ModelSource) -> LoadedModel:
        """The model as the loop needs it, its tokenizer and its geometry, loaded once; weights may be elsewhere.

        Raises ValueError for another model than the one that is loaded, and UserError as ``ModelSource.load``.
        """

    def ask(self, question: Callable[[LoadedModel], T]) -> T:
        """What a function that pickles says of the opened model where its weights are; raises UserError as it does."""

    def run(self, spec: ItemSpec[Any], jobs: Iterable[Job], tell: Tell) -> None:
        """Have every job measured, and return when the last one has ended.

        Raises UserError as ``ItemSpec.measure``, and what making a job raises once those before it have ended.
        """

    def close(self) -> None:
        """Let all workers go, whatever they are doing."""


class InProcess:
    """Measures one item after the other in this process, with a model that was loaded before, or loading it."""

    elsewhere: ClassVar[bool] = False

    def __init__(self, loaded: LoadedModel | None = None) -> None:
        self._loaded = loaded
        self._asked: ModelSource | None = None

    def open(self, source: ModelSource) -> LoadedModel:
        """The model, loaded once; raises as ``Executor.open``."""
        if self._loaded is None:
            self._loaded, self._asked = source.load(), source
        if source not in (self._asked, ModelSource.of(self._loaded)):
            raise ValueError(f"this executor holds {ModelSource.of(self._loaded)}, not {source}")
        return self._loaded

    def ask(self, question: Callable[[LoadedModel], T]) -> T:
        """What a function says of the model."""
        assert self._loaded is not None, "no model was opened"
        return question(self._loaded)

    def run(self, spec: ItemSpec[Any], jobs: Iterable[Job], tell: Tell) -> None:
        """Measure every job; the next is taken when the spec has room for it, which most have when one has ended."""
        work(spec, jobs, self.open(spec.model), tell)

    def close(self) -> None:
        """There is no worker to let go."""


@dataclass
class Worker:
    """Where one item is measured: the model on its device, and a way to tell of it."""

    loaded: LoadedModel
    number: int
    tell: Tell
    ran: set[str] = field(default_factory=set)
    """What has run, as "pattern:backend"; a measurement adds to it, also where it fails."""
    last: LastContext = field(default_factory=LastContext)
    """What was read before, where items follow each other that may ask of one context."""

    def step(self, text: str = "", work: float = 0.0) -> None:
        """Say what is being done, and how much was done since the last step."""
        self.tell(Message(self.number, text, work))

    def end(self, failure: Failure | None) -> None:
        """The item has ended: with all its samples, or as it failed."""
        self.tell(Message(self.number, ended=True, failure=failure, backends=backends_name(self.ran)))

    def keep(self, sample: Any) -> None:
        """Hand over a sample: from here on it is kept, whatever happens to this worker."""
        self.tell(Message(self.number, sample=sample))


class UntilError:
    """Jobs until one cannot be made: what was given out before, such as texts that decode together, is measured first."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._jobs = jobs
        self._error: Exception | None = None

    def __iter__(self) -> Iterator[Job]:
        try:
            yield from self._jobs
        except Exception as error:
            self._error = error

    def check(self) -> None:
        """Raise what kept the next job from being made, once all others have ended."""
        if self._error is not None:
            raise self._error


def work(spec: ItemSpec[Any], jobs: Iterable[Job], loaded: LoadedModel, tell: Tell) -> None:
    """Measure items as they are given out, and tell of them: what every executor does where its models are.

    Raises what making a job raises, once the jobs before it have ended.
    """
    until = UntilError(jobs)
    spec.measure_all((item, Worker(loaded, number, tell)) for number, item in until)
    until.check()

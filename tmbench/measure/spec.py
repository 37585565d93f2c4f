"""What a measurement is: a spec that pickles, items as the unit of work, and steps that tell how it gets on.

A spec holds names, numbers, paths, texts and plans: no model, tokenizer or open file. Its plans say which methods run on
which layers, so nothing is left to decide where an item is measured. An item is as much as one worker does at a time, and
yields samples, dataclasses of plain data. How samples are kept and become rows is in ``tmbench.measure.keeping``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from tmbench.engine.chunk_kind import check_chunks
from tmbench.engine.chunks import Chunks
from tmbench.engine.prefill import PLAIN, Kind
from tmbench.engine.prefill_kind import kind_wanted
from tmbench.measure.attempt import attempt
from tmbench.methods.plan import Plan
from tmbench.models import loading
from tmbench.models.loading import LoadedModel, Weights
from tmbench.results import environment
from tmbench.results.environment import Environment
from tmbench.results.shards import Shard
from tmbench.results.variants import labels

if TYPE_CHECKING:
    from tmbench.measure.executor import Worker
    from tmbench.measure.keeping import Target

R = TypeVar("R")
"""What a measurement hands over, one for each thing that was kept: rows, with few exceptions."""
Place = tuple[str, int]
"""Where a sample is kept: which of its target's files, and its number there."""


@dataclass(frozen=True)
class ModelSource:
    """Which model to load, and how."""

    name: str
    weights: Weights = "checkpoint"
    device: str | None = None
    """None takes a GPU where there is one."""
    dtype: str | None = None
    """None takes bfloat16 on a GPU and float32 elsewhere."""
    context_parallel: bool = False
    """Whether several ranks split its prompts, and not the model."""
    revision: str | None = None
    """The branch, tag or commit of a Hugging Face id; None takes the newest."""
    trust_remote_code: bool = False
    """Whether code that the checkpoint brings may run."""
    gguf_file: str | None = None
    """A file in the folder or repository of the name."""
    rope_scaling: str | None = None
    """See ``tmbench.models.rope_scaling``; None takes the config's."""
    quantization: str | None = None
    """How its weights were held where it was loaded before, which a plan made elsewhere takes over; None finds out."""

    @classmethod
    def of(cls, loaded: LoadedModel) -> ModelSource:
        """What loads the same model once more."""
        return cls(
            loaded.name,
            loaded.weights,
            str(loaded.device),
            loaded.dtype,
            context_parallel=loaded.context_parallel_size > 1,
            revision=loaded.revision or None,
            trust_remote_code=loaded.remote_code,
            rope_scaling=loaded.rope_scaling or None,
            quantization=loaded.quantization or None,
        )

    def load(self, *, plan_only: bool = False) -> LoadedModel:
        """The model on its device, or its geometry alone; raises as ``tmbench.models.loading.load``."""
        how: dict[str, Any] = {
            "weights": self.weights,
            "device": self.device,
            "dtype": self.dtype,
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
            "gguf_file": self.gguf_file,
            "rope_scaling": self.rope_scaling,
            "quantization": self.quantization if plan_only else None,
        }
        return loading.load(self.name, **how, context_parallel=self.context_parallel, plan_only=plan_only)


@dataclass(frozen=True, kw_only=True)
class Item:
    """The unit of work, which pickles: what one worker measures at a time."""

    tells: ClassVar[bool] = False
    """Whether its worker tells bit by bit how much is done, which else counts when it ends."""

    title: str
    """What to show while it is measured."""
    index: int = 0
    """The number of its sample."""
    file: str = ""
    """Which of its target's files keeps its sample."""
    obstacle: str = ""
    """Why it cannot be measured, which makes its target fail; "" where it can."""
    turn: tuple[int | str, ...] = ()
    """When it is given out among the items of targets that take turns; those of one turn go to one worker, in a row. No two
    rounds have the same."""

    @property
    def work(self) -> float:
        """How much of the run it is, in the unit of ``Part.total``; 0 where only its worker knows."""
        return 0.0 if self.tells else 1.0

    @property
    def places(self) -> Sequence[Place]:
        """Where its samples are kept."""
        return ((self.file, self.index),)

    def without(self, kept: Container[Place]) -> Item | None:
        """What is left of it where these samples are kept; None where nothing is."""
        return None if all(place in kept for place in self.places) else self


@dataclass(frozen=True)
class Turns(Generic[R]):
    """Targets whose items are given out by turns, and not those of one target before those of the next."""

    targets: Sequence[Target[R, Any]]


@dataclass(frozen=True)
class Part(Generic[R]):
    """A stretch of a run: rounds of targets, whose items one spec measures."""

    spec: ItemSpec[R]
    title: str
    finished: str
    """What to show when it is done."""
    total: float
    """How much work it is."""
    rounds: Iterable[Step[R] | Sequence[Target[R, Any] | Turns[R]]]
    """A round is made once the one before has ended, unless they are ``independent``: it may read that one's samples. Steps
    say what is being prepared."""
    independent: bool = False
    """Whether no round reads another's samples: one then begins before the one before has ended, and runs beside it."""


@dataclass(frozen=True)
class Step(Generic[R]):
    """How a run gets on."""

    text: str = ""
    """What is being done; "" where that has not changed."""
    work: float = 0.0
    """How much was done since the last step, in the unit of the part's total."""
    rows: tuple[R, ...] = ()
    """What was kept: made now, or there before."""
    measured: int = 0
    """How many items were measured now, and not before."""
    part: Part[R] | None = None
    """The part that begins."""


@dataclass(frozen=True, kw_only=True)
class Spec(ABC, Generic[R]):
    """What is measured, as far as it pickles. Subclasses are frozen dataclasses."""

    model: ModelSource
    overwrite: bool = False
    """Whether what is there already is measured again."""

    @abstractmethod
    def check(self, loaded: LoadedModel) -> None:
        """Raise UserError for what cannot be measured, before anything is."""

    def notes(self, loaded: LoadedModel) -> Sequence[str]:
        """What the user should know before it is measured, asked where the weights are."""
        return ()

    def prepare(self) -> None:
        """Have there what samples and rows will refer to; called before every round, and once before independent ones."""

    @abstractmethod
    def parts(self, loaded: LoadedModel) -> Iterator[Part[R]]:
        """What there is to do. ``loaded`` needs no weights: its tokenizer and geometry are read."""


@dataclass(frozen=True, kw_only=True)
class ItemSpec(Spec[R]):
    """A spec that measures items of its own; one without, such as a sweep, has parts of other specs."""

    undisturbed: ClassVar[bool] = False
    """Whether workers that are still loading the model would spoil it, as they would times. A round then has one item."""

    @abstractmethod
    def measure(self, item: Any, worker: Worker) -> None:
        """Measure one item where the model is: ``worker`` has it, and is given samples and steps.

        Whatever is raised becomes the item's failure, but for UserError, which ends the run.
        """

    def measure_all(self, given: Iterable[tuple[Any, Worker]]) -> None:
        """Measure items as they are given out, each with a worker of its own, which is told when it begins and ends.

        One after the other. A spec may hold several at a time, and takes the next when it has room for it.
        """
        for item, worker in given:
            worker.step(item.title)
            worker.end(attempt(partial(self.measure, item, worker)))


def place(loaded: LoadedModel) -> dict[str, Any]:
    """The fields of a RowSpec that are known where the model is loaded: its source and the environment."""
    return {"model": ModelSource.of(loaded), "environment": environment.current(loaded.device)}


def prefill_kind(
    loaded: LoadedModel, compiled: bool | None = None, chunks: Chunks | None = None, ask_later: bool = False
) -> Kind:
    """How this model reads prompts where it is loaded; raises UserError as ``kind_wanted`` and ``check_chunks``."""
    planned = loaded.planned_for is not None
    kind = kind_wanted(loaded.model, loaded.device, compiled, planned=planned)
    if chunks is not None or ask_later:
        check_chunks(loaded.name, loaded.model, kind, "--chunk" if chunks is not None else "--ask-later", planned=planned)
    return kind


@dataclass(frozen=True, kw_only=True)
class RowSpec(Spec[R]):
    """A spec that makes rows."""

    environment: Environment
    root: Path
    """The results folder."""
    seed: int = 42
    prefill: Kind = PLAIN
    """How the model reads prompts; ``tmbench.engine.prefill_kind`` says what it can do."""
    chunks: Chunks | None = None
    """How prompts are fed; None in one piece."""
    ask_later: bool = False
    """Whether methods read contexts alone, and questions are read densely over what these left."""
    shard: Shard | None = None
    """Which part of the samples is measured; None for all."""

    def prepare(self) -> None:
        """Keep the environment beside the rows that will name it; raises UserError for a folder that does not take it."""
        environment.write_record(self.root / self.shard.folder if self.shard else self.root, self.environment)

    def places(self, count: int, length: int, task: str = "") -> list[int]:
        """Which of the first ``count`` samples of a task are to be measured."""
        return [place for place in range(count) if self.shard is None or self.shard.takes(place, length, task)]

    @property
    def reading(self) -> dict[str, Any]:
        """The columns that say how prompts are read, whatever the method."""
        later = {"ask_later": True} if self.ask_later else {}
        return {"prefill": self.prefill, **({} if self.chunks is None else self.chunks.columns), **later}

    def common(self, loaded: LoadedModel) -> dict[str, Any]:
        """The columns that all rows of the run have in common."""
        return {**self.environment.row_fields(), **loaded.row_fields(), "seed": self.seed, **self.reading}


@dataclass(frozen=True, kw_only=True)
class PlannedSpec(RowSpec[R], ItemSpec[R]):
    """A spec that measures items under the plans of several methods."""

    plans: Sequence[Plan]

    @cached_property
    def labels(self) -> list[str]:
        """What the plans are called, in their order."""
        return labels(self.plans)

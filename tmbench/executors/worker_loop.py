"""What a worker of ``tmbench.executors.workers`` does, in whatever process it is, and the words that it exchanges for it.

It loads the model and says so, then obeys orders: to answer a question, or to measure, for which it asks for one item after
the other. To every ``Wanted`` it is given a job, or None where it is to end what it holds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tmbench.errors import UserError
from tmbench.measure.executor import Job, Message, work
from tmbench.measure.spec import ItemSpec, ModelSource
from tmbench.models.loading import LoadedModel
from tmbench.results import environment
from tmbench.results.failures import describe


@dataclass(frozen=True)
class Ask:
    """An order: answer a question about the model."""

    question: Callable[[LoadedModel], Any]


@dataclass(frozen=True)
class Measure:
    """An order: measure items of this spec until there is none."""

    spec: ItemSpec[Any]


@dataclass(frozen=True)
class Ready:
    """The model is loaded."""

    source: ModelSource
    facts: dict[str, Any]
    """What all workers have in common, as their items make the same rows."""


@dataclass(frozen=True)
class Answer:
    """To a question."""

    value: Any


class Wanted:
    """There is room for another item."""


class Done:
    """What it was ordered to measure has ended for this worker."""


@dataclass(frozen=True)
class Refused:
    """A UserError, which ends the run."""

    sentence: str


@dataclass(frozen=True)
class Lost:
    """The worker is of no use any more; what it was measuring has to be measured by another."""

    reason: str


Told = Ready | Answer | Wanted | Done | Refused | Lost | Message
Receive = Callable[[], Any]
Send = Callable[[Told], None]


def facts(loaded: LoadedModel) -> dict[str, Any]:
    """What rows say of this place and of the model, but for what two machines of the same kind may differ in."""
    here = environment.current(loaded.device)
    columns = {name: str(value) for name, value in here.row_fields().items() if name != "environment"}
    return columns | dict(here.packages) | loaded.row_fields()


def serve(source: ModelSource, threads: int | None, receive: Receive, send: Send) -> None:
    """Load the model and obey orders until the work fails.

    Args:
        threads: how many CPU threads torch is to use; None leaves them.
        receive: the next order or job; raises SystemExit where none can come any more, as ``send`` does.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        loaded = source.load()
        send(Ready(ModelSource.of(loaded), facts(loaded)))
        while True:
            order = receive()
            if isinstance(order, Ask):
                send(Answer(order.question(loaded)))
            else:
                work(order.spec, _jobs(receive, send), loaded, lambda message: _tell(loaded, message, send))
                send(Done())
    except UserError as error:
        send(Refused(str(error)))
    except Exception as error:
        send(Lost(describe(error)))


def _jobs(receive: Receive, send: Send) -> Iterator[Job]:
    while True:
        send(Wanted())
        job = receive()
        if job is None:
            return
        yield job


def _tell(loaded: LoadedModel, message: Message, send: Send) -> None:
    """Pass it on, unless the item failed as its GPU did, which would fail all items after it too."""
    if message.failure is not None and loaded.device.type == "cuda":
        try:
            torch.zeros(1, device=loaded.device).add_(1).item()
        except torch.OutOfMemoryError:
            pass
        except RuntimeError as error:
            send(Lost(f"its GPU failed, {describe(error)}"))
            # What CUDA has broken is mended by a new process alone.
            os._exit(1)
    send(message)

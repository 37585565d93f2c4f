"""What is made in a thread of its own, a little ahead of its use."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import suppress
from queue import Empty, Queue
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterable[T]) -> Generator[T, None, None]:
    """The same items, the next ones made while one is used; raises what making them raises, behind those made before.

    Close it when no more are wanted, which waits for the item that is being made: a thread that is still in the code of a
    library when the interpreter ends makes it abort.
    """
    made: Queue[tuple[T] | BaseException | None] = Queue(maxsize=1)
    given_up = Event()

    def make() -> None:
        try:
            for item in items:
                made.put((item,))
                if given_up.is_set():
                    return
            made.put(None)
        except BaseException as error:
            made.put(error)

    # A daemon, so that an impatient second Ctrl-C ends the run.
    thread = Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        while (one := made.get()) is not None:
            if isinstance(one, BaseException):
                raise one
            yield one[0]
    finally:
        given_up.set()
        with suppress(Empty):
            made.get_nowait()
        thread.join()

"""Progress with the time left, on standard error: a bar, or lines where that is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tmbench.cli.screen import error_console, say
from tmbench.results.words import duration

ESTIMATE_PERIOD = 3600.0
"""Seconds of which the time left is estimated: passes differ in length by orders of magnitude, and none may be forgotten."""
SOON = 2.0
"""Seconds after which a bar appears of what is often done at once."""
EVERY = 10.0
"""Seconds between two lines of a log."""


def progress_bar() -> Progress:
    """Where a command shows how far it is: used as a context, or by start and stop."""
    if not error_console().is_terminal:
        return Lines()
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=error_console(),
        speed_estimate_period=ESTIMATE_PERIOD,
    )


@contextmanager
def late_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """What is told ``(done, total)`` and shows it from SOON seconds on: what takes less shows nothing."""
    began, bar = time.monotonic(), progress_bar()

    def tell(done: int, total: int) -> None:
        if not bar.tasks:
            if time.monotonic() - began < SOON:
                return
            bar.start()
            bar.add_task(description)
        bar.update(bar.tasks[0].id, completed=done, total=total)

    try:
        yield tell
    finally:
        bar.stop()


@contextmanager
def waiting(description: str) -> Iterator[None]:
    """Shows that something goes on of which nobody knows how long it takes, from SOON seconds on, or in lines of a log."""
    ended = Event()
    thread = Thread(target=_wait, args=(description, ended), name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _wait(description: str, ended: Event) -> None:
    console, began = error_console(), time.monotonic()
    if not console.is_terminal:
        while not ended.wait(EVERY):
            say(f"{description}: {duration(time.monotonic() - began)} so far")
        return
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    bar = Progress(*columns, console=console, transient=True)
    bar.add_task(description, total=None)
    if not ended.wait(SOON):
        with bar:
            ended.wait()


class Lines(Progress):
    """One line each EVERY seconds in which something was done, and at the end one for each task that did something."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(disable=True, speed_estimate_period=ESTIMATE_PERIOD, get_time=clock)
        self._last = self.get_time()
        self._told = 0

    def update(self, task_id: TaskID, *given: Any, **changes: Any) -> None:
        """As rich's own, which is silent here."""
        super().update(task_id, *given, **changes)
        now = self.get_time()
        if now - self._last >= EVERY:
            self._last = now
            self._tell(next(task for task in self.tasks if task.id == task_id))

    def stop(self) -> None:
        """As rich's own; tells what the tasks came to, but of one that ended at once and had nothing to do."""
        super().stop()
        for task in self.tasks[self._told :]:
            if task.completed or (task.elapsed or 0.0) >= EVERY:
                self._tell(task)
        self._told = len(self.tasks)

    def _tell(self, task: Task) -> None:
        parts = [f"{task.percentage:.0f} %"] if task.total is not None else []
        parts.append(f"{duration(task.elapsed or 0.0)}{' so far' * (not task.finished)}")
        if not task.finished and task.time_remaining is not None:
            parts.append(f"{duration(task.time_remaining)} left")
        say(f"{task.description}: {', '.join(parts)}")

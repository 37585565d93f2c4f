"""What is kept of a measurement, and what of it was kept before: the one place of samples, rows and resumed runs.

A target is a set of samples and the rows that they make. Its samples go to its files one by one; its rows are appended when
the last sample is there. A later run, of the same or of more samples, reads the files and measures what they lack.
"""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from tmbench.errors import UserError
from tmbench.measure.spec import Item, Place, R
from tmbench.methods.plan import backends_name
from tmbench.results.failures import Failure
from tmbench.results.row_sets import kept_together, known
from tmbench.results.rows import FAILED, OK, Row, TtftRow, now
from tmbench.results.tables import append, csv_path, newest

S = TypeVar("S")
AnyRow = TypeVar("AnyRow", bound=Row)
WHEN = ("time", "commit", "dirty", "environment")
"""The columns that tell when and by which source a row was made: rows that differ in these alone say the same."""


class SampleFile(Protocol[S]):
    """A file that keeps samples."""

    def clear(self) -> None:
        """Take it away."""

    def read(self) -> dict[int, S]:
        """The samples by their number."""

    def add(self, sample: S, **more: Any) -> None:
        """Append one."""


class Target(ABC, Generic[R, S]):
    """What is made together of one set of samples."""

    unit: ClassVar[str] = "sample"
    """What its items' work is counted in."""

    def __init__(
        self,
        title: str,
        items: Sequence[Item],
        files: Mapping[str, SampleFile[S]],
        *,
        belongs: Callable[[Any, S], bool] = lambda item, sample: True,
        more: Callable[[Any], dict[str, Any]] = lambda item: {},
        failure: Failure | None = None,
    ) -> None:
        """Name what is to be made.

        Args:
            items: what makes the samples, in their order.
            files: where samples are kept, by ``Item.file``; nowhere where there are none.
            belongs: whether a kept sample is this item's, and not of another prompt.
            more: what a sample's line says of its item.
            failure: why it cannot be made, where that is known already.
        """
        self.title = title
        self.items = items
        self.files = files
        self.failure = failure
        self.samples: dict[Place, S] = {}
        """Those that are kept."""
        self.waiting: deque[Item] = deque()
        """The items that are still to be given out."""
        self.running = 0
        """How many are being measured."""
        self.backends: set[str] = set()
        """What ran of items that failed."""
        self.belongs = belongs
        self._more = more

    def open(self, overwrite: bool) -> Sequence[R]:
        """Read what was kept before; what is there already, where nothing is to be made, else nothing.

        Raises UserError for files that are not ours.
        """
        self.look()
        if overwrite:
            for file in self.files.values():
                file.clear()
        kept = {(name, number): one for name, file in self.files.items() for number, one in self.read(file).items()}
        wanted = {place: item for item in self.items for place in item.places}
        self.samples = {n: one for n, one in kept.items() if n in wanted and self.belongs(wanted[n], one)}
        if not overwrite and (there := self.there(list(kept.values()))):
            return there
        for item in self.items:
            if item.obstacle:
                self.failure = Failure(FAILED, item.obstacle)
                break
            if left := item.without(self.samples):
                self.waiting.append(left)
        return ()

    def read(self, file: SampleFile[S]) -> Mapping[int, S]:
        """The samples of one of its files; raises UserError for one that is not ours."""
        return file.read()

    def add(self, item: Item, sample: Any) -> None:
        """Keep a sample; raises UserError where its file does not take it."""
        if item.file in self.files:
            self.files[item.file].add(sample, **self._more(item))
        self.samples[item.file, sample.index] = sample

    def end(self, failure: Failure | None, backends: str) -> Sequence[Item]:
        """One item has ended; the items that are not to be measured any more as it failed."""
        if failure is None:
            return ()
        # The first failure is the one that is told.
        self.failure = self.failure or failure
        self.backends.update(backends.split("+"))
        dropped = tuple(self.waiting)
        self.waiting.clear()
        return dropped

    def in_order(self) -> list[S]:
        """The samples in the order of their items; raises RuntimeError where one is missing and nothing has failed."""
        places = [place for item in self.items for place in item.places]
        missing = [place for place in places if place not in self.samples]
        if missing and self.failure is None:
            raise RuntimeError(f"{self.title}: no sample came of {missing}, and no failure")
        return [self.samples[place] for place in places if place in self.samples]

    def look(self) -> None:
        """See what rows there are, before the first sample is read; raises UserError for a file that is not ours."""

    def there(self, kept: Sequence[S]) -> Sequence[R]:
        """What was made before and needs nothing new; ``kept`` are all samples of the files, as they lie there."""
        return ()

    @abstractmethod
    def finish(self) -> Sequence[R]:
        """Make of the samples, or of the failure, what is to be kept, keep it, and hand it over."""


class RowTarget(Target[AnyRow, S]):
    """Rows of a results folder."""

    def __init__(
        self,
        title: str,
        items: Sequence[Item],
        files: Mapping[str, SampleFile[S]],
        *,
        root: Path,
        rows: Sequence[AnyRow],
        make: Callable[[Sequence[AnyRow], Sequence[S]], Sequence[AnyRow]],
        stands: Callable[[AnyRow], bool] | None = None,
        latest: Callable[[AnyRow], Any] | None = None,
        **more: Any,
    ) -> None:
        """As ``Target``.

        Args:
            rows: what is known before it is measured. They are what is kept of a failure.
            make: the rows, from those and the samples. Time and backends are in them already.
            stands: of a row that depends on its own samples alone, whether the files still make it. Such a row is handed
                over as it is. All others are made of the samples again, and kept if they say anything new.
            latest: of rows of which the latest counts, what those have in common that would count in their stead.
        """
        super().__init__(title, items, files, **more)
        self._root = root
        self.rows = rows
        self._make = make
        self._stands = stands
        self._latest = latest
        self._before: dict[tuple[Any, ...], Row] = {}

    def look(self) -> None:
        """The rows that were there before."""
        for row in self.rows:
            self._before |= newest(self._root, type(row), row.device, row.method)

    def there(self, kept: Sequence[Any]) -> Sequence[AnyRow]:
        """The row, where it was made of these samples or of more, or where memory did not suffice for them."""
        if self._stands is None:
            return ()
        (row,) = self.rows
        have: Any = self._before.get(row.key)
        if have is None or have.status == FAILED or have.samples < len(self.items):
            return ()
        # A killed --overwrite leaves the older row without the samples that it was made of, or beside newer ones.
        whole = len(self.samples) == len(self.items) and _is_of(have, [one.seconds for one in kept]) and self._stands(have)
        return (have,) if have.status != OK or whole else ()

    def finish(self) -> Sequence[AnyRow]:
        """Append the rows, unless the same are there."""
        samples = self.in_order()
        ran = [*self.backends, *chain.from_iterable(getattr(one, "backends", "").split("+") for one in samples)]
        rows: Sequence[AnyRow] = [replace(row, time=now(), backends=backends_name(ran)) for row in self.rows]
        if self.failure is not None:
            rows = [replace(row, status=self.failure.status, error=self.failure.error) for row in rows]
        else:
            rows = self._make(rows, samples)
        if self._stands is None and (there := self._same(rows)):
            return there
        self._keep(rows)
        return rows

    def _keep(self, rows: Sequence[AnyRow]) -> None:
        keep(self._root, rows)

    def _same(self, rows: Sequence[AnyRow]) -> Sequence[AnyRow]:
        """The rows that were there and say the same as these, where all were and none that is newer counts instead."""
        found: list[Any] = [self._before.get(row.key) for row in rows]
        for row, have in zip(rows, found, strict=True):
            if have is None or have.status == FAILED or replace(row, **{name: getattr(have, name) for name in WHEN}) != have:
                return ()
        if self._latest is not None:
            about = self._latest(rows[0])
            latest = max(row.time for row in self._before.values() if self._latest(row) == about)  # type: ignore[arg-type]
            if any(have.time != latest for have in found):
                return ()
        return found


def timed_before(root: Path, row: TtftRow) -> TtftRow | None:
    """The row of this measurement that has as many repeats, or for which memory did not suffice; None where there is none.

    It may be in a set that was not appended to the end.
    """
    have = known(root, type(row), row.device, row.method).get(row.key)
    done = isinstance(have, TtftRow) and have.status != FAILED and have.repeats >= row.repeats
    return have if isinstance(have, TtftRow) and done else None


def keep(root: Path, rows: Sequence[Row], samples: Sequence[SampleFile[Any]] = ()) -> None:
    """Append rows that belong together, whole even where the process dies in between.

    Files of ``samples`` of which the rows say everything go as soon as no kill can lose a row. Raises UserError where a file
    refuses its row; the others' are appended.
    """
    if not samples and len({csv_path(root, type(row), row.device, row.method) for row in rows}) == 1:
        append(root, *rows)
        return
    refused: list[UserError] = []
    with kept_together(root, rows) as safe:
        if safe:
            _clear(samples)
        for row in rows:
            try:
                append(root, row)
            except UserError as error:
                refused.append(error)
        if refused:
            raise refused[0]
    _clear(samples)


def _clear(files: Iterable[SampleFile[Any]]) -> None:
    for file in files:
        file.clear()


def _is_of(row: Any, seconds: Sequence[float]) -> bool:
    """Whether a row is of the samples that are kept, the first of which took so many seconds each."""
    if row.seconds_per_sample is None:
        return True
    own = seconds[: row.samples]
    return len(own) == row.samples and math.isclose(statistics.mean(own), row.seconds_per_sample, rel_tol=1e-9)

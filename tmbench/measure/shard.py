"""What is kept of a shard: its samples in files of its own, and in place of a row a record of what it has measured of it.

Rows are made by ``tmbench.measure.merge`` once the samples of all shards are there: a part of them makes no figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tmbench.measure.keeping import AnyRow, RowTarget, S
from tmbench.measure.spec import Item
from tmbench.methods.plan import backends_name
from tmbench.results.rows import OK
from tmbench.results.sample_files import Kept
from tmbench.results.shards import Record, Shard, forget

K = TypeVar("K", bound=Any)


class Sharded(Protocol):
    """A spec, as far as it says where its samples and rows are kept."""

    @property
    def root(self) -> Path: ...

    @property
    def shard(self) -> Shard | None: ...


def row_target(
    spec: Sharded,
    title: str,
    items: Sequence[Item],
    files: Mapping[str, Kept[K]],
    *,
    wish: Mapping[str, Any] | None = None,
    **about: Any,
) -> RowTarget[Any, K]:
    """A row of a spec's results folder, or what a shard has of it.

    ``wish`` is what the row is made by beside itself and its samples, as JSON; all else is as in ``RowTarget``.
    """
    if spec.shard is None:
        return RowTarget(title, items, files, root=spec.root, **about)
    told = [plan.row_fields() for plan in getattr(spec, "plans", ())]
    return ShardTarget(title, items, files, root=spec.root, shard=spec.shard, wish=wish or {}, told=told, **about)


class ShardTarget(RowTarget[AnyRow, S]):
    """A shard's part of a row."""

    def __init__(
        self,
        title: str,
        items: Sequence[Item],
        files: Mapping[str, Kept[Any]],
        *,
        root: Path,
        shard: Shard,
        wish: Mapping[str, Any],
        told: Sequence[Mapping[str, str]],
        **about: Any,
    ) -> None:
        """As ``RowTarget``; ``items`` are the shard's own, and ``files`` those of the results folder.

        ``told`` is what the rows of all of its run's plans say of these.
        """
        own = {name: file.within(root / shard.folder) for name, file in files.items()}
        super().__init__(title, items, own, root=root, **about)
        self._shard = shard
        self._wish = wish
        self._settings = [plan["parameters"] for plan in told if plan["method"] == self.rows[0].method]
        self._merged = {own[name].path: file for name, file in files.items()}
        self._names = {name: file.name for name, file in files.items()}

    def read(self, file: Any) -> Mapping[int, S]:
        """The shard's own samples, and those that the results folder has already."""
        merged: Mapping[int, S] = self._merged[file.path].read()
        return {**merged, **file.read()}

    def open(self, overwrite: bool) -> Sequence[AnyRow]:
        """As ``Target``; what is to be measured makes a record that is there out of date."""
        there = super().open(overwrite)
        if self.waiting:
            forget(self._root, self._shard, self.rows[0])
        return there

    def there(self, kept: Sequence[Any]) -> Sequence[AnyRow]:
        """None: a row that is there says nothing of what a shard has to tell."""
        return ()

    def finish(self) -> Sequence[AnyRow]:
        """Write the record; the row itself only where it says that the shard failed, and that is not kept."""
        self.in_order()
        (row,) = self.rows
        places = [place for item in self.items for place in item.places if place in self.samples]
        own = {name: {n: self.samples[file, n].prompt_hash for file, n in places if file == name} for name in self.files}  # type: ignore[attr-defined]
        status, error = (self.failure.status, self.failure.error) if self.failure else (OK, "")
        ran = backends_name(self.backends)
        Record(self._shard, row, self._names, own, status, error, ran, self._wish, self._settings).write(self._root)
        return (replace(row, status=status, error=error, backends=ran),) if self.failure else ()

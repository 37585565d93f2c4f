"""Samples of a run, kept one by one in JSONL files as they are made: a killed run goes on with the next one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeVar

from tmbench.errors import UserError
from tmbench.results import Row, append_line, csv_path, writable


class Sample(Protocol):
    """A frozen dataclass with the number of the sample in ``index``; lists in it come back as lists."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def index(self) -> int: ...


S = TypeVar("S", bound=Sample)


class Kept:
    """The file of one row's samples; its name holds a hash of everything that was measured."""

    def __init__(self, root: Path, row: Row, task: str) -> None:
        self._folder = csv_path(root, type(row), row.device, row.method).parent
        self.path = self._folder / "samples" / row.method / f"{task}-{row.length}-{row.digest}.jsonl"

    @property
    def name(self) -> str:
        """The path as a row beside it gives it."""
        return str(self.path.relative_to(self._folder))

    def clear(self) -> Self:
        """Take the file away; raises UserError where the folder does not let it go."""
        with writable(self.path):
            self.path.unlink(missing_ok=True)
        return self

    def read(self, kind: type[S]) -> dict[int, S]:
        """The samples by their number; raises UserError for a file that tmbench did not write."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        found: dict[int, S] = {}
        for number, line in enumerate(text[: text.rfind("\n") + 1].split("\n")[:-1], start=1):
            try:
                entry = json.loads(line)
                sample = kind(**{name: entry[name] for name in kind.__dataclass_fields__})
                found[int(sample.index)] = sample
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self.path} line {number} is not a sample: move the file away, or use --overwrite"
                ) from error
        return found

    def add(self, sample: Any) -> None:
        """Append a sample, whole or not at all."""
        append_line(self.path, json.dumps(asdict(sample), ensure_ascii=False))

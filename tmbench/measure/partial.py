"""A file that is written at the end of a measurement, and the one beside it that keeps what was measured until then.

The partial file has a line that says what is measured, and one for each sample. A measurement that is killed goes on with it
where it stopped; the file itself is written once, and the partial one goes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from tmbench.errors import UserError
from tmbench.results.files import append_line, read_lines, replace_file, writable

OPTION = "--output"
"""What names the file that is written."""
S = TypeVar("S")


def partial_path(output: Path) -> Path:
    """Where samples are kept until the file is written."""
    return output.with_name(output.name + ".partial")


def check_output(path: Path, verb: str, *, overwrite: bool) -> None:
    """Raise UserError for a file that is there already, unless it may be replaced, and for a path that cannot be one.

    ``verb`` is what would be done again.
    """
    with writable(path, OPTION):
        try:
            path.stat()
        except FileNotFoundError:
            return
    if not overwrite:
        raise UserError(f"{OPTION} {path} is there already: name another file, or add --overwrite to {verb} again")


class Partial(Generic[S]):
    """The samples of an unfinished file; see the head of this module."""

    def __init__(
        self,
        output: Path,
        word: str,
        about: Mapping[str, Any],
        write: Callable[[S], Mapping[str, Any]],
        read: Callable[[Any], tuple[int, S]],
    ) -> None:
        """Name the file.

        Args:
            output: the file that will be written.
            word: what is measured, as messages have it: "search".
            about: what samples depend on; a run goes on only from those of the same.
            write: a sample's line.
            read: the number of a line's sample, and the sample; raises for what is none.
        """
        self.output = output
        self.path = partial_path(output)
        self._word = word
        self._about = dict(about)
        self._write = write
        self._read = read
        self._begun = False

    def clear(self) -> None:
        with writable(self.path, OPTION):
            self.path.unlink(missing_ok=True)
        self._begun = False

    def add(self, sample: S, **more: Any) -> None:
        if not self._begun:
            append_line(self.path, json.dumps({self._word: self._about}), OPTION)
            self._begun = True
        append_line(self.path, json.dumps({**self._write(sample), **more}), OPTION)

    def read(self) -> dict[int, S]:
        """The samples that an earlier run has kept; raises UserError for another's file."""
        remedy = f"add --overwrite to begin anew, or name another {OPTION}"
        before: dict[str, Any] = {}
        kept: dict[int, S] = {}

        def take(entry: Any) -> None:
            if not before:
                before.update(entry[self._word])
                return
            number, sample = self._read(entry)
            kept[number] = sample

        self._begun = bool(read_lines(self.path, take, f"of a {self._word} that was interrupted", remedy))
        differing = [name for name, value in self._about.items() if self._begun and before.get(name) != value]
        if differing:
            name = differing[0]
            found = before.get(name, "not recorded")
            raise UserError(
                f"{self.path} is of a {self._word} with another {name} ({found}, not {self._about[name]}): {remedy}"
            )
        return kept

    def finish(self, text: str) -> None:
        """Write the file, and let the samples go."""
        with writable(self.output, OPTION):
            replace_file(self.output, text)
        self.clear()

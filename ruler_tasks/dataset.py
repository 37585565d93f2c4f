"""Reads and writes data sets in RULER's own layout: one `validation.jsonl` per task, one sample per line."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from ruler_tasks.errors import DatasetError
from ruler_tasks.example import Example
from ruler_tasks.files import parse_json
from ruler_tasks.tasks import get_task

FILE = "validation.jsonl"
MOST_CHARACTERS = 2**28
"""Of a line: a file without line ends is no data set, and may have no end."""


def dataset_path(directory: str | Path, task: str, length: int | None = None) -> Path:
    """Where a prepared data set holds the samples of a task.

    Looked for are `<directory>/<length>/data/<task>/validation.jsonl`, which is how the reference RULER arranges
    several lengths, the same without `data`, and both without the length.

    Raises:
        UnknownTaskError: the task does not exist.
        DatasetError: there is no such file, or the folder cannot be read.
    """
    get_task(task)
    root = Path(directory)
    bases = [root / str(length)] if length is not None else []
    for base in (*bases, root):
        for path in (base / "data" / task / FILE, base / task / FILE):
            try:
                if path.is_file():
                    return path
            except OSError as error:
                raise DatasetError(f"The data folder {root} cannot be read: {error.strerror or error}.") from error
    at_length = "" if length is None else f" at length {length}"
    raise DatasetError(f"The data folder {root} holds no {FILE} for task {task}{at_length}.")


def read_dataset(directory: str | Path, task: str, length: int | None = None, *, limit: int | None = None) -> list[Example]:
    """The samples of a task from data that this package or the reference RULER prepared.

    Args:
        directory: the data set's folder; see `dataset_path`.
        task: one of the thirteen.
        length: the length that the samples must have been made for; None accepts any.
        limit: read only the first so many samples.

    Raises:
        UnknownTaskError: the task does not exist.
        DatasetError: no such file, a line that is no sample (named by its number), no samples, or samples that are
            longer than `length` or less than half as long.
    """
    path = dataset_path(directory, task, length)
    budget = get_task(task).tokens_to_generate
    found: list[Example] = []
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(MOST_CHARACTERS), ""), 1):
                if limit is not None and len(found) >= limit:
                    break
                if len(line) == MOST_CHARACTERS:
                    raise DatasetError(
                        f"Line {number} of {path} is no sample: it has more than {MOST_CHARACTERS} characters."
                    )
                if line.strip():
                    found.append(_sample(line, path, number, task, budget, len(found)))
    except OSError as error:
        raise DatasetError(f"The data set {path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"The data set {path} is not UTF-8 text.") from error
    if not found and limit != 0:
        raise DatasetError(f"The data set {path} holds no samples.")
    indices = [sample.index for sample in found]
    if len(set(indices)) < len(indices) or min(indices, default=0) < 0:
        wrong = next(index for index in indices if index < 0 or indices.count(index) > 1)
        raise DatasetError(f"The data set {path} has the index {wrong}: each sample needs one of its own, from 0 on.")
    longest = max((sample.length for sample in found), default=0)
    if length is not None and longest and not length / 2 <= longest <= length:
        raise DatasetError(f"The data set {path} was made for another length: its longest sample takes {longest}.")
    return found


def _sample(line: str, path: Path, number: int, task: str, budget: int, position: int) -> Example:
    try:
        fields = parse_json(line)
    except ValueError as error:
        raise DatasetError(f"Line {number} of {path} is not JSON: {error}.") from error
    except RecursionError as error:
        raise DatasetError(f"Line {number} of {path} is no sample: it is nested too deeply.") from error
    # Only files of this package name a source; the reference's index of a needle sample is a character position.
    own = isinstance(fields, dict) and "source" in fields
    try:
        return Example.from_json(fields, task=task, max_new_tokens=budget, index=None if own else position)
    except DatasetError as error:
        raise DatasetError(f"Line {number} of {path} is no sample: {error}") from error


def write_dataset(directory: str | Path, examples: Iterable[Example]) -> list[Path]:
    """Writes samples to `<directory>/<task>/validation.jsonl`, each file whole or not at all.

    Args:
        directory: made if it does not exist; files of the same tasks in it are replaced.
        examples: the samples, those of one task together; they may be made while they are written.

    Returns:
        The files written, in the order of the tasks.

    Raises:
        DatasetError: a task's samples do not come together, or the folder cannot be written.
    """
    written: list[Path] = []
    for task, samples in groupby(examples, key=lambda example: example.task):
        path = Path(directory) / task / FILE
        if path in written:
            raise DatasetError(f"The samples of task {task} do not come together.")
        try:
            _write(path, samples)
        except OSError as error:
            raise DatasetError(f"The data set {path} cannot be written: {error.strerror or error}.") from error
        written.append(path)
    return written


def _write(path: Path, samples: Iterable[Example]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{FILE}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            for sample in samples:
                file.write(json.dumps(sample.to_json(), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise

"""Files that grow while others read and write them, and that a killed process leaves whole; errors name the option.

A line is appended under a lock, whole or not at all, and a line without its end, which was being written when a process
died, does not count.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tmbench.errors import UserError

Parsed = TypeVar("Parsed")


@contextmanager
def readable(path: Path, remedy: str = "check the path and its permissions") -> Iterator[None]:
    """Turn a refusal of the file system into one sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; {remedy}") from error


@contextmanager
def writable(path: Path, option: str = "--output-dir") -> Iterator[None]:
    """Turn a refusal of the file system into one sentence that names the option which the path comes from."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{option}: {path} cannot be written ({reason}); what was measured before is kept") from error


def append_line(path: Path, line: str, option: str = "--output-dir") -> None:
    """Append one line of text to a file, whole or not at all; the line brings no line end of its own.

    Raises UserError, naming the option which the path comes from, where the file cannot be written.
    """
    with writable(path, option):
        path.parent.mkdir(parents=True, exist_ok=True)
        append_text(path, "", line + "\n")


def read_lines(path: Path, parse: Callable[[Any], Parsed], what: str, remedy: str) -> list[Parsed]:
    """What ``parse`` makes of each line of a JSONL file, in order; nothing where there is no file.

    Args:
        parse: given a line's value of JSON; it may raise ValueError, LookupError, TypeError or OverflowError.
        what: what a line should be, such as "a prediction".
        remedy: what to do about a file that is not ours.

    Raises:
        UserError: the file cannot be read, or a line is refused.
    """
    found = []
    with readable(path, remedy):
        try:
            lines = read_whole(path).split(b"\n")[:-1]
        except FileNotFoundError:
            return []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(parse(json.loads(line.decode())))
        except (ValueError, LookupError, TypeError, OverflowError) as error:
            raise UserError(f"{path} line {number} is not {what}: {remedy}") from error
    return found


def read_whole(path: Path) -> bytes:
    """A file up to its last line end: a line without one was being written when its process died."""
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def replace_file(path: Path, text: str) -> None:
    """Write a file that is there whole or, until then, as it was; raises OSError."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def append_text(path: Path, header: str, line: str, upgrade: Callable[[], None] | None = None) -> None:
    """Append under a lock; ``upgrade`` replaces the file where it starts with another header."""
    descriptor = _locked(path)
    try:
        end = _whole_lines(descriptor)
        if upgrade is not None and end and os.pread(descriptor, len(header.encode()), 0) != header.encode():
            upgrade()
            # Writers that wait for the file that was replaced will find that they hold no file of that name any more.
            replaced, descriptor = descriptor, _locked(path)
            os.close(replaced)
            end = _whole_lines(descriptor)
        payload = ((header if end == 0 else "") + line).encode()
        try:
            written = os.pwrite(descriptor, payload, end)
            if written < len(payload):
                raise OSError(28, "No space left on device")
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, end)
            raise
    finally:
        os.close(descriptor)


def _locked(path: Path) -> int:
    """A descriptor of the file that is at ``path`` once the lock is there: another writer may have replaced it meanwhile."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _whole_lines(descriptor: int) -> int:
    """Cut a line that was being written when its process died; return where the next one starts."""
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return size
    end = os.pread(descriptor, size, 0).rfind(b"\n") + 1
    os.ftruncate(descriptor, end)
    return end

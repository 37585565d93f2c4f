"""Files that grow while others read and write them, and that a killed process leaves whole; errors name the option.

A line is appended under a lock, whole or not at all. One that was being written when its process died does not count, and
one that only lacks its line end, as editors leave it, does.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from tmbench.errors import UserError

Parsed = TypeVar("Parsed")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""What some editors begin a text with."""


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
            content = read_file(path)
        except FileNotFoundError:
            return []
    *lines, tail = content.removeprefix(BYTE_ORDER_MARK).split(b"\n")
    if not _is_cut(tail):
        lines.append(tail)
    for number, line in enumerate(lines, start=1):
        try:
            found.append(parse(DECODER.decode(line.decode())))
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
            raise UserError(f"{path} line {number} is not {what}: {remedy}") from error
    return found


def read_file(path: Path) -> bytes:
    """All of a file; raises OSError for one without an end, such as a pipe or a device, before it is opened."""
    with suppress(FileNotFoundError):
        _check_ends(path.stat())
    return path.read_bytes()


def _check_ends(about: os.stat_result) -> None:
    """Raise OSError for what is neither a file nor a folder; opening a folder says so itself."""
    if not stat.S_ISREG(about.st_mode) and not stat.S_ISDIR(about.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    """A number of JSON: one that is too large for a float would be read as infinite."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no finite number")
    return number


DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
"""Made once: to make it takes longer than to read a line."""


def _is_cut(tail: bytes) -> bool:
    """Whether a line of JSON without its line end is the beginning of an object: a whole one has its last brace."""
    text = tail.removeprefix(BYTE_ORDER_MARK).strip()
    if not text or b"\0" in text:  # a crash of the machine leaves zeros
        return True
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return text.startswith(b"{")
    return False


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that a user named, its folder made where there is none: whole, or it stays as it was; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        # A device or a pipe is written to; a file in its place would be something else.
        with path.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
    else:
        replace_file(path.resolve(), content)


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file that is there whole or, until then, as it was; raises OSError."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def append_text(path: Path, header: str, line: str, upgrade: Callable[[], None] | None = None) -> None:
    """Append under a lock; ``upgrade`` replaces a file that starts with another header or lacks its last line end.

    Without one the file is of JSON objects, a line for each.
    """
    descriptor = _locked(path)
    try:
        while upgrade is not None and not _is_ready(descriptor, header.encode()):
            upgrade()
            # Writers that wait for the file that was replaced will find that they hold no file of that name any more.
            replaced, descriptor = descriptor, _locked(path)
            os.close(replaced)
        end, missing = _end(descriptor)
        payload = missing + ((header if end == 0 else "") + line).encode()
        try:
            written = os.pwrite(descriptor, payload, end)
            if written < len(payload):
                raise OSError(errno.ENOSPC, "No space left on device")
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, end)
            raise
    finally:
        os.close(descriptor)


def _is_ready(descriptor: int, header: bytes) -> bool:
    """Whether a line can be appended: to an empty file, or behind a line end in one with this header."""
    size = os.fstat(descriptor).st_size
    return size == 0 or (os.pread(descriptor, 1, size - 1) == b"\n" and os.pread(descriptor, len(header), 0) == header)


def _locked(path: Path) -> int:
    """A descriptor of the file that is at ``path`` once the lock is there: another writer may have replaced it meanwhile."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _check_ends(os.fstat(descriptor))
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _end(descriptor: int) -> tuple[int, bytes]:
    """Where the next line starts, and the line end that the one before lacks; one of JSON that was cut is taken away."""
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return size, b""
    content = os.pread(descriptor, size, 0)
    start = content.rfind(b"\n") + 1
    if not _is_cut(content[start:]):
        return size, b"\n"
    os.ftruncate(descriptor, start)
    return start, b""

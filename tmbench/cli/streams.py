"""Standard output and standard error: what happens where they take no more, or nobody reads them any more."""

from __future__ import annotations

import io
import os
import sys
from typing import Any, TextIO

READER_GONE = 141
"""The exit code of a program that wrote to a closed pipe: 128 and the number of SIGPIPE."""


class _Output(io.FileIO):
    """An output whose reader may stop at any time, as ``head`` does: the program then ends, and says nothing."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            abandon(self)
            # Raised from here, as click and rich answer a BrokenPipeError with exit code 1.
            raise SystemExit(READER_GONE) from None


def prepare() -> None:
    """Have a terminal that cannot show a letter show a question mark for it, and a closed pipe end the program quietly."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # None where it was closed before the program began.
        if not isinstance(stream, io.TextIOWrapper):
            continue
        stream.reconfigure(errors="replace")
        # Python has no buffer below the text where PYTHONUNBUFFERED is set.
        buffered = isinstance(stream.buffer, io.BufferedWriter)
        if isinstance(getattr(stream.buffer, "raw", stream.buffer), io.FileIO):
            stream.flush()
            raw = _Output(stream.fileno(), "wb", closefd=False)
            about = {name: getattr(stream, name) for name in ("encoding", "errors", "line_buffering", "write_through")}
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw) if buffered else raw, **about))


def flush() -> None:
    """Write what is left."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def is_full(stream: TextIO) -> bool:
    """Whether a stream takes no more; a flush does not tell, as what failed to be written is no longer in the buffer."""
    try:
        os.write(stream.fileno(), b"\n")
    except OSError:
        return True
    return False


def abandon(stream: TextIO | io.FileIO) -> None:
    """Have nothing more written to a stream, which the interpreter would try once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

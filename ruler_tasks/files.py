"""Reads texts that a user names, and tells texts apart.

What has no end, or is far too large to be meant, is refused before it is opened.
"""

from __future__ import annotations

import errno
import hashlib
import json
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MEBIBYTE = 2**20


def read_text(path: Path, mebibytes: int) -> str:
    """A file of UTF-8, a byte-order mark aside.

    Raises:
        OSError: it cannot be read, is no regular file (a pipe, a device), or has more than so many mebibytes.
        UnicodeDecodeError: it is not UTF-8.
    """
    about = path.stat()
    if not stat.S_ISREG(about.st_mode) and not stat.S_ISDIR(about.st_mode):  # opening a folder says so itself
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    if about.st_size > mebibytes * MEBIBYTE and stat.S_ISREG(about.st_mode):
        raise OSError(errno.EFBIG, f"It has more than {mebibytes} MiB", str(path))
    return path.read_text(encoding="utf-8-sig")


def parse_json(text: str) -> Any:
    """A value of JSON whose texts a tokenizer takes.

    Raises:
        ValueError: it is no JSON, or a text in it has half a character: one of a pair of UTF-16, spelled as `\\ud800`.
        RecursionError: it is nested too deeply.
    """
    value = json.loads(text)
    if "\\u" in text:
        check_characters(json.dumps(value, ensure_ascii=False))
    return value


def check_characters(text: str) -> None:
    """Raise ValueError, naming it, for half a character in a text: one of a pair of UTF-16 without the other."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a character, \\u{ord(text[error.start]):x}") from error


def texts_hash(texts: Sequence[str]) -> str:
    """What these texts, in this order, are told apart by from all others."""
    return hashlib.sha256("\0".join(texts).encode(errors="surrogatepass")).hexdigest()

"""Numbers as people say them."""

from __future__ import annotations

MINUTE, HOUR = 60, 3600
UNITS = {"K": 2**10, "M": 2**20}
"""Of numbers of tokens."""


def length_name(length: int) -> str:
    """A number of tokens, as ``--length`` reads it: 32768 is 32K, 1048576 is 1M, 1000 stays 1000."""
    for unit, size in reversed(UNITS.items()):
        if length % size == 0:
            return f"{length // size}{unit}"
    return str(length)


def counted(number: int, noun: str, plural: str = "") -> str:
    """So many of something: 1 task, 13 tasks. The noun is one of them; its plural has an s unless another is given."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def batched(batch_size: int) -> str:
    """What stands before a length of which several prompts are read together: "4 x ", and nothing for one."""
    return f"{batch_size} x " if batch_size > 1 else ""


def fed_words(chunk: int, prompt_length: str, ask_later: bool) -> str:
    """How prompts were fed, with ", " before it; nothing for one piece with its question."""
    chunks = f", in chunks of {length_name(chunk)}, prompt length {prompt_length}" if chunk else ""
    return chunks + ", asked later" * ask_later


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as many as are easily read."""
    if seconds < 2 * MINUTE:
        return f"{figure(seconds)} s"
    return f"{figure(seconds / MINUTE)} min" if seconds < 2 * HOUR else f"{figure(seconds / HOUR)} h"


def figure(number: float) -> str:
    """Three digits of a number, and all of those before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"

"""Rows in tokens: a writer that remembers, answers marked in a row, and haystacks."""

import random
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ruler_tasks import draws, prose

ROOT = Path(__file__).resolve().parent.parent
WORDING: dict[str, Any] = tomllib.loads((ROOT / "ruler_tasks" / "wording.toml").read_text(encoding="utf-8"))
BOS, EOS = 0, 1

Unit = tuple[str, list[int]]  # a piece of haystack with the separator before it, and its tokens


class Writer:
    """Text to tokens, remembering the tokens of what comes again and again."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}

    def each(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of texts that will not come again."""
        return [coded.ids for coded in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text that will not come again."""
        return self.each([text])[0]

    def fixed(self, text: str) -> list[int]:
        """The tokens of a text that will come again."""
        if text not in self.known:
            self.known[text] = self(text)
        return self.known[text]


@dataclass
class Row:
    """Tokens, and which of them are answers: `[start, stop)` each, EOS included."""

    ids: list[int] = field(default_factory=lambda: [BOS])
    answers: list[tuple[int, int]] = field(default_factory=list)

    def read(self, ids: Sequence[int]) -> None:
        """Append what is only read."""
        self.ids += ids

    def write(self, ids: Sequence[int]) -> None:
        """Append an answer and the token that ends it."""
        start = len(self.ids)
        self.ids += ids
        self.ids.append(EOS)
        self.answers.append((start, len(self.ids)))


def joined(parts: Sequence[str]) -> str:
    """Several queries as a prompt names them: a, b, and c."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + ", and " + parts[-1]


def spread(draw: random.Random, units: list[Unit], lines: list[Unit]) -> list[Unit]:
    """The lines, in their order, at random places among the units; two at one place only where there are few units."""
    gaps = range(len(units) + 1)
    places = draw.sample(gaps, len(lines)) if len(gaps) >= len(lines) else draw.choices(gaps, k=len(lines))
    hay: list[Unit] = []
    done = 0
    for place, line in zip(sorted(places), lines, strict=True):
        hay += units[done:place]
        hay.append(line)
        done = place
    return hay + units[done:]


def noise_units(writer: Writer, free: int) -> list[Unit]:
    """The noise line as often as it fits in `free` tokens."""
    text = "\n" + WORDING["noise"]
    line = writer.fixed(text)
    return [(text, line)] * max(0, free // len(line))


def essay_units(draw: random.Random, writer: Writer, free: int) -> list[Unit]:
    """Sentences of prose that fit in `free` tokens."""
    prose = sentences()
    at = draw.randrange(len(prose))
    units: list[Unit] = []
    while True:
        text = " " + prose[at % len(prose)]
        unit = writer.fixed(text)
        if len(unit) > free:
            break
        free -= len(unit)
        units.append((text, unit))
        at += 1
    words = text.split(" ")
    while words and len(unit := writer(" ".join(words))) > free:
        words.pop()
    if len(words) > 1:  # the text ends within a sentence
        units.append((" ".join(words), unit))
    return units


@cache
def sentences() -> list[str]:
    """Prose of the generators' kind that they do not write themselves."""
    draw = draws.seeded("training prose")
    return [prose.sentence(draw) for _ in range(20_000)]

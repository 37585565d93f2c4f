"""What the tasks draw at random: words, numbers, UUIDs, variable names, coded words.

Every function takes its own `random.Random`, so that a caller (a generator, a training script) decides alone what its
draws depend on. Nothing here touches the global random state.
"""

from __future__ import annotations

import hashlib
import random
import string
import tomllib
from functools import lru_cache
from importlib.resources import files
from typing import Literal

Kind = Literal["words", "numbers", "uuids"]
"""What a needle's key or value is made of."""


def seeded(*parts: object) -> random.Random:
    """A generator that depends on `parts` alone: equal parts, equal draws, on every machine and in every process."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return random.Random(int.from_bytes(digest[:16], "big"))


@lru_cache(maxsize=3)
def word_list(kind: Literal["noun", "adjective", "verb"]) -> tuple[str, ...]:
    """The wonderwords list of one kind, in the package's order; RULER draws its keys and its common words from them."""
    text = (files("wonderwords") / "assets" / f"{kind}list.txt").read_text(encoding="utf-8")
    return tuple(word for line in text.splitlines() if (word := line.strip()))


@lru_cache(maxsize=8)
def phrases(table: str) -> dict[str, list[str]]:
    """A table of `phrases.toml`: lists of words and sentence parts that generated text is made of."""
    lists: dict[str, list[str]] = tomllib.loads((files("ruler_tasks") / "phrases.toml").read_text("utf-8"))[table]
    return lists


@lru_cache(maxsize=1)
def word_pool() -> tuple[str, ...]:
    """All nouns, adjectives and verbs, each once, sorted: the pool of the common-words task."""
    return tuple(sorted({*word_list("noun"), *word_list("adjective"), *word_list("verb")}))


def draw_word(rng: random.Random) -> str:
    """An "adjective-noun" word.

    RULER lists all six million pairs and picks from the list; drawing the halves apart gives the same distribution
    (up to the few pairs that can be formed twice) without the list.
    """
    return f"{rng.choice(word_list('adjective'))}-{rng.choice(word_list('noun'))}"


def draw_number(rng: random.Random, digits: int = 7) -> str:
    """A decimal number of exactly `digits` digits."""
    return str(rng.randint(10 ** (digits - 1), 10**digits - 1))


def draw_uuid(rng: random.Random) -> str:
    """A random UUID (version 4) in its canonical form of 36 characters."""
    bits = rng.getrandbits(128)
    bits = bits & ~(0xF000 << 64) | 0x4000 << 64
    bits = bits & ~(0xC000 << 48) | 0x8000 << 48
    hexa = f"{bits:032x}"
    return f"{hexa[:8]}-{hexa[8:12]}-{hexa[12:16]}-{hexa[16:20]}-{hexa[20:]}"


def draw(kind: Kind, rng: random.Random) -> str:
    """One key or value of `kind`."""
    if kind == "words":
        return draw_word(rng)
    if kind == "numbers":
        return draw_number(rng)
    return draw_uuid(rng)


def draw_new(kind: Kind, rng: random.Random, taken: set[str]) -> str:
    """One key or value of `kind` that is not in `taken`, to which it is added."""
    while (drawn := draw(kind, rng)) in taken:
        pass
    taken.add(drawn)
    return drawn


def draw_letters(rng: random.Random, size: int, count: int, alphabet: str = string.ascii_uppercase) -> list[str]:
    """`count` different strings of `size` letters, in the order drawn.

    Raises:
        ValueError: there are fewer than `count` such strings.
    """
    if len(alphabet) ** size < count:
        raise ValueError(f"There are fewer than {count} strings of {size} letters out of {len(alphabet)}.")
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn["".join(rng.choices(alphabet, k=size))] = None
    return list(drawn)


def draw_made_up_word(rng: random.Random, syllables: int = 3) -> str:
    """A pronounceable lower-case word that is in no dictionary (or only by chance)."""
    parts = phrases("names")
    onsets, nuclei, codas = parts["onsets"], parts["nuclei"], parts["codas"]
    return "".join(rng.choice(onsets) + rng.choice(nuclei) + rng.choice(codas) for _ in range(syllables))


def draw_words(rng: random.Random, count: int) -> list[str]:
    """`count` different words in random order: from the word pool as far as it goes, made up beyond it."""
    words = rng.sample(word_pool(), min(count, len(word_pool())))
    if count > len(words):
        extend_words(rng, words, count)
    return words


def extend_words(rng: random.Random, words: list[str], count: int) -> None:
    """Appends made-up words to `words`, none of them there before, until there are `count`."""
    seen = set(words)
    while len(words) < count:
        word = draw_made_up_word(rng, rng.randint(2, 4))
        if word not in seen:
            seen.add(word)
            words.append(word)

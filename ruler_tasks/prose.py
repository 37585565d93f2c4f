"""Generated prose: the stand-in for essays where there are none. Plain sentences about people, places and things.

The text has no repetition beyond its sentence patterns, holds no digits and no capitalised rare names, so that a
needle put into it is the only one of its kind; and it is the same on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

from ruler_tasks.draws import phrases, seeded, word_list

_WORDS = 240_000  # more than 131072 tokens under any tokenizer, and enough that longer prompts seldom repeat much


def _thing(rng: random.Random) -> str:
    phrase = _phrase(rng)
    return f"the {phrase}" if rng.random() < 0.5 else _indefinite(phrase)


def _phrase(rng: random.Random) -> str:
    noun = rng.choice(_plain("noun"))
    return f"{rng.choice(_plain('adjective'))} {noun}" if rng.random() < 0.6 else noun


def _indefinite(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


@lru_cache(maxsize=2)
def _plain(kind: Literal["noun", "adjective"]) -> tuple[str, ...]:
    words = word_list(kind)
    return tuple(word for word in words if word.isascii() and word.isalpha() and word.islower() and len(word) > 2)


def sentence(rng: random.Random) -> str:
    """One sentence, between 3 and 40 words, with its full stop or question mark."""
    text = rng.choice(_FORMS)(rng, phrases("prose"))
    return text[0].upper() + text[1:] + ("" if text[-1] in ".?" else ".")


Parts = dict[str, list[str]]


def _remark(rng: random.Random, parts: Parts) -> str:
    return rng.choice(parts["remarks"])


def _question(rng: random.Random, parts: Parts) -> str:
    return rng.choice(parts["questions"]).format(a=_thing(rng), b=_thing(rng))


def _deed(rng: random.Random, parts: Parts) -> str:
    return f"{rng.choice(parts['people'])} {rng.choice(parts['actions'])} {_thing(rng)}"


def _opened(rng: random.Random, parts: Parts) -> str:
    return f"{rng.choice(parts['openings'])}, {_deed(rng, parts)} {rng.choice(parts['places'])}"


def _feeling(rng: random.Random, parts: Parts) -> str:
    return f"{rng.choice(parts['people'])} {rng.choice(parts['feelings'])} {_thing(rng)}"


def _timed_feeling(rng: random.Random, parts: Parts) -> str:
    return f"{rng.choice(parts['times'])}, {_feeling(rng, parts)}, {rng.choice(parts['reasons'])}"


def _state(rng: random.Random, parts: Parts) -> str:
    where, when = rng.choice(parts["places"]), rng.choice(parts["times"])
    deed = f"{rng.choice(parts['people'])} {rng.choice(parts['actions'])} it {when}"
    return f"the {_phrase(rng)} {where} was {rng.choice(_plain('adjective'))}, and {deed}"


def _two_things(rng: random.Random, parts: Parts) -> str:
    return f"{_deed(rng, parts)} and {_thing(rng)} {rng.choice(parts['times'])}"


def _there_is(rng: random.Random, parts: Parts) -> str:
    where = rng.choice(parts["places"])
    about = f"{rng.choice(parts['people'])} {rng.choice(parts['feelings'])}"
    return f"there is {_indefinite(_phrase(rng))} {where} that {about}"


def _condition(rng: random.Random, parts: Parts) -> str:
    first, second = rng.choice(_plain("adjective")), rng.choice(_plain("adjective"))
    return f"if {_thing(rng)} is {first}, then {_thing(rng)} may well be {second}"


def _two_deeds(rng: random.Random, parts: Parts) -> str:
    second = f"{_deed(rng, parts)} {rng.choice(parts['places'])}, {rng.choice(parts['reasons'])}"
    return f"{rng.choice(parts['times'])} {_deed(rng, parts)}, and {second}"


def _comparison(rng: random.Random, parts: Parts) -> str:
    return f"{_feeling(rng, parts)} more than {_thing(rng)}"


_FORMS: tuple[Callable[[random.Random, Parts], str], ...] = (
    _remark,
    _question,
    _opened,
    _timed_feeling,
    _state,
    _two_things,
    _there_is,
    _condition,
    _two_deeds,
    _comparison,
)


def sentences(rng: random.Random, words: int) -> list[str]:
    """Sentences that hold at least `words` words in all."""
    made: list[str] = []
    while words > 0:
        made.append(sentence(rng))
        words -= made[-1].count(" ") + 1
    return made


@lru_cache(maxsize=1)
def prose_words() -> tuple[str, ...]:
    """The words of the stand-in for essays."""
    return tuple(" ".join(sentences(seeded("prose"), _WORDS)).split())

"""Needle in a haystack: eight tasks (RULER, Hsieh et al. 2024, arXiv 2404.06654, section 3.1).

Sentences of the form "the number of KEY is VALUE" stand in a long text; the question asks for the values of one or
several keys. Three haystacks: one line of noise repeated, essays, or needles of the same kind with other keys.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from ruler_tasks.draws import Kind, draw_new, seeded
from ruler_tasks.fit import Draft, Filled, most_units
from ruler_tasks.lines import LineTokens
from ruler_tasks.recipe import Setting
from ruler_tasks.sources import Essays
from ruler_tasks.wording import Wording

Haystack = Literal["noise", "needles", "essays"]

DEPTHS = tuple(round(100 * i / 39) for i in range(40))
"""The places in an essay, in percent of its sentences, at which a needle can stand."""

_LEAST_WORDS = 16
_LEAST_LINES = 4


@dataclass(frozen=True)
class Niah:
    """A needle task: the haystack, what keys and values are, and how many there are.

    Attributes:
        n_keys: different keys that have needles.
        n_values: needles of each key.
        n_queries: keys that the question asks for.
    """

    haystack: Haystack
    keys: Kind = "words"
    values: Kind = "numbers"
    n_keys: int = 1
    n_values: int = 1
    n_queries: int = 1

    def source(self, setting: Setting) -> str:
        """The haystack's name, or that of the essays."""
        return setting.sources.essays().source if self.haystack == "essays" else self.haystack

    def draft(self, setting: Setting, index: int, rng: random.Random) -> Draft:
        """A sample whose haystack is still open."""
        needles = Needles.drawn(self, setting.wording, rng)
        if self.haystack == "essays":
            return _EssayDraft(setting, needles, setting.sources.essays(), rng)
        return _LineDraft(setting, needles, self.haystack, rng)


def needle_sentence(wording: Wording, kind: Kind, key: str, value: str) -> str:
    """The sentence that says which value of `kind` a key has."""
    return wording.needle.format(type=wording.types[kind], key=key, value=value)


def listed(names: list[str]) -> str:
    """Names as the question lists them: "a", "a, and b", "a, b, and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"


class Needles:
    """The needles of one sample, in the order in which they stand in the text, with the question about them.

    Attributes:
        sentences: every needle.
        outputs: the values asked for.
        first: the needle of the first of these values.
        taken_keys, taken_values: all drawn so far; a distractor must differ from them.
    """

    def __init__(self, task: Niah, wording: Wording, pairs: dict[str, list[str]], queries: list[str]) -> None:
        self.task = task
        self.wording = wording
        self.pairs = pairs
        self.queries = queries
        self.outputs = tuple(value for key in queries for value in pairs[key])
        self.sentences = [
            needle_sentence(wording, task.values, key, value) for key, values in pairs.items() for value in values
        ]
        self.first = self.sentences[[value for values in pairs.values() for value in values].index(self.outputs[0])]
        self.taken_keys = set(pairs)
        self.taken_values = {value for values in pairs.values() for value in values}

    @classmethod
    def drawn(cls, task: Niah, wording: Wording, rng: random.Random) -> Needles:
        """Keys and values drawn at random, all different, and the needles in random order."""
        keys: set[str] = set()
        values: set[str] = set()
        pairs = {
            draw_new(task.keys, rng, keys): [draw_new(task.values, rng, values) for _ in range(task.n_values)]
            for _ in range(max(task.n_keys, task.n_queries))
        }
        needles = cls(task, wording, pairs, rng.sample(list(pairs), task.n_queries))
        rng.shuffle(needles.sentences)
        return needles

    def distractor(self, rng: random.Random) -> str:
        """A needle of the same kind about a new key."""
        key = draw_new(self.task.keys, rng, self.taken_keys)
        value = draw_new(self.task.values, rng, self.taken_values)
        return needle_sentence(self.wording, self.task.values, key, value)

    def filled(self, setting: Setting, context: str, size: int) -> Filled:
        """The prompt around a context that holds the needles."""
        one = len(self.outputs) == 1
        prompt = setting.wording.niah_one if one else setting.wording.niah_many
        kind = setting.wording.types[self.task.values]
        text, prefix = prompt.render(type=kind, context=context, query=listed(self.queries))
        framed = setting.frame.around(text)
        at = framed.index(self.first) + self.first.rindex(self.outputs[0]) if context else None
        return Filled(framed, prefix, self.outputs, size, at)


class _LineDraft:
    """Needles among lines: noise, or needles with other keys. The unit is a line."""

    def __init__(
        self, setting: Setting, needles: Needles, haystack: Literal["noise", "needles"], rng: random.Random
    ) -> None:
        self._setting = setting
        self._needles = needles
        self._noise = setting.wording.noise if haystack == "noise" else None
        self._places = rng.getrandbits(64)
        self._rng = rng
        self._lines: list[str] = []
        self._least = max(_LEAST_LINES, len(needles.sentences))
        self._base = setting.count_one(needles.filled(setting, "\n".join(needles.sentences), 0).prompt)
        if self._noise is None:
            self._line = _line_tokens(setting, needles)
        else:
            self._line = LineTokens(float(setting.tokens.pieces([f"\n{self._noise}"])[0]), 0.0)

    def fill(self, room: int) -> Filled:
        lines = self._line.most(room - self._base, self._least)
        return self._needles.filled(self._setting, self._context(lines), lines)

    def _context(self, count: int) -> str:
        if self._noise is not None:
            lines = [self._noise] * count
        else:
            while len(self._lines) < count:
                self._lines.append(self._needles.distractor(self._rng))
            lines = self._lines[:count]
        needles = self._needles.sentences
        places = random.Random(self._places).sample(range(count), len(needles))
        for place, needle in zip(sorted(places, reverse=True), needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)


def _line_tokens(setting: Setting, needles: Needles) -> LineTokens:
    """The tokens of a distractor line, from lines drawn for the purpose."""
    task = needles.task

    def lines(count: int) -> list[str]:
        rng = seeded("needle lines")
        others = Needles.drawn(task, setting.wording, rng)
        return [others.distractor(rng) for _ in range(count)]

    return LineTokens.of(setting, ("needle lines", setting.wording.hash, task.keys, task.values), lines)


class _EssayDraft:
    """Needles between the sentences of the first words of the essays. The unit is a word."""

    def __init__(self, setting: Setting, needles: Needles, essays: Essays, rng: random.Random) -> None:
        self._setting = setting
        self._needles = needles
        self._essays = essays
        self._depths = sorted(rng.sample(DEPTHS, len(needles.sentences)))
        self._base = setting.count_one(needles.filled(setting, " ".join(needles.sentences), 0).prompt)

    def fill(self, room: int) -> Filled:
        cumulative = self._essays.cumulative_tokens(self._setting.tokens, room - self._base)
        words = max(_LEAST_WORDS, most_units(cumulative, room - self._base))
        return self._needles.filled(self._setting, self._context(words), words)

    def _context(self, words: int) -> str:
        essays = self._essays
        sentences = essays.sentences_in(words)
        parts = []
        start = 0
        for depth, needle in zip(self._depths, self._needles.sentences, strict=True):
            end = min(words, essays.start_of(int(sentences * depth / 100)))
            parts += [essays.text(start, end), needle]
            start = end
        parts.append(essays.text(start, words))
        return " ".join(part for part in parts if part)

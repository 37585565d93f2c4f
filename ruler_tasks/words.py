"""Aggregation: `cwe`, common words, and `fwe`, frequent coded words (RULER, Hsieh et al. 2024, arXiv 2404.06654,
section 3.3)."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import isqrt, pi

from ruler_tasks.draws import draw_letters, draw_words, extend_words, word_pool
from ruler_tasks.fit import Draft, Filled, largest
from ruler_tasks.recipe import Fitting, Setting
from ruler_tasks.wording import Prompt

_COMMON = 10
_LEAST_WORDS = 20
_LEAST_CODED = 100
_CODE_LETTERS = 6


@dataclass(frozen=True)
class Repeats:
    """How often words come up: the common ones, the others; and in the solved example, over `words` words."""

    common: int
    other: int
    example_words: int
    example_common: int
    example_other: int

    @property
    def parameters(self) -> dict[str, int]:
        """What tells samples apart, by RULER's names."""
        return {"freq_cw": self.common, "freq_ucw": self.other}


LONG = Repeats(30, 3, 40, 10, 3)
SHORT = Repeats(6, 1, 20, 3, 1)  # below 4096 tokens
_LONG_FROM = 4096


@dataclass(frozen=True)
class CommonWords:
    """`cwe`: which ten words come up most often in a numbered list."""

    def source(self, setting: Setting) -> str:
        """A word list."""
        return "words"

    def draft(self, setting: Setting, index: int, rng: random.Random) -> Draft:
        """A sample with its example and words, and the number of words open.

        From 4096 tokens on the words repeat as often as RULER has it for long prompts, unless a tokenizer with very
        small tokens leaves no room for that: then samples of both kinds stand side by side, and each says which it is.
        """
        if setting.length >= _LONG_FROM:
            state = rng.getstate()
            draft = CommonWordsDraft(setting, setting.wording.cwe, LONG, rng)
            if draft.least_cost <= setting.budget:
                return draft
            rng.setstate(state)
        return CommonWordsDraft(setting, setting.wording.cwe, SHORT, rng)


def numbered(words: Sequence[str]) -> str:
    """The words as one numbered list on one line."""
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def common_first(rng: random.Random, count: int) -> list[str]:
    """`count` different words whose first ten do not contain one another, as substring scoring would mix them up."""
    words = draw_words(rng, count)
    common: list[str] = []
    for word in words:
        if not any(word.lower() in other.lower() or other.lower() in word.lower() for other in common):
            common.append(word)
            if len(common) == _COMMON:
                break
    rest = [word for word in words if word not in common]
    return common + rest


class CommonWordsDraft:
    """A list of words, and which ten come up most often in it. The unit is a word, which brings all its repetitions."""

    def __init__(self, setting: Fitting, prompt: Prompt, repeats: Repeats, rng: random.Random) -> None:
        """``prompt`` takes the numbered list as ``context``."""
        self._setting = setting
        self._prompt = prompt
        self._repeats = repeats
        self._example = self._solved_example(rng)
        # An entry (number, dot, word) seldom takes fewer than four tokens; more words are made when it does.
        wanted = max(_LEAST_WORDS + 1, setting.length // (4 * repeats.other))
        self._words = common_first(rng, min(wanted, len(word_pool())))
        self._rng = rng
        self._order = rng.getrandbits(64)
        self._base = setting.count_one(self._filled("", 0).prompt)
        self._costs = self._word_costs()
        self.least_cost = self._cost(_LEAST_WORDS)

    def _solved_example(self, rng: random.Random) -> str:
        repeats = self._repeats
        words = common_first(rng, repeats.example_words)
        entries = words[:_COMMON] * repeats.example_common + words[_COMMON:] * repeats.example_other
        rng.shuffle(entries)
        template, prefix = self._prompt.render(context=numbered(entries))
        return f"{template}{prefix} {numbered(words[:_COMMON])}\n"

    def _word_costs(self) -> list[int]:
        """What the words up to each take with all their repetitions, list numbers aside."""
        counts = self._setting.tokens.words(self._words)
        often, seldom = self._repeats.common, self._repeats.other
        costs = [count * (often if at < _COMMON else seldom) for at, count in enumerate(counts)]
        return list(accumulate(costs))

    def _cost(self, words: int) -> float:
        entries = _COMMON * self._repeats.common + (words - _COMMON) * self._repeats.other
        return self._base + self._costs[words - 1] + number_costs(self._setting, entries)[entries - 1]

    def fill(self, room: int) -> Filled:
        while self._cost(len(self._words)) <= room:
            extend_words(self._rng, self._words, len(self._words) * 9 // 8)
            self._costs = self._word_costs()
        count = largest(self._cost, room, _LEAST_WORDS, len(self._words))
        words = self._words[:count]
        entries = words[:_COMMON] * self._repeats.common + words[_COMMON:] * self._repeats.other
        random.Random(self._order).shuffle(entries)
        return self._filled(numbered(entries), count)

    def _filled(self, context: str, size: int) -> Filled:
        template, prefix = self._prompt.render(context=context)
        outputs = tuple(self._words[:_COMMON])
        text = self._setting.frame.around(self._example + template)
        return Filled(text, prefix, outputs, size, parameters=self._repeats.parameters)


def number_costs(setting: Fitting, entries: int) -> list[int]:
    """What the list numbers up to each take, for at least `entries` of them."""
    costs: list[int] = setting.tokens.memo.setdefault("list numbers", [])
    if len(costs) < entries:
        new = setting.tokens.words(f"{number}." for number in range(len(costs) + 1, entries * 9 // 8 + 2))
        costs += list(accumulate(new, initial=costs[-1] if costs else 0))[1:]
    return costs


@dataclass(frozen=True)
class FrequentWords:
    """`fwe`: which three coded words are the most frequent, where frequencies fall as rank to the power -2.

    The word of rank 1 is dots, which the question says to ignore; the answers have the ranks 2 to 4.
    """

    def source(self, setting: Setting) -> str:
        """Coded words."""
        return "coded words"

    def draft(self, setting: Setting, index: int, rng: random.Random) -> Draft:
        """A sample with its code words, and the number of words open."""
        return _FrequentWordsDraft(setting, rng)


def zipf_counts(total: int, ranks: int) -> list[int]:
    """How often the word of each rank comes up among `total`: total / (rank^2 zeta(2)), rounded down."""
    return [int(total * 6 / (pi * rank) ** 2) for rank in range(1, ranks + 1)]


class _FrequentWordsDraft:
    """The unit is a word of the text, so that a prompt fills its room to the last few tokens."""

    def __init__(self, setting: Setting, rng: random.Random) -> None:
        self._setting = setting
        vocabulary = max((setting.length - setting.answer) // 50, 8)
        # Ranks beyond the square root of the number of words never come up: their codes need not be drawn.
        ranks = min(vocabulary, isqrt(2 * max(setting.length, _LEAST_CODED)) + 1)
        self._codes = ["...", *draw_letters(rng, _CODE_LETTERS, ranks - 1, string.ascii_lowercase)]
        self._order = rng.getrandbits(64)
        self._tokens = setting.tokens.words(self._codes)
        self._base = setting.count_one(self._filled("", 0).prompt)

    def _cost(self, total: int) -> float:
        counts = zipf_counts(total, len(self._codes))
        return self._base + sum(count * tokens for count, tokens in zip(counts, self._tokens, strict=True))

    def fill(self, room: int) -> Filled:
        total = largest(self._cost, room, _LEAST_CODED, _LEAST_CODED + room // 3)
        counts = zipf_counts(total, len(self._codes))
        words = [code for code, count in zip(self._codes, counts, strict=True) for _ in range(count)]
        random.Random(self._order).shuffle(words)
        return self._filled(" ".join(words), total)

    def _filled(self, context: str, size: int) -> Filled:
        template, prefix = self._setting.wording.fwe.render(context=context)
        return Filled(self._setting.frame.around(template), prefix, tuple(self._codes[1:4]), size)

"""Common and coded words as the published code draws them: lists of one size have their answers at the same places."""

from __future__ import annotations

import string

from ruler_tasks.draws import word_pool
from ruler_tasks.fit import Filled
from ruler_tasks.published.drawing import LONG_FROM, Drawing, UndrawableError, search, too_short
from ruler_tasks.recipe import Setting
from ruler_tasks.words import LONG, SHORT, numbered, zipf_counts

WORDS_MISSING = "english_words.json missing"
"""How the source of samples ends whose search asked for a word list that is not there."""

_COMMON = 10
_ESTIMATED_AT = 4096
_CODE_LETTERS = 6


class WordListDrawing(Drawing):
    """`cwe`. The unit is a word, which brings all its repetitions."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._repeats = LONG if setting.length >= LONG_FROM else SHORT
        self._pool = list(word_pool())
        self.shuffled(self._pool)

    @property
    def source(self) -> str:
        return f"words, {WORDS_MISSING}" if self.limited else "words"

    def search(self) -> int:
        length = self.setting.length
        return search(
            self.probed,
            length,
            self.setting.answer,
            self.step,
            estimate_at=_ESTIMATED_AT,
            most=lambda each: int(length // each) * 2,
        )

    def _list(self, count: int, common: int, other: int) -> tuple[str, list[str]]:
        """A numbered list of so many words with their repetitions, and its common words."""
        pool = self._pool
        if count > len(pool):
            # More words than the pool has come from another list altogether.
            english = self.setting.sources.english_words()
            if english is None:
                self.limited = True
            if english is None or count > len(english):
                raise UndrawableError
            pool = english
        words = self.rng.sample(pool, count)
        entries = words[:_COMMON] * common + words[_COMMON:] * other
        self.shuffled(entries)
        return numbered(entries), words[:_COMMON]

    def drawn(self, units: int, index: int) -> Filled:
        repeats, prompt, frame = self._repeats, self.setting.wording.cwe, self.setting.frame
        solved, answer = self._list(repeats.example_words, repeats.example_common, repeats.example_other)
        context, common = self._list(units, repeats.common, repeats.other)
        template, prefix = prompt.render(context=solved)
        example = f"{frame.around(template)}{prefix} {numbered(answer)}\n"
        template, prefix = prompt.render(context=context)
        text = example + frame.around(template)
        return Filled(text, prefix, tuple(common), units, parameters=repeats.parameters)


class CodedWordDrawing(Drawing):
    """`fwe`. The unit is a word of the text; its number grows and shrinks by a 32nd of the budget."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._room = setting.budget
        self._vocabulary = self._room // 50
        self.step = self._room // 32
        if self._vocabulary <= 3 or self.step < 1:
            raise too_short(setting)

    @property
    def source(self) -> str:
        return "coded words"

    def _codes(self) -> list[str]:
        codes: list[str] = []
        while len(codes) < self._vocabulary or len(set(codes)) < self._vocabulary:
            codes.append("".join(self.rng.choices(string.ascii_lowercase, k=_CODE_LETTERS)))
        codes = sorted(set(codes))
        self.shuffled(codes)
        return ["...", *codes[1:]]

    def _filled(self, codes: list[str], units: int) -> Filled:
        counts = zipf_counts(max(units, 0), len(codes))
        words = [code for code, count in zip(codes, counts, strict=True) for _ in range(count)]
        self.shuffled(words)
        template, prefix = self.setting.wording.fwe.render(context=" ".join(words))
        return Filled(self.setting.frame.around(template), prefix, tuple(codes[1:4]), units)

    def drawn(self, units: int, index: int) -> Filled:
        return self._filled(self._codes(), units)

    def search(self) -> int:
        codes = self._codes()
        units = self._room // _CODE_LETTERS
        while self.counted(self._filled(codes, units).prompt) < self._room:
            units += self.step
        return units - self.step

    def sample(self, index: int) -> tuple[Filled, int]:
        codes = self._codes()
        units = self.units
        while (tokens := self.counted((filled := self._filled(codes, units)).prompt)) > self._room:
            units -= self.step
            if units <= 0:
                break
        # A text that is too short lacks some of the three words that are asked for.
        if tokens > self._room or zipf_counts(max(units, 0), 4)[-1] < 1:
            raise too_short(self.setting)
        return filled, tokens

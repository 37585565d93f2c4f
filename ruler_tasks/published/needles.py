"""Needles as the published code draws them: keys may repeat, and their order among themselves is the same in all samples."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import overload

from ruler_tasks.draws import Kind, draw_number, draw_uuid, word_list
from ruler_tasks.fit import Filled
from ruler_tasks.niah import DEPTHS, Niah, listed, needle_sentence
from ruler_tasks.published.drawing import LONG_FROM, Drawing, UndrawableError
from ruler_tasks.published.sentences import sentence_splitter
from ruler_tasks.recipe import Setting

_ESSAY_STEP, _LINE_STEP, _SHORT_LINE_STEP = 500, 25, 5


class WordPairs(Sequence[str]):
    """Every different "adjective-noun" in the order of their characters, without the list of six million being made.

    An adjective has its nouns in one block; where one begins with another and a hyphen, both blocks are sorted as one.
    """

    def __init__(self, adjectives: Sequence[str], nouns: Sequence[str]) -> None:
        endings = sorted(set(nouns))
        self._blocks: list[tuple[str, list[str]]] = []
        stems = sorted({f"{adjective}-" for adjective in adjectives})
        while stems:
            alike = [stem for stem in stems if stem.startswith(stems[0])]
            stems = stems[len(alike) :]
            if len(alike) == 1:
                self._blocks.append((alike[0], endings))
            else:
                self._blocks.append(("", sorted({stem + ending for stem in alike for ending in endings})))
        self._ends = list(accumulate(len(block) for _, block in self._blocks))

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[str]: ...
    def __getitem__(self, at: int | slice) -> str | Sequence[str]:
        if isinstance(at, slice):
            return [self[number] for number in range(*at.indices(len(self)))]
        if not 0 <= at < len(self):
            raise IndexError(at)
        block = bisect_right(self._ends, at)
        stem, endings = self._blocks[block]
        return stem + endings[at - (self._ends[block - 1] if block else 0)]


@cache
def word_pairs() -> WordPairs:
    """The pairs of the wonderwords lists."""
    return WordPairs(word_list("adjective"), word_list("noun"))


class NeedleDrawing(Drawing):
    """The eight needle tasks. The unit is a word of the essays, or a line."""

    def __init__(self, setting: Setting, task: Niah) -> None:
        super().__init__(setting)
        self._task = task
        if task.haystack == "essays":
            self.step = _ESSAY_STEP
            essays = setting.sources.essays()
            before, after = essays.margins
            # Split at single blanks, a text that begins or ends with white space has an empty word there.
            self._words = [""] * before + list(essays.text_words) + [""] * after
            self._split, by = sentence_splitter()
            self._source = f"{essays.source}, {by}"
        else:
            self.step = _LINE_STEP if setting.length >= LONG_FROM else _SHORT_LINE_STEP
            self._source = task.haystack

    @property
    def source(self) -> str:
        return self._source

    def _draw(self, kind: Kind) -> str:
        if kind == "words":
            return self.rng.choice(word_pairs())
        return draw_number(self.rng) if kind == "numbers" else draw_uuid(self.rng)

    def _needle(self, key: str, value: str) -> str:
        return needle_sentence(self.setting.wording, self._task.values, key, value)

    def drawn(self, units: int, index: int) -> Filled:
        task, wording = self._task, self.setting.wording
        keys: list[str] = []
        values: list[list[str]] = []
        for _ in range(max(task.n_keys, task.n_queries)):
            keys.append(self._draw(task.keys))
            values.append([self._draw(task.values) for _ in range(task.n_values)])
        needles = [self._needle(key, value) for key, own in zip(keys, values, strict=True) for value in own]
        self.shuffled(needles)
        context = self._among_sentences(needles, units) if task.haystack == "essays" else self._among_lines(needles, units)
        asked = self.rng.sample(range(len(keys)), task.n_queries)
        outputs = tuple(value for at in asked for value in values[at])
        prompt = wording.niah_one if task.n_queries * task.n_values == 1 else wording.niah_many
        query = listed([keys[at] for at in asked])
        text, prefix = prompt.render(type=wording.types[task.values], context=context, query=query)
        framed = self.setting.frame.around(text)
        return Filled(framed, prefix, outputs, units, framed.find(outputs[0]))

    def _among_lines(self, needles: list[str], units: int) -> str:
        if self._task.haystack == "noise":
            lines = [self.setting.wording.noise] * units
        else:
            lines = [self._needle(self._draw(self._task.keys), self._draw(self._task.values)) for _ in range(units)]
        if units < len(needles):
            raise UndrawableError
        for place, needle in zip(sorted(self.rng.sample(range(units), len(needles)), reverse=True), needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)

    def _among_sentences(self, needles: list[str], units: int) -> str:
        words = (self._words * -(-units // len(self._words)))[:units]
        sentences = self._split(" ".join(words).strip())
        places = sorted(int(len(sentences) * (depth / 100)) for depth in self.rng.sample(DEPTHS, len(needles)))
        parts: list[str] = []
        start = 0
        for place, needle in zip(places, needles, strict=True):
            # Nothing between two needles, or before one at the start, is an empty part: two blanks, or one in front.
            parts += [" ".join(sentences[start:place]), needle]
            start = place
        parts.append(" ".join(sentences[start:]))
        return " ".join(parts)

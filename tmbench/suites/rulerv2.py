"""RULERv2's kinds that need no data: retrieval among lines of the same kind, and copying the n-th line of a label.

The rules are those of its published generators (NVIDIA NeMo Skills, ``dataset/ruler2``): ``mk_niah_basic`` asks for the one
number of a key and ``mv_niah_basic`` for all four, numbers have ten digits, and all other lines have other keys with as many
numbers. ``copy_nth`` is its ``mv_niah_hard``, where each label stands before four texts and the n-th of one is to be copied;
its texts are questions of a data set, and here random words. All are scored by the share of the references that an answer
holds. Sentences are written here, so scores do not compare with published ones.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ruler_tasks.draws import draw_new, draw_number, seeded, word_list
from ruler_tasks.fit import Draft
from ruler_tasks.lines import LineTokens
from ruler_tasks.recipe import Fitting
from tmbench.results.suite_rows import RulerV2Row
from tmbench.suites.drawn import DrawnSuite, DrawnTask, share_found
from tmbench.suites.listing import ListDraft, Listing, Question

DIGITS = 10
LABEL_DIGITS = 7
REPEATS = 4
"""Values of a key in ``mv_niah_basic``, and texts of a label in ``copy_nth``."""
LEAST_GROUPS = 4
WORDS = 6
"""Of a text to copy. The longest noun has 19 characters, so a text takes no more than the 128 tokens of an answer."""
NEW_TOKENS = 128

NEEDLE = "A hidden number of {key} is {value}."
ONE = """\
Every line below gives a hidden number of something. Read all of them with care; the question comes at the end.
{lines}
Which hidden number of {key} do the lines above give?
"""
ONE_PREFIX = "The hidden number of {key} is"
ALL = """\
The lines below give the hidden numbers of some things. Each has several, which stand in different lines. Read all of them
with care; the question comes at the end.
{lines}
Which hidden numbers of {key} do the lines above give? List every one.
"""
ALL_PREFIX = "The hidden numbers of {key} are"
TEXT = "Text {key}: {value}"
COPY = """\
Below are some texts, one a line, each behind the word Text and a number. Several texts have the same number. You will be
asked to copy one of them.
{lines}
Of all lines above that begin with "Text {key}:", take the {order}, counted from the top, and copy it.
"""
COPY_PREFIX = "Text {key}:"
ORDERS = ("first", "second", "third", "fourth")
Pair = tuple[str, str]


class Groups(Listing[Pair]):
    """Lines with a key and a value, as many for each key; the first key is the one that is asked for."""

    def __init__(self, rng: random.Random, size: int = REPEATS) -> None:
        self._rng = rng
        self._size = size
        self.least = LEAST_GROUPS * size
        self._keys: set[str] = set()
        self._values: set[str] = set()
        self._pairs: list[Pair] = []

    @abstractmethod
    def key(self, rng: random.Random, taken: set[str]) -> str:
        """One that is not in ``taken``, to which it is added."""

    @abstractmethod
    def value(self, rng: random.Random, taken: set[str]) -> str:
        """One that is not in ``taken``, to which it is added."""

    def first(self, count: int) -> list[Pair]:
        """The first so many lines: the last key may have fewer."""
        while len(self._pairs) < count:
            key = self.key(self._rng, self._keys)
            self._pairs += [(key, self.value(self._rng, self._values)) for _ in range(self._size)]
        return self._pairs[:count]

    @property
    def asked(self) -> str:
        """The key that is asked for."""
        return self.first(1)[0][0]


class Needles(Groups):
    """Hidden numbers of things."""

    def key(self, rng: random.Random, taken: set[str]) -> str:
        """An adjective and a noun."""
        return draw_new("words", rng, taken)

    def value(self, rng: random.Random, taken: set[str]) -> str:
        """A number of ten digits."""
        return _new_number(rng, DIGITS, taken)

    def line(self, item: Pair) -> str:
        """The sentence of one."""
        return NEEDLE.format(key=item[0], value=item[1])

    def question(self, items: Sequence[Pair]) -> Question:
        """All numbers of the first key, in the order in which they stand there."""
        key = self.asked
        text, prefix = (ONE, ONE_PREFIX) if self._size == 1 else (ALL, ALL_PREFIX)
        values = tuple(value for own, value in items if own == key)
        return Question(text.replace("{key}", key), prefix.format(key=key), values)


class Texts(Groups):
    """Texts of six words, of which four have one label."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self._place = rng.randrange(REPEATS)

    def key(self, rng: random.Random, taken: set[str]) -> str:
        """A number of seven digits."""
        return _new_number(rng, LABEL_DIGITS, taken)

    def value(self, rng: random.Random, taken: set[str]) -> str:
        """Six different nouns."""
        while (text := " ".join(rng.sample(word_list("noun"), WORDS))) in taken:
            pass
        taken.add(text)
        return text

    def line(self, item: Pair) -> str:
        """A label and its text."""
        return TEXT.format(key=item[0], value=item[1])

    def question(self, items: Sequence[Pair]) -> Question:
        """The text that is the first label's n-th from the top."""
        key = self.asked
        values = [value for own, value in items if own == key]
        text = COPY.replace("{key}", key).replace("{order}", ORDERS[self._place])
        return Question(text, COPY_PREFIX.format(key=key), (values[self._place],), {"n": self._place + 1})


def _new_number(rng: random.Random, digits: int, taken: set[str]) -> str:
    while (number := draw_number(rng, digits)) in taken:
        pass
    taken.add(number)
    return number


@dataclass(frozen=True)
class Retrieval:
    """How the samples of one of the three tasks are made."""

    kind: type[Needles] | type[Texts]
    size: int = REPEATS

    def source(self, setting: Fitting) -> str:
        """What the lines hold."""
        return "random words" if self.kind is Texts else "needles"

    def draft(self, setting: Fitting, index: int, rng: random.Random) -> Draft:
        """A sample whose number of lines is open."""
        line = LineTokens.of(setting, (self.kind, self.size), self._some_lines)
        return ListDraft(setting, self._listing(rng), line, rng)

    def _listing(self, rng: random.Random) -> Groups:
        return Texts(rng) if self.kind is Texts else Needles(rng, self.size)

    def _some_lines(self, count: int) -> list[str]:
        listing = self._listing(seeded("lines of rulerv2"))
        return [listing.line(item) for item in listing.first(count)]


@dataclass(frozen=True, kw_only=True)
class RulerV2(DrawnSuite):
    """The three tasks."""

    name: ClassVar[str] = "rulerv2"
    title: ClassVar[str] = RulerV2Row.title
    row: ClassVar[type[RulerV2Row]] = RulerV2Row
    tasks: ClassVar[tuple[str, ...]] = RulerV2Row.tasks
    recipes: ClassVar[Mapping[str, DrawnTask]] = {
        "mk_niah_basic": DrawnTask(
            "one number among nothing but numbers with other keys", Retrieval(Needles, 1), NEW_TOKENS, share_found, ONE
        ),
        "mv_niah_basic": DrawnTask(
            "four numbers of one key, among other keys with four each", Retrieval(Needles), NEW_TOKENS, share_found, ALL
        ),
        "copy_nth": DrawnTask("the n-th text of four with one label", Retrieval(Texts), NEW_TOKENS, share_found, COPY),
    }
    sentences: ClassVar[tuple[str, ...]] = (NEEDLE, ONE, ONE_PREFIX, ALL, ALL_PREFIX, TEXT, COPY, COPY_PREFIX, *ORDERS)
    wording: ClassVar[str] = "rulerv2-1"

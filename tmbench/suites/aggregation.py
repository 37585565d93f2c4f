"""Aggregation that does not become harder with the length: RULER's common words, of as many different words everywhere.

The rule is that of ``cwe`` (Hsieh et al. 2024, arXiv 2404.06654, section 3.3): ten words of a list come up ten times as
often as the others, and are asked for. There words repeat as often at every length, so that a longer list has more different
ones: Llama-3.1-8B with dense attention scores 2.2 at 128K (arXiv 2507.21526). Here words repeat more often in a longer list.
The sentences are written here, so scores do not compare with published ones.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

from ruler_tasks.draws import word_pool
from ruler_tasks.fit import Draft
from ruler_tasks.recipe import Fitting
from ruler_tasks.wording import Prompt
from ruler_tasks.words import LONG, SHORT, CommonWordsDraft, Repeats, number_costs
from tmbench.results.suite_rows import AggregationRow
from tmbench.suites.drawn import DrawnSuite, DrawnTask, share_found

DIFFERENT = 400
"""About so many different words has a list that is long enough; RULER's has about 440 at 8K."""
COMMON = 10
RATIO = 10
"""How much more often the common words come up."""
LONG_FROM = 4096
"""From so many tokens on the solved example is RULER's longer one."""
NEW_TOKENS = 120
COMMON_WORDS = Prompt(
    """
A numbered list of words follows. Ten of the words come up far more often than any other. Count along: they are asked for.
{context}
Question: which 10 words come up most often in the whole list?
""",
    "Answer: the 10 most frequent words of the whole list are:",
)


@dataclass(frozen=True)
class FewWords:
    """How the samples of ``common_words`` are made."""

    def source(self, setting: Fitting) -> str:
        """A word list."""
        return "words"

    def draft(self, setting: Fitting, index: int, rng: random.Random) -> Draft:
        """A sample whose number of different words is open."""
        return CommonWordsDraft(setting, COMMON_WORDS, repeats_at(setting), rng)


def repeats_at(setting: Fitting) -> Repeats:
    """How often words come up at a length, the same in all samples: as often as leaves ``DIFFERENT`` of them."""
    example = LONG if setting.length >= LONG_FROM else SHORT
    entries, mean = COMMON * RATIO + DIFFERENT - COMMON, fmean(setting.tokens.words(word_pool()))
    other = 1
    while _tokens(setting, (other + 1) * entries, mean) <= setting.budget:
        other += 1
    return Repeats(RATIO * other, other, example.example_words, example.example_common, example.example_other)


def _tokens(setting: Fitting, entries: int, mean: float) -> float:
    return entries * mean + number_costs(setting, entries)[entries - 1]


@dataclass(frozen=True, kw_only=True)
class Aggregation(DrawnSuite):
    """The one task."""

    name: ClassVar[str] = "aggregation"
    title: ClassVar[str] = AggregationRow.title
    row: ClassVar[type[AggregationRow]] = AggregationRow
    tasks: ClassVar[tuple[str, ...]] = AggregationRow.tasks
    recipes: ClassVar[Mapping[str, DrawnTask]] = {
        "common_words": DrawnTask(
            "the ten words that come up most often, of about 400", FewWords(), NEW_TOKENS, share_found, COMMON_WORDS.template
        ),
    }
    sentences: ClassVar[tuple[str, ...]] = (COMMON_WORDS.template, COMMON_WORDS.answer_prefix)
    wording: ClassVar[str] = "aggregation-1"

"""Questions over many documents: `qa_1` and `qa_2` (RULER, Hsieh et al. 2024, arXiv 2404.06654, section 3.4).

The documents that a question needs stand among others: related ones first, then any. A document is whole or absent.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Literal

from ruler_tasks.draws import seeded
from ruler_tasks.fit import Draft, Filled
from ruler_tasks.questions import Question, QuestionSet
from ruler_tasks.recipe import Setting

_PATIENCE = 64  # documents in a row that may be too long for what is left before the prompt counts as full
_EXCHANGEABLE = 8  # documents, the last chosen ones, that may be exchanged for longer ones at the end
_TOO_LITTLE = 16  # tokens that no document fits in
_AT_ONCE = 32


@dataclass(frozen=True)
class Questions:
    """The task over one set of questions."""

    dataset: Literal["squad", "hotpotqa"]

    def question_set(self, setting: Setting) -> QuestionSet:
        """The questions, with the documents that they are about."""
        return setting.sources.squad() if self.dataset == "squad" else setting.sources.hotpotqa()

    def source(self, setting: Setting) -> str:
        """The name of the question set."""
        return self.question_set(setting).source

    def draft(self, setting: Setting, index: int, rng: random.Random) -> Draft:
        """A sample about the question that a random order of all questions, fixed by the seed, has at `index`."""
        questions = self.question_set(setting)
        return _QuestionDraft(setting, questions, question_at(setting, questions, index), rng)


def question_at(setting: Setting, questions: QuestionSet, index: int) -> Question:
    """The question at `index` of a random order without repetition; all lengths share the order."""
    order = _random_order(setting.seed, setting.task, len(questions.questions))
    return questions.questions[order[index % len(order)]]


@lru_cache(maxsize=8)
def _random_order(seed: int, task: str, count: int) -> tuple[int, ...]:
    order = list(range(count))
    seeded(seed, task, "order of questions").shuffle(order)
    return tuple(order)


class _QuestionDraft:
    """The unit is a document."""

    def __init__(self, setting: Setting, questions: QuestionSet, question: Question, rng: random.Random) -> None:
        self._setting = setting
        self._set = questions
        self._question = question
        self._rng = rng
        self._order = rng.getrandbits(64)
        related = [document for document in question.related if document not in question.gold]
        self._next = self._candidates(rng.sample(related, len(related)))
        self._drawn: list[int] = []
        # What each document takes as the first one; a larger number in front of it is weighed apart.
        self._costs: dict[int, int] = setting.tokens.memo.setdefault((questions, setting.wording.hash), {})
        self._weigh(question.gold)
        self._base = setting.count_one(self._filled([], 0).prompt)

    def _candidates(self, related: list[int]) -> Iterator[int]:
        """Related documents, then all others in random order, and these again and again if a prompt needs more."""
        yield from related
        total = len(self._set.documents)
        gold = set(self._question.gold)
        seen = gold | set(related)
        while len(gold) < total:
            while len(seen) < total:
                document = self._rng.randrange(total)
                if document not in seen:
                    seen.add(document)
                    yield document
            seen = set(gold)

    def _candidate(self, number: int) -> int | None:
        if len(self._drawn) <= number:
            more = list(islice(self._next, _AT_ONCE))
            self._weigh(more)
            self._drawn += more
        return self._drawn[number] if number < len(self._drawn) else None

    def _weigh(self, documents: Sequence[int]) -> None:
        new = [document for document in documents if document not in self._costs]
        texts = ["\n\n" + self._numbered(1, document) for document in new]
        self._costs.update(zip(new, self._setting.tokens.planned(texts), strict=True))

    def _number_cost(self, number: int) -> int:
        """What the number of the last of `number` documents takes more than a 1."""
        memo: dict[int, int] = self._setting.tokens.memo.setdefault(("numbers", self._setting.wording.hash), {})
        if number not in memo:
            headings = [self._setting.wording.document.format(i=i, document="") for i in (1, number)]
            first, this = self._setting.tokens.planned(headings)
            memo[number] = this - first
        return memo[number]

    def fill(self, room: int) -> Filled:
        chosen = list(self._question.gold)
        used = self._base + sum(self._costs[document] + self._number_cost(place) for place, document in enumerate(chosen, 1))
        number = 0
        passed: list[int] = []
        while len(passed) < _PATIENCE and room - used > _TOO_LITTLE and (document := self._candidate(number)) is not None:
            number += 1
            cost = self._costs[document] + self._number_cost(len(chosen) + 1)
            if used + cost <= room:
                chosen.append(document)
                used += cost
                passed.clear()
            else:
                passed.append(document)
        used += self._exchange(chosen, passed, room - used)
        random.Random(self._order).shuffle(chosen)
        return self._filled(chosen, used)

    def _exchange(self, chosen: list[int], passed: list[int], gap: int) -> int:
        """Puts a document that did not fit in the place of a shorter one, where that fills most of what is left.

        Returns the tokens gained. Without it, a short prompt stays empty by up to a whole document.
        """
        exchanges = (
            (self._costs[document] - self._costs[chosen[at]], at, document)
            for at in range(max(len(self._question.gold), len(chosen) - _EXCHANGEABLE), len(chosen))
            for document in passed
            if document not in chosen
        )
        gain, at, document = max((e for e in exchanges if 0 < e[0] <= gap), default=(0, 0, 0))
        if gain:
            chosen[at] = document
        return gain

    def _numbered(self, number: int, document: int) -> str:
        return self._setting.wording.document.format(i=number, document=self._set.documents[document])

    def _filled(self, chosen: list[int], size: int) -> Filled:
        context = "\n\n".join(self._numbered(number, document) for number, document in enumerate(chosen, 1))
        template, prefix = self._setting.wording.qa.render(context=context, query=self._question.query)
        return Filled(self._setting.frame.around(template), prefix, self._question.outputs, size)

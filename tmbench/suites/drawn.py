"""Suites that need no data: every prompt is drawn at random, fitted to its length, and scored by a rule of the suite."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from ruler_tasks import Example, count_nulls
from ruler_tasks.drawing import drawn, shortest
from ruler_tasks.recipe import Fitting, Recipe
from ruler_tasks.scoring import score_sample
from ruler_tasks.tokens import TokenCounter
from tmbench.errors import UserError
from tmbench.results.rows import short_hash
from tmbench.suites.examples import ExampleSuite
from tmbench.suites.suite import Sample

share_found = partial(score_sample, "all")
"""RULER's score of several references: the share of them that an answer holds, letter case aside."""
_LIST = re.compile(r"\{lines\}|\{context\}")


@dataclass(frozen=True)
class DrawnTask:
    """One task of such a suite."""

    summary: str
    """What it asks for, in a few words."""
    recipe: Recipe[Fitting]
    new_tokens: int
    """The most tokens that an answer may take."""
    score: Callable[[str, Sequence[str]], float]
    """The score of an answer, from 0 to 1, given the references."""
    template: str = ""
    """The text of a prompt, with its list as {lines} or {context}, behind which the question begins; "" where none does."""

    @property
    def question(self) -> str:
        """How the question begins; "" where that is not known."""
        behind = _LIST.split(self.template)
        return behind[-1].partition("{")[0].strip() if len(behind) > 1 else ""


@dataclass(frozen=True, kw_only=True)
class DrawnSuite(ExampleSuite):
    """Samples from recipes; their sentences are tmbench's own."""

    recipes: ClassVar[Mapping[str, DrawnTask]]
    """By the task's name, in the order of ``tasks``."""
    sentences: ClassVar[tuple[str, ...]]
    """All that prompts are made of beside what is drawn."""
    wording: ClassVar[str]
    """What rows call the sentences."""

    def _fitting(self, task: str, length: int, seed: int, tokenizer: PreTrainedTokenizerBase) -> Fitting:
        new = self.recipes[task].new_tokens
        return Fitting(task, length, new, seed, TokenCounter(tokenizer), self.chat(tokenizer).frame)

    def check(
        self, tasks: Iterable[str], lengths: Sequence[int], count: int, seed: int, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Raise UserError for a length too short for a task, prompt and answer together."""
        for task in tasks:
            least = shortest(self.recipes[task].recipe, self._fitting(task, 0, 0, tokenizer), self.name)
            for length in lengths:
                if length < least:
                    raise UserError(f"--length {length} is too short for {task}, which needs {least} tokens here")

    def new_tokens(self, task: str) -> int:
        """The most tokens that an answer may take."""
        return self.recipes[task].new_tokens

    def examples(
        self, task: str, length: int, places: Sequence[int], seed: int, tokenizer: PreTrainedTokenizerBase
    ) -> Iterable[Example]:
        """The samples of a task: each depends on the suite, task, length, seed, tokenizer, template and its number alone."""
        return drawn(self.recipes[task].recipe, self._fitting(task, length, seed, tokenizer), places)

    def question_at(self, example: Example) -> int:
        """As ``ExampleSuite.question_at``: behind the list."""
        question = self.recipes[example.task].question
        return example.input.rindex(question) if question else 0

    def score(self, task: str, answer: str, references: Sequence[str]) -> float:
        """The score of one answer by the task's rule."""
        return self.recipes[task].score(answer, references)

    def figures(self, task: str, answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
        """The mean score, 0 to 100 and rounded to two decimals, and how many answers are empty."""
        scores = [self.score(task, answer, own) for answer, own in zip(answers, references, strict=True)]
        return {"score": round(100 * sum(scores) / len(scores), 2), "nulls": count_nulls(answers)}

    def provenance(
        self, task: str, length: int, samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Any]:
        """Wording, template, and how the first sample reads."""
        first = samples[0]
        return {
            "wording": self.wording,
            "wording_hash": short_hash(*self.sentences),
            "source": first.source,
            "data_hash": short_hash(first.prompt, *first.references),
            **self.chat_columns(tokenizer),
        }

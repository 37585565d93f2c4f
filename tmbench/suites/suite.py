"""What a suite is: tasks, the samples that they ask, how answers are scored, and what stood in for what.

A suite pickles: it is a few options, and loads its texts when they are first asked for. A further suite is a module with a
subclass of ``Suite`` and a class of its rows, and one line in ``tmbench.suites.table``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from tmbench.errors import UserError
from tmbench.models.fingerprint import of_ids
from tmbench.results.rows import RulerRow


@dataclass(frozen=True)
class Sample:
    """One prompt, and the answers that are looked for in what a model writes behind it."""

    index: int
    prompt: str
    ids: tuple[int, ...]
    """The prompt as the model reads it."""
    references: tuple[str, ...]
    max_new_tokens: int
    source: str
    """What the prompt is made of."""
    parameters: Mapping[str, int] = field(default_factory=dict)
    """What was chosen for this sample where a task has several settings."""
    question_at: int = 0
    """The character of the prompt at which its question begins; 0 where that is not known."""
    context: int = 0
    """How many of the ids stand before it, where that was asked for."""

    @cached_property
    def prompt_hash(self) -> str:
        """A hash of the ids."""
        return of_ids(self.ids)


@dataclass(frozen=True, kw_only=True)
class Suite(ABC):
    """Samples and scores. Subclasses are frozen dataclasses of names, numbers and paths, which decide all of both."""

    name: ClassVar[str]
    """What the table and its command call it."""
    title: ClassVar[str]
    """What people call it."""
    row: ClassVar[type[RulerRow]]
    """The class of its rows, whose ``kind`` names their folder and is no other suite's."""
    tasks: ClassVar[tuple[str, ...]]
    """All there are, in the suite's own order."""

    @abstractmethod
    def check(
        self, tasks: Iterable[str], lengths: Sequence[int], count: int, seed: int, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Raise UserError where a task has no samples, so many of them, of one of the lengths."""

    def available(self, task: str, length: int, count: int) -> int:
        """How many of a task's first ``count`` samples there are; all, where they are drawn."""
        return count

    def numbers(self, task: str, length: int, places: Sequence[int]) -> Sequence[int]:
        """The numbers of the samples at these places: the places themselves, where samples are drawn."""
        return places

    @abstractmethod
    def new_tokens(self, task: str) -> int:
        """The most tokens that an answer to a task may take."""

    @abstractmethod
    def samples(
        self, task: str, length: int, places: Sequence[int], seed: int, tokenizer: PreTrainedTokenizerBase
    ) -> Sequence[Sample]:
        """The samples of a task at these places, counted from 0 and ascending, the same for every method.

        ``length`` is the budget of prompt and answer together, in tokens. Raises UserError as ``check`` does.
        """

    def with_contexts(self, task: str, samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase) -> Sequence[Sample]:
        """The same samples, each with how long its context is; raises UserError for a suite that does not know."""
        raise UserError(f"--ask-later: {self.title} does not say where its questions begin: leave it out")

    def further(
        self, task: str, length: int, samples: Sequence[Sample], number: int, tokenizer: PreTrainedTokenizerBase
    ) -> Sequence[Sample]:
        """The same contexts with their ``number``-th question, from 2 on; none where one of them has not so many."""
        return ()

    @abstractmethod
    def score(self, task: str, answer: str, references: Sequence[str]) -> float:
        """The score of one answer, from 0 to 1."""

    @abstractmethod
    def figures(self, task: str, answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
        """The columns of a row that follow from all answers to a task: ``score``, 0 to 100, and whatever else it has."""

    @abstractmethod
    def provenance(
        self, task: str, length: int, samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Any]:
        """The columns that say what the samples are made of, and what stood in for what: all that their texts depend on."""

    def __getstate__(self) -> dict[str, Any]:
        # What was loaded meanwhile is loaded again where it is asked for.
        return {about.name: getattr(self, about.name) for about in fields(self)}

"""Questions over documents, wherever they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ruler_tasks.files import texts_hash


@dataclass(frozen=True)
class Question:
    """A question over documents, which are named by their numbers.

    Attributes:
        outputs: the accepted answers.
        gold: the documents that the answer needs.
        related: documents that come into the prompt before any others.
        given: where a question comes with documents of its own, all of these in their order: gold and related.
    """

    query: str
    outputs: tuple[str, ...]
    gold: tuple[int, ...]
    related: tuple[int, ...] = ()
    given: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class QuestionSet:
    """Questions and the documents that they are about."""

    questions: Sequence[Question]
    documents: Sequence[str]
    source: str

    @cached_property
    def content_hash(self) -> str:
        """What questions and documents are told apart by, wherever they come from."""
        return texts_hash([*map(repr, self.questions), *self.documents])

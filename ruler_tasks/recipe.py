"""What all tasks have in common: the setting of a sample, and the recipe that drafts one in it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

from ruler_tasks.encoding import Tokenizer
from ruler_tasks.example import Example, Frame
from ruler_tasks.fit import Draft, Filled
from ruler_tasks.tokens import TokenCounter
from ruler_tasks.wording import Wording

if TYPE_CHECKING:
    from ruler_tasks.sources import Sources


@dataclass(frozen=True)
class Fitting:
    """What the samples of one task at one length share, whatever they are made of.

    Attributes:
        task: the task's name.
        length: tokens of a prompt and its answer together.
        answer: tokens kept free for the answer.
        seed: what all random choices start from.
    """

    task: str
    length: int
    answer: int
    seed: int
    tokens: TokenCounter
    frame: Frame

    @property
    def budget(self) -> int:
        """Tokens that a prompt may take, special tokens included."""
        return self.length - self.answer

    def count(self, texts: Sequence[str]) -> list[int]:
        """The exact tokens of whole prompts, special tokens included where the frame has them added."""
        return self.tokens.count(texts, add_special_tokens=self.frame.add_special_tokens)

    def count_one(self, text: str) -> int:
        """The exact tokens of one whole prompt."""
        return self.count([text])[0]

    def example(self, index: int, filled: Filled, tokens: int, source: str) -> Example:
        """The sample of a prompt that takes so many tokens; where its answer lies is counted when it is asked for."""
        position = None
        if filled.answer_at is not None:
            position = partial(_tokens_before, self.tokens.tokenizer, filled.input, filled.answer_at)
        return Example(
            task=self.task,
            index=index,
            input=filled.input,
            answer_prefix=filled.answer_prefix,
            outputs=filled.outputs,
            length=tokens + self.answer,
            max_new_tokens=self.answer,
            source=source,
            position=position,
            parameters=filled.parameters,
        )


def _tokens_before(tokenizer: Tokenizer, text: str, at: int) -> int:
    return TokenCounter(tokenizer).count_one(text[:at], add_special_tokens=False)


@dataclass(frozen=True)
class Setting(Fitting):
    """What the samples of one of the thirteen tasks share at one length: their sentences and texts too."""

    wording: Wording
    sources: Sources


F = TypeVar("F", bound=Fitting, contravariant=True)


class Recipe(Protocol[F]):
    """How a task makes its samples."""

    def source(self, setting: F) -> str:
        """Where the text of the samples comes from."""

    def draft(self, setting: F, index: int, rng: random.Random) -> Draft:
        """Sample number `index`, with every random choice taken from `rng` and its size left open."""

"""From a recipe to samples that fit a length: drafts are seeded, fitted in small batches, and drawn again where too long."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import TypeVar

from ruler_tasks.draws import seeded
from ruler_tasks.errors import TaskLengthError
from ruler_tasks.example import Example
from ruler_tasks.fit import Draft, Filled, fit, in_step
from ruler_tasks.recipe import Fitting, Recipe

F = TypeVar("F", bound=Fitting)
_PROBES = 16
_ATTEMPTS = 64
_STRIDE = 7919
_BATCH = 4
_BATCH_TOKENS = 600_000


def shortest(recipe: Recipe[F], setting: F, *texts: Hashable) -> int:
    """The shortest length of a task: the largest of the smallest prompts of some samples drawn to see it, and the answer.

    The smallest prompt varies from sample to sample by what is drawn; a sample that happens to need more than this is
    drawn again.

    Args:
        texts: what the prompts depend on beside the task and the frame. For the same the length is worked out once.
    """
    memo, key = setting.tokens.memo, ("minimum", setting.task, *texts, setting.frame)
    if key not in memo:
        probe = replace(setting, length=0, seed=0)
        drafts = (recipe.draft(probe, index, seeded("probe", setting.task, index)) for index in range(_PROBES))
        memo[key] = max(setting.count([draft.fill(0).prompt for draft in drafts])) + setting.answer
    least: int = memo[key]
    return least


def drawn(recipe: Recipe[F], setting: F, indices: Iterable[int]) -> Iterator[Example]:
    """The samples with these numbers, in their order, made in small batches as they are asked for.

    Raises:
        TaskLengthError: no draw of a sample fits the length.
    """
    source = recipe.source(setting)
    size = max(1, min(_BATCH, _BATCH_TOKENS // setting.length))
    remaining = iter(indices)
    while batch := list(islice(remaining, size)):
        fits = in_step(
            [fit(_draft(recipe, setting, index, 0), setting.budget) for index in batch],
            setting.count,
        )
        found = [result or _again(recipe, setting, index) for index, result in zip(batch, fits, strict=True)]
        for index, (filled, tokens) in zip(batch, found, strict=True):
            yield setting.example(index, filled, tokens, source)


def _draft(recipe: Recipe[F], setting: F, index: int, attempt: int) -> Draft:
    rng = seeded(setting.seed, setting.task, setting.length, index, attempt)
    # Only questions go by the number: a question whose documents are too long for the length makes way for another.
    return recipe.draft(setting, index + attempt * _STRIDE, rng)


def _again(recipe: Recipe[F], setting: F, index: int) -> tuple[Filled, int]:
    """A sample whose first draw was too long even at its smallest, drawn again."""
    for attempt in range(1, _ATTEMPTS):
        result = in_step([fit(_draft(recipe, setting, index, attempt), setting.budget)], setting.count)[0]
        if result is not None:
            return result
    raise TaskLengthError(f"Task {setting.task} finds no sample {index} that fits a length of {setting.length} tokens.")

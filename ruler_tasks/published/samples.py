"""The published samples of every task, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ruler_tasks.errors import SeedError
from ruler_tasks.example import Example
from ruler_tasks.niah import Niah
from ruler_tasks.published.documents import DocumentDrawing
from ruler_tasks.published.drawing import Drawing, UndrawableError, too_short
from ruler_tasks.published.needles import NeedleDrawing
from ruler_tasks.published.variables import ChainDrawing
from ruler_tasks.published.word_lists import CodedWordDrawing, WordListDrawing
from ruler_tasks.qa import Questions
from ruler_tasks.recipe import Recipe, Setting
from ruler_tasks.tracking import Tracking
from ruler_tasks.words import CommonWords, FrequentWords

_LARGEST_SEED = 2**32 - 1  # what numpy's generator takes


def published_examples(recipe: Recipe[Setting], setting: Setting, indices: Iterable[int]) -> Iterator[Example]:
    """The samples with these numbers, in their order; those in between are drawn and dropped.

    Raises:
        SeedError: the seed is larger than the published generators take.
        TaskLengthError: the first sample does not fit the length; later ones raise as they are asked for.
    """
    if setting.seed > _LARGEST_SEED:
        raise SeedError(f"The seed {setting.seed} is too large for the reference's draws: take one up to {_LARGEST_SEED}.")
    drawing = _drawing(recipe, setting)
    try:
        drawing.begin()
    except UndrawableError as error:
        raise too_short(setting) from error
    drawing.sample(0)
    return _generate(recipe, setting, indices)


def _generate(recipe: Recipe[Setting], setting: Setting, indices: Iterable[int]) -> Iterator[Example]:
    drawing = _drawing(recipe, setting)
    drawing.begin()
    at = 0
    for index in indices:
        if index < at:
            drawing.begin()
            at = 0
        while at <= index:
            filled, tokens = drawing.sample(at)
            at += 1
        yield setting.example(index, filled, tokens, drawing.source)


def _drawing(recipe: Recipe[Setting], setting: Setting) -> Drawing:
    match recipe:
        case Niah():
            return NeedleDrawing(setting, recipe)
        case Tracking():
            return ChainDrawing(setting, recipe.hops)
        case CommonWords():
            return WordListDrawing(setting)
        case FrequentWords():
            return CodedWordDrawing(setting)
        case Questions():
            return DocumentDrawing(setting, recipe)
        case _:
            raise TypeError(f"There is no published way to draw {recipe!r}.")

"""The thirteen tasks, and the one way from a task's name to its samples and its score.

Parameters, budgets and metrics are RULER's (Hsieh et al. 2024, arXiv 2404.06654, table of task configurations).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from ruler_tasks import scoring
from ruler_tasks.drawing import drawn, shortest
from ruler_tasks.encoding import Tokenizer
from ruler_tasks.errors import TaskLengthError, UnknownTaskError
from ruler_tasks.example import Example, Frame
from ruler_tasks.niah import Niah
from ruler_tasks.published import published_examples
from ruler_tasks.qa import Questions
from ruler_tasks.recipe import Recipe, Setting
from ruler_tasks.scoring import Metric
from ruler_tasks.sources import Sources, default_sources
from ruler_tasks.tokens import TokenCounter
from ruler_tasks.tracking import Tracking
from ruler_tasks.wording import Wording, load_wording
from ruler_tasks.words import CommonWords, FrequentWords

SamplesAs = Literal["tmbench", "reference"]
"""Whose rules samples are drawn by."""


@dataclass(frozen=True)
class Task:
    """One of the thirteen.

    Attributes:
        name: RULER's name for it.
        summary: what it asks for, in a few words.
        tokens_to_generate: the most tokens that an answer may take.
        metric: "all" counts the fraction of the references found, "part" whether any is.
        needs: the sources it reads, of "essays", "squad" and "hotpotqa".
        recipe: how its samples are made.
    """

    name: str
    summary: str
    tokens_to_generate: int
    metric: Metric
    recipe: Recipe[Setting] = field(repr=False)
    needs: tuple[str, ...] = ()

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """The score of one prediction, from 0 to 1."""
        return scoring.score_sample(self.metric, prediction, references)


def _niah(name: str, summary: str, recipe: Niah) -> Task:
    return Task(name, summary, 128, "all", recipe, ("essays",) if recipe.haystack == "essays" else ())


_ALL = (
    _niah("niah_single_1", "one number in repeated noise", Niah("noise")),
    _niah("niah_single_2", "one number in essays", Niah("essays")),
    _niah("niah_single_3", "one UUID in essays", Niah("essays", values="uuids")),
    _niah("niah_multikey_1", "one number in essays, beside three with other keys", Niah("essays", n_keys=4)),
    _niah("niah_multikey_2", "one number among nothing but numbers with other keys", Niah("needles")),
    _niah("niah_multikey_3", "one UUID among nothing but UUIDs", Niah("needles", keys="uuids", values="uuids")),
    _niah("niah_multivalue", "four numbers of one key in essays", Niah("essays", n_values=4)),
    _niah("niah_multiquery", "the numbers of four keys in essays", Niah("essays", n_keys=4, n_queries=4)),
    Task("vt", "all variables of a chain of assignments", 30, "all", Tracking()),
    Task("cwe", "the ten words that come up most often in a list", 120, "all", CommonWords()),
    Task("fwe", "the three coded words that come up most often", 50, "all", FrequentWords()),
    Task("qa_1", "a question that one document answers", 32, "part", Questions("squad"), ("squad",)),
    Task("qa_2", "a question that needs two documents", 32, "part", Questions("hotpotqa"), ("hotpotqa",)),
)

TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _ALL})
"""The thirteen tasks by name, in RULER's order."""


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        UnknownTaskError: there is none; the message lists the names.
    """
    if name not in TASKS:
        raise UnknownTaskError(f"Unknown task {name!r}: choose from {', '.join(TASKS)}.")
    return TASKS[name]


def score(task_name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The mean score of a task's samples times 100, rounded to two decimals as RULER reports it.

    Args:
        predictions: one text per sample.
        references: the reference answers of each sample.

    Raises:
        UnknownTaskError: the task does not exist.
        ValueError: there are no predictions, or not as many as entries of references.
    """
    return scoring.score_samples(get_task(task_name).metric, predictions, references)


def examples(
    task: str,
    length: int,
    indices: Iterable[int],
    *,
    tokenizer: Tokenizer,
    seed: int = 42,
    wording: Wording | None = None,
    sources: Sources | None = None,
    frame: Frame = Frame(),
    samples_as: SamplesAs = "tmbench",
) -> Iterator[Example]:
    """The samples of a task with these numbers, in their order.

    Drawn by this package's own rules, a sample depends on the task, the length, the seed, the tokenizer, its number and the
    wording, sources and frame alone. Its prompt, special tokens included, and its answer budget take at most `length`
    tokens. Samples are made in small batches as they are asked for.

    Args:
        task: one of `TASKS`.
        length: tokens of prompt and answer together.
        indices: numbers of samples, from 0.
        tokenizer: a transformers tokenizer; a fast one is much faster here too.
        wording: None for the shipped one.
        sources: None for public data sets where they can be reached.
        frame: a chat template around the task's text.
        samples_as: "reference" draws as RULER's published code does, its defects included: see `published`. A sample
            then depends on those before it too, and special tokens are not counted.

    Raises:
        UnknownTaskError: the task does not exist.
        TaskLengthError: the length is below what the task needs.
        SeedError: the seed is too large for "reference".
    """
    chosen = get_task(task)
    setting = _setting(chosen, length, tokenizer, seed, wording, sources, frame)
    if samples_as == "reference":
        return published_examples(chosen.recipe, setting, indices)
    least = _minimum(chosen, setting)
    if length < least:
        raise TaskLengthError(f"Task {task} needs a length of at least {least} tokens here; {length} is too short.")
    return drawn(chosen.recipe, setting, indices)


def minimum_length(
    task: str,
    tokenizer: Tokenizer,
    wording: Wording | None = None,
    frame: Frame = Frame(),
    *,
    sources: Sources | None = None,
) -> int:
    """The shortest length that `examples` accepts for a task: room for the smallest prompts and the answer."""
    chosen = get_task(task)
    return _minimum(chosen, _setting(chosen, 0, tokenizer, 0, wording, sources, frame))


def _setting(
    task: Task,
    length: int,
    tokenizer: Tokenizer,
    seed: int,
    wording: Wording | None,
    sources: Sources | None,
    frame: Frame,
) -> Setting:
    return Setting(
        task=task.name,
        length=length,
        answer=task.tokens_to_generate,
        seed=seed,
        tokens=TokenCounter(tokenizer),
        wording=wording if wording is not None else load_wording(),
        frame=frame,
        sources=sources if sources is not None else default_sources(),
    )


def _minimum(task: Task, setting: Setting) -> int:
    return shortest(task.recipe, setting, setting.wording.hash, setting.sources if task.needs else None)

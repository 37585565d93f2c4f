"""RULER as a suite: its thirteen tasks, drawn by tmbench's rules or the reference's, or read where they were prepared.

Hsieh et al. 2024, arXiv 2404.06654. Tasks, wordings and scores are those of ``ruler_tasks``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

import ruler_tasks
from ruler_tasks import (
    TASKS,
    DatasetError,
    Example,
    RulerError,
    SamplesAs,
    Sources,
    Wording,
    WordingError,
    count_nulls,
    encode_prompt,
    load_wording,
)
from ruler_tasks.dataset import dataset_path
from tmbench.errors import UserError
from tmbench.results.files import readable
from tmbench.results.rows import PREPARED, RulerRow, short_hash
from tmbench.suites.examples import ExampleSuite
from tmbench.suites.suite import Sample

QUESTIONS = ("squad", "hotpotqa")
"""The sources that hold questions, each of which the reference asks once."""


@dataclass(frozen=True, kw_only=True)
class Ruler(ExampleSuite):
    """RULER's tasks. Where ``data`` is given, the other fields are not read: prepared samples are asked as they are."""

    wording: str | None = None
    """Whose sentences the prompts are made of, as ``ruler_tasks.load_wording`` takes it; None for tmbench's own."""
    data_dir: Path | None = None
    """A folder of essays and questions in their published files."""
    offline: bool = False
    """Whether nothing is downloaded: generated texts stand in for what is not here."""
    samples_as: SamplesAs = "tmbench"
    """Whose rules samples are drawn by."""
    data: Path | None = None
    """A folder of prepared ``validation.jsonl`` files to use in place of generated samples."""

    name: ClassVar[str] = "ruler"
    title: ClassVar[str] = RulerRow.title
    row: ClassVar[type[RulerRow]] = RulerRow
    tasks: ClassVar[tuple[str, ...]] = tuple(TASKS)

    @cached_property
    def texts(self) -> Wording:
        """The sentences; raises ruler_tasks.WordingError where they cannot be found or used."""
        return load_wording(self.wording)

    @cached_property
    def sources(self) -> Sources:
        """Essays and questions, loaded when first asked for; raises ruler_tasks.SourceError for a folder that is none."""
        return Sources(self.data_dir, offline=self.offline)

    def check(
        self, tasks: Iterable[str], lengths: Sequence[int], count: int, seed: int, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Raise UserError for a length too short for a task, prompt and answer together, and for ``data`` of no use.

        Samples drawn as the reference draws them may also be more than there are questions, or of too large a seed.
        """
        frame = self.chat(tokenizer).frame
        for task in tasks:
            if self.data is not None:
                for length in lengths:
                    self._prepared(task, length, count)
            elif self.samples_as == "reference":
                self._check_reference(task, lengths, count, seed, tokenizer)
            else:
                least = ruler_tasks.minimum_length(task, tokenizer, self.texts, frame, sources=self.sources)
                for length in lengths:
                    if length < least:
                        raise UserError(f"--length {length} is too short for {task}, which needs {least} tokens here")

    def _check_reference(
        self, task: str, lengths: Sequence[int], count: int, seed: int, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        for kind in set(QUESTIONS).intersection(TASKS[task].needs):
            asked = getattr(self.sources, kind)()
            if count > len(asked.questions):
                raise UserError(
                    f"--samples {count} is more than the {len(asked.questions)} questions of {asked.source}, "
                    f"each of which {task} asks once under --samples-as reference"
                )
        for length in lengths:
            try:
                # The first sample shows it. What the search for a size finds is kept, and not searched again.
                self._drawn(task, length, (), seed, tokenizer)
            except RulerError as error:
                raise UserError(f"--samples-as reference: {error}") from error

    def _prepared(self, task: str, length: int, count: int) -> list[Example]:
        assert self.data is not None
        try:
            return ruler_tasks.read_dataset(self.data, task, length, limit=count)
        except DatasetError as error:
            raise UserError(f"--data: {error}") from error

    def _prepared_at(self, task: str, length: int, places: Sequence[int]) -> list[Example]:
        prepared = self._prepared(task, length, max(places, default=-1) + 1)
        return [prepared[place] for place in places]

    def available(self, task: str, length: int, count: int) -> int:
        """Of prepared samples there may be fewer; raises UserError for those that cannot be used."""
        return count if self.data is None else len(self._prepared(task, length, count))

    def numbers(self, task: str, length: int, places: Sequence[int]) -> Sequence[int]:
        """As ``Suite.numbers``: prepared samples bring their own."""
        return places if self.data is None else [example.index for example in self._prepared_at(task, length, places)]

    def examples(
        self, task: str, length: int, places: Sequence[int], seed: int, tokenizer: PreTrainedTokenizerBase
    ) -> Iterable[Example]:
        """The samples of a task as ``ruler_tasks`` has them; raises UserError for prepared ones that cannot be used."""
        if self.data is not None:
            return self._prepared_at(task, length, places)
        return self._drawn(task, length, places, seed, tokenizer)

    def _drawn(
        self, task: str, length: int, indices: Iterable[int], seed: int, tokenizer: PreTrainedTokenizerBase
    ) -> Iterator[Example]:
        making: dict[str, Any] = {"wording": self.texts, "sources": self.sources, "samples_as": self.samples_as}
        making["frame"] = self.chat(tokenizer).frame
        return ruler_tasks.examples(task, length, indices, tokenizer=tokenizer, seed=seed, **making)

    def new_tokens(self, task: str) -> int:
        """RULER's budget for an answer."""
        return TASKS[task].tokens_to_generate

    def question_at(self, example: Example) -> int:
        """As ``ExampleSuite.question_at``: of prepared samples it is not known, nor under a wording that asks first."""
        if self.data is not None:
            return 0
        try:
            return ruler_tasks.question_start(example, self.texts)
        except WordingError:
            return 0

    def further(
        self, task: str, length: int, samples: Sequence[Sample], number: int, tokenizer: PreTrainedTokenizerBase
    ) -> Sequence[Sample]:
        """As ``Suite.further``: needles have a question for each key. None takes more tokens than the length."""
        frame, found = self.chat(tokenizer).frame, []
        for sample in samples:
            context = sample.prompt[: sample.question_at]
            example = Example(task, sample.index, sample.prompt, "", sample.references, length, sample.max_new_tokens, "")
            asked = ruler_tasks.further_questions(example, self.texts, frame) if context else []
            fitting = []
            for text, references in asked:
                ids = tuple(encode_prompt(tokenizer, context + text, add_special_tokens=frame.add_special_tokens))
                if len(ids) + sample.max_new_tokens <= length:
                    fitting.append(replace(sample, prompt=context + text, ids=ids, references=references))
                if len(fitting) == number - 1:
                    break
            found += fitting[number - 2 :]
        return found if len(found) == len(samples) else ()

    def score(self, task: str, answer: str, references: Sequence[str]) -> float:
        """The share of the references that the answer holds, or whether it holds any, as the task counts."""
        return TASKS[task].score(answer, references)

    def figures(self, task: str, answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
        """The score as RULER rounds it, and how many answers are empty as RULER counts them."""
        return {"score": ruler_tasks.score(task, answers, references), "nulls": count_nulls(answers)}

    def provenance(
        self, task: str, length: int, samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Any]:
        """Wording, texts, template, and whose rules the samples were drawn by."""
        prepared = self.data is not None
        return {
            "wording": PREPARED if prepared else self.texts.name,
            "wording_hash": short_hash(*(sample.prompt for sample in samples[:1])) if prepared else self.texts.hash,
            "source": samples[0].source,
            "data_hash": self._data_hash(task, length, samples[0]),
            "samples_as": "tmbench" if prepared else self.samples_as,
            **self.chat_columns(tokenizer),
        }

    def _data_hash(self, task: str, length: int, first: Sample) -> str:
        """What the samples are made of, whatever their number: the texts or the file, whole, and how the first one reads."""
        if self.data is not None:
            path = dataset_path(self.data, task, length)
            with readable(path):
                data = [hashlib.sha256(path.read_bytes()).hexdigest()]
        else:
            data = [getattr(self.sources, need)().content_hash for need in TASKS[task].needs]
        return short_hash(*data, first.prompt, *first.references)

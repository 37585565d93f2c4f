"""Accuracy on a suite's tasks: all methods answer the same samples; each prediction is kept as it is made.

Predictions go to a JSONL file beside the CSV, one line per sample, so that a killed run continues with the next sample and a
larger ``--samples`` only adds to what is there. A CSV row is the score over one file's first samples.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tmbench.errors import UserError
from tmbench.measure.answering import Answer, AnswerItem, AnswerSpec, Asked
from tmbench.measure.keeping import RowTarget
from tmbench.measure.shard import row_target
from tmbench.measure.spec import Part, Step, Turns
from tmbench.models.loading import LoadedModel
from tmbench.results.predictions import Prediction, kept_predictions
from tmbench.results.rows import RulerRow, now
from tmbench.results.sample_files import decoded
from tmbench.results.sample_scores import read_samples
from tmbench.results.sample_texts import depths_of
from tmbench.results.words import counted
from tmbench.suites.suite import Sample, Suite

Targets = RowTarget[RulerRow, Prediction] | Turns[RulerRow]
NEW_TOKENS = 128
"""As many as an answer of RULER has at most."""


@dataclass(frozen=True, kw_only=True)
class AccuracyItem(AnswerItem):
    """One sample asked of one method."""

    task: str
    sample: Sample
    count: bool
    """Whether the pairs that attention computes are counted."""


@dataclass(frozen=True, kw_only=True)
class AccuracySpec(AnswerSpec[RulerRow]):
    """What one ``tmbench ruler`` measures, or another suite's command."""

    suite: Suite
    lengths: Sequence[int]
    tasks: Sequence[str]
    samples: int
    questions: int = 1
    """How many are asked of each context, where it has so many: each has rows of its own."""
    save_samples: bool = False
    """Whether each prompt is kept with its prediction."""

    def check(self, loaded: LoadedModel) -> None:
        """Raise UserError for a length too short for a task, and for samples that cannot be had."""
        self.suite.check(self.tasks, self.lengths, self.samples, self.seed, loaded.need_tokenizer(self.suite.title))

    def parts(self, loaded: LoadedModel) -> Iterator[Part[RulerRow]]:
        """One part, task by task: every method has been given a task before the next one is prepared."""
        name = self.suite.title
        total = len(self.plans) * sum(len(self.places(self.samples, *one)) for one in product(self.lengths, self.tasks))
        yield Part(self, name, f"{name} evaluated", total, self._rounds(loaded), independent=True)

    def _rounds(self, loaded: LoadedModel) -> Iterator[Step[RulerRow] | Sequence[Targets]]:
        tokenizer = loaded.need_tokenizer(self.suite.title)
        for length, task in product(self.lengths, self.tasks):
            count = self.suite.available(task, length, self.samples)
            own = self.places(count, length, task)
            yield Step(f"{task} at {length}: preparing {counted(len(own), 'sample')}")
            # What the samples are made of is told by the first one, and what else all contexts are asked by all of them.
            places = range(count) if self.questions > 1 else sorted({0, *own})
            samples = self.suite.samples(task, length, places, self.seed, tokenizer)
            _check_positions(loaded, task, length, samples)
            known = self.common(loaded) | self.suite.provenance(task, length, samples, tokenizer)
            known |= {"length": length, "task": task, "samples": count}
            together: list[RowTarget[RulerRow, Prediction]] = []
            for question in range(1, self.questions + 1):
                asked_of = samples
                if question > 1:
                    asked_of = self.suite.further(task, length, samples, question, tokenizer)
                    known |= {"question": question}
                if not asked_of:
                    yield Step(f"{task} at {length}: no more than {counted(question - 1, 'question')} of each context")
                    break
                if self.ask_later:
                    asked_of = self.suite.with_contexts(task, asked_of, tokenizer)
                asked = {place: sample for place, sample in zip(places, asked_of, strict=True) if place in own}
                targets = [self._target(number, asked, known) for number in range(len(self.plans))]
                if self._takes_turns:
                    together += targets
                else:
                    yield targets
            if self._takes_turns:
                yield [Turns(together)]

    @property
    def _takes_turns(self) -> bool:
        """Whether a method reads a context before several questions: these are then asked one behind the other."""
        return self.ask_later and self.questions > 1

    def _target(self, number: int, samples: Mapping[int, Sample], known: dict[str, Any]) -> RowTarget[RulerRow, Prediction]:
        """One method's row; ``samples`` by their place among all of the row."""
        fields: dict[str, Any] = {**known, **self.plans[number].row_fields()}
        row = self.suite.row(**fields, time=now())
        title = f"{self.labels[number]} on {row.task} at {row.length}" + f", question {row.question}" * (row.question > 1)
        # Of all tasks alike, where their texts fit, so that these decode together.
        new = max([NEW_TOKENS, *(sample.max_new_tokens for sample in samples.values())])
        room = max([row.length, *(len(sample.ids) + sample.max_new_tokens for sample in samples.values())])
        items = [
            AccuracyItem(
                title=f"{title}, sample {place + 1} of {row.samples}",
                index=sample.index,
                plan=number,
                task=row.task,
                sample=sample,
                count=place == 0,
                room=room,
                new=new,
                turn=(row.length, row.task, number, place) if self._takes_turns else (),
            )
            for place, sample in samples.items()
        ]
        file = kept_predictions(self.root, row)
        return row_target(
            self,
            title,
            items,
            {"": file},
            rows=[row],
            make=partial(answer_rows, self.suite, file.name),
            stands=partial(answers_stand, self.root),
            belongs=_belongs,
            more=self._more,
        )

    def _more(self, item: AccuracyItem) -> dict[str, Any]:
        """What a line says of a sample beside its prediction: the setting drawn for it, and where its answers lie."""
        sample = item.sample
        told: dict[str, Any] = {"parameters": dict(sample.parameters)} if sample.parameters else {}
        told |= {"depths": depths_of(sample.prompt, sample.references)}
        return told | ({"prompt": sample.prompt} if self.save_samples else {})

    def asked(self, loaded: LoadedModel, item: AccuracyItem) -> Asked:
        """The sample's prompt, to be answered."""
        ids = torch.tensor([item.sample.ids], device=loaded.device)
        return Asked(ids, item.sample.max_new_tokens, count=item.count, context=item.sample.context)

    def sample(self, loaded: LoadedModel, item: AccuracyItem, answer: Answer) -> Prediction:
        """What is kept of one answer."""
        sample = item.sample
        text = str(loaded.need_tokenizer(self.suite.title).decode(answer.tokens, skip_special_tokens=True))
        return Prediction(
            index=sample.index,
            prediction=text,
            outputs=sample.references,
            score=self.suite.score(item.task, text, sample.references),
            prompt_tokens=len(sample.ids),
            new_tokens=len(answer.tokens),
            coverage=answer.density,
            skipped_share=answer.skipped_share,
            prompt_hash=sample.prompt_hash,
            **answer.cost,
        )


def _check_positions(loaded: LoadedModel, task: str, length: int, samples: Sequence[Sample]) -> None:
    """Raise UserError for a sample of more tokens than the model reads: a prepared one need not fit its length."""
    tokens, number = max((len(sample.ids) + sample.max_new_tokens, sample.index) for sample in samples)
    if loaded.longest is not None and tokens > loaded.longest:
        raise UserError(
            f"sample {number} of {task} at {length} takes {counted(tokens, 'token')} with its answer, more than the "
            f"{loaded.longest} that {loaded.name} reads: leave it out, or give another --model"
        )


def answer_rows(suite: Suite, file: str, rows: Sequence[RulerRow], predictions: Sequence[Prediction]) -> list[RulerRow]:
    """The row of what was answered, ``file`` being the name that it is to give of the predictions."""
    (row,) = rows
    answers = [prediction.prediction for prediction in predictions]
    return [
        replace(
            row,
            **suite.figures(row.task, answers, [prediction.outputs for prediction in predictions]),
            prompt_tokens_mean=statistics.mean(prediction.prompt_tokens for prediction in predictions),
            coverage=next((one.coverage for one in predictions if one.coverage is not None), None),
            skipped_share=next((one.skipped_share for one in predictions if one.skipped_share is not None), None),
            predictions=file,
            **decoded(predictions),
        )
    ]


def answers_stand(root: Path, have: RulerRow) -> bool:
    """Whether the predictions that a row names make its score."""
    return not read_samples(root, asdict(have), have.kind).missing


def _belongs(item: AccuracyItem, kept: Prediction) -> bool:
    """What was answered to another prompt, or scored by other references, says nothing of this sample."""
    return (kept.prompt_hash, kept.outputs) == (item.sample.prompt_hash, item.sample.references)

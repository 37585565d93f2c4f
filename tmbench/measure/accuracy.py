"""Accuracy on a suite's tasks: all methods answer the same samples; each prediction is kept as it is made.

Predictions go to a JSONL file beside the CSV, one line per sample, so that a killed run continues with the next sample and a
larger ``--samples`` only adds to what is there. A CSV row is the score over one file's first samples.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch

from tmbench.engine.density import PairCounter
from tmbench.engine.session import compile_ahead, running
from tmbench.measure.answering import Answer, Answering, batch_for
from tmbench.measure.executor import Worker
from tmbench.measure.keeping import RowTarget
from tmbench.measure.spec import Item, ItemSpec, Part, RowSpec, Step
from tmbench.methods.plan import Plan, backends_name
from tmbench.models.loading import LoadedModel
from tmbench.results.predictions import Prediction, kept_predictions
from tmbench.results.rows import RulerRow, now
from tmbench.results.sample_files import highest
from tmbench.results.sample_scores import read_samples
from tmbench.results.words import counted
from tmbench.suites.suite import Sample, Suite


@dataclass(frozen=True, kw_only=True)
class AccuracyItem(Item):
    """One sample asked of one method."""

    plan: int
    """Which of the spec's."""
    task: str
    sample: Sample
    count: bool
    """Whether the pairs that attention computes are counted."""
    room: int
    """The tokens of the longest text of its round, answer included."""


@dataclass(frozen=True, kw_only=True)
class AccuracySpec(RowSpec[RulerRow], ItemSpec[RulerRow]):
    """What one ``tmbench ruler`` measures, or another suite's command."""

    suite: Suite
    plans: Sequence[Plan]
    lengths: Sequence[int]
    tasks: Sequence[str]
    samples: int
    batch_size: int | None = None
    """How many texts decode together at most; None for as many as memory holds on a GPU, and one elsewhere."""
    save_samples: bool = False
    """Whether each prompt is kept with its prediction."""

    def check(self, loaded: LoadedModel) -> None:
        """Raise UserError for a length too short for a task, and for samples that cannot be had."""
        self.suite.check(self.tasks, self.lengths, self.samples, self.seed, loaded.need_tokenizer(self.suite.title))

    def parts(self, loaded: LoadedModel) -> Iterator[Part[RulerRow]]:
        """One part, task by task: every method has answered a task before the next one begins."""
        name = self.suite.title
        total = len(self.lengths) * len(self.tasks) * len(self.plans) * self.samples
        yield Part(self, name, f"{name} evaluated", total, self._rounds(loaded))

    def _rounds(self, loaded: LoadedModel) -> Iterator[Step[RulerRow] | Sequence[RowTarget[RulerRow, Prediction]]]:
        tokenizer = loaded.need_tokenizer(self.suite.title)
        for length in self.lengths:
            for task in self.tasks:
                yield Step(f"{task} at {length}: preparing {counted(self.samples, 'sample')}")
                samples = self.suite.samples(task, length, self.samples, self.seed, tokenizer)
                known = self.common(loaded) | self.suite.provenance(task, length, samples, tokenizer)
                known |= {"length": length, "task": task, "samples": len(samples)}
                yield [self._target(number, samples, known) for number in range(len(self.plans))]

    def _target(self, number: int, samples: Sequence[Sample], known: dict[str, Any]) -> RowTarget[RulerRow, Prediction]:
        fields: dict[str, Any] = {**known, **self.plans[number].row_fields()}
        row = self.suite.row(**fields, time=now())
        title = f"{row.method} on {row.task} at {row.length}"
        room = max(len(sample.ids) + sample.max_new_tokens for sample in samples)
        items = [
            AccuracyItem(
                title=f"{title}, sample {place} of {len(samples)}",
                index=sample.index,
                plan=number,
                task=row.task,
                sample=sample,
                count=place == 1,
                room=room,
            )
            for place, sample in enumerate(samples, start=1)
        ]
        file = kept_predictions(self.root, row)
        return RowTarget(
            title,
            items,
            {"": file},
            root=self.root,
            rows=[row],
            make=partial(self._rows, file.name),
            stands=lambda have: not read_samples(self.root, asdict(have), have.kind).missing,
            belongs=_belongs,
            more=self._more,
        )

    def _more(self, item: AccuracyItem) -> dict[str, Any]:
        chosen: dict[str, Any] = {"parameters": dict(item.sample.parameters)} if item.sample.parameters else {}
        return chosen | ({"prompt": item.sample.prompt} if self.save_samples else {})

    def _rows(self, file: str, rows: Sequence[RulerRow], predictions: Sequence[Prediction]) -> list[RulerRow]:
        (row,) = rows
        answers = [prediction.prediction for prediction in predictions]
        return [
            replace(
                row,
                **self.suite.figures(row.task, answers, [prediction.outputs for prediction in predictions]),
                prompt_tokens_mean=statistics.mean(prediction.prompt_tokens for prediction in predictions),
                seconds_per_sample=statistics.mean(prediction.seconds for prediction in predictions),
                coverage=predictions[0].coverage,
                predictions=file,
                peak_memory_bytes=highest(prediction.peak_memory for prediction in predictions),
                decode="+".join(sorted({prediction.decode for prediction in predictions})),
                batch_size=max(prediction.batch_size for prediction in predictions),
            )
        ]

    def measure(self, item: AccuracyItem, worker: Worker) -> None:
        """Have one method answer one sample."""
        worker.keep(_answer(self, worker.loaded, item, worker.ran))

    def measure_all(self, given: Iterable[tuple[AccuracyItem, Worker]]) -> None:
        """Have samples answered together where the model and the device allow it, else one by one."""
        following = iter(given)
        if (first := next(following, None)) is None:
            return
        item, worker = first
        batch = batch_for(self, worker.loaded, item.room, item.sample.max_new_tokens)
        if batch is None:
            super().measure_all(chain([first], following))
        else:
            Answering(self, worker.loaded, batch).run(chain([first], following))

    def prediction(self, loaded: LoadedModel, item: AccuracyItem, answer: Answer) -> Prediction:
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
            seconds=answer.seconds,
            coverage=answer.density,
            backends=answer.backends,
            prompt_hash=sample.prompt_hash,
            peak_memory=answer.peak,
            decode=answer.decode,
            batch_size=answer.batch_size,
        )


def _belongs(item: AccuracyItem, kept: Prediction) -> bool:
    """What was answered to another prompt, or scored by other references, says nothing of this sample."""
    return (kept.prompt_hash, kept.outputs) == (item.sample.prompt_hash, item.sample.references)


@torch.inference_mode()
def _answer(spec: AccuracySpec, loaded: LoadedModel, item: AccuracyItem, ran: set[str]) -> Prediction:
    """One sample's answer, token by token; ``ran`` is given what ran, which is there of a failure too."""
    sample = item.sample
    ids = torch.tensor([sample.ids], device=loaded.device)
    counter, plan = PairCounter(), spec.plans[item.plan]
    compile_ahead(loaded.model, plan, spec.prefill, ids)
    start = time.perf_counter()
    with running(loaded.model, plan, spec.prefill) as session:
        session.applied.observer = counter if item.count else None
        try:
            new = session.generate(ids, sample.max_new_tokens)[0].tolist()
        finally:
            ran |= session.applied.backends
        peak = session.peak.bytes
    seconds = time.perf_counter() - start - counter.seconds
    return spec.prediction(loaded, item, Answer(new, seconds, counter.density, backends_name(ran), peak))

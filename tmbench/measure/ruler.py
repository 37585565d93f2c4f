"""RULER accuracy: all methods answer the same samples; each prediction is kept as it is made.

Predictions go to a JSONL file beside the CSV, one line per sample, so that a killed run continues with the next sample and a
larger ``--samples`` only adds to what is there. A CSV row is the score over one file's first samples.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import ruler_tasks
from ruler_tasks import (
    TASKS,
    DatasetError,
    Example,
    Frame,
    RulerError,
    SamplesAs,
    Sources,
    Wording,
    count_nulls,
    encode_prompt,
)
from ruler_tasks.dataset import dataset_path
from tmbench.engine import decode
from tmbench.engine.attention import applied_plan
from tmbench.engine.density import PairCounter
from tmbench.errors import UserError
from tmbench.methods.table import Plan, backends_name
from tmbench.models.fingerprint import of_ids
from tmbench.models.loading import LoadedModel
from tmbench.results.environment import Environment
from tmbench.results.failures import describe, release_memory, status_of
from tmbench.results.files import read_lines, readable
from tmbench.results.rows import OK, RulerRow, Status, now, short_hash
from tmbench.results.sample_files import Kept, index_of, is_of, measured_before, score_of, seconds_of
from tmbench.results.sample_scores import read_samples
from tmbench.results.tables import append, newest
from tmbench.results.words import counted


@dataclass(frozen=True)
class RulerJob:
    """What one ``tmbench ruler`` measures."""

    loaded: LoadedModel
    tokenizer: PreTrainedTokenizerBase
    plans: Sequence[Plan]
    lengths: Sequence[int]
    tasks: Sequence[str]
    samples: int
    environment: Environment
    root: Path
    wording: Wording
    sources: Sources
    frame: Frame
    chat_template: bool = False
    chat_template_kwargs: str = ""
    """What the template was given: see ``tmbench.suites.chat.Chat``."""
    seed: int = 42
    data: Path | None = None
    """A folder of prepared ``validation.jsonl`` files to use in place of generated samples."""
    overwrite: bool = False
    save_samples: bool = False
    samples_as: SamplesAs = "tmbench"
    """Whose rules samples are drawn by where ``data`` holds none."""

    def check_lengths(self) -> None:
        """Raise UserError before anything is measured if a length is too short for a task, or ``data`` cannot be used."""
        if self.data is None:
            making = (self.tokenizer, self.wording, self.sources, self.frame)
            check_lengths(
                self.tasks, self.lengths, *making, samples_as=self.samples_as, samples=self.samples, seed=self.seed
            )
            return
        for length in self.lengths:
            for task in self.tasks:
                self.examples(task, length)

    def examples(self, task: str, length: int) -> list[Example]:
        """The samples of a task, the same for every method; raises UserError for prepared ones that cannot be used."""
        if self.data is not None:
            try:
                return ruler_tasks.read_dataset(self.data, task, length, limit=self.samples)
            except DatasetError as error:
                raise UserError(f"--data: {error}") from error
        return list(
            ruler_tasks.examples(
                task,
                length,
                range(self.samples),
                tokenizer=self.tokenizer,
                seed=self.seed,
                wording=self.wording,
                sources=self.sources,
                frame=self.frame,
                samples_as=self.samples_as,
            )
        )

    def identity(self, plan: Plan, task: str, length: int, examples: Sequence[Example]) -> dict[str, Any]:
        """The columns of a row that are known before it is measured."""
        prepared = self.data is not None
        return {
            **self.environment.row_fields(),
            **self.loaded.row_fields(),
            **plan.row_fields(),
            "length": length,
            "seed": self.seed,
            "task": task,
            "samples": len(examples),
            "wording": "prepared" if prepared else self.wording.name,
            "wording_hash": short_hash(*(example.prompt for example in examples[:1])) if prepared else self.wording.hash,
            "source": examples[0].source,
            "data_hash": self.data_hash(task, length, examples[0]),
            "chat_template": self.chat_template,
            "samples_as": "tmbench" if prepared else self.samples_as,
            "chat_template_kwargs": self.chat_template_kwargs,
        }

    def data_hash(self, task: str, length: int, first: Example) -> str:
        """What the samples are made of, whatever their number: the texts or the file, whole, and how the first one reads."""
        if self.data is not None:
            path = dataset_path(self.data, task, length)
            with readable(path):
                data = [hashlib.sha256(path.read_bytes()).hexdigest()]
        else:
            data = [getattr(self.sources, need)().content_hash for need in TASKS[task].needs]
        return short_hash(*data, first.prompt, *first.outputs)

    def prompt(self, example: Example) -> list[int]:
        """A sample's token ids, as the model reads them."""
        return encode_prompt(self.tokenizer, example.prompt, add_special_tokens=self.frame.add_special_tokens)


@dataclass(frozen=True)
class Step:
    """One sample done, or a task begun: what to show, how many samples it was, and a method's row once it is there."""

    text: str
    samples: int = 0
    row: RulerRow | None = None
    measured: int = 0
    """How many samples were asked now, and not before."""


@dataclass(frozen=True)
class Prediction:
    """What a model answered to one sample: a line of the JSONL file."""

    index: int
    prediction: str
    outputs: tuple[str, ...]
    score: float
    """0 to 1."""
    prompt_tokens: int
    new_tokens: int
    seconds: float
    coverage: float | None = None
    """Part of the causal pairs that attention computed in the prefill; counted for a task's first sample only."""
    backends: str = ""
    """What ran, as "pattern:backend" joined by "+"."""
    prompt_hash: str = ""
    """A hash of the prompt's token ids; "" in files of older versions."""


def run(job: RulerJob) -> Iterator[Step]:
    """Evaluate task by task, so that every method has answered a task before the next one begins.

    Raises UserError for a model, data or a folder that cannot be used; a method that fails on a task becomes a row.
    """
    for length in job.lengths:
        for task in job.tasks:
            yield Step(f"{task} at {length}: preparing {counted(job.samples, 'sample')}")
            examples = job.examples(task, length)
            hashes = [of_ids(job.prompt(example)) for example in examples]
            for plan in job.plans:
                yield from _evaluate(job, plan, task, length, examples, hashes)


def check_lengths(
    tasks: Sequence[str],
    lengths: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    wording: Wording,
    sources: Sources,
    frame: Frame,
    *,
    samples_as: SamplesAs = "tmbench",
    samples: int = 0,
    seed: int = 42,
) -> None:
    """Raise UserError if a length is too short for one of the tasks, prompt and answer together.

    Samples drawn as the reference draws them may also be more than there are questions, or of too large a seed.
    """
    if samples_as == "reference":
        making = (tokenizer, wording, sources, frame)
        _check_reference(tasks, lengths, *making, samples=samples, seed=seed)
        return
    for task in tasks:
        least = ruler_tasks.minimum_length(task, tokenizer, wording, frame, sources=sources)
        for length in lengths:
            if length < least:
                raise UserError(f"--length {length} is too short for {task}, which needs {least} tokens here")


def _check_reference(
    tasks: Sequence[str],
    lengths: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    wording: Wording,
    sources: Sources,
    frame: Frame,
    *,
    samples: int,
    seed: int,
) -> None:
    for task in tasks:
        for kind in {"squad", "hotpotqa"}.intersection(TASKS[task].needs):
            asked = getattr(sources, kind)()
            if samples > len(asked.questions):
                raise UserError(
                    f"--samples {samples} is more than the {len(asked.questions)} questions of {asked.source}, "
                    f"each of which {task} asks once under --samples-as reference"
                )
        for length in lengths:
            making = {"tokenizer": tokenizer, "seed": seed, "wording": wording, "sources": sources, "frame": frame}
            try:
                # The first sample shows it. What the search for a size finds is kept, and not searched again.
                ruler_tasks.examples(task, length, (), samples_as="reference", **making)
            except RulerError as error:
                raise UserError(f"--samples-as reference: {error}") from error


def kept_predictions(root: Path, row: RulerRow) -> Kept:
    """The file of what was answered to a row's samples."""
    return Kept(root, row, row.task, "predictions")


def generate(model: PreTrainedModel, ids: torch.Tensor, max_new_tokens: int) -> list[int]:
    """Greedy decoding of ``ids`` ``[1, length]``: the new ids, at most so many, ending at the model's own end token."""
    return [int(token) for token in decode.generate(model, ids, max_new_tokens)[0]]


def _evaluate(
    job: RulerJob, plan: Plan, task: str, length: int, examples: Sequence[Example], hashes: Sequence[str]
) -> Iterator[Step]:
    row = RulerRow(**job.identity(plan, task, length, examples), time=now())
    file = kept_predictions(job.root, row)
    have = newest(job.root, RulerRow, row.device, row.method).get(row.key)
    if job.overwrite:
        file.clear()
    kept = read_predictions(file.path)
    asked = {example.index: (hash_, example.outputs) for example, hash_ in zip(examples, hashes, strict=True)}
    # What was answered to another prompt, or scored by other references, says nothing of this sample.
    known = {n: one for n, one in kept.items() if asked.get(n) == (one.prompt_hash, one.outputs)}
    done_before = isinstance(have, RulerRow) and not job.overwrite and measured_before(have, known, list(asked))
    whole = isinstance(have, RulerRow) and (have.status != OK or not read_samples(job.root, asdict(have)).missing)
    if isinstance(have, RulerRow) and done_before and whole and is_of(have, [one.seconds for one in kept.values()]):
        yield Step(f"{plan.method} on {task} at {length}: measured before", samples=len(examples), row=have)
        return
    status: Status = OK
    error = ""
    ran: set[str] = set()
    for done, example in enumerate(examples):
        fresh = example.index not in known and status == OK
        if fresh:
            yield Step(f"{plan.method} on {task} at {length}, sample {done + 1} of {len(examples)}")
            try:
                answered = _answer(job, plan, example, ran, count=done == 0)
                known[example.index] = replace(answered, prompt_hash=hashes[done])
            except Exception as problem:
                status, error = status_of(problem), describe(problem)
                release_memory()
            else:
                more: dict[str, Any] = {"parameters": dict(example.parameters)} if example.parameters else {}
                more |= {"prompt": example.prompt} if job.save_samples else {}
                file.add(known[example.index], **more)
        yield Step("", samples=1, measured=int(fresh))
    measured: dict[str, Any] = {}
    if status == OK:
        predictions = [known[example.index] for example in examples]
        texts = [prediction.prediction for prediction in predictions]
        measured |= {
            "score": ruler_tasks.score(task, texts, [example.outputs for example in examples]),
            "nulls": count_nulls(texts),
            "prompt_tokens_mean": statistics.mean(prediction.prompt_tokens for prediction in predictions),
            "seconds_per_sample": statistics.mean(prediction.seconds for prediction in predictions),
            "coverage": predictions[0].coverage,
            "predictions": file.name,
        }
    ran.update(*(known[index].backends.split("+") for index in asked if index in known))
    finished = replace(row, time=now(), status=status, error=error, backends=backends_name(ran), **measured)
    append(job.root, finished)
    yield Step("", row=finished)


def _answer(job: RulerJob, plan: Plan, example: Example, ran: set[str], *, count: bool) -> Prediction:
    """One sample's answer; ``ran`` is given what ran, which is there of a failure too."""
    ids = torch.tensor([job.prompt(example)], device=job.loaded.device)
    counter = PairCounter()
    start = time.perf_counter()
    with applied_plan(job.loaded.model, plan) as session:
        session.observer = counter if count else None
        try:
            new = generate(job.loaded.model, ids, example.max_new_tokens)
        finally:
            ran |= session.backends
    seconds = time.perf_counter() - start - counter.seconds
    session.check_complete()
    text = str(job.tokenizer.decode(new, skip_special_tokens=True))
    score = TASKS[example.task].score(text, example.outputs)
    backends = backends_name(session.backends)
    return Prediction(
        example.index, text, example.outputs, score, ids.shape[1], len(new), seconds, counter.coverage, backends
    )


def read_predictions(path: Path) -> dict[int, Prediction]:
    """The predictions of a JSONL file by sample index; raises UserError for a file that tmbench did not write."""
    found = read_lines(path, _prediction, "a prediction", "move the file away, or use --overwrite")
    return {prediction.index: prediction for prediction in found}


def _prediction(entry: Any) -> Prediction:
    # Files of older versions lack what has a default.
    given = Prediction.__dataclass_fields__.items()
    fields = {name: entry[name] for name, about in given if name in entry or about.default is MISSING}
    known = {"index": index_of(entry), "score": score_of(entry), "seconds": seconds_of(entry)}
    if not isinstance(entry["prediction"], str) or type(entry["prompt_tokens"]) is not int:
        raise ValueError("a prediction is a text behind so many tokens")
    return Prediction(**(fields | known | {"outputs": tuple(entry["outputs"])}))

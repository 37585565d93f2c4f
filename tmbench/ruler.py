"""RULER accuracy: all methods answer the same samples; each prediction is kept as it is made.

Predictions go to a JSONL file beside the CSV, one line per sample, so that a killed run continues with the next sample and a
larger ``--samples`` only adds to what is there. A CSV row is the score over one file's first samples.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import ruler_tasks
from ruler_tasks import TASKS, DatasetError, Example, Frame, Sources, Wording
from tmbench import decode
from tmbench.attention import applied_plan
from tmbench.coverage import PairCounter
from tmbench.environment import Environment
from tmbench.errors import UserError
from tmbench.failures import describe, release_memory, status_of
from tmbench.files import read_lines
from tmbench.methods import Plan
from tmbench.models import LoadedModel
from tmbench.results import OK, RulerRow, Status, append, newest, now, short_hash
from tmbench.sample_files import Kept, measured_before

MARK = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Stands for the task's text while a chat template is taken apart."""


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
    seed: int = 42
    data: Path | None = None
    """A folder of prepared ``validation.jsonl`` files to use in place of generated samples."""
    overwrite: bool = False
    save_samples: bool = False

    def check_lengths(self) -> None:
        """Raise UserError before anything is measured if a length is too short for a task, or ``data`` cannot be used."""
        if self.data is None:
            check_lengths(self.tasks, self.lengths, self.tokenizer, self.wording, self.sources, self.frame)
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
            "chat_template": self.chat_template,
        }


@dataclass(frozen=True)
class Step:
    """One sample done, or a task begun: what to show, how many samples it was, and a method's row once it is there."""

    text: str
    samples: int = 0
    row: RulerRow | None = None


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


def run(job: RulerJob) -> Iterator[Step]:
    """Evaluate task by task, so that every method has answered a task before the next one begins.

    Raises UserError for a model, data or a folder that cannot be used; a method that fails on a task becomes a row.
    """
    for length in job.lengths:
        for task in job.tasks:
            yield Step(f"{task} at {length}: preparing {job.samples} samples")
            examples = job.examples(task, length)
            for plan in job.plans:
                yield from _evaluate(job, plan, task, length, examples)


def check_lengths(
    tasks: Sequence[str],
    lengths: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    wording: Wording,
    sources: Sources,
    frame: Frame,
) -> None:
    """Raise UserError if a length is too short for one of the tasks, prompt and answer together."""
    for task in tasks:
        least = ruler_tasks.minimum_length(task, tokenizer, wording, frame, sources=sources)
        for length in lengths:
            if length < least:
                raise UserError(f"--length {length} is too short for {task}, which needs {least} tokens here")


def kept_predictions(root: Path, row: RulerRow) -> Kept:
    """The file of what was answered to a row's samples."""
    return Kept(root, row, row.task, "predictions")


def chat_frame(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """The text that a model's chat template puts around a user's message, up to where the answer begins."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("--apply-chat-template: this model's tokenizer has no chat template; leave the option out")
    text = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False, add_generation_prompt=True)
    prefix, mark, suffix = str(text).partition(MARK)
    if not mark:
        raise UserError("--apply-chat-template: the chat template drops the user's message")
    return Frame(prefix=prefix, suffix=suffix, add_special_tokens=False)


def generate(model: PreTrainedModel, ids: torch.Tensor, max_new_tokens: int) -> list[int]:
    """Greedy decoding of ``ids`` ``[1, length]``: the new ids, at most so many, ending at the model's own end token."""
    return [int(token) for token in decode.generate(model, ids, max_new_tokens)[0]]


def _evaluate(job: RulerJob, plan: Plan, task: str, length: int, examples: Sequence[Example]) -> Iterator[Step]:
    row = RulerRow(**job.identity(plan, task, length, examples), time=now())
    file = kept_predictions(job.root, row)
    have = newest(job.root, RulerRow, row.device, row.method).get(row.key)
    if job.overwrite:
        file.clear()
    known = read_predictions(file.path)
    wanted = [example.index for example in examples]
    if isinstance(have, RulerRow) and not job.overwrite and measured_before(have, known, wanted):
        yield Step(f"{plan.method} on {task} at {length}: measured before", samples=len(examples), row=have)
        return
    status: Status = OK
    error = ""
    for done, example in enumerate(examples):
        if example.index not in known and status == OK:
            yield Step(f"{plan.method} on {task} at {length}, sample {done + 1} of {len(examples)}")
            try:
                known[example.index] = _answer(job, plan, example, count=done == 0)
            except Exception as problem:
                status, error = status_of(problem), describe(problem)
                release_memory()
            else:
                more = {"prompt": example.prompt} if job.save_samples else {}
                file.add(known[example.index], **more)
        yield Step("", samples=1)
    measured: dict[str, Any] = {}
    if status == OK:
        predictions = [known[example.index] for example in examples]
        texts = [prediction.prediction for prediction in predictions]
        measured |= {
            "score": ruler_tasks.score(task, texts, [example.outputs for example in examples]),
            "nulls": sum(not text.strip() for text in texts),
            "prompt_tokens_mean": statistics.mean(prediction.prompt_tokens for prediction in predictions),
            "seconds_per_sample": statistics.mean(prediction.seconds for prediction in predictions),
            "coverage": predictions[0].coverage,
            "predictions": file.name,
        }
    backends = plan.backends(*job.loaded.qkv(length))
    finished = replace(row, time=now(), status=status, error=error, backends=backends, **measured)
    append(job.root, finished)
    yield Step("", row=finished)


def _answer(job: RulerJob, plan: Plan, example: Example, *, count: bool) -> Prediction:
    encoded = job.tokenizer(example.prompt, add_special_tokens=job.frame.add_special_tokens)
    ids = torch.tensor([encoded["input_ids"]], device=job.loaded.device)
    counter = PairCounter()
    start = time.perf_counter()
    with applied_plan(job.loaded.model, plan) as session:
        session.observer = counter if count else None
        new = generate(job.loaded.model, ids, example.max_new_tokens)
    seconds = time.perf_counter() - start - counter.seconds
    session.check_complete()
    text = str(job.tokenizer.decode(new, skip_special_tokens=True))
    score = TASKS[example.task].score(text, example.outputs)
    return Prediction(example.index, text, example.outputs, score, ids.shape[1], len(new), seconds, counter.coverage)


def read_predictions(path: Path) -> dict[int, Prediction]:
    """The predictions of a JSONL file by sample index; raises UserError for a file that tmbench did not write."""
    found = read_lines(path, _prediction, "a prediction", "move the file away, or use --overwrite")
    return {prediction.index: prediction for prediction in found}


def _prediction(entry: Any) -> Prediction:
    # Files of the first release have no coverage.
    fields = {name: entry[name] for name in Prediction.__dataclass_fields__ if name in entry or name != "coverage"}
    return Prediction(**(fields | {"index": int(entry["index"]), "outputs": tuple(entry["outputs"])}))

"""Time to first token: every method of a run at one length, warmed up there, then measured in turns.

Methods are interleaved (A B C A B C) because a GPU slows down as it warms up and a CPU shares its cores: what changes over
time then changes all of them. Median, minimum, maximum and every repeat are kept.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tmbench.engine import roofline
from tmbench.engine.attention import applied_plan
from tmbench.engine.density import PairCounter, causal_pairs
from tmbench.engine.finite import check_logits
from tmbench.engine.first_token import FirstToken, first_token
from tmbench.engine.prefill import PLAIN, Kind, arranged
from tmbench.errors import UserError
from tmbench.methods.table import Plan, backends_name
from tmbench.models.fingerprint import of_ids
from tmbench.models.loading import LoadedModel
from tmbench.results.environment import Environment
from tmbench.results.failures import describe, release_memory, status_of
from tmbench.results.row_sets import finish, kept_together, known
from tmbench.results.rows import FAILED, OK, Status, TtftRow, now
from tmbench.results.tables import append, prepare
from tmbench.suites.prompts import prompt_ids


@dataclass(frozen=True)
class TtftJob:
    """What one ``tmbench ttft`` measures."""

    loaded: LoadedModel
    plans: Sequence[Plan]
    lengths: Sequence[int]
    environment: Environment
    root: Path
    prompt: str = "kv"
    repeats: int = 3
    warmup: int = 1
    seed: int = 42
    overwrite: bool = False
    prefill: Kind = PLAIN
    """How the model runs; ``fast.kind_for`` says what it can do."""
    hashes: dict[tuple[str, int, int], str] = field(default_factory=dict)
    """Of the prompts, by kind, seed and length, as they are made."""

    def identity(self, plan: Plan, length: int) -> dict[str, Any]:
        """The columns of a row that are known before it is measured."""
        return {
            **self.environment.row_fields(),
            **self.loaded.row_fields(),
            **plan.row_fields(),
            "length": length,
            "seed": self.seed,
            "prompt": self.prompt,
            "prompt_hash": self.prompt_hash(length),
            "repeats": self.repeats,
            "warmup": self.warmup,
            "prefill": self.prefill,
        }

    def prompt_hash(self, length: int) -> str:
        """A hash of the prompt's token ids."""
        about = self.prompt, self.seed, length
        if about not in self.hashes:
            self.hashes[about] = of_ids(prompt_ids(self.prompt, length, self.loaded, self.seed)[0].tolist())
        return self.hashes[about]

    def key(self, plan: Plan, length: int) -> tuple[Any, ...]:
        """The key of the row that this plan makes at this length."""
        return TtftRow(time="", interleaved="", **self.identity(plan, length)).key

    def pending(self) -> dict[int, list[Plan]]:
        """What is still to be measured at each length: a row with as many repeats is not measured again."""
        todo: dict[int, list[Plan]] = {length: [] for length in self.lengths}
        for plan in self.plans:
            have = {} if self.overwrite else known(self.root, TtftRow, self.environment.device, plan.method)
            for length in self.lengths:
                row = have.get(self.key(plan, length))
                done = isinstance(row, TtftRow) and row.status != FAILED and row.repeats >= self.repeats
                if not done:
                    todo[length].append(plan)
        return {length: plans for length, plans in todo.items() if plans}

    def work(self) -> float:
        """How much there is to do, in the unit of ``Step.work``."""
        passes = self.warmup + self.repeats
        return sum(passes * self.expected_flop(plan, n) for n, plans in self.pending().items() for plan in plans)

    def expected_flop(self, plan: Plan, length: int) -> float:
        """Operations of one prefill, before it is known what a dynamic pattern keeps."""
        heads = self.loaded.geometry.heads
        shape = torch.empty(1, heads, length, 1, device="meta")
        pairs = [
            heads * causal_pairs(length) if pattern.dynamic else pattern.pairs(shape, shape) for pattern in plan.patterns
        ]
        return self.needed_flop(pairs, length)

    def needed_flop(self, pairs: Sequence[int], length: int) -> float:
        """Operations of one prefill whose layers' patterns keep so many pairs."""
        geometry = self.loaded.geometry
        needed = roofline.needed_pairs(pairs, geometry.heads, length)
        return roofline.linear_flop(self.loaded.model, length) + roofline.attention_flop(needed, geometry)


@dataclass(frozen=True)
class Step:
    """One pass done: how much of the work it was, what comes next, and the row where one was finished."""

    text: str
    work: float = 0.0
    row: TtftRow | None = None


@dataclass
class _Trial:
    """One method at one length while it is being measured."""

    plan: Plan
    status: Status = OK
    error: str = ""
    seconds: list[float] = field(default_factory=list)
    first: FirstToken | None = None
    counter: PairCounter = field(default_factory=PairCounter)
    """What each layer's pattern keeps."""
    warmup_s: float | None = None
    """The first warm-up."""
    backends: set[str] = field(default_factory=set)
    """What has run, as "pattern:backend"."""
    peak_memory: int | None = None


def run(job: TtftJob) -> Iterator[Step]:
    """Measure whatever is pending, shortest length first, and append the rows of each as it is finished.

    What was measured in turns stays together: what a run that died has not appended of it, the next one appends.

    Raises UserError for a model or a folder that cannot be used; a method that runs out of memory or fails becomes a row.
    """
    finish(job.root, TtftRow, job.environment.device)
    pending = job.pending()
    if not pending:
        return
    for length in sorted(pending):
        yield from _measure_length(job, length, pending[length])


def _measure_length(job: TtftJob, length: int, plans: Sequence[Plan]) -> Iterator[Step]:
    for plan in plans:
        prepare(job.root, TtftRow, job.environment.device, plan.method)
    ids = prompt_ids(job.prompt, length, job.loaded, job.seed)
    trials = [_Trial(plan) for plan in plans]
    rates = []
    for turn in range(job.warmup + job.repeats):
        for trial in trials:
            work = job.expected_flop(trial.plan, length)
            phase = "warm-up" if turn < job.warmup else f"repeat {turn - job.warmup + 1} of {job.repeats}"
            yield Step(f"{trial.plan.method} at {length}, {phase}")
            if trial.status == OK:
                _pass(job, trial, ids, timed=turn >= job.warmup, first=turn == 0)
            yield Step("", work)
        if turn >= job.warmup and any(trial.status == OK for trial in trials):
            rates.append(roofline.matrix_rate(job.loaded.device, job.loaded.model.dtype))
    dense = next((trial for trial in trials if trial.plan.method == "dense" and trial.status == OK), None)
    refused: list[UserError] = []
    rows = [_row(job, length, trial, statistics.median(rates or [0.0]), trials, dense) for trial in trials]
    with kept_together(job.root, rows):
        for row in rows:
            try:
                append(job.root, row)
            except UserError as error:
                # The others' measurements are finished too, and their files may take them.
                refused.append(error)
            else:
                yield Step("", row=row)
        if refused:
            raise refused[0]


def _pass(job: TtftJob, trial: _Trial, ids: Tensor, *, timed: bool, first: bool) -> None:
    """One prefill. The first one, a warm-up, also counts the pairs that each layer's pattern keeps."""
    done = None
    try:
        done = _prefill(job, trial, ids, count=first)
    except Exception as error:
        trial.status = status_of(error)
        trial.error = describe(error)
    if done is None:
        # Only now: the traceback of a caught error holds on to what the failed pass had allocated.
        release_memory()
        return
    token, peak = done
    if timed:
        trial.seconds.append(token.seconds)
        trial.first = token
        if peak is not None:
            trial.peak_memory = max(trial.peak_memory or 0, peak)
    elif first:
        trial.warmup_s = token.seconds - trial.counter.seconds


def _prefill(job: TtftJob, trial: _Trial, ids: Tensor, *, count: bool) -> tuple[FirstToken, int | None]:
    """The first token, and the peak of the device's memory; the cache is let go."""
    model, cuda = job.loaded.model, ids.device.type == "cuda"
    with applied_plan(model, trial.plan) as session, arranged(model, session, job.prefill) as prefill:
        session.observer = trial.counter if count else None
        if cuda:
            torch.cuda.reset_peak_memory_stats(ids.device)
        try:
            token = first_token(prefill, ids)
        finally:
            trial.backends |= session.backends
        session.check_complete()
    check_logits(token.logits, model, "of the prompt's last token")
    return token, torch.cuda.max_memory_allocated(ids.device) if cuda else None


def _row(job: TtftJob, length: int, trial: _Trial, rate: float, trials: Sequence[_Trial], dense: _Trial | None) -> TtftRow:
    measured: dict[str, Any] = {}
    if trial.status == OK and trial.first is not None:
        flop = job.needed_flop([trial.counter.pairs[layer] for layer in range(len(trial.plan.patterns))], length)
        median = statistics.median(trial.seconds)
        measured = {
            "ttft_median_s": median,
            "ttft_min_s": min(trial.seconds),
            "ttft_max_s": max(trial.seconds),
            "samples_s": " ".join(f"{seconds:.6f}" for seconds in trial.seconds),
            "coverage": trial.counter.coverage,
            "flop": flop,
            "floor_s": flop / rate,
            "ttft_over_floor": median * rate / flop,
            "first_token": trial.first.token,
            "peak_memory_bytes": trial.peak_memory,
            "compile_s": None if trial.warmup_s is None else max(0.0, trial.warmup_s - min(trial.seconds)),
        }
        if dense is not None and dense.first is not None:
            measured["same_token_as_dense"] = trial.first.token == dense.first.token
            measured["logit_error"] = _relative_rms(trial.first.logits, dense.first.logits)
    return TtftRow(
        **job.identity(trial.plan, length),
        **measured,
        time=now(),
        status=trial.status,
        error=trial.error,
        backends=backends_name(trial.backends),
        interleaved=" ".join(other.plan.method for other in trials),
        matrix_rate_flops=rate or None,
    )


def _relative_rms(value: Tensor, reference: Tensor) -> float:
    """How far logits are from a reference, in units of its RMS; infinite where they mask other tokens."""
    masked = value == -torch.inf
    if not torch.equal(masked, reference == -torch.inf):
        return math.inf
    value, reference = value[~masked].double(), reference[~masked].double()
    apart, size = float((value - reference).square().mean().sqrt()), float(reference.square().mean().sqrt())
    return apart / size if size else math.inf if apart else 0.0

"""Time to first token: every method of a run at one length and batch size, warmed up there, then interleaved.

Methods are timed A B C A B C, because a GPU slows down as it warms up and a CPU shares its cores: what changes over
time then changes all of them. Median, minimum, maximum and every repeat are kept. An item is one length and one batch size
with their methods, as nothing may come between their passes. The prompts of a batch are all different and equally long.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor

from tmbench.engine import roofline
from tmbench.engine.density import PairCounter, causal_pairs
from tmbench.engine.finite import check_logits
from tmbench.engine.first_token import FirstToken, first_token
from tmbench.engine.session import running
from tmbench.errors import UserError
from tmbench.measure.attempt import attempt
from tmbench.measure.executor import Worker
from tmbench.measure.keeping import RowTarget, timed_before
from tmbench.measure.spec import Item, ItemSpec, Part, RowSpec, Step
from tmbench.methods.plan import Plan, backends_name
from tmbench.models import parallel
from tmbench.models.fingerprint import of_ids
from tmbench.models.loading import LoadedModel
from tmbench.results.failures import Failure
from tmbench.results.row_sets import finish
from tmbench.results.rows import TtftRow, now
from tmbench.results.variants import dense_of, labels
from tmbench.results.words import batched
from tmbench.suites.prompts import Kind, batch_ids, check_prompt, file_of


@dataclass(frozen=True, kw_only=True)
class TtftItem(Item):
    """One length and batch size, and the methods that are interleaved there."""

    tells: ClassVar[bool] = True

    ids: Tensor = field(compare=False, repr=False)
    """The prompts, ``[batch_size, length]`` on the CPU."""
    trials: tuple[int, ...]
    """Which of the spec's."""

    @property
    def batch_size(self) -> int:
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        return self.ids.shape[1]


@dataclass(frozen=True)
class Timing:
    """One method's passes; of one that failed no more than why, and what ran."""

    failure: Failure | None
    backends: str
    """What ran, as "pattern:backend" joined by "+"."""
    seconds: tuple[float, ...] = ()
    """Of the timed passes, in order."""
    warmup_s: float | None = None
    """Of the first warm-up, less what counting took."""
    density: float | None = None
    skipped_share: float | None = None
    flop: float = 0.0
    token: int | None = None
    """Of the first prompt."""
    same_token: bool | None = None
    """Whether every prompt's is dense's; None where dense did not run."""
    logit_error: float | None = None
    peak_memory: int | None = None
    communication_s: float | None = None


@dataclass(frozen=True)
class Interleaved:
    """What one item yields."""

    index: int
    throughput: float
    """GEMM throughput in operations per second, measured after every round: the median; 0 where nothing ran."""
    timings: tuple[Timing, ...]
    """By method, in the item's order."""


Shape = tuple[int, int]
"""The length of prompts, and how many are read together."""


@dataclass(frozen=True, kw_only=True)
class TtftSpec(RowSpec[TtftRow], ItemSpec[TtftRow]):
    """What one ``tmbench ttft`` measures."""

    plans: Sequence[Plan]
    lengths: Sequence[int]
    batch_sizes: Sequence[int] = (1,)
    """How many prompts are read together; each is measured at every length."""
    prompt: Kind = "kv"
    repeats: int = 3
    warmup: int = 1
    question_tokens: int = 0
    """Of prompts whose questions are asked later, how many of the last tokens are one."""
    beside_one_piece: bool = False
    """Whether every method is also timed on prompts in one piece, in the same rounds."""
    beside_dense: bool = False
    """Whether dense is measured anew beside whatever else is to be measured, and never alone."""

    def check(self, loaded: LoadedModel) -> None:
        """Raise UserError for a prompt that cannot be made, for too short a length, or a method that is not timed."""
        if self.question_tokens >= (least := min(self.lengths)):
            raise UserError(
                f"--question-tokens {self.question_tokens} leaves nothing before the question in {least} tokens: "
                "give fewer, or a longer --length"
            )
        for plan in self.plans:
            if reason := next((pattern.untimed for pattern in plan.by_layer.values() if pattern.untimed), ""):
                raise UserError(
                    f"--method {plan.method} is not timed, as {reason}: leave it out, and see with tmbench ruler, agree or "
                    "probe --loss what it keeps"
                )
        check_prompt(self.prompt, loaded, self.lengths, max(self.batch_sizes))

    @property
    def trials(self) -> list[tuple[TtftSpec, Plan]]:
        """What is interleaved: every plan by how its prompts are fed, which the spec beside it says."""
        ways = [self]
        if self.beside_one_piece:
            ways.append(replace(self, chunks=None, ask_later=False, question_tokens=0, beside_one_piece=False))
        return [(way, plan) for way in ways for plan in self.plans]

    def prompts(self, loaded: LoadedModel, length: int, batch_size: int) -> Tensor:
        """Token ids ``[batch_size, length]`` on the CPU."""
        return batch_ids(self.prompt, length, loaded, self.seed, batch_size).cpu()

    def rows(self, loaded: LoadedModel, ids: Tensor) -> list[TtftRow]:
        """The row of each of ``trials`` on these prompts, as far as it is known before it is measured."""
        batch_size, length = ids.shape
        prompt_hash = of_ids(ids.flatten().tolist())
        found = []
        for way, plan in self.trials:
            fields: dict[str, Any] = {**way.common(loaded), **plan.row_fields()}
            row = TtftRow(
                **fields,
                time=now(),
                length=length,
                prompt=str(self.prompt),
                prompt_file=file_of(self.prompt),
                prompt_hash=prompt_hash,
                repeats=self.repeats,
                warmup=self.warmup,
                interleaved="",
                batch_size=batch_size,
                question_tokens=way.question_tokens,
            )
            found.append(row)
        return found

    def pending(self, loaded: LoadedModel, batch_size: int = 1) -> dict[int, list[Plan]]:
        """What is still to be measured at each length: a row with as many repeats is not measured again."""
        ids = {length: self.prompts(loaded, length, batch_size) for length in self.lengths}
        todo = {length: self._todo(self.rows(loaded, own))[0] for length, own in ids.items()}
        plans = [plan for _, plan in self.trials]
        return {length: [plans[number] for number in missing] for length, missing in todo.items() if missing}

    def _todo(self, rows: Sequence[TtftRow]) -> tuple[list[int], list[TtftRow]]:
        """Of each trial's row at a length: those that are to be measured, by number, and the rows of all others."""
        have = [None if self.overwrite else timed_before(self.root, row) for row in rows]
        missing = [number for number, row in enumerate(have) if row is None]
        if self.beside_dense:
            others = {number for number in missing if rows[number].method != "dense"}
            missing = [n for n, row in enumerate(rows) if others and (n in others or row.method == "dense")]
        if self.beside_one_piece:
            again = {number % len(self.plans) for number in missing}
            missing = [number for number in range(len(rows)) if number % len(self.plans) in again]
        return missing, [row for number, row in enumerate(have) if row is not None and number not in missing]

    def parts(self, loaded: LoadedModel) -> Iterator[Part[TtftRow]]:
        """One part, shortest length first, and there the smallest batch.

        What was interleaved stays together: what a run that died has not appended of it is appended first.
        """
        self.prepare()
        finish(self.root, TtftRow, self.environment.device)
        shapes = sorted(product(self.lengths, self.batch_sizes))
        ids = {shape: self.prompts(loaded, *shape) for shape in shapes}
        rows = {shape: self.rows(loaded, own) for shape, own in ids.items()}
        todo = {shape: self._todo(own) for shape, own in rows.items()}
        passes, plans = self.warmup + self.repeats, [plan for _, plan in self.trials]
        work = [
            passes * expected_flop(loaded, plans[number], *shape)
            for shape, (missing, _) in todo.items()
            for number in missing
        ]
        yield Part(self, "TTFT", "TTFT measured", sum(work), self._rounds(ids, rows, todo))

    def _rounds(
        self,
        ids: Mapping[Shape, Tensor],
        rows: Mapping[Shape, Sequence[TtftRow]],
        todo: Mapping[Shape, tuple[Sequence[int], Sequence[TtftRow]]],
    ) -> Iterator[Step[TtftRow] | Sequence[RowTarget[TtftRow, Interleaved]]]:
        for shape, (missing, there) in todo.items():
            yield Step(rows=tuple(there))
            if missing:
                yield [self._target(ids[shape], missing, [rows[shape][number] for number in missing])]

    def _target(self, ids: Tensor, missing: Sequence[int], rows: Sequence[TtftRow]) -> RowTarget[TtftRow, Interleaved]:
        batch_size, length = ids.shape
        methods = " ".join(labels(rows))
        title = f"{methods} at {batched(batch_size)}{length}"
        item = TtftItem(title=title, ids=ids, trials=tuple(missing))
        known = [replace(row, interleaved=methods) for row in rows]
        return RowTarget(title, [item], {}, root=self.root, rows=known, make=_rows)

    def measure(self, item: TtftItem, worker: Worker) -> None:
        """Warm all methods up, then time them interleaved."""
        loaded = worker.loaded
        ids = item.ids.to(loaded.device)
        every = self.trials
        names = labels([plan for _, plan in every])
        trials = [_Trial(*every[number], label=names[number]) for number in item.trials]
        work = [expected_flop(loaded, trial.plan, item.length, item.batch_size) for trial in trials]
        throughputs = []
        for number in range(self.warmup + self.repeats):
            phase = "warm-up" if number < self.warmup else f"repeat {number - self.warmup + 1} of {self.repeats}"
            for trial, flop in zip(trials, work, strict=True):
                piece = ", in one piece" * (self.beside_one_piece and trial.spec.reading != self.reading)
                worker.step(f"{trial.label} at {batched(item.batch_size)}{item.length}{piece}, {phase}")
                if trial.failure is None:
                    _pass(loaded, trial, ids, timed=number >= self.warmup, first=number == 0)
                worker.step(work=flop)
            if number >= self.warmup and any(trial.failure is None for trial in trials):
                throughputs.append(parallel.summed(roofline.gemm_throughput(loaded.device, loaded.model.dtype)))
        timings = tuple(_timing(loaded, item, trial, _dense_beside(trial, trials)) for trial in trials)
        worker.keep(Interleaved(item.index, statistics.median(throughputs or [0.0]), timings))


def expected_flop(loaded: LoadedModel, plan: Plan, length: int, batch_size: int = 1) -> float:
    """Operations of one prefill, before it is known what a dynamic pattern keeps."""
    heads = loaded.geometry.heads
    shape = torch.empty(batch_size, heads, length, 1, device="meta")
    every = batch_size * heads * causal_pairs(length)
    pairs = [
        0 if pattern is None else every if pattern.dynamic else pattern.pairs(shape, shape) for pattern in plan.patterns
    ]
    return needed_flop(loaded, pairs, length, batch_size)


def needed_flop(
    loaded: LoadedModel, pairs: Sequence[int], length: int, batch_size: int = 1, question_tokens: int = 0
) -> float:
    """Operations of one prefill of so many prompts, of which each layer's pattern keeps so many pairs in all.

    Of questions of so many tokens, where there are any, over caches of the tokens before them.
    """
    geometry = loaded.geometry
    needed = roofline.needed_pairs(pairs, batch_size * geometry.heads, length)
    own = roofline.linear_flop(loaded.model, question_tokens or length)
    own += roofline.native_attention_flop(loaded.model, length)
    if question_tokens:
        own -= roofline.native_attention_flop(loaded.model, length - question_tokens)
    return batch_size * own + roofline.attention_flop(needed, geometry)


@dataclass
class _Trial:
    """One method at one length and batch size while it is being measured."""

    spec: TtftSpec
    """How its prompts are fed."""
    plan: Plan
    label: str
    """What it is called among the others."""
    failure: Failure | None = None
    seconds: list[float] = field(default_factory=list)
    first: FirstToken | None = None
    counter: PairCounter = field(default_factory=PairCounter)
    """What each layer's pattern keeps."""
    warmup_s: float | None = None
    """The first warm-up."""
    backends: set[str] = field(default_factory=set)
    """What has run, as "pattern:backend"."""
    peak_memory: int | None = None
    communication: list[float] = field(default_factory=list)
    """Seconds of the timed passes that attention waited for other ranks; none where each has the whole prompt."""


def _dense_beside(trial: _Trial, trials: Sequence[_Trial]) -> _Trial | None:
    """Dense attention over prompts that were fed alike; None where it did not run."""
    alike = [one for one in trials if one.spec is trial.spec and one.failure is None]
    dense = dense_of([one.plan for one in alike])
    return next((one for one in alike if one.plan is dense), None)


def _pass(loaded: LoadedModel, trial: _Trial, ids: Tensor, *, timed: bool, first: bool) -> None:
    """One prefill. The first one, a warm-up, also counts the pairs that each layer's pattern keeps."""
    done = attempt(partial(_prefill, loaded, trial, ids, count=first))
    if isinstance(done, Failure):
        trial.failure = done
        return
    token, peak = done
    if timed:
        trial.seconds.append(token.seconds)
        trial.first = token
        if peak is not None:
            trial.peak_memory = max(trial.peak_memory or 0, peak)
    elif first:
        trial.warmup_s = token.seconds - trial.counter.seconds


def _prefill(loaded: LoadedModel, trial: _Trial, ids: Tensor, *, count: bool) -> tuple[FirstToken, int | None]:
    """The first token, and the peak of the device's memory; the cache is let go.

    Of a question that is asked later the context is read before, which is neither timed nor counted.
    """
    spec = trial.spec
    context = ids.shape[1] - spec.question_tokens
    with (
        torch.inference_mode(),
        running(loaded.model, trial.plan, spec.prefill, spec.chunks) as session,
        session.prefill() as prefill,
    ):
        try:
            if spec.question_tokens:
                prefill.read(ids[:, :context], later=spec.question_tokens)
            session.applied.observer = trial.counter if count else None
            token = first_token(prefill.ask, ids[:, context:]) if spec.question_tokens else first_token(prefill, ids)
            if prefill.split is not None:
                trial.communication.append(prefill.split.seconds)
        finally:
            trial.backends |= session.applied.backends
        session.applied.check_complete()
        peak = session.peak.bytes
    check_logits(token.logits, loaded.model, "of the prompt's last token")
    return token, peak


def _timing(loaded: LoadedModel, item: TtftItem, trial: _Trial, dense: _Trial | None) -> Timing:
    """What is told of a method, as plain data."""
    first, backends = trial.first, backends_name(trial.backends)
    if trial.failure is not None or first is None:
        return Timing(trial.failure, backends)
    reference = None if dense is None else dense.first
    pairs = [trial.counter.pairs[layer] for layer in range(len(trial.plan.patterns))]
    return Timing(
        None,
        backends,
        seconds=tuple(trial.seconds),
        warmup_s=trial.warmup_s,
        density=trial.counter.density,
        skipped_share=trial.counter.skipped_share,
        flop=needed_flop(loaded, pairs, item.length, item.batch_size, trial.spec.question_tokens),
        token=first.tokens[0],
        same_token=None if reference is None else first.tokens == reference.tokens,
        logit_error=None if reference is None else _relative_rms(first.logits, reference.logits),
        peak_memory=trial.peak_memory,
        communication_s=statistics.median(trial.communication[-len(trial.seconds) :]) if trial.communication else None,
    )


def _rows(rows: Sequence[TtftRow], samples: Sequence[Interleaved]) -> list[TtftRow]:
    (sample,) = samples
    return [_row(row, timing, sample.throughput) for row, timing in zip(rows, sample.timings, strict=True)]


def _row(row: TtftRow, timing: Timing, throughput: float) -> TtftRow:
    row = replace(row, backends=timing.backends, matrix_rate_flops=throughput or None)
    if timing.failure is not None:
        return replace(row, status=timing.failure.status, error=timing.failure.error)
    median = statistics.median(timing.seconds)
    return replace(
        row,
        ttft_median_s=median,
        ttft_min_s=min(timing.seconds),
        ttft_max_s=max(timing.seconds),
        samples_s=" ".join(f"{seconds:.6f}" for seconds in timing.seconds),
        coverage=timing.density,
        skipped_share=timing.skipped_share,
        flop=timing.flop,
        floor_s=timing.flop / throughput,
        ttft_over_floor=median * throughput / timing.flop,
        first_token=timing.token,
        same_token_as_dense=timing.same_token,
        logit_error=timing.logit_error,
        peak_memory_bytes=timing.peak_memory,
        communication_s=timing.communication_s,
        compile_s=None if timing.warmup_s is None else max(0.0, timing.warmup_s - min(timing.seconds)),
    )


def _relative_rms(value: Tensor, reference: Tensor) -> float:
    """How far logits are from a reference, in units of its RMS; infinite where they mask other tokens."""
    masked = value == -torch.inf
    if not torch.equal(masked, reference == -torch.inf):
        return math.inf
    value, reference = value[~masked].double(), reference[~masked].double()
    apart, size = float((value - reference).square().mean().sqrt()), float(reference.square().mean().sqrt())
    return apart / size if size else math.inf if apart else 0.0

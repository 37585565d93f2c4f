"""Time to first token: every method of a run at one length and batch size, warmed up there, then interleaved.

Methods are timed A B C A B C, because a GPU slows down as it warms up and a CPU shares its cores: what changes over
time then changes all of them. Median, minimum, maximum and every repeat are kept. An item is one length and one batch size
with their methods, as nothing may come between their passes. The prompts of a batch are all different and equally long.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Container, Iterator, Mapping, Sequence
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
from tmbench.measure.keeping import RowTarget, keep, timed_before
from tmbench.measure.spec import Item, Part, Place, PlannedSpec, Step
from tmbench.methods.plan import Plan, backends_name
from tmbench.models import parallel
from tmbench.models.fingerprint import of_ids
from tmbench.models.loading import LoadedModel
from tmbench.results.failures import Failure
from tmbench.results.rounds import TimedPass, kept_rounds
from tmbench.results.row_sets import finish
from tmbench.results.rows import OK, TtftRow, now
from tmbench.results.sample_files import highest
from tmbench.results.tables import prepare
from tmbench.results.variants import dense_of, labels
from tmbench.results.words import batched
from tmbench.suites.prompts import Kind, batch_ids, check_prompt, file_of

ROUNDS = "rounds"
"""What an item calls the file of its samples."""


@dataclass(frozen=True, kw_only=True)
class TtftItem(Item):
    """One length and batch size, and the methods that are interleaved there."""

    tells: ClassVar[bool] = True

    ids: Tensor = field(compare=False, repr=False)
    """The prompts, ``[batch_size, length]`` on the CPU."""
    trials: tuple[int, ...]
    """Which of the spec's."""
    rounds: tuple[int, ...]
    """Those that are still to be timed, by number."""

    @property
    def places(self) -> Sequence[Place]:
        """A sample for each trial of a round."""
        return [place for number in self.rounds for place in self.places_of(number)]

    def without(self, kept: Container[Place]) -> TtftItem | None:
        """A round that is not there whole is timed again whole."""
        left = tuple(number for number in self.rounds if not all(place in kept for place in self.places_of(number)))
        return replace(self, rounds=left) if left else None

    def places_of(self, number: int) -> list[Place]:
        """A round's samples, by trial."""
        return [(self.file, number * len(self.trials) + place) for place in range(len(self.trials))]

    @property
    def batch_size(self) -> int:
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        return self.ids.shape[1]


@dataclass(frozen=True)
class Pending:
    """What one length and batch size lacks."""

    plans: list[Plan]
    """Of each way in which prompts are fed."""
    rounds: int
    """How many timed ones: a run that died may have kept some."""


Shape = tuple[int, int]
"""The length of prompts, and how many are read together."""


@dataclass(frozen=True, kw_only=True)
class TtftSpec(PlannedSpec[TtftRow]):
    """What one ``tmbench ttft`` measures."""

    undisturbed: ClassVar[bool] = True
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

    def pending(self, loaded: LoadedModel, batch_size: int = 1) -> dict[int, Pending]:
        """What is still to be measured at each length: a row with as many repeats is not measured again."""
        found, plans = {}, [plan for _, plan in self.trials]
        for length in self.lengths:
            ids = self.prompts(loaded, length, batch_size)
            rows = self.rows(loaded, ids)
            if missing := self._todo(rows)[0]:
                target = self._target(ids, missing, [rows[number] for number in missing])
                found[length] = Pending([plans[number] for number in missing], target.rounds_left(self.overwrite))
        return found

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
    ) -> Iterator[Step[TtftRow] | Sequence[Rounds]]:
        for shape, (missing, there) in todo.items():
            yield Step(rows=tuple(there))
            if missing:
                yield [self._target(ids[shape], missing, [rows[shape][number] for number in missing])]

    def _target(self, ids: Tensor, missing: Sequence[int], rows: Sequence[TtftRow]) -> Rounds:
        batch_size, length = ids.shape
        methods = " ".join(labels(rows))
        title = f"{methods} at {batched(batch_size)}{length}"
        item = TtftItem(title=title, file=ROUNDS, ids=ids, trials=tuple(missing), rounds=tuple(range(self.repeats)))
        known = [replace(row, interleaved=methods) for row in rows]
        return Rounds(
            title,
            [item],
            {ROUNDS: kept_rounds(self.root, known)},
            belongs=lambda item, timed: timed.environment == self.environment.name,
            root=self.root,
            rows=known,
            make=_rows,
        )

    def measure(self, item: TtftItem, worker: Worker) -> None:
        """Warm all methods up, then time them interleaved; a round is kept when all of it is done."""
        loaded = worker.loaded
        ids = item.ids.to(loaded.device)
        every = self.trials
        trials = [_Trial(*every[number], label=self.labels[number % len(self.plans)]) for number in item.trials]
        work = [expected_flop(loaded, trial.plan, item.length, item.batch_size) for trial in trials]
        worker.step(work=sum(work) * (self.repeats - len(item.rounds)))

        def interleave(phase: str, *, count: bool = False) -> None:
            for trial, flop in zip(trials, work, strict=True):
                piece = ", in one piece" * (self.beside_one_piece and trial.spec.reading != self.reading)
                worker.step(f"{trial.label} at {batched(item.batch_size)}{item.length}{piece}, {phase}")
                if trial.failure is None:
                    _pass(loaded, trial, ids, count=count)
                worker.step(work=flop)

        for number in range(self.warmup):
            interleave("warm-up", count=number == 0)
        for number in item.rounds:
            interleave(f"repeat {number + 1} of {self.repeats}")
            longest = max((trial.first.seconds for trial in trials if trial.first and not trial.failure), default=0.0)
            rate = roofline.gemm_throughput(loaded.device, loaded.model.dtype, longest) if longest else 0.0
            throughput = parallel.summed(rate)
            for (_, index), trial in zip(item.places_of(number), trials, strict=True):
                told = _told(loaded, item, trial, _dense_beside(trial, trials))
                worker.keep(TimedPass(index, self.environment.name, throughput, **told))


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
    first: FirstToken | None = None
    """The latest pass's."""
    counter: PairCounter = field(default_factory=PairCounter)
    """What each layer's pattern keeps."""
    warmup_s: float = 0.0
    """The first warm-up."""
    backends: set[str] = field(default_factory=set)
    """What has run, as "pattern:backend"."""
    peak_memory: int | None = None
    """The latest pass's."""
    communication_s: float | None = None
    """How long attention waited for other ranks in the latest pass; None where each has the whole prompt."""


def _dense_beside(trial: _Trial, trials: Sequence[_Trial]) -> _Trial | None:
    """Dense attention over prompts that were fed alike; None where it did not run."""
    alike = [one for one in trials if one.spec is trial.spec and one.failure is None]
    dense = dense_of([one.plan for one in alike])
    return next((one for one in alike if one.plan is dense), None)


def _pass(loaded: LoadedModel, trial: _Trial, ids: Tensor, *, count: bool) -> None:
    """One prefill. The first one, a warm-up, also counts the pairs that each layer's pattern keeps."""
    done = attempt(partial(_prefill, loaded, trial, ids, count=count))
    if isinstance(done, Failure):
        trial.failure = done
        return
    trial.first, trial.peak_memory = done
    if count:
        trial.warmup_s = trial.first.seconds - trial.counter.seconds


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
                trial.communication_s = prefill.split.seconds
        finally:
            trial.backends |= session.applied.backends
        session.applied.check_complete()
        peak = session.peak.bytes
    check_logits(token.logits, loaded.model, "of the prompt's last token")
    return token, peak


def _told(loaded: LoadedModel, item: TtftItem, trial: _Trial, dense: _Trial | None) -> dict[str, Any]:
    """What is told of a method's latest pass, as plain data."""
    first, ran = trial.first, {"backends": backends_name(trial.backends)}
    if trial.failure is not None:
        return {**ran, "status": trial.failure.status, "error": trial.failure.error}
    assert first is not None, "every round comes behind a warm-up"
    reference = None if dense is None else dense.first
    pairs = [trial.counter.pairs[layer] for layer in range(len(trial.plan.patterns))]
    return {
        **ran,
        "seconds": first.seconds,
        "warmup_s": trial.warmup_s,
        "density": trial.counter.density,
        "skipped_share": trial.counter.skipped_share,
        "flop": needed_flop(loaded, pairs, item.length, item.batch_size, trial.spec.question_tokens),
        "token": first.tokens[0],
        "same_token": None if reference is None else first.tokens == reference.tokens,
        "logit_error": "" if reference is None else repr(_relative_rms(first.logits, reference.logits)),
        "peak_memory": trial.peak_memory,
        "communication_s": trial.communication_s,
    }


class Rounds(RowTarget[TtftRow, TimedPass]):
    """Rows that are interleaved. Their rounds are kept in a file of their own until the rows are appended."""

    items: Sequence[TtftItem]

    def look(self) -> None:
        """Refuse now a CSV that will not take its row."""
        for row in self.rows:
            prepare(self._root, type(row), row.device, row.method)

    def rounds_left(self, overwrite: bool) -> int:
        """How many rounds are not kept yet; raises UserError for a file that is not ours."""
        (item,) = self.items
        kept = () if overwrite else self.files[ROUNDS].read().values()
        left = item.without({(ROUNDS, one.index) for one in kept if self.belongs(item, one)})
        return 0 if left is None else len(left.rounds)

    def _keep(self, rows: Sequence[TtftRow]) -> None:
        keep(self._root, rows, list(self.files.values()))


def _rows(rows: Sequence[TtftRow], samples: Sequence[TimedPass]) -> list[TtftRow]:
    """The row of each method, of its pass in every round."""
    throughput = statistics.median([one.throughput for one in samples if one.throughput] or [0.0])
    return [_row(row, samples[place :: len(rows)], throughput) for place, row in enumerate(rows)]


def _row(row: TtftRow, passes: Sequence[TimedPass], throughput: float) -> TtftRow:
    latest = passes[-1]
    row = replace(row, backends=latest.backends, matrix_rate_flops=throughput or None)
    if failed := next((one for one in passes if one.status != OK), None):
        return replace(row, status=failed.status, error=failed.error)
    seconds = [one.seconds for one in passes]
    median = statistics.median(seconds)
    waited = [one.communication_s for one in passes if one.communication_s is not None]
    return replace(
        row,
        ttft_median_s=median,
        ttft_min_s=min(seconds),
        ttft_max_s=max(seconds),
        samples_s=" ".join(f"{one:.6f}" for one in seconds),
        coverage=latest.density,
        skipped_share=latest.skipped_share,
        flop=latest.flop,
        floor_s=latest.flop / throughput,
        ttft_over_floor=median * throughput / latest.flop,
        first_token=latest.token,
        same_token_as_dense=latest.same_token,
        logit_error=float(latest.logit_error) if latest.logit_error else None,
        peak_memory_bytes=highest(one.peak_memory for one in passes),
        communication_s=statistics.median(waited) if waited else None,
        compile_s=max(0.0, latest.warmup_s - min(seconds)),
    )


def _relative_rms(value: Tensor, reference: Tensor) -> float:
    """How far logits are from a reference, in units of its RMS; infinite where they mask other tokens."""
    masked = value == -torch.inf
    if not torch.equal(masked, reference == -torch.inf):
        return math.inf
    value, reference = value[~masked].double(), reference[~masked].double()
    apart, size = float((value - reference).square().mean().sqrt()), float(reference.square().mean().sqrt())
    return apart / size if size else math.inf if apart else 0.0

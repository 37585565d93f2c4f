"""What a spec will measure, what of it is there, and how long the rest will take, before a weight is loaded.

Of each task one sample is made: it says in which file samples are kept. How many lie there is counted; whether each is of
the very prompt that a run would give is seen by the run alone. Where contexts may be asked several questions all samples are
made: all decide how many.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from tmbench.measure.accuracy import AccuracySpec
from tmbench.measure.agree import AgreeSpec
from tmbench.measure.answering import AnswerSpec
from tmbench.measure.estimate import Asked, Estimator
from tmbench.measure.keeping import RowTarget
from tmbench.measure.loss import LossSpec
from tmbench.measure.probe import ProbeSpec
from tmbench.measure.spec import RowSpec, Step, Turns
from tmbench.measure.sweep import SweepSpec
from tmbench.measure.ttft import TtftSpec
from tmbench.measure.tune import TuneSpec
from tmbench.methods.plan import Plan
from tmbench.methods.table import METHODS
from tmbench.models.loading import LoadedModel
from tmbench.results.rows import OUT_OF_MEMORY, LossRow, TtftRow
from tmbench.results.sample_files import Kept
from tmbench.results.tables import newest, read_all
from tmbench.results.tune_rows import COMPARISON, HELD_OUT, TuneRow
from tmbench.results.variants import identity
from tmbench.suites.questions import questions

PASS, SAMPLE, PREFILL = "pass", "sample", "prefill"
AT_MOST = (
    "A search ends as soon as it can tell, so these are the most prompts that it reads, those of its comparison among them, "
    "as if every set were half of the layers."
)
SamplesSpec = AccuracySpec | AgreeSpec | LossSpec | ProbeSpec


@dataclass(frozen=True)
class Line:
    """One method at one length."""

    unit: str
    """What is counted: samples of all tasks, or the passes of a time."""
    length: int
    plan: Plan
    wanted: int
    there: int
    seconds: float
    """Of all that is not there."""
    bases: tuple[str, ...]
    """Where that is from."""
    batch_size: int = 1
    """How many prompts are read together."""

    @property
    def left(self) -> int:
        return self.wanted - self.there

    def plus(self, other: Line) -> Line:
        """Both together: two tasks of one method and length."""
        bases = tuple(dict.fromkeys([*self.bases, *other.bases]))
        wanted, there = self.wanted + other.wanted, self.there + other.there
        return replace(self, wanted=wanted, there=there, seconds=self.seconds + other.seconds, bases=bases)


@dataclass(frozen=True)
class Outlook:
    """All lines, by length in the spec's order and then by method."""

    lines: tuple[Line, ...]
    notes: tuple[str, ...]
    """What must be said of them, a sentence each."""

    @property
    def seconds(self) -> float:
        return sum(line.seconds for line in self.lines)


def outlook(spec: RowSpec[Any], loaded: LoadedModel) -> Outlook:
    """What there is to do. ``loaded`` needs no weights; raises UserError for what a run would refuse before it begins."""
    if loaded.tokenizer is not None or not isinstance(spec, AccuracySpec):
        spec.check(loaded)
    asking = spec.accuracy if isinstance(spec, SweepSpec) else spec
    batch_size = asking.batch_size if isinstance(asking, AnswerSpec) else None
    estimator = Estimator(loaded, spec.environment, spec.root, spec.reading, batch_size)
    found: dict[tuple[Any, ...], Line] = {}
    for line in _lines(spec, loaded, estimator):
        about = line.unit, line.length, line.batch_size, *line.plan.row_fields().values()
        found[about] = found[about].plus(line) if about in found else line
    notes = (AT_MOST,) * isinstance(spec, TuneSpec) + (estimator.words(),) * estimator.rated
    return Outlook(tuple(found.values()), notes)


def _lines(spec: RowSpec[Any], loaded: LoadedModel, estimator: Estimator) -> Iterator[Line]:
    if isinstance(spec, SweepSpec):
        for length in spec.plans:
            if spec.shard is None:
                yield from _timed(spec.timing(length), loaded, estimator)
            yield from _lines(spec.asking(length), loaded, estimator)
    elif isinstance(spec, TtftSpec):
        yield from _timed(spec, loaded, estimator)
    elif isinstance(spec, TuneSpec):
        yield from _tuned(spec, loaded, estimator)
    elif isinstance(spec, AccuracySpec) and loaded.tokenizer is None:
        yield from _unseen(spec, estimator)
    elif isinstance(spec, SamplesSpec):
        yield from _kept(spec, loaded, estimator)
    else:
        raise TypeError(f"{type(spec).__name__} has no outlook")


def _tuned(spec: TuneSpec, loaded: LoadedModel, estimator: Estimator) -> Iterator[Line]:
    """At most, as if every set were half of the layers, and every prompt drawn as often as another."""
    plan = METHODS[spec.method].plan(loaded.shape, spec.values)
    about = {**spec.common(loaded), "tuning": spec.tuning, "stage": HELD_OUT if spec.held else COMPARISON}
    about = {name: value for name, value in about.items() if name in TuneRow.key_fields() and name != "length"}
    rows = read_all(spec.root, TuneRow)
    there = any(all(getattr(row, name) == value for name, value in about.items()) for row in rows)
    own = list(product(spec.tasks, spec.lengths))
    asked = [(*kind, math.ceil((spec.budget + spec.most_compared) / len(own))) for kind in own]
    asked += [(*kind, math.ceil(spec.most_compared / len(spec.held))) for kind in spec.held]
    for task, length, wanted in asked:
        (question,) = questions(task, length, [0], loaded, spec.seed)
        estimate = estimator.sample(Asked(LossRow, plan, length, str(task), len(question.answer)))
        left = 0 if there else wanted
        yield Line(PREFILL, length, plan, wanted, wanted - left, left * estimate.seconds, (estimate.basis,) * bool(left))


def _timed(spec: TtftSpec, loaded: LoadedModel, estimator: Estimator) -> Iterator[Line]:
    ways = 1 + spec.beside_one_piece
    pending = {batch_size: spec.pending(loaded, batch_size) for batch_size in sorted(spec.batch_sizes)}
    for length, (batch_size, todo), plan in product(sorted(spec.lengths), pending.items(), spec.plans):
        lacks = todo.get(length)
        # Whose rounds are all kept has its row made of them.
        rounds = lacks.rounds if lacks and plan in lacks.plans else 0
        left = (spec.warmup + rounds) * ways if rounds else 0
        wanted = (spec.warmup + spec.repeats) * ways
        asked = Asked(TtftRow, plan, length, str(spec.prompt), batch_size=batch_size)
        estimate = estimator.sample(asked) if left else None
        seconds, bases = (left * estimate.seconds, (estimate.basis,)) if estimate else (0.0, ())
        yield Line(PASS, length, plan, wanted, wanted - left, seconds, bases, batch_size)


def _unseen(spec: AccuracySpec, estimator: Estimator) -> Iterator[Line]:
    """Of a model without a tokenizer, which no sample can be made for: all is still to be measured."""
    for length, task in product(spec.lengths, spec.tasks):
        count = len(spec.places(spec.samples, length, task))
        for plan in spec.plans:
            estimate = estimator.sample(Asked(spec.suite.row, plan, length, task, spec.suite.new_tokens(task)))
            yield Line(SAMPLE, length, plan, count, 0, count * estimate.seconds, (estimate.basis,))


def _kept(spec: SamplesSpec, loaded: LoadedModel, estimator: Estimator) -> Iterator[Line]:
    several = isinstance(spec, AccuracySpec) and spec.questions > 1
    one = replace(spec, shard=None) if several else replace(spec, samples=1, shard=None)
    for part in one.parts(loaded):
        for targets in part.rounds:
            for told in () if isinstance(targets, Step) else targets:
                turns = isinstance(told, Turns)
                read: dict[Any, set[int]] = defaultdict(set)
                for target in told.targets if isinstance(told, Turns) else [told]:
                    assert isinstance(target, RowTarget)
                    before = read[identity(target.rows[0])] if turns and estimator.keeps_contexts else set()
                    yield from _of_target(spec, loaded, target, estimator, before)


def _of_target(
    spec: SamplesSpec, loaded: LoadedModel, target: RowTarget[Any, Any], estimator: Estimator, read: set[int]
) -> Iterator[Line]:
    """``read`` are the samples whose contexts the same method reads for another question before; those of this one join."""
    (row,) = target.rows
    plan = _plan_of(spec, loaded, row)
    have: Any = newest(spec.root, type(row), row.device, row.method).get(row.key)
    for name, file in target.files.items():
        assert isinstance(file, Kept)
        task = name or getattr(row, "task", "")
        count = spec.suite.available(task, row.length, spec.samples) if isinstance(spec, AccuracySpec) else spec.samples
        places = spec.places(count, row.length, task)
        samples = {} if spec.overwrite else file.read()
        if spec.shard is not None:
            samples |= file.within(spec.root / spec.shard.folder).read()
        numbers = spec.suite.numbers(task, row.length, places) if isinstance(spec, AccuracySpec) else places
        there = [number for number in numbers if number in samples]
        # What did not fit in memory is not tried again.
        full = have is not None and have.status == OUT_OF_MEMORY and have.samples >= count and not spec.overwrite
        left = [] if full else [number for number in numbers if number not in samples]
        seconds, bases = 0.0, dict[str, None]()
        if left:
            item = next(item for item in target.items if item.file == name)
            asked = Asked(type(row), plan, row.length, task or row.prompt, _new_tokens(spec, item))
            over = sum(number in read for number in left)
            for many, one in ((len(left) - over, asked), (over, replace(asked, read=False))):
                if many:
                    estimate = estimator.sample(one, [samples[number].seconds for number in there])
                    seconds, bases = seconds + many * estimate.seconds, bases | {estimate.basis: None}
            read.update(left)
        yield Line(SAMPLE, row.length, plan, len(places), len(places) - len(left), seconds, tuple(bases))


def _plan_of(spec: SamplesSpec, loaded: LoadedModel, row: Any) -> Plan:
    if isinstance(spec, ProbeSpec):
        return METHODS["dense"].plan(loaded.shape)
    return next(plan for plan in spec.plans if identity(plan) == identity(row))


def _new_tokens(spec: SamplesSpec, item: Any) -> int:
    if isinstance(spec, AccuracySpec):
        return int(item.sample.max_new_tokens)
    if isinstance(spec, AgreeSpec):
        return spec.new_tokens
    return len(item.question.answer) if isinstance(spec, LossSpec) else 0

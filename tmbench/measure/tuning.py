"""One run of ``tmbench tune`` under way: what was read so far, and what is to be read next."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tmbench.measure.betting import ACCEPTED, UNDECIDED, bounds, capped, fewest, judged
from tmbench.measure.choosing import Layers, Search
from tmbench.measure.draws import Draw, Draws
from tmbench.measure.keeping import RowTarget, Target
from tmbench.measure.loss import asked_of, belongs, loss_row
from tmbench.measure.spec import Item, Step
from tmbench.measure.tune_time import TTFT_ROWS, time_vs_dense, timed_rows
from tmbench.methods.layers import RANDOM, random_layers
from tmbench.methods.plan import Plan, backends_name
from tmbench.methods.table import METHODS
from tmbench.models.loading import LoadedModel
from tmbench.results.failures import Failure
from tmbench.results.loss_samples import LossSample, kept_losses
from tmbench.results.rows import now
from tmbench.results.sample_files import highest
from tmbench.results.tables import newest
from tmbench.results.tune_rows import CHECK, COMPARISON, HELD_OUT, SEARCH, TuneRow
from tmbench.results.words import counted
from tmbench.suites.questions import Question, questions

if TYPE_CHECKING:
    from tmbench.measure.tune import TuneSpec

SEARCH_RISK = 0.25
"""Of a trial of the search, on either side."""
SEARCH_SHARE = 0.6
"""The part of the budget that the search may take; the check has the rest."""
SEARCH_PATIENCE = 2
"""A trial of the search is given up after so many times the prompts that a set without any loss takes."""
DENSE = None
"""What stands for dense attention where a set of layers would."""
TUNED = "chosen"
Rounds = Iterator[Step[TuneRow] | Sequence[Target[TuneRow, Any]]]
Read = Layers | None


@dataclass(frozen=True, kw_only=True)
class TuneItem(Item):
    """One prompt and its answer, read by one plan."""

    plan: Plan
    question: Question


@dataclass(frozen=True)
class Allowance:
    """How much of the budget may be spent when a trial ends, and how many prompts the trial may read."""

    prefills: int
    seconds: float
    prompts: float = math.inf


class _Reads(Target[TuneRow, LossSample]):
    """Prompts of one task and length, read by one plan: their losses are kept, and make a row only later."""

    def finish(self) -> Sequence[TuneRow]:
        return ()


class _Trial(RowTarget[TuneRow, Any]):
    """The row of a trial that has ended. What it is made of was read before."""

    def look(self) -> None:
        for row in self.rows:
            self._before |= newest(self._root, type(row), row.device, row.method)


class Tuning:
    """What was read, and what follows from it. Its rounds are to be run in the order in which they are made."""

    def __init__(self, spec: TuneSpec, loaded: LoadedModel) -> None:
        self.spec = spec
        self.loaded = loaded
        self.found = Search(spec.order)
        self.chosen: Layers | None = None
        """The set that the check accepted."""
        self.prefills = 0
        """What search and check have read."""
        self.seconds = 0.0
        self.failure: Failure | None = None
        self._common = spec.common(loaded)
        self._known: dict[tuple[Read, Draw], LossSample] = {}
        self._questions: dict[Draw, Question] = {}
        self._timed = timed_rows(spec.root, self._common)

    def search(self) -> Rounds:
        """The trials that decide which sets are checked."""
        draws, number = self.spec.draws(SEARCH, self.loaded), 0
        most = SEARCH_PATIENCE * fewest(self.spec.limits.margin, self.spec.limits.cap, SEARCH_RISK)
        allowed = Allowance(self.spec.searching, SEARCH_SHARE * self.spec.seconds, most)
        sets = self.found.run(empty=self.spec.tries_empty)
        accepted: bool | None = None
        while True:
            try:
                layers = next(sets) if accepted is None else sets.send(accepted)
            except StopIteration:
                break
            if not self._affordable(layers, draws.first(1), allowed):
                break
            number += 1
            risks = SEARCH_RISK, SEARCH_RISK
            verdict = yield from self._trial(SEARCH, number, "tried", layers, draws, allowed, risks)
            if self.failure is not None:
                break
            accepted = verdict == ACCEPTED
        yield Step("the search has ended", work=self.spec.searching - self.prefills)

    def check(self) -> Rounds:
        """The trials of what the search accepted, the largest set first, until one is accepted."""
        draws, limits = self.spec.draws(CHECK, self.loaded), self.spec.limits
        for number, layers in enumerate(sorted(self.found.accepted, key=len, reverse=True), 1):
            left = self.spec.budget - self.prefills
            if self.failure is not None:
                break
            # A set that can hardly be told leaves as much to those behind it.
            last = number == len(self.found.accepted)
            most = self.prefills + (left if last else min(left, max(2 * self.spec.step, left * 2 // 3)))
            allowed = Allowance(most, self.spec.seconds)
            if not self._affordable(layers, draws.first(1), allowed):
                break
            risks = limits.risk / (number * (number + 1)), limits.risk
            rule = "the largest set of the search" if number == 1 else f"the search's set number {number} by size"
            verdict = yield from self._trial(CHECK, number, rule, layers, draws, allowed, risks)
            if verdict == ACCEPTED:
                self.chosen = layers
                break
        yield Step("the check has ended", work=self.spec.budget - self.prefills)

    def comparisons(self) -> Iterator[tuple[str, str, str]]:
        """The stages behind the check, each with what to show while it runs and behind it."""
        yield COMPARISON, "Comparison", "Compared"
        if self.spec.held:
            yield HELD_OUT, "Held-out prompts", "Compared on held-out prompts"

    def to_compare(self, stage: str) -> int:
        """How many prompts a comparison will read."""
        draws = self.spec.draws(stage, self.loaded).first(self.spec.compared)
        return sum((layers, draw) not in self._known for layers in [DENSE, *self.choices()] for draw in draws)

    def compare(self, stage: str) -> Rounds:
        """All choices on the same prompts."""
        draws = self.spec.draws(stage, self.loaded).first(self.spec.compared)
        choices = self.choices()
        yield from self._read([DENSE, *choices], draws, counts=False)
        risk, lengths = self.spec.limits.risk, sorted({draw.length for draw in draws})
        # What is compared is told by one measure.
        bases = {time_vs_dense(self.loaded, self._plan(one), lengths, self._timed)[1] for one in choices}
        self._timed = self._timed if bases == {TTFT_ROWS} else []
        for number, (layers, rule) in enumerate(choices.items(), 1):
            verdict = UNDECIDED if self.failure else self._judged(layers, draws, (risk, risk))
            yield [self._row(stage, number, rule, layers, draws, verdict, chosen=layers == self.chosen)]

    def choices(self) -> dict[Layers, str]:
        """The sets that are compared, the chosen one first, each with all rules that make it."""
        assert self.chosen is not None
        count, order, pool = len(self.chosen), self.spec.order, sorted(self.spec.order)
        named = [(TUNED, self.chosen), *((one.rule, one.layers) for one in self.spec.rules)]
        named.append((f"the deepest {count}", tuple(pool[len(pool) - count :])))
        if list(order) != pool[::-1]:
            named.append((f"the probe's first {count}", tuple(sorted(order[:count]))))
        named += [
            (f"random, seed {seed}", random_layers(f"{RANDOM}{count}:{seed}", pool)) for seed in range(self.spec.random)
        ]
        found: dict[Layers, str] = {}
        for rule, layers in named:
            found[layers] = f"{found[layers]}; {rule}" if layers in found else rule
        return found

    def _trial(
        self,
        stage: str,
        number: int,
        rule: str,
        layers: Layers,
        draws: Draws,
        allowed: Allowance,
        risks: tuple[float, float],
    ) -> Generator[Step[TuneRow] | Sequence[Target[TuneRow, Any]], None, str]:
        """Rounds of one trial, which ends where the allowance does; returns its verdict."""
        taken: list[Draw] = []
        verdict = UNDECIDED
        while verdict == UNDECIDED and self.failure is None and len(taken) < allowed.prompts:
            more = self._affordable(layers, draws.first(len(taken) + self.spec.step)[len(taken) :], allowed)
            if not more:
                break
            taken += more
            yield Step(f"{stage}, trial {number}: {counted(len(layers), 'layer')}, {counted(len(taken), 'prompt')}")
            yield from self._read([DENSE, layers], taken)
            if self.failure is None:
                verdict = self._judged(layers, taken, risks)
        chosen = stage == CHECK and verdict == ACCEPTED
        yield [self._row(stage, number, rule, layers, taken, verdict, chosen=chosen)]
        return verdict

    def _affordable(self, layers: Layers, draws: Iterable[Draw], allowed: Allowance) -> list[Draw]:
        """The first of these prompts that may still be read densely and with these layers."""
        if self.seconds >= allowed.seconds:
            return []
        left, found = allowed.prefills - self.prefills, []
        for draw in draws:
            left -= sum((read, draw) not in self._known for read in (DENSE, layers))
            if left < 0:
                break
            found.append(draw)
        return found

    def _read(self, reads: Iterable[Read], draws: Sequence[Draw], *, counts: bool = True) -> Rounds:
        """Have prompts read that were not; where it ends without a failure, the losses of all are known."""
        wanted: dict[tuple[Read, Any, int], list[Draw]] = defaultdict(list)
        for read in dict.fromkeys(reads):
            for draw in draws:
                if (read, draw) not in self._known:
                    wanted[read, draw.task, draw.length].append(draw)
        for task, length in dict.fromkeys((task, length) for _, task, length in wanted):
            missing = [draw for draw in draws if (draw.task, draw.length) == (task, length) and draw not in self._questions]
            if missing:
                yield Step(f"{task} at {length}: preparing {counted(len(missing), 'prompt')}")
                asked = questions(task, length, [draw.index for draw in missing], self.loaded, self.spec.seed)
                self._questions |= dict(zip(missing, asked, strict=True))
        targets = {about: self._target(*about, found) for about, found in wanted.items()}
        if targets:
            yield list(targets.values())
        for about, target in targets.items():
            self.failure = self.failure or target.failure
            read = about[0]
            for draw in wanted[about]:
                if (sample := target.samples.get(("", draw.index))) is not None:
                    self._known[read, draw] = sample
                    self.prefills += counts
                    self.seconds += sample.seconds * counts

    def _target(self, read: Read, task: Any, length: int, draws: Sequence[Draw]) -> _Reads:
        plan = self._plan(read)
        row = loss_row(plan, {**self._common, **asked_of(task, length), "samples": len(draws)})
        what = "dense" if read is DENSE else f"{plan.method}, layers {plan.parameters['layers']},"
        items = [
            TuneItem(
                title=f"{what} on {task} at {length}, prompt {draw.index + 1}",
                index=draw.index,
                plan=plan,
                question=self._questions[draw],
            )
            for draw in draws
        ]
        title = f"{what} on {task} at {length}"
        return _Reads(title, items, {"": kept_losses(self.spec.root, row)}, belongs=belongs, more=_told)

    def _plan(self, read: Read, rule: str = "") -> Plan:
        shape = self.loaded.shape
        return METHODS["dense"].plan(shape) if read is DENSE else self.spec.plan(shape, read, rule)

    def _differences(self, layers: Layers, draws: Sequence[Draw]) -> list[float]:
        return [self._known[layers, draw].nll_answer - self._known[DENSE, draw].nll_answer for draw in draws]

    def _judged(self, layers: Layers, draws: Sequence[Draw], risks: tuple[float, float]) -> str:
        return judged(self._differences(layers, draws), self.spec.limits.margin, self.spec.limits.cap, *risks)

    def _row(
        self, stage: str, number: int, rule: str, layers: Layers, draws: Sequence[Draw], verdict: str, *, chosen: bool
    ) -> _Trial:
        """What keeps a trial's row."""
        spec, plan = self.spec, self._plan(layers, rule)
        kinds = spec.draws(stage, self.loaded).kinds
        tasks, lengths = dict.fromkeys(task for task, _ in kinds), sorted({length for _, length in kinds})
        hashes = dict.fromkeys(asked_of(task, 1)["wording_hash"] for task in tasks)
        known: dict[str, Any] = {
            **self._common,
            **plan.row_fields(),
            "length": lengths[-1],
            "lengths": "+".join(map(str, lengths)),
            "task": "+".join(map(str, tasks)),
            "wording_hash": "+".join(filter(None, hashes)),
        }
        row = TuneRow(
            **known,
            time=now(),
            tuning=spec.tuning,
            stage=stage,
            trial=number,
            rule=rule,
            model_layers=self.loaded.shape.layers,
            order=spec.order_source,
            margin=spec.limits.margin,
            cap=spec.limits.cap,
            confidence=spec.limits.confidence,
            samples=max(1, len(draws)),
            verdict="" if self.failure else verdict,
            chosen=chosen,
            prefills=self.prefills,
            measured_s=round(self.seconds, 3),
        )
        figures, ran = ({}, "") if self.failure else self._figures(plan, layers, draws, lengths)
        make = partial(_with_backends, ran)
        rows = [replace(row, **figures)]
        title = f"{stage}, trial {number}: {verdict}"
        nothing: list[Item] = []
        return _Trial(title, nothing, {}, root=spec.root, rows=rows, make=make, failure=self.failure)

    def _figures(
        self, plan: Plan, layers: Layers, draws: Sequence[Draw], lengths: Sequence[int]
    ) -> tuple[dict[str, Any], str]:
        """The columns of what was measured, and what ran."""
        own, dense = ([self._known[read, draw] for draw in draws] for read in (layers, DENSE))
        cap, differences = self.spec.limits.cap, self._differences(layers, draws)
        low, high = bounds(differences, cap, self.spec.limits.risk)
        ratio, basis = time_vs_dense(self.loaded, plan, lengths, self._timed)
        figures = {
            "source": "+".join(dict.fromkeys(sample.source for sample in own)),
            "nll_answer": statistics.fmean(sample.nll_answer for sample in own),
            "nll_answer_dense": statistics.fmean(sample.nll_answer for sample in dense),
            "nll_answer_vs_dense": statistics.fmean(differences),
            "capped_vs_dense": float(capped(differences, cap).mean()),
            "capped_low_vs_dense": low,
            "capped_high_vs_dense": high,
            "capped_share": statistics.fmean(value >= cap for value in differences),
            "peak_memory_bytes": highest(sample.peak_memory for sample in own),
            "time_vs_dense": ratio,
            "time_from": basis,
        }
        return figures, backends_name(name for sample in own for name in sample.backends.split("+"))


def _told(item: TuneItem) -> dict[str, Any]:
    return item.question.told


def _with_backends(ran: str, rows: Sequence[TuneRow], samples: Sequence[Any]) -> list[TuneRow]:
    return [replace(row, backends=ran) for row in rows]

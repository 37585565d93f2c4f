"""Accuracy kept against time saved: methods and variants that were both timed and asked, and what one parameter changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import pandas as pd

from tmbench.report.groups import (
    FEW_REPEATS,
    MODEL,
    NOT_IN_TURNS,
    NOTHING,
    Group,
    Record,
    RulerGroup,
    TtftGroup,
    difference_fields,
    in_value_order,
    interval_text,
    parameter_names,
    percent_text,
    signed,
    template_words,
)
from tmbench.report.intervals import Difference
from tmbench.report.samples_as import drawn_words
from tmbench.report.time_intervals import APART, FASTER, NO_DIFFERENCE, TimeDifference, compare_rows
from tmbench.results.words import counted, length_name

KIND = "trade-off"
SAME_COST = 0.005
"""Coverages that differ by less than this part of themselves count as the same cost."""
SHAPE = "shape at the same cost"


@dataclass(frozen=True)
class Effect:
    """Two variants of a method that differ in one parameter, or in their shape at the same cost."""

    parameter: str
    before: str
    after: str
    """The values, or the parameters that make the two shapes."""
    elsewhere: str
    """What the two have in common among the parameters in which any variants here differ."""
    points: Difference
    """Of the second against the first, over the same samples."""
    times: TimeDifference | str
    """The second's time against the first's, over the same rounds: negative is faster. In words why there is none."""

    @property
    def time_percent(self) -> float | None:
        """The change of the time; None where it is not known."""
        return self.times.percent if isinstance(self.times, TimeDifference) else None

    @property
    def time(self) -> str:
        """The change of the time in words."""
        if isinstance(self.times, str):
            return NOTHING if self.times == APART else self.times
        return _time_text(self.times.percent, self.times.low, self.times.high, self.times.verdict)


@dataclass(frozen=True)
class TradeOff(Group):
    """One model at one length, timed and asked. Its rows are the methods beside dense, by the time that they save.

    A row has ``saved_percent``, the part of dense's time that it saves, with its 95 % interval from ``saved_low`` to
    ``saved_high``, which are None where dense was not timed in the same rounds; ``apart``, whether dense was timed in other
    turns; the average difference to dense as ``RulerGroup`` has it; and ``front``, whether it was timed in the same rounds
    as dense and nothing else that was, dense among them, beats it. What beats another keeps as much accuracy in measurably
    less time, or more in no measurably longer time.
    """

    scores: RulerGroup

    @property
    def title(self) -> str:
        about = self.setting
        setting = f"prompt {about['prompt']}, {about['prefill']} prefill, {self.machine}seed {about['seed']}"
        template = f"{template_words(about)}, " if about["chat_template"] else ""
        over = f"average of {counted(len(self.scores.paired_tasks), 'task')}"
        wording = f"wording {about['wording']}, {drawn_words(about)}{template}{over}"
        return f"Accuracy kept against time saved at {length_name(about['length'])}: {self.subject}, {setting}, {wording}"

    def notes(self) -> list[str]:
        few = min(row["repeats"] for row in self.rows)
        notes = [f"Times of only {counted(few, 'repeat')}: fewer than {FEW_REPEATS} hardly tell what is faster."] * (
            few < FEW_REPEATS
        )
        apart = [row["label"] for row in self.rows if row["apart"]]
        if apart:
            notes.append(f"{NOT_IN_TURNS}: {'; '.join(apart)}.")
        return notes + super().notes()

    @cached_property
    def effects(self) -> list[Effect]:
        """What each parameter changes between neighbouring values, all others equal; and the shape at the same cost."""
        found = []
        for name in (names := parameter_names(self.rows)):
            # Numbers, and layers from one on, are neighbours of each other, and texts of texts.
            alike: dict[tuple[Any, ...], list[Record]] = {}
            for row in self.rows:
                if name in row:
                    others = tuple(row.get(other) for other in names if other != name)
                    alike.setdefault((in_value_order(name, row[name])[0], row["method"], *others), []).append(row)
            for rows in (alike[key] for key in sorted(alike, key=lambda key: bool(key[0]))):
                ordered = sorted(rows, key=lambda row: in_value_order(name, row[name]))
                found += [self._effect(name, (name,), first, second) for first, second in pairwise(ordered)]
        found += [self._effect(SHAPE, ("n_local", "last_n"), first, second) for first, second in _same_cost(self.rows)]
        return [effect for effect in found if effect is not None]

    def _effect(self, parameter: str, names: Sequence[str], first: Record, second: Record) -> Effect | None:
        """None where the two agree with dense's samples but not with each other's beyond those."""
        points = self.scores.compare(second["label"], first["label"], self.scores.paired_tasks)
        if not isinstance(points, Difference):
            return None
        differing = [
            name
            for name in parameter_names(self.rows)
            if len({row.get(name) for row in self.rows}) > 1 and name not in names
        ]
        several = len({row["method"] for row in self.rows}) > 1
        common = [first["method"]] * several + [f"{name} {first[name]}" for name in differing if name in first]
        if len(names) == 1:
            before, after = str(first[parameter]), str(second[parameter])
        else:
            before, after = (", ".join(f"{name} {row[name]}" for name in names) for row in (first, second))
        return Effect(parameter, before, after, ", ".join(common), points, compare_rows(second, first))

    def summary(self) -> Record:
        """What follows from the rows together, for JSON: the front, fastest last, and the effects of single parameters."""
        effects = [
            {
                "parameter": one.parameter,
                "from": one.before,
                "to": one.after,
                "elsewhere": one.elsewhere,
                "time_percent": one.time_percent,
                "time_low": one.times.low if isinstance(one.times, TimeDifference) else None,
                "time_high": one.times.high if isinstance(one.times, TimeDifference) else None,
                "time_verdict": one.times.verdict if isinstance(one.times, TimeDifference) else one.times,
                **difference_fields(one.points),
            }
            for one in self.effects
        ]
        return {"front": [row["label"] for row in self.rows if row["front"]], "effects": effects}

    def tables(self, fidelity: Callable[[TtftGroup, str], str]) -> dict[str, pd.DataFrame]:
        """Captions and tables of texts: the methods by the time that they save, and what single parameters change."""
        methods = [
            {
                "method": row["label"],
                "time saved": saved_text(row),
                "points against dense": interval_text(row["difference"], row["difference_low"], row["difference_high"]),
                "in words": row["verdict"],
                "coverage": NOTHING if row["coverage"] is None else f"{row['coverage']:.1%}",
                "on the front": NOTHING if row["saved_low"] is None else "yes" if row["front"] else "no",
            }
            for row in self.rows
        ]
        effects = [
            {
                "what changes": one.parameter,
                "from": one.before,
                "to": one.after,
                "elsewhere": one.elsewhere,
                "points": interval_text(one.points.mean, one.points.low, one.points.high),
                "in words": one.points.verdict,
                "time": one.time,
            }
            for one in self.effects
        ]
        return {
            "The time saved over the rounds of turns, and the points, with their 95 % intervals. What is on the front is "
            "beaten by nothing else in both time and points, and times that do not measurably differ count as equal:": (
                pd.DataFrame(methods)
            ),
            "What one change does, by the same samples and with its 95 % interval:": pd.DataFrame(effects),
        }


def _same_cost(rows: Sequence[Record]) -> Iterator[tuple[Record, Record]]:
    """Variants without last queries and a wider window, and those with last queries that compute as many pairs."""
    for second in rows:
        for first in rows:
            names = ("method", *parameter_names([first, second]))
            same = all(first.get(name) == second.get(name) for name in names if name not in ("n_local", "last_n"))
            if not same or first.get("last_n") != 0 or not second.get("last_n") or first["n_local"] <= second["n_local"]:
                continue
            costs = first["coverage"], second["coverage"]
            if None not in costs and abs(costs[0] - costs[1]) <= SAME_COST * min(costs):
                yield first, second


def trade_offs(ttft: Sequence[TtftGroup], ruler: Sequence[RulerGroup]) -> list[TradeOff]:
    """All lengths at which methods were both timed beside dense and compared with it sample by sample."""
    found = []
    for scores in ruler:
        for times in ttft:
            alike = (*MODEL, "threads")
            newest = scores.setting["older_data"] == times.setting["older_prompt"] == 0
            if newest and all(times.setting[name] == scores.setting[name] for name in alike):
                setting = {**scores.setting, "prompt": times.setting["prompt"], "prefill": times.setting["prefill"]}
                rows = _rows(times, scores)
                if rows:
                    found.append(TradeOff(setting, rows, scores))
    return found


def _rows(times: TtftGroup, scores: RulerGroup) -> list[Record]:
    length = scores.setting["length"]
    timed = [row for row in times.measured() if row["length"] == length]
    dense = next((row for row in timed if row["label"] == "dense"), None)
    labels = {(row["method"], row["parameters"]): row["label"] for row in reversed(scores.rows)}
    rows: dict[str, Record] = {}
    for row in timed:
        label = labels.get((row["method"], row["parameters"]), "")
        kept = scores.average_differences.get(label)
        # A forced backend of dense attention is another time for the same scores: the one that tmbench chose comes first.
        if dense is None or not isinstance(kept, Difference) or label in rows:
            continue
        ends = {"saved_percent": "percent_vs_dense", "saved_low": "percent_high", "saved_high": "percent_low"}
        saved = {name: None if row[end] is None else -row[end] for name, end in ends.items()}
        about = {"kind": KIND, "label": label, "apart": row["time_verdict"] == APART} | dict.fromkeys(ends.values())
        rows[label] = row | difference_fields(kept) | saved | about
    if dense is None:
        return []
    ordered = sorted(rows.values(), key=lambda row: float(row["saved_percent"]))
    known = [dense | {"difference": 0.0}, *(row for row in ordered if row["saved_low"] is not None)]
    for row in ordered:
        row["front"] = row in known and not any(_beats(other, row) for other in known if other is not row)
    return ordered


def _beats(one: Record, other: Record) -> bool:
    if one["difference"] > other["difference"]:
        return not _faster(other, one)
    return bool(one["difference"] == other["difference"]) and _faster(one, other)


def _faster(one: Record, other: Record) -> bool:
    found = compare_rows(one, other)
    return isinstance(found, TimeDifference) and found.verdict == FASTER


def saved_text(row: Record) -> str:
    """The time that a row of a trade-off saves, in words."""
    return _time_text(row["saved_percent"], row["saved_low"], row["saved_high"], row["time_verdict"])


def _time_text(percent: float, low: float | None, high: float | None, words: str) -> str:
    if low is None or high is None:
        return f"{percent_text(percent)}, {words}"
    ends = f"{signed(low, 1)} to {signed(high, 1)}"
    return f"{NO_DIFFERENCE} ({ends} %)" if words == NO_DIFFERENCE else f"{percent_text(percent)} ({ends})"

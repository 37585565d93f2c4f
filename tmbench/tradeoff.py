"""Accuracy kept against time saved: methods and variants that were both timed and asked, and what one parameter changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pandas as pd

from tmbench.groups import (
    FEW_REPEATS,
    MODEL,
    NOT_IN_TURNS,
    NOTHING,
    PARAMETERS,
    Group,
    Record,
    RulerGroup,
    TtftGroup,
    difference_fields,
    in_turns,
    interval_text,
    length_name,
    template_words,
)
from tmbench.intervals import Difference
from tmbench.samples_as import drawn_words

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
    time_percent: float | None
    """The second's time against the first's: negative is faster. None where they were not timed in turns."""

    @property
    def time(self) -> str:
        """``time_percent`` in words."""
        return NOTHING if self.time_percent is None else f"{self.time_percent:+.1f} %"


@dataclass(frozen=True)
class TradeOff(Group):
    """One model at one length, timed and asked. Its rows are the methods beside dense, by the time that they save.

    A row has ``saved_percent``, the part of dense's time that the medians save, with ``saved_low`` and ``saved_high`` from
    the slowest and the fastest repeats; ``apart``, whether dense was timed in other turns; the average difference to dense
    as ``RulerGroup`` has it; and ``front``, whether no other method, dense among them, saves as much time and keeps as much
    accuracy, with one of the two better.
    """

    scores: RulerGroup

    @property
    def title(self) -> str:
        about = self.setting
        setting = f"prompt {about['prompt']}, {about['prefill']} prefill, {self.machine}seed {about['seed']}"
        template = f"{template_words(about)}, " if about["chat_template"] else ""
        wording = (
            f"wording {about['wording']}, {drawn_words(about)}{template}average of {len(self.scores.paired_tasks)} tasks"
        )
        return f"Accuracy kept against time saved at {length_name(about['length'])}: {self.subject}, {setting}, {wording}"

    def notes(self) -> list[str]:
        few = min(row["repeats"] for row in self.rows)
        notes = [f"Times of only {few} repeats: fewer than {FEW_REPEATS} hardly tell what is faster."] * (few < FEW_REPEATS)
        apart = [row["label"] for row in self.rows if row["apart"]]
        if apart:
            notes.append(f"{NOT_IN_TURNS}: {'; '.join(apart)}.")
        return notes + super().notes()

    def effects(self) -> list[Effect]:
        """What each parameter changes between neighbouring values, all others equal; and the shape at the same cost."""
        found = []
        for name in PARAMETERS:
            alike: dict[tuple[Any, ...], list[Record]] = {}
            for row in self.rows:
                if row[name] not in (None, ""):
                    others = tuple(row[other] for other in PARAMETERS if other != name)
                    alike.setdefault((row["method"], *others), []).append(row)
            for rows in alike.values():
                ordered = sorted(rows, key=lambda row: row[name])
                found += [self._effect(name, (name,), first, second) for first, second in pairwise(ordered)]
        found += [self._effect(SHAPE, ("n_local", "last_n"), first, second) for first, second in _same_cost(self.rows)]
        return [effect for effect in found if effect is not None]

    def _effect(self, parameter: str, names: Sequence[str], first: Record, second: Record) -> Effect | None:
        """None where the two agree with dense's samples but not with each other's beyond those."""
        points = self.scores.compare(second["label"], first["label"], self.scores.paired_tasks)
        if not isinstance(points, Difference):
            return None
        differing = [name for name in PARAMETERS if len({row[name] for row in self.rows}) > 1 and name not in names]
        several = len({row["method"] for row in self.rows}) > 1
        common = [first["method"]] * several + [
            f"{name} {first[name]}" for name in differing if first[name] not in (None, "")
        ]
        if len(names) == 1:
            before, after = str(first[parameter]), str(second[parameter])
        else:
            before, after = (", ".join(f"{name} {row[name]}" for name in names) for row in (first, second))
        change = 100 * (second["ttft_median_s"] / first["ttft_median_s"] - 1) if in_turns(first, second) else None
        return Effect(parameter, before, after, ", ".join(common), points, change)

    def summary(self) -> Record:
        """What follows from the rows together, for JSON: the front, fastest last, and the effects of single parameters."""
        effects = [
            {
                "parameter": one.parameter,
                "from": one.before,
                "to": one.after,
                "elsewhere": one.elsewhere,
                "time_percent": one.time_percent,
                **difference_fields(one.points),
            }
            for one in self.effects()
        ]
        return {"front": [row["label"] for row in self.rows if row["front"]], "effects": effects}

    def tables(self, fidelity: Callable[[TtftGroup, str], str]) -> dict[str, pd.DataFrame]:
        """Captions and tables of texts: the methods by the time that they save, and what single parameters change."""
        methods = [
            {
                "method": row["label"],
                "time saved": f"{row['saved_percent']:+.1f} % ({row['saved_low']:+.1f} to {row['saved_high']:+.1f})",
                "points against dense": interval_text(row["difference"], row["difference_low"], row["difference_high"]),
                "in words": row["verdict"],
                "coverage": NOTHING if row["coverage"] is None else f"{row['coverage']:.1%}",
                "on the front": "yes" if row["front"] else "no",
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
            for one in self.effects()
        ]
        return {
            "The time that the medians save, in brackets from the slowest to the fastest repeats; points with the 95 % "
            "interval. What is on the front is beaten by nothing else in both time and points:": pd.DataFrame(methods),
            "What one change does, by the same samples and with its 95 % interval:": pd.DataFrame(effects),
        }


def _same_cost(rows: Sequence[Record]) -> Iterator[tuple[Record, Record]]:
    """Variants without last queries and a wider window, and those with last queries that compute as many pairs."""
    for second in rows:
        for first in rows:
            same = all(first[name] == second[name] for name in ("method", *PARAMETERS) if name not in ("n_local", "last_n"))
            if not same or first["last_n"] != 0 or not second["last_n"] or not first["n_local"] > second["n_local"]:
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
        ratios = {
            "saved_percent": row["ttft_median_s"] / dense["ttft_median_s"],
            "saved_low": row["ttft_max_s"] / dense["ttft_min_s"],
            "saved_high": row["ttft_min_s"] / dense["ttft_max_s"],
        }
        saved = {name: 100 * (1 - ratio) for name, ratio in ratios.items()}
        about = {"kind": KIND, "label": label, "percent_vs_dense": None, "apart": not in_turns(row, dense)}
        rows[label] = row | difference_fields(kept) | saved | about
    ordered = sorted(rows.values(), key=lambda row: float(row["saved_percent"]))
    at = [(0.0, 0.0), *((row["saved_percent"], row["difference"]) for row in ordered)]
    for place, row in enumerate(ordered, start=1):
        row["front"] = not any(_better(other, at[place]) for other in at)
    return ordered


def _better(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] >= other[0] and one[1] >= other[1]

"""Rows put together that may be held against each other, in one order and under labels that tell them apart."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ruler_tasks import TASKS
from tmbench.methods.layers import whole_number
from tmbench.methods.table import LAYERS, METHODS
from tmbench.report.settings import Setting
from tmbench.results.lm_eval_rows import LmEvalRow
from tmbench.results.parameters_text import Value
from tmbench.results.rows import PREPARED, AgreeRow, LossRow, ProbeRow, Row, RulerRow, TtftRow
from tmbench.results.tune_rows import TuneRow
from tmbench.results.variants import DENSE_BACKEND, labels, parameter_names, pattern_settings

R = TypeVar("R", bound=Row)
S = TypeVar("S", bound=Setting)


@dataclass(frozen=True)
class Placed(Generic[R]):
    """A row and what it is called among those that it stands with."""

    row: R
    label: str


def parameters_text(row: Row) -> str:
    """The parameters of a row in words: rows of one method that agree in them compute the same."""
    return ", ".join(f"{name} {value}" for name, value in pattern_settings(row).items())


def comparable(rows: Iterable[R], setting: Callable[[R, int], S]) -> list[tuple[S, list[Placed[R]]]]:
    """Rows of one kind by setting, each setting's rows in order, dense first.

    Args:
        setting: makes a row's setting, given how old its contents are: methods are compared on the same data alone, so what
            a task or a length was measured on is numbered from the newest.
    """
    rows = list(rows)
    held = [contents(row) for row in rows]
    places = [(setting(row, 0), row.length, task_of(row)) for row in rows]
    newest: dict[tuple[S, int, str], dict[str, str]] = {}
    for row, place, own in zip(rows, places, held, strict=True):
        times = newest.setdefault(place, {})
        times[own] = max(times.get(own, ""), row.time)
    together: dict[S, list[R]] = {}
    for row, place, own in zip(rows, places, held, strict=True):
        times = newest[place]
        older = sorted(times, key=times.__getitem__, reverse=True).index(own)
        together.setdefault(setting(row, older) if older else place[0], []).append(row)
    order = order_of(rows)
    return [(key, labelled(sorted(together[key], key=order))) for key in sorted(together)]


def labelled(rows: Sequence[R]) -> list[Placed[R]]:
    """Rows under their methods' names, with those parameters in which variants of a method differ."""
    return [Placed(row, label) for row, label in zip(rows, labels(rows), strict=True)]


def order_of(rows: Iterable[Row]) -> Callable[[Row], tuple[Any, ...]]:
    """The key that sorts rows such as these by method, dense first, then by parameters, length and task."""
    variants: dict[str, list[Row]] = {}
    for row in rows:
        variants.setdefault(row.method, []).append(row)
    names = {method: parameter_names(own) for method, own in variants.items()}
    methods = list(METHODS)

    def key(row: Row) -> tuple[Any, ...]:
        given = row.settings
        method = methods.index(row.method) if row.method in methods else len(methods)
        tasks = tasks_of(row)
        task = tasks.index(task_of(row)) if task_of(row) in tasks else len(tasks)
        # Dense attention as tmbench chooses it comes before what a user forced.
        backend = in_value_order(DENSE_BACKEND, given.get(DENSE_BACKEND, ""))
        values = [(name not in given, in_value_order(name, given.get(name, ""))) for name in names[row.method]]
        return method, row.method, backend, values, row.length, task

    return key


def in_value_order(name: str, value: Value) -> tuple[Any, ...]:
    """The key that sorts a parameter's values: numbers before texts, and layers from one on, by it, before other choices.

    Its first member says whether a value is a text: only values that agree in it have an order of their own. Numbers within
    texts count as numbers.
    """
    if not isinstance(value, str):
        return False, value
    start = whole_number(value[:-1]) if name == LAYERS and value.endswith("-") else None
    if start is not None:
        return False, start
    parts = enumerate(re.split(r"(\d+)", value))
    return True, [(len(part.lstrip("0")), part.lstrip("0")) if place % 2 else (0, part) for place, part in parts]


def task_of(row: Row) -> str:
    """The task that a row is about; "" for a row of no task."""
    return row.task if isinstance(row, RulerRow | LossRow | ProbeRow | TuneRow | LmEvalRow) else ""


def tasks_of(row: Row) -> tuple[str, ...]:
    """The tasks of a row's suite, in its order; RULER's for a row of no suite."""
    return (row.tasks if isinstance(row, RulerRow) else ()) or tuple(TASKS)


def contents(row: Row) -> str:
    """What tells the prompts of a row from others of the same kind."""
    if isinstance(row, RulerRow):
        # Prepared prompts are hashed task by task: their hash names the data, not the wording.
        source = f"{row.source} {row.wording_hash}" if row.wording == PREPARED else row.source
        return f"{source} {row.data_hash}".rstrip()
    if isinstance(row, LossRow | ProbeRow):
        return f"{row.source} {row.wording_hash}"
    if isinstance(row, LmEvalRow):
        return row.data_hash
    return row.prompt_hash if isinstance(row, TtftRow | AgreeRow) else ""

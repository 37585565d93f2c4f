"""What a figure of a results file can be: one that is none of these was never measured, and nothing may be made of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from tmbench.errors import shortened

COUNTED = frozenset(("length", "samples", "repeats", "new_tokens", "batch_size"))
"""Columns of whole numbers from 1 on."""
SHARES = frozenset(
    ("coverage", "agreement", "identical", "kept_share", "probability_mean", "answered", "lost_share", "pairs_share",
     "gamma", "tau", "threshold", "alpha", "capped_share", "confidence", "skipped_share")
)  # fmt: skip
"""Columns from 0 to 1."""
POINTS = frozenset(("score",))
"""Columns from 0 to 100."""
ANY = frozenset(("value",))
"""Columns of any number: a metric of another harness."""
SIGNED = ("_signed", "_vs_dense")
"""How columns end that may be negative."""
NAMED = ("device", "method", "weights", "dtype")
"""Columns that are never empty."""
NOT_FINITE = frozenset(("logit_error",))
"""Columns in which earlier versions kept what a model that overflowed gave."""
HAIR = 1e-9
"""Rounding may lift a share of all above 1."""
LARGEST = 2**63 - 1
UP_TO = (("nulls", "samples"), ("divergence_median", "new_tokens"), ("ttft_min_s", "ttft_median_s"),
         ("ttft_median_s", "ttft_max_s"))  # fmt: skip
"""Columns of which the first is never more than the second."""


def check_values(values: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the column, for a row's values of which one is impossible; None is always possible."""
    for name, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            check_number(name, value)
    for name in NAMED:
        if not values[name]:
            raise ValueError(f"{name} is empty")
    for less, more in UP_TO:
        low, high = values.get(less), values.get(more)
        if low is not None and high is not None and low > high:
            raise ValueError(f"{less} is {low:g}, more than {more}, {high:g}")
    try:
        datetime.fromisoformat(values["time"])
    except ValueError:
        raise ValueError(f"time is {shortened(values['time'])!r}, not a time of ISO 8601") from None
    _check_repeats(values)


def check_number(name: str, value: int | float) -> None:
    """Raise ValueError, naming the column, for a number that it cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        if name not in NOT_FINITE:
            raise ValueError(f"{name} is {value}, not a finite number")
        return
    least = 1 if name in COUNTED else -math.inf if name.endswith(SIGNED) or name in ANY else 0
    most = 1 + HAIR if name in SHARES else 100 + HAIR if name in POINTS else LARGEST if isinstance(value, int) else math.inf
    if value < least:
        raise ValueError(f"{name} is {shortened(str(value))}, less than {least}")
    if value > most:
        raise ValueError(f"{name} is {shortened(str(value))}, more than {most:g}")


def _check_repeats(values: Mapping[str, Any]) -> None:
    """The timed repeats are numbers, as many as there were."""
    texts = values.get("samples_s", "").split()
    try:
        wrong = any(not 0 <= float(text) < math.inf for text in texts)
    except ValueError:
        wrong = True
    if wrong:
        raise ValueError(f"samples_s is {shortened(values['samples_s'])!r}, not seconds")
    if texts and len(texts) != values["repeats"]:
        raise ValueError(f"samples_s has {len(texts)} times, where repeats is {values['repeats']}")

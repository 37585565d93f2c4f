"""What the rows that tests make have in common: one model, measured on one device that nobody has."""

from __future__ import annotations

from typing import Any

from tmbench.results.parameters_text import parameters_text

COMMON: dict[str, Any] = {
    "time": "2026-01-01T00:00:00+00:00",
    "device": "some-gpu",
    "device_name": "Some GPU",
    "model": "a/model",
    "weights": "checkpoint",
    "dtype": "bfloat16",
    "seed": 42,
    "threads": 0,
    "tmbench": "0.1.0",
    "python": "3.12",
    "torch": "2.13.0",
    "transformers": "5.24.0",
    "environment": "abc",
}

PARAMETERS = (
    "layers", "n_init", "n_local", "last_n", "patterns", "dense_backend",
    "gamma", "tau", "min_budget", "stride", "threshold", "first_chunk", "alpha", "p", "like", "delta",
)  # fmt: skip


def columns(values):
    """The columns of a row, given with its parameters one by one."""
    own = {name: values[name] for name in PARAMETERS if name in values}
    rest = {name: value for name, value in values.items() if name not in own}
    return rest | ({"parameters": parameters_text(own)} if own else {})

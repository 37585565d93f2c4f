"""Result files of schema 1, which had a column for every method's parameter: read for ever, and written no more.

A line of theirs is read as a line of today's schema: the columns of parameters become the text ``parameters``, in which deep
layers are one parameter, and ``starting_layer_source`` becomes ``layers_source``. The files of samples keep the names that
schema 1 gave them, so that what was answered is not asked again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tmbench.results.parameters_text import Value, parameters_text
from tmbench.results.row_limits import check_number
from tmbench.results.values import field_text, parse_value

VERSION: Final = 1

TYPES: Final[Mapping[str, Any]] = {
    "starting_layer": int | None, "layers": str, "n_init": int | None, "n_local": int | None, "last_n": int | None,
    "patterns": str, "dense_backend": str, "gamma": float | None, "tau": float | None, "min_budget": int | None,
    "stride": int | None, "threshold": float | None, "first_chunk": int | None, "alpha": float | None,
}  # fmt: skip
"""The columns of parameters, in the order in which they were shown, and what they hold."""

COMMON: Final = (
    "schema_version", "time", "status", "error", "device", "method", "model", "revision", "weights", "model_hash", "dtype",
    "length", "seed", *TYPES, "starting_layer_source", "prefill", "backends", "peak_memory_bytes", "threads", "device_name",
    "driver", "tmbench", "commit", "dirty", "python", "torch", "triton", "transformers", "environment",
)  # fmt: skip
COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {
    "ttft": (
        "prompt", "prompt_hash", "repeats", "warmup", "interleaved", "ttft_median_s", "ttft_min_s", "ttft_max_s",
        "samples_s", "coverage", "flop", "matrix_rate_flops", "floor_s", "ttft_over_floor", "first_token",
        "same_token_as_dense", "logit_error", "compile_s",
    ),
    "ruler": (
        "task", "samples", "score", "nulls", "wording", "wording_hash", "source", "data_hash", "chat_template",
        "prompt_tokens_mean", "seconds_per_sample", "predictions", "coverage", "chat_template_kwargs", "samples_as",
    ),
    "agree": (
        "prompt", "prompt_hash", "samples", "new_tokens", "agreement", "divergence_median", "identical",
        "seconds_per_sample", "choices",
    ),
    "probe": (
        "task", "samples", "wording_hash", "source", "layer", "head",
        *(f"{section}_{measure}{signed}" for measure in ("logits", "probabilities") for signed in ("", "_signed")
          for section in ("streaming", "middle", "last")),
        "kept_share", "prompt_tokens_mean", "probability_mean", "answered", "seconds_per_sample", "triangle", "proposal",
        "lost_share", "pairs_share", "sample_files",
    ),
    "loss": (
        "task", "samples", "wording_hash", "source", "nll_prompt", "nll_answer", "nll_first", "nll_prompt_vs_dense",
        "nll_answer_vs_dense", "nll_first_vs_dense", "prompt_tokens_mean", "answer_tokens_mean", "seconds_per_sample",
        "sample_files",
    ),
}  # fmt: skip
"""The columns of each kind of row beside those that all have."""

ADDED: Final[Mapping[str, Any]] = {
    "dense_backend": "", "gamma": None, "tau": None, "min_budget": None, "stride": None, "threshold": None,
    "first_chunk": None, "alpha": None, "layers": "", "model_hash": "", "prefill": "plain", "peak_memory_bytes": None,
    "compile_s": None, "prompt_hash": "", "coverage": None, "data_hash": "", "samples_as": "tmbench",
    "chat_template_kwargs": "",
}  # fmt: skip
"""Columns that files of the first release may lack, with what stands for them."""
NEVER_ABSENT: Final[Mapping[str, frozenset[str]]] = {"ttft": frozenset(("coverage",))}
"""Those of them that one kind of row always had."""

KEY: Final = (
    "device", "method", "model", "revision", "weights", "dtype", "length", "seed", "starting_layer", "n_init", "n_local",
    "last_n", "patterns", "threads", "dense_backend", "gamma", "tau", "min_budget", "stride", "threshold", "first_chunk",
    "alpha", "layers", "model_hash", "prefill",
)  # fmt: skip
"""What schema 1 told all rows apart by, in its order, which names of files depend on; kinds have further columns."""


def columns(kind: str) -> tuple[str, ...]:
    """The columns of a kind of row; none for one that came later."""
    return COMMON + COLUMNS[kind] if kind in COLUMNS else ()


def is_header(kind: str, names: Sequence[str]) -> bool:
    """Whether these are the columns of such rows, in any order, but for those that came later."""
    if kind not in COLUMNS:
        return False
    known = set(columns(kind))
    missing = known.difference(names)
    late = ADDED.keys() - NEVER_ABSENT.get(kind, frozenset())
    return len(set(names)) == len(names) and known.issuperset(names) and missing <= late


def translate(texts: Mapping[str, str]) -> dict[str, str]:
    """A line's texts by column as today's rows have them; raises ValueError, naming the column, for what is no parameter."""
    values = {name: parse_value(texts.get(name, ""), hint, name) for name, hint in TYPES.items()}
    for name, value in values.items():
        if value is not None and not isinstance(value, str):
            check_number(name, value)
    found = {name: text for name, text in texts.items() if name not in TYPES and name != "starting_layer_source"}
    found["parameters"] = field_text(parameters_text(_today(values)), "parameters")
    found["layers_source"] = texts.get("starting_layer_source", "")
    return found


def _today(values: Mapping[str, Any]) -> dict[str, Value]:
    """The parameters that are set, ``layers`` first."""
    start, listed = values["starting_layer"], values["layers"]
    # One layer alone was "7-7".
    layers = re.sub(r"\b(\d+)-\1\b", r"\1", listed) or ("" if start is None else f"{start}-")
    rest = {name: value for name, value in values.items() if name not in ("starting_layer", "layers")}
    return {name: value for name, value in {"layers": layers, **rest}.items() if value not in (None, "")}


def _columns_of(parameters: Mapping[str, Value]) -> dict[str, Any]:
    """The columns that schema 1 had for these parameters; those that it had no column for are not among them."""
    layers = str(parameters.get("layers", ""))
    first, dash, last = layers.partition("-")
    from_one_on = dash == "-" and last == "" and first.isdecimal()
    found: dict[str, Any] = {
        name: parameters.get(name, "" if hint is str else None) for name, hint in TYPES.items() if name != "layers"
    }
    return found | {
        "starting_layer": int(first) if from_one_on else None,
        "layers": "" if from_one_on else f"{layers}-{layers}" if layers.isdecimal() else layers,
    }


def key_columns(values: Mapping[str, Any], parameters: Mapping[str, Value], names: Sequence[str]) -> dict[str, Any]:
    """What tells a row apart, as schema 1 had it, in its order: names of files are made of it.

    What it had no column for, a parameter or a column of today, follows.

    Args:
        values: the row's columns.
        parameters: those of its method.
        names: the columns of its key.
    """
    old = _columns_of(parameters)
    order = dict.fromkeys((*KEY, *(name for name in names if name not in ("parameters", *KEY))))
    found = {name: old[name] if name in TYPES else values[name] for name in order}
    return found | {name: f"{name}={value}" for name, value in sorted(parameters.items()) if name not in TYPES}

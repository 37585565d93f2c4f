"""RULER's two scores, exactly as its evaluation publishes them (Hsieh et al. 2024, arXiv 2404.06654, section 4).

A reference counts as found when it is a substring of the prediction, letter case aside. `all` is the fraction of the
references found: needles, variables, words. `part` is 1 as soon as ANY reference is found: the accepted answers of a
question are alternatives. (The port in lm-eval averages over the alternatives instead, which scores lower.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

Metric = Literal["all", "part"]

_CONTROL = re.compile(r"[\x00-\x1f]")


def postprocess(prediction: str) -> str:
    """The prediction as RULER compares it: stripped, each control character turned into a newline, stripped again."""
    return _CONTROL.sub("\n", prediction.strip()).strip()


def count_nulls(predictions: Sequence[str]) -> int:
    """How many predictions are empty as RULER compares them: its "nulls", which one of control characters alone is too."""
    return sum(not postprocess(prediction) for prediction in predictions)


def score_sample(metric: Metric, prediction: str, references: Sequence[str]) -> float:
    """The score of one prediction, from 0 to 1.

    Raises:
        ValueError: no references, or an unknown metric.
    """
    if isinstance(references, str):
        raise ValueError("The references are one string; a sequence of strings is needed.")  # noqa: TRY004
    if not references:
        raise ValueError("A sample without references cannot be scored.")
    found = [reference.lower() in postprocess(prediction).lower() for reference in references]
    if metric == "all":
        return sum(found) / len(found)
    if metric == "part":
        return float(any(found))
    raise ValueError(f"Unknown metric {metric!r}: choose 'all' or 'part'.")


def score_samples(metric: Metric, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The mean score of several predictions times 100, rounded to two decimals as RULER reports it.

    Args:
        predictions: one text per sample.
        references: one sequence of reference strings per sample.

    Raises:
        ValueError: no predictions, or not one entry of references for each.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions cannot be scored against {len(references)} references.")
    if not predictions:
        raise ValueError("There are no predictions to score.")
    total = sum(score_sample(metric, *pair) for pair in zip(predictions, references, strict=True))
    return round(total / len(predictions) * 100, 2)

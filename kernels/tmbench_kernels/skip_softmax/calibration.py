"""How much is skipped by which threshold: what is fitted to a model once, and the file that says so.

A share of skipped tiles is reached by ``threshold * keys = a * exp(b * share)``, the form of NVIDIA's Model Optimizer. The
file holds ``a`` and ``b`` as Model Optimizer writes them into a checkpoint's config.json, which is read as well.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMULA = "a * exp(b * target_sparsity)"
ENTRY = "sparse_attention_config"
ALGORITHM = "skip_softmax"
OWN = "tmbench"
"""What the file says of how it was made."""
DIGITS = 4
"""Significant digits of a factor that follows from a fit."""
MOST_MEBIBYTES = 16


@dataclass(frozen=True)
class Calibration:
    """What a file holds, read once. As a text it is the file's stem and a hash of its content."""

    path: Path
    digest: str
    a: float
    b: float
    order: str = ""
    """The order of tiles that it was made with; "" where the file does not say."""

    @classmethod
    def read(cls, given: Any) -> Calibration:
        """The calibration of a file; raises ValueError, in one sentence that names it, for a file that has none."""
        if isinstance(given, Calibration):
            return given
        path = Path(given)
        if path.is_file() and path.stat().st_size > MOST_MEBIBYTES * 2**20:
            raise ValueError(f"{path} has more than {MOST_MEBIBYTES} MiB, which no calibration has")
        content = path.read_bytes()
        return cls(path, hashlib.sha256(content).hexdigest()[:8], *_coefficients(path, content))

    def factor(self, target: float) -> float:
        """The threshold times the number of keys at which such a share of tiles is skipped."""
        return float(f"{self.a * math.exp(self.b * target):.{DIGITS}g}")

    def __str__(self) -> str:
        return f"{self.path.stem}:{self.digest}"


def _coefficients(path: Path, content: bytes) -> tuple[float, float, str]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    remedy = "give a file that tmbench patterns calibrate wrote"
    try:
        groups = found[ENTRY]["config_groups"].values()
        (group,) = (group for group in groups if group["algorithm"] == ALGORITHM)
        about = group["threshold_scale_factor"]
        formula, values = about["formula"], about.get("prefill") or about["coefficients"]
        a, b = float(values["a"]), float(values["b"])
        order = str(found.get(OWN, {}).get("order", ""))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path} has no calibration of {ALGORITHM} for prefill in {ENTRY}: {remedy}") from None
    if formula != FORMULA:
        raise ValueError(f"{path} has the formula {str(formula)[:60]!r}, of which only {FORMULA!r} is known: {remedy}")
    if not (a > 0 and math.isfinite(a) and math.isfinite(b)):
        raise ValueError(f"{path} has the coefficients a = {a} and b = {b}, but a must be above 0: {remedy}")
    return a, b, order


def fit(shares: Sequence[float], factors: Sequence[float]) -> tuple[float, float]:
    """``a`` and ``b`` with the least squares of the factors' logarithms; raises ValueError for fewer than two shares."""
    if len(set(shares)) < 2:
        raise ValueError("a fit takes two shares of skipped tiles or more")
    logs = [math.log(factor) for factor in factors]
    mean, level = sum(shares) / len(shares), sum(logs) / len(logs)
    b = sum((share - mean) * (log - level) for share, log in zip(shares, logs, strict=True)) / sum(
        (share - mean) ** 2 for share in shares
    )
    return math.exp(level - b * mean), b


def calibration_json(a: float, b: float, about: dict[str, Any]) -> str:
    """The text of a file that holds a fit, and beside it what it was made from."""
    group = {"algorithm": ALGORITHM, "threshold_scale_factor": {"formula": FORMULA, "prefill": {"a": a, "b": b}}}
    return json.dumps({ENTRY: {"config_groups": {"group_0": group}}, OWN: about}, indent=1) + "\n"

"""The scores of single samples, read from the predictions beside the rows: what paired differences are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tmbench.results.files import read_lines
from tmbench.results.rows import OK, RulerRow
from tmbench.results.sample_files import index_of, score_of
from tmbench.results.words import counted


@dataclass(frozen=True)
class Samples:
    """What a method answered to the samples of one task."""

    scores: Mapping[int, float] = field(default_factory=dict)
    """From 0 to 1, by the sample's index."""
    references: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """The answers that were wanted: two methods that were asked the same sample have the same."""
    prompts: Mapping[int, str] = field(default_factory=dict)
    """A hash of each prompt; "" where the file is of an older version."""
    kinds: Mapping[int, str] = field(default_factory=dict)
    """What was chosen for a sample among its task's settings, in words, such as how often the words of cwe repeat; of those
    alone whose line says so."""
    missing: str = ""
    """Why there are none, in words."""

    def same(self, other: Samples, index: int) -> bool:
        """Whether both were asked the same, as far as is known, and the same was wanted."""
        own, others = self.prompts.get(index, ""), other.prompts.get(index, "")
        return self.references[index] == other.references[index] and ("" in (own, others) or own == others)


def read_samples(root: Path, row: Mapping[str, Any], kind: str = RulerRow.kind) -> Samples:
    """The samples behind a score, given its row's columns by name; without any where the file does not make the score.

    Raises UserError for a file that tmbench did not write.
    """
    if row["status"] != OK or row["score"] is None:
        return Samples(missing="not measured")
    if not row["predictions"]:
        return Samples(missing="its row names no file of predictions")
    path = root / row["device"] / kind / row["predictions"]
    scores: dict[int, float] = {}
    references: dict[int, tuple[str, ...]] = {}
    prompts: dict[int, str] = {}
    kinds: dict[int, str] = {}
    # A file may hold more samples than its row: those of a larger run that was killed. Rows are over the first ones.
    for index, score, wanted, prompt, kind in read_lines(path, _entry, "a prediction", "move it out of the results folder"):
        if index in scores or len(scores) < row["samples"]:
            scores[index], references[index], prompts[index] = score, wanted, prompt
            kinds |= {index: kind} if kind else {}
    if len(scores) < row["samples"]:
        found = f"has {len(scores)} of {counted(row['samples'], 'sample')}" if path.exists() else "is missing"
        return Samples(missing=f"its file of predictions {found}")
    # Scores of rows are rounded to two decimals.
    if abs(100 * sum(scores.values()) / len(scores) - row["score"]) > 0.01:
        return Samples(missing="its file of predictions does not make its score")
    return Samples(scores, references, prompts, kinds)


def mixture_notes(samples: Mapping[tuple[str, str], Samples]) -> list[str]:
    """What must be said of tasks whose samples are of several kinds, a score over all being neither's; by (label, task)."""
    found: dict[str, str] = {}
    for (_, task), each in samples.items():
        counts = sorted(Counter(each.kinds.values()).items())
        if len(counts) > 1:
            words = ", ".join(f"{count} with {kind}" for kind, count in counts)
            found.setdefault(task, f"The samples of {task} are of {len(counts)} kinds: {words}.")
    return list(found.values())


def _entry(entry: Any) -> tuple[int, float, tuple[str, ...], str, str]:
    """(index, score, references, hash of the prompt, kind of the sample) of a line."""
    kind = " and ".join(f"{name} {value}" for name, value in dict(entry.get("parameters", {})).items())
    return index_of(entry), score_of(entry), tuple(entry["outputs"]), str(entry.get("prompt_hash", "")), kind

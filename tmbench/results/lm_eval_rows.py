"""What ``tmbench lm-eval`` keeps: a row for each metric of a task, every answer, and what each document scored."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tmbench.results.files import read_lines, replace_file, writable
from tmbench.results.rows import OK, PLAIN_LOOP, Row
from tmbench.results.sample_files import Kept, index_of
from tmbench.results.sample_scores import Samples
from tmbench.results.tables import csv_path
from tmbench.results.words import counted

LARGEST = 700.0
"""Nats beyond which a perplexity is no float."""
NO_SHARE = "is no mean over documents that score from 0 to 1"


@dataclass(frozen=True, kw_only=True)
class LmEvalRow(Row):
    """One metric of one task of lm-evaluation-harness, as the harness computed it of a method's answers."""

    kind: ClassVar[str] = "lm_eval"
    extra_key: ClassVar[tuple[str, ...]] = (
        "task", "metric", "metric_filter", "num_fewshot", "limit", "chat_template", "asked_as", "harness", "data_hash",
    )  # fmt: skip

    task: str
    metric: str
    metric_filter: str
    """What the harness made of the answers before it took the metric: the name of a filter, "none" for nothing."""
    samples: int
    """Documents of the task."""
    value: float | None = None
    """Of the metric, as the harness has it: an accuracy is from 0 to 1."""
    higher_is_better: bool | None = None
    output_type: str
    """What the task asks of a model: generate_until, multiple_choice, loglikelihood or loglikelihood_rolling."""
    num_fewshot: int
    """Examples in front of each question."""
    limit: str = ""
    """That of ``--limit``; "" for all documents."""
    chat_template: bool = False
    asked_as: str = ""
    """A hash of what else the questions were asked with: a system instruction, few-shot turns, options of generation."""
    harness: str
    """The version of lm-evaluation-harness."""
    task_version: str = ""
    data_hash: str = ""
    """A hash of all requests, as token ids."""
    requests: int = 0
    """How many the model answered; a document may make several."""
    truncated: int = 0
    """Those of them whose prompt lost its beginning, as it did not fit."""
    prompt_tokens_mean: float | None = None
    coverage: float | None = None
    """The density: the share of the causal (query, key) pairs computed, in the first request's prefill."""
    seconds_per_sample: float | None = None
    """Of a request."""
    decode: str = PLAIN_LOOP
    """How answers were decoded, see ``RulerRow.decode``."""
    batch_size: int = 1
    """How many answers decoded together at most."""
    sample_files: str = ""
    """The JSONL file of the answers, relative to the CSV's folder."""
    documents: str = ""
    """The JSONL file of what each document scored."""

    @property
    def measure(self) -> str:
        """The metric, with its filter where there is one."""
        return self.metric if self.metric_filter == "none" else f"{self.metric} ({self.metric_filter})"

    @property
    def shown(self) -> str:
        """The value in four decimals, or where it is large in six digits."""
        return "" if self.value is None else f"{self.value:.4f}" if abs(self.value) < 100 else f"{self.value:.6g}"

    @property
    def scored(self) -> str:
        """The metric as the harness and the file of documents name it."""
        return f"{self.metric},{self.metric_filter}"


@dataclass(frozen=True)
class Response:
    """What a model answered to one request: a line of the JSONL file."""

    what: ClassVar[str] = "an answer"

    index: int
    """Of the request among those of its task."""
    prompt_hash: str
    """A hash of all that was asked."""
    text: str
    """What it wrote; "" where a given text was scored."""
    logprob: float
    """The log-likelihood of the given text, in nats; 0 where it wrote."""
    greedy: bool
    """Whether the given text is what it would have written."""
    prompt_tokens: int
    new_tokens: int
    seconds: float
    backends: str
    truncated: bool = False
    coverage: float | None = None
    peak_memory: int | None = None
    decode: str = PLAIN_LOOP
    batch_size: int = 1


def kept_responses(root: Path, row: LmEvalRow) -> Kept[Response]:
    """The file of the answers to a row's requests."""
    return Kept(root, row, row.task.replace("/", "_"), Response)


def write_documents(root: Path, row: LmEvalRow, entries: Sequence[Mapping[str, Any]]) -> str:
    """Keep what each document scored; the file's name as a row gives it. Raises UserError where the folder refuses it."""
    folder = csv_path(root, type(row), row.device, row.method).parent
    name = f"documents/{row.method}/{row.task.replace('/', '_')}-{row.length}-{row.digest}.jsonl"
    with writable(folder / name):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        replace_file(folder / name, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
    return name


def document_scores(root: Path, row: LmEvalRow) -> Samples:
    """What each document scored in a row's metric; without any where it is no share, or the file does not make the row.

    Raises UserError for a file that tmbench did not write.
    """
    found = _documents(root, row)
    if isinstance(found, str):
        return Samples(missing=found)
    scores = {index: value for index, (value, _) in found.items()}
    if not all(isinstance(value, int | float) and 0 <= value <= 1 for value in scores.values()):
        return Samples(missing=f"{row.metric} {NO_SHARE}")
    if not math.isclose(sum(scores.values()) / len(scores), row.value or 0.0, rel_tol=1e-6, abs_tol=1e-9):
        return Samples(missing=f"{row.metric} {NO_SHARE}")
    return Samples(
        {index: float(value) for index, value in scores.items()},
        {index: (told,) for index, (_, told) in found.items()},
        dict.fromkeys(found, ""),
    )


@dataclass(frozen=True)
class Likelihood:
    """What a text's likelihood was: of a metric that is taken over all of them, such as a perplexity."""

    logprob: float
    """In nats."""
    weight: float
    """How many words or bytes it has, as the metric counts."""
    told: str
    """A hash of the document."""


def document_likelihoods(root: Path, row: LmEvalRow) -> Mapping[int, Likelihood]:
    """Of each document; none for a row of another metric, or where the file does not make it.

    Raises UserError for a file that tmbench did not write.
    """
    found = _documents(root, row)
    if isinstance(found, str) or not found:
        return {}
    pairs = {index: (value, told) for index, (value, told) in found.items() if isinstance(value, list) and len(value) == 2}
    if len(pairs) < len(found) or not all(isinstance(one, int | float) for value, _ in pairs.values() for one in value):
        return {}
    own = {index: Likelihood(value[0], value[1], told) for index, (value, told) in pairs.items()}
    weight = sum(one.weight for one in own.values())
    nats = -sum(one.logprob for one in own.values()) / weight if weight > 0 else math.inf
    made = (math.exp(min(nats, LARGEST)), nats / math.log(2))
    return own if any(math.isclose(value, row.value or 0.0, rel_tol=1e-6) for value in made) else {}


def _documents(root: Path, row: LmEvalRow) -> dict[int, tuple[Any, str]] | str:
    """What each document has of a row's metric, with a hash of it; or why there is nothing, in words."""
    if row.status != OK or row.value is None:
        return "not measured"
    path = root / row.device / row.kind / row.documents
    if not row.documents or not path.exists():
        return "its file of documents is missing"
    lines = read_lines(path, _entry, "a document", "move it out of the results folder")
    found = {index: (scores[row.scored], told) for index, scores, told in lines if row.scored in scores}
    if len(found) != row.samples:
        return f"its file of documents has {len(found)} of {counted(row.samples, 'document')}"
    return found


def _entry(entry: Any) -> tuple[int, dict[str, Any], str]:
    """(number, scores by metric, a hash of the document with its prompt and its target) of a line."""
    return index_of(entry), dict(entry["scores"]), str(entry["hash"])

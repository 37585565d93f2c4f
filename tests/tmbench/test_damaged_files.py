"""Figures that nobody can have measured, and rows of a newer tmbench: one sentence that names the file, line and column."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import made_rows
from tmbench.errors import UserError
from tmbench.results.choices import read_choices
from tmbench.results.loss_samples import LossSample
from tmbench.results.predictions import read_predictions
from tmbench.results.rows import AgreeRow, LossRow, ProbeRow, RulerRow, TtftRow
from tmbench.results.sample_files import Kept
from tmbench.results.sample_scores import read_samples
from tmbench.results.tables import CorruptResultsError, NewerResultsError, append, newest, prepare, read, read_all

COMMON = made_rows.COMMON | {"method": "dense", "length": 4096}
TTFT = TtftRow(**COMMON, prompt="kv", repeats=2, warmup=1, interleaved="dense", ttft_median_s=0.3, ttft_min_s=0.25,
               ttft_max_s=0.35, samples_s="0.25 0.35", coverage=1.0, logit_error=0.5)  # fmt: skip
RULER = RulerRow(**COMMON, task="vt", samples=3, wording="own", wording_hash="f00d", source="noise", chat_template=False,
                 score=50.0, nulls=1, predictions="predictions/dense/vt.jsonl")  # fmt: skip
AGREE = AgreeRow(**COMMON, prompt="kv", samples=2, new_tokens=8, agreement=0.5, divergence_median=3.5, identical=0.0)
PROBE = ProbeRow(**COMMON, task="vt", samples=2, wording_hash="f00d", source="noise", layer=0, lost_share=0.1,
                 middle_logits=0.1, middle_logits_signed=-0.1)  # fmt: skip
LOSS = LossRow(**COMMON, task="vt", samples=2, wording_hash="f00d", source="noise", nll_first=1.0, nll_first_vs_dense=-0.5)


def rewrite(path: Path, column: str, text: str) -> None:
    """Put a text into a column of a file's second row."""
    lines = list(csv.reader(path.read_text().splitlines()))
    lines[2][lines[0].index(column)] = text
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


@pytest.mark.parametrize("row", [TTFT, RULER, AGREE, PROBE, LOSS], ids=lambda row: row.kind)
def test_what_may_be_measured_is_read(tmp_path, row):
    assert read(append(tmp_path, row), type(row)) == [row]


@pytest.mark.parametrize(
    ("row", "column", "text", "reason"),
    [
        (RULER, "samples", "0", "samples is 0, less than 1"),
        (RULER, "samples", "-3", "samples is -3, less than 1"),
        (RULER, "score", "-1", "score is -1.0, less than 0"),
        (RULER, "score", "700", "score is 700.0, more than 100"),
        (RULER, "score", "nan", "score is nan, not a finite number"),
        (RULER, "nulls", "4", "nulls is 4, more than samples, 3"),
        (RULER, "coverage", "1.1", "coverage is 1.1, more than 1"),
        (RULER, "chat_template", "maybe", "chat_template is 'maybe', not yes or no"),
        (RULER, "status", "okay", "status is 'okay', not one of ok, out_of_memory, failed"),
        (RULER, "time", "1/1/2026", "time is '1/1/2026', not a time"),
        (RULER, "length", "0", "length is 0, less than 1"),
        (RULER, "length", "9" * 5000, "length is '9*[.]{3}9*', not a number"),
        (RULER, "length", "9" * 30, "length is 9*, more than 9.2"),
        (RULER, "schema_version", "0", "schema_version is '0', which is none"),
        (RULER, "schema_version", "x", "schema_version is 'x', which is none"),
        (RULER, "method", "", "method is empty"),
        (TTFT, "repeats", "0", "repeats is 0, less than 1"),
        (TTFT, "repeats", "3", "samples_s has 2 times, where repeats is 3"),
        (TTFT, "samples_s", "0.2 x", "samples_s is '0.2 x', not seconds"),
        (TTFT, "samples_s", "0.2 -1", "samples_s is '0.2 -1', not seconds"),
        (TTFT, "ttft_median_s", "inf", "ttft_median_s is inf, not a finite number"),
        (TTFT, "ttft_median_s", "1e999", "ttft_median_s is inf, not a finite number"),
        (TTFT, "ttft_median_s", "-0.1", "ttft_median_s is -0.1, less than 0"),
        (TTFT, "ttft_median_s", "0.1", "ttft_min_s is 0.25, more than ttft_median_s, 0.1"),
        (TTFT, "ttft_max_s", "0.1", "ttft_median_s is 0.3, more than ttft_max_s, 0.1"),
        (TTFT, "threads", "-1", "threads is -1, less than 0"),
        (TTFT, "parameters", "n_init", "parameters is 'n_init', which is no list of them"),
        (TTFT, "parameters", "n_init=8  last_n=2", "parameters is 'n_init=8  last_n=2', which is no list of them"),
        (TTFT, "parameters", "n_init=8 n_init=9", "parameters is 'n_init=8 n_init=9', which is no list of them"),
        (TTFT, "parameters", 'patterns="a', "parameters is 'patterns=\"a', which is no list of them"),
        (TTFT, "schema_version", "1", "schema_version is 1, where its columns are of 2"),
        (AGREE, "agreement", "1.5", "agreement is 1.5, more than 1"),
        (AGREE, "divergence_median", "9", "divergence_median is 9, more than new_tokens, 8"),
        (PROBE, "lost_share", "2", "lost_share is 2.0, more than 1"),
        (PROBE, "middle_logits", "-0.1", "middle_logits is -0.1, less than 0"),
        (LOSS, "nll_first", "nan", "nll_first is nan, not a finite number"),
    ],
)
def test_a_damaged_row_is_named_with_its_line_and_column(tmp_path, row, column, text, reason):
    append(tmp_path, row)
    path = append(tmp_path, replace(row, seed=7))
    rewrite(path, column, text)
    before = path.read_bytes()
    with pytest.raises(CorruptResultsError, match=rf"dense\.csv is not a .* \(line 3: {reason}.*\): move it out") as caught:
        read_all(tmp_path, type(row))
    assert len(str(caught.value)) < 600
    with pytest.raises(CorruptResultsError):
        newest(tmp_path, type(row), row.device, "dense")
    assert path.read_bytes() == before


@pytest.mark.parametrize("column", [None, "fingers"])
def test_a_row_of_a_newer_schema_is_named_and_left_alone(tmp_path, column):
    append(tmp_path, RULER)
    path = append(tmp_path, replace(RULER, seed=7))
    rewrite(path, "schema_version", "3")
    if column:
        path.write_text(path.read_text().replace("schema_version,", f"schema_version,{column},").replace("\n3,", "\n3,10,"))
    before = path.read_bytes()
    words = r"dense\.csv line 3 was written by a newer tmbench \(schema_version 3, .* up to 2\): update tmbench, or move"
    with pytest.raises(NewerResultsError, match=words):
        read_all(tmp_path, RulerRow)
    with pytest.raises(NewerResultsError, match=words):
        newest(tmp_path, RulerRow, RULER.device, "dense")
    if column is not None:
        with pytest.raises(NewerResultsError, match=words):
            prepare(tmp_path, RulerRow, RULER.device, "dense")
    assert path.read_bytes() == before


def test_an_unknown_column_is_named(tmp_path):
    path = append(tmp_path, RULER)
    path.write_text(path.read_text().replace("schema_version,", "schema_version,fingers,"))
    with pytest.raises(CorruptResultsError, match="its columns differ: 'fingers' unknown"):
        read(path, RulerRow)


PREDICTION = {"index": 0, "prediction": "a", "outputs": ["a"], "score": 1.0, "prompt_tokens": 9, "new_tokens": 1,
              "seconds": 0.5, "coverage": None}  # fmt: skip
CHOICES = {"index": 0, "chosen": [1, 2], "reference": [1, 2], "seconds": 0.5}
LOSSES: dict[str, Any] = {"index": 0, "nll_prompt": 1.0, "nll_answer": 1.0, "nll_first": 1, "prompt_tokens": 9,
          "answer_tokens": 1, "source": "noise", "backends": "dense:sdpa", "seconds": 0.5}  # fmt: skip


def line(entry, **changes):
    return json.dumps(entry | changes).replace('"1e999"', "1e999") + "\n"


@pytest.mark.parametrize(
    "changes",
    [{"score": 7}, {"score": -0.1}, {"score": float("nan")}, {"score": "1e999"}, {"score": "1"}, {"score": True},
     {"index": -1}, {"index": 1.0}, {"index": "0"}, {"index": True}, {"outputs": 3}, {"seconds": -1},
     {"seconds": float("inf")}, {"prediction": 3}, {"prompt_tokens": None}],
)  # fmt: skip
def test_a_damaged_prediction_is_named(tmp_path, changes):
    path = tmp_path / "some-gpu" / "ruler" / RULER.predictions
    path.parent.mkdir(parents=True)
    path.write_text(line(PREDICTION) + line(PREDICTION, **changes))
    with pytest.raises(UserError, match=r"vt\.jsonl line 2 is not a prediction: move the file away, or use --overwrite"):
        read_predictions(path)
    if not changes.keys() & {"seconds", "prediction", "prompt_tokens"} or changes.get("seconds") == float("inf"):
        with pytest.raises(UserError, match=r"vt\.jsonl line 2 is not a prediction: move it out of the results folder"):
            read_samples(tmp_path, vars(RULER))


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, '{"index": ' + "9" * 5000 + "}"])
def test_a_line_that_python_cannot_read_is_named(tmp_path, text):
    path = tmp_path / "vt.jsonl"
    path.write_text(line(PREDICTION) + text + "\n")
    with pytest.raises(UserError, match=r"vt\.jsonl line 2 is not a prediction"):
        read_predictions(path)


@pytest.mark.parametrize("changes", [{"index": -1}, {"seconds": float("nan")}, {"seconds": -1}, {"chosen": [1]}])
def test_damaged_choices_are_named(tmp_path, changes):
    path = tmp_path / "kv.jsonl"
    path.write_text(line(CHOICES) + line(CHOICES, **changes))
    with pytest.raises(UserError, match=r"kv\.jsonl line 2 is not a sample's choices"):
        read_choices(path)


@pytest.mark.parametrize(
    "changes", [{"index": -1}, {"nll_first": float("nan")}, {"nll_first": "1"}, {"prompt_tokens": 1.5}, {"source": None}]
)
def test_damaged_losses_are_named(tmp_path, changes):
    file = Kept(tmp_path, LOSS, "vt", LossSample)
    file.path.parent.mkdir(parents=True)
    file.path.write_text(line(LOSSES))
    assert file.read() == {0: LossSample(**LOSSES)}
    file.path.write_text(line(LOSSES) + line(LOSSES, **changes))
    with pytest.raises(UserError, match="line 2 is not a sample: move the file away, or use --overwrite"):
        file.read()


def test_of_two_lines_of_a_sample_the_later_one_counts(tmp_path):
    """Two runs at once answer the same sample twice."""
    path = tmp_path / "some-gpu" / "ruler" / RULER.predictions
    path.parent.mkdir(parents=True)
    path.write_text(line(PREDICTION) + line(PREDICTION, index=1) + line(PREDICTION, score=0.0))
    assert {number: one.score for number, one in read_predictions(path).items()} == {0: 0.0, 1: 1.0}
    row = vars(replace(RULER, samples=2, score=50.0))
    assert read_samples(tmp_path, row).scores == {0: 0.0, 1: 1.0}

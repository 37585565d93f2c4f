"""What chunks and later questions cost stands beside what the same method does in one piece, over the same samples."""

from __future__ import annotations

import json
import statistics

import pytest

import made_rows
from answered_rows import add_answers
from report_rows import add_ruler, add_ttft, table_with
from tmbench.report.agreement import served_agreements
from tmbench.report.intervals import difference
from tmbench.report.loss import served_losses
from tmbench.report.report import build
from tmbench.report.student import mean_interval
from tmbench.report.time_intervals import TimeDifference
from tmbench.report.ttft import served_times
from tmbench.report.writers import report_json, report_markdown
from tmbench.results.rows import AgreeRow, LossRow
from tmbench.results.tables import append

CHUNKS = {"chunk": 2048, "prompt_length": "unknown"}


def test_each_way_of_serving_is_held_against_one_piece(tmp_path):
    right, half = [1.0] * 40, [1.0, 0.0] * 20
    for task in ("niah_single_1", "vt"):
        add_answers(tmp_path, "dense", task, right)
        add_answers(tmp_path, "minference", task, right)
        add_answers(tmp_path, "dense", task, right, **CHUNKS)
        add_answers(tmp_path, "minference", task, half, **CHUNKS)
    add_answers(tmp_path, "minference", "vt", half, ask_later=True)
    report = build(tmp_path)
    # Sections of their own, in which nothing is compared with prompts that were fed otherwise.
    assert [section.setting.fed for section in report.ruler] == [
        "", ", asked later", ", in chunks of 2K, prompt length unknown",
    ]  # fmt: skip
    text = report_markdown(report, folds=False)
    (lines,) = [part for part in text.split("\n\n") if part.startswith("| method") and "in one piece" in part]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines.splitlines()[2:]]
    assert [line[:6] for line in cells] == [
        ["minference", "asked later", "1", "100.0", "50.0", "-50.00"],
        ["dense", "in chunks of 2K, prompt length unknown", "2", "100.0", "100.0", "+0.00"],
        ["minference", "in chunks of 2K, prompt length unknown", "2", "100.0", "50.0", "-50.00"],
    ]
    assert [line[7] for line in cells] == ["loss", "too few samples", "loss"]
    found = [one for section in json.loads(report_json(report)) for one in section.get("served", ())]
    assert [(one["label"], one["difference"]) for one in found] == [
        ("minference", -50.0), ("dense", 0.0), ("minference", -50.0),
    ]  # fmt: skip


def test_without_single_answers_there_is_no_comparison(tmp_path):
    for how in ({}, CHUNKS):
        for method in ("dense", "minference"):
            add_ruler(tmp_path, method, **how)
    report = build(tmp_path)
    assert "in one piece" not in report_markdown(report)
    assert [section.served != () for section in report.ruler] == [True, False]


def add_samples(root, row, column, folder, lines, **changes):
    """A row with a file of samples beside it, which it names in a column."""
    about = made_rows.columns(made_rows.COMMON | {"length": 4096, "samples": len(lines)} | changes)
    told = "".join(str(changes.get(name, "")) for name in ("method", "chunk", "ask_later"))
    path = root / "some-gpu" / row.kind / folder / f"{told}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    shared = {"seconds": 1.0, "backends": "dense:sdpa"}
    path.write_text("".join(json.dumps({"index": n} | shared | line) + "\n" for n, line in enumerate(lines)))
    append(root, row(**about, **{column: f"{folder}/{path.name}"}))


def add_losses(root, method, answers, prompts="abc", **changes):
    plain = {"nll_prompt": 2.0, "nll_first": 0.5, "prompt_tokens": 9, "answer_tokens": 2, "source": "noise"}
    lines = [plain | {"nll_answer": nll, "prompt_hash": name} for nll, name in zip(answers, prompts, strict=False)]
    means = {"nll_prompt": 2.0, "nll_first": 0.5, "nll_answer": statistics.fmean(answers), "method": method}
    about = {"task": "vt", "wording_hash": "f00d", "source": "noise"}
    add_samples(root, LossRow, "sample_files", "samples", lines, **about, **means, **changes)


def add_agreement(root, method, alike, prompts="abc", **changes):
    """Texts of four tokens, of which so many are dense's."""
    dense = [1, 2, 3, 4]
    lines = [
        {"chosen": dense[:n] + [9] * (4 - n), "reference": dense, "prompt_hash": name}
        for n, name in zip(alike, prompts, strict=True)
    ]
    figures = {"agreement": statistics.fmean(alike) / 4, "divergence_median": 1.0, "identical": 0.0, "method": method}
    add_samples(root, AgreeRow, "choices", "choices", lines, prompt="kv", new_tokens=4, **figures, **changes)


def test_losses_are_held_against_one_piece_over_the_samples_that_both_have(tmp_path):
    for method, answers in (("dense", [1.0, 2.0, 3.0]), ("streaming", [1.5, 2.0, 4.0])):
        add_losses(tmp_path, method, answers)
    add_losses(tmp_path, "streaming", [1.6, 2.2, 4.3], **CHUNKS)
    add_losses(tmp_path, "streaming", [1.5, 2.5, 4.5], "abx", ask_later=True)
    report = build(tmp_path)
    later, chunks = (one for section in report.losses for one in served_losses(section))
    assert (chunks.label, chunks.read) == ("streaming", "in chunks of 2K, prompt length unknown")
    prompt, answer, _ = chunks.parts
    assert prompt is not None
    assert answer is not None
    assert prompt.text == "+0.0000 (+0.0000 to +0.0000)"
    assert answer.mean == pytest.approx(0.2)
    assert answer.ends == pytest.approx(mean_interval([0.1, 0.2, 0.3]))
    # Other prompts are not held against each other.
    assert later.parts == [None] * 3
    rows = report.losses[0].tables()[1].rows
    assert [row[1] for row in rows] == ["asked later", "in chunks of 2K, prompt length unknown"]
    assert [row[5] for row in rows] == ["-", answer.text]
    (first, second) = (one for section in json.loads(report_json(report)) for one in section["served"])
    assert second["nll_answer_vs_in_one_piece"] == pytest.approx(0.2)
    assert first["nll_answer_vs_in_one_piece"] is None


def test_agreement_is_held_against_one_piece_prompt_by_prompt(tmp_path):
    add_agreement(tmp_path, "dense", [4, 4, 4])
    add_agreement(tmp_path, "streaming", [4, 3, 2])
    add_agreement(tmp_path, "streaming", [2, 2, 0], **CHUNKS)
    add_agreement(tmp_path, "streaming", [2, 2, 0], "xbc", ask_later=True)
    report = build(tmp_path)
    later, chunks = (one for section in report.agree for one in served_agreements(section))
    assert chunks.difference == difference([[-50.0, -25.0, -50.0]])
    assert later.difference == "they did not read the same prompts"
    lines = table_with(report_markdown(report, folds=False), "differing")
    assert lines["streaming"]["points"] == "-41.67"
    assert lines["streaming"]["in one piece"] == "75.0%"


def test_times_are_held_against_one_piece_and_say_whether_they_were_interleaved(tmp_path):
    for length, rate in ((4096, 1e12), (8192, 2e12)):
        add_ttft(tmp_path, "dense", length, 1.0, matrix_rate_flops=1e12)
        add_ttft(tmp_path, "dense", length, 1.5, matrix_rate_flops=rate, **CHUNKS)
    add_ttft(tmp_path, "dense", 8192, 0.1, ask_later=True, question_tokens=64)
    report = build(tmp_path)
    turn, together, apart = (one for section in report.ttft for one in served_times(section))
    assert turn.read == "asked later, second turn of 64 tokens"
    assert turn.percent == pytest.approx(-90)
    assert isinstance(together.against, TimeDifference)
    assert together.against.percent == pytest.approx(50)
    assert together.against.verdict == "slower"
    assert (apart.length, apart.against) == (8192, "not interleaved")
    (words,) = {line["in words"] for line in table_with(report_markdown(report, folds=False), "then, s").values()}
    assert words == "not interleaved"

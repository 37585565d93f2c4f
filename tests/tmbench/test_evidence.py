"""What stands beside a time as its accuracy comes from the same settings and the most evidence."""

from __future__ import annotations

import json
import re

from report_rows import add_published, add_ruler, add_ttft, table_with
from ruler_tasks import TASKS
from tmbench.report.report import build
from tmbench.report.writers import report_json, report_markdown


def test_a_speed_up_stands_beside_what_was_kept(tmp_path):
    add_published(tmp_path)
    add_ttft(tmp_path, "tri_mix", 32768, 3.6, logit_error=0.031)
    add_ttft(tmp_path, "tri_mix", 131072, 23.4, logit_error=0.0044)
    table = table_with(report_markdown(build(tmp_path)), "128K")
    assert table["tri_mix"]["fidelity"] == (
        "logit error 0.031 at 32K; RULER 77.3 (dense 77.6, 13 tasks x 100 samples at 128K)"
    )
    assert table["minference"]["fidelity"] == "not measured"
    assert table["dense"]["fidelity"] == "the reference"


def test_a_logit_error_that_is_no_number_is_the_worst(tmp_path):
    add_ttft(tmp_path, "dense", 2048, 1.0)
    add_ttft(tmp_path, "tri_mix", 2048, 0.5, logit_error=0.5)
    add_ttft(tmp_path, "tri_mix", 4096, 0.9, logit_error=float("nan"))
    report = build(tmp_path)
    assert report.ttft[0].fidelity("tri_mix") == "logit error nan at 4K"
    rows = json.loads(report_json(report))[0]["rows"]
    assert [row["logit_error"] for row in rows if row["method"] == "tri_mix"] == [0.5, None]


def test_accuracy_counts_only_with_the_same_parameters_weights_and_type(tmp_path):
    add_ttft(tmp_path, "dense", 2048, 1.0)
    add_ttft(tmp_path, "tri_mix", 2048, 0.5)
    for method in ("dense", "tri_mix"):
        add_ruler(tmp_path, method, dtype="float32")
        add_ruler(tmp_path, method, **({"layers": "4-"} if method == "tri_mix" else {}))
    report = build(tmp_path)
    assert report.ttft[0].fidelity("tri_mix") == "not measured"


def test_the_most_evidence_of_the_same_settings_counts(tmp_path):
    """Three and thirteen tasks of two threads, one task of one thread at a greater length."""
    for method in ("dense", "tri_mix"):
        points = 0.0 if method == "dense" else 10.0
        add_ttft(tmp_path, method, 8192, 1.0)
        add_ruler(tmp_path, method, "vt", 50.0, length=131072, threads=1)
        for task in TASKS:
            add_ruler(tmp_path, method, task, 90.0 - points, length=4096, samples=25)
        for task in list(TASKS)[:3]:
            add_ruler(tmp_path, method, task, 70.0, length=8192, samples=500)
    report = build(tmp_path)
    assert report.ttft[0].fidelity("tri_mix") == "RULER 80.0 (dense 90.0, 13 tasks x 25 samples at 4K)"
    # As many tasks: the more samples; as many of these: the nearer length.
    for method in ("dense", "tri_mix"):
        for task in TASKS:
            add_ruler(tmp_path, method, task, 60.0, length=32768, samples=100)
            add_ruler(tmp_path, method, task, 65.0, length=16384, samples=100)
    report = build(tmp_path)
    assert report.ttft[0].fidelity("tri_mix") == "RULER 65.0 (dense 65.0, 13 tasks x 100 samples at 16K)"


def test_another_variant_with_fewer_tasks_takes_none_of_the_evidence(tmp_path):
    add_ttft(tmp_path, "dense", 4096, 1.0)
    add_ttft(tmp_path, "tri_mix", 4096, 1.0)
    for task in TASKS:
        add_ruler(tmp_path, "dense", task, 90.0)
        add_ruler(tmp_path, "tri_mix", task, 80.0, samples=50 if task == "vt" else 100)
    add_ruler(tmp_path, "streaming", "vt", 10.0)
    report = build(tmp_path)
    assert report.ttft[0].fidelity("tri_mix") == "RULER 80.0 (dense 90.0, 13 tasks x 50 to 100 samples at 4K)"


def test_evidence_of_other_threads_or_parameters_says_so(tmp_path):
    add_ttft(tmp_path, "dense", 4096, 1.0)
    add_ttft(tmp_path, "tri_mix", 4096, 1.0, logit_error=0.5)
    for method in ("dense", "tri_mix"):
        add_ruler(tmp_path, method, "vt", 50.0, threads=1, samples=1)
    report = build(tmp_path)
    kept = "logit error 0.5 at 4K; RULER 50.0 (dense 50.0, 1 task x 1 sample at 4K with 1 CPU thread, not 2)"
    assert report.ttft[0].fidelity("tri_mix") == kept
    add_ttft(tmp_path, "tri_mix", 4096, 1.0, logit_error=0.5, last_n=64)
    report = build(tmp_path)
    kept = report.ttft[0].fidelity("tri_mix (last_n 64)")
    assert kept == "logit error 0.5 at 4K; no RULER score with these parameters"


def test_a_forced_dense_backend_is_a_variant_compared_with_the_chosen_one(tmp_path):
    add_ttft(tmp_path, "dense", 2048, 2.0, dense_backend="sdpa")
    add_ttft(tmp_path, "dense", 2048, 1.0)
    add_ttft(tmp_path, "tri_mix", 2048, 0.5)
    add_ruler(tmp_path, "dense", score=90.0)
    add_ruler(tmp_path, "tri_mix", score=80.0)
    report = build(tmp_path)
    group = report.ttft[0]
    assert group.labels == ["dense", "dense (dense_backend sdpa)", "tri_mix"]
    assert [cell.percent_vs_dense for cell in group.cells] == [None, 100, -50]
    assert [group.fidelity(label)[:10] for label in group.labels[1:]] == ["RULER 90.0", "RULER 80.0"]


def test_rows_of_other_contents_stand_in_other_sections_and_are_not_cited_for_one_another(tmp_path):
    for contents, seconds, score in (("", 4.0, 90.0), ("aaaaaaaa0000", 2.0, 50.0), ("bbbbbbbb0000", 1.0, 0.0)):
        for method in ("dense", "tri_mix"):
            add_ttft(tmp_path, method, 4096, seconds, model_hash=contents)
            if contents != "bbbbbbbb0000":
                add_ruler(tmp_path, method, "vt", score, model_hash=contents)
    report = build(tmp_path)
    assert [group.setting.subject.partition(",")[0] for group in report.ttft] == [
        "a/model",
        "a/model (files aaaaaaaa)",
        "a/model (files bbbbbbbb)",
    ]
    assert [[cell.seconds for cell in group.cells] for group in report.ttft] == [[4.0] * 2, [2.0] * 2, [1.0] * 2]
    cited = [group.fidelity("tri_mix") for group in report.ttft]
    assert [re.findall(r"RULER ([0-9.]+)", words) for words in cited] == [["90.0"], ["50.0"], []]


def test_a_score_of_another_prefill_is_cited_and_said_to_be(tmp_path):
    for method in ("dense", "tri_mix"):
        add_ttft(tmp_path, method, 4096, 1.0, prefill="compiled")
        add_ruler(tmp_path, method, "vt", 90.0)
    (section,) = build(tmp_path).ttft
    note = "Scores beside these times are of the plain prefill, not of the compiled one that was timed."
    assert section.fidelity("tri_mix").startswith("RULER 90.0")
    assert note in section.notes()
    # Of scores over as much evidence those of the same prefill count.
    for method in ("dense", "tri_mix"):
        add_ruler(tmp_path, method, "vt", 80.0, prefill="compiled")
    report = build(tmp_path)
    assert len(report.ruler) == 2
    assert report.ttft[0].fidelity("tri_mix").startswith("RULER 80.0")
    assert note not in report.ttft[0].notes()
    add_ruler(tmp_path, "dense", "cwe", 50.0)
    add_ruler(tmp_path, "tri_mix", "cwe", 50.0)
    assert build(tmp_path).ttft[0].fidelity("tri_mix").startswith("RULER 70.0 (dense 70.0, 2 tasks")

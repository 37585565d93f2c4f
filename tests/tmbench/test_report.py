"""A report says what the rows say: figures computed by hand, published tables rebuilt, and a caveat where one is due."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest

import made_rows
from ruler_tasks import TASKS
from tmbench.errors import UserError
from tmbench.report.groups import length_name, signed, significant
from tmbench.report.rendering import build
from tmbench.results.rows import FAILED, OUT_OF_MEMORY, RulerRow, TtftRow
from tmbench.results.tables import append, csv_path

COMMON = made_rows.COMMON | {"driver": "570.1", "method": "dense", "length": 4096, "threads": 2, "commit": "aaaa"}
TTFT = {"prompt": "kv", "repeats": 3, "warmup": 1, "interleaved": "dense tri_mix minference tri_mix_minference"}
RULER = {"samples": 100, "wording": "reference-ruler", "wording_hash": "f00d", "source": "noise", "chat_template": False}
TRIANGLE = {"layers": "16-", "layers_source": "published", "n_init": 8, "n_local": 512, "last_n": 128}
OWN = {"tri_mix": TRIANGLE, "minference": {"patterns": "default"}, "tri_mix_minference": {**TRIANGLE, "patterns": "default"}}

# TriangleMix's README: Llama-3.1-8B on an A100, seconds.
PUBLISHED_LENGTHS = [32 * 1024, 48 * 1024, 64 * 1024, 80 * 1024, 96 * 1024, 112 * 1024, 128 * 1024]
PUBLISHED_SECONDS = {
    "dense": [4.1, 7.3, 11.2, 15.9, 21.3, 27.5, 34.5],
    "tri_mix": [3.6, 5.9, 8.6, 11.7, 15.2, 19.1, 23.4],
    "minference": [5.5, 7.8, 10.1, 12.3, 13.4, 15.9, 18.0],
    "tri_mix_minference": [4.2, 6.0, 7.7, 9.5, 10.9, 12.7, 14.5],
}
PUBLISHED_SCORES = {
    "dense": [100, 96, 100, 95, 91, 62, 97.25, 98.5, 90.0, 2.2, 57.33, 77, 43],
    "tri_mix": [100, 96, 100, 95, 91, 63, 97.75, 98.0, 93.2, 0.0, 50.67, 77, 43],
}


def add_ttft(root, method="dense", length=4096, seconds=None, **changes):
    times = {} if seconds is None else {"ttft_median_s": seconds, "ttft_min_s": 0.9 * seconds, "ttft_max_s": 1.1 * seconds}
    times |= (
        {}
        if seconds is None
        else {"samples_s": " ".join(f"{part * seconds}" for part in (0.9, 1.0, 1.1)[: changes.get("repeats", 3)])}
    )
    row = COMMON | TTFT | OWN.get(method, {}) | times | {"method": method, "length": length} | changes
    append(root, TtftRow(**made_rows.columns(row)))


def add_ruler(root, method="dense", task="niah_single_1", score=100.0, **changes):
    row = COMMON | RULER | OWN.get(method, {}) | {"method": method, "task": task, "score": score} | changes
    append(root, RulerRow(**made_rows.columns(row)))


def add_published(root):
    for method, times in PUBLISHED_SECONDS.items():
        for length, seconds in zip(PUBLISHED_LENGTHS, times, strict=True):
            add_ttft(root, method, length, seconds)
    for method, scores in PUBLISHED_SCORES.items():
        for task, score in zip(TASKS, scores, strict=True):
            add_ruler(root, method, task, score, length=131072)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A results folder with the published figures; not to be written to."""
    root = tmp_path_factory.mktemp("published")
    add_published(root)
    return root


def tables_of(markdown):
    """Every table as {first cell: {header: cell}}, the first cells of repeated ones joined with the second."""
    tables = []
    for block in re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE):
        lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
        assert len({len(line) for line in lines}) == 1, f"unequal columns in {block}"
        header, rule, *body = lines
        assert all(re.fullmatch(r":?-+:?", cell) for cell in rule)
        tables.append([dict(zip(header, line, strict=True)) for line in body])
    return tables


def table_with(markdown, column):
    """The one table that has a column of that name, by its first column."""
    (table,) = [table for table in tables_of(markdown) if column in table[0]]
    return {next(iter(line.values())): line for line in table}


def test_nothing_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"^no results under .*: run tmbench ttft or tmbench ruler first$"):
        build(tmp_path / "absent")


def test_a_foreign_file_is_named(tmp_path):
    path = csv_path(tmp_path, TtftRow, "some-gpu", "dense")
    path.parent.mkdir(parents=True)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"dense\.csv"):
        build(tmp_path)


def test_the_published_ttft_table(published):
    table = table_with(build(published).markdown(), "128K")
    assert list(table) == list(PUBLISHED_SECONDS)
    assert list(table["dense"]) == ["method", "32K", "48K", "64K", "80K", "96K", "112K", "128K", "fidelity"]
    assert table["dense"]["32K"] == "4.10"
    assert table["dense"]["128K"] == "34.5"
    assert table["tri_mix"]["32K"] == "3.60 (-12 %)"
    assert table["tri_mix"]["128K"] == "23.4 (-32 %)"
    assert table["minference"]["32K"] == "5.50 (+34 %)"
    assert table["tri_mix_minference"]["128K"] == "14.5 (-58 %)"


def test_the_published_break_even_lengths(published):
    report = build(published)
    table = table_with(report.markdown(), "faster than dense")
    assert {method: row["faster than dense"] for method, row in table.items()} == {
        "tri_mix": "from 32K on, the shortest measured",
        "minference": "from 64K on",
        "tri_mix_minference": "from 48K on",
    }
    assert table["tri_mix"]["parameters"] == "layers 16- (published), n_init 8, n_local 512, last_n 128"
    lengths = {"tri_mix": 32768, "minference": 65536, "tri_mix_minference": 49152}
    assert report.ttft[0].summary() == {"break_even_length": lengths}


def test_the_published_ruler_table(published):
    table = table_with(build(published).markdown(), "task")
    assert list(table) == [*TASKS, "average of 13"]
    assert table["fwe"] == {"task": "fwe", "samples": "100", "dense": "57.33", "tri_mix": "50.67"}
    assert table["niah_multivalue"]["tri_mix"] == "97.75"
    # 1009.28 / 13 = 77.637 and 1004.62 / 13 = 77.278, published as 77.6 and 77.3
    assert table["average of 13"]["dense"] == "77.6"
    assert table["average of 13"]["tri_mix"] == "77.3 (-0.4)"


def test_many_methods_have_a_line_each_and_the_tasks_are_columns(tmp_path):
    for layer in range(1, 8):
        add_ruler(tmp_path, "tri_mix", "vt", 90.0 + layer, layers=f"{layer}-", coverage=0.5)
    add_ruler(tmp_path, "dense", "vt", 95.0)
    add_ruler(tmp_path, "dense", "cwe", 40.0)
    for layer in range(1, 7):
        add_ruler(tmp_path, "tri_mix", "cwe", 30.0, layers=f"{layer}-")
    add_ruler(tmp_path, "tri_mix", "cwe", None, layers="7-", status=OUT_OF_MEMORY)
    table = table_with(build(tmp_path).markdown(), "average of 1")
    assert list(table) == ["dense", *(f"tri_mix (layers {layer}-)" for layer in range(1, 8)), "samples"]
    seventh = {"vt": "97", "cwe": "out of memory", "average of 1": "97.0 (+2.0)", "coverage": "50.0%"}
    assert table["tri_mix (layers 7-)"] == {"method": "tri_mix (layers 7-)", **seventh}
    assert table["samples"]["vt"] == "100"


@pytest.mark.parametrize(("points", "text"), [(-0.04, "+0.0"), (0.0, "+0.0"), (-0.06, "-0.1"), (38.5, "+38.5")])
def test_points_that_round_to_nothing_have_no_minus(points, text):
    assert signed(points, 1) == text


def test_a_speed_up_stands_beside_what_was_kept(tmp_path):
    add_published(tmp_path)
    add_ttft(tmp_path, "tri_mix", 32768, 3.6, logit_error=0.031)
    add_ttft(tmp_path, "tri_mix", 131072, 23.4, logit_error=0.0044)
    table = table_with(build(tmp_path).markdown(), "128K")
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
    assert report.fidelity(report.ttft[0], "tri_mix") == "logit error nan at 4K"
    rows = json.loads(report.json())[0]["rows"]
    assert [row["logit_error"] for row in rows if row["method"] == "tri_mix"] == [0.5, None]


def test_accuracy_counts_only_with_the_same_parameters_weights_and_type(tmp_path):
    add_ttft(tmp_path, "dense", 2048, 1.0)
    add_ttft(tmp_path, "tri_mix", 2048, 0.5)
    for method in ("dense", "tri_mix"):
        add_ruler(tmp_path, method, dtype="float32")
        add_ruler(tmp_path, method, **({"layers": "4-"} if method == "tri_mix" else {}))
    report = build(tmp_path)
    assert report.fidelity(report.ttft[0], "tri_mix") == "not measured"


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
    assert report.fidelity(report.ttft[0], "tri_mix") == "RULER 80.0 (dense 90.0, 13 tasks x 25 samples at 4K)"
    # As many tasks: the more samples; as many of these: the nearer length.
    for method in ("dense", "tri_mix"):
        for task in TASKS:
            add_ruler(tmp_path, method, task, 60.0, length=32768, samples=100)
            add_ruler(tmp_path, method, task, 65.0, length=16384, samples=100)
    report = build(tmp_path)
    assert report.fidelity(report.ttft[0], "tri_mix") == "RULER 65.0 (dense 65.0, 13 tasks x 100 samples at 16K)"


def test_another_variant_with_fewer_tasks_takes_none_of_the_evidence(tmp_path):
    add_ttft(tmp_path, "dense", 4096, 1.0)
    add_ttft(tmp_path, "tri_mix", 4096, 1.0)
    for task in TASKS:
        add_ruler(tmp_path, "dense", task, 90.0)
        add_ruler(tmp_path, "tri_mix", task, 80.0, samples=50 if task == "vt" else 100)
    add_ruler(tmp_path, "streaming", "vt", 10.0)
    report = build(tmp_path)
    assert report.fidelity(report.ttft[0], "tri_mix") == "RULER 80.0 (dense 90.0, 13 tasks x 50 to 100 samples at 4K)"


def test_evidence_of_other_threads_or_parameters_says_so(tmp_path):
    add_ttft(tmp_path, "dense", 4096, 1.0)
    add_ttft(tmp_path, "tri_mix", 4096, 1.0, logit_error=0.5)
    for method in ("dense", "tri_mix"):
        add_ruler(tmp_path, method, "vt", 50.0, threads=1, samples=1)
    report = build(tmp_path)
    kept = "logit error 0.5 at 4K; RULER 50.0 (dense 50.0, 1 task x 1 sample at 4K with 1 CPU thread, not 2)"
    assert report.fidelity(report.ttft[0], "tri_mix") == kept
    add_ttft(tmp_path, "tri_mix", 4096, 1.0, logit_error=0.5, last_n=64)
    report = build(tmp_path)
    kept = report.fidelity(report.ttft[0], "tri_mix (last_n 64)")
    assert kept == "logit error 0.5 at 4K; no RULER score with these parameters"


def test_out_of_memory_and_failure_are_shown_and_compared_with_nothing(tmp_path):
    for length, dense, sparse in ((2048, 1.0, 0.8), (4096, 3.0, 2.0)):
        add_ttft(tmp_path, "dense", length, dense)
        add_ttft(tmp_path, "tri_mix", length, sparse)
        add_ttft(tmp_path, "minference", length, sparse)
    add_ttft(tmp_path, "dense", 8192, status=OUT_OF_MEMORY, error="OutOfMemoryError: no")
    add_ttft(tmp_path, "tri_mix", 8192, 7.0)
    add_ttft(tmp_path, "minference", 4096, status=FAILED, error="RuntimeError: a | b")
    add_ttft(tmp_path, "streaming", 8192, 2.0)
    markdown = build(tmp_path).markdown()
    times, break_even = table_with(markdown, "2K"), table_with(markdown, "faster than dense")
    assert times["dense"]["8K"] == "out of memory"
    assert times["tri_mix"]["8K"] == "7.00"
    assert times["minference"]["4K"] == "failed"
    assert times["minference"]["8K"] == "-"
    assert break_even["tri_mix"]["faster than dense"] == "from 2K on, the shortest measured"
    alone = "at 2K, the only length measured"
    assert break_even["minference"]["faster than dense"] == alone, "at 4K it has no time"
    assert break_even["streaming"]["faster than dense"] == "not compared: at no length have both a time"
    assert "- minference failed at 4K: RuntimeError: a | b." in markdown


@pytest.mark.parametrize(
    ("seconds", "length", "words"),
    [
        ([2, 2, 2], None, "slower than dense at every length measured"),
        ([1, 1, 1], None, "no measurable difference at any length measured"),
        ([2, 0.5, 2], None, "not at 8K, the longest measured"),
        ([0.5, 2, 0.5], 8192, "at 8K, the longest measured"),
        ([2, 0.5, 0.5], 4096, "from 4K on"),
        ([0.5, 0.5, 1], None, "no measurable difference at 8K, the longest measured"),
        ([1, 0.5, 0.5], 4096, "from 4K on"),
        ([2, 1, 2], None, "measurably faster at no length measured"),
        ([0.5], 2048, "at 2K, the only length measured"),
        ([2], None, "slower than dense at 2K, the only length measured"),
        ([1], None, "no measurable difference at 2K, the only length measured"),
        ([0.5, 0.5, 0.5], 2048, "from 2K on, the shortest measured"),
    ],
)
def test_break_even(tmp_path, seconds, length, words):
    for place, value in zip((2048, 4096, 8192), seconds, strict=False):
        add_ttft(tmp_path, "dense", place, 1.0)
        add_ttft(tmp_path, "tri_mix", place, float(value))
    assert build(tmp_path).ttft[0].break_even("tri_mix") == (length, words)


def test_break_even_counts_what_was_measured_beside_dense_more_than_once(tmp_path):
    for length in (2048, 4096, 8192):
        add_ttft(tmp_path, "dense", length, 1.0)
    add_ttft(tmp_path, "tri_mix", 2048, 0.5)
    add_ttft(tmp_path, "tri_mix", 4096, 0.5, interleaved="tri_mix")
    add_ttft(tmp_path, "tri_mix", 8192, 0.5)
    add_ttft(tmp_path, "minference", 4096, 0.5, samples_s="0.5", repeats=1)
    add_ttft(tmp_path, "minference", 8192, 0.5, interleaved="minference")
    add_ttft(tmp_path, "streaming", 2048, 0.5, samples_s="")
    group = build(tmp_path).ttft[0]
    assert group.break_even("tri_mix") == (2048, "from 2K on, the shortest compared; not compared at 4K")
    assert group.break_even("minference") == (None, "not compared: repeats not known, not in turns")
    assert group.break_even("streaming") == (None, "not compared: repeats not known")
    table = table_with(build(tmp_path).markdown(), "2K")
    assert table["tri_mix"]["4K"] == "0.500 (-50 %, not in turns)"
    assert table["streaming"]["2K"] == "0.500 (-50 %, repeats not known)"


SLOW_ONCE = "1.00 1.01 1.66"


def test_one_slow_repeat_is_no_difference(tmp_path):
    """Of two busy cores: the median of the method is 1 % above dense's, its mean 22 %."""
    add_ttft(tmp_path, "dense", 2048, 1.0, samples_s="0.99 1.00 1.01")
    add_ttft(tmp_path, "tri_mix", 2048, 1.01, samples_s=SLOW_ONCE)
    add_ttft(tmp_path, "minference", 2048, 0.5, samples_s="0.49 0.50 0.51")
    markdown = build(tmp_path).markdown()
    times = table_with(markdown, "2K")
    assert times["tri_mix"]["2K"] == "1.01 (no measurable difference)"
    assert times["minference"]["2K"] == "0.500 (-50 %)"
    assert table_with(markdown, "faster than dense")["tri_mix"]["faster than dense"].startswith("no measurable difference")
    (against,) = [table for table in tables_of(markdown) if "95 % interval" in table[0]]
    assert [(line["method"], line["in words"]) for line in against] == [
        ("tri_mix", "no measurable difference"),
        ("minference", "faster"),
    ]
    assert against[0]["median"] == "+1.0 %"


def test_details_of_each_measurement(tmp_path):
    add_ttft(tmp_path, "dense", 2048, 1.0, coverage=1.0, ttft_over_floor=1.523, backends="dense:sdpa")
    add_ttft(tmp_path, "tri_mix", 2048, 0.5, coverage=0.1234, logit_error=0.0312, same_token_as_dense=False)
    (details,) = [table for table in tables_of(build(tmp_path).markdown()) if "coverage" in table[0]]
    assert details[0] == {
        "method": "dense", "length": "2K", "min s": "0.900", "max s": "1.10", "repeats": "3", "coverage": "100.0%",
        "TTFT / floor": "1.52", "logit error": "-", "same first token": "-", "backends": "dense:sdpa",
    }  # fmt: skip
    assert details[1]["coverage"] == "12.3%"
    assert details[1]["logit error"] == "0.031"
    assert details[1]["same first token"] == "no"


def test_peak_memory_stands_in_the_details_where_it_is_known(tmp_path):
    add_ttft(tmp_path, "dense", 2048, 1.0, peak_memory_bytes=41 * 2**30 + 2**29)
    add_ttft(tmp_path, "tri_mix", 2048, 0.5)
    (details,) = [table for table in tables_of(build(tmp_path).markdown()) if "coverage" in table[0]]
    assert [line["peak GiB"] for line in details] == ["41.5", "-"]


def test_variants_are_told_apart_by_what_differs(tmp_path):
    add_ttft(tmp_path, "dense", 2048, 1.0)
    add_ttft(tmp_path, "minference", 2048, 2.0)
    for start, last in ((4, 128), (6, 128), (6, 0)):
        add_ttft(tmp_path, "tri_mix", 2048, 0.5 + start / 100, layers=f"{start}-", last_n=last)
    labels = build(tmp_path).ttft[0].labels
    assert labels == [
        "dense",
        "tri_mix (layers 4-, last_n 128)",
        "tri_mix (layers 6-, last_n 0)",
        "tri_mix (layers 6-, last_n 128)",
        "minference",
    ]


def test_parameters_of_block_sparse_methods_are_shown_and_tell_variants_apart(tmp_path):
    add_ttft(tmp_path, "dense", 2048, 1.0)
    add_ttft(tmp_path, "flexprefill", 2048, 0.5, gamma=0.95, tau=0.1, min_budget=1024)
    for first_chunk in (0, 2048):
        add_ttft(tmp_path, "xattention", 2048, 0.5, stride=16, threshold=0.9, first_chunk=first_chunk)
    report = build(tmp_path)
    labels = ["flexprefill", "xattention (first_chunk 0)", "xattention (first_chunk 2048)"]
    assert report.ttft[0].labels == ["dense", *labels]
    table = table_with(report.markdown(), "parameters")
    assert table["flexprefill"]["parameters"] == "gamma 0.95, tau 0.1, min_budget 1024"
    assert table[labels[2]]["parameters"] == "stride 16, threshold 0.9, first_chunk 2048"


def test_a_forced_dense_backend_is_a_variant_compared_with_the_chosen_one(tmp_path):
    add_ttft(tmp_path, "dense", 2048, 2.0, dense_backend="sdpa")
    add_ttft(tmp_path, "dense", 2048, 1.0)
    add_ttft(tmp_path, "tri_mix", 2048, 0.5)
    add_ruler(tmp_path, "dense", score=90.0)
    add_ruler(tmp_path, "tri_mix", score=80.0)
    report = build(tmp_path)
    group = report.ttft[0]
    assert group.labels == ["dense", "dense (dense_backend sdpa)", "tri_mix"]
    assert [row["percent_vs_dense"] for row in group.rows] == [None, 100, -50]
    assert [report.fidelity(group, label)[:10] for label in group.labels[1:]] == ["RULER 90.0", "RULER 80.0"]


def test_devices_models_and_settings_are_kept_apart(tmp_path):
    add_ttft(tmp_path, length=2048, seconds=1.0)
    add_ttft(tmp_path, "tri_mix", 2048, 0.5)
    add_ttft(tmp_path, "tri_mix", 2048, 0.25, device="a-cpu", device_name="A CPU", driver="", dtype="float32")
    add_ttft(tmp_path, "tri_mix", 2048, 0.25, model="b/model", prompt="vt", torch="2.14.0", commit="bbbb", dirty=True)
    report = build(tmp_path)
    markdown = report.markdown()
    assert re.findall(r"^## .*$", markdown, flags=re.MULTILINE) == ["## A CPU (a-cpu)", "## Some GPU (some-gpu)"]
    assert len(report.ttft) == 3
    assert "torch 2.13.0, 2.14.0; transformers 5.24.0; tmbench 0.1.0; commit aaaa, bbbb (edited)." in markdown
    # Only the group that has a dense row compares with it.
    assert markdown.count("(-50 %)") == 1
    assert markdown.count("(-75 %)") == 0
    assert markdown.count("Dense has no time here") == 2


def test_the_newest_row_counts(tmp_path):
    add_ttft(tmp_path, length=2048, seconds=1.0)
    add_ttft(tmp_path, length=2048, seconds=2.0)
    assert table_with(build(tmp_path).markdown(), "2K")["dense"]["2K"] == "2.00"


def test_the_average_is_over_the_tasks_that_all_have(tmp_path):
    for task, dense, sparse in (
        ("niah_single_1", 100.0, 90.0),
        ("vt", 50.0, 40.0),
        ("cwe", 80.0, None),
        ("qa_2", 30.0, 35.0),
    ):
        add_ruler(tmp_path, "dense", task, dense)
        if sparse is not None:
            add_ruler(tmp_path, "tri_mix", task, sparse)
    add_ruler(tmp_path, "tri_mix", "fwe", None, status=OUT_OF_MEMORY)
    add_ruler(tmp_path, "dense", "fwe", 60.0)
    report = build(tmp_path)
    table = table_with(report.markdown(), "task")
    assert list(table) == ["niah_single_1", "vt", "cwe", "fwe", "qa_2", "average of 3"]
    assert table["average of 3"] == {"task": "average of 3", "samples": "", "dense": "60.0", "tri_mix": "55.0 (-5.0)"}
    assert table["cwe"]["tri_mix"] == "-"
    assert table["fwe"]["tri_mix"] == "out of memory"
    missing = [task for task in TASKS if task not in ("niah_single_1", "vt", "qa_2")]
    assert (
        f"The average is over the 3 tasks that every method has; missing somewhere: {', '.join(missing)}."
        in report.markdown()
    )
    summary = report.ruler[0].summary()
    assert summary["averages"] == {"dense": 60.0, "tri_mix": 55.0}
    assert summary["average_over"] == ["niah_single_1", "vt", "qa_2"]
    assert summary["coverages"] == {}


def test_what_a_method_covered_stands_below_its_scores(tmp_path):
    add_ruler(tmp_path, "dense", "vt")
    add_ruler(tmp_path, "minference", "vt", coverage=0.25)
    add_ruler(tmp_path, "minference", "qa_1", coverage=0.15)
    add_ruler(tmp_path, "minference", "qa_2", None, status=FAILED, coverage=0.9)
    line = table_with(build(tmp_path).markdown(), "task")["coverage"]
    assert (line["minference"], line["dense"]) == ("20.0%", "-")


def test_no_task_in_common_is_no_average(tmp_path):
    add_ruler(tmp_path, "dense", "vt")
    add_ruler(tmp_path, "tri_mix", "cwe")
    table = table_with(build(tmp_path).markdown(), "task")
    assert table["average of 0"] == {"task": "average of 0", "samples": "", "dense": "-", "tri_mix": "-"}


def test_older_data_have_a_table_of_their_own(tmp_path):
    for method in ("dense", "tri_mix"):
        add_ruler(tmp_path, method, "niah_single_1", 100.0)
        add_ruler(tmp_path, method, "niah_single_2", 10.0, source="generated prose")
    add_ruler(tmp_path, "dense", "niah_single_2", 90.0, source="essays", time="2026-02-01T00:00:00+00:00")
    newest, older = build(tmp_path).ruler
    assert newest.scores["dense"].to_dict() == {"niah_single_1": 100.0, "niah_single_2": 90.0}
    assert newest.averages == {"dense": 100.0, "tri_mix": 100.0}
    assert older.scores["tri_mix"].to_dict() == {"niah_single_2": 10.0}
    assert older.title.endswith("older data 1")


def test_prepared_prompts_are_one_table(tmp_path):
    for number, task in enumerate(TASKS):
        add_ruler(tmp_path, "dense", task, 50.0, wording="prepared", wording_hash=f"hash{number}", source="prepared")
    (group,) = build(tmp_path).ruler
    assert group.averages == {"dense": 50.0}
    assert "The prompts were prepared elsewhere, so their wording is not known here." in group.notes()


def test_lengths_wordings_and_templates_are_kept_apart(tmp_path):
    for changes in (
        {},
        {"length": 8192},
        {"wording": "own"},
        {"wording_hash": "be"},
        {"chat_template": True},
        {"threads": 4},
        {"samples_as": "reference"},
    ):
        add_ruler(tmp_path, **changes)
    titles = [group.title for group in build(tmp_path).ruler]
    assert len(set(titles)) == 7
    start = "RULER at 4K: a/model, checkpoint weights, bfloat16, wording"
    assert f"{start} reference-ruler f00d, with chat template, 2 CPU threads, seed 42" in titles
    assert f"{start} own f00d, without chat template, 2 CPU threads, seed 42" in titles
    drawn = "samples drawn as the reference draws them"
    assert f"{start} reference-ruler f00d, {drawn}, without chat template, 2 CPU threads, seed 42" in titles


def test_no_caveat_without_a_reason(published):
    report = build(published)
    missing, drawn = report.ruler[0].notes()
    assert drawn.endswith("published scores compare only under `--samples-as reference` too.")
    assert report.ttft[0].notes() == []
    # The published scores come without single answers.
    reason = "tri_mix on niah_single_1: its row names no file of predictions"
    assert missing == f"No interval for 13 scores, the first for this reason: {reason}."


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        (
            {"weights": "random", "backends": "vertical_slash:a+triangle:b"},
            "The weights are random: methods that choose keys by",
        ),
        (
            {"weights": "random", "backends": "dense:a+triangle:b"},
            "The weights are random: the times of these methods do not",
        ),
        (
            {"weights": "structured", "backends": "vertical_slash:a"},
            "The weights are structured: drawn so that attention has local bands",
        ),
        ({"repeats": 2}, "Fewer than 3 repeats, so the spread is hardly known: all rows."),
        ({"dirty": True}, "2 of 2 rows come from an edited checkout"),
    ],
)
def test_ttft_caveats(tmp_path, changes, note):
    add_ttft(tmp_path, "dense", 2048, 1.0, **changes)
    add_ttft(tmp_path, "tri_mix", 2048, 0.5, **changes)
    assert f"- {note}" in build(tmp_path).markdown()


def test_rows_measured_apart_from_dense_are_named(tmp_path):
    add_ttft(tmp_path, "dense", 2048, 1.0, interleaved="dense tri_mix")
    add_ttft(tmp_path, "tri_mix", 2048, 0.5, interleaved="dense tri_mix")
    add_ttft(tmp_path, "minference", 2048, 0.5, interleaved="minference")
    add_ttft(tmp_path, "minference", 4096, 0.5, interleaved="minference")
    # Named beside dense, but dense was measured again since: with other methods, or with this one's other variant.
    add_ttft(tmp_path, "streaming", 2048, 0.5, interleaved="dense streaming")
    add_ttft(tmp_path, "tri_mix", 2048, 0.5, interleaved="dense tri_mix", last_n=64, matrix_rate_flops=1e12)
    (note,) = build(tmp_path).ttft[0].notes()
    apart = ("tri_mix (last_n 64) at 2K", "minference at 2K", "streaming at 2K")
    assert all(words in note.partition("in between: ")[2] for words in apart)
    assert "tri_mix (last_n 128)" not in note


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"weights": "random"}, "The weights are random: these scores say nothing about a trained model."),
        ({"weights": "structured"}, "The weights are structured: these scores say nothing about a trained model."),
        ({"wording": "tmbench-1"}, "The wording is not the published one: published scores compare only under `--wording"),
        ({}, "The wording is the published one, but tmbench drew the samples by its own rules: published scores compare"),
        (
            {"samples_as": "reference"},
            "Drawn as the reference draws them, the answers of cwe and fwe and the documents of qa",
        ),
        ({"samples": 19}, "Only 19 samples of some task: fewer than 20 say little about a difference."),
        ({"task": "qa_1", "source": "generated documents"}, "Generated text stood in for SQuAD: scores of qa_1 do not"),
        ({"task": "qa_2", "source": "generated documents"}, "Generated text stood in for HotpotQA: scores of qa_2 do not"),
        (
            {"task": "niah_single_2", "source": "generated prose"},
            "Generated text stood in for essays: scores of niah_single_2",
        ),
        ({"status": FAILED, "score": None, "error": "KeyError: 1"}, "dense failed at niah_single_1: KeyError: 1."),
    ],
)
def test_ruler_caveats(tmp_path, changes, note):
    add_ruler(tmp_path, **changes)
    notes = build(tmp_path).ruler[0].notes()
    assert next(sentence for sentence in notes if not sentence.startswith("The average")).startswith(note)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"wording": "tmbench-1"}, []),
        ({"wording": "prepared"}, []),
        ({}, ["tmbench drew the samples by its own rules"]),
        ({"samples_as": "reference"}, ["special tokens are not counted"]),
        ({"samples_as": "reference", "wording": "tmbench-1"}, ["special tokens are not counted"]),
        (
            {"samples_as": "reference", "source": "essays (a), sentences by punctuation"},
            ["special tokens are not counted", "by punctuation, not by NLTK"],
        ),
        (
            {"samples_as": "reference", "source": "words, english_words.json missing"},
            ["special tokens are not counted", "english_words.json was missing"],
        ),
    ],
)
def test_how_samples_were_drawn_is_said(tmp_path, changes, words):
    add_ruler(tmp_path, **changes)
    notes = [note for note in build(tmp_path).ruler[0].notes() if "drew" in note or "reference" in note.lower()]
    own = [note for note in notes if not note.startswith("The wording is not")]
    assert len(own) == len(words)
    assert all(part in note for part, note in zip(words, own, strict=True))


def test_unequal_samples_are_shown(tmp_path):
    add_ruler(tmp_path, "dense", samples=50)
    add_ruler(tmp_path, "tri_mix", samples=25)
    assert table_with(build(tmp_path).markdown(), "task")["niah_single_1"]["samples"] == "25 / 50"


def test_a_pipe_does_not_break_a_table(tmp_path):
    add_ttft(tmp_path, "minference", 2048, 1.0, patterns="a|b:12345678", backends="x|y")
    assert table_with(build(tmp_path).markdown(), "parameters")["minference"]["parameters"] == r"patterns a\|b:12345678"


def test_csv_has_a_line_for_each_figure(tmp_path):
    add_ttft(tmp_path, "dense", 2048, 2.0, coverage=1.0)
    add_ttft(tmp_path, "tri_mix", 2048, 1.5, coverage=0.5, logit_error=0.125)
    add_ttft(tmp_path, "minference", 2048, status=OUT_OF_MEMORY)
    add_ruler(tmp_path, "dense", score=80.0)
    add_ruler(tmp_path, "tri_mix", score=60.0)
    lines = list(csv.DictReader(io.StringIO(build(tmp_path).csv())))
    figures = {(line["kind"], line["method"], line["figure"]): line for line in lines}
    assert len(figures) == len(lines) == 4 + 5 + 1 + 1 + 1
    median = figures["ttft", "tri_mix", "ttft_median_s"]
    assert (float(median["value"]), float(median["percent_vs_dense"]), median["repeats"]) == (1.5, -25.0, "3")
    assert median["parameters"] == "layers 16-, n_init 8, n_local 512, last_n 128"
    assert figures["ttft", "tri_mix", "logit_error"]["value"] == "0.125"
    assert figures["ttft", "tri_mix", "logit_error"]["percent_vs_dense"] == ""
    assert figures["ttft", "dense", "ttft_median_s"]["percent_vs_dense"] == ""
    assert figures["ttft", "minference", "ttft_median_s"]["status"] == OUT_OF_MEMORY
    assert figures["ttft", "minference", "ttft_median_s"]["value"] == ""
    assert float(figures["ruler", "tri_mix", "score"]["percent_vs_dense"]) == -25.0
    assert figures["ruler", "tri_mix", "score"]["task"] == "niah_single_1"


def test_json_holds_rows_and_what_follows_from_them(published):
    times, scores = json.loads(build(published).json())
    assert times["setting"]["device"] == "some-gpu"
    assert times["break_even_length"]["minference"] == 65536
    assert len(times["rows"]) == 28
    assert times["rows"][0]["ttft_median_s"] == 4.1
    assert scores["averages"]["dense"] == pytest.approx(1009.28 / 13)
    assert scores["average_over"] == list(TASKS)


@pytest.mark.parametrize(
    ("length", "name"), [(2048, "2K"), (131072, "128K"), (1000, "1000"), (32000, "32000"), (1048576, "1024K")]
)
def test_length_name(length, name):
    assert length_name(length) == name


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04123, "0.0412"), (3.6, "3.60"), (34.5, "34.5"), (127.6, "128"), (1234.5, "1234"), (0.0, "0")]
)
def test_significant(seconds, text):
    assert significant(seconds) == text


def test_rows_of_other_contents_stand_in_other_sections_and_are_not_cited_for_one_another(tmp_path):
    for contents, seconds, score in (("", 4.0, 90.0), ("aaaaaaaa0000", 2.0, 50.0), ("bbbbbbbb0000", 1.0, 0.0)):
        for method in ("dense", "tri_mix"):
            add_ttft(tmp_path, method, 4096, seconds, model_hash=contents)
            if contents != "bbbbbbbb0000":
                add_ruler(tmp_path, method, "vt", score, model_hash=contents)
    report = build(tmp_path)
    assert [group.subject.partition(",")[0] for group in report.ttft] == [
        "a/model",
        "a/model (files aaaaaaaa)",
        "a/model (files bbbbbbbb)",
    ]
    assert [[row["ttft_median_s"] for row in group.rows] for group in report.ttft] == [[4.0] * 2, [2.0] * 2, [1.0] * 2]
    cited = [report.fidelity(group, "tri_mix") for group in report.ttft]
    assert [re.findall(r"RULER ([0-9.]+)", words) for words in cited] == [["90.0"], ["50.0"], []]


@pytest.mark.parametrize("kind", ["ttft", "ruler"])
def test_methods_are_compared_on_the_same_prompts_only(tmp_path, kind):
    """Dense has read what a method was asked before, and not what it was asked since."""
    for method, contents, value in (("dense", "old", 80.0), ("tri_mix", "old", 40.0), ("tri_mix", "new", 60.0)):
        changes = {"time": f"2026-01-0{1 + (contents == 'new')}T00:00:00+00:00"}
        if kind == "ttft":
            add_ttft(tmp_path, method, 4096, value, prompt_hash=contents, **changes)
        else:
            add_ruler(tmp_path, method, "vt", value, data_hash=contents, **changes)
    new, old = getattr(build(tmp_path), kind)
    figure = "ttft_median_s" if kind == "ttft" else "score"
    assert [(row["method"], row[figure], row["percent_vs_dense"]) for row in new.rows] == [("tri_mix", 60.0, None)]
    assert [(row["method"], row[figure], row["percent_vs_dense"]) for row in old.rows] == [
        ("dense", 80.0, None),
        ("tri_mix", 40.0, -50.0),
    ]
    assert "older" not in new.title
    assert old.title.endswith({"ttft": ", older prompt 1", "ruler": ", older data 1"}[kind])

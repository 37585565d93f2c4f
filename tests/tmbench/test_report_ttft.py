"""Times in a report: the published table rebuilt, break-even lengths, and a caveat where one is due."""

from __future__ import annotations

import pytest

from report_rows import PUBLISHED_SECONDS, add_ttft, table_with, tables_of
from tmbench.report.records import summary
from tmbench.report.report import build
from tmbench.report.writers import report_markdown
from tmbench.results.rows import FAILED, OUT_OF_MEMORY


def test_the_published_ttft_table(published):
    table = table_with(report_markdown(build(published)), "128K")
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
    table = table_with(report_markdown(report), "faster than dense")
    assert {method: row["faster than dense"] for method, row in table.items()} == {
        "tri_mix": "from 32K on, the shortest measured",
        "minference": "from 64K on",
        "tri_mix_minference": "from 48K on",
    }
    assert table["tri_mix"]["parameters"] == "layers 16- (published), n_init 8, n_local 512, last_n 128"
    lengths = {"tri_mix": 32768, "minference": 65536, "tri_mix_minference": 49152}
    assert summary(report.ttft[0]) == {"break_even_length": lengths}


def test_out_of_memory_and_failure_are_shown_and_compared_with_nothing(tmp_path):
    for length, dense, sparse in ((2048, 1.0, 0.8), (4096, 3.0, 2.0)):
        add_ttft(tmp_path, "dense", length, dense)
        add_ttft(tmp_path, "tri_mix", length, sparse)
        add_ttft(tmp_path, "minference", length, sparse)
    add_ttft(tmp_path, "dense", 8192, status=OUT_OF_MEMORY, error="OutOfMemoryError: no")
    add_ttft(tmp_path, "tri_mix", 8192, 7.0)
    add_ttft(tmp_path, "minference", 4096, status=FAILED, error="RuntimeError: a | b")
    add_ttft(tmp_path, "streaming", 8192, 2.0)
    markdown = report_markdown(build(tmp_path))
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
    assert group.break_even("minference") == (None, "not compared: repeats not known, not interleaved")
    assert group.break_even("streaming") == (None, "not compared: repeats not known")
    table = table_with(report_markdown(build(tmp_path)), "2K")
    assert table["tri_mix"]["4K"] == "0.500 (-50 %, not interleaved)"
    assert table["streaming"]["2K"] == "0.500 (-50 %, repeats not known)"


SLOW_ONCE = "1.00 1.01 1.66"


def test_one_slow_repeat_is_no_difference(tmp_path):
    """Of two busy cores: the median of the method is 1 % above dense's, its mean 22 %."""
    add_ttft(tmp_path, "dense", 2048, 1.0, samples_s="0.99 1.00 1.01")
    add_ttft(tmp_path, "tri_mix", 2048, 1.01, samples_s=SLOW_ONCE)
    add_ttft(tmp_path, "minference", 2048, 0.5, samples_s="0.49 0.50 0.51")
    markdown = report_markdown(build(tmp_path))
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
    (details,) = [table for table in tables_of(report_markdown(build(tmp_path))) if "density" in table[0]]
    assert details[0] == {
        "method": "dense", "length": "2K", "min s": "0.900", "max s": "1.10", "repeats": "3", "density": "100.0%",
        "TTFT / roofline": "1.52", "logit error": "-", "same first token": "-", "backends": "dense:sdpa",
    }  # fmt: skip
    assert details[1]["density"] == "12.3%"
    assert details[1]["logit error"] == "0.031"
    assert details[1]["same first token"] == "no"


def test_peak_memory_stands_in_the_details_where_it_is_known(tmp_path):
    add_ttft(tmp_path, "dense", 2048, 1.0, peak_memory_bytes=41 * 2**30 + 2**29)
    add_ttft(tmp_path, "tri_mix", 2048, 0.5)
    (details,) = [table for table in tables_of(report_markdown(build(tmp_path))) if "density" in table[0]]
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


def test_layers_stand_by_their_numbers_and_lists_behind_those_from_one_on(tmp_path):
    for layers in ("10-12", "16-", "2,4", "4-", "7"):
        add_ttft(tmp_path, "tri_mix", 2048, 1.0, layers=layers)
    (section,) = build(tmp_path).ttft
    assert section.labels == [f"tri_mix (layers {layers})" for layers in ("4-", "16-", "2,4", "7", "10-12")]


def test_parameters_of_block_sparse_methods_are_shown_and_tell_variants_apart(tmp_path):
    add_ttft(tmp_path, "dense", 2048, 1.0)
    add_ttft(tmp_path, "flexprefill", 2048, 0.5, gamma=0.95, tau=0.1, min_budget=1024)
    for first_chunk in (0, 2048):
        add_ttft(tmp_path, "xattention", 2048, 0.5, stride=16, threshold=0.9, first_chunk=first_chunk)
    report = build(tmp_path)
    labels = ["flexprefill", "xattention (first_chunk 0)", "xattention (first_chunk 2048)"]
    assert report.ttft[0].labels == ["dense", *labels]
    table = table_with(report_markdown(report), "parameters")
    assert table["flexprefill"]["parameters"] == "gamma 0.95, tau 0.1, min_budget 1024"
    assert table[labels[2]]["parameters"] == "stride 16, threshold 0.9, first_chunk 2048"


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
    assert f"- {note}" in report_markdown(build(tmp_path))


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


def test_a_pipe_does_not_break_a_table(tmp_path):
    add_ttft(tmp_path, "minference", 2048, 1.0, patterns="a|b:12345678", backends="x|y")
    assert (
        table_with(report_markdown(build(tmp_path)), "parameters")["minference"]["parameters"] == r"patterns a\|b:12345678"
    )


def test_the_newest_row_counts(tmp_path):
    add_ttft(tmp_path, length=2048, seconds=1.0)
    add_ttft(tmp_path, length=2048, seconds=2.0)
    assert table_with(report_markdown(build(tmp_path)), "2K")["dense"]["2K"] == "2.00"

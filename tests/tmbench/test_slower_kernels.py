"""Where a slower kind of kernel than dense's took part, screen and report say so beside the time."""

from __future__ import annotations

import json

import pytest

import made_rows
from report_rows import add_ttft, table_with
from tmbench.cli import ttft
from tmbench.report.report import build
from tmbench.report.slower_kernels import slower_than_dense
from tmbench.report.writers import report_json, report_markdown
from tmbench.results.rows import OUT_OF_MEMORY, TtftRow

FAST, IN_TRITON = "dense:flash-attn-4", "dense:flash-attn-4+triangle:triton"
WORDS = "triangle ran in Triton, dense on flash-attn-4"


@pytest.mark.parametrize(
    ("backends", "dense", "words"),
    [
        (IN_TRITON, FAST, WORDS),
        (IN_TRITON, "", WORDS),
        ("triangle:triton", FAST, WORDS),
        ("triangle:triton", "", ""),
        ("dense:flash-attn-4+triangle:cuda-hopper", FAST, ""),
        ("triangle:cuda-hopper+xattention:torch-blocks", "dense:cudnn", "xattention ran in torch, dense on cudnn"),
        (
            "triangle:triton+vertical_slash:torch-gathered",
            "dense:flash-attn-3",
            "triangle ran in Triton, vertical_slash ran in torch, dense on flash-attn-3",
        ),
        ("vertical_slash:torch-gathered", "dense:triton", "vertical_slash ran in torch, dense in Triton"),
        ("triangle:triton", "dense:triton", ""),
        ("triangle:triton", "dense:sdpa", ""),
        ("triangle:torch-banded+vertical_slash:torch-gathered", "dense:sdpa", ""),
        ("dense:flash-attn-4+window:triton", "dense:flash-attn-4+window:triton", ""),
        ("every_other:mine", FAST, ""),
        ("triangle:triton", "dense:mine", ""),
        (FAST, "", ""),
        ("", "", ""),
    ],
)
def test_what_is_slower(backends, dense, words):
    assert slower_than_dense(backends, dense) == words


def test_the_report_says_so_beside_the_figure_and_below(tmp_path):
    for length, backends in ((4096, IN_TRITON), (8192, "dense:flash-attn-4+triangle:cuda-hopper")):
        add_ttft(tmp_path, "dense", length, 2.0, backends=FAST)
        add_ttft(tmp_path, "tri_mix", length, 1.0, backends=backends)
    add_ttft(tmp_path, "streaming", 4096, 2.0, backends="triangle:triton", interleaved="streaming")
    report = build(tmp_path)
    markdown = report_markdown(report)
    table = table_with(markdown, "4K")
    assert table["dense"]["4K"] == "2.00"
    assert table["tri_mix"]["4K"] == "1.00 (-50 %, slower kind of kernel)"
    assert table["tri_mix"]["8K"] == "1.00 (-50 %)"
    assert table["streaming"]["4K"].endswith(", slower kind of kernel)")
    assert f"- A slower kind of kernel than dense's took part of these times: {WORDS} (" in markdown
    assert "tri_mix at 4K; streaming at 4K)." in markdown
    records = [cell for section in json.loads(report_json(report)) for cell in section["rows"]]
    assert {(one["method"], one["length"], one["slower_kernel"]) for one in records} == {
        ("dense", 4096, ""),
        ("dense", 8192, ""),
        ("tri_mix", 4096, WORDS),
        ("tri_mix", 8192, ""),
        ("streaming", 4096, WORDS),
    }


def test_a_time_without_dense_beside_it_says_so_too(tmp_path):
    add_ttft(tmp_path, "tri_mix", 4096, 1.0, backends=IN_TRITON)
    assert table_with(report_markdown(build(tmp_path)), "4K")["tri_mix"]["4K"] == "1.00 (slower kind of kernel)"


def row(method, backends, **changes):
    times = {"ttft_median_s": 1.0, "samples_s": "1.0 1.0 1.0", "coverage": 0.5, "ttft_over_floor": 1.5}
    about = {"length": 1024, "prompt": "kv", "repeats": 3, "warmup": 1, "interleaved": "dense tri_mix streaming", **times}
    return TtftRow(**made_rows.COMMON | about | {"method": method, "backends": backends} | changes)


def test_the_screen_says_so_beside_the_figure(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    failed = {"ttft_median_s": None, "samples_s": "", "status": OUT_OF_MEMORY, "error": "OutOfMemoryError: no"}
    rows = [row("dense", FAST), row("tri_mix", IN_TRITON), row("streaming", "triangle:triton", **failed)]
    ttft._show(rows)
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.split()}
    assert "slower kind of kernel" in lines["method"]
    assert lines["tri_mix"].rstrip().endswith(WORDS)
    assert "flash-attn" not in lines["dense"]
    assert lines["streaming"].split() == ["streaming", "out", "of", "memory"]
    ttft._show([row("dense", FAST), row("tri_mix", "dense:flash-attn-4+triangle:cuda-hopper")])
    assert "slower kind" not in capsys.readouterr().out

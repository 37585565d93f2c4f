"""The table of whole prefills over their rooflines: what one layer says of the time above."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from report_rows import add_ttft, tables_of
from tmbench.report.report import build

LENGTH, HEADS, DIM, LAYERS = 1024, 2, 4, 3
ALL_PAIRS = LAYERS * 4 * DIM * HEADS * LENGTH * (LENGTH + 1) / 2
ABOUT = {"model": "llama-3.1-8b", "weights": "structured", "device": "nvidia-h200", "matrix_rate_flops": 1e7, "floor_s": 3.0}


@pytest.fixture
def table(monkeypatch, pytestconfig, tmp_path):
    """The table of these rows, beside a layer's selection of half a second and a kernel of half the products' throughput."""
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "benchmarks")
    import roofline_tables

    layer = {"pattern": "xattention", "backend": "triton", "length": str(LENGTH), "heads": str(HEADS), "head_dim": str(DIM)}
    layer |= {"select_ms": "500", "tflops": "5e-6"}
    dense = layer | {"pattern": "dense", "select_ms": ""}

    def made():
        given = SimpleNamespace(results=build(tmp_path), lines=lambda path: [dense, layer])
        (found,) = tables_of(roofline_tables.whole_prefills(given, "1K") + "\n")
        return {line["method"]: line for line in found}

    return made


def test_selections_and_kernels_of_all_layers_are_said(table, tmp_path):
    add_ttft(
        tmp_path,
        "dense",
        LENGTH,
        9.0,
        flop=1e6 + ALL_PAIRS,
        coverage=1.0,
        backends="dense:triton",
        ttft_over_floor=3.0,
        **ABOUT,
    )
    sparse = {"flop": 1e6 + ALL_PAIRS / 4, "coverage": 0.25, "ttft_over_floor": 7 / 3}
    add_ttft(tmp_path, "xattention", LENGTH, 7.0, backends="xattention:triton", **sparse, **ABOUT)
    add_ttft(tmp_path, "tri_mix_xattention", LENGTH, 6.0, backends="triangle:triton+xattention:triton", **sparse, **ABOUT)
    lines = table()
    own = lines["xattention"]
    assert (own["TTFT, s"], own["over roofline"], own["above it, s"]) == ("7.00", "2.33", "4.00")
    assert own["selections, s"] == f"{LAYERS * 0.5:.2f}"
    assert own["kernels, s"] == f"{ALL_PAIRS / 4 / 5e6 - ALL_PAIRS / 4 / 1e7:.2f}"
    for other in ("dense", "tri_mix_xattention"):
        assert (lines[other]["selections, s"], lines[other]["kernels, s"]) == ("-", "-")

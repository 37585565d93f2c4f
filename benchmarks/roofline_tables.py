"""What docs/dynamic-kernels.md says of whole prefills: how near they come to their rooflines, and what they lose."""

from __future__ import annotations

from checkpoint_tables import cell_at
from kernel_tables import DYNAMIC
from sources import EPYC, H200, Block, Line, Sources, line_of, only, tokens

from tmbench.report.table import Table, columns
from tmbench.report.time_intervals import time_text
from tmbench.report.ttft import TtftCell, TtftSection
from tmbench.report.words import NOTHING, significant
from tmbench.report.writers import table_markdown


def whole_prefills(sources: Sources, length: str) -> str:
    """Times of Llama-3.1-8B's geometry over their rooflines, and how much of what lies above is known from one layer.

    Selections take their time in one layer, times the layers. Kernels lose what their pairs take longer at their throughput
    than at that of the matrix products at which the roofline is drawn. Both are known of methods with one dynamic pattern in
    all layers.
    """
    section, count = _timed(sources), int(tokens(length))
    dense = cell_at(section, "dense", count)
    lines = [line for line in sources.lines(DYNAMIC) if line["length"] == str(count)]
    rows = []
    for cell in section.measured():
        if cell.row.length != count:
            continue
        assert cell.row.floor_s is not None
        about = [significant(cell.seconds), f"{cell.row.ttft_over_floor:.2f}", f"{cell.seconds - cell.row.floor_s:.2f}"]
        rows.append([cell.label, *about, *(_lost(cell, dense, lines) or (NOTHING, NOTHING))])
    names = ("method", "TTFT, s", "over roofline", "above it, s", "selections, s", "kernels, s")
    return table_markdown(Table("", columns(*names, texts=("method",)), rows))


def product_rate(sources: Sources, length: str) -> str:
    """The throughput of matrix products at which the rooflines of that table are drawn, TFLOP/s."""
    rate = cell_at(_timed(sources), "dense", int(tokens(length))).row.matrix_rate_flops
    assert rate is not None
    return _tera(rate)


def fastest_products(sources: Sources) -> str:
    """The highest throughput of matrix products in any run on an H200, TFLOP/s."""
    sections = (*sources.results.ttft, *sources.presets.ttft)
    cells = [cell for section in sections if section.setting.device == H200 for cell in section.measured()]
    return _tera(max(cell.row.matrix_rate_flops or 0 for cell in cells))


def cpu_cost(sources: Sources, method: str, length: str) -> str:
    """How much longer or shorter the embedded model's time to first token is than dense attention's on two CPU cores."""
    section = only(sources.results.ttft, device=EPYC, batch_size=1)
    cell = cell_at(section, method, int(tokens(length)))
    assert cell.percent_vs_dense is not None
    return time_text(cell.percent_vs_dense, cell.percent_low, cell.percent_high, cell.verdict)


def _timed(sources: Sources) -> TtftSection:
    """Times of Llama-3.1-8B's geometry with structured weights, on an H200."""
    return only(sources.results.ttft, device=H200, model="llama-3.1-8b", weights="structured", batch_size=1)


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.0f}"


def _lost(cell: TtftCell, dense: TtftCell, lines: list[Line]) -> tuple[str, str] | None:
    """Seconds that selections take and that kernels lose; None where no layer of this pattern was timed alone."""
    pattern, _, backend = cell.row.backends.partition(":")
    if cell.label == "dense" or not any((line["pattern"], line["backend"]) == (pattern, backend) for line in lines):
        return None
    line = line_of(lines, pattern=pattern, backend=backend)
    assert cell.row.flop is not None
    assert dense.row.flop is not None
    assert cell.row.coverage is not None
    assert cell.row.matrix_rate_flops is not None
    whole = (dense.row.flop - cell.row.flop) / (1 - cell.row.coverage)
    pairs = int(line["heads"]) * cell.row.length * (cell.row.length + 1) / 2
    layers = whole / (4 * int(line["head_dim"]) * pairs)
    attention = whole * cell.row.coverage
    kernels = attention / (1e12 * float(line["tflops"])) - attention / cell.row.matrix_rate_flops
    return f"{layers * float(line['select_ms']) / 1000:.2f}", f"{kernels:.2f}"


ROOFLINES: dict[str, Block] = {
    "whole-prefills": whole_prefills,
    "product-rate": product_rate,
    "fastest-products": fastest_products,
    "cpu-cost": cpu_cost,
}

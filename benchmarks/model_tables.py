"""The tables of docs/models.md."""

from __future__ import annotations

from checkpoint_tables import cell_at
from sources import Block, Sources, line_of

from tmbench.report.table import Table, columns
from tmbench.report.time_intervals import time_text
from tmbench.report.ttft import TtftCell
from tmbench.report.words import NOTHING, percent_text, significant
from tmbench.report.writers import table_markdown
from tmbench.results.words import length_name

FAMILIES = "benchmarks/families.csv"
PREFILL_KERNELS = "benchmarks/prefill_kernels.csv"
TIMED = ("tri_mix", "minference", "tri_mix_minference", "tri_mix_flashprefill")


def served(sources: Sources) -> str:
    """How each family is served."""
    names = ("family", "layers", "prompts", "answers", "static cache")
    lines = [line for line in sources.lines(FAMILIES) if not line["refused"]]
    return table_markdown(Table("", columns(*names, texts=names), [[line[name] for name in names] for line in lines]))


def refused(sources: Sources) -> str:
    """Which families are refused, and what the program says."""
    names = ("family", "refused")
    lines = [line for line in sources.lines(FAMILIES) if line["refused"]]
    return table_markdown(Table("", columns(*names, texts=names), [[line[name] for name in names] for line in lines]))


def preset_times(sources: Sources) -> str:
    """Times to first token of presets, and what methods save of them: in operations for ``tri_mix``, and in time."""
    names = ("model", "weights", "tokens", "dense, s", "over roofline", "tri_mix by the roofline", *TIMED)
    rows = []
    for section in sorted(sources.presets.ttft, key=lambda section: section.setting.model):
        for length in sorted({cell.row.length for cell in section.measured("dense")}):
            dense, *others = (cell_at(section, label, length) for label in ("dense", *TIMED))
            assert dense.row.flop is not None
            assert others[0].row.flop is not None
            by_roofline = percent_text(100 * (others[0].row.flop / dense.row.flop - 1), 0)
            times = [significant(dense.seconds), f"{dense.row.ttft_over_floor:.2f}", by_roofline]
            about = [section.setting.model, section.setting.weights, length_name(length)]
            rows.append([*about, *times, *map(against_dense, others)])
    return table_markdown(Table("", columns(*names, texts=("model", "weights", *TIMED)), rows))


def against_dense(cell: TtftCell) -> str:
    """The time against dense's with its interval, and behind a comma the density where that depends on the data."""
    if cell.percent_vs_dense is None or not cell.verdict:
        return NOTHING
    words = time_text(cell.percent_vs_dense, cell.percent_low, cell.percent_high, cell.verdict)
    return words + (f", density {cell.row.coverage:.0%}" if cell.chooses_by_the_data and cell.row.coverage else "")


def preset_kernels(sources: Sources) -> str:
    """What part of a prefill each kind of kernel takes, of kinds that any model has, and how long all takes."""
    lines = sources.lines(PREFILL_KERNELS)
    names = ("model", "method", "length")
    kinds = [kind for kind in dict.fromkeys(line["kind"] for line in lines) if kind != "all"]
    kinds = [kind for kind in kinds if any(float(line["ms"]) for line in lines if line["kind"] == kind)]
    rows = []
    for model, method, length in dict.fromkeys(tuple(line[name] for name in names) for line in lines):
        about = {"model": model, "method": method, "length": length}
        whole = line_of(lines, kind="all", **about)
        shares = [f"{float(line_of(lines, kind=kind, **about)['share']):.1%}" for kind in kinds]
        times = [significant(float(ms) / 1000) for ms in (whole["alone_ms"], whole["ms"])]
        rows.append([model, method, length_name(int(length)), *times, *shares, f"{int(whole['launches']):,}"])
    heads = ("model", "method", "tokens", "TTFT, s", "profiled, s", *kinds, "kernels")
    return table_markdown(Table("", columns(*heads, texts=("model", "method")), rows))


MODEL_TABLES: dict[str, Block] = {
    "families-served": served,
    "families-refused": refused,
    "preset-times": preset_times,
    "preset-kernels": preset_kernels,
}

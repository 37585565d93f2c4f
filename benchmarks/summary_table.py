"""The README's table: what each method takes and keeps."""

from __future__ import annotations

from checkpoint_tables import cell_at
from sources import H100, Block, Sources, only

from tmbench.report.intervals import Difference
from tmbench.report.table import Table, columns
from tmbench.report.words import percent_text, significant
from tmbench.report.writers import table_markdown

LENGTHS = (32768, 131072)
ASKED = {"tri_mix": "tri_mix (layers 4-)"}
"""The setting of a method whose answers stand beside its times: from half the depth on in both."""


def summary(sources: Sources) -> str:
    """Seconds and time against dense of Llama-3.1-8B's geometry, and the embedded model's points against dense."""
    times = sources.structured
    scores = only(sources.results.ruler, device=H100, length=4096)
    rows = []
    for label in times.labels:
        row = [f"`{label}`"]
        for length in LENGTHS:
            cell = cell_at(times, label, length)
            against = "" if cell.percent_vs_dense is None else percent_text(cell.percent_vs_dense, 0)
            row += [f"{significant(cell.seconds)} s", against]
        found = scores.average_differences.get(ASKED.get(label, label))
        row += [f"{found.mean:+.1f}", found.verdict] if isinstance(found, Difference) else ["", ""]
        rows.append(row)
    names = ("method", "TTFT at 32K", "against dense", "TTFT at 128K", "against dense ", "RULER points", "in words")
    return table_markdown(Table("", columns(*names, texts=("method", "in words")), rows))


SUMMARY: dict[str, Block] = {"summary": summary}

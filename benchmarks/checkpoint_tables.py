"""Tables of docs/checkpoint.md, and times in the README."""

from __future__ import annotations

import re
import statistics

from sources import EPYC, H100, ROOT, Block, Sources, only

from ruler_tasks import TASKS
from tmbench.report.table import Table, columns
from tmbench.report.ttft import TtftCell, TtftSection
from tmbench.report.words import percent_text, significant
from tmbench.report.writers import table_markdown
from tmbench.results.predictions import read_predictions
from tmbench.results.rows import ProbeRow
from tmbench.results.words import length_name

OWN = "[benchmarks/checkpoint](../benchmarks/checkpoint/README.md)"
SEARCH = "benchmarks/checkpoint/nvidia-h100-80gb-hbm3/patterns-search.txt"
NO_PEAK = "fits 80 GB, peak not kept"


def costs(sources: Sources) -> str:
    """What each step took in time and memory."""
    own, random = sources.checkpoint, sources.random
    rows = [
        ["TTFT at 32K", *_times(own.ttft[0], 32768), OWN],
        ["TTFT at 128K", *_times(random, 131072), "[report](report.md)"],
    ]
    probed = _probed(sources)
    rows.append(
        [
            "probe at 32K",
            f"{probe_cost(sources, 'seconds')} a prompt",
            _device(probed.device_name),
            _gib(probed.peak_memory_bytes),
            OWN,
        ]
    )
    for method in ("dense", "tri_mix"):
        took = _seconds(method)
        middle = f"{statistics.median(took):.1f} s a sample, the median of {len(took)}"
        ends = f"{took[0]:.1f} to {took[-1]:.1f}"
        rows.append([f"RULER at 128K, {method}", f"{middle}; {ends}", "H100 80 GB", NO_PEAK, OWN])
    printed = f"[what it printed](../{SEARCH})"
    rows.append(["pattern search at 30000 tokens", search_time(sources), "H100 80 GB", NO_PEAK, printed])
    names = ("step", "measured", "on", "memory, peak", "rows")
    return table_markdown(Table("", columns(*names, texts=names), rows))


def _times(section: TtftSection, length: int) -> list[str]:
    dense, sparse = (cell_at(section, label, length) for label in ("dense", "tri_mix"))
    assert sparse.percent_vs_dense is not None
    change = percent_text(sparse.percent_vs_dense, 0)
    peak = max(cell.row.peak_memory_bytes or 0 for cell in (dense, sparse))
    words = f"dense {significant(dense.seconds)} s, tri_mix {significant(sparse.seconds)} s ({change})"
    return [words, _device(dense.row.device_name), _gib(peak)]


def cell_at(section: TtftSection, label: str, length: int) -> TtftCell:
    """The one time of a method at a length."""
    (cell,) = [cell for cell in section.measured(label) if cell.row.length == length]
    return cell


def _device(name: str) -> str:
    return {"NVIDIA H100 80GB HBM3": "H100 80 GB", "NVIDIA H200": "H200"}[name]


def _gib(peak: int | None) -> str:
    return NO_PEAK if not peak else f"{peak / 2**30:.1f} GiB"


def _seconds(method: str, task: str = "*") -> list[float]:
    """How long each sample of RULER at 128K took, the shortest first."""
    folder = ROOT / "benchmarks" / "checkpoint" / H100 / "ruler" / "predictions" / method
    return sorted(one.seconds for path in folder.glob(f"{task}-*.jsonl") for one in read_predictions(path).values())


def sample_time(sources: Sources, what: str, name: str, samples: str = "") -> str:
    """Of RULER at 128K: a method's mean seconds, the range of a task over methods, or a method's hours for many samples."""
    if what == "range":
        took = [one for method in ("dense", "tri_mix") for one in _seconds(method, name)]
        return f"{min(took):.0f} to {max(took):.0f} s"
    mean = statistics.fmean(_seconds(name))
    return f"{mean:.1f}" if what == "mean" else f"{int(samples) * mean / 3600:.1f}"


def _probed(sources: Sources) -> ProbeRow:
    return next(iter(sources.checkpoint.probes[0].layers.values())).row


def probe_cost(sources: Sources, what: str, prompts: str = "1") -> str:
    """Of the probe at 32K: seconds a prompt, minutes for several, or gigabytes of memory at its peak."""
    row = _probed(sources)
    assert row.seconds_per_sample is not None
    assert row.peak_memory_bytes is not None
    texts = {
        "seconds": f"{row.seconds_per_sample:.0f} s",
        "minutes": f"{int(prompts) * row.seconds_per_sample / 60:.0f} minutes",
        "memory": f"{row.peak_memory_bytes / 1e9:.1f} GB",
    }
    return texts[what]


def search_time(sources: Sources) -> str:
    """How long the pattern search took."""
    found = re.search(r"100% 0:(\d\d):(\d\d)", (ROOT / SEARCH).read_text(encoding="utf-8"))
    assert found is not None
    return f"{60 * int(found[1]) + int(found[2])} s"


def published_scores(sources: Sources) -> str:
    """The published RULER table at 128K, Llama-3.1-8B, as this report would show it."""
    lines = {line["task"]: line for line in sources.lines("benchmarks/published/ruler.csv")}
    rows = [[task, lines[task]["samples"], lines[task]["dense"], lines[task]["tri_mix"]] for task in TASKS]
    dense, sparse = (statistics.fmean(float(line[name]) for line in lines.values()) for name in ("dense", "tri_mix"))
    rows.append([f"average of {len(rows)}", "", f"{dense:.1f}", f"{sparse:.1f} ({sparse - dense:+.1f})"])
    return table_markdown(Table("", columns("task", "samples", "dense", "tri_mix", texts=("task",)), rows))


def published_times(sources: Sources) -> str:
    """The published TTFT table in seconds, Llama-3.1-8B on one A100, by thousands of tokens."""
    lines = sources.lines("benchmarks/published/ttft.csv")
    lengths = [name for name in lines[0] if name != "method"]
    rows = [[line["method"], *(line[length] for length in lengths)] for line in lines]
    return table_markdown(Table("", columns("method", *lengths, texts=("method",)), rows))


def time(sources: Sources, section: str, label: str, length: str) -> str:
    """The median seconds of a method, in a section of the report."""
    found = {
        "structured": sources.structured,
        "tiny": only(sources.results.ttft, device=EPYC, batch_size=1),
    }[section]
    (cell,) = [cell for cell in found.measured(label) if length_name(cell.row.length) == length]
    return f"{significant(cell.seconds)} s"


CHECKPOINT: dict[str, Block] = {
    "checkpoint-costs": costs,
    "published-ruler": published_scores,
    "published-ttft": published_times,
    "time": time,
    "sample-time": sample_time,
    "probe-cost": probe_cost,
    "search-time": search_time,
}

"""What stands first of a device: of each model the fastest method that loses nothing measurable, and what is not known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tmbench.report.intervals import GAIN, LOSS, NO_LOSS, Difference
from tmbench.report.table import Table, columns
from tmbench.report.time_intervals import FASTER
from tmbench.report.ttft import TtftCell, TtftSection
from tmbench.report.words import NOTHING, percent_text
from tmbench.results.words import batched, counted, length_name

KEPT = (NO_LOSS, GAIN)
"""The verdicts of a method that loses nothing measurable."""


def summary(sections: Iterable[TtftSection], margin: float) -> Table:
    """A line for each setting that was timed, at its longest prompt; nothing where dense was not timed there.

    A line of prompts in chunks or of second turns says so.
    """
    names = ("model", "prompt", "keeps all, fastest", "break-even", "fastest of all", "not known")
    texts = [name for name in names if name != "prompt"]
    lines = [line for section in sections if (line := _line(section))]
    points = f"{margin:g} {'point' if margin == 1 else 'points'}"
    caption = (
        "The longest prompt that each model was timed with. A method keeps all where a loss of "
        f"{points} in its RULER average is excluded:"
    )
    return Table(caption, columns(*names, texts=texts), lines)


def _line(section: TtftSection) -> list[str] | None:
    length = max((cell.row.length for cell in section.measured()), default=0)
    here = [cell for cell in section.measured() if cell.row.length == length]
    compared = [cell for cell in here if cell.percent_vs_dense is not None]
    if not compared:
        return None
    faster = sorted((cell for cell in compared if cell.verdict == FASTER), key=_percent)
    verdicts = {cell.label: _verdict(section, cell) for cell in compared}
    kept = [cell for cell in faster if verdicts[cell.label] in KEPT]
    return [
        f"{section.setting.model}, {section.setting.weights}{section.setting.read}",
        f"{batched(section.setting.batch_size)}{length_name(length)}",
        _named(kept[0]) if kept else "none" if set(verdicts.values()) == {LOSS} else "not known",
        section.break_even(kept[0].label)[1] if kept else NOTHING,
        _named(faster[0]) + _after(verdicts[faster[0].label]) if faster else "none is faster",
        _unknown(verdicts, len(compared)),
    ]


def _percent(cell: TtftCell) -> float:
    assert cell.percent_vs_dense is not None
    return cell.percent_vs_dense


def _named(cell: TtftCell) -> str:
    return f"{cell.label} ({percent_text(_percent(cell), 0)})"


def _after(verdict: str) -> str:
    return f", {verdict}" if verdict else ", accuracy not measured"


def _verdict(section: TtftSection, cell: TtftCell) -> str:
    """What the scores of a method's settings say; "" where there are none."""
    evidence = section.evidence[cell.label]
    found = evidence.difference if evidence is not None else None
    return found.verdict if isinstance(found, Difference) else ""


def _unknown(verdicts: dict[str, str], compared: int) -> str:
    missing: Sequence[str] = [label for label, verdict in verdicts.items() if not verdict]
    open_ = [label for label, verdict in verdicts.items() if verdict and verdict not in (*KEPT, LOSS)]
    parts = []
    if len(missing) == compared:
        parts.append("what any method keeps")
    elif missing:
        parts.append(f"what {counted(len(missing), 'method')} keep{'s' * (len(missing) == 1)}")
    if open_:
        parts.append(f"whether {counted(len(open_), 'method')} lose{'s' * (len(open_) == 1)}")
    return "; ".join(parts) or "nothing"

"""What ``tmbench tune`` chose, in tables and sentences."""

from __future__ import annotations

from sources import Block, Sources, only

from tmbench.report.tune import TuneSection
from tmbench.report.writers import captioned, filled


def _section(sources: Sources, model: str) -> TuneSection:
    smollm2 = sources.smollm2
    return only([*sources.results.tunes, *(smollm2.tunes if smollm2 else ())], model=model)


def tables(sources: Sources, model: str) -> str:
    """All trials of one search, and what was compared."""
    return "\n\n".join(map(captioned, filled(_section(sources, model).tables())))


def words(sources: Sources, model: str) -> str:
    """What follows from them."""
    return "\n".join(f"- {sentence}" for sentence in _section(sources, model).conclusions())


TUNE: dict[str, Block] = {"tune": tables, "tune-words": words}

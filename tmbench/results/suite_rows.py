"""The rows of suites other than RULER: their kinds, and in what order a report shows their tasks.

They stand here, and not beside the suites, since a report reads them without the text and the tokenizers of these.
"""

from __future__ import annotations

from typing import ClassVar

from tmbench.results.rows import RulerRow


class SuiteRow(RulerRow):
    """A score of ``tmbench suite``: a method on one task at one length. The columns are those of RULER."""


class GraphWalksRow(SuiteRow):
    """Walks over a graph: scores are F1."""

    kind: ClassVar[str] = "graphwalks"
    title: ClassVar[str] = "GraphWalks"
    tasks: ClassVar[tuple[str, ...]] = ("bfs", "parents")


class RulerV2Row(SuiteRow):
    """Retrieval and copying: scores are the share of the references found."""

    kind: ClassVar[str] = "rulerv2"
    title: ClassVar[str] = "RULERv2"
    tasks: ClassVar[tuple[str, ...]] = ("mk_niah_basic", "mv_niah_basic", "copy_nth")


class AggregationRow(SuiteRow):
    """Counting over the whole prompt: scores are the share of the references found."""

    kind: ClassVar[str] = "aggregation"
    title: ClassVar[str] = "Aggregation"
    tasks: ClassVar[tuple[str, ...]] = ("common_words",)


SUITE_ROWS: tuple[type[SuiteRow], ...] = (GraphWalksRow, RulerV2Row, AggregationRow)
"""One class for each suite of ``tmbench suite``, in the order of a report."""

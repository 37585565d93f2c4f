"""The tables of docs/models.md."""

from __future__ import annotations

from sources import Block, Sources

from tmbench.report.table import Table, columns
from tmbench.report.writers import table_markdown

FAMILIES = "benchmarks/families.csv"


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


MODEL_TABLES: dict[str, Block] = {"families-served": served, "families-refused": refused}

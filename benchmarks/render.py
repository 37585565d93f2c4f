"""Renders what the docs say was measured, from committed rows: python benchmarks/render.py, which ``make figures`` runs.

Pages that hold nothing else are written whole. In all others, figures stand between markers that name what is rendered:

    <!-- rows: NAME WORDS -->whatever stands here is rendered anew<!-- /rows -->

A marker at the end of a line makes a table or a paragraph of its own, any other one a part of a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import smollm2_page
from accuracy_figures import FIGURES
from accuracy_tables import ACCURACY
from checkpoint_tables import CHECKPOINT
from claim_tables import CLAIMS
from decoding_tables import DECODING_TABLES
from kernel_pages import page
from kernel_tables import KERNELS
from many_tables import MANY
from matplotlib.figure import Figure
from model_tables import MODEL_TABLES
from probe_figures import PROBE_FIGURES
from roofline_tables import ROOFLINES
from served_tables import SERVED_TABLES
from sources import ROOT, Block, Sources
from summary_table import SUMMARY
from training_figures import TRAINING
from tune_tables import TUNE

from tmbench.report.pictures import figures, save_all
from tmbench.report.writers import report_markdown

PAGES = {
    "attention.csv": "attention.md",
    "dynamic_attention.csv": "dynamic-attention.md",
    "interval_coverage.csv": "interval-coverage.md",
}
"""The pages that are rendered whole, by the CSV that each is rendered from."""
WHOLE = {"report.md", smollm2_page.NAME, *PAGES.values()}
"""All pages that are rendered whole."""
BLOCKS: dict[str, Block] = (
    ACCURACY
    | FIGURES
    | PROBE_FIGURES
    | ROOFLINES
    | SERVED_TABLES
    | CHECKPOINT
    | CLAIMS
    | DECODING_TABLES
    | KERNELS
    | MANY
    | MODEL_TABLES
    | SUMMARY
    | TRAINING
    | TUNE
)
SHOWN = re.compile(r"figures/([^)]*\.png)")
MARKED = re.compile(r"<!-- rows: ([^>]+?) -->(.*?)<!-- /rows -->", re.DOTALL)


def rendered(sources: Sources) -> Iterator[tuple[Path, str]]:
    """Every page with figures, as it must be."""
    docs = ROOT / "docs"
    yield docs / "report.md", report_markdown(sources.results)
    for csv, name in PAGES.items():
        yield docs / name, page(ROOT / "benchmarks" / csv)
    if sources.smollm2 is not None:
        yield docs / smollm2_page.NAME, smollm2_page.page(sources.smollm2, sources.density)
    marked = [path for path in sorted(docs.glob("*.md")) if path.name not in WHOLE]
    for path in (ROOT / "README.md", *marked, ROOT / "tmbench/models/tiny/README.md", ROOT / "training/README.md"):
        yield path, filled(path.read_text(encoding="utf-8"), sources)


def filled(text: str, sources: Sources) -> str:
    """A page with everything between markers rendered anew; raises ValueError for a marker that names nothing."""

    def fill(found: re.Match[str]) -> str:
        name, *words = found[1].split()
        if name not in BLOCKS:
            raise ValueError(f"nothing is rendered under the name {name!r}")
        made = BLOCKS[name](sources, *words)
        edge = "\n" if found[2].startswith("\n") else ""
        return f"<!-- rows: {found[1]} -->{edge}{made}{edge}<!-- /rows -->"

    done, ends = MARKED.subn(fill, text)
    if ends != text.count("<!-- rows:") or ends != text.count("<!-- /rows -->"):
        raise ValueError("a marker of rows has no end, or an end has none")
    return done


def pictures(sources: Sources) -> dict[str, Figure]:
    """The pictures in docs/figures, by the names under which pages show them.

    Raises ValueError for one that no rows draw.
    """
    drawn = figures(sources.results)
    if sources.smollm2 is not None:
        drawn |= smollm2_page.pictures(sources.smollm2, sources.density)
    shown: dict[str, Figure] = {}
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for name in SHOWN.findall(path.read_text(encoding="utf-8")):
            if name not in drawn:
                raise ValueError(f"{path.name} shows {name}, which no rows draw")
            shown[name] = drawn[name]
    return shown


def main() -> None:
    sources = Sources()
    for path, text in rendered(sources):
        path.write_text(text, encoding="utf-8")
        print(f"rendered {path.relative_to(ROOT)}")
    save_all(pictures(sources), ROOT / "docs" / "figures")


if __name__ == "__main__":
    main()

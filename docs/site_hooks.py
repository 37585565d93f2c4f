"""What mkdocs does to the pages: README is the first, and a link to a file that is not on the site becomes its path."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)]*)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add README as index.md, its links those of a page in docs/."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=of_docs(text)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A link that leaves docs/ has no page to lead to."""
    return OUTSIDE.sub(lambda found: f"{found[1]} (`{found[2]}`)", markdown)


def of_docs(text: str) -> str:
    """A text of the root as one of docs/."""
    links = re.compile(r"(\]\(|src=\")(?!https?:|#)(?:\./)?([^)\"]+)")

    def moved(found: re.Match[str]) -> str:
        path = found[2]
        return found[1] + (path.removeprefix("docs/") if path.startswith("docs/") else f"../{path}")

    return links.sub(moved, text)

"""Take the pictures of the report's pages that docs/pages.md shows, in a Chromium: the one that CHROMIUM names, or Debian's.

``.venv/bin/python benchmarks/screenshots.py`` after ``pip install 'tmbench[browser]'``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from tmbench.report.html.pages import written
from tmbench.report.report import build

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "screenshots"
DEVICE, WIDTH, HEIGHT = "nvidia-h100-80gb-hbm3", 1280, 720
SHOWN = {"tasks": ".heat td[aria-label^='flexprefill on cwe']", "trade-off": ".point >> nth=3"}
"""The pages, and what is pointed at on them."""


def main() -> None:
    """Write a picture of each page."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        root, pages = ROOT / "results", Path(folder)
        list(written(build(root), root, pages))
        browser = driver.chromium.launch(executable_path=os.environ.get("CHROMIUM") or shutil.which("chromium"))
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        for name, target in SHOWN.items():
            page.goto((pages / f"{name}.html").as_uri())
            if page.query_selector("select[name=device]"):
                page.select_option("select[name=device]", DEVICE)
            place = page.locator(target).locator("visible=true").first
            place.evaluate("one => one.closest('.block').scrollIntoView()")
            page.evaluate("scrollBy(0, -90)")
            place.hover()
            page.screenshot(path=PICTURES / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main()

"""The pages of a report, written and taken apart."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

from tmbench.report.html.pages import written
from tmbench.report.report import build

HOSTILE = "</script><script>alert(1)</script>]]>\u2028\"'><img src=x onerror=alert(2)>&amp;{{ 7 * 7 }}"
"""A text that would be markup, a script's end or a template wherever it were not taken for a text."""


class Elements(HTMLParser):
    """The elements of a page with their attributes, and its texts."""

    def __init__(self, page):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def named(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def pages_of(root, directory, margin=1.0):
    """The texts of all files that are written, by their names below the folder."""
    list(written(build(root, margin), root, directory))
    return {str(path.relative_to(directory)): path.read_text("utf-8") for path in directory.rglob("*") if path.is_file()}


def data_of(page):
    """What the scripts of a page are given."""
    return json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[0])


def points_of(chart):
    """The points of a chart by the names of their series and their lengths."""
    return {(series["name"], point["length"]): point for series in chart["series"] for point in series["points"]}

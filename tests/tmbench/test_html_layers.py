"""The page of layers shows a probe as its cells have it, and the layers that methods took."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from html_pages import Elements, data_of, pages_of
from report_rows import add_ttft
from tmbench.report.report import build

PROBED = Path(__file__).resolve().parents[2] / "results" / "cpu-intel-xeon-2-cores" / "probe"


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    root = tmp_path_factory.mktemp("probed")
    shutil.copytree(PROBED, root / "cpu-intel-xeon-2-cores" / "probe")
    return root


def test_gradients_and_densities_are_those_of_the_layers(probed, tmp_path):
    (section,) = build(probed).probes
    ((gradients, densities),) = data_of(pages_of(probed, tmp_path)["layers.html"])
    found = {(series["name"], point["x"]): point["y"] for series in gradients["series"] for point in series["points"]}
    shares = {point["x"]: point["y"] for point in densities["series"][0]["points"]}
    assert len(section.layers) == len(shares) == 8
    for layer, cell in section.layers.items():
        own = cell.gradients(section.derivative)
        assert found["streaming", layer] == own.streaming
        assert found.get(("middle", layer), 0.0) == own.middle
        assert found["last", layer] == own.last
        assert shares[layer] == (100 * (cell.row.kept_share or 0) if layer in section.proposed else 100)
    assert [(low + high) / 2 for low, high in gradients["bands"]] == list(section.proposed)
    assert ("middle", 7) not in found, "0 has no place on a logarithmic axis"
    assert shares[7] * 8 < sum(shares.values()) < 800


def test_layers_that_methods_took_are_listed_with_where_they_come_from(tmp_path):
    for length in (4096, 8192):
        add_ttft(tmp_path / "rows", "dense", length, 1.0, coverage=1.0)
        add_ttft(tmp_path / "rows", "tri_mix", length, 1.0, coverage=2048 / length)
    page = Elements(pages_of(tmp_path / "rows", tmp_path / "pages")["layers.html"])
    assert "No layers were probed: tmbench probe does it." in page.texts
    row = ["tri_mix", "a/model", "Some GPU", "16-", "published", "n_init 8, n_local 512, last_n 128", "4K 50.0%, 8K 25.0%"]
    start = page.texts.index("tri_mix")
    assert [text for text in page.texts[start:] if text.strip()][:7] == row

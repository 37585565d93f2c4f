"""The page of SmolLM2 is made of its rows: pictures first, then what is lost where there is something to lose."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from claim_rows import SHAPE, TASKS, ask, lose, probe


@pytest.fixture
def pages(monkeypatch, pytestconfig):
    """Two modules of benchmarks/: the page's, and that of its rows."""
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "benchmarks")
    import render
    import smollm2_page
    import sources

    return SimpleNamespace(page=smollm2_page, render=render, sources=sources)


def test_pictures_are_called_what_they_show(pytestconfig):
    text = (pytestconfig.rootpath / "docs" / "smollm2.md").read_text(encoding="utf-8")
    called = {(kind, words) for words, kind in re.findall(r"!\[(.*?), SmolLM2.*?\]\(figures/(\w+)-", text)}
    assert len(called) == len(dict(called)) == len({words for _, words in called}) >= 4, "one name for each kind"
    assert ("probe", "Gradients by layer") in called


def test_without_rows_there_is_no_page(pages, tmp_path):
    assert pages.sources.Sources(tmp_path).smollm2 is None


@pytest.mark.slow
def test_pictures_come_first_and_methods_are_compared_where_dense_can_do_the_task(pages, tmp_path):
    ask(tmp_path, 0)
    ask(tmp_path, 50, tasks=["qa_2"])
    ask(tmp_path, 60, "tri_mix", [*TASKS, "qa_2"], "half the depth", layers="15-", **SHAPE)
    ask(tmp_path, 0, "streaming", TASKS[:3], n_init=8, n_local=512)
    probe(tmp_path, deep=(0.01, 0.02, 0.03, 5.0))
    lose(tmp_path, {"": (2.0, 1.0), "15-": (2.1, 1.001), "20-": (2.0, 1.5)})
    report = pages.sources.Sources(tmp_path).smollm2
    drawn = pages.page.pictures(report)
    text = pages.page.page(report)
    shown = re.findall(r"\(figures/([^)]*)\)", text)
    assert shown == list(drawn)
    assert [name.partition("-")[0] for name in shown] == ["ruler", "loss", "probe"]
    assert text.index("](figures/") < text.index("\n|"), "pictures first"
    assert "Not measured yet." in text.partition("## At equal density")[2].partition("\n## ")[0]
    about = re.findall(r"^4K, .*", text, flags=re.MULTILINE)
    assert [re.findall(r"\d+ tasks of \d+", line) for line in about] == [["8 tasks of 9"], ["3 tasks of 9"]]
    lines = [line for line in text.partition("## All tables")[0].splitlines() if line.startswith("| tri_mix")]
    assert [cell.strip() for cell in lines[0].split("|")[4:6]] == ["480", "loss"]


@pytest.mark.slow
def test_one_depth_of_losses_makes_no_picture(pages, tmp_path):
    lose(tmp_path, {"": (2.0, 1.0), "15-": (2.1, 1.001)})
    assert not pages.page.pictures(pages.sources.Sources(tmp_path).smollm2)

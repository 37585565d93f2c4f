"""The pages of a report show its figures, take hostile texts for texts, and refer to nothing outside of their folder."""

from __future__ import annotations

import json
import re

import pytest

from html_pages import HOSTILE, Elements, data_of, pages_of, points_of
from report_rows import add_ruler, add_ttft
from tmbench.errors import UserError
from tmbench.report.html.commands import command_of
from tmbench.report.html.pages import PAGES
from tmbench.report.html.text import coded, script_json
from tmbench.report.report import build


def test_times_are_those_of_the_report(tmp_path):
    for length, seconds in ((4096, 2.0), (8192, 5.0)):
        add_ttft(tmp_path / "rows", "dense", length, seconds, coverage=1.0, floor_s=seconds / 2, ttft_over_floor=2.0)
        add_ttft(tmp_path / "rows", "tri_mix", length, seconds / 2, coverage=0.25)
    add_ttft(tmp_path / "rows", "minference", 4096, status="failed", error="no")
    (section,) = build(tmp_path / "rows").ttft
    page = pages_of(tmp_path / "rows", tmp_path / "pages")["times.html"]
    ((times, densities),) = data_of(page)
    points = points_of(times)
    assert {key for key in points if "roofline" not in key[0]} == {
        (cell.label, cell.row.length) for cell in section.measured()
    }
    for cell in section.measured():
        assert points[cell.label, cell.row.length]["y"] == cell.seconds
        assert points_of(densities)[cell.label, cell.row.length]["y"] == 100 * (cell.row.coverage or 0)
    assert points["dense, roofline", 8192]["y"] == 2.5
    assert "-50.0 %" in points["tri_mix", 4096]["words"]
    shown = Elements(page).texts
    assert all(cell in shown for table in section.tables() for row in table.rows for cell in row if cell)
    assert all(note in shown for note in section.notes())


def test_every_row_is_listed_below_the_names_of_its_columns_with_its_command(tmp_path):
    add_ttft(tmp_path / "rows", "dense", 4096, 2.0, commit="c0ffee", dirty=True)
    add_ttft(tmp_path / "rows", "tri_mix", 4096, status="out_of_memory")
    add_ruler(tmp_path / "rows", task="vt", score=12.5)
    page = pages_of(tmp_path / "rows", tmp_path / "pages")["rows.html"]
    names = [text for text in Elements(page).texts if text.strip()]
    names = names[names.index("repeat") + 1 :][:9]
    lines = [dict(zip(names, row["cells"], strict=True)) for row in data_of(page)]
    assert [line["figure"] for line in lines] == ["2.00 s", "out of memory", "12.5"]
    assert [line["method"] for line in lines] == ["dense", "tri_mix", "dense"]
    assert [line["task or prompt"] for line in lines] == ["kv", "kv", "vt"]
    assert {line["device"] for line in lines} == {"Some GPU"}
    assert data_of(page)[0]["more"].startswith("commit c0ffee, edited")
    commands = [row["command"] for row in data_of(page)]
    rows = [cell.row for section in build(tmp_path / "rows").sections for cell in section.cells]
    assert commands == [command_of(row).text for row in rows]


def test_what_ran_where_is_told_with_its_commit(tmp_path):
    add_ttft(tmp_path / "rows", "dense", 4096, 2.0, commit="c0ffee", dirty=True)
    add_ttft(tmp_path / "rows", "dense", 8192, 2.0, commit="beef", time="2026-01-03T00:00:00+00:00")
    add_ruler(tmp_path / "rows", commit="beef")
    texts = Elements(pages_of(tmp_path / "rows", tmp_path / "pages")["index.html"]).texts
    assert "c0ffee (edited)" in texts
    assert "3 rows of results. Each page below shows a part of them." in texts
    line = texts[: texts.index("beef")][-11:]
    assert [text for text in line if text.strip()][:4] == ["Some GPU", "a/model", "2", "2026-01-01 to 2026-01-03"]


def test_a_hostile_text_stays_a_text(tmp_path):
    add_ttft(tmp_path / "rows", "dense", 4096, 1.0, model=HOSTILE, device_name=HOSTILE, prompt=HOSTILE, commit=HOSTILE)
    add_ttft(tmp_path / "rows", "tri_mix", 4096, model=HOSTILE, status="failed", error=HOSTILE, prompt=HOSTILE)
    for name, page in pages_of(tmp_path / "rows", tmp_path / "pages").items():
        if name.endswith(".html"):
            elements = Elements(page)
            assert not elements.named("img")
            scripts = elements.named("script")
            assert all(set(script) in ({"src"}, {"type", "id"}) for script in scripts)
            assert not [key for _, attributes in elements.found for key in attributes if key.startswith("on")]
            assert ("alert(1)" in page) == (name in ("index.html", "times.html", "rows.html"))
            assert "49" not in page


@pytest.mark.parametrize("text", [HOSTILE, "<!--", "\ud800", "\u2029"])
def test_json_in_a_script_holds_no_markup(text):
    written_text = script_json({"text": text, "none": float("nan")})
    assert json.loads(written_text) == {"text": text, "none": None}
    assert written_text.isascii()
    assert not set("<>&") & set(written_text)


def test_code_in_a_note_is_code_and_nothing_else_is_markup():
    assert str(coded("use `a <b>` & <i>")) == "use <code>a &lt;b&gt;</code> &amp; &lt;i&gt;"


def test_nothing_refers_to_another_place(tmp_path):
    add_ttft(tmp_path / "rows", "dense", 4096, 1.0)
    for name, text in pages_of(tmp_path / "rows", tmp_path / "pages").items():
        assert not re.search(r"https?:|url\(|@import|//[a-z]+\.", text), name
        for _, attributes in Elements(text).found if name.endswith(".html") else ():
            for target in (attributes.get("src"), attributes.get("href")):
                assert target is None or target.startswith(("#", "data:,")) or (tmp_path / "pages" / target).is_file()


def test_a_page_without_anything_says_so_in_one_sentence(tmp_path):
    add_ruler(tmp_path / "rows")
    pages = pages_of(tmp_path / "rows", tmp_path / "pages")
    (times,) = [page for page in PAGES if page.name == "times"]
    assert times.nothing in Elements(pages["times.html"]).texts
    assert times.nothing.count(". ") == 0
    assert not Elements(pages["times.html"]).named("script")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no results under"):
        build(tmp_path / "none")


def test_the_command_takes_the_place_of_the_text(tmbench, tmp_path):
    add_ttft(tmp_path / "results", "dense", 4096, 1.0)
    code, out, err = tmbench("report", "--html", "pages")
    assert (code, out) == (0, "")
    assert "wrote pages/index.html" in err
    code, out, _ = tmbench("report", "--html", "pages", "--output", "report.md")
    assert (tmp_path / "report.md").read_text().startswith("# tmbench report")
    code, _, err = tmbench("report", "--html", "pages", "--format", "csv")
    assert code == 2
    assert "--format csv needs a file of its own: add --output" in err
    (tmp_path / "file").write_text("")
    code, _, err = tmbench("report", "--html", "file/pages")
    assert code == 2
    assert "--html" in err

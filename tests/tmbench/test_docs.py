"""What the docs say was measured is what committed rows say: rendering anew changes no page."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "training/README.md", *ROOT.glob("tmbench/*/*/*.md"))


@pytest.fixture(scope="module")
def render():
    """benchmarks/render.py as a module, with its neighbours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import render

        yield render


@pytest.fixture(scope="module")
def sources(render):
    return render.Sources()


@pytest.mark.slow
def test_rendering_changes_no_page(render, sources):
    pages = dict(render.rendered(sources))
    assert {"report.md", "accuracy.md", "attention.md"} <= {path.name for path in pages}
    assert {ROOT, ROOT / "training", ROOT / "tmbench/models/tiny"} <= {
        path.parent for path in pages if path.stem == "README"
    }
    for path, text in pages.items():
        assert text == path.read_text(encoding="utf-8"), f"{path} is not as rendered: run make figures"


def test_a_figure_that_was_typed_over_is_rendered_anew(render, sources):
    text = "a <!-- rows: kernel ms 128K triangle cuda-hopper -->9.99<!-- /rows --> b"
    assert render.filled(text, sources) == text.replace("9.99", "2.71")


@pytest.mark.parametrize(
    ("marker", "error"),
    [
        ("lost 4K minference 1", "minference at 4K loses nothing"),
        ("points 4K tri_mix", "5 methods are tri_mix"),
        ("points 4K tri_mix:1,2", "0 methods are tri_mix:1,2"),
        (
            "hopper-against-flash-attn 128K xattention flex_prefill",
            "some of xattention, flex_prefill take longer and some do",
        ),
        ("more-than-window 2K", "takes no longer than its window"),
        ("even-share 64K", "no one share from which on skip-softmax is faster"),
        ("skipping-times 128K 50% cuda-hopper", "0 lines have"),
    ],
)
def test_a_figure_that_its_sentence_would_belie_is_refused(render, sources, marker, error):
    with pytest.raises(ValueError, match=error):
        render.filled(f"a <!-- rows: {marker} -->1<!-- /rows --> b", sources)


def cells_of(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def skipping(hopper_ms, dense_ms=(10.0, 10.0, 10.0)):
    """``Sources`` of made lines, at 1K with none, half and all of the tiles skipped."""
    lines = []
    for skipped, hopper, dense in zip(("0.0000", "0.5004", "0.9983"), hopper_ms, dense_ms, strict=True):
        for backend, ms in (("cuda-hopper", hopper), ("cuda-hopper, common barrier", 12.5), ("triton", 20.0), ("x", dense)):
            pattern = "dense" if backend == "x" else "skip_softmax"
            about = {"pattern": pattern, "backend": backend, "length": "1024", "skipped": skipped}
            lines.append(about | {"ms_median": str(ms), "difference": "0.001"})
    return SimpleNamespace(lines=lambda path: lines)


def test_a_share_of_skipped_tiles_says_how_many_times_faster_that_is(render):
    made = skipping((12.0, 8.0, 4.0))
    table = cells_of(render.BLOCKS["skipped-tiles"](made))
    assert table[1] == ["1K", "50.0%", "10.0", "8.00", "1.25", "0.80", "0.50"]
    assert [line[1] for line in table] == ["0.0%", "50.0%", "99.8%"]
    text = "<!-- rows: skipping-times 1K 50.0% cuda-hopper, common barrier -->?<!-- /rows -->"
    assert ">0.80<" in render.filled(text, made)
    assert render.BLOCKS["even-share"](made, "1K") == "25 %"


def test_a_correction_is_held_against_what_its_pairs_would_take_at_dense_attentions_rate(render):
    import kernel_tables

    def line(what, ms, pairs="", backend="", carried_by=""):
        about = {"what": what, "ms_median": str(ms), "pairs": str(pairs), "backend": backend, "carried_by": carried_by}
        return about | {"length": "1024", "times_triangle": str(ms / 2), "added": "0.0154"}

    rows = [line("rows", 4.0, 20, "cuda-hopper"), line("rows", 5.5, 20, "triton")]
    wholes = [line("carry", 7.0, 30, "cuda-hopper", "triton"), line("carry", 10.0, 30, "triton", "torch")]
    steps = [line("differences", 0.75, carried_by="triton"), line("differences", 2.5, carried_by="torch")]
    lines = [line("dense", 200.0, 1000, "x"), line("triangle", 2.0, 10, "cuda-hopper"), *rows, *wholes, *steps]
    made = SimpleNamespace(lines=lambda path: lines)
    expected = ["1K", "2.00", "7.00", "4.00", "0.750", "10.0", "5.50", "2.50", "3.5"]
    assert cells_of(kernel_tables.corrections(made)) == [expected]
    assert [kernel_tables.corrected(made, figure, "1K") for figure in ("times", "added", "least")] == ["3.5", "1.5 %", "3.0"]
    with pytest.raises(ValueError, match="0 lines have"):
        kernel_tables.corrections(SimpleNamespace(lines=lambda path: lines[:-1]))


@pytest.mark.parametrize("hopper_ms", [(9.0, 8.0, 4.0), (12.0, 11.0, 10.5), (12.0, 8.0, 11.0), (9.0, 11.0, 12.0)])
def test_a_share_where_dense_attention_is_overtaken_is_the_only_one(render, hopper_ms):
    with pytest.raises(ValueError, match="at 1K there is no one share"):
        render.BLOCKS["even-share"](skipping(hopper_ms), "1K")


def test_what_the_page_of_kernels_says_of_skip_softmax_is_what_its_rows_say(sources):
    """In words that no marker renders."""
    lines = sources.lines("benchmarks/skip_softmax.csv")
    by_point: dict[tuple[str, str], dict[str, float]] = {}
    for line in lines:
        by_point.setdefault((line["length"], line["skipped"]), {})[line["backend"]] = float(line["ms_median"])
    for (_, skipped), ms in by_point.items():
        assert (ms["cuda-hopper"] < ms["flash-attn-4"]) == (float(skipped) > 0.45)
        assert ms["triton"] > ms["flash-attn-4"]
        assert ms["cuda-hopper"] < ms["cuda-hopper, common barrier"] < ms["triton"]
    for tried in ("cuda-hopper, in turns", "cuda-hopper, three stages of values"):
        assert sum(ms[tried] > ms["cuda-hopper"] for ms in by_point.values()) > 0.75 * len(by_point)
    for about in lines:
        assert (about["heads"], about["kv_heads"], about["head_dim"], about["dtype"]) == ("32", "8", "128", "bfloat16")
        assert about["device"] == "NVIDIA H200"


def test_chunks_tell_selection_and_launches_where_rows_do(render):
    about = {"pattern": "xattention", "backend": "triton", "length": "131072", "prompt_length": "", "pairs": "100"}
    one = about | {"chunk": "131072", "ms_median": "10", "times_one_piece": "1.000"}
    many = about | {"chunk": "8192", "ms_median": "12.5", "times_one_piece": "1.200", "pairs": "150"}

    def table(*lines):
        return cells_of(render.BLOCKS["in-chunks"](SimpleNamespace(lines=lambda path: lines)))

    begin = ["xattention", "`triton`", "8K of 128K", "10.0", "12.5"]
    assert table(one, many) == [[*begin, "1.50", "1.20"]]
    apart = one | {"select_ms": "2", "wall_ms": "10.1"}, many | {"select_ms": "3", "wall_ms": "14.5"}
    assert table(*apart) == [[*begin, "14.5", "2.00", "3.00", "1.50", "1.20"]]
    untold = apart[1] | {"ms_median": "", "select_ms": "", "times_one_piece": ""}
    assert table(apart[0], untold) == [[*begin[:-1], "-", "14.5", "2.00", "-", "1.50", "-"]]


def test_kinds_of_kernels_are_parts_of_a_prefill(render):
    about = {"model": "a", "method": "dense", "length": "65536", "alone_ms": "1990"}
    parts = {"attention": ("1200", "0.6", "6"), "selection": ("0", "0", "0"), "idle": ("100", "0.05", "0")}
    parts["all"] = ("2000", "1", "1234")
    lines = [about | {"kind": kind, "ms": ms, "share": share, "launches": n} for kind, (ms, share, n) in parts.items()]
    table = render.BLOCKS["preset-kernels"](SimpleNamespace(lines=lambda path: lines))
    assert "selection" not in table
    assert cells_of(table) == [["a", "dense", "64K", "1.99", "2.00", "60.0%", "5.0%", "1,234"]]


def test_no_name_of_a_figure_stands_for_two(render):
    names = (
        "ACCURACY", "FIGURES", "PROBE_FIGURES", "CHECKPOINT", "CLAIMS", "DECODING_TABLES", "KERNELS", "MANY",
        "MODEL_TABLES", "ROOFLINES", "SERVED_TABLES", "SUMMARY", "TRAINING", "TUNE",
    )  # fmt: skip
    tables = [getattr(render, name) for name in names]
    assert sum(map(len, tables)) == len(render.BLOCKS)


def test_every_name_of_a_figure_is_on_a_page(render):
    marked = [name.split()[0] for page in PAGES for name, _ in render.MARKED.findall(page.read_text(encoding="utf-8"))]
    assert set(render.BLOCKS) <= set(marked)


@pytest.mark.parametrize("text", ["<!-- rows: nonsense -->\n<!-- /rows -->", "<!-- rows: intervals -->", "<!-- /rows -->"])
def test_a_marker_that_names_nothing_or_has_no_end_is_refused(render, sources, text):
    with pytest.raises(ValueError, match=r"nothing is rendered under the name|a marker of rows has no end"):
        render.filled(text, sources)


def test_no_line_of_a_sentence_begins_with_a_marker():
    """Markdown would take the line out of its paragraph."""
    for page in PAGES:
        lines = page.read_text(encoding="utf-8").splitlines()
        assert all(re.fullmatch(r"<!-- [^>]* -->", line) for line in lines if line.startswith("<!--")), page.name


@pytest.mark.slow
def test_pictures_are_those_that_pages_show(render, sources, monkeypatch):
    kept = {path.name for path in (ROOT / "docs" / "figures").glob("*.png")}
    assert kept
    assert kept == set(render.pictures(sources))
    monkeypatch.setattr(render, "SHOWN", re.compile("(tmbench)"))
    with pytest.raises(ValueError, match=r"README\.md shows tmbench, which no rows draw"):
        render.pictures(sources)


def test_tables_of_figures_stand_between_markers(render):
    """A table outside of markers has words in it, or figures that nobody measured: those that are so are named here."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        if page.name in render.WHOLE:
            continue
        text = render.MARKED.sub("", page.read_text(encoding="utf-8"))
        for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
            cells = [cell.strip() for line in table.splitlines()[2:] for cell in line.split("|")[1:-1]]
            figures = [cell for cell in cells if re.fullmatch(r"[-+]?[0-9][0-9.,]*( ?%| ms| s| GiB)?( \(.*\))?", cell)]
            assert not figures, f"{page.name} has a table of figures outside of markers: {figures}"

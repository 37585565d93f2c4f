"""Methods at one density: a search that finds it, and a page that says of its rows who chooses badly."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from claim_rows import ask

ORACLE = {"coverage": 0.3, "p": 0.9}
LIKE = {"coverage": 0.31, "like": "xattention:stride=16:threshold=0.8:first_chunk=0"}
XATTENTION = {"coverage": 0.31, "stride": 16, "threshold": 0.8, "first_chunk": 0}


@pytest.fixture
def modules(monkeypatch, pytestconfig):
    """Three modules of benchmarks/: the search, the tables, and where their rows are read."""
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "benchmarks")
    import density_tables
    import equal_density
    import sources

    return SimpleNamespace(search=equal_density, tables=density_tables, sources=sources)


def report(modules, root):
    return modules.sources.Sources(density_rows=root).density


def table(text):
    """The lines of the table by method and setting."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {(line[0], line[1]): line[2:] for line in cells[1:]}


def test_without_rows_the_page_says_so(modules, tmp_path):
    assert report(modules, tmp_path) is None
    assert modules.tables.text(None).endswith("\n\nNot measured yet.")


def test_a_method_below_its_oracle_chooses_badly(modules, tmp_path):
    ask(tmp_path, 0, coverage=1.0)
    ask(tmp_path, 0, "oracle_blocks", **ORACLE)
    ask(tmp_path, 1, "oracle_blocks", **LIKE)
    ask(tmp_path, 30, "xattention", **XATTENTION)
    ask(tmp_path, 40, "streaming", coverage=0.29, n_init=8, n_local=600)
    ask(tmp_path, 20, "skip_softmax", coverage=0.65, threshold=0.5)
    ask(tmp_path, 10, "flashprefill", ["vt"], coverage=0.3, alpha=0.2)
    text = modules.tables.text(report(modules, tmp_path))
    found = table(text)
    settings = ["-", "p 0.9", f"like {LIKE['like']}", "threshold 0.5", "threshold 0.8", "n_local 600"]
    assert [setting for _, setting in found] == settings, "the best score first, and what is not a default"
    assert found["xattention", "threshold 0.8"][:2] == ["31.0%", "50.0"]
    assert found["xattention", "threshold 0.8"][2].startswith("-50.00 (")
    assert found["xattention", "threshold 0.8"][3].startswith("-48.33 (")
    assert [line[4] for line in found.values()] == ["-", "-", "p", "-", "like", "p"]
    assert "At 30% no loss of the oracle is measurable against dense attention, +0.00 (" in text
    assert "Surely below their oracles' scores, so that they choose badly: `xattention` and `streaming`." in text
    assert "Of another density, and so against no oracle: `skip_softmax` (65%)." in text
    assert "Not every task is there of `flashprefill`." in text
    (name,) = modules.tables.pictures(report(modules, tmp_path))
    assert re.findall(r"\(figures/([^)]*)\)", text) == [name]


def test_every_density_has_a_table_and_a_method_is_in_the_nearest(modules, tmp_path):
    ask(tmp_path, 0, coverage=1.0)
    for density, p, n_local in ((0.3, 0.9, 600), (0.45, 0.95, 900)):
        ask(tmp_path, 0, "oracle_blocks", coverage=density, p=p)
        ask(tmp_path, 20, "streaming", coverage=density + 0.01, n_init=8, n_local=n_local)
    ask(tmp_path, 20, "flashprefill", coverage=0.41, alpha=1.0)
    text = modules.tables.text(report(modules, tmp_path))
    sparse, dense = text.split("smollm2 at 4K, about ")[1:]
    assert [name for name, _ in table(sparse)] == ["dense", "oracle_blocks", "streaming"]
    assert [name for name, _ in table(dense)] == ["dense", "oracle_blocks", "flashprefill", "streaming"]
    assert "against no oracle: `flashprefill` (41%)." in sparse, "it stands before the second table"
    assert len(modules.tables.pictures(report(modules, tmp_path))) == 2


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (30, "the oracle of one share is surely below dense attention, -50.00"),
        (2, "it is open whether the oracle loses against dense"),
    ],
)
def test_an_oracle_that_others_surpass_says_nothing_of_the_budget(modules, tmp_path, wrong, words):
    ask(tmp_path, 0, coverage=1.0)
    ask(tmp_path, wrong, "oracle_blocks", ["vt"] if wrong == 2 else ["vt", "fwe"], **ORACLE)
    ask(tmp_path, 0, "streaming", coverage=0.3, n_init=8, n_local=600)
    text = modules.tables.text(report(modules, tmp_path))
    assert f"At 30% {words}" in text
    assert ("Surely above: `streaming`." in text) == (wrong == 30)
    assert "No method is surely below the oracle's score." in text
    assert "the budget itself does not do" not in text


def test_a_budget_does_not_do_where_the_oracle_loses_and_all_with_it(modules, tmp_path):
    ask(tmp_path, 0, coverage=1.0)
    ask(tmp_path, 30, "oracle_blocks", ["vt", "fwe"], **ORACLE)
    ask(tmp_path, 30, "streaming", ["vt", "fwe"], coverage=0.3, n_init=8, n_local=600)
    text = modules.tables.text(report(modules, tmp_path))
    assert "At 30% the oracle is surely below dense attention, -50.00" in text
    assert "the budget itself does not do." in text


def test_a_bisection_ends_near_the_target_or_at_the_nearest(modules):
    search, asked = modules.search, []

    def measure(value):
        asked.append(value)
        return search.Setting(f"{value}", 1 / value, 1 / value)

    falling = search.Search("x", 100, 1, logarithmic=True)
    best, value = search.bisected(falling, measure, 0.3)
    assert abs(best.density - 0.3) < search.NEAR
    assert value == pytest.approx(1 / 0.3, rel=0.01)
    assert len(asked) == len(set(asked)) <= search.STEPS
    best, value = search.bisected(search.Search("x", 10, 1, whole=True), measure, 0.01)
    assert (best.density, value) == (0.1, 10), "no value reaches it"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["dense_blocks"], "the density of dense_blocks is not searched"),
        (["xattention", "--like", "flashprefill"], "--like flashprefill is for an oracle"),
        (["xattention", "--target", "1.5"], "--target 1.5 is a share"),
    ],
)
def test_bad_input_is_one_sentence(modules, monkeypatch, capsys, tmp_path, words, error):
    monkeypatch.setattr("sys.argv", ["equal_density.py", *words, "--output-dir", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        modules.search.main()
    assert ended.value.code == 2
    assert error in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["streaming"], r"streaming:n_local=\d+"),
        (["streaming:delta=64"], r"streaming:delta=64,n_local=\d+"),
        (["oracle_blocks", "--like", "flexprefill"], r"oracle_blocks:like=flexprefill:min_budget=128:gamma=0\.\d+"),
        (["tri_mix_minference"], r"tri_mix_minference:patterns=.*/patterns/times-0\.\d+\.json"),
    ],
)
def test_what_is_asked_has_the_density_that_was_searched(modules, monkeypatch, capsys, tmp_path, words, asked):
    """Of the embedded model on a CPU: the last line of the search is the density of rows."""
    from tmbench.results.rows import RulerRow
    from tmbench.results.tables import csv_paths, read

    monkeypatch.setattr("sys.argv", [
        "equal_density.py", *words, "--output-dir", str(tmp_path), "--model", "tiny", "--dtype", "float32",
        "--length", "1024", "--samples", "1", "--batch-size", "1", "--target", "0.6", "--data-dir", str(tmp_path),
    ])  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        modules.search.main()
    assert ended.value.code == 0
    (found,) = re.findall(rf"^({asked}): density ([\d.]+)%", capsys.readouterr().out, flags=re.MULTILINE)
    rows = [row for path in csv_paths(tmp_path, RulerRow) for row in read(path, RulerRow)]
    assert [row.task for row in rows] == list(modules.search.TASKS)
    counted = [row.coverage for row in rows if row.coverage is not None]
    assert float(found[1]) == pytest.approx(100 * sum(counted) / len(rows), abs=0.01)
    assert abs(float(found[1]) - 60) < 5

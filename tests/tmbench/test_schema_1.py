"""Files of schema 1 are read for ever, never written to, and what they hold is not measured again."""

from __future__ import annotations

import csv
import os
from dataclasses import replace
from pathlib import Path

import pytest

import made_rows
from old_files import write_schema_1
from tmbench.results import schema_1
from tmbench.results.parameters_text import parse_parameters
from tmbench.results.predictions import kept_predictions
from tmbench.results.rows import SCHEMA_VERSION, AgreeRow, LossRow, ProbeRow, RulerRow, TtftRow
from tmbench.results.tables import (
    CorruptResultsError,
    OpenEndResultsError,
    append,
    csv_path,
    newest,
    prepare,
    read,
    read_all,
)

ROOT = Path(__file__).parents[2]
COMMITTED = [ROOT / "results", ROOT / "benchmarks/checkpoint", ROOT / "benchmarks/probes"]
KINDS = (TtftRow, RulerRow, AgreeRow, ProbeRow, LossRow)
LATER = "2026-01-02T00:00:00+00:00"
COMMON = made_rows.COMMON | {"method": "tri_mix", "length": 4096}
TTFT = TtftRow(**COMMON, prompt="kv", repeats=3, warmup=1, interleaved="dense", ttft_median_s=0.5,
               parameters="layers=16- n_init=8 n_local=512 last_n=128", layers_source="published")  # fmt: skip
RULER = RulerRow(**COMMON, task="vt", samples=20, wording="own", wording_hash="f00d", source="noise", chat_template=False,
                 score=12.5, predictions="predictions/tri_mix/vt-4096-3.jsonl",
                 parameters="layers=5,7,10-15 n_init=8 n_local=512 last_n=128 dense_backend=sdpa")  # fmt: skip


def old_path(root, row):
    return csv_path(root, type(row), row.device, row.method)


def committed():
    """Every committed file of results with its rows, by kind."""
    for root in COMMITTED:
        for kind in KINDS:
            for path in sorted(root.glob(f"*/{kind.kind}/*.csv")):
                yield path, kind


@pytest.mark.parametrize(("path", "kind"), list(committed()), ids=lambda value: getattr(value, "kind", None) or value.stem)
def test_every_line_of_a_committed_file_becomes_the_row_that_it_says(path, kind):
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    if "parameters" in lines[0]:
        pytest.skip("of today's schema")
    found = read(path, kind)
    assert len(found) == len(lines) > 0
    for row, texts in zip(found, lines, strict=True):
        own = dict(row.settings)
        layers = own.pop("layers", "")
        start, listed = texts["starting_layer"], texts.get("layers", "")
        first, _, last = listed.partition("-")
        assert layers == (f"{start}-" if start else first if first == last else listed)
        assert own == {name: hint_of(name)(texts[name]) for name in schema_1.TYPES if texts.get(name) and name not in LAYERS}
        assert row.layers_source == texts["starting_layer_source"]
        assert row.schema_version == SCHEMA_VERSION
        for name in set(texts) - set(schema_1.TYPES) - {"schema_version", "starting_layer_source"}:
            value = getattr(row, name)
            assert value == type(value)(texts[name]) if isinstance(value, int | float) and not isinstance(value, bool) else (
                {"yes": True, "no": False, "": None}.get(texts[name], texts[name]) in (value, None if value == "" else value)
            )  # fmt: skip


LAYERS = ("starting_layer", "layers")


def hint_of(name):
    return next(
        kind for kind in (int, float, str) if kind in getattr(schema_1.TYPES[name], "__args__", (schema_1.TYPES[name],))
    )


def test_committed_files_are_of_schema_1_and_have_rows_of_every_kind():
    """Or the test above would have nothing to read."""
    kinds = {kind.kind for path, kind in committed() if "starting_layer" in path.read_text().partition("\n")[0]}
    assert kinds == {kind.kind for kind in KINDS}


def test_names_of_files_of_samples_are_those_that_the_rows_name():
    """Those of the committed rows whose own hash they hold: of the others, the model was measured under another key."""
    rows = [row for root in COMMITTED for row in read_all(root, RulerRow)]
    named = [row for row in rows if kept_predictions(ROOT, row).name == row.predictions]
    assert len(named) > 300
    assert {"tri_mix", "flexprefill", "tri_mix_minference"} <= {row.method for row in named}


@pytest.mark.parametrize("row", [TTFT, RULER], ids=lambda row: row.kind)
def test_an_old_row_is_found_under_todays_key_and_its_file_stays(tmp_path, row):
    path = write_schema_1(old_path(tmp_path, row), row)
    before = path.read_bytes()
    assert read(path, type(row)) == [row]
    assert newest(tmp_path, type(row), row.device, "tri_mix") == {row.key: row}
    other = replace(row, seed=7)
    beside = append(tmp_path, other)
    assert beside.name == "tri_mix.schema2.csv"
    assert append(tmp_path, replace(row, seed=8)) == beside
    assert path.read_bytes() == before
    assert read_all(tmp_path, type(row)) == [row, other, replace(row, seed=8)]
    assert list(newest(tmp_path, type(row), row.device, "tri_mix")) == [row.key, other.key, replace(row, seed=8).key]
    assert sorted(file.name for file in path.parent.iterdir()) == ["tri_mix.csv", "tri_mix.schema2.csv"]


def test_of_the_same_key_in_both_the_newer_row_counts(tmp_path):
    path = write_schema_1(old_path(tmp_path, TTFT), TTFT)
    again = replace(TTFT, time=LATER, ttft_median_s=0.25)
    append(tmp_path, again)
    assert read_all(tmp_path, TtftRow) == [again]
    assert newest(tmp_path, TtftRow, TTFT.device, "tri_mix") == {TTFT.key: again}
    # An older tmbench that measures once more writes into its own file.
    latest = replace(TTFT, time="2026-01-03T00:00:00+00:00", ttft_median_s=0.75)
    write_schema_1(path, TTFT, latest)
    assert read_all(tmp_path, TtftRow) == [latest]
    assert newest(tmp_path, TtftRow, TTFT.device, "tri_mix") == {TTFT.key: latest}


def test_a_method_without_an_old_file_has_one_file(tmp_path):
    assert append(tmp_path, TTFT).name == "tri_mix.csv"
    assert append(tmp_path, replace(TTFT, seed=7)).name == "tri_mix.csv"
    prepare(tmp_path, TtftRow, TTFT.device, "dense")
    assert sorted(path.name for path in old_path(tmp_path, TTFT).parent.iterdir()) == ["dense.csv", "tri_mix.csv"]


@pytest.mark.parametrize("lacking", [(), tuple(set(schema_1.ADDED) - {"coverage", "layers", "dense_backend"})])
def test_what_is_prepared_lies_beside_an_old_file(tmp_path, lacking):
    path = write_schema_1(old_path(tmp_path, TTFT), TTFT, lacking=lacking)
    before = path.read_bytes()
    prepare(tmp_path, TtftRow, TTFT.device, "tri_mix")
    assert path.read_bytes() == before
    assert path.with_name("tri_mix.schema2.csv").read_text() == ",".join(TtftRow.columns()) + "\n"
    assert read_all(tmp_path, TtftRow) == [TTFT]


@pytest.mark.parametrize("column", ["patterns", "model", "coverage"])
def test_only_an_added_column_may_be_absent(tmp_path, column):
    path = write_schema_1(old_path(tmp_path, TTFT), TTFT, lacking=(column,))
    before = path.read_bytes()
    for refused in (lambda: read(path, TtftRow), lambda: append(tmp_path, TTFT)):
        with pytest.raises(CorruptResultsError, match="its columns differ"):
            refused()
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("cut", [1, 3, 40])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_an_old_file_that_was_cut_or_saved_elsewhere_is_read_and_left_alone(tmp_path, cut, mark, end):
    path = write_schema_1(old_path(tmp_path, RULER), RULER, replace(RULER, seed=7))
    content = mark + path.read_bytes().replace(b"\n", end)
    path.write_bytes(content)
    assert read(path, RulerRow) == [RULER, replace(RULER, seed=7)]
    os.truncate(path, len(content) - cut - len(end))
    before = path.read_bytes()
    try:
        assert read(path, RulerRow) == [RULER]
        append(tmp_path, replace(RULER, seed=8))
        assert [row.seed for row in read_all(tmp_path, RulerRow)] == [42, 8]
    except OpenEndResultsError:
        pass  # its last value may be the beginning of a longer one, so nothing is taken from it
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("column", "text", "reason"),
    [
        ("starting_layer", "-2", "starting_layer is -2, less than 0"),
        ("n_init", "many", "n_init is 'many', not a number"),
        ("gamma", "1.5", "gamma is 1.5, more than 1"),
        ("gamma", "nan", "gamma is nan, not a finite number"),
        ("length", "0", "length is 0, less than 1"),
        ("schema_version", "2", "line 2: schema_version is 2, where its columns are of 1"),
        ("schema_version", "0", "schema_version is '0', which is none"),
    ],
)
def test_a_damaged_old_row_is_named_with_its_column(tmp_path, column, text, reason):
    path = write_schema_1(old_path(tmp_path, TTFT), TTFT)
    lines = list(csv.reader(path.read_text().splitlines()))
    lines[1][lines[0].index(column)] = text
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
    with pytest.raises(CorruptResultsError, match=reason):
        read_all(tmp_path, TtftRow)


def test_a_header_alone_and_a_cut_one(tmp_path):
    path = write_schema_1(old_path(tmp_path, TTFT), TTFT)
    header = path.read_text().partition("\n")[0]
    path.write_text(header + "\n")
    assert read(path, TtftRow) == []
    assert append(tmp_path, TTFT) != path
    path.with_name("tri_mix.schema2.csv").unlink()
    for content in (header[:200], header[:20], ""):
        path.write_text(content)
        assert read(path, TtftRow) == []
        assert append(tmp_path, TTFT) == path
        assert read(path, TtftRow) == [TTFT]


def test_samples_of_an_old_run_are_found_by_todays_rows(tmp_path):
    """The name of their file is the one that schema 1 gave it, whatever the parameters."""
    about = {"device": "d", "method": "m", "model": "a", "weights": "w", "dtype": "t", "length": 1, "seed": 2, "threads": 0}
    row = RulerRow(**(made_rows.COMMON | about), task="vt", samples=1, wording="own", wording_hash="f", source="s",
                   chat_template=False)  # fmt: skip
    names = ("d", "m", "a", "", "w", "t", "1", "2")
    rest = ("vt", "own", "f", "s", "False")
    for parameters, told in (
        ("", ("None", "None", "None", "None", "", "0")),
        ("layers=16- n_init=8 n_local=512 last_n=128", ("16", "8", "512", "128", "", "0")),
        ("layers=5,7 n_init=8 patterns=default", ("None", "8", "None", "None", "default", "0", "5,7")),
        ('layers="7" n_init=8', ("None", "8", "None", "None", "", "0", "7-7")),
        ("layers=4- dense_backend=sdpa", ("4", "None", "None", "None", "", "0", "sdpa")),
        ("gamma=0.95 tau=0.0 min_budget=1024", ("None", "None", "None", "None", "", "0", "0.95", "0.0", "1024")),
    ):
        expected = schema_1_hash(*names, *told, *rest)
        assert replace(row, parameters=parameters).digest == expected, parameters
    new = {replace(row, parameters=f"width={width}").digest for width in (1, 2, "wide")}
    assert len(new | {row.digest}) == 4, "a parameter that schema 1 did not have counts too"


def schema_1_hash(*parts):
    import hashlib

    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def test_parameters_of_old_rows_are_read_as_todays_are_written():
    for layers, text in (
        ({"starting_layer": "16"}, "16-"),
        ({"layers": "5,7-7,9-10"}, "5,7,9-10"),
        ({"layers": "7-7"}, "7"),
    ):
        texts = {"n_init": "8", "gamma": "0.9"} | layers
        found = parse_parameters(schema_1.translate(texts)["parameters"])
        assert dict(found) == {"layers": text, "n_init": 8, "gamma": 0.9}


@pytest.mark.slow
def test_what_an_older_tmbench_measured_is_not_measured_again(tmbench):
    """Rows count, and of samples only those are asked that are new; the old files stay as they are."""
    methods = ("--device", "cpu", "--method", "dense", "--method", "tri_mix", "--n-local", "64", "--layers", "5,7")
    timed = ("ttft", "--length", "256", "--repeats", "1", *methods)
    asked = ("ruler", "--task", "niah_single_1", "--length", "1K", "--offline", *methods, "--samples")
    assert tmbench(*timed)[0] == tmbench(*asked, "2")[0] == 0
    root = Path("results")
    before = {}
    for kind in (TtftRow, RulerRow):
        for path in root.glob(f"*/{kind.kind}/*.csv"):
            write_schema_1(path, *read(path, kind))
            before[path] = path.read_bytes()
    assert len(before) == 4
    samples = {path: path.read_text() for path in root.glob("*/ruler/predictions/*/*.jsonl")}
    for command in (timed, (*asked, "2")):
        code, _, err = tmbench(*command)
        assert (code, "nothing was measured" in " ".join(err.split())) == (0, True), err
    assert not list(root.glob("*/*/*.schema2.csv"))
    assert tmbench(*asked, "3")[0] == 0
    now = {path: path.read_text() for path in root.glob("*/ruler/predictions/*/*.jsonl")}
    assert now.keys() == samples.keys(), "the same files"
    for path, text in samples.items():
        assert now[path].startswith(text)
        assert now[path].count("\n") == 3
    assert {row.samples for row in read_all(root, RulerRow)} == {3}
    assert all(path.read_bytes() == content for path, content in before.items())
    assert len(list(root.glob("*/*/*.schema2.csv"))) == 2
    assert tmbench("report")[0] == 0

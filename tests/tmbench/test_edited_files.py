"""Result files that an editor or a spreadsheet saved, or that a kill cut: whole rows count, and no cut value is read."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import made_rows
from tmbench.results.files import append_line, read_lines
from tmbench.results.rows import AgreeRow, LossRow, ProbeRow, RulerRow, TtftRow
from tmbench.results.tables import CorruptResultsError, OpenEndResultsError, append, newest, read

COMMON = made_rows.COMMON | {"method": "dense", "length": 4096}
ROWS = (
    TtftRow(**COMMON, prompt="kv", repeats=3, warmup=1, interleaved="dense", ttft_median_s=0.3, compile_s=14.4352307),
    TtftRow(**COMMON, prompt="kv", repeats=3, warmup=1, interleaved="dense", error='a "quoted", text', status="failed"),
    RulerRow(**COMMON, task="vt", samples=20, wording="own", wording_hash="f00d", source="noise", chat_template=False,
             score=12.5, predictions="predictions/dense/vt-4096-3.jsonl", coverage=2 / 3),
    AgreeRow(**COMMON, prompt="kv", samples=2, new_tokens=8, agreement=1 / 3, choices="choices/dense/kv-4096-1.jsonl"),
    ProbeRow(**COMMON, task="vt+cwe", samples=2, wording_hash="f00d", source="noise", sample_files="a/b.jsonl+a/c.jsonl"),
    LossRow(**COMMON, task="vt", samples=2, wording_hash="f00d", source="noise", sample_files="samples/dense/vt-1.jsonl"),
)  # fmt: skip
IDS = ("ttft", "failed", "ruler", "agree", "probe", "loss")
BOM = b"\xef\xbb\xbf"


def later(row):
    return replace(row, time="2026-01-02T00:00:00+00:00", length=8192)


def first_release(path: Path, later: Sequence[str] = ()) -> None:
    """Write a file as the first release did, which put values into quotes only where it had to, and had no later columns."""
    lines = list(csv.reader(path.read_text().splitlines()))
    kept = [place for place, name in enumerate(lines[0]) if name not in later]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([line[place] for place in kept] for line in lines)
    path.write_text(text.getvalue())


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_a_row_is_read_if_it_is_whole_wherever_it_was_cut(tmp_path, row):
    append(tmp_path, row)
    path = append(tmp_path, later(row))
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for end in range(start, len(whole) + 1):
        path.write_bytes(whole[:end])
        wanted = [row, later(row)] if end >= len(whole) - 1 else [row]
        assert read(path, type(row)) == wanted, whole[start:end]
        assert list(newest(tmp_path, type(row), row.device, "dense").values()) == wanted


@pytest.mark.parametrize("row", ROWS, ids=IDS)
@pytest.mark.parametrize("before", [0, 1])
def test_what_is_appended_keeps_a_whole_row_without_its_line_end(tmp_path, row, before):
    for number in range(before):
        append(tmp_path, replace(row, seed=number))
    path = append(tmp_path, later(row))
    whole, first = path.read_bytes(), [replace(row, seed=number) for number in range(before)]
    for cut, kept in ((1, [later(row)]), (2, []), (3, []), (60, [])):
        path.write_bytes(whole[:-cut])
        append(tmp_path, row)
        assert read(path, type(row)) == [*first, *kept, row]
        assert path.read_bytes().count(b"\n") == 1 + len([*first, *kept, row])


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_a_row_of_the_first_release_is_never_read_with_a_cut_value(tmp_path, row):
    """Its last value may be the beginning of a longer one: then the file is refused, and nothing is taken from it."""
    append(tmp_path, row)
    path = append(tmp_path, later(row))
    first_release(path, type(row).ADDED)
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        try:
            assert read(path, type(row)) == [row, *([later(row)] if end == len(whole) - 1 else [])]
        except OpenEndResultsError:
            with pytest.raises(
                OpenEndResultsError, match="dense.csv line 3 has no line end, so .*end the line if it is whole, else"
            ):
                append(tmp_path, row)
            assert path.read_bytes() == whole[:end]
    path.write_bytes(whole[:-1])
    if isinstance(row, AgreeRow):
        assert read(path, AgreeRow) == [row, later(row)]
    if row is ROWS[0]:
        with pytest.raises(OpenEndResultsError, match="so compile_s, its last value, may be cut"):
            read(path, TtftRow)


@pytest.mark.parametrize("row", ROWS[1:4], ids=IDS[1:4])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", BOM])
@pytest.mark.parametrize("change", ["", "turned", "blank"])
def test_what_a_spreadsheet_saved_is_read_and_appended_to(tmp_path, row, quoting, end, mark, change):
    """A byte-order mark, line ends of Windows, quotes everywhere, columns in another order, an empty line at the end."""
    path = append(tmp_path, row)
    lines = list(csv.reader(path.read_text().splitlines()))
    text = io.StringIO()
    csv.writer(text, quoting=quoting, lineterminator=end).writerows(
        line[::-1] if change == "turned" else line for line in lines
    )
    path.write_bytes(mark + text.getvalue().encode() + (end.encode() if change == "blank" else b""))
    assert read(path, type(row)) == [row]
    append(tmp_path, later(row))
    assert read(path, type(row)) == [row, later(row)]
    assert path.read_bytes().startswith(b"schema_version,time,")
    assert b"\r" not in path.read_bytes()


def test_a_line_end_of_windows_of_which_half_was_cut(tmp_path):
    path = append(tmp_path, ROWS[0])
    first_release(path)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n")[:-1])
    assert read(path, TtftRow) == [ROWS[0]]


def test_a_header_alone_and_a_foreign_line_alone(tmp_path):
    path = append(tmp_path, ROWS[0])
    header = path.read_bytes().splitlines()[0]
    for content in (header, header[:30], BOM + header, BOM, b""):
        path.write_bytes(content)
        assert read(path, TtftRow) == []
        append(tmp_path, ROWS[0])
        assert read(path, TtftRow) == [ROWS[0]]
    for content in (b"my notes", header + b",more", b"schema_version;time", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(CorruptResultsError, match="its columns differ"):
            append(tmp_path, ROWS[0])
        assert path.read_bytes() == content


def test_a_last_line_with_too_many_fields_is_damaged_and_not_cut(tmp_path):
    path = append(tmp_path, ROWS[0])
    path.write_bytes(path.read_bytes()[:-1] + b",1,2")
    with pytest.raises(CorruptResultsError, match=f"line 2 has {len(TtftRow.columns()) + 2} fields"):
        append(tmp_path, ROWS[0])


ENTRY = {"index": 4, "prediction": 'a "b" {c} é\u2028', "numbers": [1.5, {"a": 12}], "seconds": 0.125}


@pytest.mark.slow
@pytest.mark.parametrize("mark", [b"", BOM])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("before", [0, 1])
def test_a_sample_counts_if_it_is_whole_wherever_it_was_cut(tmp_path, mark, end, before):
    path = tmp_path / "x.jsonl"
    first = mark + b"".join([json.dumps({"index": 3}).encode() + end] * before)
    line = json.dumps(ENTRY, ensure_ascii=False).encode()
    for cut in range(len(line) + 1):
        path.write_bytes(first + line[:cut])
        wanted = [{"index": 3}] * before + [ENTRY] * (cut == len(line))
        assert read_lines(path, dict, "an entry", "move it") == wanted
        append_line(path, json.dumps({"index": 5}))
        assert read_lines(path, dict, "an entry", "move it") == [*wanted, {"index": 5}]
    path.write_bytes(first + line + end[:1])
    append_line(path, json.dumps({"index": 5}))
    assert read_lines(path, dict, "an entry", "move it") == [*[{"index": 3}] * before, ENTRY, {"index": 5}]


def test_a_last_line_that_is_no_sample_is_named_and_kept(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"index": 0}\nmy notes')
    with pytest.raises(ValueError, match=r"x\.jsonl line 2 is not an entry: move it"):
        read_lines(path, dict, "an entry", "move it")
    append_line(path, '{"index": 1}')
    assert path.read_bytes() == b'{"index": 0}\nmy notes\n{"index": 1}\n'


def test_zeros_that_a_crash_left_are_no_row(tmp_path):
    path = append(tmp_path, ROWS[0])
    size = path.stat().st_size
    os.truncate(path, size + 100)
    assert read(path, TtftRow) == [ROWS[0]]
    append(tmp_path, later(ROWS[0]))
    assert read(path, TtftRow) == [ROWS[0], later(ROWS[0])]
    samples = tmp_path / "x.jsonl"
    samples.write_bytes(b'{"index": 0}\n' + bytes(50))
    append_line(samples, '{"index": 1}')
    assert samples.read_bytes() == b'{"index": 0}\n{"index": 1}\n'

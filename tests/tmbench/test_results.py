"""Rows survive: whole after a kill or a full disk, newest first in the reading, and foreign files are named."""

from __future__ import annotations

import csv
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmbench.errors import UserError
from tmbench.results import files, rows
from tmbench.results.files import read_lines
from tmbench.results.rows import RulerRow, TtftRow
from tmbench.results.tables import CorruptResultsError, append, csv_path, newest, prepare, read, read_all

ROW = TtftRow(
    time="2026-01-01T00:00:00+00:00",
    device="some-gpu",
    method="tri_mix",
    model="a/model",
    weights="random",
    dtype="bfloat16",
    length=4096,
    seed=42,
    parameters="layers=16- n_init=8",
    threads=2,
    device_name="Some GPU",
    tmbench="0.1.0",
    python="3.12",
    torch="2.13.0",
    transformers="5.24.0",
    environment="abc",
    prompt="kv",
    repeats=3,
    warmup=1,
    interleaved="dense tri_mix",
    ttft_median_s=0.1 + 0.2,
    coverage=1 / 3,
    same_token_as_dense=False,
)
PATH = ("some-gpu", "ttft", "tri_mix.csv")


def test_a_row_comes_back_as_it_was(tmp_path):
    path = append(tmp_path, ROW)
    assert path == tmp_path.joinpath(*PATH)
    assert read(path, TtftRow) == [ROW]


TEXTS = st.text(st.characters(codec="utf-8") | st.sampled_from('\\\n\r nr",'))


@pytest.mark.slow
@given(TEXTS, TEXTS, st.floats(0, allow_infinity=False), st.integers(0, 2**63 - 1) | st.none())
def test_any_content_stays_one_line(tmp_path_factory, text, model, number, token):
    """An error loses the white space between its words, all else reads back as it was."""
    root = tmp_path_factory.mktemp("rows")
    row = replace(ROW, error=text, model=model, ttft_median_s=number, first_token=token)
    path = append(root, row)
    assert path.read_bytes().count(b"\n") == 2
    assert read(path, TtftRow) == [replace(row, error=" ".join(text.split()))]


@pytest.mark.parametrize("model", ["my  models/a", " a ", "a\nb", "a\r\nb", "a\\nb", "a\tb"])
def test_a_row_is_found_under_its_own_key(tmp_path, model):
    row = replace(ROW, model=model)
    path = append(tmp_path, row)
    assert newest(tmp_path, TtftRow, "some-gpu", "tri_mix")[row.key] == row
    assert path.read_bytes().count(b"\n") == 2
    # A kill while a second one is written must leave the first.
    os.truncate(append(tmp_path, row), path.stat().st_size - 5)
    assert read(path, TtftRow) == [row]


def test_the_newest_row_of_a_key_wins(tmp_path):
    append(tmp_path, ROW)
    append(tmp_path, replace(ROW, parameters="layers=8- n_init=8"))
    latest = replace(ROW, ttft_median_s=0.1, time="2026-01-02T00:00:00+00:00")
    append(tmp_path, latest)
    assert read_all(tmp_path, TtftRow) == [latest, replace(ROW, parameters="layers=8- n_init=8")]
    assert newest(tmp_path, TtftRow, "some-gpu", "tri_mix")[ROW.key] == latest
    assert newest(tmp_path, TtftRow, "some-gpu", "dense") == {}
    assert read_all(tmp_path, RulerRow) == []


def test_rows_are_written_together(tmp_path):
    rows = [replace(ROW, length=length) for length in (1, 2, 3)]
    path = append(tmp_path, *rows)
    assert read(path, TtftRow) == rows


def test_a_file_that_is_prepared_has_a_header_and_what_it_had(tmp_path):
    path = tmp_path.joinpath(*PATH)
    for content in ([], [ROW]):
        prepare(tmp_path, TtftRow, "some-gpu", "tri_mix")
        assert path.read_text().splitlines()[0] == ",".join(TtftRow.columns())
        assert read(path, TtftRow) == content
        append(tmp_path, ROW)
    turned = [line[::-1] for line in csv.reader(path.read_text().splitlines())]
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(turned)
    prepare(tmp_path, TtftRow, "some-gpu", "tri_mix")
    assert read(path, TtftRow) == [ROW, ROW]
    assert path.read_text().splitlines()[0] == ",".join(TtftRow.columns())


def test_what_decides_the_key():
    assert replace(ROW, ttft_median_s=9.0, torch="2.14", repeats=9).key == ROW.key
    change: Any
    for change in ({"length": 8192}, {"prompt": "vt"}, {"threads": 8}, {"dtype": "float16"}):
        assert replace(ROW, **change).key != ROW.key
    for change in ("dense_backend=cudnn", "gamma=0.9", "first_chunk=0", "layers=5,7", "layers=16", "n_init=9", "n_init=8.0"):
        names = change.partition("=")[0]
        kept = [pair for pair in ROW.parameters.split() if not pair.startswith(names)]
        assert replace(ROW, parameters=" ".join([*kept, change])).key != ROW.key or change == "n_init=8.0"
    turned = replace(ROW, parameters=" ".join(reversed(ROW.parameters.split())))
    assert turned.parameters != ROW.parameters
    assert (turned.key, turned.digest) == (ROW.key, ROW.digest), "the order of parameters decides nothing"


def lacking(path, column):
    """Take a column from a file, as one has it from before the column was added."""
    lines = list(csv.reader(path.read_text().splitlines()))
    kept = [n for n, name in enumerate(lines[0]) if name != column]
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([line[n] for n in kept] for line in lines)


def test_rows_of_one_prompt_are_called_as_before_there_were_batches():
    assert ROW.digest == "78c9666ba30c"
    four = replace(ROW, batch_size=4)
    assert four.key != ROW.key
    assert four.digest != ROW.digest


@pytest.mark.parametrize("size", [0, -4])
def test_a_batch_of_nothing_is_named(tmp_path, size):
    path = append(tmp_path, replace(ROW, batch_size=size))
    with pytest.raises(CorruptResultsError, match=f"batch_size is {size}, less than 1"):
        read(path, TtftRow)


@pytest.fixture(params=["compile_s", "batch_size"])
def added(monkeypatch, request):
    """A column that this schema did not have at first."""
    monkeypatch.setattr(TtftRow, "ADDED", (request.param,))
    return request.param


def test_a_file_without_an_added_column_is_read_and_appended_to(tmp_path, added):
    path = append(tmp_path, ROW)
    lacking(path, added)
    assert added not in path.read_text()
    assert read(path, TtftRow) == [ROW]
    later = replace(ROW, compile_s=0.95, batch_size=4)
    append(tmp_path, later)
    assert read(path, TtftRow) == [ROW, later]
    assert path.read_text().splitlines()[0] == ",".join(TtftRow.columns())
    assert list(path.parent.iterdir()) == [path]


def test_an_older_file_cut_by_a_kill_is_upgraded_without_the_cut_line(tmp_path, added):
    append(tmp_path, ROW)
    path = append(tmp_path, replace(ROW, length=8192))
    lacking(path, added)
    os.truncate(path, path.stat().st_size - 3)
    append(tmp_path, replace(ROW, length=16384))
    assert [row.length for row in read(path, TtftRow)] == [4096, 16384]


def test_an_upgrade_that_the_disk_refuses_leaves_the_older_file(tmp_path, monkeypatch, added):
    path = append(tmp_path, ROW)
    lacking(path, added)
    before = path.read_bytes()

    def refuse(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", refuse)
    with pytest.raises(UserError, match="No space left on device"):
        append(tmp_path, ROW)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("column", ["parameters", "model"])
def test_only_an_added_column_may_be_absent(tmp_path, column):
    path = append(tmp_path, ROW)
    path.write_text(path.read_text().replace(f",{column},", ",", 1))
    before = path.read_bytes()
    with pytest.raises(CorruptResultsError, match="its columns differ"):
        read(path, TtftRow)
    with pytest.raises(CorruptResultsError, match="its columns differ"):
        append(tmp_path, ROW)
    assert path.read_bytes() == before
    assert set(TtftRow.ADDED) <= set(TtftRow.defaults())


@pytest.mark.parametrize("cut", [2, 10, 200])
def test_a_line_cut_by_a_kill_is_dropped_and_replaced(tmp_path, cut):
    append(tmp_path, ROW)
    path = append(tmp_path, replace(ROW, length=8192))
    os.truncate(path, path.stat().st_size - cut)
    assert read(path, TtftRow) == [ROW]
    append(tmp_path, replace(ROW, length=16384))
    assert [row.length for row in read(path, TtftRow)] == [4096, 16384]


def test_a_header_cut_by_a_kill_is_written_again(tmp_path):
    path = append(tmp_path, ROW)
    os.truncate(path, 20)
    assert read(path, TtftRow) == []
    append(tmp_path, ROW)
    assert read(path, TtftRow) == [ROW]


def test_a_full_disk_leaves_whole_rows(tmp_path, monkeypatch):
    path = append(tmp_path, ROW)
    before = path.read_bytes()
    write = os.pwrite
    monkeypatch.setattr(files.os, "pwrite", lambda fd, data, at: write(fd, data[:30], at))
    with pytest.raises(UserError, match="--output-dir: .*No space left on device.*kept"):
        append(tmp_path, replace(ROW, length=8192))
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output-dir: .*cannot be written"):
        append(tmp_path / "file", ROW)


def test_writers_that_append_at_once_lose_nothing(tmp_path, added):
    # The lock belongs to the open file, so threads contend for it just as processes do.
    # One of them replaces the file of an older version while the others wait for it.
    rows = [replace(ROW, length=length, threads=writer) for writer in (1, 2, 3, 4) for length in range(1, 31)]
    lacking(append(tmp_path, rows.pop(0)), added)
    first = read(tmp_path.joinpath(*PATH), TtftRow)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda row: append(tmp_path, row), rows))
    assert sorted((row.threads, row.length) for row in read(tmp_path.joinpath(*PATH), TtftRow)) == sorted(
        (row.threads, row.length) for row in first + rows
    )


def test_types_of_columns_are_made_out_once(tmp_path, monkeypatch):
    path = append(tmp_path, *(replace(ROW, length=length) for length in range(1, 5)))
    read(path, TtftRow)
    monkeypatch.setattr(rows, "get_type_hints", None)
    assert len(read(path, TtftRow)) == 4


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a,b,c\n1,2,3\n", "its columns differ"),
        (b"\xff\xfe\x00\n", "not text"),
        (",".join(TtftRow.columns()).encode() + b"\n1,2\n", "line 2 has 2 fields"),
        (",".join(TtftRow.columns()).encode() + b'\n"' + b"x,y\n" * 2**16, "line 2: field larger than field limit"),
    ],
)
def test_a_foreign_file_is_named_and_left_alone(tmp_path, content, reason):
    path = csv_path(tmp_path, TtftRow, "some-gpu", "tri_mix")
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(CorruptResultsError, match=f"tri_mix.csv .*{reason}.*move it out"):
        read_all(tmp_path, TtftRow)
    assert path.read_bytes() == content


def test_a_letter_cut_by_a_kill_is_dropped_with_its_line(tmp_path):
    path = append(tmp_path, ROW)
    path.write_bytes(path.read_bytes() + "1,2026,é".encode()[:-1])
    assert read(path, TtftRow) == [ROW]


def refuse(monkeypatch, method, refused):
    """Let a method of Path fail for one path: modes do not bind root, whom these tests may run as."""
    real = getattr(Path, method)

    def ask(path, *arguments, **keywords):
        if path == refused:
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(Path, method, ask)


def test_a_file_that_may_not_be_read_is_one_sentence(tmp_path, monkeypatch):
    path = append(tmp_path, ROW)
    for method in ("read_bytes", "stat"):
        refuse(monkeypatch, method, path)
    for look in (lambda: newest(tmp_path, TtftRow, "some-gpu", "tri_mix"), lambda: read_all(tmp_path, TtftRow)):
        with pytest.raises(UserError, match="tri_mix.csv cannot be read: Permission denied; check the path and its perm"):
            look()


def test_a_device_whose_folder_may_not_be_read_is_named(tmp_path, monkeypatch):
    """A glob leaves it out without a word."""
    append(tmp_path, ROW)
    append(tmp_path, replace(ROW, device="other"))
    (tmp_path / "report.md").write_text("a file beside the devices")
    assert [row.device for row in read_all(tmp_path, TtftRow)] == ["other", "some-gpu"]
    real = os.scandir, os.listdir

    def shut(listing, folder):
        if str(folder).endswith("some-gpu/ttft"):
            raise PermissionError(13, "Permission denied")
        return listing(folder)

    monkeypatch.setattr(os, "scandir", lambda folder=".": shut(real[0], folder))
    monkeypatch.setattr(os, "listdir", lambda folder=".": shut(real[1], folder))
    with pytest.raises(UserError, match="some-gpu/ttft cannot be read: Permission denied"):
        read_all(tmp_path, TtftRow)


def entry_of(value):
    return int(value["index"])


def test_lines_are_read_up_to_the_last_whole_one(tmp_path):
    path = tmp_path / "x.jsonl"
    assert read_lines(path, entry_of, "an entry", "move it") == []
    path.write_bytes('{"index": 3}\n{"index": 4, "text": "\x85 \u2028"}\n{"index": 5, "text": "é'.encode()[:-1])
    assert read_lines(path, entry_of, "an entry", "move it") == [3, 4]


@pytest.mark.parametrize(
    "line",
    [b'{"index": "x"}', b'{"index": "\xff"}', b"[1]", b"null", b'{"index": null}', b'{"index": Infinity}', b"", b"no"],
)
def test_a_foreign_line_is_named(tmp_path, line):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"index": 0}\n' + line + b"\n")
    with pytest.raises(UserError, match=r"x\.jsonl line 2 is not an entry: move it"):
        read_lines(path, entry_of, "an entry", "move it")


def test_a_file_of_lines_that_cannot_be_read_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=f"{tmp_path} cannot be read: Is a directory; move it"):
        read_lines(tmp_path, entry_of, "an entry", "move it")
    refuse(monkeypatch, "read_bytes", tmp_path / "x.jsonl")
    with pytest.raises(UserError, match=r"x\.jsonl cannot be read: Permission denied; move it"):
        read_lines(tmp_path / "x.jsonl", entry_of, "an entry", "move it")


def test_a_text_where_a_number_belongs_is_named(tmp_path):
    path = append(tmp_path, ROW)
    path.write_text(path.read_text().replace(",4096,", ",many,"))
    with pytest.raises(CorruptResultsError, match="line 2: length is 'many', not a number"):
        read(path, TtftRow)

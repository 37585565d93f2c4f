"""Data sets on disk: written whole, read back equal, and those of the reference RULER read too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ruler_tasks import DatasetError, Example, UnknownTaskError, examples, read_dataset, write_dataset


@pytest.fixture(scope="module")
def samples(plain_tokenizer: Any, sources: Any) -> list[Example]:
    made: list[Example] = []
    for task in ("niah_multivalue", "vt", "qa_2"):
        made += examples(task, 1024, [4, 2, 9], tokenizer=plain_tokenizer, sources=sources)
    return made


@pytest.mark.slow
def test_what_is_written_is_read_back(tmp_path: Path, samples: list[Example]) -> None:
    paths = write_dataset(tmp_path, iter(samples))
    assert paths == [tmp_path / task / "validation.jsonl" for task in ("niah_multivalue", "vt", "qa_2")]
    for task in ("niah_multivalue", "vt", "qa_2"):
        expected = [sample for sample in samples if sample.task == task]
        assert read_dataset(tmp_path, task) == expected
        assert read_dataset(tmp_path, task, 1024, limit=2) == expected[:2]
    assert [path.name for path in (tmp_path / "vt").iterdir()] == ["validation.jsonl"]


@pytest.mark.slow
def test_lines_have_the_published_fields(tmp_path: Path, samples: list[Example]) -> None:
    write_dataset(tmp_path, samples)
    published = ["index", "input", "outputs", "length", "length_w_model_temp", "answer_prefix"]
    for task, more in (("vt", []), ("niah_multivalue", ["token_position_answer"])):
        for line in (tmp_path / task / "validation.jsonl").read_text(encoding="utf-8").splitlines():
            assert list(json.loads(line)) == [*published, *more, "source"]


def test_text_beyond_ascii_survives(tmp_path: Path) -> None:
    sample = Example("vt", 0, "a\u2028b \U0001f600 \x85 \u00e9\r\n", " x", ("\u00e9",), 40, 30, "noise")
    write_dataset(tmp_path, [sample])
    assert read_dataset(tmp_path, "vt") == [sample]


def test_a_samples_parameters_are_written_where_it_has_some_and_read_back(tmp_path: Path) -> None:
    bare = Example("cwe", 0, "a", " x", ("b",), 140, 120, "words")
    sample = replace(bare, index=1, parameters={"freq_cw": 30, "freq_ucw": 3})
    path = write_dataset(tmp_path, [bare, sample])[0]
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line.get("parameters") for line in lines] == [None, {"freq_cw": 30, "freq_ucw": 3}]
    assert read_dataset(tmp_path, "cwe") == [bare, sample]
    assert len({bare, sample}) == 2
    put(path, json.dumps(lines[1] | {"parameters": [30, 3]}))
    with pytest.raises(DatasetError, match="Line 1 of .*'parameters' is a list, not a dict"):
        read_dataset(tmp_path, "cwe")


def reference_line(number: int, length: int = 1000) -> str:
    fields = {
        "index": 6221 + number, "input": f"text {number}", "outputs": ["12"], "length": length,
        "length_w_model_temp": length, "answer_prefix": " it is", "token_position_answer": 3,
    }  # fmt: skip
    return json.dumps(fields)


def put(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("inner", ["vt", "1024/data/vt", "1024/vt", "data/vt"])
def test_reference_layouts_are_found_and_numbered(tmp_path: Path, inner: str) -> None:
    put(tmp_path / inner / "validation.jsonl", reference_line(0), "", reference_line(1))
    found = read_dataset(tmp_path, "vt", 1024)
    assert [sample.index for sample in found] == [0, 1]
    assert found[1].prompt == "text 1 it is"
    assert found[1].outputs == ("12",)
    assert found[1].max_new_tokens == 30
    assert found[1].source == "prepared"


def test_the_folder_of_the_length_comes_first(tmp_path: Path) -> None:
    put(tmp_path / "vt/validation.jsonl", reference_line(0, 4000))
    put(tmp_path / "1024/data/vt/validation.jsonl", reference_line(1))
    assert read_dataset(tmp_path, "vt", 1024)[0].input == "text 1"
    assert read_dataset(tmp_path, "vt", 4096)[0].input == "text 0"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"index": 0, "input": "a', "Line 2 of .*validation.jsonl is not JSON"),
        (r'{"input": "a", "outputs": ["\udfff"]}', r"Line 2 of .* is not JSON: half a character, \\udfff"),
        ("[1, 2]", "Line 2 of .* is no sample: A sample must be a JSON object"),
        ('{"outputs": ["a"]}', "Line 2 of .* 'input' is missing"),
        ('{"input": "a"}', "Line 2 of .* 'outputs' is missing"),
        ('{"input": "a", "outputs": "a"}', "'outputs' is a str, not a list"),
        ('{"input": "a", "outputs": []}', "at least one"),
        ('{"input": "a", "outputs": [1]}', "non-empty string"),
        (r'{"input": " ", "answer_prefix": "\n", "outputs": ["a"]}', "'input' and 'answer_prefix' hold no text"),
        ('{"input": 5, "outputs": ["a"]}', "'input' is a int, not a str"),
        ('{"input": "a", "outputs": ["a"], "length": "9"}', "'length' is a str, not a int"),
    ],
)
def test_a_corrupt_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    put(tmp_path / "vt/validation.jsonl", reference_line(0), line)
    with pytest.raises(DatasetError, match=message):
        read_dataset(tmp_path, "vt")


def test_missing_empty_and_mismatched_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"holds no validation.jsonl for task vt at length 4096"):
        read_dataset(tmp_path, "vt", 4096)
    with pytest.raises(DatasetError, match="cannot be read: File name too long"):
        read_dataset(tmp_path / ("x" * 300), "vt", 4096)
    with pytest.raises(UnknownTaskError, match="choose from"):
        read_dataset(tmp_path, "tv")
    put(tmp_path / "vt/validation.jsonl", "")
    with pytest.raises(DatasetError, match="holds no samples"):
        read_dataset(tmp_path, "vt")
    put(tmp_path / "vt/validation.jsonl", reference_line(0, 1000))
    for length in (900, 4096):
        with pytest.raises(DatasetError, match="made for another length"):
            read_dataset(tmp_path, "vt", length)
    (tmp_path / "vt/validation.jsonl").write_bytes(b'{"input": "\xff"}')
    with pytest.raises(DatasetError, match="not UTF-8"):
        read_dataset(tmp_path, "vt")


@pytest.mark.slow
def test_a_failure_while_writing_leaves_the_old_file(tmp_path: Path, samples: list[Example]) -> None:
    write_dataset(tmp_path, samples[3:6])
    before = (tmp_path / "vt/validation.jsonl").read_bytes()

    def failing() -> Iterator[Example]:
        yield samples[3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, failing())
    assert (tmp_path / "vt/validation.jsonl").read_bytes() == before
    assert [path.name for path in (tmp_path / "vt").iterdir()] == ["validation.jsonl"]


def test_scattered_tasks_and_impossible_folders_are_refused(tmp_path: Path, samples: list[Example]) -> None:
    with pytest.raises(DatasetError, match="do not come together"):
        write_dataset(tmp_path / "a", [samples[0], samples[3], samples[1]])
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="cannot be written"):
        write_dataset(tmp_path / "file", samples)


@pytest.mark.parametrize(("numbers", "wrong"), [((3, 5, 3), 3), ((0, -2), -2)])
def test_samples_that_cannot_be_told_apart_are_refused(tmp_path: Path, numbers: tuple[int, ...], wrong: int) -> None:
    put(tmp_path / "vt" / "validation.jsonl", *(json.dumps({"index": n, "input": "a", "outputs": ["b"], "source": "noise"})
                                                for n in numbers))  # fmt: skip
    with pytest.raises(DatasetError, match=f"has the index {wrong}: each sample needs one of its own, from 0 on"):
        read_dataset(tmp_path, "vt")


def test_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = put(tmp_path / "vt" / "validation.jsonl", reference_line(0))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [sample.input for sample in read_dataset(tmp_path, "vt")] == ["text 0"]

import json
from typing import Any

import pytest

from tmbench_kernels import HeadPattern, MInferenceHeads, VerticalSlash, load_head_patterns, load_patterns

ENTRY: list[Any] = ["vertical_and_slash", 30, 800, 0.98]


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "patterns.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_reads_every_head_in_order(write):
    path = write([{"1": ["stream_llm", 100, 800, 17], "0": ENTRY}, {"0": ENTRY, "1": ["block_sparse", 1, 2, 0.5]}])
    assert load_head_patterns(path, layers=2, heads=2) == [
        (HeadPattern("vertical_and_slash", 30, 800, 0.98), HeadPattern("stream_llm", 100, 800, 17.0)),
        (HeadPattern("vertical_and_slash", 30, 800, 0.98), HeadPattern("block_sparse", 1, 2, 0.5)),
    ]


def test_a_missing_head_gets_the_published_default(write):
    path = write([{"1": ENTRY}, {}])
    assert load_patterns(path, layers=2, heads=2) == [
        VerticalSlash(((1000, 6096), (30, 800))),
        VerticalSlash(((1000, 6096), (1000, 6096))),
    ]


def test_a_layer_with_other_kinds_of_heads_is_a_pattern_of_its_own(write):
    path = write([{"0": ENTRY, "1": ["stream_llm", 100, 800, 1.0]}, {"0": ENTRY, "1": ENTRY}])
    assert load_patterns(path, layers=2, heads=2) == [
        MInferenceHeads((HeadPattern(*ENTRY), HeadPattern("stream_llm", 100, 800, 1.0))),
        VerticalSlash(((30, 800), (30, 800))),
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{not json", "not valid JSON"),
        ({"0": ENTRY}, "a list with one object per layer"),
        ([[ENTRY]], "a list with one object per layer"),
        ([{"0": ENTRY}], "a model with 1 layer, but this one has 2"),
        ([{"0": ENTRY}, {"0": ENTRY}], "a model with 1 query heads, but this one has 2"),
        ([{"5": ENTRY}, {"0": ENTRY}], "a model with 6 query heads, but this one has 2"),
        ([{"one": ENTRY}, {}], "layer 0: 'one' is not the number of a head"),
        ([{"1": ENTRY}, {"0": ENTRY[:3]}], "layer 1, head 0: expected"),
        ([{"1": ["vertical", 30, 800, 1]}, {}], 'layer 0, head 1: unknown type "vertical"'),
        ([{"1": ["vertical_and_slash", -3, 800, 1]}, {}], "layer 0, head 1: the number of columns must be a count"),
        ([{"1": ["vertical_and_slash", 30, "800", 1]}, {}], "layer 0, head 1: the number of distances must be a count"),
        ([{"1": ["vertical_and_slash", 30, 800, None]}, {}], "layer 0, head 1: the score must be a number"),
        ([{"1": [["vertical_and_slash"], 30, 800, 1]}, {}], "layer 0, head 1: unknown type"),
        ('[{"1": ["vertical_and_slash", 30, 800, NaN]}, {}]', "NaN is no number"),
        ('[{"1": ["vertical_and_slash", 30, 800, 1e999]}, {}]', "layer 0, head 1: the score must be a number, not Infinity"),
        (f'[{{"1": ["vertical_and_slash", {"9" * 5000}, 800, 1]}}, {{}}]', "a number of 5000 digits is no count"),
        (f'[{{"1": ["vertical_and_slash", 30, 800, {"9" * 400}]}}, {{}}]', "a number of 400 digits is no count"),
        ([{"9" * 5000: ENTRY}, {}], "999' is not the number of a head"),
        ([{"01": ENTRY}, {}], "layer 0: '01' is not the number of a head"),
        ('[{"1": [1], "1": [2]}, {}]', "an object has a key twice"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_does_not_fit_is_one_sentence(write, content, reason):
    path = write(content)
    with pytest.raises(ValueError, match=reason) as caught:
        load_patterns(path, layers=2, heads=2)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_byte_order_mark_is_read(write):
    path = write(f"\ufeff{json.dumps([{'0': ENTRY}])}")
    assert load_head_patterns(path, layers=1, heads=1) == [(HeadPattern(*ENTRY),)]

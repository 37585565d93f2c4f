"""The published scores: substring, letter case aside; all references or any."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ruler_tasks import TASKS, count_nulls, score
from ruler_tasks.scoring import postprocess


def test_questions_accept_any_reference_and_other_tasks_count_all() -> None:
    references = ["Denver", "the city of Denver", "Denver, Colorado"]
    assert TASKS["qa_1"].score("It was Denver.", references) == 1.0
    assert TASKS["qa_2"].score("It was Denver.", references) == 1.0
    assert TASKS["cwe"].score("It was Denver.", references) == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", list(TASKS))
def test_case_is_ignored_and_a_substring_is_enough(name: str) -> None:
    assert TASKS[name].score("so: xABCDx", ["abcd"]) == 1.0
    assert TASKS[name].score("so: abc d", ["abcd"]) == 0.0
    assert TASKS[name].score("", ["abcd"]) == 0.0


def test_metrics_are_those_published() -> None:
    assert {name for name, task in TASKS.items() if task.metric == "part"} == {"qa_1", "qa_2"}


def test_control_characters_become_newlines_and_do_not_vanish() -> None:
    assert postprocess("\x00 12\x0034\t5 \n") == "12\n34\n5"
    assert TASKS["niah_single_1"].score("12\x0034567", ["1234567"]) == 0.0
    assert TASKS["qa_1"].score("two\twords", ["two words"]) == 0.0
    assert TASKS["niah_single_1"].score("\x1f1234567\x1f", ["1234567"]) == 1.0


def test_an_answer_of_control_characters_alone_is_null_as_in_the_published_evaluation() -> None:
    """Every character below 32 becomes a newline before anything is stripped or counted; others, such as 127, do not."""
    assert count_nulls(["", " \n", "\x00", "\x07\x08 \x1b", "".join(map(chr, range(32)))]) == 5
    assert count_nulls(["a", "\x00.\x00", "\x7f", "\u200b", "\x80"]) == 0
    assert count_nulls([]) == 0


def test_mean_is_in_percent_rounded_to_two_decimals() -> None:
    predictions = ["1 2 3", "1", ""]
    references = [["1", "2", "3"], ["1", "2", "3"], ["1", "2", "3"]]
    assert score("niah_multivalue", predictions, references) == 44.44
    assert score("qa_1", predictions, references) == 66.67


def test_wrong_input_is_one_clear_sentence() -> None:
    with pytest.raises(ValueError, match="2 predictions"):
        score("vt", ["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="no predictions"):
        score("vt", [], [])
    with pytest.raises(ValueError, match="without references"):
        score("vt", ["a"], [[]])
    with pytest.raises(ValueError, match="one string"):
        score("vt", ["a"], ["abc"])
    with pytest.raises(ValueError, match=r"'ruler'.*niah_single_1.*qa_2"):
        score("ruler", ["a"], [["a"]])


@pytest.mark.slow
@given(st.text(), st.lists(st.text(min_size=1), min_size=1, max_size=5))
def test_part_is_whether_all_is_positive(prediction: str, references: list[str]) -> None:
    every = TASKS["vt"].score(prediction, references)
    any_of_them = TASKS["qa_1"].score(prediction, references)
    assert 0 <= every <= any_of_them <= 1
    assert (every > 0) == (any_of_them == 1)


@pytest.mark.slow
@given(st.lists(st.text(alphabet="ABCxyz", min_size=1), min_size=1, max_size=5))
def test_all_references_written_out_score_full(references: list[str]) -> None:
    assert TASKS["cwe"].score(", ".join(references).swapcase(), references) == 1.0

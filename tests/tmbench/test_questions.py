"""Questions whose answer is known: they fit their length, and prompt and answer part where one text's tokens do."""

from __future__ import annotations

import re

import pytest

from tmbench.errors import UserError
from tmbench.models import loading
from tmbench.suites.questions import questions, split, wording_hash


@pytest.fixture(scope="module")
def tiny():
    return loading.load("tiny", device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["kv", "vt", "niah_single_1", "fwe", "qa_1", "random"])
def test_questions_fit_and_do_not_depend_on_their_number(task, tiny):
    asked = list(questions(task, 1501, range(3), tiny, 42))
    assert [question.index for question in asked] == [0, 1, 2]
    assert len({question.prompt for question in asked}) == 3
    assert all(1300 < len(question.prompt) + len(question.answer) <= 1501 for question in asked)
    assert next(questions(task, 1501, range(1), tiny, 42)) == asked[0]
    assert next(questions(task, 1501, range(1), tiny, 7)).prompt != asked[0].prompt


def test_answers_are_those_of_their_prompts(tiny):
    for question in questions("kv", 1500, range(3), tiny, 42):
        text, answer = tiny.tokenizer.decode(question.prompt), tiny.tokenizer.decode(question.answer)
        asked = re.search(r'stored under "([0-9a-f-]{36})" is "$', text)
        assert asked
        assert f'"{asked[1]}": "{answer}"' in text
    for question in questions("vt", 1500, range(2), tiny, 42):
        text, answer = tiny.tokenizer.decode(question.prompt), tiny.tokenizer.decode(question.answer)
        first, *others = answer.split()
        asked = re.search(r"value ([0-9]+):$", text)
        assert asked
        assert f"VAR {first} = {asked[1]}" in text
        assert len(others) == 4


class Words:
    """A tokenizer of letters, with spaces apart, "ab" as one token, others as "?", and special tokens around the text."""

    all_special_ids = (1, 2)
    pieces = ("", "^", "$", "ab", "a", "b", "c", " ", "?")

    def __call__(self, text, add_special_tokens):
        ids = [1] if add_special_tokens else []
        while text:
            piece = next((piece for piece in self.pieces[3:-1] if text.startswith(piece)), "?")
            ids.append(self.pieces.index(piece))
            text = text[len(piece) :]
        return {"input_ids": [*ids, 2] if add_special_tokens else ids}

    def decode(self, ids):
        return "".join(self.pieces[n] for n in ids)


@pytest.mark.parametrize(
    ("prompt", "answer", "parts"),
    [
        ("c", "b", ("^c", "b")),
        ("c", " b", ("^c ", "b")),
        ("ca", "bc", ("^c", "abc")),
        ("cab", " ac a", ("^cab ", "ac a")),
    ],
)
def test_prompt_and_answer_part_where_the_tokens_do(prompt, answer, parts):
    """At a merged token before it, at white space behind it; what ends a text belongs to neither."""
    words = Words()
    assert tuple(map(words.decode, split(prompt, answer, words))) == parts


def test_an_answer_without_a_token_is_refused():
    for answer in ("", "  "):
        with pytest.raises(ValueError, match="no token of its own"):
            split("c", answer, Words())


def test_what_is_too_short_names_the_least_length(tiny):
    for task in ("kv", "vt"):
        with pytest.raises(UserError, match=f"--length 40 is too short for {task}") as refused:
            list(questions(task, 40, range(1), tiny, 42))
        needed = re.search(r"(\d+)( tokens here)?$", str(refused.value))
        assert needed
        least = int(needed[1])
        assert list(questions(task, least + 8, range(1), tiny, 42))


def test_rows_know_the_wording_of_rulers_tasks():
    assert wording_hash("vt") == wording_hash("cwe") != ""
    assert wording_hash("kv") == wording_hash("random") == ""

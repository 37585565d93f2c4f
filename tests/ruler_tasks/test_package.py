"""The building blocks, the counter, and what an import of the package brings with it."""

from __future__ import annotations

import random
import subprocess
import sys
import uuid
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ruler_tasks import TASKS, Sources, examples
from ruler_tasks.draws import Kind, draw_letters, draw_new, draw_number, draw_uuid, draw_word, draw_words, seeded, word_pool
from ruler_tasks.niah import DEPTHS, listed
from ruler_tasks.tokens import TokenCounter


def test_import_is_light() -> None:
    code = (
        "import sys, ruler_tasks; heavy = {'torch', 'transformers', 'datasets', 'tokenizers', 'numpy', 'tmbench',"
        " 'tmbench_kernels', 'huggingface_hub'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_thirteen_tasks_in_the_published_order_with_the_published_budgets() -> None:
    niah = ["niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"]
    assert list(TASKS) == [*niah, "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"]
    assert [task.tokens_to_generate for task in TASKS.values()] == [128] * 8 + [30, 120, 50, 32, 32]
    with pytest.raises(TypeError):
        TASKS["new"] = TASKS["vt"]  # type: ignore[index]


@pytest.mark.slow
def test_needs_are_what_is_read(plain_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for task in TASKS.values():
        own = Sources(offline=True)
        read: set[str] = set()
        for kind in ("essays", "squad", "hotpotqa"):
            loaded = getattr(own, kind)

            def note(kind: str = kind, loaded: Any = loaded, read: set[str] = read) -> Any:
                read.add(kind)
                return loaded()

            monkeypatch.setattr(own, kind, note)
        list(examples(task.name, 2048, [0], tokenizer=plain_tokenizer, sources=own))
        assert read == set(task.needs)


@given(st.integers())
def test_numbers_and_uuids_have_their_form(seed: int) -> None:
    rng = random.Random(seed)
    assert 1_000_000 <= int(draw_number(rng)) <= 9_999_999
    drawn = draw_uuid(rng)
    parsed = uuid.UUID(drawn)
    assert str(parsed) == drawn
    assert parsed.version == 4
    assert parsed.variant == uuid.RFC_4122
    adjective, noun = draw_word(rng).split("-", 1)
    assert adjective
    assert noun


@pytest.mark.parametrize("kind", ["words", "numbers", "uuids"])
def test_what_is_taken_is_not_drawn_again(kind: Kind) -> None:
    taken: set[str] = set()
    first = draw_new(kind, random.Random(5), taken)
    second = draw_new(kind, random.Random(5), taken)
    assert first != second
    assert taken == {first, second}


def test_uuid_digits_are_uniform() -> None:
    rng = random.Random(0)
    digits = Counter(digit for _ in range(2000) for at, digit in enumerate(draw_uuid(rng)) if at not in (14, 19))
    del digits["-"]
    assert set(digits) == set("0123456789abcdef")
    assert max(digits.values()) < 1.15 * min(digits.values())


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 26))
def test_letters_are_distinct(seed: int, size: int, count: int) -> None:
    drawn = draw_letters(random.Random(seed), size, count)
    assert len(set(drawn)) == count
    assert all(len(name) == size and name.isupper() for name in drawn)


def test_letters_run_out_loudly() -> None:
    with pytest.raises(ValueError, match="fewer than 27"):
        draw_letters(random.Random(0), 1, 27)


def test_words_are_distinct_within_the_pool_and_beyond() -> None:
    rng = random.Random(1)
    size = len(word_pool())
    assert set(draw_words(rng, 50)) <= set(word_pool())
    many = draw_words(rng, size + 500)
    assert len(set(many)) == size + 500
    assert set(many) > set(word_pool())


def test_seeds_do_not_run_into_one_another() -> None:
    assert seeded(1, "23").random() != seeded(12, "3").random()
    assert seeded(42, "vt", 4096, 17).getrandbits(32) == 4_013_667_855
    assert seeded("a").random() == seeded("a").random()


def test_depths_are_the_published_forty() -> None:
    assert len(set(DEPTHS)) == 40
    assert (DEPTHS[0], DEPTHS[1], DEPTHS[39]) == (0, 3, 100)


def test_lists_read_as_the_question_has_them() -> None:
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b, and c"


def test_the_core_and_the_public_call_count_alike(any_tokenizer: Any, sources: Sources) -> None:
    texts = [
        sources.essays().text(0, 300),
        "",
        "VAR A = 1\nVAR B = VAR A \n",
        " leading",
        "caf\u00e9 \u4e2d\u6587 \U0001f600",
    ]
    counter = TokenCounter(any_tokenizer)
    for special in (True, False):
        # An end token behind the text is not part of a prompt, and not counted.
        end = special and any_tokenizer("", add_special_tokens=True)["input_ids"][-1:] == [
            getattr(any_tokenizer, "eos_token_id", None)
        ]
        expected = [len(any_tokenizer(text, add_special_tokens=special)["input_ids"]) - end for text in texts]
        assert counter.count(texts, add_special_tokens=special) == expected


def test_a_core_that_truncates_or_pads_is_not_trusted(plain_tokenizer: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    fresh = PreTrainedTokenizerFast(tokenizer_object=plain_tokenizer.backend_tokenizer)
    fresh.backend_tokenizer.enable_truncation(max_length=7)
    try:
        assert TokenCounter(fresh).count_one("one two three four five six seven eight nine ten") > 9
    finally:
        fresh.backend_tokenizer.no_truncation()


def test_pieces_add_up_for_a_tokenizer_that_splits_at_spaces(plain_tokenizer: Any) -> None:
    counter = TokenCounter(plain_tokenizer)
    text = "The old lamp was lit.\nNobody knew 1234567 of them, or so it seemed"
    assert counter.planned([" " + text])[0] == counter.count_one(". " + text) - counter.count_one(".")


def test_unknown_task_lists_the_names(plain_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"Unknown task 'niah'.*niah_single_1.*qa_2"):
        examples("niah", 4096, [0], tokenizer=plain_tokenizer)


def test_samples_are_made_as_they_are_asked_for(plain_tokenizer: Any, sources: Sources) -> None:
    import itertools

    endless = examples("vt", 1024, itertools.count(), tokenizer=plain_tokenizer, sources=sources)
    assert [example.index for example in itertools.islice(endless, 7)] == list(range(7))

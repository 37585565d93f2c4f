"""Prompts for timing: exactly as long as asked, the same every time, with the question at their end."""

from __future__ import annotations

import re

import pytest

from tmbench import models
from tmbench.errors import UserError
from tmbench.models import LoadedModel
from tmbench.prompts import check_prompt, key_value_text, prompt_ids, prompt_kinds


@pytest.fixture(scope="module")
def tiny():
    return models.load("tiny", device="cpu")


@pytest.mark.parametrize("kind", ["kv", "random", "niah_single_2", "vt", "cwe"])
@pytest.mark.parametrize("length", [1500, 2048])
def test_prompts_are_exactly_as_long_as_asked(kind, length, tiny):
    ids = prompt_ids(kind, length, tiny)
    assert ids.shape == (1, length)
    assert ids.equal(prompt_ids(kind, length, tiny))
    assert not ids.equal(prompt_ids(kind, length, tiny, seed=7))
    assert 0 <= int(ids.min()) <= int(ids.max()) < tiny.model.config.vocab_size


def test_a_key_value_prompt_asks_for_a_pair_that_it_holds(tiny):
    held = 0
    for seed in range(20):
        text = tiny.tokenizer.decode(prompt_ids("kv", 4096, tiny, seed)[0])
        asked = re.search(r'stored under "([0-9a-f-]{36})" is "$', text)
        assert asked, "the question must survive the cut"
        held += f'"{asked[1]}": ' in text
    assert held >= 17, "the cut drops a few pairs in the middle, and seldom the one asked for"


def test_key_value_text_holds_as_many_pairs_as_asked():
    assert len(re.findall(r'^"[0-9a-f-]{36}": "[0-9a-f-]{36}"', key_value_text(12, seed=3), re.MULTILINE)) == 12


def test_a_kind_that_there_is_none_of_is_refused(tiny):
    with pytest.raises(UserError, match="--prompt poem is unknown: choose from kv, random, niah_single_1"):
        prompt_ids("poem", 100, tiny)
    assert prompt_kinds()[:2] == ("kv", "random")


def test_a_length_too_short_for_a_kind_names_the_least(tiny):
    check_prompt("kv", tiny, [1])
    for kind in ("cwe", "qa_1", "vt"):
        check_prompt(kind, tiny, [700])
    with pytest.raises(UserError, match="--length 64 is too short for --prompt cwe, which needs") as refused:
        check_prompt("cwe", tiny, [700, 64])
    least = int(re.search(r"needs (\d+) tokens", str(refused.value))[1])
    assert prompt_ids("cwe", least, tiny).shape == (1, least)
    with pytest.raises(UserError, match=f"--length {least - 1} is too short"):
        prompt_ids("cwe", least - 1, tiny)


def test_only_random_prompts_do_without_a_tokenizer(tiny):
    bare = LoadedModel("bare", tiny.model, None, "random", "")
    assert prompt_ids("random", 64, bare).shape == (1, 64)
    with pytest.raises(UserError, match="no tokenizer, which --prompt kv needs"):
        prompt_ids("kv", 64, bare)

"""Prompts for timing: exactly as long as asked, the same every time, with the question at their end."""

from __future__ import annotations

import copy
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import processors

from tmbench.errors import UserError
from tmbench.models import loading
from tmbench.models.loading import LoadedModel
from tmbench.suites.prompts import check_prompt, key_value_text, prompt_ids, prompt_kinds
from tmbench.suites.questions import questions


@pytest.fixture(scope="module")
def tiny():
    return loading.load("tiny", device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kv", "random", "niah_single_2", "vt", "cwe"])
@pytest.mark.parametrize("length", [1500, 2048])
def test_prompts_are_exactly_as_long_as_asked(kind, length, tiny):
    ids = prompt_ids(kind, length, tiny)
    assert ids.shape == (1, length)
    assert ids.equal(prompt_ids(kind, length, tiny))
    assert not ids.equal(prompt_ids(kind, length, tiny, seed=7))
    assert 0 <= int(ids.min()) <= int(ids.max()) < tiny.model.config.vocab_size


@pytest.fixture
def ending(tiny):
    """The embedded model with a tokenizer that puts an end token behind every text."""
    tokenizer = copy.deepcopy(tiny.tokenizer)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    tokenizer.backend_tokenizer.post_processor = template
    assert tokenizer("Ah.")["input_ids"][-1] == tokenizer.eos_token_id
    return replace(tiny, tokenizer=tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kv", "vt", "qa_1"])
def test_no_prompt_ends_with_an_appended_end_token(kind, tiny, ending):
    assert prompt_ids(kind, 1500, ending).equal(prompt_ids(kind, 1500, tiny))
    assert list(questions(kind, 1500, range(2), ending, 42)) == list(questions(kind, 1500, range(2), tiny, 42))


@pytest.mark.slow
def test_an_appended_end_token_takes_nothing_from_ruler(tmbench, ending, tiny):
    shutil.copytree(Path(loading.__file__).parent / "tiny", "ends", ignore=shutil.ignore_patterns("__pycache__"))
    ending.tokenizer.backend_tokenizer.save("ends/tokenizer.json")
    ask = ("ruler", "--offline", "--method", "dense", "--length", "1K", "--task", "vt", "--samples", "2", "--json")
    found = [json.loads(tmbench(*ask, "--model", model)[1])[0] for model in ("tiny", "ends")]
    assert [row["score"] for row in found] == [100.0, 100.0]
    assert found[0]["prompt_tokens_mean"] == found[1]["prompt_tokens_mean"]


@pytest.mark.slow
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
    needed = re.search(r"needs (\d+) tokens", str(refused.value))
    assert needed
    least = int(needed[1])
    assert prompt_ids("cwe", least, tiny).shape == (1, least)
    with pytest.raises(UserError, match=f"--length {least - 1} is too short"):
        prompt_ids("cwe", least - 1, tiny)


def test_only_random_prompts_do_without_a_tokenizer(tiny):
    bare = LoadedModel("bare", tiny.model, None, "random", "")
    assert prompt_ids("random", 64, bare).shape == (1, 64)
    with pytest.raises(UserError, match="no tokenizer, which --prompt kv needs"):
        prompt_ids("kv", 64, bare)

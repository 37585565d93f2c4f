"""Samples drawn as RULER's published code draws them, against what that code itself drew.

The fingerprints are of the output of NVIDIA/RULER's generators at c3f5e3b, run with our sentences in place of theirs, with
the tokenizer that counts four characters a token, and with the files that ``written`` writes; its essays were split into
sentences by the rule for punctuation in place of NLTK.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ruler_tasks import (
    TASKS,
    Example,
    Frame,
    RulerError,
    SeedError,
    SourceError,
    Sources,
    TaskLengthError,
    examples,
    load_wording,
)
from ruler_tasks.draws import word_list, word_pool
from ruler_tasks.published import BY_PUNCTUATION, needles, sentences
from ruler_tasks.published.needles import WordPairs, word_pairs

CHAT = Frame("[INST] ", " [/INST]", add_special_tokens=False)
# (task, length, in a chat frame): fingerprint, and the length that it gives to each sample
DRAWN: dict[tuple[str, int, bool], tuple[str, list[int]]] = {
    ("niah_single_1", 2048, False): ("de524d381783e91e", [2024, 2024, 2021, 2018]),
    ("niah_single_2", 2048, False): ("db92f3a740ff751d", [2047, 2047, 2047, 1129]),
    ("niah_single_3", 2048, False): ("2523f05a1f93bc73", [2043, 2043, 2043, 1127]),
    ("niah_multikey_1", 2048, False): ("a1a869f3c39966c9", [1137, 2046, 1136, 2046]),
    ("niah_multikey_2", 2048, False): ("38b985defbc1c8a7", [2036, 1953, 2048, 2044]),
    ("niah_multikey_3", 2048, False): ("b4916a5f33a32f31", [2031, 2031, 2031, 2031]),
    ("niah_multivalue", 2048, False): ("3fdbd0df0938c02e", [1143, 1143, 1131, 1137]),
    ("niah_multiquery", 2048, False): ("cac39dbf2b1e4d3d", [1130, 1126, 1125, 1124]),
    ("vt", 2048, False): ("6f8221be012fa4ff", [2033, 2033, 2033, 2033]),
    ("cwe", 2048, False): ("40a81cf215c91037", [1993, 2044, 2027, 2044]),
    ("fwe", 2048, False): ("1b19348857b90c7e", [2045, 2045, 2045, 2045]),
    ("qa_1", 2048, False): ("14916cccfc7d5158", [1739, 1891, 1937, 1887]),
    ("qa_2", 2048, False): ("2372e96f66c919aa", [1942, 1816, 1427, 1822]),
    ("niah_single_1", 4096, False): ("a5e2d97533e28ee2", [4073, 4070, 4079, 4073]),
    ("niah_single_2", 4096, False): ("2ef1d46aed2f2de4", [4096, 3156, 3156, 4096]),
    ("niah_single_3", 4096, False): ("73b6e9daa436c4a0", [4087, 4087, 4096, 4090]),
    ("niah_multikey_1", 4096, False): ("56196b138d0af4ee", [4092, 3156, 4092, 3154]),
    ("niah_multikey_2", 4096, False): ("7711e848f990c7fb", [4083, 4069, 4073, 4049]),
    ("niah_multikey_3", 4096, False): ("ac246df71d235167", [4071, 4071, 4071, 4071]),
    ("niah_multivalue", 4096, False): ("fd3d6e31b63a7aad", [3159, 3153, 4089, 3153]),
    ("niah_multiquery", 4096, False): ("ddbcf85870b04aed", [4096, 3159, 4095, 3157]),
    ("vt", 4096, False): ("9aa6f8662910629a", [4085, 4085, 4085, 4085]),
    ("cwe", 4096, False): ("5af6a645b187a549", [4088, 3915, 4096, 4088]),
    ("fwe", 4096, False): ("ae62b34b82af00bf", [4085, 4085, 4085, 4085]),
    ("qa_1", 4096, False): ("72bb8ed34dd19c72", [3986, 2403, 4008, 2393]),
    ("qa_2", 4096, False): ("d7f2e5be6ff90428", [3938, 3700, 3658, 3867]),
    ("cwe", 65536, False): ("680a1b8e81669277", [65451, 65403, 65444, 65493]),
    ("niah_single_2", 4096, True): ("dad277392850eefd", [4095, 3155, 3155, 4095]),
    ("vt", 4096, True): ("e7c8804ec8a8a4c5", [4089, 4089, 4089, 4089]),
    ("cwe", 4096, True): ("5dc8c5cd2cf61762", [4096, 3923, 3895, 4067]),
    ("fwe", 4096, True): ("ceffbf3d6a1e2fe0", [4089, 4089, 4089, 4089]),
    ("qa_2", 4096, True): ("bea7d1b8742e8877", [3942, 3704, 3662, 3871]),
}


def written(folder: Path) -> Path:
    """Essays, SQuAD, HotpotQA and English words in their published formats, drawn with the standard library alone."""
    rng = random.Random(7)
    nouns = [word for word in word_list("noun") if word.isalpha()]

    def text(size: int) -> str:
        return " ".join(f"The {' '.join(rng.choices(nouns, k=rng.randint(3, 9)))} is here." for _ in range(size))

    def paragraph(name: str) -> dict[str, Any]:
        asked = [
            {"question": f"Where is {name}, {number}?", "id": f"{name}{number}", "is_impossible": rng.random() < 0.3}
            for number in range(rng.randint(0, 4))
        ]
        for entry in asked:
            texts = rng.sample(nouns, rng.randint(1, 3))
            entry["answers"] = [] if entry["is_impossible"] else [{"text": found, "answer_start": 0} for found in texts]
        return {"context": f"{name}. {text(rng.randint(3, 12))}", "qas": asked}

    articles = [
        {"title": f"A{article}", "paragraphs": [paragraph(f"A{article}/{number}") for number in range(rng.randint(1, 9))]}
        for article in range(12)
    ]
    documents = [(f"Title {number}", [f"{text(1)} " for _ in range(rng.randint(2, 9))]) for number in range(200)]
    questions = []
    for number in range(12):
        given = rng.sample(documents, 10)
        needed = [[given[at][0], 0] for at in (7, 3)]
        questions.append(
            {"question": f"Which {number}?", "answer": rng.choice(nouns), "supporting_facts": needed, "context": given}
        )
    contents = {
        "PaulGrahamEssays": {"text": "\n" + "\n\n".join(text(4) for _ in range(60)) + "\n"},
        "squad": {"version": "v2.0", "data": articles},
        "hotpotqa": questions,
        "english_words": {str(number): f"{rng.choice(nouns)}{number}" for number in range(20_000)},
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def fingerprint(samples: Sequence[tuple[str, Sequence[str]]]) -> str:
    """What prompts and their answers are known by."""
    whole = json.dumps([[prompt, list(outputs)] for prompt, outputs in samples])
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def published_sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(written(tmp_path_factory.mktemp("published")), offline=True)


@pytest.fixture(autouse=True)
def sentences_by_punctuation(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is installed beside the package must not decide what these tests draw."""
    monkeypatch.setattr(needles, "sentence_splitter", lambda: (sentences.by_punctuation, BY_PUNCTUATION))


@pytest.fixture
def drawn(slow_tokenizer: Any, published_sources: Sources) -> Any:
    """``drawn("vt", 4096, range(4))``: samples as the reference draws them."""

    def make(task: str, length: int, indices: Any, **changes: Any) -> list[Example]:
        making = {"tokenizer": slow_tokenizer, "sources": published_sources, "samples_as": "reference"}
        return list(examples(task, length, indices, **(making | changes)))

    return make


@pytest.mark.slow
@pytest.mark.parametrize(("task", "length", "chat"), DRAWN)
def test_samples_are_those_that_the_published_code_drew(drawn: Any, task: str, length: int, chat: bool) -> None:
    samples = drawn(task, length, range(4), frame=CHAT if chat else Frame())
    expected, lengths = DRAWN[task, length, chat]
    assert [sample.length for sample in samples] == lengths
    assert fingerprint([(sample.prompt, sample.outputs) for sample in samples]) == expected
    assert [sample.index for sample in samples] == [0, 1, 2, 3]
    assert all(sample.max_new_tokens == TASKS[task].tokens_to_generate for sample in samples)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["niah_multikey_1", "vt", "cwe", "fwe", "qa_1"])
def test_a_sample_is_the_same_whichever_are_asked_for(drawn: Any, slow_tokenizer: Any, task: str) -> None:
    whole = drawn(task, 4096, range(5))
    assert drawn(task, 4096, [3, 1, 4]) == [whole[3], whole[1], whole[4]]
    endless = examples(task, 4096, count(), tokenizer=slow_tokenizer, samples_as="reference", sources=Sources(offline=True))
    assert len(list(islice(endless, 2))) == 2
    assert drawn(task, 4096, range(2), seed=7) != whole[:2]


def test_the_default_draws_otherwise(drawn: Any) -> None:
    own = drawn("vt", 2048, range(2), samples_as="tmbench")
    assert own == drawn("vt", 2048, range(2), samples_as="tmbench")
    assert {sample.prompt for sample in own}.isdisjoint(sample.prompt for sample in drawn("vt", 2048, range(2)))


def test_the_needed_documents_stand_at_one_place_in_samples_of_one_size(drawn: Any, published_sources: Sources) -> None:
    known = published_sources.squad()
    places: dict[int, set[int]] = {}
    for sample, question in zip(drawn("qa_1", 2048, range(12)), known.questions, strict=False):
        documents = sample.input.split("\n\nDocument ")
        gold = known.documents[question.gold[0]]
        assert question.query in sample.input.splitlines()[-1]
        places.setdefault(len(documents), set()).add(next(at for at, text in enumerate(documents) if gold in text))
    assert sum(map(len, places.values())) < 12
    assert all(len(found) == 1 for found in places.values())


def test_variables_are_joined_as_the_source_of_the_wording_has_it(drawn: Any) -> None:
    wording = load_wording()
    lines, spaces = (drawn("vt", 4096, [0], wording=replace(wording, vt_by_line=by_line))[0] for by_line in (True, False))
    assert replace(wording, vt_by_line=False).hash == wording.hash
    assert (lines.source, spaces.source) == ("noise", "noise, lines joined by spaces")
    first = lines.outputs[0]
    assert f"\nVAR {first} = " in lines.input
    assert all(line in ("", wording.noise) or not line.startswith(" ") for line in lines.input.splitlines())
    value = lines.answer_prefix.split("value ")[1].split(":")[0]
    assert lines.input.count(f"{wording.noise}\nVAR {first} = {value}\n{wording.noise}\n") == 1
    first, value = spaces.outputs[0], spaces.answer_prefix.split("value ")[1].split(":")[0]
    assert spaces.input.count(f"{wording.noise}\n VAR {first} = {value} {wording.noise}\n {wording.noise}\n") == 1


def test_word_pairs_are_the_sorted_list_of_all() -> None:
    adjectives = ["well", "well-known", "web", "wel", "ab c", "ab", "well"]
    nouns = ["known-ox", "ox", "Ox", "axe", "ox"]
    whole = sorted({f"{adjective}-{noun}" for adjective in adjectives for noun in nouns})
    pairs = WordPairs(adjectives, nouns)
    assert "well-known-ox" in whole
    assert list(pairs) == whole
    assert pairs[2:5] == whole[2:5]
    with pytest.raises(IndexError):
        pairs[len(whole)]


def test_word_pairs_are_as_many_as_the_published_code_lists() -> None:
    assert len(word_pairs()) == 6_171_620


@pytest.mark.slow
def test_a_list_longer_than_the_pool_is_of_english_words(drawn: Any, slow_tokenizer: Any) -> None:
    (own,) = drawn("cwe", 131072, [0])
    assert own.source == "words"
    assert own.parameters == {"freq_cw": 30, "freq_ucw": 3}
    assert all(word[-1].isdecimal() for word in own.outputs)
    (without,) = drawn("cwe", 131072, [0], sources=Sources(offline=True))
    assert without.source == "words, english_words.json missing"
    assert set(without.outputs) <= set(word_pool())


@pytest.mark.parametrize("task", ["niah_single_2", "niah_multikey_3", "vt", "cwe", "fwe", "qa_1", "qa_2"])
def test_a_length_at_which_the_published_code_never_ends_is_refused(drawn: Any, task: str) -> None:
    with pytest.raises(TaskLengthError, match=f"Task {task} finds no sample that fits 200 tokens"):
        drawn(task, 200, [])


def test_what_the_published_code_does_not_take_is_one_sentence(drawn: Any) -> None:
    with pytest.raises(SeedError, match="seed 4294967296 is too large .* up to 4294967295"):
        drawn("vt", 2048, [0], seed=2**32)
    with pytest.raises(SourceError, match="has 12 questions, .* ask for at most 12 samples"):
        drawn("qa_2", 2048, [12])
    assert issubclass(SeedError, RulerError)


def test_nltk_splits_sentences_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def splitter(text: str) -> list[str]:
        return text.split("|")

    def broken(text: str) -> list[str]:
        raise LookupError("punkt_tab")

    monkeypatch.setitem(sys.modules, "nltk", ModuleType("nltk"))
    for own, name in ((splitter, "sentences by NLTK"), (broken, BY_PUNCTUATION)):
        module = ModuleType("nltk.tokenize")
        module.sent_tokenize = own  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "nltk.tokenize", module)
        sentences.sentence_splitter.cache_clear()
        assert sentences.sentences_by()[0] == name
        assert bool(sentences.sentences_by()[1]) == (name == BY_PUNCTUATION)
    sentences.sentence_splitter.cache_clear()
    assert sentences.by_punctuation("He is here. So is Dr. No!  Or is she?") == [
        "He is here.",
        "So is Dr. No!",
        "Or is she?",
    ]

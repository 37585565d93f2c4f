"""Local files in the published formats, the stand-ins, and downloads that fail."""

from __future__ import annotations

import json
import logging
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ruler_tasks import SourceError, Sources, examples
from ruler_tasks import sources as sources_module
from ruler_tasks.sources import Essays
from ruler_tasks.tokens import TokenCounter

SQUAD = {
    "data": [
        {
            "title": "Rivers",
            "paragraphs": [
                {
                    "context": "The Mulde is a river. It passes Grimma.",
                    "qas": [
                        {"question": "What is the Mulde?", "is_impossible": False,
                         "answers": [{"text": "a river"}, {"text": "river"}]},
                        {"question": "Who owns it?", "is_impossible": True, "answers": []},
                    ],
                },
                {"context": "The Pleisse is shorter.", "qas": []},
            ],
        },
        {"title": "Hills", "paragraphs": [{"context": "The hill is low.", "qas": []}]},
    ]
}  # fmt: skip
HOTPOT = [
    {
        "question": "Where was the author of The Blue Door born?",
        "answer": "Wurzen",
        "supporting_facts": [["The Blue Door", 0], ["Ada Berg", 0]],
        "context": [["Moss", ["Moss is green."]], ["The Blue Door", ["A book by Ada Berg.", " It is long."]],
                    ["Ada Berg", ["Ada Berg was born in Wurzen."]]],
    }
]  # fmt: skip


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    (tmp_path / "squad.json").write_text(json.dumps(SQUAD))
    (tmp_path / "hotpotqa.json").write_text(json.dumps(HOTPOT))
    (tmp_path / "PaulGrahamEssays.json").write_text(json.dumps({"text": "One  two.\nThree, four! Five six seven"}))
    return tmp_path


def test_squad_gives_answerable_questions_with_their_article(data_dir: Path) -> None:
    squad = Sources(data_dir, offline=True).squad()
    (question,) = squad.questions
    assert squad.source == "squad (squad.json)"
    assert list(squad.documents) == sorted(squad.documents)
    assert question.outputs == ("a river", "river")
    assert [squad.documents[number] for number in question.gold] == ["The Mulde is a river. It passes Grimma."]
    assert [squad.documents[number] for number in question.related] == ["The Pleisse is shorter."]


def test_hotpotqa_gives_the_supporting_documents_first(data_dir: Path) -> None:
    hotpot = Sources(data_dir, offline=True).hotpotqa()
    (question,) = hotpot.questions
    gold = [hotpot.documents[number] for number in question.gold]
    assert hotpot.source == "hotpotqa (hotpotqa.json)"
    assert gold == ["The Blue Door\nA book by Ada Berg. It is long.", "Ada Berg\nAda Berg was born in Wurzen."]
    assert [hotpot.documents[number] for number in question.related] == ["Moss\nMoss is green."]


def test_local_essays_are_used_and_start_again_at_their_end(data_dir: Path, plain_tokenizer: Any) -> None:
    own = Sources(data_dir, offline=True)
    essays = own.essays()
    assert essays.source == "essays (PaulGrahamEssays.json)"
    assert essays.text(0, 4) == "One two. Three, four!"
    assert essays.text(5, 9) == "six seven One two."
    assert [essays.start_of(sentence) for sentence in range(5)] == [0, 2, 4, 7, 9]
    assert [essays.sentences_in(words) for words in (0, 1, 2, 3, 4, 5, 7, 8, 14)] == [0, 1, 1, 2, 2, 3, 3, 4, 6]
    example = next(examples("niah_single_2", 1024, [0], tokenizer=plain_tokenizer, sources=own))
    assert example.source == "essays (PaulGrahamEssays.json)"
    assert example.length > 1000
    assert own.notes == []


def test_sentences_end_where_a_reader_would_end_them() -> None:
    text = 'He met Dr. Ames. "No!" she said. It cost 3.5 francs (or so). Then J. B. left? Yes.'
    essays = Essays(text.split(), "test")
    starts = [0, *essays.ends]
    found = [essays.text(start, end) for start, end in pairwise(starts)]
    assert found == ["He met Dr. Ames.", '"No!" she said.', "It cost 3.5 francs (or so).", "Then J. B. left?", "Yes."]


def test_planned_tokens_of_prose_add_up(plain_tokenizer: Any, sources: Sources) -> None:
    essays = sources.essays()
    counter = TokenCounter(plain_tokenizer)
    planned = essays.cumulative_tokens(counter, 3000)
    words = next(at for at, total in enumerate(planned) if total > 3000)
    exact = counter.count_one("." + " " + essays.text(0, words)) - 1
    assert abs(exact - planned[words - 1]) <= 2


def test_generated_prose_is_long_and_varied(sources: Sources) -> None:
    essays = sources.essays()
    assert len(essays.text_words) > 150_000
    text = [essays.text(start, end) for start, end in pairwise([0, *essays.ends])]
    assert len(text) > 10_000
    assert len(set(text)) > 0.85 * len(text)
    assert max(len(sentence.split()) for sentence in text) < 60
    assert not any(character.isdigit() for character in essays.text(0, 5000))


def test_generated_questions_have_their_answers_in_the_last_document_needed(sources: Sources) -> None:
    for questions, needed in ((sources.squad(), 1), (sources.hotpotqa(), 2)):
        assert len(questions.questions) > 1000
        assert len({question.query for question in questions.questions}) == len(questions.questions)
        for question in questions.questions[::7]:
            assert len(question.gold) == needed
            assert question.outputs[0] in questions.documents[question.gold[-1]]
            assert not set(question.gold) & set(question.related)
            if needed == 2:
                assert question.outputs[0] not in questions.documents[question.gold[0]]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("squad.json", "{", "is not JSON"),
        ("PaulGrahamEssays.json", r'{"text": "a \ud800 b"}', r"is not JSON: half a character, \\ud800"),
        ("squad.json", '{"rows": []}', "not in the published format of squad"),
        ("squad.json", '{"data": []}', "no answerable questions"),
        ("hotpotqa.json", '{"data": []}', "not in the published format of hotpotqa"),
        ("PaulGrahamEssays.json", '{"text": "  "}', "no text"),
        ("PaulGrahamEssays.json", "[]", "not in the published format of essays"),
    ],
)
def test_a_foreign_file_is_refused_and_not_replaced(data_dir: Path, file: str, text: str, message: str) -> None:
    (data_dir / file).write_text(text)
    load = {"squad.json": "squad", "hotpotqa.json": "hotpotqa", "PaulGrahamEssays.json": "essays"}[file]
    with pytest.raises(SourceError, match=message):
        getattr(Sources(data_dir, offline=True), load)()


def test_a_file_that_may_not_be_read_is_refused_and_not_replaced(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **keywords: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    own = Sources(data_dir, offline=True)
    for look in ("stat", "read_text"):
        monkeypatch.setattr(Path, look, refuse)
    with pytest.raises(SourceError, match=r"squad\.json cannot be read: Permission denied"):
        own.squad()


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        Sources(tmp_path / "none")
    with pytest.raises(SourceError, match="cannot be read: File name too long"):
        Sources(tmp_path / ("x" * 300))


def test_a_failed_download_is_quick_noted_and_tried_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def broken(name: str, *rest: Any) -> Any:
        calls.append(name)
        raise ConnectionError("the line is dead\nand more")

    monkeypatch.setattr(sources_module, "_dataset", broken)
    monkeypatch.setattr(sources_module, "_unreachable", lambda: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    sources_module._hub.cache_clear()
    start = time.perf_counter()
    with caplog.at_level(logging.WARNING):
        first, second = Sources(), Sources()
        assert first.squad().source == second.squad().source == "generated documents"
        assert first.squad() is first.squad()
    assert time.perf_counter() - start < 5
    assert len(calls) == 1
    assert first.notes == ["No squad could be loaded (ConnectionError: the line is dead); generated text stands in."]
    assert first.notes[0] in caplog.text
    sources_module._hub.cache_clear()


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_never_asks_the_network(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> str:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(sources_module, "_unreachable", asked)
    monkeypatch.setattr(sources_module, "_downloaded", lambda name: False)
    if how == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sources_module._hub.cache_clear()
    own = Sources(offline=how == "argument")
    assert own.essays().source == "generated prose"
    assert "downloads are off" in own.notes[0]
    sources_module._hub.cache_clear()


def test_rows_of_the_public_data_sets_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: dict[str, list[dict[str, Any]]] = {
        "baber/paul_graham_essays": [{"text": "One two."}, {"text": "Three."}],
        "rajpurkar/squad_v2": [
            {"title": "T", "context": "C1", "question": "Q1", "answers": {"text": ["A1", "A2"]}},
            {"title": "T", "context": "C2", "question": "Q2", "answers": {"text": []}},
        ],
        "hotpotqa/hotpot_qa": [
            {"question": "Q", "answer": "A", "context": {"title": ["X", "Y"], "sentences": [["x. ", "A."], ["y."]]},
             "supporting_facts": {"title": ["X"], "sent_id": [1]}},
        ],
    }  # fmt: skip
    monkeypatch.setattr(sources_module, "_dataset", lambda name, *rest: rows[name])
    monkeypatch.setattr(sources_module, "_unreachable", lambda: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    sources_module._hub.cache_clear()
    own = Sources()
    assert own.essays().text(0, 3) == "One two. Three."
    assert own.essays().source == "essays (baber/paul_graham_essays)"
    squad, hotpot = own.squad(), own.hotpotqa()
    assert (squad.questions[0].outputs, squad.questions[0].related, squad.source) == (("A1", "A2"), (1,), "squad (squad_v2)")
    assert list(hotpot.documents) == ["X\nx. A.", "Y\ny."]
    assert (hotpot.questions[0].gold, hotpot.questions[0].related) == ((0,), (1,))
    assert own.notes == []
    sources_module._hub.cache_clear()

"""Prompts of the user's own: named by what a file holds, cut at tokens, and refused in one sentence."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from tmbench.errors import UserError
from tmbench.measure.draws import Draws
from tmbench.models import loading
from tmbench.results.rows import AgreeRow, LossRow, ProbeRow, TtftRow
from tmbench.results.tables import read_all
from tmbench.results.tune_rows import CHECK, COMPARISON, SEARCH
from tmbench.suites.prompt_files import PromptFile, continuation
from tmbench.suites.prompts import batch_ids, kind_of, prompt_ids
from tmbench.suites.questions import questions

WORDS = " ".join(f"The river {number} is long and the road is not." for number in range(700))


@pytest.fixture(scope="module")
def tiny():
    return loading.load("tiny", device="cpu")


def lines(path: Path, *entries: object) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@pytest.fixture
def asked(tmp_path):
    entries = [
        {
            "prompt": f"The code is {1000 + n}. {WORDS[: 900 + 300 * n]} The code is",
            "answer": f" {1000 + n}",
            "id": f"case {n}",
        }
        for n in range(3)
    ]
    return lines(tmp_path / "asked.jsonl", *entries)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "river.txt").write_text(WORDS)
    return tmp_path / "river.txt"


def test_a_file_is_known_by_what_it_holds(asked, tmp_path):
    one = PromptFile.of(asked, "jsonl")
    copy = tmp_path / "other name.jsonl"
    copy.write_bytes(asked.read_bytes())
    assert str(one) == str(PromptFile.of(copy, "jsonl")) == f"jsonl-{one.digest}"
    copy.write_bytes(asked.read_bytes() + b"\n")
    assert str(PromptFile.of(copy, "jsonl")) != str(one)


def test_where_it_is_measured_its_contents_must_be_the_same(text, tiny):
    sent = pickle.dumps(kind_of(f"text:{text}"))
    assert pickle.loads(sent).text == WORDS
    text.write_text("Another one.")
    with pytest.raises(UserError, match="has changed since the run was started"):
        prompt_ids(pickle.loads(sent), 8, tiny)


def test_stretches_of_a_text_follow_each_other(text, tiny):
    kind = kind_of(f"text:{text}")
    ids = batch_ids(kind, 200, tiny, 42, 3)
    assert ids.shape == (3, 200)
    assert ids.equal(batch_ids(kind, 200, tiny, 7, 3)), "a seed changes nothing"
    front = tiny.tokenizer("")["input_ids"]
    whole = tiny.tokenizer(WORDS, add_special_tokens=False)["input_ids"]
    assert [row[: len(front)] for row in ids.tolist()] == [front] * 3
    assert [token for row in ids.tolist() for token in row[len(front) :]] == whole[: 3 * (200 - len(front))]


def test_the_answer_to_a_stretch_is_its_end(text, tiny):
    kind = kind_of(f"text:{text}")
    (second,) = questions(kind, 200, [1], tiny, 42)
    assert [*second.prompt, *second.answer] == prompt_ids(kind, 200, tiny, number=1)[0].tolist()
    assert len(second.answer) == continuation(200) == 50
    assert (second.task, second.source) == (str(kind), "river.txt")
    assert [continuation(length) for length in (2, 512, 8192)] == [1, 128, 128]


def test_prompts_are_cut_to_a_length_where_it_must_be_met(asked, tiny):
    """Their start and their end stay, as of tmbench's own; those that are shorter are passed over."""
    kind = PromptFile.of(asked, "jsonl")
    whole = [tiny.tokenizer(entry.prompt)["input_ids"] for entry in kind.entries]
    least = kind.shortest(tiny)
    assert least is not None
    assert least == min(map(len, whole))
    assert prompt_ids(kind, least, tiny)[0].tolist() == whole[0]
    cut = prompt_ids(kind, len(whole[1]) - 9, tiny)[0].tolist()
    end = min(256, len(cut) // 2)
    assert cut == whole[1][: len(cut) - end] + whole[1][-end:]
    with pytest.raises(
        UserError, match=r"holds 2 prompts of \d+ tokens or more, and this run takes 3: give more, ask for fewer"
    ):
        batch_ids(kind, len(whole[1]), tiny, 42, 3)


def test_prompts_with_answers_are_read_whole(asked, tiny):
    kind = PromptFile.of(asked, "jsonl")
    length = kind.longest(tiny)
    assert length is not None
    found = list(questions(kind, length, range(3), tiny, 42))
    assert [question.id for question in found] == ["case 0", "case 1", "case 2"]
    for question, entry in zip(found, kind.entries, strict=True):
        assert tiny.tokenizer.decode(question.answer).strip() == entry.answer.strip()
        assert [*question.prompt, *question.answer] == tiny.tokenizer(entry.prompt + entry.answer)["input_ids"]
    with pytest.raises(
        UserError, match=f"holds 2 prompts of at most {length - 1} tokens with the answer, and this run takes 3"
    ):
        list(questions(kind, length - 1, range(3), tiny, 42))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no prompts: give one JSON object a line"),
        (b"{", "line 1 is no JSON"),
        (b'\n["a"]\n', "line 2 has no text as its prompt"),
        (b'{"prompt": 7}', "line 1 has no text as its prompt"),
        (b'{"prompt": " "}', "line 1 has no text as its prompt"),
        (b'{"prompt": "a", "answer": ["b"]}', "line 1 has an answer that is no text"),
        (b'{"prompt": "a", "question": 1}', r'line 1 has a question that is no text: give .* "question": "\.\.\."'),
        (rb'{"prompt": "a\ud800"}', r"line 1 has half a character, \\ud800"),
        (rb'{"prompt": "a\ud83d", "question": "\ude00"}', r"line 1 has half a character, \\ud83d"),
        (rb'{"prompt": "a", "answer": "\udfff"}', r"line 1 has half a character, \\udfff"),
        (rb'{"prompt": "a", "id": "\ud800"}', r"line 1 has half a character, \\ud800"),
        (b'{"prompt": "a", "id": true}', "line 1 has an id that is neither a text nor a whole number"),
        (b'{"prompt": "a", "id": 1}\n{"prompt": "b", "id": "1"}', "has the id '1' in lines 1 and 2"),
        (b'{"prompt": "\xff"}', "is no text in UTF-8"),
    ],
)
def test_what_is_no_file_of_prompts_is_refused(tmp_path, content, said):
    path = tmp_path / "asked.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"--prompt-file {path}.*{said}"):
        PromptFile.of(path, "jsonl")


def test_a_prompt_without_an_answer_is_timed_and_not_probed(tmp_path, tiny):
    kind = PromptFile.of(lines(tmp_path / "a.jsonl", {"prompt": WORDS[:500]}), "jsonl")
    assert prompt_ids(kind, 20, tiny).shape == (1, 20)
    with pytest.raises(UserError, match="line 1 has no answer, which a probe or a loss needs: add one"):
        list(questions(kind, 1024, [0], tiny, 42))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ttft", "--prompt-file", "none.jsonl"), "none.jsonl cannot be read: No such file or directory"),
        (("agree", "--prompt", "text:none.txt", "--method", "tri_mix"), "none.txt cannot be read"),
        (("probe", "--prompt", "text:/dev/zero"), "/dev/zero cannot be read: Not a regular file"),
        (("ttft", "--prompt", "kv", "--prompt-file", "asked.jsonl"), "--prompt does not go with --prompt-file"),
        (("probe", "--task", "vt", "--prompt-file", "asked.jsonl"), "--task does not go with --prompt-file"),
        (("probe", "--loss", "--prompt", "text:river.txt", "--length", "64K"), "--length 65536"),
        (("agree", "--prompt-file", "asked.jsonl", "--method", "tri_mix"), "this run takes 20"),
    ],
)
def test_bad_input_is_one_sentence(tmbench, asked, text, arguments, said):
    code, out, err = tmbench(*arguments, "--device", "cpu")
    assert (code, out) == (2, "")
    assert said in " ".join(err.split())
    assert err.count("Error:") == 1


@pytest.mark.slow
def test_every_command_names_the_file_in_its_rows(tmbench, asked, text):
    here, few = ("--device", "cpu", "--samples", "2"), ("--method", "dense", "--method", "streaming", "--n-local", "64")
    root, kind, words = Path("results"), str(PromptFile.of(asked, "jsonl")), str(PromptFile.of(text, "text"))
    assert (
        tmbench("ttft", "--prompt-file", "asked.jsonl", *few, "--device", "cpu", "--repeats", "1", "--batch-size", "2")[0]
        == 0
    )
    assert {(row.prompt, row.prompt_file) for row in read_all(root, TtftRow)} == {(kind, "asked.jsonl")}
    assert tmbench("agree", "--prompt", "text:river.txt", *few, *here, "--length", "200", "--new-tokens", "4")[0] == 0
    assert {(row.prompt, row.samples, row.prompt_file) for row in read_all(root, AgreeRow)} == {(words, 2, "river.txt")}
    assert tmbench("probe", "--loss", "--prompt-file", "asked.jsonl", *few, *here)[0] == 0
    assert {(row.task, row.source) for row in read_all(root, LossRow)} == {(kind, "asked.jsonl")}
    assert tmbench("probe", "--task", "text:river.txt", *here, "--length", "200", "--n-local", "32", "--last-n", "8")[0] == 0
    assert {row.task for row in read_all(root, ProbeRow)} == {words}
    kept = [json.loads(line) for path in root.glob("*/loss/samples/dense/*.jsonl") for line in path.read_text().splitlines()]
    assert [line["id"] for line in kept] == ["case 0", "case 1"]
    code, out, _ = tmbench("report")
    assert code == 0
    assert words in out
    assert "The prompts are of the file asked.jsonl;" in out
    assert (
        tmbench("agree", "--prompt", "text:river.txt", *few, *here, "--length", "200", "--new-tokens", "4", "--plan")[0] == 0
    )


def test_the_stages_of_a_search_share_a_files_prompts_out(asked, text, tiny):
    for kind, length in ((PromptFile.of(asked, "jsonl"), 4096), (PromptFile.of(text, "text"), 64)):
        count = kind.count(tiny, length)
        kind.answered(tiny, length, count - 1)
        with pytest.raises(UserError):
            kind.answered(tiny, length, count)
        taken = [Draws([(kind, length)], stage, 42, tiny).first(10**6) for stage in (SEARCH, CHECK, COMPARISON)]
        assert sorted(draw.index for draws in taken for draw in draws) == list(range(count))
        assert len(taken[0]) == (count + 1) // 2
        numbers = [draw.index for draw in taken[0]]
        assert count < 8 or numbers != sorted(numbers), "who wrote a file may have sorted it"

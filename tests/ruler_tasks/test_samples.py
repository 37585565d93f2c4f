"""What is in a prompt: that each task can be solved from it, has its answers where it says, and repeats nothing."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import pytest

from ruler_tasks import TASKS, Example, Sources, draws, examples, load_wording, minimum_length, words
from ruler_tasks.draws import word_pool
from ruler_tasks.sources import GENERATED_DOCUMENTS, GENERATED_PROSE

WORDING = load_wording()
NEEDLES = {
    "niah_single_1": 1, "niah_single_2": 1, "niah_single_3": 1, "niah_multikey_1": 4, "niah_multivalue": 4,
    "niah_multiquery": 4,
}  # fmt: skip
NEEDLE = re.compile(r"Note this down: the secret (number|UUID) of (\S+(?: \S+)*?) is ([0-9a-f-]+)\.")


def make(task: str, length: int, indices: Any, tokenizer: Any, sources: Sources, **options: Any) -> list[Example]:
    return list(examples(task, length, indices, tokenizer=tokenizer, sources=sources, **options))


pytestmark = pytest.mark.slow
"""All tasks are drawn before the first one looks at them."""


@pytest.fixture(scope="module")
def twenty(plain_tokenizer: Any, sources: Sources) -> dict[str, list[Example]]:
    return {task: make(task, 4096, range(20), plain_tokenizer, sources) for task in TASKS}


@pytest.mark.parametrize("task", list(TASKS))
def test_a_sample_depends_on_its_number_alone(
    task: str, twenty: dict[str, list[Example]], plain_tokenizer: Any, sources: Sources
) -> None:
    assert make(task, 4096, [17], plain_tokenizer, sources) == [twenty[task][17]]
    assert make(task, 4096, [17, 3], plain_tokenizer, sources) == [twenty[task][17], twenty[task][3]]
    assert [example.index for example in twenty[task]] == list(range(20))


@pytest.mark.parametrize("task", list(TASKS))
def test_seeds_and_lengths_and_numbers_draw_anew(
    task: str, twenty: dict[str, list[Example]], plain_tokenizer: Any, sources: Sources
) -> None:
    inputs = {example.input for example in twenty[task]}
    assert len(inputs) == 20
    other = make(task, 4096, [0], plain_tokenizer, sources, seed=43)[0]
    assert other.input not in inputs
    longer = make(task, 4500, [0], plain_tokenizer, sources)[0]
    assert longer.input[:2000] != twenty[task][0].input[:2000] or task.startswith("niah")


@pytest.mark.parametrize("task", list(TASKS))
def test_outputs_are_in_the_input_and_the_source_is_named(task: str, twenty: dict[str, list[Example]]) -> None:
    sources = {
        "vt": "noise", "cwe": "words", "fwe": "coded words", "qa_1": GENERATED_DOCUMENTS, "qa_2": GENERATED_DOCUMENTS,
        "niah_single_1": "noise", "niah_multikey_2": "needles", "niah_multikey_3": "needles",
    }  # fmt: skip
    for example in twenty[task]:
        assert example.task == task
        assert example.source == sources.get(task, GENERATED_PROSE)
        assert len(set(example.outputs)) == len(example.outputs)
        assert all(output in example.input for output in example.outputs)
        assert TASKS[task].score(" " + ", ".join(example.outputs), example.outputs) == 1.0


@pytest.mark.parametrize("task", [task for task in TASKS if task not in ("vt",)])
def test_places_of_the_answers_vary(task: str, twenty: dict[str, list[Example]]) -> None:
    places = [example.input.index(example.outputs[0]) / len(example.input) for example in twenty[task]]
    if task == "qa_2":  # the answer is a name that the first document may hold as well
        places = [example.input.rindex(example.outputs[0]) / len(example.input) for example in twenty[task]]
    if task in ("cwe", "fwe"):  # frequent words are everywhere: compare where they come first in the list
        places = [_order(example) for example in twenty[task]]
    assert len(set(places)) > 12
    if task not in ("cwe", "fwe"):
        assert min(places) < 0.35
        assert max(places) > 0.65


def _order(example: Example) -> Any:
    entries = _listed(example) if example.task == "cwe" else _coded(example)
    return tuple(at for at, word in enumerate(entries) if word == example.outputs[0])[:5]


@pytest.mark.parametrize(("task", "count"), NEEDLES.items())
def test_exactly_the_needles_of_the_task(task: str, count: int, twenty: dict[str, list[Example]]) -> None:
    for example in twenty[task]:
        found = NEEDLE.findall(example.input)
        keys = [key for _, key, _ in found]
        assert len(found) == count
        assert len(set(keys)) == (1 if task == "niah_multivalue" else count)
        question = example.input.rsplit("\n", 1)[1]
        asked = [(key, value) for _, key, value in found if key in question]
        assert {value for _, value in asked} == set(example.outputs)
        assert len(example.outputs) == (4 if task in ("niah_multivalue", "niah_multiquery") else 1)
        kind = "UUID" if task == "niah_single_3" else "number"
        assert {found_kind for found_kind, _, _ in found} == {kind}


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multikey_3"])
def test_every_line_is_a_needle_with_a_key_of_its_own(task: str, twenty: dict[str, list[Example]]) -> None:
    for example in twenty[task]:
        lines = example.input.split("\n")[1:-1]
        found = [NEEDLE.fullmatch(line) for line in lines]
        assert all(found)
        pairs = [(match[2], match[3]) for match in found if match]
        assert len({key for key, _ in pairs}) == len({value for _, value in pairs}) == len(pairs) > 20
        question = example.input.rsplit("\n", 1)[1]
        assert [value for key, value in pairs if f" {key} " in question] == list(example.outputs)


def test_values_of_several_keys_come_in_the_order_of_the_question(twenty: dict[str, list[Example]]) -> None:
    for example in twenty["niah_multiquery"]:
        values = {key: value for _, key, value in NEEDLE.findall(example.input)}
        question = example.input.rsplit("\n", 1)[1]
        in_order = sorted(values, key=question.index)
        assert example.outputs == tuple(values[key] for key in in_order)
        assert f", and {in_order[-1]} " in question


def test_needle_orders_vary(twenty: dict[str, list[Example]]) -> None:
    orders = set()
    for example in twenty["niah_multivalue"]:
        orders.add(tuple(sorted(range(4), key=lambda at: example.input.index(example.outputs[at]))))
    assert len(orders) > 8


def test_noise_lines_are_whole(twenty: dict[str, list[Example]]) -> None:
    for example in twenty["niah_single_1"]:
        lines = example.input.split("\n")[1:-1]
        assert lines.count(WORDING.noise) == len(lines) - 1


def assigned(text: str) -> dict[str, str]:
    """The value of every variable after the assignments of a text, each a line, were carried out in order."""
    values: dict[str, str] = {}
    for name, right in re.findall(r"^VAR ([A-Z]+) = (.+?) ?$", text, flags=re.MULTILINE):
        values[name] = values[right.removeprefix("VAR ")] if right.startswith("VAR ") else right
    return values


def test_chains_can_be_followed(twenty: dict[str, list[Example]]) -> None:
    for example in twenty["vt"]:
        solved, asked = example.input.rsplit("\n\n", 1)
        values = assigned(asked)
        value = re.search(r"hold the value (\d{5})\?", asked)
        assert value is not None
        assert tuple(name for name, held in values.items() if held == value[1]) == example.outputs
        assert len(values) == 5
        assert value[1] in example.answer_prefix
        inner = assigned(solved)
        assert len(inner) == 5
        assert solved.endswith(": " + " ".join(inner))
        assert set(inner.values()).isdisjoint(values.values())


def test_chain_places_vary_and_examples_too(twenty: dict[str, list[Example]]) -> None:
    def places(text: str) -> tuple[int, ...]:
        return tuple(at for at, line in enumerate(text.split("\n")) if line.startswith("VAR"))

    parts = [example.input.rsplit("\n\n", 1) for example in twenty["vt"]]
    assert len({places(asked) for _, asked in parts}) > 15
    assert len({places(solved) for solved, _ in parts}) > 8


def _listed(example: Example) -> list[str]:
    question = WORDING.cwe.template.split("{context}")[1]
    entries = example.input.rsplit(question, 1)[0].rsplit("\n", 1)[1]
    numbers = [int(number) for number in re.findall(r"(?:^| )(\d+)\. ", entries)]
    assert numbers == list(range(1, len(numbers) + 1))
    return re.split(r" ?\d+\. ", entries)[1:]


@pytest.mark.parametrize(("length", "often", "seldom"), [(4096, 30, 3), (2500, 6, 1)])
def test_common_words_are_the_most_frequent(
    length: int, often: int, seldom: int, plain_tokenizer: Any, sources: Sources
) -> None:
    for example in make("cwe", length, range(5), plain_tokenizer, sources):
        counts = Counter(_listed(example))
        assert {word for word, _ in counts.most_common(10)} == set(example.outputs)
        assert [counts[word] for word in example.outputs] == [often] * 10
        assert {counts[word] for word in counts if word not in example.outputs} == {seldom}
        assert example.parameters == {"freq_cw": often, "freq_ucw": seldom}
        lowered = [word.lower() for word in example.outputs]
        assert not any(a in b for a in lowered for b in lowered if a != b)


def test_common_words_go_on_beyond_the_word_pool(
    bos_tokenizer: Any, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = 16384
    small = word_pool()[::40]
    monkeypatch.setattr(draws, "word_pool", lambda: small)
    monkeypatch.setattr(words, "word_pool", lambda: small)
    example = make("cwe", length, [0], bos_tokenizer, sources)[0]
    counts = Counter(_listed(example))
    assert len(counts) > len(small) == len(set(counts) & set(small))
    assert {word for word, _ in counts.most_common(10)} == set(example.outputs)
    assert 0.97 * length <= example.length <= length


def _coded(example: Example) -> list[str]:
    before, after = WORDING.fwe.template.split("{context}")
    return example.input.removeprefix(before).removesuffix(after).split(" ")


def test_frequent_words_follow_the_published_law(twenty: dict[str, list[Example]]) -> None:
    for example in twenty["fwe"]:
        counts = Counter(_coded(example))
        dots = counts.pop("...")
        ranked = counts.most_common()
        assert tuple(word for word, _ in ranked[:3]) == example.outputs
        assert dots > ranked[0][1] > ranked[1][1] > ranked[2][1] > ranked[3][1]
        assert all(re.fullmatch("[a-z]{6}", word) for word in counts)
        for rank, (_, count) in enumerate(ranked[:5], 2):
            assert abs(count - dots / rank**2) <= 1


def test_frequent_words_stand_in_an_order_of_their_own(slow_tokenizer: Any, sources: Sources) -> None:
    made = make("fwe", 2048, range(6), slow_tokenizer, sources)
    texts = [_coded(example) for example in made]
    assert len({len(text) for text in texts}) == 1  # all codes take equally many tokens here
    assert len({tuple(at for at, word in enumerate(text) if word == "...") for text in texts}) == 6


@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
def test_questions_have_their_documents(task: str, twenty: dict[str, list[Example]], sources: Sources) -> None:
    questions = {question.query: question for question in _set(task, sources).questions}
    documents = _set(task, sources).documents
    numbers, asked = [], []
    for example in twenty[task]:
        query = example.input.rsplit("Question: ", 1)[1]
        asked.append(query)
        parts = re.split(r"\n\nDocument (\d+):\n", example.input.rsplit("\n\n", 1)[0])
        shown = parts[2::2]
        assert [int(number) for number in parts[1::2]] == list(range(1, len(shown) + 1))
        assert len(set(shown)) == len(shown)
        assert set(shown) <= set(documents)
        gold = [documents[number] for number in questions[query].gold]
        assert set(gold) <= set(shown)
        assert len(gold) == (1 if task == "qa_1" else 2)
        assert example.outputs[0] in gold[-1]
        numbers.append(shown.index(gold[0]))
    assert len(set(asked)) == 20
    assert len(set(numbers)) > 8


def _set(task: str, sources: Sources) -> Any:
    return sources.squad() if task == "qa_1" else sources.hotpotqa()


def test_questions_are_not_taken_in_order(plain_tokenizer: Any, sources: Sources) -> None:
    queries = [question.query for question in sources.squad().questions]
    made = make("qa_1", 1024, range(30), plain_tokenizer, sources)
    order = [queries.index(example.input.rsplit("Question: ", 1)[1]) for example in made]
    assert len(set(order)) == 30
    assert max(order) > len(queries) / 2
    assert order != sorted(order)


def test_a_question_whose_document_is_too_long_makes_way(plain_tokenizer: Any, tmp_path: Any) -> None:
    paragraphs = [f"House {number} is blue." for number in range(75)] + ["The long tale of a house. " * 200]
    entries = [
        {"context": text, "qas": [{"question": f"What of {text[:9]}?", "answers": [{"text": "house"}]}]}
        for text in paragraphs
    ]
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"title": "a", "paragraphs": entries}]}))
    own = Sources(tmp_path, offline=True)
    length = minimum_length("qa_1", plain_tokenizer, sources=own)
    assert length < 1000  # no probe met the long document
    made = make("qa_1", length, range(76), plain_tokenizer, own)
    assert len(made) == 76
    assert not any("The long tale" in example.input for example in made)


def test_documents_repeat_where_there_are_too_few(plain_tokenizer: Any, tmp_path: Any) -> None:
    paragraphs = [f"Paragraph {number} is about the colour of house {number}." for number in range(9)]
    entries = [
        {"context": text, "qas": [{"question": f"What is {text}?", "answers": [{"text": "colour"}]}]} for text in paragraphs
    ]
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"title": "a", "paragraphs": entries}]}))
    own = Sources(tmp_path, offline=True)
    example = make("qa_1", 1500, [0], plain_tokenizer, own)[0]
    assert example.source == "squad (squad.json)"
    assert example.input.count("Document ") > 20
    assert example.length > 0.97 * 1500

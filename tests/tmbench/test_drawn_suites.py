"""The suites of ``tmbench suite`` in odd settings: shortest lengths, the largest seeds, far numbers, tokens of a byte."""

from __future__ import annotations

import pickle
import re
from itertools import permutations, product

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tmbench.errors import UserError
from tmbench.suites.table import DRAWN

TASKS = [(name, task) for name, suite in DRAWN.items() for task in suite.tasks]


@pytest.fixture(scope="module")
def bytewise():
    """A token for each byte, and one in front of every text."""
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({sign: number for number, sign in enumerate([*signs, "<s>"])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", add_bos_token=True)


def least_of(suite, task, tokenizer):
    with pytest.raises(UserError, match=f"--length 1 is too short for {task}, which needs") as caught:
        suite.check([task], [1], 1, 0, tokenizer)
    return int(re.findall(r"needs (\d+) tokens", str(caught.value))[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokenizer", "bytewise"])
@pytest.mark.parametrize(("name", "task"), TASKS)
def test_samples_fit_and_have_answers_of_their_own(name, task, kind, request):
    suite, own = DRAWN[name](), request.getfixturevalue(kind)
    least = least_of(suite, task, own)
    places = (0, 7, 10**12)
    for length, seed in product((least, least + 1, least + 333), (0, 2**63 - 1)):
        suite.check([task], [length], 3, seed, own)
        found = suite.samples(task, length, places, seed, own)
        assert [one.index for one in found] == list(places)
        assert len({one.prompt for one in found}) == len(places)
        for one in found:
            assert len(one.ids) + one.max_new_tokens <= length
            assert one.max_new_tokens == suite.new_tokens(task)
            assert one.references
            assert all(reference in one.prompt for reference in one.references)
            assert not any(a.lower() in b.lower() for a, b in permutations(one.references, 2)), "each is found by itself"
            whole = f" [{', '.join(one.references)}]" if name == "graphwalks" else f" {', '.join(one.references)}."
            assert len(own(whole, add_special_tokens=False)["input_ids"]) <= one.max_new_tokens
            assert suite.score(task, whole, one.references) == 1
            assert suite.score(task, whole.replace(one.references[0], "-"), one.references) < 1
            assert suite.score(task, "", one.references) == 0
        again = pickle.loads(pickle.dumps(suite)).samples(task, length, places[1:], seed, own)
        assert again == found[1:]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task"), TASKS)
def test_a_context_has_the_list_and_nothing_of_the_question(name, task, tokenizer):
    suite = DRAWN[name]()
    found = suite.samples(task, 2000, (0, 1), 42, tokenizer)
    for one, asked in zip(found, suite.with_contexts(task, found, tokenizer), strict=True):
        context, question = one.prompt[: one.question_at], one.prompt[one.question_at :]
        # The last line before it is one of the list, and the question with its answer's beginning is short.
        assert re.search(r" -> \w+\n$|is \d{10}\.\n$|^Text .*\n$| \d+\. .*\n$", context, re.MULTILINE)
        assert len(question.splitlines()) <= 3
        assert question.startswith(("Operation: ", "Which hidden", "Of all lines", "Question: "))
        assert 0.8 * len(one.ids) < asked.context < len(one.ids)
        assert not set(re.findall(r"Operation: .*", question)) & set(re.findall(r"Operation: .*", context))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task"), TASKS)
def test_answers_are_told_by_what_their_texts_depend_on(name, task, tokenizer):
    suite = DRAWN[name]()
    tellings = []
    for length, seed in ((2000, 1), (2000, 2), (2100, 1)):
        samples = suite.samples(task, length, (0,), seed, tokenizer)
        tellings.append(suite.provenance(task, length, samples, tokenizer))
    assert {told["wording"] for told in tellings} == {suite.wording}
    assert len({told["wording_hash"] for told in tellings}) == 1
    assert len({told["data_hash"] for told in tellings}) == 3

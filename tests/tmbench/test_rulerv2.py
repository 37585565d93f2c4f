"""RULERv2's kinds: an independent reader finds the answers in the prompts, and nothing else answers them."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from tmbench.errors import UserError
from tmbench.suites.drawn import share_found
from tmbench.suites.rulerv2 import ORDERS, RulerV2

NEEDLE = re.compile(r"^A hidden number of (\S.*) is (\d{10})\.$", re.MULTILINE)
TEXT = re.compile(r"^Text (\d{7}): (.+)$", re.MULTILINE)
ASKED = re.compile(r"Which hidden numbers? of (\S.*) do the lines|that begin with \"Text (\d{7}):\", take the (\w+),")


def samples(task, length, tokenizer, places=range(6), seed=42):
    return RulerV2().samples(task, length, places, seed, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1500, 6000])
@pytest.mark.parametrize("task", RulerV2.tasks)
def test_a_reader_finds_the_answers(task, length, tokenizer):
    for sample in samples(task, length, tokenizer):
        assert length - max(64, length // 100) < len(sample.ids) + sample.max_new_tokens <= length
        pairs = (TEXT if task == "copy_nth" else NEEDLE).findall(sample.prompt)
        thing, label, order = ASKED.findall(sample.prompt)[0]
        own = [value for key, value in pairs if key == (thing or label)]
        assert len(own) == (1 if task == "mk_niah_basic" else 4)
        assert sample.references == ((own[ORDERS.index(order)],) if order else tuple(own))
        assert sample.parameters == ({"n": ORDERS.index(order) + 1} if order else {})
        values = [value for _, value in pairs]
        assert len(set(values)) == len(values), "an answer is right for one line alone"
        assert all(sum(reference in value for value in values) == 1 for reference in sample.references)
        counts = Counter(key for key, _ in pairs)
        # The last key drawn may have fewer lines, as prompts fill their length.
        assert sorted(counts.values())[1:] == [len(own)] * (len(counts) - 1)
        assert len(counts) >= 4


@pytest.mark.slow
def test_every_order_is_asked_and_answers_stand_anywhere(tokenizer):
    found = samples("copy_nth", 1500, tokenizer, range(32))
    assert {one.parameters["n"] for one in found} == {1, 2, 3, 4}
    depths = [
        one.prompt.index(one.references[0]) / len(one.prompt) for one in samples("mk_niah_basic", 1500, tokenizer, range(32))
    ]
    assert min(depths) < 0.25
    assert max(depths) > 0.7


@pytest.mark.slow
@pytest.mark.parametrize("task", RulerV2.tasks)
def test_samples_depend_on_seed_and_number_and_refuse_short_lengths(task, tokenizer):
    found = samples(task, 1500, tokenizer)
    assert found[2:4] == samples(task, 1500, tokenizer, (2, 3))
    assert len({one.prompt for one in (*found, *samples(task, 1500, tokenizer, seed=43))}) == 2 * len(found)
    with pytest.raises(UserError, match=f"--length 150 is too short for {task}, which needs") as caught:
        RulerV2().check([task], [150], 1, 42, tokenizer)
    least = int(re.findall(r"needs (\d+) tokens", str(caught.value))[0])
    assert all(len(one.ids) + one.max_new_tokens <= least for one in samples(task, least, tokenizer, range(20)))


def test_the_score_is_the_share_found():
    assert share_found("1234567890 and 22222222222", ("1234567890", "2222222222", "3333333333", "4")) == 0.75
    assert share_found(" Lamp OAK", ("lamp oak",)) == 1
    assert RulerV2().figures("mv_niah_basic", ["a b", ""], [("a", "c"), ("b",)]) == {"score": 25.0, "nulls": 1}

"""Common words: an independent count of a prompt's list has the answers, and a part of the list does not."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from tmbench.errors import UserError
from tmbench.suites.aggregation import DIFFERENT, Aggregation

ENTRY = re.compile(r"(\d+)\. (.+?)(?= \d+\. |\n)")


def samples(length, tokenizer, places=range(4), seed=42):
    return Aggregation().samples("common_words", length, places, seed, tokenizer)


def listed(sample):
    """The words of the list itself, which is the second: the first is of the solved example."""
    (own,) = (line for line in sample.prompt.splitlines()[-4:] if line.startswith("1. "))
    numbers, words = zip(*ENTRY.findall(own + "\n"), strict=True)
    assert [int(number) for number in numbers] == list(range(1, len(numbers) + 1))
    return words


@pytest.mark.slow
@pytest.mark.parametrize("length", [2048, 4096, 16384, 65536])
def test_a_count_has_the_answers_at_every_length(length, tokenizer):
    local = []
    for sample in samples(length, tokenizer):
        assert length - max(64, length // 100) < len(sample.ids) + sample.max_new_tokens <= length
        words = listed(sample)
        counts = Counter(words)
        assert {word for word, _ in counts.most_common(10)} == set(sample.references)
        assert set(counts.values()) == set(sample.parameters.values())
        assert sample.parameters["freq_cw"] == 10 * sample.parameters["freq_ucw"]
        assert length < 8192 or 0.8 * DIFFERENT < len(counts) < 1.5 * DIFFERENT
        local.append(len({word for word, _ in Counter(words[-100:]).most_common(10)} & set(sample.references)))
    assert len({sample.parameters["freq_cw"] for sample in samples(length, tokenizer)}) == 1
    assert length < 8192 or sum(local) < 9 * len(local), "what is near the end must not answer for the whole"


@pytest.mark.slow
def test_samples_depend_on_seed_and_number_and_refuse_short_lengths(tokenizer):
    found = samples(2048, tokenizer)
    assert found[2:4] == samples(2048, tokenizer, (2, 3))
    assert len({one.prompt for one in (*found, *samples(2048, tokenizer, seed=43))}) == 2 * len(found)
    with pytest.raises(UserError, match="--length 500 is too short for common_words, which needs") as caught:
        Aggregation().check(["common_words"], [500], 1, 42, tokenizer)
    least = int(re.findall(r"needs (\d+) tokens", str(caught.value))[0])
    assert all(len(one.ids) + one.max_new_tokens <= least for one in samples(least, tokenizer, range(10)))

"""No prompt exceeds its length, and none leaves more of it empty than its unit takes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ruler_tasks import TASKS, Example, Frame, Sources, TaskLengthError, examples, minimum_length
from ruler_tasks.fit import Filled, fit, in_step, largest

COARSE = {"qa_1", "qa_2"}  # a document is whole or absent


def make(task: str, length: int, count: int, tokenizer: Any, sources: Sources, **options: Any) -> list[Example]:
    return list(examples(task, length, range(count), tokenizer=tokenizer, sources=sources, **options))


def tokens(example: Example, tokenizer: Any, special: bool = True) -> int:
    """What a model reads: the tokenizer's ids, less an end token behind the text."""
    ids = tokenizer(example.prompt, add_special_tokens=special)["input_ids"]
    return len(ids) - (special and getattr(tokenizer, "eos_token_id", None) == ids[-1])


@pytest.mark.slow
@pytest.mark.parametrize("task", list(TASKS))
@pytest.mark.parametrize("length", [2048, 4099, 16384])
def test_fits_and_fills(task: str, length: int, bos_tokenizer: Any, sources: Sources) -> None:
    for example in make(task, length, 3, bos_tokenizer, sources):
        assert tokens(example, bos_tokenizer) + TASKS[task].tokens_to_generate == example.length
        assert example.max_new_tokens == TASKS[task].tokens_to_generate
        assert example.length <= length
        assert example.length >= (0.90 if task in COARSE and length < 4096 else 0.97) * length


@pytest.mark.slow
@pytest.mark.parametrize("task", list(TASKS))
def test_fits_under_every_kind_of_tokenizer(task: str, any_tokenizer: Any, sources: Sources) -> None:
    length = max(4097, minimum_length(task, any_tokenizer, sources=sources))
    for example in make(task, length, 2, any_tokenizer, sources):
        assert tokens(example, any_tokenizer) + example.max_new_tokens == example.length <= length
        assert example.length >= 0.95 * length


@pytest.mark.slow
@pytest.mark.parametrize("task", list(TASKS))
def test_shortest_lengths_work_and_shorter_ones_are_refused(task: str, plain_tokenizer: Any, sources: Sources) -> None:
    least = minimum_length(task, plain_tokenizer, sources=sources)
    for length in (least, least + 1, least + 37):
        made = make(task, length, 8, plain_tokenizer, sources)
        assert len(made) == 8
        assert all(tokens(example, plain_tokenizer) + example.max_new_tokens <= length for example in made)
    for length in (least - 1, 1, 0, -5):
        with pytest.raises(TaskLengthError, match=f"{task} needs a length of at least {least} .* {length} is"):
            examples(task, length, [0], tokenizer=plain_tokenizer, sources=sources)


@pytest.mark.slow
@pytest.mark.parametrize("task", list(TASKS))
def test_frame_stands_around_the_task_and_is_counted(task: str, bos_tokenizer: Any, sources: Sources) -> None:
    frame = Frame("<s>system: be brief\nuser: ", "\nassistant: of course,", add_special_tokens=False)
    for example in make(task, 4096, 2, bos_tokenizer, sources, frame=frame):
        assert example.input.startswith(frame.prefix)
        assert example.input.endswith(frame.suffix)
        assert example.prompt == example.input + example.answer_prefix
        assert example.length == tokens(example, bos_tokenizer, special=False) + example.max_new_tokens
        assert 0.95 * 4096 <= example.length <= 4096


def test_a_longer_frame_leaves_less_haystack(plain_tokenizer: Any, sources: Sources) -> None:
    bare = minimum_length("vt", plain_tokenizer, sources=sources)
    assert minimum_length("vt", plain_tokenizer, None, Frame("one two three four. " * 5), sources=sources) > bare + 20


@pytest.mark.parametrize("task", ["niah_multikey_2", "cwe", "niah_single_2"])
def test_needle_position_counts_the_tokens_in_front_of_the_answer(task: str, bos_tokenizer: Any, sources: Sources) -> None:
    for example in make(task, 4096, 3, bos_tokenizer, sources):
        if task == "cwe":
            assert example.token_position_answer is None
        else:
            before = example.input[: example.input.index(example.outputs[0])]
            ids = bos_tokenizer(before, add_special_tokens=False)["input_ids"]
            assert example.token_position_answer == len(ids)


class Made:
    """A draft of `size` units that takes more or fewer tokens than it believes, by any rule."""

    def __init__(self, believed: int, actual: int, base: int, jump: int) -> None:
        self.believed, self.actual, self.base, self.jump = believed, actual, base, jump

    def fill(self, room: int) -> Filled:
        size = max(1, room // self.believed)
        return Filled("", "", ("x",), size)

    def tokens(self, size: int) -> int:
        return self.base + self.actual * size + (self.jump if size % 2 else 0)


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 300), st.integers(0, 30), st.integers(0, 20_000))
def test_the_fit_ends_and_never_exceeds(believed: int, actual: int, base: int, jump: int, budget: int) -> None:
    draft = Made(believed, actual, base, jump)
    rounds = 0

    def run() -> Any:
        nonlocal rounds
        generator = fit(draft, budget)
        filled = next(generator)
        while True:
            rounds += 1
            filled = generator.send(draft.tokens(filled.size))

    with pytest.raises(StopIteration) as end:
        run()
    assert rounds <= 12
    best = end.value.value
    if best is None:
        assert draft.tokens(1) > budget or rounds == 12
    else:
        assert draft.tokens(best[0].size) == best[1] <= budget


class Legible(Made):
    """A draft whose prompts say how many tokens they take."""

    def fill(self, room: int) -> Filled:
        filled = super().fill(room)
        return Filled(str(self.tokens(filled.size)), "", ("x",), filled.size)


def test_fits_in_step_do_not_influence_one_another() -> None:
    drafts = [Legible(10, actual, 50, 3) for actual in (3, 9, 10, 13, 30, 9000)]

    def run(group: list[Legible]) -> list[int | None]:
        found = in_step([fit(draft, 5000) for draft in group], lambda texts: [int(text) for text in texts])
        return [result and result[1] for result in found]

    together = run(drafts)
    assert together == [outcome for draft in drafts for outcome in run([draft])]
    assert together[-1] is None
    assert all(tokens is not None and 4900 < tokens <= 5000 for tokens in together[:-1])


@given(st.integers(0, 50), st.integers(1, 9), st.integers(0, 2000), st.integers(0, 20), st.integers(0, 500))
def test_largest_is_the_last_that_fits(base: int, slope: int, room: int, least: int, start: int) -> None:
    found = largest(lambda n: base + slope * n, room, least, start)
    assert found >= least
    assert found == least or base + slope * found <= room
    assert base + slope * (found + 1) > room

"""Training samples: RULER's kinds of task at any length, as tokens.

A sample is a row that the model reads, in which some stretches are answers that it must write. Text is tokenised in pieces
that begin and end where the tokenizer cuts. Short samples keep the questions and shrink the haystack: training starts
there. A sample with several needles may ask for more than one of them, one question after the other, which gives many
more answer tokens for the price of one haystack; the evaluation never does that.
"""

import random
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from aggregation import common_words, frequent_words, tracking
from answering import answering
from needles import HUNTS, hunt
from writing import EOS, Row, Writer

Kind = Callable[[random.Random, Writer, int], Row]
KINDS: dict[str, Kind] = {
    **{task: partial(hunt, task) for task in HUNTS},
    "vt": tracking,
    "cwe": common_words,
    "fwe": frequent_words,
    "qa_1": partial(answering, "qa_1"),
    "qa_2": partial(answering, "qa_2"),
}


def shortest(kind: str) -> int:
    """The shortest row that a kind fits in."""
    return {"vt": 256, "cwe": 256, "fwe": 256, "qa_1": 256, "qa_2": 512}.get(kind, 128)


SHARES = {"niah_single_1": 0.5, "niah_single_2": 0.5, "niah_single_3": 0.7, "niah_multivalue": 1.3, "vt": 1.3}
SHARES |= {"cwe": 1.6, "fwe": 1.3, "qa_2": 1.5}  # how often a kind is drawn, 1 for the others
FIRST = 3  # tokens of an answer that decide what it is: the space and two digits of a number
LENGTHS = [128, 256, 512, 1024, 2048, 4096, 8192, 16384]
LATER = [1, 4, 16, 16, 18, 24, 12, 9]  # how often each length is drawn when all are open


def choose_length(draw: random.Random, top: int) -> int:
    """The length of a batch when the first `top` + 1 lengths are open: half of the time the longest, until all are."""
    if top + 1 == len(LENGTHS):
        return draw.choices(LENGTHS, LATER)[0]
    while top > 0 and draw.random() < 0.5:
        top -= 1
    return LENGTHS[top]


def batch(
    draw: random.Random, writer: Writer, length: int, rows: int
) -> tuple[NDArray[np.int16], NDArray[np.int16], NDArray[np.uint8], NDArray[np.uint8]]:
    """Ids, targets (-100 where there is none) and which targets are answers (2: an answer's first tokens), all flat; and
    each row's kind."""
    ids = np.full((rows, length + 1), EOS, np.int16)
    targets = np.full((rows, length), -100, np.int16)
    answers = np.zeros((rows, length), np.uint8)
    names = [name for name in KINDS if shortest(name) <= length]
    order, shares = list(KINDS), [SHARES.get(name, 1.0) for name in names]
    kinds = np.zeros(rows, np.uint8)
    for at in range(rows):
        name = draw.choices(names, shares)[0]
        kinds[at] = order.index(name)
        full = length < 512 or draw.random() < 0.7
        row = KINDS[name](draw, writer, length if full else draw.randint(length * 9 // 16, length))
        size = min(len(row.ids), length + 1)
        ids[at, :size] = row.ids[:size]
        targets[at, : size - 1] = row.ids[1:size]
        for start, stop in row.answers:
            answers[at, start - 1 : min(stop, size) - 1] = 1
            answers[at, start - 1 : min(start + FIRST, size) - 1] = 2
    return ids[:, :-1].reshape(-1), targets.reshape(-1), answers.reshape(-1), kinds

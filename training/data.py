"""Training samples: RULER's kinds of task at any length, as tokens.

A sample is a row that the model reads, in which some stretches are answers that it must write. Text is tokenised in pieces
that begin and end where the tokenizer cuts. Short samples keep the questions and shrink the haystack: training starts
there. A sample with several needles may ask for more than one of them, one question after the other, which gives many
more answer tokens for the price of one haystack; the evaluation never does that.
"""

import random
import tomllib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import accumulate
from math import isqrt, pi
from pathlib import Path
from string import ascii_lowercase
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ruler_tasks import draws, invented, prose
from ruler_tasks.tracking import Chain
from ruler_tasks.words import LONG, SHORT, numbered, zipf_counts

ROOT = Path(__file__).resolve().parent.parent
WORDING: dict[str, Any] = tomllib.loads((ROOT / "ruler_tasks" / "wording.toml").read_text(encoding="utf-8"))
BOS, EOS = 0, 1
FIRST = 3  # tokens of an answer that decide what it is: the space and two digits of a number


class Writer:
    """Text to tokens, remembering the tokens of what comes again and again."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}

    def each(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of texts that will not come again."""
        return [coded.ids for coded in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text that will not come again."""
        return self.each([text])[0]

    def fixed(self, text: str) -> list[int]:
        """The tokens of a text that will come again."""
        if text not in self.known:
            self.known[text] = self(text)
        return self.known[text]


@dataclass
class Row:
    """Tokens, and which of them are answers: `[start, stop)` each, EOS included."""

    ids: list[int] = field(default_factory=lambda: [BOS])
    answers: list[tuple[int, int]] = field(default_factory=list)

    def read(self, ids: Sequence[int]) -> None:
        """Append what is only read."""
        self.ids += ids

    def write(self, ids: Sequence[int]) -> None:
        """Append an answer and the token that ends it."""
        start = len(self.ids)
        self.ids += ids
        self.ids.append(EOS)
        self.answers.append((start, len(self.ids)))


def joined(parts: Sequence[str]) -> str:
    """Several queries as a prompt names them: a, b, and c."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + ", and " + parts[-1]


# --- needles in a haystack -------------------------------------------------------------------------------------------

Needle = tuple[str, str]  # key, value


@dataclass
class Hunt:
    """What a needle task is about."""

    haystack: str  # noise, essay or needle
    keys: draws.Kind
    values: draws.Kind
    needles: int  # at most so many keys beside the haystack
    each: int = 1  # values of a key
    asked: int = 1  # keys asked for at once


HUNTS = {
    "niah_single_1": Hunt("noise", "words", "numbers", 1),
    "niah_single_2": Hunt("essay", "words", "numbers", 1),
    "niah_single_3": Hunt("essay", "words", "uuids", 1),
    "niah_multikey_1": Hunt("essay", "words", "numbers", 4),
    "niah_multikey_2": Hunt("needle", "words", "numbers", 1),
    "niah_multikey_3": Hunt("needle", "uuids", "uuids", 1),
    "niah_multivalue": Hunt("essay", "words", "numbers", 1, each=4),
    "niah_multiquery": Hunt("essay", "words", "numbers", 4, asked=4),
}


def needle_text(key: str, value: str, kind: str) -> str:
    """The sentence that says a needle."""
    text: str = WORDING["niah"]["needle"].format(type=WORDING["niah"]["types"][kind], key=key, value=value)
    return text


@dataclass
class Asking:
    """How the questions of one needle row are put."""

    writer: Writer
    type: str  # what the text calls the values
    many: bool  # more than one value is asked for at once
    named: bool  # an answer names the key of each value
    bare: bool  # no template: the needles, then the answer's prefix
    short: bool  # the questions after the first are the answer's prefix alone
    needles: list[Needle]

    def __post_init__(self) -> None:
        form = WORDING["niah"]["many" if self.many else "one"]
        text = form["template"].format(type=self.type, query="{query}", context="{context}")
        self.before, self.after = text.split("{context}")
        self.prefix: str = form["answer_prefix"]

    def head(self) -> list[int]:
        """What comes before the haystack."""
        return [] if self.bare else self.writer.fixed(self.before)

    def question(self, query: Sequence[str], first: bool) -> tuple[list[int], list[int]]:
        """A question for the values of some keys, up to the answer, and the answer."""
        text = joined(query)
        prompt = self.prefix.format(type=self.type, query=text)
        if self.bare:
            prompt = "\n" + prompt if first else prompt
        elif first or not self.short:
            prompt = (self.after if first else self.after.lstrip("\n")).format(query=text) + prompt
        found = [(key, value) for key in query for k, value in self.needles if k == key]
        said = ", ".join(f"{key}: {value}" if self.named else value for key, value in found)
        prompt_ids, said_ids = self.writer.each([prompt, " " + said])
        return prompt_ids, said_ids


def amounts(spec: Hunt, exact: bool, draw: random.Random, length: int) -> tuple[int, int, int]:
    """Keys, values of a key, and keys asked for at once: the task's own if `exact`, else drawn around them."""
    count, each, asked = spec.needles, spec.each, spec.asked
    if exact:
        return max(asked, count), each, asked
    if asked > 1:
        asked = draw.randint(2, 4)
        count = asked + draw.randint(0, 4)
    elif each > 1:
        each, count = draw.randint(2, 5), draw.randint(1, 3)
    elif spec.haystack != "needle":
        count = draw.randint(1, 8)
    room = max(1, length // (100 if "uuids" in (spec.keys, spec.values) else 55))
    each, asked = min(each, room), min(asked, room)
    return max(asked, min(count, room // each), 1), each, asked


def hunt(task: str, draw: random.Random, writer: Writer, length: int) -> Row:
    """A row of one of the eight needle tasks, half of the time with more needles and more questions than the task has."""
    spec = HUNTS[task]
    exact = length >= 1024 and draw.random() < 0.5
    count, each, asked = amounts(spec, exact, draw, length)
    taken: set[str] = set()
    keys = [draws.draw_new(spec.keys, draw, taken) for _ in range(count)]
    needles = [(key, draws.draw(spec.values, draw)) for key in keys for _ in range(each)]
    queries = [[key] for key in draw.sample(keys, count)] if asked == 1 else [draw.sample(keys, asked)]
    draw.shuffle(needles)
    if spec.haystack == "needle":  # every line of the haystack is a needle
        more = length // 18
        needles += [(draws.draw(spec.keys, draw), draws.draw(spec.values, draw)) for _ in range(more)]
    bare = length <= 128 or (length <= 512 and draw.random() < 0.3)
    short = draw.random() < 0.5
    asking = Asking(writer, WORDING["niah"]["types"][spec.values], each * asked > 1, asked > 1, bare, short, needles)

    separator = " " if spec.haystack == "essay" else "\n"
    texts = [separator + needle_text(key, value, spec.values) for key, value in needles]
    lines = list(zip(texts, writer.each(texts), strict=True))
    head, first = asking.head(), asking.question(queries[0], True)
    free = length - len(head) - len(first[0]) - len(first[1]) - 3
    free -= draw.randint(0, 110) if length >= 512 else 0  # the evaluation leaves room for the longest answer
    if spec.haystack == "needle":
        free = free if exact else int(free * draw.uniform(0.4, 0.9))
        kept = max(1, bisect_right(list(accumulate(len(ids) for _, ids in lines)), free))
        hay = draw.sample(lines[:kept], kept)
        if not exact:
            queries += [[needles[at][0]] for at in draw.sample(range(1, kept), kept - 1)]
    else:
        free -= sum(len(ids) for _, ids in lines)
        if not exact:
            free -= min(length // 3, (len(queries) - 1) * (len(first[0]) // (2 if short else 1) + len(first[1])))
        units = noise_units(writer, free) if spec.haystack == "noise" else essay_units(draw, writer, free)
        hay = spread(draw, units, lines)

    row = Row()
    row.read(head)
    row.read(writer(hay[0][0][len(separator) :]))
    for _, ids in hay[1:]:
        row.read(ids)
    row.read(first[0])
    row.write(first[1])
    for query in queries[1:]:
        prompt, said = asking.question(query, False)
        if len(row.ids) + len(prompt) + len(said) + 1 > length:
            break
        row.read(prompt)
        row.write(said)
    return row


Unit = tuple[str, list[int]]  # a piece of haystack with the separator before it, and its tokens


def spread(draw: random.Random, units: list[Unit], lines: list[Unit]) -> list[Unit]:
    """The lines, in their order, at random places among the units; two at one place only where there are few units."""
    gaps = range(len(units) + 1)
    places = draw.sample(gaps, len(lines)) if len(gaps) >= len(lines) else draw.choices(gaps, k=len(lines))
    hay: list[Unit] = []
    done = 0
    for place, line in zip(sorted(places), lines, strict=True):
        hay += units[done:place]
        hay.append(line)
        done = place
    return hay + units[done:]


def noise_units(writer: Writer, free: int) -> list[Unit]:
    """The noise line as often as it fits in `free` tokens."""
    text = "\n" + WORDING["noise"]
    line = writer.fixed(text)
    return [(text, line)] * max(0, free // len(line))


def essay_units(draw: random.Random, writer: Writer, free: int) -> list[Unit]:
    """Sentences of prose that fit in `free` tokens."""
    prose = sentences()
    at = draw.randrange(len(prose))
    units: list[Unit] = []
    while True:
        text = " " + prose[at % len(prose)]
        unit = writer.fixed(text)
        if len(unit) > free:
            break
        free -= len(unit)
        units.append((text, unit))
        at += 1
    words = text.split(" ")
    while words and len(unit := writer(" ".join(words))) > free:
        words.pop()
    if len(words) > 1:  # the text ends within a sentence
        units.append((" ".join(words), unit))
    return units


@cache
def sentences() -> list[str]:
    """Prose of the generators' kind that they do not write themselves."""
    draw = draws.seeded("training prose")
    return [prose.sentence(draw) for _ in range(20_000)]


# --- chains of assignments -------------------------------------------------------------------------------------------


def tracking(draw: random.Random, writer: Writer, length: int) -> Row:
    """A row of variable tracking; half of the time with several chains and a question about each."""
    exact = length >= 1024 and draw.random() < 0.5
    many = 1 if exact else draw.randint(1, min(4, length // 128))
    hops = 4 if exact else draw.randint(1, min(4, length // 128))
    names = draws.draw_letters(draw, 5, many * (hops + 1))
    values = draw.sample(range(10_000, 100_000), many)
    chains = [Chain(tuple(names[at::many]), str(values[at])) for at in range(many)]
    form = WORDING["vt"]
    before, after = form["template"].split("{context}")

    def question(chain: Chain) -> str:
        text: str = (after + form["answer_prefix"]).format(query=chain.value, count=len(chain.variables))
        return text

    tails = [writer.each([question(chain), " " + " ".join(chain.variables)]) for chain in chains]
    texts = [["\n" + line for line in chain.lines] for chain in chains]
    lines = [list(zip(of_chain, writer.each(of_chain), strict=True)) for of_chain in texts]
    merged: list[Unit] = []
    while any(lines):  # each chain in its order, the chains mixed
        merged.append(draw.choice([line for line in lines if line]).pop(0))
    row = Row()
    if length >= 1024:
        shown = Chain.drawn(draw, 4, letters=3)
        room = min(500, length // 4) - 150
        context = shown.among(WORDING["noise"], max(5, len(noise_units(writer, room))), draw)
        row.read(writer(before + context + question(shown) + " " + " ".join(shown.variables) + "\n\n"))
    free = length - len(row.ids) - len(writer.fixed(before)) - sum(len(ids) for _, ids in merged) - 2
    free -= sum(len(ids) + 1 for ids in tails[0]) + (draw.randint(0, 30) if length >= 512 else 0)
    if not exact:
        free -= min(length // 3, sum(len(ids) for tail in tails[1:] for ids in tail))
    hay = spread(draw, noise_units(writer, free), merged)
    row.read(writer.fixed(before))
    row.read(writer(hay[0][0][1:]))
    for _, ids in hay[1:]:
        row.read(ids)
    for prompt, said in tails:
        if len(row.ids) + len(prompt) + len(said) + 1 > length and row.answers:
            break
        row.read(prompt)
        row.write(said)
    return row


# --- counting --------------------------------------------------------------------------------------------------------


def common_words(draw: random.Random, writer: Writer, length: int) -> Row:
    """A row of the common-words task; below 1024 tokens without its example and with fewer repetitions."""
    form = WORDING["cwe"]
    before, after = form["template"].split("{context}")
    repeats = LONG if length >= 4096 else SHORT
    often, seldom = repeats.common, repeats.other
    if length < 1024:
        often, seldom = draw.randint(3, 6), 1
    elif length >= 2048 and draw.random() < 0.3:
        seldom = draw.randint(1, 3 if length >= 4096 else 1)
        often = draw.randint(4, 10) * seldom
    common = 10 if length >= 1024 else draw.randint(2, 6)
    pool = draws.word_pool()

    row = Row()
    if length >= 1024:
        words = _apart(draw.sample(pool, repeats.example_words), 10)
        row.read(
            writer(
                before
                + _numbered(draw, words, 10, repeats.example_common, repeats.example_other)
                + after
                + form["answer_prefix"]
                + " "
                + numbered(words[:10])
                + "\n"
            )
        )
    budget = (
        length
        - len(row.ids)
        - len(writer.fixed(before))
        - len(writer.fixed(after + form["answer_prefix"]))
        - 120 * (length >= 1024)
        - 12 * common
    )
    words = _apart(draw.sample(pool, min(len(pool), length // (3 * seldom) + 30)), common)
    digits = 2 if length < 512 else 3 if length < 8192 else 4
    costs = [len(writer.fixed(" " + word)) + 2 + digits for word in words]
    total, kept = 0, 0
    for cost in costs:
        total += cost * (often if kept < common else seldom)
        if total > budget and kept >= common:
            break
        kept += 1
    words = words[:kept]
    row.read(writer.fixed(before))
    row.read(writer(_numbered(draw, words, common, often, seldom)))
    row.read(writer.fixed(after + form["answer_prefix"]))
    row.write(writer(" " + numbered(draw.sample(words[:common], common))))
    return row


def _apart(words: list[str], count: int) -> list[str]:
    """The words, the first `count` of which do not contain one another."""
    first: list[str] = []
    rest: list[str] = []
    for word in words:
        clash = len(first) == count or any(word.lower() in other.lower() or other.lower() in word.lower() for other in first)
        (rest if clash else first).append(word)
    return first + rest


def _numbered(draw: random.Random, words: list[str], common: int, often: int, seldom: int) -> str:
    entries = words[:common] * often + words[common:] * seldom
    draw.shuffle(entries)
    return numbered(entries)


def frequent_words(draw: random.Random, writer: Writer, length: int) -> Row:
    """A row of the frequent-words task."""
    form = WORDING["fwe"]
    before, after = form["template"].split("{context}")
    end = writer.fixed(after + form["answer_prefix"])
    ranks = min(max((length - 50) // 50, 8), isqrt(2 * length) + 1)
    codes = ["...", *draws.draw_letters(draw, 6, ranks - 1, ascii_lowercase)]
    costs = [len(ids) for ids in writer.each([" " + code for code in codes])]
    free = length - len(writer.fixed(before)) - len(end) - 30 - (draw.randint(0, 25) if length >= 512 else 0)
    share = [6 / (pi * rank) ** 2 for rank in range(1, ranks + 1)]
    total = int(free / sum(a * b for a, b in zip(share, costs, strict=True)))
    words = [code for code, count in zip(codes, zipf_counts(total, ranks), strict=True) for _ in range(count)]
    if len(words) < total // 2:
        words = codes
    draw.shuffle(words)
    row = Row()
    row.read(writer.fixed(before))
    row.read(writer(" ".join(words)))
    row.read(end)
    row.write(writer(" " + ", ".join(codes[1:4])))
    return row


# --- questions over documents ----------------------------------------------------------------------------------------

WORLD_ROWS = 400  # rows about one invented world before the next one is made


class World:
    """Documents and questions of the generators' kind, about a world that they do not invent themselves."""

    def __init__(self, draw: random.Random, writer: Writer) -> None:
        own = lambda *_: random.Random(draw.getrandbits(64))  # noqa: E731
        with patch.object(invented, "seeded", own), patch.object(invented, "_REGIONS", 12):
            invented._world.cache_clear()
            sets = {"qa_1": invented.one_hop(), "qa_2": invented.two_hop()}
            invented._world.cache_clear()
        self.questions = {name: questions for name, (questions, _) in sets.items()}
        self.texts = {name: writer.each(texts) for name, (_, texts) in sets.items()}
        self.rows = 0


_worlds: list[World] = []


def answering(task: str, draw: random.Random, writer: Writer, length: int) -> Row:
    """A row of one of the two question tasks, half of the time with further questions about its documents."""
    if not _worlds or _worlds[0].rows >= WORLD_ROWS:
        _worlds[:] = [World(draw, writer)]
    world = _worlds[0]
    world.rows += 1
    exact = length >= 1024 and draw.random() < 0.3
    form = WORDING["qa"]
    before, after = form["template"].split("{context}")
    asking = after[after.index("Question:") :] + form["answer_prefix"]
    after = after[: after.index("Question:")]
    questions, texts = world.questions[task], world.texts[task]
    question = draw.choice(questions)

    def cost(document: int) -> int:
        return len(texts[document]) + 10

    def coded(query: str, answer: str) -> list[list[int]]:
        return writer.each([asking.format(query=query), " " + answer])

    first = coded(question.query, question.outputs[0])
    free = length - sum(map(len, first)) - 2 - len(writer.fixed(before)) - len(writer.fixed(after))
    free -= draw.randint(0, 32) if exact else length // 5
    chosen = list(question.gold)
    free -= sum(map(cost, chosen))
    related = [document for document in question.related if document not in chosen]
    draw.shuffle(related)
    others = draw.sample(range(len(texts)), min(len(texts), length // 50 + 8))
    for document in dict.fromkeys([*related, *others]):
        if document not in chosen and cost(document) <= free:
            chosen.append(document)
            free -= cost(document)
    draw.shuffle(chosen)
    row = Row()
    row.read(writer.fixed(before))
    for place, document in enumerate(chosen, 1):
        row.read(writer.fixed(("\n\n" if place > 1 else "") + form["document"].format(i=place, document="")))
        row.read(texts[document])
    row.read(writer.fixed(after))
    row.read(first[0])
    row.write(first[1])
    if exact:
        return row
    inside = set(chosen)
    more = [other for other in questions if inside.issuperset(other.gold) and other is not question]
    for other in draw.sample(more, min(len(more), length // 40)):
        prompt, said = coded(other.query, other.outputs[0])
        if len(row.ids) + len(prompt) + len(said) + 2 > length:
            break
        row.read(writer.fixed("\n"))
        row.read(prompt)
        row.write(said)
    return row


# --- batches ---------------------------------------------------------------------------------------------------------

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

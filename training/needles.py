"""Rows of the eight needle tasks."""

import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from ruler_tasks import draws
from writing import WORDING, Row, Writer, essay_units, joined, noise_units, spread

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

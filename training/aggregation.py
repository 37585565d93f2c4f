"""Rows of variable tracking, and of the words that come most often."""

import random
from math import isqrt, pi
from string import ascii_lowercase

from ruler_tasks import draws
from ruler_tasks.tracking import Chain
from ruler_tasks.words import LONG, SHORT, numbered, zipf_counts
from writing import WORDING, Row, Unit, Writer, noise_units, spread


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

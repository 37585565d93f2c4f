"""Rows of the two question tasks, about invented worlds."""

import random
from unittest.mock import patch

from ruler_tasks import invented
from writing import WORDING, Row, Writer

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

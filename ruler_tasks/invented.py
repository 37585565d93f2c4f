"""Generated documents and questions: the stand-ins for SQuAD and HotpotQA where there are none.

An invented country: towns on rivers, people born in them, firms that they work for. Each is the subject of one
document and no name is given twice, so that every question has one answer, which stands word for word in the document
that it needs. A one-hop question asks for a fact of one document; a two-hop question names the subject
of one document and asks for a fact of a second one, to which the first leads.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

from ruler_tasks.draws import draw_made_up_word, phrases, seeded
from ruler_tasks.questions import Question

_REGIONS = 60
_TOWNS, _FIRMS, _PEOPLE = 10, 10, 20  # of each region


@dataclass(frozen=True)
class _Document:
    title: str
    text: str
    facts: dict[str, tuple[str, str]]  # what a fact is about: (question about the title, answer)
    region: int


@dataclass(frozen=True)
class _Link:
    """A way from one document to another: a question about the second one's fact, asked through the first."""

    start: int
    end: int
    query: str
    answer: str


@lru_cache(maxsize=1)
def _world() -> tuple[list[_Document], list[_Link]]:
    rng = seeded("invented country")
    names = _Names(rng)
    documents: list[_Document] = []
    links: list[_Link] = []
    for region in range(_REGIONS):
        province = names.new(2)
        first = len(documents)
        rivers = [names.new(2) for _ in range(_TOWNS)]
        mayors = [names.person() for _ in range(_TOWNS)]
        towns = [names.new(3) for _ in range(_TOWNS)]
        firms = [f"{names.new(2)} {rng.choice(('Works', 'Company', 'and Sons', 'Brothers'))}" for _ in range(_FIRMS)]
        founders = [names.person() for _ in range(_FIRMS)]
        for name, river, mayor in zip(towns, rivers, mayors, strict=True):
            documents.append(_town(rng, name, river, mayor, province, region))
        for name, founder in zip(firms, founders, strict=True):
            documents.append(_firm(rng, name, founder, names.new(2), towns[rng.randrange(_TOWNS)], region))
        for _ in range(_PEOPLE):
            person, home, work = names.person(), rng.randrange(_TOWNS), rng.randrange(_FIRMS)
            here, town, firm = len(documents), first + home, first + _TOWNS + work
            documents.append(_person(rng, person, towns[home], firms[work], names.new(3), region))
            born = f"the town in which {person} was born"
            ways = (
                _Link(here, town, f"On which river lies {born}?", rivers[home]),
                _Link(here, town, f"Who is the mayor of {born}?", mayors[home]),
                _Link(here, firm, f"Who founded the firm that {person} works for?", founders[work]),
            )
            links.append(rng.choice(ways))
    return documents, links


class _Names:
    """Invented names, none given twice."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._given: set[str] = set()

    def new(self, syllables: int) -> str:
        while (name := draw_made_up_word(self._rng, syllables).capitalize()) in self._given or len(name) < 5:
            pass
        self._given.add(name)
        return name

    def person(self) -> str:
        return f"{self.new(2)} {self.new(2)}"


def _town(rng: random.Random, town: str, river: str, mayor: str, province: str, region: int) -> _Document:
    festival = _any(rng, "festivals")
    year = rng.randrange(1100, 1700)
    parts = [
        f"{town} is a town in the province of {province}.",
        f"It lies on the river {river}, which is crossed there by {rng.choice(('one bridge', 'two bridges'))}.",
        f"The town received its charter in {year} and has about {rng.randrange(3, 90)}00 inhabitants.",
        f"Its best known sight is {_any(rng, 'sights')}.",
        f"Every year {town} holds a festival of {festival}.",
        f"The mayor of {town} is {mayor}.",
    ]
    facts = {
        "river": (f"On which river does the town of {town} lie?", river),
        "mayor": (f"Who is the mayor of {town}?", mayor),
        "charter": (f"In which year did the town of {town} receive its charter?", str(year)),
        "festival": (f"What is the yearly festival of {town} a festival of?", festival),
    }
    return _Document(town, _text(rng, parts), facts, region)


def _firm(rng: random.Random, firm: str, founder: str, brand: str, town: str, region: int) -> _Document:
    product = _any(rng, "products")
    year = rng.randrange(1790, 1990)
    parts = [
        f"{firm} is a maker of {product} with its head office in {town}.",
        f"It was founded in {year} by {founder}.",
        f"Its products are sold under the name {brand}.",
        f"The firm employs about {rng.randrange(2, 90)}0 people in {rng.choice(('one hall', 'three halls'))}.",
        f"In its early years {firm} also made {_any(rng, 'products')}, but that did not last.",
    ]
    facts = {
        "founder": (f"Who founded {firm}?", founder),
        "brand": (f"Under which name are the products of {firm} sold?", brand),
        "year": (f"In which year was {firm} founded?", str(year)),
        "product": (f"What does {firm} make today?", product),
    }
    return _Document(firm, _text(rng, parts), facts, region)


def _person(rng: random.Random, person: str, town: str, firm: str, house: str, region: int) -> _Document:
    job, subject = _any(rng, "jobs"), _any(rng, "subjects")
    year = rng.randrange(1930, 2000)
    parts = [
        f"{person} was born in {town} in {year}.",
        f"After studies of {subject}, {person} became {job} and works for {firm}.",
        f"The family lives in a house called {house} outside the town.",
        f"In spare hours {person} {_any(rng, 'hobbies')}.",
    ]
    facts = {
        "birth": (f"In which town was {person} born?", town),
        "firm": (f"Which firm does {person} work for?", firm),
        "house": (f"What is the house of the family of {person} called?", house),
        "subject": (f"What did {person} study?", subject),
    }
    return _Document(person, _text(rng, parts), facts, region)


def _any(rng: random.Random, what: str) -> str:
    return rng.choice(phrases("country")[what])


def _text(rng: random.Random, parts: list[str]) -> str:
    fillers = rng.sample(phrases("country")["fillers"], rng.randrange(1, 4))
    for filler in fillers:
        parts.insert(rng.randrange(1, len(parts) + 1), filler)
    return " ".join(parts)


def one_hop() -> tuple[list[Question], list[str]]:
    """Questions that one document answers, and all documents; those about the same region are related."""
    documents, _ = _world()
    regions = _by_region(documents)
    questions = [
        Question(query, (answer,), (number,), tuple(other for other in regions[document.region] if other != number))
        for number, document in enumerate(documents)
        for query, answer in document.facts.values()
    ]
    return questions, [document.text for document in documents]


def two_hop() -> tuple[list[Question], list[str]]:
    """Questions that need two documents each, with eight related ones, and all documents under their titles."""
    documents, links = _world()
    regions = _by_region(documents)
    rng = seeded("invented distractors")
    questions = []
    for link in links:
        gold = link.start, link.end
        others = [number for number in regions[documents[link.start].region] if number not in gold]
        questions.append(Question(link.query, (link.answer,), gold, tuple(rng.sample(others, 8))))
    return questions, [f"{document.title}\n{document.text}" for document in documents]


def _by_region(documents: list[_Document]) -> list[list[int]]:
    regions: list[list[int]] = [[] for _ in range(_REGIONS)]
    for number, document in enumerate(documents):
        regions[document.region].append(number)
    return regions

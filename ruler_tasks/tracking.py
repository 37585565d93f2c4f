"""Variable tracking: `vt` (RULER, Hsieh et al. 2024, arXiv 2404.06654, section 3.2).

A chain of assignments (a value, then four copies) stands in order among lines of noise; the question asks for every
variable that holds the value. A small solved example of the same kind comes first.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from ruler_tasks.draws import draw_letters, draw_number
from ruler_tasks.fit import Draft, Filled, largest
from ruler_tasks.recipe import Setting

_EXAMPLE_TOKENS = 500


@dataclass(frozen=True)
class Chain:
    """Variables that hold one value: the first is assigned it, each other a copy of the one before."""

    variables: tuple[str, ...]
    value: str

    @classmethod
    def drawn(cls, rng: random.Random, hops: int, letters: int, other_than: str = "") -> Chain:
        """`hops` + 1 different names of `letters` capital letters, and a number of five digits."""
        names = draw_letters(rng, letters, hops + 1)
        while (value := draw_number(rng, digits=5)) == other_than:
            pass
        return cls(tuple(names), value)

    @property
    def lines(self) -> list[str]:
        """The assignments in order. A copy ends in a space, as RULER prints it."""
        copies = zip(self.variables[1:], self.variables, strict=False)
        return [f"VAR {self.variables[0]} = {self.value}", *(f"VAR {new} = VAR {old} " for new, old in copies)]

    def among(self, noise: str, count: int, rng: random.Random) -> str:
        """The assignments at random places, in order, among `count` lines of noise."""
        lines = [noise] * count
        for shift, (place, line) in enumerate(
            zip(sorted(rng.sample(range(count), len(self.lines))), self.lines, strict=True)
        ):
            lines.insert(place + shift, line)
        return "\n".join(lines)


@dataclass(frozen=True)
class Tracking:
    """The task: one chain of `hops` copies."""

    hops: int = 4

    def source(self, setting: Setting) -> str:
        """Always noise."""
        return "noise"

    def draft(self, setting: Setting, index: int, rng: random.Random) -> Draft:
        """A sample with its example and chain, and the number of lines open."""
        return _TrackingDraft(setting, self.hops, rng)


class _TrackingDraft:
    """The unit is a line of noise."""

    def __init__(self, setting: Setting, hops: int, rng: random.Random) -> None:
        self._setting = setting
        self._line = setting.tokens.pieces([f"\n{setting.wording.noise}"])[0]
        self._example, used = self._solved_example(hops, rng)
        self._chain = Chain.drawn(rng, hops, letters=5, other_than=used)
        self._places = rng.getrandbits(64)
        self._base = setting.count_one(self._filled("\n".join(self._chain.lines), 0).prompt)

    def _solved_example(self, hops: int, rng: random.Random) -> tuple[str, str]:
        """An example of at most 500 tokens and its answer, or a quarter of a short prompt, and the value in it.

        RULER draws its places once for all samples; here each sample has an example of its own.
        """
        setting = self._setting
        chain = Chain.drawn(rng, hops, letters=3)

        def text(context: str) -> str:
            template, prefix = self._render(context, chain)
            return f"{template}{prefix} {' '.join(chain.variables)}\n\n"

        question = "".join(self._render("\n".join(chain.lines), chain))
        base = setting.tokens.count_one(question, add_special_tokens=False)
        room = min(_EXAMPLE_TOKENS, setting.length // 4)
        lines = largest(lambda count: base + count * self._line, room, hops + 1, hops + 2)
        return text(chain.among(setting.wording.noise, lines, rng)), chain.value

    def _render(self, context: str, chain: Chain) -> tuple[str, str]:
        prompt = self._setting.wording.vt
        return prompt.render(context=context, query=chain.value, count=len(chain.variables))

    def _filled(self, context: str, size: int) -> Filled:
        template, prefix = self._render(context, self._chain)
        return Filled(self._setting.frame.around(self._example + template), prefix, self._chain.variables, size)

    def fill(self, room: int) -> Filled:
        least = len(self._chain.variables)
        lines = largest(lambda count: self._base + count * self._line, room, least, room // self._line)
        context = self._chain.among(self._setting.wording.noise, lines, random.Random(self._places))
        return self._filled(context, lines)

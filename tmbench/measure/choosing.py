"""A search for the largest set of layers that a trial accepts: whoever runs it says of each set whether it was.

A probe says which layers need the middle of attention much, and little about the order of the rest. So first come the layers
in that order, those that need it least in front: all of them, and where that is refused the longest accepted prefix, by
bisection. Then what is left in groups: half of it is added to the best set, and where that is refused, its own halves. A set
that holds a refused one is not tried, as more of a sparser pattern is taken to cost more. That it is taken so may make the
search miss a set; no accepted set rests on it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

Layers = tuple[int, ...]
Asks = Generator[Layers, bool, None]
"""Yields sets to try, and is sent whether each was accepted. It may be left at any time."""


@dataclass
class Search:
    """What was found so far."""

    order: Sequence[int]
    """The layers, those that need the middle of attention least first."""
    accepted: list[Layers] = field(default_factory=list)
    refused: list[Layers] = field(default_factory=list)

    @property
    def best(self) -> Layers:
        """The largest accepted set, of several the first; () where none was."""
        return max(self.accepted, key=len, default=())

    def run(self, *, empty: bool = False) -> Asks:
        """Try sets until none is left that could be accepted and is larger.

        With ``empty`` no layer at all is the first set that is tried, and the last one where it is refused.
        """
        if empty and not (yield from self._accepts(())):
            return
        low, high = 0, len(self.order)
        if high and (yield from self._accepts(self.order)):
            return
        high -= 1
        while low < high:
            middle = (low + high + 1) // 2
            if (yield from self._accepts(self.order[:middle])):
                low = middle
            else:
                high = middle - 1
        yield from self._add(self.order[low:])

    def _add(self, group: Sequence[int]) -> Asks:
        """Add as much of a group as is accepted."""
        if not group or (yield from self._accepts([*self.best, *group])) or len(group) == 1:
            return
        half = len(group) // 2
        yield from self._add(group[half:])
        yield from self._add(group[:half])

    def _accepts(self, layers: Sequence[int]) -> Generator[Layers, bool, bool]:
        wanted = tuple(sorted(layers))
        if any(set(wanted) >= set(other) for other in self.refused):
            return False
        accepted = yield wanted
        (self.accepted if accepted else self.refused).append(wanted)
        return accepted

"""The prompt's length from which on a method is faster than dense, in words that claim no more than was measured."""

from __future__ import annotations

from collections.abc import Mapping

from tmbench.report.time_intervals import FASTER, NO_DIFFERENCE, SLOWER
from tmbench.results.words import length_name


def break_even(found: Mapping[int, str]) -> tuple[int | None, str]:
    """The shortest length from which on the method is faster at every length compared, in tokens and in words.

    Args:
        found: the verdict at each length that both have a time of, or why there is none: see
            ``tmbench.report.time_intervals``.
    """
    compared = {length: found[length] for length in sorted(found) if found[length] in (FASTER, NO_DIFFERENCE, SLOWER)}
    others = [length for length in sorted(found) if length not in compared]
    if not found:
        return None, "not compared: at no length have both a time"
    if not compared:
        return None, f"not compared: {', '.join(dict.fromkeys(found[length] for length in others))}"
    start, words = _compared(compared, "compared" if others else "measured")
    return start, words + (f"; not compared at {', '.join(map(length_name, others))}" if others else "")


def _compared(verdicts: Mapping[int, str], measured: str) -> tuple[int | None, str]:
    lengths, kinds = list(verdicts), set(verdicts.values())
    last = lengths[-1]
    if len(lengths) == 1:
        place = f"at {length_name(last)}, the only length {measured}"
        words = {FASTER: place, SLOWER: f"slower than dense {place}", NO_DIFFERENCE: f"{NO_DIFFERENCE} {place}"}
        return last if kinds == {FASTER} else None, words[verdicts[last]]
    other = max((length for length in lengths if verdicts[length] != FASTER), default=0)
    if other < last:
        start = min(length for length in lengths if length > other)
        if start == last:
            return start, f"at {length_name(start)}, the longest {measured}"
        return start, f"from {length_name(start)} on" + ("" if other else f", the shortest {measured}")
    if kinds == {SLOWER}:
        return None, f"slower than dense at every length {measured}"
    if kinds == {NO_DIFFERENCE}:
        return None, f"{NO_DIFFERENCE} at any length {measured}"
    if FASTER not in kinds:
        return None, f"measurably faster at no length {measured}"
    sign = "not" if verdicts[last] == SLOWER else NO_DIFFERENCE
    return None, f"{sign} at {length_name(last)}, the longest {measured}"

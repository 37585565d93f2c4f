"""The ids of a prompt: the one place that makes them, for what is counted and for what a model reads.

A prompt is continued, so nothing may stand behind its text: an end token (EOS, SEP) that a tokenizer appends would close
what the model is to go on with. In front stands what the tokenizer puts there (BOS, CLS, or nothing), once: text that
spells it out, as prepared data and chat templates do, is not given a second one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Tokenizer = Any
"""A transformers tokenizer, fast or slow: `tokenizer(text, add_special_tokens=...)["input_ids"]`."""

_PROBES = (" A probe, 12345:\n\nit tells  apart what \u00e9 differs.", "Another one; 678 words")


class Encoder:
    """Prompts under one tokenizer.

    Attributes:
        front: the ids that the tokenizer puts in front of a text, where special tokens are wanted.
        back: special ids that it appends even where none are wanted; never part of a prompt.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        special = _special_ids(tokenizer)
        bare = [_ids(tokenizer, probe, False) for probe in _PROBES]
        fronts = [_before(_ids(tokenizer, probe, True), body, special) for probe, body in zip(_PROBES, bare, strict=True)]
        self.front = _common(fronts)
        self.back = _common([_leading(reversed(body), special) for body in bare])[::-1]
        self._once = {*self.front, *_common([_leading(body, special) for body in bare])}
        if (bos := getattr(tokenizer, "bos_token_id", None)) is not None:
            self._once.add(bos)

    def ids(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a prompt: what stands in front, once, if special tokens are wanted; the text; and nothing behind it."""
        return self.joined(_ids(self.tokenizer, text, False), add_special_tokens)

    def joined(self, body: Sequence[int], add_special_tokens: bool) -> list[int]:
        """A prompt's ids from those of its text without special tokens."""
        ids = list(body)
        if self.back and tuple(ids[len(ids) - len(self.back) :]) == self.back:
            del ids[len(ids) - len(self.back) :]
        if add_special_tokens:
            own = len(self.front)
            both = next(n for n in range(min(own, len(ids)), -1, -1) if self.front[own - n :] == tuple(ids[:n]))
            ids[:both] = self.front
        while len(ids) > 1 and ids[0] == ids[1] and ids[0] in self._once:
            del ids[0]
        return ids


def encode_prompt(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """The ids of a prompt that a model is to continue.

    Args:
        tokenizer: a transformers tokenizer.
        text: the whole prompt.
        add_special_tokens: whether the tokenizer's own tokens stand in front, where the text does not begin with them.
    """
    return Encoder(tokenizer).ids(text, add_special_tokens=add_special_tokens)


def _ids(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])


def _special_ids(tokenizer: Tokenizer) -> set[int]:
    """Ids that stand for no text; the one for unknown text does."""
    return set(getattr(tokenizer, "all_special_ids", ())) - {getattr(tokenizer, "unk_token_id", None)}


def _before(whole: list[int], body: list[int], special: set[int]) -> tuple[int, ...]:
    """What stands before a text's own ids in those with special tokens; its leading special ids where these differ."""
    for at in range(len(whole) - len(body) + 1):
        if whole[at : at + len(body)] == body:
            return tuple(whole[:at])
    return _leading(whole, special)


def _leading(ids: Iterable[int], special: set[int]) -> tuple[int, ...]:
    found: list[int] = []
    for token in ids:
        if token not in special:
            break
        found.append(token)
    return tuple(found)


def _common(several: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all begin with."""
    first, *others = several
    length = 0
    while length < len(first) and all(first[: length + 1] == other[: length + 1] for other in others):
        length += 1
    return first[:length]

"""The ids of a prompt: the one place that makes them, for what is counted and for what a model reads.

A prompt is continued, so nothing may stand behind its text: an end token (EOS, SEP) that a tokenizer appends would close
what the model is to go on with. In front stands what the tokenizer puts there (BOS, CLS, or nothing), once: text that
spells it out, as prepared data and chat templates do, is not given a second one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

Tokenizer = Any
"""A transformers tokenizer, fast or slow: `tokenizer(text, add_special_tokens=...)["input_ids"]`."""

_BATCH = 1_000_000  # characters of the texts that are encoded at a time: a core holds much for each token meanwhile
_PROBES = (" A probe, 12345:\n\nit tells  apart what \u00e9 differs.", "Another one; 678 words")
_SPECIAL_PROBE = " A probe, 12345:\n\nit <s> tells  apart what \u00e9 differs."


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
        return self._joined(_ids(self.tokenizer, text, False), add_special_tokens)

    def several(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """The ids of several prompts, those of `ids`. One batch uses all cores where it can."""
        if self._core is None or not texts:
            return [self.ids(text, add_special_tokens=add_special_tokens) for text in texts]
        found = self._core(list(texts), add_special_tokens=False)
        return [self._joined(each.ids, add_special_tokens) for each in found]

    @cached_property
    def _core(self) -> Callable[..., list[Any]] | None:
        """The batch call of a fast tokenizer's own core, or None where only the public call is sure to be right.

        It gives the same tokens without what else the public call makes of each, in half of the time. A core that truncates
        or pads, or a tokenizer whose class adds steps of its own, is found by comparing the two on a short text.
        """
        core = getattr(self.tokenizer, "backend_tokenizer", None) if getattr(self.tokenizer, "is_fast", False) else None
        call: Callable[..., list[Any]] | None = getattr(core, "encode_batch_fast", None)
        if core is None or call is None or core.truncation is not None or core.padding is not None:
            return None
        same = list(call([_SPECIAL_PROBE], add_special_tokens=False)[0].ids) == _ids(self.tokenizer, _SPECIAL_PROBE, False)
        return call if same else None

    def _joined(self, body: Sequence[int], add_special_tokens: bool) -> list[int]:
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


def encode_prompts(tokenizer: Tokenizer, texts: Iterable[str], *, add_special_tokens: bool = True) -> Iterator[list[int]]:
    """As `encode_prompt`, of several prompts in their order: short ones many at a time, which uses all cores."""
    encoder = Encoder(tokenizer)
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH:
            yield from encoder.several(batch, add_special_tokens=add_special_tokens)
            batch, characters = [], 0
    yield from encoder.several(batch, add_special_tokens=add_special_tokens)


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

"""Counting tokens: exactly for a whole text, from a cache for the pieces that a text is planned with.

Tokenising 131072 tokens takes a tenth of a second or more, so a generator cannot search for the right size by
tokenising every candidate. It plans with the sizes of pieces (words, mostly), which are counted once per tokenizer,
and has the finished text counted exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from ruler_tasks.encoding import Encoder, Tokenizer

_ANCHOR = "."
_MOST_PIECES = 250_000
_caches: WeakKeyDictionary[Any, tuple[dict[str, int], dict[Any, Any]]] = WeakKeyDictionary()


class TokenCounter:
    """Token counts under one tokenizer.

    Attributes:
        memo: what a task plans with and may keep for as long as the tokenizer lives, under keys of its own.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._encoder = Encoder(tokenizer)
        try:
            self._pieces, self.memo = _caches.setdefault(tokenizer, ({}, {}))
        except TypeError:  # a tokenizer that cannot be hashed or weakly referenced gets a cache of its own
            self._pieces, self.memo = {}, {}

    def count(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[int]:
        """The exact number of tokens that `encode_prompt` makes of each text. One batch uses all cores where it can."""
        return list(map(len, self._encoder.several(texts, add_special_tokens=add_special_tokens)))

    def count_one(self, text: str, *, add_special_tokens: bool = True) -> int:
        """The exact number of tokens of one text."""
        return self.count([text], add_special_tokens=add_special_tokens)[0]

    def pieces(self, pieces: Sequence[str]) -> list[int]:
        """The tokens that each piece adds to a text that goes on; a piece carries its own leading space or newline.

        The counts are those of the piece after a full stop. They add up exactly when the tokenizer splits text before
        it merges and nearly so otherwise: they are for planning.
        """
        known = self._pieces
        new = [piece for piece in dict.fromkeys(pieces) if piece not in known]
        if new:
            if len(known) + len(new) > _MOST_PIECES:
                known.clear()
                new = list(dict.fromkeys(pieces))
            anchor, *counts = self.count([_ANCHOR, *(_ANCHOR + piece for piece in new)], add_special_tokens=False)
            known.update((piece, count - anchor) for piece, count in zip(new, counts, strict=True))
        return [known[piece] for piece in pieces]

    def words(self, words: Iterable[str]) -> list[int]:
        """The tokens that each word adds to a text in which a space stands before it."""
        return self.pieces([f" {word}" for word in words])

    def planned(self, texts: Sequence[str]) -> list[int]:
        """What each text adds to one that goes on, as the sum over its words; quick for text whose words repeat."""
        split = [text.replace(" ", "\0 ").split("\0") for text in texts]
        counts = iter(self.pieces([word for words in split for word in words]))
        return [sum(next(counts) for _ in words) for words in split]

"""Where a prompt ends and its answer begins, in the ids of one text."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ruler_tasks import encode_prompt


def shared(before: Sequence[int], whole: Sequence[int]) -> int:
    """With how many ids of the text ``before`` it a ``whole`` one begins, at least one of its own left out.

    A token may reach from one text into what follows it: it belongs to that.
    """
    return min(_alike(before, whole), len(whole) - 1)


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """With how many ids both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def split(prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids of a prompt and of its answer within one text.

    They part where the ids of the text and of the prompt alone do, and behind white space. Raises ValueError for an answer
    that leaves no token of its own.
    """
    alone, whole = (encode_prompt(tokenizer, text) for text in (prompt, prompt + answer))
    # Strictly fewer than all: what the answer's last token is merged with would leave nothing to predict.
    at = _alike(alone, whole)
    while at < len(whole) and not str(tokenizer.decode([whole[at]])).strip():
        at += 1
    if not 0 < at < len(whole):
        raise ValueError(f"the answer {answer!r} has no token of its own behind its prompt")
    return tuple(whole[:at]), tuple(whole[at:])

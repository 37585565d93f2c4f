"""Where sentences end: as NLTK says, which the published code asks, or by punctuation where it is not installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise

from ruler_tasks.sources import sentence_ends

BY_PUNCTUATION = "sentences by punctuation"
"""How the source of samples ends that were drawn without NLTK."""

_MISSING = (
    "NLTK's English sentences are not installed, so a rule for punctuation stands in, and needles in essays may stand "
    "elsewhere than the reference puts them: `pip install nltk`, then `python -m nltk.downloader punkt_tab`."
)


@cache
def sentence_splitter() -> tuple[Callable[[str], list[str]], str]:
    """What splits a text into its sentences, and its name: NLTK with its English model, or our rule for punctuation."""
    try:
        from nltk.tokenize import sent_tokenize

        sent_tokenize("One. Two.")
    except (ImportError, LookupError):
        return by_punctuation, BY_PUNCTUATION
    return sent_tokenize, "sentences by NLTK"


def sentences_by() -> tuple[str, str]:
    """The name of what splits a text into its sentences, and where it is not what the reference asks, words that say so."""
    name = sentence_splitter()[1]
    return name, _MISSING if name == BY_PUNCTUATION else ""


def by_punctuation(text: str) -> list[str]:
    """The sentences of a text by the rule that the essays are split with elsewhere in this package."""
    words = text.split()
    return [" ".join(words[start:end]) for start, end in pairwise([0, *sentence_ends(words)])]

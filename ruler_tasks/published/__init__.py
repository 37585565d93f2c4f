"""Samples drawn as RULER's published code draws them: `--samples-as reference`.

Written from the rules of NVIDIA/RULER, `scripts/data/synthetic/` at c3f5e3b (Hsieh et al. 2024, arXiv 2404.06654), its known
defects included; no code of it is here. docs/published-samples.md says what is drawn alike and what is not.
"""

from __future__ import annotations

from ruler_tasks.published.samples import published_examples
from ruler_tasks.published.sentences import BY_PUNCTUATION, sentences_by
from ruler_tasks.published.word_lists import WORDS_MISSING

__all__ = ["BY_PUNCTUATION", "WORDS_MISSING", "published_examples", "sentences_by"]

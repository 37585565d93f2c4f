"""What a report says of how the samples of RULER were drawn: by tmbench's own rules, or as the reference draws them."""

from __future__ import annotations

from collections.abc import Sequence

from ruler_tasks.published import BY_PUNCTUATION, WORDS_MISSING


def drawn_words(samples_as: str) -> str:
    """What a title says of the drawing, with ", " behind it; nothing for tmbench's own."""
    return "samples drawn as the reference draws them, " if samples_as == "reference" else ""


def drawing_notes(samples_as: str, wording: str, origins: Sequence[str]) -> list[str]:
    """What must be known before scores are set beside published ones, given what each row's prompts are made of."""
    if samples_as != "reference":
        if not wording.startswith("reference"):
            return []
        return [
            "The wording is the published one, but tmbench drew the samples by its own rules: published scores compare only "
            "under `--samples-as reference` too."
        ]
    notes = {
        "Drawn as the reference draws them, the answers of cwe and fwe and the documents of qa stand at the same places in "
        "samples of one size, and special tokens are not counted.": True,
        "Sentences were told apart by punctuation, not by NLTK as in the reference, so needles in essays may stand "
        "elsewhere.": any(origin.endswith(BY_PUNCTUATION) for origin in origins),
        "The reference's english_words.json was missing, so the words of cwe are others than its own.": any(
            origin.endswith(WORDS_MISSING) for origin in origins
        ),
    }
    return [note for note, applies in notes.items() if applies]

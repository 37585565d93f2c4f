"""Where the question of a prompt begins: what stands before it is the same whatever is asked."""

from __future__ import annotations

import re
import string

from ruler_tasks.draws import Kind, seeded
from ruler_tasks.errors import WordingError
from ruler_tasks.example import Example, Frame
from ruler_tasks.wording import Prompt, Wording

_CONTEXT = "{context}"
_FIELDS = {"key": r"(?P<key>[^\n]+?)", "value": r"(?P<value>\S+?)"}


def question_start(example: Example, wording: Wording) -> int:
    """The character of a sample's prompt at which its question begins: behind the context of its task's template.

    Args:
        example: a sample that was made with this wording.
        wording: whose template is looked for.

    Raises:
        WordingError: the template asks before its context, or has no text between the context and what is asked.
    """
    before, _, after = _prompt(example, wording).template.rpartition(_CONTEXT)
    words = after.partition("{")[0].rstrip()
    if "{query}" in before or not words:
        raise WordingError(f"The wording {wording.name} asks before its context in {example.task}, or right behind it.")
    at = example.input.rfind(words)
    if at < 0:
        raise WordingError(f"Sample {example.index} of {example.task} is of another wording than {wording.name}.")
    return at


def further_questions(example: Example, wording: Wording, frame: Frame = Frame()) -> list[tuple[str, tuple[str, ...]]]:
    """What else may be asked of a sample's context: the text behind it, answer prefix included, and the references.

    Of needles it is the values of each other key, in a random order that the sample decides. Other tasks have no further
    question.

    Args:
        example: a sample that was made with this wording and frame.

    Raises:
        WordingError: as `question_start`.
    """
    if not example.task.startswith("niah"):
        return []
    values: dict[str, list[str]] = {}
    for needle in _needle(wording).finditer(example.input[: question_start(example, wording)]):
        values.setdefault(needle["key"], []).append(needle["value"])
    others = [(key, tuple(own)) for key, own in values.items() if {*own} != {*example.outputs}]
    seeded("further questions", example.task, example.index).shuffle(others)
    return [(_question(wording, frame, key, own), own) for key, own in others]


def _needle(wording: Wording) -> re.Pattern[str]:
    """What finds needles in a text."""
    kinds = "|".join(map(re.escape, wording.types.values()))
    parts = [
        re.escape(words) + ("" if name is None else _FIELDS.get(name, f"(?:{kinds})"))
        for words, name, _, _ in string.Formatter().parse(wording.needle)
    ]
    return re.compile("".join(parts))


def _question(wording: Wording, frame: Frame, key: str, values: tuple[str, ...]) -> str:
    kind: Kind = "numbers" if values[0].isdigit() else "uuids" if values[0].count("-") == 4 else "words"
    prompt = wording.niah_one if len(values) == 1 else wording.niah_many
    # The mark is no white space, which a frame takes off the ends.
    text, prefix = prompt.render(type=wording.types[kind], context="\0", query=key)
    return frame.around(text).rpartition("\0")[2] + prefix


def _prompt(example: Example, wording: Wording) -> Prompt:
    """The template and answer prefix of a sample."""
    if example.task.startswith("niah"):
        return wording.niah_one if len(example.outputs) == 1 else wording.niah_many
    if example.task.startswith("qa"):
        return wording.qa
    found: Prompt = getattr(wording, example.task)
    return found

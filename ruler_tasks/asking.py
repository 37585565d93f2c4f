"""Where the question of a prompt begins: what stands before it is the same whatever is asked."""

from __future__ import annotations

from ruler_tasks.errors import WordingError
from ruler_tasks.example import Example
from ruler_tasks.wording import Prompt, Wording

_CONTEXT = "{context}"


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


def _prompt(example: Example, wording: Wording) -> Prompt:
    """The template and answer prefix of a sample."""
    if example.task.startswith("niah"):
        return wording.niah_one if len(example.outputs) == 1 else wording.niah_many
    if example.task.startswith("qa"):
        return wording.qa
    found: Prompt = getattr(wording, example.task)
    return found

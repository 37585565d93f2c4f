"""One sample of a task, and the frame (a chat template) that a prompt is put in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ruler_tasks.errors import DatasetError


@dataclass(frozen=True)
class Frame:
    """What stands around a task's text: a chat template's turn markers, or nothing.

    The prompt is prefix, task text, suffix, answer prefix, so that the answer prefix opens the model's own turn.
    `add_special_tokens` says whether the tokenizer adds its own (a template that spells out its BOS sets it to False).
    `strip` says whether the template takes white space off both ends of the text. All of it counts towards the length.
    """

    prefix: str = ""
    suffix: str = ""
    add_special_tokens: bool = True
    strip: bool = False

    def around(self, text: str) -> str:
        """The text in its frame."""
        return f"{self.prefix}{text.strip() if self.strip else text}{self.suffix}"


@dataclass(frozen=True)
class Example:
    """One prompt and the answers that are looked for in what a model generates after it.

    Attributes:
        task: the task's name.
        index: the sample's number.
        input: the prompt up to the answer prefix, frame included.
        answer_prefix: how the model's answer begins; part of the prompt.
        outputs: the reference answers.
        length: the tokens of the prompt, special tokens included, plus `max_new_tokens`.
        max_new_tokens: the tokens that a model may generate.
        source: where the text comes from, e.g. "noise", "generated prose" or "squad (squad.json)".
        position: what `token_position_answer` is, or what counts it.
        parameters: what was chosen for this sample where a task has several settings, by RULER's names: how often the common
            words of `cwe` and the others come up.
    """

    task: str
    index: int
    input: str
    answer_prefix: str
    outputs: tuple[str, ...]
    length: int
    max_new_tokens: int
    source: str
    position: int | Callable[[], int] | None = field(default=None, repr=False, compare=False)
    parameters: Mapping[str, int] = field(default_factory=dict, hash=False)

    @property
    def token_position_answer(self) -> int | None:
        """The tokens of `input` in front of the first answer, without special tokens; for needles only.

        They are counted when they are asked for, since that takes half as long as making the sample.
        """
        return self.position() if callable(self.position) else self.position

    @property
    def prompt(self) -> str:
        """The whole text that a model reads."""
        return self.input + self.answer_prefix

    def to_json(self) -> dict[str, Any]:
        """The sample as one object of RULER's `validation.jsonl`, and beside its fields the source and the parameters."""
        fields: dict[str, Any] = {
            "index": self.index,
            "input": self.input,
            "outputs": list(self.outputs),
            "length": self.length,
            "length_w_model_temp": self.length,
            "answer_prefix": self.answer_prefix,
        }
        if (position := self.token_position_answer) is not None:
            fields["token_position_answer"] = position
        if self.parameters:
            fields["parameters"] = dict(self.parameters)
        return {**fields, "source": self.source}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], *, task: str, max_new_tokens: int, index: int | None = None) -> Example:
        """A sample from an object of `validation.jsonl`.

        Args:
            fields: the object; `input` and `outputs` are needed, a missing answer prefix is empty.
            task: the task's name, which the file does not hold.
            max_new_tokens: the task's budget for the answer.
            index: the sample's number if the object's own is not to be trusted (for needles RULER stores the
                character position of the answer there).

        Raises:
            DatasetError: a field is missing or of the wrong type, or there is no text to ask.
        """
        if not isinstance(fields, Mapping):
            raise DatasetError("A sample must be a JSON object.")
        _check(fields, "input", str, needed=True)
        _check(fields, "outputs", list, needed=True)
        for name, kind in (("answer_prefix", str), ("index", int), ("length", int), ("source", str)):
            _check(fields, name, kind)
        _check(fields, "token_position_answer", int)
        _check(fields, "parameters", dict)
        prefix = fields.get("answer_prefix") or ""
        if not (fields["input"] + prefix).strip():
            raise DatasetError("The fields 'input' and 'answer_prefix' hold no text.")
        outputs = fields["outputs"]
        if not outputs or not all(isinstance(output, str) and output for output in outputs):
            raise DatasetError("The field 'outputs' must be a list of at least one non-empty string.")
        return cls(
            task=task,
            index=fields.get("index", 0) if index is None else index,
            input=fields["input"],
            answer_prefix=prefix,
            outputs=tuple(outputs),
            length=fields.get("length") or 0,
            max_new_tokens=max_new_tokens,
            source=fields.get("source") or "prepared",
            position=fields.get("token_position_answer"),
            parameters=fields.get("parameters") or {},
        )


def _check(fields: Mapping[str, Any], name: str, kind: type, needed: bool = False) -> None:
    value = fields.get(name)
    if value is None:
        if needed:
            raise DatasetError(f"The field {name!r} is missing.")
    elif not isinstance(value, kind) or isinstance(value, bool):
        raise DatasetError(f"The field {name!r} is a {type(value).__name__}, not a {kind.__name__}.")

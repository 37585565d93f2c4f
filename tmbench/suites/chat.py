"""A model's chat template, taken apart: the text around a user's message, up to where the answer begins.

What a template is given beside the message is part of the prompt. The user's variables are recorded in rows; thinking is
switched off where the template has a switch, since RULER's answer begins where the prompt ends and would land inside of the
open think block; and the date is fixed, or a prompt would be another one tomorrow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from ruler_tasks import Frame
from tmbench.errors import UserError

OPTION = "--chat-template-kwargs"
THINKING_OFF: Mapping[str, bool | int] = {"enable_thinking": False, "thinking": False, "thinking_budget": 0}
"""The switches of thinking that templates have, by the variable's name, and what turns them off: Qwen3 and those after it;
DeepSeek-V3.1, Granite 3.2 and Kimi; Seed-OSS."""
DATE = datetime(2024, 7, 26)
"""What templates take for today: the day that Llama-3.1's own template names where nobody gives it one."""
ANOTHER_DATE = datetime(2025, 12, 31)
PROBE = (
    "\N{OBJECT REPLACEMENT CHARACTER}A 'text' of \"two\" <lines> & more,\n  as {it} is: 1\\2\N{OBJECT REPLACEMENT CHARACTER}"
)
"""Stands for the task's text while a template is taken apart: what escapes, trims within, or alters shows in it."""

_OURS = {
    "messages", "conversation", "add_generation_prompt", "continue_final_message", "tokenize", "tokenizer_kwargs", "padding",
    "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "sanitize_control_tokens",
}  # fmt: skip
"""What tmbench or transformers sets itself when a template is rendered."""
_GIVEN = {"messages", "add_generation_prompt", "raise_exception", "strftime_now", "namespace", "range", "dict", "lipsum",
          "cycler", "joiner"}  # fmt: skip
"""What a template may read without anybody giving it."""
_NOW = re.compile(
    r"""strftime_now\(\s*(?:format\s*=\s*)?(?P<quote>['"])(?P<format>(?:(?!(?P=quote))[^\\])*)(?P=quote)\s*\)"""
)
_WORD = "(?:think|thinking|thought|thoughts|reason|reasoning)"
_THINK = re.compile(
    rf"[<\[\u25c1][|\uff5c]?(?P<end>/?)(?:(?P<before>start|begin|end)_(?:of_)?|\w+:)?{_WORD}"
    r"(?:_(?P<behind>start|begin|end))?[|\uff5c]?[>\]\u25b7]"
    r"|<\|channel\|?>\s*(?P<channel>analysis|thought|commentary|final)\b|(?P<closed><channel\|>)",
    re.IGNORECASE,
)
"""A mark of a think block: <think> and </think>, [THINK], <|START_THINKING|>, <|end_of_thought|>, <seed:think>, the channels
of gpt-oss and others."""


@dataclass(frozen=True)
class Chat:
    """What a chat template makes of a prompt."""

    frame: Frame = field(default_factory=Frame)
    kwargs: str = ""
    """The variables that the template was given, as JSON with sorted keys; "" for none."""
    notes: tuple[str, ...] = ()
    """What was done on the user's behalf, and what a user must know: sentences."""


def parse_kwargs(text: str) -> dict[str, Any]:
    """The variables of ``--chat-template-kwargs``; raises UserError for text that is no JSON object."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name comes twice")
        return dict(pairs)

    def refuse(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    remedy = """give one such as '{"enable_thinking": false}'"""
    try:
        found = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{OPTION} is not a JSON object ({reason}): {remedy}") from error
    if not isinstance(found, dict):
        raise UserError(f"{OPTION} is not a JSON object: {remedy}")
    return found


def take_apart(tokenizer: PreTrainedTokenizerBase, given: Mapping[str, Any] | None = None) -> Chat:
    """What a model's chat template puts around a user's message, up to where the answer begins.

    Args:
        given: the user's own variables, which the template must read.

    Raises UserError where there is no template, where it cannot be rendered, or where the message does not come through it
    once and unchanged.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("--apply-chat-template: this model's tokenizer has no chat template; leave the option out")
    variables = dict(given or {})
    source = _source(tokenizer, variables)
    read = _read_by(source)
    _check(variables, read)
    notes = []
    if not any(name in variables for name in THINKING_OFF):
        off = {name: value for name, value in THINKING_OFF.items() if read is not None and name in read}
        variables |= off
        if off:
            notes.append(
                f"thinking is switched off in the chat template ({json.dumps(off)[1:-1]}): {OPTION} sets it otherwise"
            )
    passed = {name: value for name, value in variables.items() if name != "chat_template"}
    prefix, suffix, strips = _around(tokenizer, _at(source, DATE), passed)
    if (prefix, suffix, strips) != _around(tokenizer, _at(source, ANOTHER_DATE), passed):
        notes.append(f"the chat template tells today's date: {DATE:%d %b %Y} stands for it, so that prompts stay the same")
    if "strftime_now(" in _at(source, DATE):
        notes.append("the chat template makes a date in a way that cannot be held: prompts of another day may be other ones")
    if ends_thinking(suffix):
        notes.append(
            f"the prompt ends inside of an open think block ({_opening(suffix)!r}), so answers are part of the model's "
            f"thoughts: see whether {OPTION} can switch thinking off, or leave --apply-chat-template out"
        )
    if "<|channel|>" in source and "<|channel|>" not in suffix:
        notes.append(
            "the chat template has the model name a channel before it answers, and the prompt names none: answers begin "
            "where no channel is open, so leave --apply-chat-template out to compare"
        )
    used = json.dumps(variables, sort_keys=True, ensure_ascii=False) if variables else ""
    return Chat(Frame(prefix, suffix, add_special_tokens=False, strip=strips), used, tuple(notes))


def ends_thinking(text: str) -> bool:
    """Whether the last mark of a think block in a text opens one."""
    return bool(_opening(text))


def _opening(text: str) -> str:
    """The mark that opened the think block that a text ends in; "" where it ends in none."""
    opened = ""
    for found in _THINK.finditer(text):
        words = [(found[name] or "").lower() for name in ("before", "behind", "channel")]
        closes = found["end"] or found["closed"] or not {"end", "final", "commentary"}.isdisjoint(words)
        opened = "" if closes else found[0]
    return opened


def _source(tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]) -> str:
    """The template's text; a tokenizer may have several, of which ``chat_template`` among the variables names one."""
    templates = tokenizer.chat_template
    names = sorted(templates) if isinstance(templates, dict) else []
    wanted = variables.get("chat_template")
    if wanted is not None and wanted not in names:
        has = f"has {', '.join(names)}" if names else "has one alone"
        raise UserError(f"{OPTION}: there is no chat_template {wanted!r}: this model {has}")
    if isinstance(templates, dict) and wanted is None and "default" not in templates:
        example = json.dumps({"chat_template": names[0]})
        raise UserError(
            f"--apply-chat-template: this model has no default among its chat templates ({', '.join(names)}): "
            f"name one, as in {OPTION} '{example}'"
        )
    return str(templates[wanted or "default"] if isinstance(templates, dict) else templates)


def _at(source: str, date: datetime) -> str:
    """A template as it would read on that day; what it formats the date by must stand in it as text."""
    return _NOW.sub(lambda found: json.dumps(date.strftime(found["format"]), ensure_ascii=False), source)


class _Generation(Extension):
    """transformers' own block, which marks what the assistant says; here it is read over."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 wants it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _read_by(source: str) -> set[str] | None:
    """The variables that a template reads and does not set itself; None for text that is no template."""
    extensions = ["jinja2.ext.loopcontrols", _Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    try:
        return set(find_undeclared_variables(environment.parse(source)))
    except (TemplateError, RecursionError):
        return None


def _check(variables: Mapping[str, Any], read: set[str] | None) -> None:
    """Raise UserError for a variable that is not the user's to set, and for one that would change nothing."""
    for name in variables:
        if name in _OURS:
            raise UserError(f"{OPTION}: {name} is set by tmbench itself: leave it out")
        if name != "chat_template" and read is not None and name not in read:
            others = ", ".join(sorted(read - _GIVEN)) or "none"
            raise UserError(
                f"{OPTION}: the chat template does not read {name}: leave it out, or give one of these: {others}"
            )


def _around(tokenizer: PreTrainedTokenizerBase, source: str, variables: Mapping[str, Any]) -> tuple[str, str, bool]:
    """What stands before and behind a message, given as text or else as a list of parts, and whether it is stripped.

    Raises UserError where neither comes through once and unchanged.
    """

    def rendered(content: Any) -> str:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=False,
            add_generation_prompt=True,
            chat_template=source,
            **variables,
        )
        return str(text)

    obstacles: list[str] = []
    for wrap in (str, _parts):
        try:
            text, spaced = rendered(wrap(PROBE)), rendered(wrap(f" {PROBE}\n"))
        except Exception as error:  # a template is a program of the model's makers, and may raise anything
            obstacles.append(f"the chat template cannot be rendered: {_reason(error)}")
            continue
        marks = text.count(PROBE[0])
        prefix, whole, suffix = text.partition(PROBE)
        if whole and marks == 2:
            return prefix, suffix, spaced == text
        obstacles.append(f"the chat template {'repeats' if whole else 'changes' if marks else 'drops'} the user's message")
    raise UserError(f"--apply-chat-template: {obstacles[0]}; leave the option out")


def _parts(text: str) -> list[dict[str, str]]:
    """A message as templates of models that read pictures too want it."""
    return [{"type": "text", "text": text}]


def _reason(error: Exception) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words.rstrip(".")

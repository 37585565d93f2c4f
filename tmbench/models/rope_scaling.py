"""``--rope-scaling``: rotary embeddings scaled beyond the lengths that a model was trained on, as its config might say.

Linear interpolation: Chen et al. 2023, arXiv 2306.15595. Dynamic: by the length of each text. YaRN: Peng et al. 2023, arXiv
2309.00071. llama3: as Llama 3.1 has it. The frequencies are transformers' own; what it is told of them is made here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tmbench.errors import UserError, shortened
from tmbench_kernels.parameters import LARGEST_COUNT

OPTION = "--rope-scaling"
EXAMPLE = "give for instance yarn:factor=4,original=32768"
TRAINED, TRAINED_KEY = "original", "original_max_position_embeddings"
"""The positions that a model was trained on, as the option and as configs call them."""
READ: Mapping[str, Mapping[str, float | None]] = {
    "yarn": dict.fromkeys(
        ("factor", TRAINED, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
    ),
    "linear": {"factor": None},
    "llama3": {"factor": None, TRAINED: None, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "dynamic": {"factor": None},
}
"""The numbers that each type reads, and those of Llama 3.1 where they are not given. None is left to transformers."""


@dataclass(frozen=True)
class RopeScaling:
    """A type of scaling with its numbers, which are those of ``READ``."""

    kind: str
    numbers: tuple[tuple[str, float], ...]

    @classmethod
    def parse(cls, text: str) -> RopeScaling:
        """From "yarn:factor=4,original=32768" or the JSON of a config; raises UserError for what is neither."""
        given = _of_json(text) if text.lstrip().startswith("{") else _of_text(text)
        kind = given.pop("rope_type", None)
        if not isinstance(kind, str) or kind not in READ:
            raise UserError(f"{OPTION} {shortened(text)} has no type that is known: choose from {', '.join(READ)}")
        if unknown := [name for name in given if name not in READ[kind]]:
            raise UserError(
                f"{OPTION} {shortened(text)}: {kind} has no {shortened(unknown[0])}; it reads {', '.join(READ[kind])}"
            )
        if "factor" not in given:
            raise UserError(f"{OPTION} {shortened(text)} has no factor: {EXAMPLE}")
        for name, value in given.items():
            if wanted := _fault(name, value):
                raise UserError(f"{OPTION} {shortened(text)}: {name} must be {wanted}")
        return cls._of(kind, given)

    @classmethod
    def _of(cls, kind: str, given: Mapping[str, float]) -> RopeScaling:
        numbers = {name: given.get(name, default) for name, default in READ[kind].items()}
        return cls(kind, tuple((name, value) for name, value in numbers.items() if value is not None))

    def __str__(self) -> str:
        """As the option takes it, in one order."""
        return f"{self.kind}:" + ",".join(f"{name}={_text(value)}" for name, value in self.numbers)

    def apply(self, name: str, config: Any) -> RopeScaling:
        """Have a model's config say so; the same with what it leaves to the config.

        Raises UserError for a model without rotary embeddings, or whose config scales them, or has several kinds of them.
        """
        if why := obstacle(config):
            raise UserError(f"{OPTION} does not go with --model {name}, {why}")
        text = config.get_text_config()
        rope = text.rope_parameters
        positions = int(text.max_position_embeddings)
        full = self._of(self.kind, {TRAINED: positions, **dict(self.numbers)})
        numbers = dict(full.numbers)
        told = {TRAINED_KEY if key == TRAINED else key: value for key, value in numbers.items()}
        text.rope_parameters = {**rope, "rope_type": self.kind, **told}
        if self.kind == "llama3":
            # Such configs give the scaled number of positions: see ``tmbench.models.geometry.max_positions``.
            text.max_position_embeddings = max(positions, int(numbers["factor"] * numbers[TRAINED]))
        return full

    def check_heeded(self, name: str, model: nn.Module) -> None:
        """Raise UserError where the model's rotary embeddings are not what its config says now."""
        if not any(getattr(module, "rope_type", None) == self.kind for module in model.modules()):
            raise UserError(
                f"{OPTION} does not go with --model {name}, as {type(model).__name__} has rotary embeddings that its config "
                "does not scale: leave it out"
            )


def obstacle(config: Any) -> str:
    """Why a model of this config is not scaled by the option, and what to do; "" where it can be."""
    text = config.get_text_config()
    rope: Mapping[str, Any] = getattr(text, "rope_parameters", None) or {}
    if not rope:
        return "which has no rotary embeddings: leave it out"
    if getattr(text, "max_position_embeddings", None) is None:
        return (
            "whose config does not say how many positions it has (max_position_embeddings): add them there, or leave it out"
        )
    if any(isinstance(value, Mapping) for value in rope.values()):
        return "which has rotary embeddings of its own in each kind of layer: give their scaling in its config.json"
    if (own := rope.get("rope_type", rope.get("type", "default"))) != "default":
        return f"whose config has rotary embeddings of type {own} already: leave it out, or change its config.json"
    return ""


def _of_text(text: str) -> dict[str, Any]:
    kind, _, rest = text.partition(":")
    found: dict[str, Any] = {"rope_type": kind.strip()}
    for part in filter(None, (part.strip() for part in rest.split(","))):
        name, _, value = (piece.strip() for piece in part.partition("="))
        try:
            found[_name(name)] = json.loads(value.lower())
        except ValueError as error:
            raise UserError(f"{OPTION} {shortened(text)}: {shortened(part)!r} gives no number: {EXAMPLE}") from error
    return found


def _of_json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{OPTION} {shortened(text)} is not JSON: {EXAMPLE}") from error
    return {_name(name): value for name, value in found.items()}


def _name(name: str) -> str:
    """The option's name for one of configs."""
    return {TRAINED_KEY: TRAINED, "type": "rope_type"}.get(name, name)


def _fault(name: str, value: Any) -> str:
    """What a number ought to be; "" for one that is."""
    if name == "truncate":
        return "" if isinstance(value, bool) else "true or false"
    least = 1 if name in ("factor", TRAINED) else 0
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= LARGEST_COUNT
    whole = name == TRAINED
    return "" if number and not (whole and value != int(value)) else f"a {'whole ' * whole}number of {least} or more"


def _text(value: float) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if value == int(value) else repr(value)

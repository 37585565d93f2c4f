"""A method as it was asked for: its name with what follows it, and the options that it reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tmbench.errors import UserError, shortened
from tmbench.methods.installed import get_method
from tmbench.methods.layers import RESULTS, chosen_layers
from tmbench.methods.plan import DeepLayers, ModelShape, Plan
from tmbench.methods.table import LAYERS, Method
from tmbench.results.variants import DENSE, DENSE_BACKEND, Identity, identity_of


@dataclass(frozen=True)
class MethodSpec:
    """A method with the values that were given for its parameters: what a plan is made of once the model is known."""

    method: Method
    values: Mapping[str, Any] = field(default_factory=dict)
    layers: DeepLayers | None = None
    """The deep layers; None takes the published ones, or the second half."""

    @classmethod
    def of(cls, text: str, parameters: Mapping[str, Any] | None = None) -> MethodSpec:
        """A method by its name, which values may follow, and further values; raises UserError as ``parse_method`` does."""
        method, own = parse_method(text)
        return cls(method, method.read({**(parameters or {}), **own}))

    def with_layers(
        self, shape: ModelShape, layers: str | None = None, starting_layer: int | str | None = None, root: Path = RESULTS
    ) -> MethodSpec:
        """The same with deep layers as ``chosen_layers`` takes them; raises UserError where no pattern is deep."""
        chosen = chosen_layers(shape, layers, starting_layer, root)
        if chosen is not None and self.method.deep is None:
            option = "--starting-layer" if layers is None else "--layers"
            raise UserError(f"{option} changes nothing in {self.method.name}: leave it out")
        return replace(self, layers=chosen)

    def plan(self, shape: ModelShape) -> Plan:
        """The method on a model of this shape; raises UserError for values that do not fit it."""
        return self.method.plan(shape, self.values, self.layers)


def parse_method(text: str) -> tuple[Method, dict[str, Any]]:
    """A method and the parameters that follow its name: "xattention:stride=8,threshold=0.8".

    Raises UserError for an unknown method, for a parameter that it does not read or that is given twice, and for a value
    that it cannot have.
    """
    name, _, given = text.partition(":")
    method = get_method(name)
    values: dict[str, str] = {}
    for part in filter(None, given.split(",")):
        parameter, _, value = (piece.strip() for piece in part.partition("="))
        if (parameter := parameter.replace("-", "_")) in values:
            raise UserError(f"--method {shortened(text)}: {parameter} is given twice: leave one of them out")
        values[parameter] = value
    try:
        return method, method.read(values)
    except UserError as error:
        raise UserError(f"--method {shortened(text)}: {error}") from None


def specs(texts: Sequence[str], options: Mapping[str, Any], *, layers: str = "") -> list[MethodSpec]:
    """The methods that were asked for, each once in every setting, in their order.

    Args:
        texts: as ``parse_method`` takes them. What follows a name counts for that method alone, before the options.
        options: the options that were given, for all methods that read them.
        layers: the option that says where deep patterns are, such as "--layers"; "" where none does.

    Raises:
        UserError: an option that none of the methods reads, and dense attention with several backends and never without one.
    """
    chosen = [parse_method(text) for text in texts]
    names = ", ".join(method.name for method, _ in chosen)
    known = {parameter for method, _ in chosen for parameter in method.parameters}
    for name, option in [*((name, f"--{name.replace('_', '-')}") for name in options), *[(LAYERS, layers)] * bool(layers)]:
        if name not in known:
            raise UserError(f"{option} changes none of {names}: leave it out")
    found: dict[Identity, MethodSpec] = {}
    for (method, own), text in zip(chosen, texts, strict=True):
        read = {name: value for name, value in options.items() if name in method.declared}
        try:
            spec = MethodSpec(method, method.read({**read, **own}))
        except UserError as error:
            raise UserError(f"--method {shortened(text)}: {error}" if own else str(error)) from None
        # A parameter that is given its default makes no other setting.
        found.setdefault(identity_of(method.name, method.named(spec.values)), spec)
    _check_dense(found)
    return list(found.values())


def _check_dense(found: Iterable[Identity]) -> None:
    """Raise UserError where it would not be clear which dense attention the others are held against."""
    dense = [dict(settings) for name, settings in found if name == DENSE]
    if len(dense) > 1 and all(DENSE_BACKEND in settings for settings in dense):
        raise UserError(
            f"--method {DENSE} is given with several backends, and what all else is held against is dense attention without "
            "one: add --method dense, and leave --dense-backend out"
        )

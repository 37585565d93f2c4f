"""Plans of methods for models that tests make."""

from __future__ import annotations

from tmbench.methods.installed import get_method
from tmbench.methods.layers import chosen_layers
from tmbench.methods.plan import ModelShape


def plan_of(model, name, *, layers=None, starting_layer=None, **values):
    """The plan of a method for a model, its config or its shape, with those of these values that the method reads."""
    shape = model if isinstance(model, ModelShape) else ModelShape.of(model)
    method = get_method(name)
    read = {parameter: value for parameter, value in values.items() if parameter in method.declared}
    return method.plan(shape, read, chosen_layers(shape, layers, starting_layer) if method.deep else None)

"""A module's ``forward``: the class's own, and another one for a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


def forward_of(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What the module's class does, whatever stands in front of it."""
    return type(module).forward(module, *args, **kwargs)


def replace_forward(stack: ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    """Give one module another ``forward`` until the stack unwinds."""
    if "forward" in vars(module):
        stack.callback(setattr, module, "forward", module.forward)
    else:
        stack.callback(delattr, module, "forward")
    module.forward = forward


@contextmanager
def own_forward(module: nn.Module) -> Iterator[None]:
    """Inside, a module that was given another ``forward`` has its class's own."""
    replaced = vars(module).pop("forward")
    try:
        yield
    finally:
        vars(module)["forward"] = replaced

"""Which attention each part of a model runs: changed for the parts that read text alone, and put back exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


class Implementations:
    """The names under which a model's parts look up their attention, as transformers keeps them: one in each config.

    Parts may have different ones, for instance an image encoder its own, so they are kept one by one.
    """

    def __init__(self, model: PreTrainedModel, modules: Sequence[Any]) -> None:
        """Note the names that ``model`` has now; ``modules`` are the attention modules that ``use`` is meant for."""
        every = {id(config): config for module in model.modules() for config in _configs(getattr(module, "config", None))}
        self._before = [(config, config._attn_implementation) for config in every.values()]
        # Masks are made by a model that holds the layers, by the name in its own config.
        holders = [part for part in model.modules() if isinstance(part, PreTrainedModel) and _holds(part, modules)]
        self._text = list({id(part.config): part.config for part in [*modules, *holders]}.values())

    def use(self, name: str) -> None:
        """Let the attention modules, and the models that hold them, look up this name."""
        for config in self._text:
            _set(config, name)

    def restore(self) -> None:
        """Put every part's own name back."""
        for config, name in self._before:
            _set(config, name)


def _configs(config: Any) -> Iterator[Any]:
    """A module's config and those inside of it; nothing where the module has none of transformers' kind."""
    if isinstance(config, PreTrainedConfig):
        yield config
        for name in config.sub_configs:
            yield from _configs(getattr(config, name, None))


def _holds(model: nn.Module, modules: Sequence[Any]) -> bool:
    inside = set(model.modules())
    return any(module in inside for module in modules)


def _set(config: Any, name: str | None) -> None:
    # A plain name would go to the configs inside of it too.
    config._attn_implementation = {"": name}

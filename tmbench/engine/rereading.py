"""Generation without a cache, recognised by what the model is given: there every new token would be one more prefill."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from tmbench.engine.calls import cache_name, rope_switch
from tmbench.engine.prefill_state import PrefillState
from tmbench.errors import UnsupportedModelError


class Rereading:
    """A hook before a model's ``forward`` that refuses a call with the prompt before and one token more.

    That is what generation without a cache asks for. A pattern would treat the new token as the prompt's last one, so what
    is decoded would be neither the method's nor dense. Where LongRoPE changes its angles, transformers' ``generate`` gives a
    whole text once more too. What a prefill of tmbench's own reads is no new token, whatever it repeats: another prompt, a
    chunk, or a question over what was read before.
    """

    def __init__(self, model: Any, method: str, prefill: PrefillState) -> None:
        self.method = method
        self.prefill = prefill
        self.names = list(inspect.signature(model.forward).parameters)
        self.caches = {cache_name(model), "past_key_values"}
        self.switch = rope_switch(model)
        self.prompt: Tensor | None = None
        self.length = 0
        """Tokens read since, prompt included."""

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at one call; raises UnsupportedModelError for one that reads a prompt once more."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if not isinstance(tokens, Tensor):
            return
        if tokens.shape[1] == 1 and any(given.get(name) is not None for name in self.caches):
            self.length += 1
            return
        before, self.prompt = self.prompt, tokens
        read, self.length = self.length, tokens.shape[1]
        if self.prefill.active or before is None:
            return
        if tokens.shape[1] != read + 1 or read not in (before.shape[1], self.switch):
            return
        if before.shape[0] == tokens.shape[0] and torch.equal(tokens[:, : before.shape[1]], before):
            raise UnsupportedModelError(
                f"{type(model).__name__} was given {read} tokens once more and one behind them, so a new token would be "
                f"another prefill through {self.method}: decode with tmbench.generate, or with a cache (use_cache=True), "
                "and read another prompt in a with block of its own"
            )

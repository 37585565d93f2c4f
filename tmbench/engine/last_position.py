"""The last layer on its last position: apart from keys and values, no other matters to the first token.

Its queries, its attention, and every module that runs after attention see that position alone, and yield it as a view of the
full length: exact, since all of them treat each position by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from tmbench.engine import operators
from tmbench.engine.attention import Applied, attend
from tmbench.engine.chunked_mlp import hidden_of
from tmbench.engine.compiled_layers import Runners, run_layer
from tmbench.engine.decoder_layers import DecoderLayer
from tmbench.engine.forwards import forward_of, replace_forward
from tmbench.engine.native_layers import run_native
from tmbench.engine.prefill_state import LayerPass
from tmbench.models.attention_modules import PLACE

QUERIES = ("q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj")
"""The modules of an attention that yield queries and nothing else: one, or those that make them from latents."""


def narrow(stack: ExitStack, last: DecoderLayer, session: Applied, run: Runners) -> None:
    """Let a model's last layer work on the last position only, but for its keys and values, until the stack unwinds.

    Of one that stays the model's own, whatever its kind, the MLP alone does.
    """
    layer, attention = last.module, last.attention
    if attention is None:
        if last.mlp is not None:
            replace_forward(stack, last.mlp, partial(_last_alone, last.mlp, last.with_router))
        replace_forward(stack, layer, partial(run_native, session.prefill, last))
        return
    slot = getattr(attention, PLACE)
    region = operators.Region(partial(attend, slot), None if last.mlp is None else partial(_hidden_of_mlp, last.mlp))
    run_last = run.last_layer_dynamic if slot.pattern.dynamic else run.last_layer
    replace_forward(stack, layer, partial(run_layer, slot, region, run_last, last, True, 0))
    queries = [getattr(attention, name, None) for name in QUERIES]
    for module in {*attention.children(), *layer.children()} - {attention}:
        if module not in run.narrowed:
            forward = run.last_mlp if module is last.mlp else forward_of
            run.narrowed[module] = LastPosition(
                module, forward, attention, queries=module in queries, with_router=module is last.mlp and last.with_router
            )
        replace_forward(stack, module, run.narrowed[module])


def _last_alone(mlp: nn.Module, with_router: bool, x: Tensor) -> Any:
    """An MLP on the last position of ``[batch, length, width]``, seen at all of them."""
    row = x[:, -1:]
    out = hidden_of(forward_of(mlp, row), row).expand(-1, x.shape[1], -1)
    return (out, None) if with_router else out


def _hidden_of_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    return hidden_of(forward_of(mlp, x), x)


class LastPosition:
    """A module that treats positions one by one, on the last one alone once attention is done.

    That which yields queries works on the last one from the start, unless a dynamic pattern chooses by several of them.
    """

    def __init__(
        self, module: nn.Module, forward: Callable[..., Any], attention: Any, *, queries: bool, with_router: bool
    ) -> None:
        self.module = module
        self.forward = forward
        self.attention = attention
        self.queries = queries
        self.with_router = with_router

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """``[batch, length, width]`` to the same length, of which only the last position is right once it is narrow.

        ``[tokens, width]`` of all texts in a row, as routers and experts beside an MLP are given them, stays as it is.
        """
        state: LayerPass = getattr(self.attention, PLACE).session.prefill.layer
        if x.dim() == 2 or not state.is_narrow(queries=self.queries):
            out = self.forward(self.module, x, *args, **kwargs)
            return (hidden_of(out, x), None) if self.with_router else out
        row = x[:, -1:]
        hidden = hidden_of(self.forward(self.module, row, *args, **kwargs), row)
        hidden = hidden.expand(hidden.shape[0], x.shape[1], *hidden.shape[2:])
        return (hidden, None) if self.with_router else hidden

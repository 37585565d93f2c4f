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
from tmbench.engine.attention import attend
from tmbench.engine.compiled_layers import Runners, run_layer
from tmbench.engine.forwards import forward_of, replace_forward
from tmbench.engine.prefill_state import LayerPass
from tmbench.models.attention_modules import PLACE


def narrow(stack: ExitStack, layer: Any, attention: Any, run: Runners) -> None:
    """Let a model's last layer work on the last position only, but for its keys and values, until the stack unwinds."""
    slot = getattr(attention, PLACE)
    region = operators.Region(partial(attend, slot), partial(forward_of, layer.mlp))
    run_last = run.last_layer_dynamic if slot.pattern.dynamic else run.last_layer
    replace_forward(stack, layer, partial(run_layer, slot, region, run_last, layer, True))
    queries = getattr(attention, "q_proj", None)
    for module in {*attention.children(), *layer.children()} - {attention}:
        if module not in run.narrowed:
            forward = run.last_mlp if module is layer.mlp else forward_of
            run.narrowed[module] = LastPosition(module, forward, attention, queries=module is queries)
        replace_forward(stack, module, run.narrowed[module])


class LastPosition:
    """A module that treats positions one by one, on the last one alone once attention is done.

    That which yields queries works on the last one from the start, unless a dynamic pattern chooses by several of them.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Any], attention: Any, *, queries: bool) -> None:
        self.module = module
        self.forward = forward
        self.attention = attention
        self.queries = queries

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """``[batch, length, width]`` to the same length, of which only the last position is right once it is narrow."""
        state: LayerPass = getattr(self.attention, PLACE).session.prefill.layer
        if not state.is_narrow(queries=self.queries):
            return self.forward(self.module, x, *args, **kwargs)
        out = self.forward(self.module, x[:, -1:], *args, **kwargs)
        return out.expand(out.shape[0], x.shape[1], *out.shape[2:])

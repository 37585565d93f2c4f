"""One decoded token of each of several sequences: a model's own forward pass, with attention over a static cache.

The model is called without a cache of transformers'. Attention is an operator that finds the cached keys by itself, writes
the new ones behind them, and so nothing in the pass depends on how long a sequence is: it can be recorded as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from tmbench.engine import operators
from tmbench.engine.decoder_layers import decoder_layers
from tmbench.engine.forwards import forward_of, replace_forward
from tmbench.engine.implementations import Implementations
from tmbench.engine.kv_cache import KvCache
from tmbench.errors import UnsupportedModelError
from tmbench.models.attention_modules import attention_modules, native_attentions, span
from tmbench_kernels.decode import attend_with_kvcache

IMPLEMENTATION = "tmbench-decode"
"""The name under which transformers finds the attention of such a pass."""


@contextmanager
def prepared(
    model: PreTrainedModel, cache: KvCache, cache_seqlens: Tensor, run: Callable[..., Any] = forward_of
) -> Iterator[None]:
    """Inside, ``next_logits`` decodes with this cache; the model is as before afterwards.

    Args:
        cache_seqlens: ``[slots]``, int32: the tokens that each slot holds, read when a pass runs.
        run: what runs a decoder layer, compiled or not.
    """
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
    modules = attention_modules(model)
    layers = decoder_layers(model, modules)
    if layers is None or len(layers) != len(cache.layers):
        raise UnsupportedModelError(
            f"the layers of {type(model).__name__} cannot be run apart, so it decodes one text at a time"
        )
    implementations = Implementations(model, [*modules, *native_attentions(model)])
    with ExitStack() as stack:
        stack.callback(implementations.restore)
        implementations.use(IMPLEMENTATION)
        for layer, (keys, values) in zip(layers, cache.layers, strict=True):
            mlp = None if layer.mlp is None else partial(forward_of, layer.mlp)
            module = layer.attention or layer.native
            window = 0 if module is None else span(module, model.config)
            region = operators.Region(partial(_attend, keys, values, cache_seqlens, window), mlp)
            replace_forward(stack, layer.module, partial(_run_layer, region, run, layer.module))
        yield


def next_logits(model: PreTrainedModel, tokens: Tensor, cache_seqlens: Tensor) -> Tensor:
    """Read one token of each slot, ``[slots, 1]``, at the place behind its cache; logits ``[slots, vocabulary]``.

    The caller then counts the token in ``cache_seqlens``.
    """
    places = cache_seqlens[:, None].long()
    output = model(input_ids=tokens, position_ids=places, use_cache=False, return_dict=True)
    logits: Tensor = output.logits[:, -1]
    return logits


def _run_layer(region: operators.Region, run: Callable[..., Any], layer: Any, *args: Any, **kwargs: Any) -> Any:
    with operators.entered(region):
        return run(layer, *args, **kwargs)


def _attend(
    keys: Tensor,
    values: Tensor,
    cache_seqlens: Tensor,
    window: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    about: dict[str, Any] = ({"softcap": softcap} if softcap else {}) | ({} if sinks is None else {"sinks": sinks})
    about |= {"window": window} if window else {}
    return attend_with_kvcache(q, k, v, keys, values, cache_seqlens, scale, **about)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of one layer: q ``[slots, heads, 1, dim]`` in, ``[slots, 1, heads, dim]`` out."""
    about = kwargs.get("softcap") or 0.0, kwargs.get("s_aux")
    return operators.attention(query, key, value, kwargs.get("scaling"), *about), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """None: every sequence sees all that its slot holds, or the last of it, as the layer has it."""
    return

"""The roofline of a time to first token: the arithmetic a method must do, at the GEMM throughput of this very device.

TTFT / roofline says how good the software is: 1.0 would be matrix products and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tmbench.engine.first_token import synchronize
from tmbench.methods.layer_kinds import SLIDING, layer_kinds
from tmbench.models.attention_modules import native_attentions, parents, self_attentions, span
from tmbench.models.geometry import Geometry, experts_per_token, is_experts
from tmbench.models.sharding import Shard

_ORDINARY: WeakKeyDictionary[nn.Module, PreTrainedModel] = WeakKeyDictionary()
FUSED = ("qkv", "query_key_value", "c_attn")
"""Parts of the names under which one projection yields queries, keys and values."""


def linear_flop(model: PreTrainedModel, length: int) -> float:
    """Floating-point operations that the model's linear layers and experts must do for the first token after one prompt."""
    return sum(linear_flop_by_layer(model, length).values())


def linear_flop_by_layer(model: PreTrainedModel, length: int) -> dict[int | None, float]:
    """The same for each decoder layer, and under None for what is outside of them.

    All of them work on every position, except in the last layer: there only what makes keys and values does, or the state of
    a layer without attention, and all else is wanted at the last position alone. Of a mixture of experts it counts the
    router and those that a token is given to. What a recurrence or convolution itself computes is not counted. What reads
    images beside the decoder has nothing to do for a text. Of a model that is split over ranks it counts what all of them do
    together, but for what every one of them does. Of quantised weights it counts what they stand for.
    """
    model = _ordinary(model)
    attention = max(self_attentions(model), key=lambda module: int(module.layer_idx))
    holder = parents(model)
    layer = holder[attention]
    stack = holder.get(layer)
    layers = list(stack) if isinstance(stack, nn.ModuleList) else [holder[module] for module in self_attentions(model)]
    last: nn.Module = layers[-1] if isinstance(stack, nn.ModuleList) else layer
    decoder = model if stack is None else holder.get(stack, model)
    mixers = [attention] if last is layer else [part for part in last.children() if hasattr(part, "layer_idx")]
    inside = {module: name.rpartition(".")[2] for mixer in mixers for name, module in mixer.named_modules()}
    after = {*last.modules(), model.get_output_embeddings()}
    numbers = {module: number for number, each in enumerate(layers) for module in each.modules()}
    flop: dict[int | None, float] = dict.fromkeys(range(len(layers)), 0.0)
    for module in dict.fromkeys([*decoder.modules(), model.get_output_embeddings()]):
        number = numbers.get(module)
        if isinstance(module, nn.Linear | Conv1D):
            inputs, features = _features(module)
            everywhere = features
            if module in after:
                everywhere = _early_features(features, inside[module], model, last is layer) if module in inside else 0
            outputs = everywhere * length + (features - everywhere)
            done = 2.0 * inputs * outputs * (module.ranks if isinstance(module, Shard) else 1)
        elif is_experts(module):
            done = 2.0 * _active_weights(module, model) * (1 if module in after else length)
        elif "Router" in type(module).__name__ and getattr(getattr(module, "weight", None), "ndim", 0) == 2:
            # Many routers are no linear layer, and hold a weight for each expert all the same.
            done = 2.0 * module.weight.numel() * (1 if module in after else length)
        else:
            continue
        flop[number] = flop.get(number, 0.0) + done
    return flop


def _ordinary(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same config without quantisation, on the meta device: packed weights do not say how many they are."""
    if getattr(model, "hf_quantizer", None) is None:
        return model
    if model not in _ORDINARY:
        with torch.device("meta"):
            _ORDINARY[model] = type(model)._from_config(model.config)
    return _ORDINARY[model]


def _features(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """Inputs and outputs of a linear layer; GPT-2's is called a convolution."""
    return (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)


def _early_features(features: int, name: str, model: PreTrainedModel, attends: bool) -> int:
    """How many ``features`` of one of the last layer's projections are wanted at every position.

    Those that are keys and values, or what these are made of; of a layer without attention all but what leaves it.
    """
    if not attends:
        return 0 if name.startswith("o") else features
    if any(part in name.lower() for part in FUSED):
        shape = Geometry.of(model)
        return features - shape.heads * shape.qk_head_dim
    return features if name.startswith(("k", "v")) else 0


def _active_weights(experts: nn.Module, model: PreTrainedModel) -> float:
    """Weights of a module of experts that work on one token; its linear modules, where it has some, are counted as such."""
    stacked = [weight for weight in experts.parameters(recurse=False) if weight.ndim == 3]
    return sum(weight.numel() / weight.shape[0] for weight in stacked) * experts_per_token(model.config)


def native_attention_flop(model: PreTrainedModel, length: int) -> float:
    """Operations of attention in layers that stay the model's own, windows and chunks, for one prompt."""
    return sum(native_attention_flop_by_layer(model, length).values())


def native_attention_flop_by_layer(model: PreTrainedModel, length: int) -> dict[int, float]:
    """The same for each of these layers; of the model's last one only one row."""
    kinds = layer_kinds(model.config)
    flop = {}
    for module in native_attentions(model):
        layer, seen = int(module.layer_idx), span(module, model.config) or length
        pairs = min(length, seen) if layer == len(kinds) - 1 else local_pairs(kinds[layer], seen, length)
        shape = Geometry.of(model, layer)
        flop[layer] = shape.flop_per_pair * shape.heads * pairs
    return flop


def local_pairs(kind: str, seen: int, length: int) -> int:
    """(query, key) pairs of one head whose queries see a window of so many tokens, or a chunk."""
    seen = min(seen, length)
    if kind == SLIDING:
        return seen * (seen + 1) // 2 + (length - seen) * seen
    whole, rest = divmod(length, seen)
    return whole * seen * (seen + 1) // 2 + rest * (rest + 1) // 2


def needed_pairs(pairs: Sequence[int], heads: int, length: int) -> int:
    """(query, key) pairs that must be computed, of those that each layer's pattern keeps: of the last layer only one row.

    Layers without a pattern keep none here. ``heads`` are those of all prompts, as the pairs are.
    """
    return sum(pairs[:-1]) + min(pairs[-1], heads * length)


def attention_flop(pairs: float, shape: Geometry) -> float:
    """Operations of attention over so many (query, key) pairs, batch and heads included."""
    return shape.flop_per_pair * pairs


SHORTEST_S, LONGEST_S = 0.08, 0.5
"""For how long products are timed."""


def gemm_throughput(device: torch.device, dtype: torch.dtype, prefill_s: float = 0.0) -> float:
    """Floating-point operations per second that this device sustains now: large square products, one right after another.

    At least two of them are timed. A chip slows down as it heats, so what it reaches when cool would put the roofline too
    low: measure between prefills. Some prefills heat it less than others. So products first run for as long as
    ``prefill_s``, the seconds of the longest, half a second at most, and then as many are timed.
    """
    size = 8192 if device.type == "cuda" else 2048
    generator = torch.Generator(device=device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    _seconds(a, b, out, 1)
    one = _seconds(a, b, out, 1)
    count = max(2, round(min(max(prefill_s, SHORTEST_S), LONGEST_S) / one))
    if prefill_s:
        _seconds(a, b, out, count)
    return 2.0 * size**3 * count / _seconds(a, b, out, count)


def _seconds(a: Tensor, b: Tensor, out: Tensor, products: int) -> float:
    synchronize(a.device)
    start = time.perf_counter()
    for _ in range(products):
        torch.mm(a, b, out=out)
    synchronize(a.device)
    return time.perf_counter() - start


def weight_bytes(model: PreTrainedModel) -> int:
    """The bytes of the weights that a decoding step reads: all but the table of embeddings, of which it reads one row."""
    table = model.get_input_embeddings().weight
    tied = model.get_output_embeddings() is not None and model.get_output_embeddings().weight is table
    own = {parameter for parameter in model.parameters() if tied or parameter is not table}
    return sum(parameter.numel() * parameter.element_size() for parameter in own)


def copy_rate(device: torch.device) -> float:
    """Bytes per second that this device reads and writes now, in copies too large for its caches."""
    count = 2**28 if device.type == "cuda" else 2**25
    source = torch.zeros(count, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    synchronize(device)
    start = time.perf_counter()
    for _ in range(4):
        target.copy_(source)
    synchronize(device)
    return 4 * 2 * 4 * count / (time.perf_counter() - start)

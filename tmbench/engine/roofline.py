"""The roofline of a time to first token: the arithmetic a method must do, at the GEMM throughput of this very device.

TTFT / roofline says how good the software is: 1.0 would be matrix products and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tmbench.engine.first_token import synchronize
from tmbench.models.attention_modules import parents, self_attentions
from tmbench.models.geometry import Geometry
from tmbench.models.sharding import Shard

FUSED = ("qkv", "query_key_value")
"""Parts of the names under which one projection yields queries, keys and values."""


def linear_flop(model: PreTrainedModel, length: int) -> float:
    """Floating-point operations that the model's linear layers must do for the first token after one prompt.

    All of them work on every position, except in the last layer: there only keys and values do, and all else is wanted at
    the last position alone. Counts ``nn.Linear`` modules: a mixture of experts keeps its weights elsewhere and is
    underestimated. What reads images beside the decoder has nothing to do for a text. Of a model that is split over ranks it
    counts what all of them do together, but for what every one of them does.
    """
    last = max(self_attentions(model), key=lambda module: int(module.layer_idx))
    holder = parents(model)
    layer = holder[last]
    decoder = holder.get(holder.get(layer, model), model)
    attention = {module: name.rpartition(".")[2] for name, module in last.named_modules()}
    after = {*layer.modules(), model.get_output_embeddings()}
    flop = 0.0
    for module in dict.fromkeys([*decoder.modules(), model.get_output_embeddings()]):
        if not isinstance(module, nn.Linear):
            continue
        everywhere = module.out_features
        if module in after:
            everywhere = _key_value_features(module, attention[module], model) if module in attention else 0
        outputs = everywhere * length + (module.out_features - everywhere)
        flop += 2.0 * module.in_features * outputs * (module.ranks if isinstance(module, Shard) else 1)
    return flop


def _key_value_features(module: nn.Linear, name: str, model: PreTrainedModel) -> int:
    """How many outputs of one of an attention's projections are keys and values, or what these are made of."""
    if any(part in name.lower() for part in FUSED):
        shape = Geometry.of(model)
        return module.out_features - shape.heads * shape.qk_head_dim
    return module.out_features if name.startswith(("k", "v")) else 0


def needed_pairs(pairs: Sequence[int], heads: int, length: int) -> int:
    """(query, key) pairs that must be computed, of those that each layer's pattern keeps: of the last layer only one row.

    ``heads`` are those of all prompts, as the pairs are.
    """
    return sum(pairs[:-1]) + min(pairs[-1], heads * length)


def attention_flop(pairs: float, shape: Geometry) -> float:
    """Operations of attention over so many (query, key) pairs, batch and heads included."""
    return shape.flop_per_pair * pairs


def gemm_throughput(device: torch.device, dtype: torch.dtype, seconds: float = 0.08) -> float:
    """Floating-point operations per second that this device sustains now: large square products, one right after another.

    They run for about so many ``seconds``, at least two of them. A chip that has just read a long prompt is hot and slows
    down, so what it reaches when cool would put the roofline too low: measure between the prefills.
    """
    size = 8192 if device.type == "cuda" else 2048
    generator = torch.Generator(device=device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    _seconds(a, b, out, 1)
    count = max(2, round(seconds / _seconds(a, b, out, 1)))
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

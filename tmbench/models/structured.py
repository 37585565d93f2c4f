"""Weights whose attention has the features of trained long-context heads, made for any geometry, without a checkpoint.

Random weights attend to everything alike, so a method that chooses keys by the data finds nothing to leave out. These
weights carry what MInference (Jiang et al. 2024, arXiv 2407.02490, section 3) and StreamingLLM (Xiao et al. 2023, arXiv
2309.17453) found in trained models: a local band, slashes, sinks and vertical columns. They have learnt nothing else: what
such a model answers means nothing. The features come about as they do in trained models:

- **Slashes.** Every embedding has one large, equal entry, the constant channel. Projections that read it give every query
  and every key of a head the same component. After rotary embedding the product of two such components, both in the rotary
  pair of frequency w, is ``A cos(w (i - j - offset))``: a comb of diagonals, one wavelength apart, the first at ``offset``.
- **The local band** is the sum over the fast pairs, whose peaks coincide at distance 0 alone.
- **Vertical columns.** A few tokens of the vocabulary have an entry in one of the column channels, which the keys of a head
  read into the slowest pair. That pair hardly rotates, so all queries see such a key alike, wherever it is.
- **The sink.** Nothing in a prompt of random tokens marks its first one. In layer 0 one head averages, over all keys up to
  its query, a polarity that is +1 for one half of the vocabulary and -1 for the other. The average is as large as one
  polarity at position 0, sometimes at the next two or three, and vanishes from there on. Two neurons of layer 0's MLP write
  the sink channel where it is large. From layer 1 on keys read that channel as they read the columns.

Families that normalise every query and key of a head, as Qwen3 does, would undo the sizes of all that. One entry of each
head is therefore so large that nothing else tells in the norm, and the norm's weight takes that entry away again.

The channels are the first entries of the hidden state. Nothing but the embedding and the averaging head with its neurons
writes to them, and all that attention and MLPs add to the rest is small beside the embedding, so every layer sees the same
structure. Which frequencies, offsets and strengths a head has is drawn from a seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from tmbench.errors import UserError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
"""Values of ``model_type`` whose decoder layers are of the one build that is filled here.

Biases, norms of every head's query and key, and experts in the place of an MLP may be there or not.
"""
ROPE_TYPES = ("default", "llama3")
"""Rotary embeddings whose frequencies do not depend on the prompt's length and leave the size of q and k as it is."""
FEWEST_PAIRS = 4

CONSTANT, POLARITY, AVERAGE, SINK = range(4)
CLASSES = 4
COLUMNS = range(4, 4 + CLASSES)
"""The hidden state's channel of each class of column tokens."""
CHANNELS = COLUMNS.stop
COLUMN_EVERY = 256
"""One token of the vocabulary in so many is a column token, and so one key in so many of a random prompt."""

# Sizes of the embedding's parts; one of size 1 alone would have a root mean square of 1 over the hidden state.
CONSTANT_SIZE, POLARITY_SIZE, COLUMN_SIZE, AVERAGE_SIZE, SINK_SIZE = 0.5, 0.1, 0.5, 0.25, 0.5
NOISE_SIZE = math.sqrt(1 - CONSTANT_SIZE**2 - POLARITY_SIZE**2)
ADDED_SIZE = 0.25
"""What all layers together add to the hidden state, beside the embedding: their parts add up as noise does."""

QUERY_NOISE, KEY_NOISE = 0.7, 0.85
"""Standard deviation of what a token's own embedding gives to each entry of its query and its key; their product is the
logits' noise."""
KEY_SLASH, KEY_BAND = 5.0, 1.5
"""The constant part of a key in each pair of its slashes, where it must stand out from the noise alone, and of its band."""
QUERY_SLOW = 8.0
"""The constant part of a query in the slowest pair, by which it finds sinks and columns."""

BAND_WAVELENGTHS = (0.0, 100.0)
SLASH_WAVELENGTHS = (400.0, 2500.0)
HUMP_WAVELENGTHS = (3000.0, 16000.0)
"""In tokens. The teeth of a comb are one wavelength apart and cost at least 64 keys each, so it sets the density."""
LOCAL_SHARE = 0.25
"""The part of the heads that have a local band on a wide hump instead of a comb of slashes."""
SLASH_LOGITS, HUMP_LOGITS, BAND_LOGITS = (10.0, 14.0), (6.0, 9.0), (5.0, 8.0)
SINK_LOGITS, COLUMN_LOGITS = (18.0, 26.0), (3.0, 7.0)
"""What each feature adds to a logit at its peak; drawn for every head."""

FILLER = 32.0
"""The root mean square that its one large entry gives a head before a norm. All else makes a tenth of that or less, in the
smallest heads a sixth, so that the norm divides all queries and keys by this number, but for one and a half percent."""

_SWITCH = 20.0
"""How steeply the two neurons turn on, and from which average polarity."""
_SWITCH_AT = 0.7


OfPart = Callable[[Any], None]
"""What is done with a module of the model."""


@dataclass(frozen=True)
class HeadConstants:
    """What is the same in all queries or all keys of one layer, in each entry of a head before rotary embedding."""

    queries: Tensor
    """``[heads, head_dim]``."""
    keys: Tensor
    """``[kv_heads, head_dim]``."""
    columns: Tensor
    """``[kv_heads, CLASSES]``: what a column token of each class adds to its key's entry in the slowest pair."""
    sinks: Tensor
    """``[kv_heads]``: what a sink adds there."""


@dataclass(frozen=True)
class _Mlp:
    """A layer's MLP, or all its experts at once. Its weights are filled in place."""

    gate: Tensor
    """``[..., neurons, width]``, the first dimension being the experts, where there are some."""
    up: Tensor
    down: Tensor
    """``[..., width, neurons]``."""
    router: Tensor | None = None
    """``[experts, width]``."""
    shares: Tensor | None = None
    """``[tokens, chosen]``: with which weights the outputs of a token's experts are added, for tokens that are noise."""

    @property
    def total(self) -> float:
        """By what an output is multiplied that all experts have in common."""
        return 1.0 if self.shares is None else float(self.shares.sum(1).mean())

    @property
    def size(self) -> float:
        """By what the size of outputs is multiplied that have nothing in common."""
        return 1.0 if self.shares is None else float(self.shares.square().sum(1).mean().sqrt())


def check_family(config: Any) -> None:
    """Raise UserError for a model that these weights are not made for."""
    remedy = "use --weights random, or another --model"
    if config.model_type not in FAMILIES:
        raise UserError(
            f"--weights structured is made for the families {', '.join(FAMILIES)}, not {config.model_type}: {remedy}"
        )
    kind = config.rope_parameters["rope_type"]
    if kind not in ROPE_TYPES:
        raise UserError(f"--weights structured needs {' or '.join(ROPE_TYPES)} rotary embeddings, not {kind}: {remedy}")


@torch.no_grad()
def fill(model: Any, seed: int = 0, begin: OfPart = lambda part: None, end: OfPart = lambda part: None) -> None:
    """Give a model of one of ``FAMILIES`` structured weights, in place, on its device and in its type.

    One part after the other, the embeddings, each layer, and what follows them. ``begin`` is called before a part is filled
    and ``end`` when it is: what begins without memory may be given some, and be cut afterwards.

    The structure is the same on every device for one seed, the noise around it only for one device and type. Raises
    UserError for another family, or heads of fewer than 8 entries.
    """
    config = model.config
    check_family(config)
    decoder = model.model
    begin(decoder.rotary_emb)
    frequencies = decoder.rotary_emb.inv_freq.double().cpu()
    if len(frequencies) < FEWEST_PAIRS or config.hidden_size <= CHANNELS:
        raise UserError(
            f"--weights structured needs heads of {2 * FEWEST_PAIRS} entries or more and a hidden size above {CHANNELS}, "
            f"not {2 * len(frequencies)} and {config.hidden_size}: use --weights random, or another --model"
        )
    draw = Generator().manual_seed(seed)
    begin(decoder.embed_tokens)
    noise = Generator(device=decoder.embed_tokens.weight.device).manual_seed(seed)
    width = config.hidden_size

    def make_noise(part: Any) -> None:
        for name, parameter in part.named_parameters():
            # The norms' weights stay 1; a bias would only add one constant to another.
            if parameter.dim() > 1:
                parameter.normal_(0, width**-0.5, generator=noise)
            elif name.endswith("bias"):
                parameter.zero_()

    make_noise(decoder.embed_tokens)
    _fill_embedding(decoder.embed_tokens.weight, draw)
    end(decoder.embed_tokens)
    small = ADDED_SIZE * (2 * len(decoder.layers)) ** -0.5
    for index, layer in enumerate(decoder.layers):
        begin(layer)
        make_noise(layer)
        attention, mlp = layer.self_attn, _mlp(layer.mlp, config)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        constants = draw_constants(frequencies, heads, kv_heads, draw, first_layer=index == 0)
        _fill_queries_and_keys(attention, constants)
        # Averages over keys are no larger than one value, whose entries are of size 1; silu(g) * u has a size of 0.6.
        attention.o_proj.weight.mul_(small * attention.o_proj.in_features**-0.5 * width**0.5)
        mlp.down.mul_(small / (0.6 * mlp.size) * mlp.down.shape[-1] ** -0.5 * width**0.5)
        # Without channels a router knows only a token's own embedding, and chooses all experts equally often.
        for reading in (attention.v_proj.weight, mlp.gate, mlp.up, mlp.router):
            if reading is not None:
                reading[..., :CHANNELS] = 0
        for writing in (attention.o_proj.weight, mlp.down):
            writing[..., :CHANNELS, :] = 0
        if index == 0:
            _fill_first_token_detector(attention, mlp)
        end(layer)
    for part in (decoder.norm, model.lm_head):
        begin(part)
        if not config.tie_word_embeddings:
            make_noise(part)
        end(part)


def draw_constants(
    frequencies: Tensor, heads: int, kv_heads: int, draw: Generator, *, first_layer: bool = False
) -> HeadConstants:
    """Draw one layer's structure. ``frequencies`` are those of the rotary pairs, in radians a token, fastest first.

    The query heads that share a key head share its frequencies too, and differ in kind, offset and strength. In the first
    layer head 0 has no structure: it averages, see ``_fill_first_token_detector``.
    """
    pairs = len(frequencies)
    dim, slowest = 2 * pairs, pairs - 1
    queries, keys = torch.zeros(heads, dim), torch.zeros(kv_heads, dim)
    queries[:, slowest] = QUERY_SLOW
    wavelengths = 2 * math.pi / frequencies[:slowest]
    band = _pairs_between(wavelengths, BAND_WAVELENGTHS)
    slashes = _pairs_between(wavelengths, SLASH_WAVELENGTHS)
    humps = _pairs_between(wavelengths, HUMP_WAVELENGTHS)

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=draw))

    def choose(choices: Sequence[int]) -> int:
        return choices[int(torch.randint(len(choices), (), generator=draw))]

    group = heads // kv_heads
    for kv_head in range(kv_heads):
        combs, hump = [choose(slashes), choose(slashes)], choose(humps)
        keys[kv_head, band] = KEY_BAND
        keys[kv_head, [*combs, hump]] = KEY_SLASH
        for head in range(kv_head * group, (kv_head + 1) * group):
            if between(0, 1) < LOCAL_SHARE:
                # The peaks of all band pairs add up, so each gives an equal part of the logit.
                queries[head, band] += between(*BAND_LOGITS) * dim**0.5 / (KEY_BAND * len(band))
                queries[head, hump] += between(*HUMP_LOGITS) * dim**0.5 / KEY_SLASH
            else:
                pair, size = choose(combs), between(*SLASH_LOGITS) * dim**0.5 / KEY_SLASH
                # A query turned back by the angle of `offset` tokens meets a key that is so far behind it.
                angle = 2 * math.pi * between(0, 1)
                queries[head, pair] += size * math.cos(angle)
                queries[head, pair + pairs] -= size * math.sin(angle)
    if first_layer:
        queries[0] = 0
    unit = dim**0.5 / QUERY_SLOW
    columns = torch.tensor([[between(*COLUMN_LOGITS) for _ in range(CLASSES)] for _ in range(kv_heads)]) * unit
    sinks = torch.tensor([between(*SINK_LOGITS) for _ in range(kv_heads)]) * unit
    return HeadConstants(queries, keys, columns, sinks)


def _pairs_between(wavelengths: Tensor, bounds: tuple[float, float]) -> list[int]:
    """The rotary pairs with a wavelength in these bounds, or the one that comes closest."""
    low, high = bounds
    inside: list[int] = ((wavelengths >= low) & (wavelengths <= high)).nonzero().flatten().tolist()
    if inside:
        return inside
    distance = (wavelengths.log() - math.log(max(low, 1.0))).abs().minimum((wavelengths.log() - math.log(high)).abs())
    return [int(distance.argmin())]


def _fill_embedding(weight: Tensor, draw: Generator) -> None:
    """Tokens as noise, with the constant channel, a polarity, and for a few the channel of their class."""
    tokens, width = weight.shape
    unit = width**0.5
    weight.mul_(NOISE_SIZE * unit)
    weight[:, :CHANNELS] = 0
    weight[:, CONSTANT] = CONSTANT_SIZE * unit
    order = torch.randperm(tokens, generator=draw).to(weight.device)
    weight[order[::2], POLARITY] = POLARITY_SIZE * unit
    weight[order[1::2], POLARITY] = -POLARITY_SIZE * unit
    each = max(1, tokens // (COLUMN_EVERY * CLASSES))
    for number, channel in enumerate(COLUMNS):
        weight[order[number * each : (number + 1) * each], channel] = COLUMN_SIZE * unit


def _fill_queries_and_keys(attention: Any, constants: HeadConstants) -> None:
    """Noise from the token's own part of the hidden state, and the constants from the channels."""
    queries, keys = attention.q_proj.weight, attention.k_proj.weight
    unit = queries.shape[1] ** 0.5
    for weight, size in ((queries, QUERY_NOISE), (keys, KEY_NOISE)):
        weight.mul_(size / NOISE_SIZE)
        weight[:, :CHANNELS] = 0
    queries[:, CONSTANT] = _like(constants.queries.flatten() / (CONSTANT_SIZE * unit), queries)
    keys[:, CONSTANT] = _like(constants.keys.flatten() / (CONSTANT_SIZE * unit), keys)
    by_head = keys.view(*constants.keys.shape, -1)
    slowest = constants.keys.shape[1] // 2 - 1
    by_head[:, slowest, COLUMNS.start : COLUMNS.stop] = _like(constants.columns / (COLUMN_SIZE * unit), keys)
    by_head[:, slowest, SINK] = _like(constants.sinks / (SINK_SIZE * unit), keys)
    for weight, norm in ((queries, "q_norm"), (keys, "k_norm")):
        if hasattr(attention, norm):
            _fill_norm(getattr(attention, norm).weight, weight)


def _fill_norm(norm: Tensor, projection: Tensor) -> None:
    """Leave queries or keys as they are by a norm whose weight, ``[head_dim]``, all heads share.

    The large entry is the last one, which turns with the slowest pair. No feature is in it, however few pairs there are, and
    without it a logit lacks one product of noise. It is the same for all tokens: of those with one more channel, whose
    constant channel is normalised down, it reads that one too. So their queries and keys are as in families without norms.
    """
    dim, width = norm.shape[0], projection.shape[1]
    large = projection.view(-1, dim, width)[:, -1]
    unit, filler = width**0.5, FILLER * dim**0.5
    large.zero_()
    large[:, CONSTANT] = filler / (CONSTANT_SIZE * unit)
    large[:, COLUMNS.start : COLUMNS.stop] = filler * (math.hypot(1, COLUMN_SIZE) - 1) / (COLUMN_SIZE * unit)
    # The average polarity is large where a sink is, and may have either sign.
    large[:, SINK] = filler * (math.hypot(1, SINK_SIZE, AVERAGE_SIZE) - 1) / (SINK_SIZE * unit)
    norm.fill_(FILLER)
    norm[-1] = 0


def _mlp(mlp: Any, config: Any) -> _Mlp:
    """What to fill of a layer's MLP; of a mixture of experts, some layers have one and others a plain MLP."""
    if not hasattr(mlp, "experts"):
        return _Mlp(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
    gate, up = mlp.experts.gate_up_proj.chunk(2, dim=1)
    router = mlp.gate.weight
    logits = NOISE_SIZE * torch.randn(4096, len(router), generator=Generator().manual_seed(0))
    shares = logits.softmax(1).topk(config.num_experts_per_tok).values
    if config.norm_topk_prob:
        shares /= shares.sum(1, keepdim=True)
    return _Mlp(gate, up, mlp.experts.down_proj, router, shares)


def _fill_first_token_detector(attention: Any, mlp: _Mlp) -> None:
    """Layer 0: head 0 averages polarities over all keys up to its query, and two neurons mark where the average is large.

    Every expert has these neurons, whichever are chosen.
    """
    unit = attention.q_proj.in_features**0.5
    attention.q_proj.weight[: attention.head_dim] = 0
    attention.v_proj.weight[0] = 0
    attention.v_proj.weight[0, POLARITY] = 1 / (POLARITY_SIZE * unit)
    attention.o_proj.weight[AVERAGE, 0] = AVERAGE_SIZE * unit
    on = _SWITCH * (1 - _SWITCH_AT)
    mlp.down[..., :2] = 0
    mlp.down[..., SINK, :2] = SINK_SIZE * unit / (on * mlp.total)
    for neuron, sign in ((0, 1), (1, -1)):
        for weight in (mlp.gate, mlp.up):
            weight[..., neuron, :] = 0
        mlp.gate[..., neuron, AVERAGE] = sign * _SWITCH / (AVERAGE_SIZE * unit)
        mlp.gate[..., neuron, CONSTANT] = -_SWITCH * _SWITCH_AT / (CONSTANT_SIZE * unit)
        mlp.up[..., neuron, CONSTANT] = 1 / (CONSTANT_SIZE * unit)


def _like(values: Tensor, weight: Tensor) -> Tensor:
    return values.to(weight)

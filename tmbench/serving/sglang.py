"""Triangle attention inside SGLang: a plug-in that gives it to the prefills of chosen layers, and leaves all else to SGLang.

SGLang knows how long a chunk's prompt is, so chunks are exact. What it offers was read from the source of version 0.5.23:
``plugins`` (entry points of the group ``sglang.srt.plugins``), ``attention_registry.register_attention_backend``,
``base_attn_backend.AttentionBackend``, ``RadixAttention``, ``ReqToTokenPool``, ``MHATokenToKVPool``, ``KVWriteLoc``,
``ScheduleBatch.prepare_for_extend`` and ``mix_with_running``, and of ``ForwardBatch`` the fields that ``chunks_of`` reads.

A dense backend of SGLang's own is made as always. Of it ``forward_extend`` alone is replaced, for the chosen layers only.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tmbench.errors import UserError
from tmbench.methods.layers import layers_text
from tmbench.serving.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from tmbench_kernels import Triangle
    from tmbench_kernels.triangle.paged import Chunk

NAME = "tmbench"
"""What ``--prefill-attention-backend`` calls it."""
DENSE = ("fa3", "fa4", "flashinfer", "triton", "torch_native")
"""SGLang's backends for whole models of plain attention; they decode, and prefill in all other layers."""
PREFILLS = ("EXTEND", "MIXED")
"""Forward modes whose rows are chunks of prompts. A row that is decoded among them is the last one of its text so far."""
ONE = {
    "attn_dp_size": "--attn-dp-size",
    "attn_cp_size": "--attn-cp-size",
    "dcp_size": "--dcp-size",
    "pp_size": "--pp-size",
}
"""Sizes that must be 1: a rank holds other rows, keys or layers otherwise."""
OFF = {
    "speculative_algorithm": "--speculative-algorithm",
    "dllm_algorithm": "--dllm-algorithm",
    "enable_two_batch_overlap": "--enable-two-batch-overlap",
    "enable_pdmux": "--enable-pdmux",
    "enable_kv_cache_sharding": "--enable-kv-cache-sharding",
}
"""What must be off: with it a cache lacks keys, rows are no chunks of prompts, or prompts' lengths are not said."""

logger = logging.getLogger(__name__)


def register() -> None:
    """What the entry point calls: makes the backend known to SGLang. It reads no settings, so it cannot fail for them."""
    from sglang.srt.arg_groups.choices import add_attention_backend_choices
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    add_attention_backend_choices([NAME])
    register_attention_backend(NAME)(create)


def create(runner: Any) -> Any:
    """SGLang's dense backend with triangle attention in the prefills of chosen layers, for a ``ModelRunner``.

    The dense one is that of ``--decode-attention-backend``. Raises UserError for settings, options and models that it is not
    exact for.
    """
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    settings = Settings.read()
    check_options(resolved_view(runner.server_args), runner.decode_attention_backend_str)
    check_cache(runner)
    count = runner.model_config.num_hidden_layers
    layers = [module for module in runner.model.modules() if isinstance(module, RadixAttention)]
    chosen = settings.chosen(count, native_layers(layers, count))
    pool = runner.token_to_kv_pool
    for layer in layers:
        if layer.layer_id in chosen:
            check_buffers(layer, pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id), runner.dtype)
    backend = ATTENTION_BACKENDS[runner.decode_attention_backend_str](runner)
    backend.forward_extend = TriangleExtend(
        settings.pattern(), chosen, backend.forward_extend, runner.req_to_token_pool, pool, KVWriteLoc.for_layer
    )
    logger.info("prefills have %s in layers %s", settings.pattern(), layers_text(chosen, count))
    return backend


def check_options(options: Any, dense: str) -> None:
    """Raise UserError for options of SGLang that the plug-in does not serve; ``dense`` is the backend for decoding."""
    if dense not in DENSE:
        raise UserError(
            f"--decode-attention-backend {dense} is none that {NAME} can go with: give one of {', '.join(DENSE)}, which "
            "decodes and is the dense attention of all other layers"
        )
    given = [flag for name, flag in ONE.items() if getattr(options, name) > 1]
    given += [flag for name, flag in OFF.items() if getattr(options, name)]
    if given:
        raise UserError(f"the attention backend {NAME} does not serve {given[0]}: leave it out")
    if options.cuda_graph_config.prefill.backend == "full":
        raise UserError(
            f"--cuda-graph-backend-prefill full records what the attention backend {NAME} decides anew for each batch: give "
            "breakable or disabled"
        )


def check_cache(runner: Any) -> None:
    """Raise UserError for a cache of another kind than one slot of key and value, as computed, for each token."""
    if runner.use_mla_backend:
        raise UserError(
            f"the attention backend {NAME} does not serve multi-head latent attention, whose cache has no keys: take another"
        )
    if runner.kv_cache_dtype != runner.dtype:
        raise UserError(
            f"the cache holds {_words(runner.kv_cache_dtype)}, and the model computes {_words(runner.dtype)}: the attention "
            f"backend {NAME} serves no quantised cache, so leave --kv-cache-dtype out"
        )
    if runner.kv_index_translator.is_translating:
        raise UserError(
            f"the attention backend {NAME} does not serve a unified memory pool, whose table holds no slots: leave it out"
        )


def check_buffers(layer: Any, k_cache: Tensor, v_cache: Tensor, dtype: Any) -> None:
    """Raise UserError unless a layer's cache is ``[slots, kv_heads, dim]`` of keys and the like of values."""
    for cache, heads, dim in (
        (k_cache, layer.tp_k_head_num, layer.qk_head_dim),
        (v_cache, layer.tp_v_head_num, layer.v_head_dim),
    ):
        if cache.dim() != 3 or cache.shape[1:] != (heads, dim) or cache.dtype != dtype:
            raise UserError(
                f"the cache of layer {layer.layer_id} is {list(cache.shape)} of {_words(cache.dtype)}, not {heads} heads "
                f"of {dim} for each slot in {_words(dtype)}: leave out what lays it out otherwise"
            )


def native_layers(layers: Iterable[Any], count: int) -> dict[int, str]:
    """The layers of a model with ``count`` that triangle attention cannot be in, with the reason."""
    found = dict.fromkeys(range(count), "no attention over a cache")
    found.update({layer.layer_id: obstacle(layer) for layer in layers})
    return {layer: reason for layer, reason in found.items() if reason}


def obstacle(layer: Any) -> str:
    """Why triangle attention cannot be in a ``RadixAttention``; "" where it can."""
    if layer.is_cross_attention:
        return "cross attention"
    if layer.attn_type.value != "decoder":
        return "attention to later tokens"
    if layer.sliding_window_size > -1:
        return f"a sliding window of {layer.sliding_window_size + 1}"
    if layer.use_irope:
        return "attention by chunks"
    if layer.logit_cap > 0 and layer.logit_capping_method != "tanh":
        return f"logits capped by {layer.logit_capping_method}"
    if layer.xai_temperature_len > 0:
        return "a temperature by position"
    if layer.pos_encoding_mode != "NONE":
        return f"positions by {layer.pos_encoding_mode} within attention"
    return ""


def chunks_of(batch: Any) -> list[Chunk]:
    """The rows of a ``ForwardBatch`` as chunks of prompts; waits for the GPU once.

    Raises ValueError for a batch that does not say how long its prompts are, or that holds other rows.
    """
    from tmbench_kernels.triangle.paged import Chunk

    if batch.forward_mode.name not in PREFILLS:
        raise ValueError(f"the attention backend {NAME} does not serve the forward mode {batch.forward_mode.name}")
    if batch.orig_seq_lens is None:
        raise ValueError("the batch has no orig_seq_lens, so that nobody knows which rows are the last of their prompts")
    starts, sizes = (
        _numbers(batch.extend_prefix_lens_cpu, batch.extend_prefix_lens),
        _numbers(batch.extend_seq_lens_cpu, batch.extend_seq_lens),
    )
    rows, lengths = batch.req_pool_indices.tolist(), batch.orig_seq_lens.tolist()
    if not len(starts) == len(sizes) == len(rows) == len(lengths):
        raise ValueError(f"the batch has {len(sizes)} chunks, {len(rows)} rows of slots and {len(lengths)} orig_seq_lens")
    return [
        Chunk(row, start, start + size, length)
        for row, start, size, length in zip(rows, starts, sizes, lengths, strict=True)
    ]


def _numbers(on_host: Sequence[int] | None, on_device: Tensor) -> list[int]:
    return list(on_host) if on_host is not None else [int(number) for number in on_device.tolist()]


def _words(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


class TriangleExtend:
    """In place of a backend's ``forward_extend``: triangle attention in some layers, the backend's own in all others."""

    def __init__(
        self,
        pattern: Triangle,
        layers: Iterable[int],
        dense: Callable[..., Any],
        prompts: Any,
        pool: Any,
        write_loc: Callable[[Any, Any], Any],
    ) -> None:
        """``prompts`` is the ``ReqToTokenPool``, ``pool`` the ``KVCache``; ``write_loc`` says where a batch writes to it."""
        self.pattern = pattern
        self.layers = frozenset(layers)
        self.dense = dense
        self.prompts = prompts
        self.pool = pool
        self.write_loc = write_loc
        self._read: tuple[weakref.ref[Any], list[Chunk]] | None = None
        self._layer = -1

    def __call__(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, layer: Any, forward_batch: Any, save_kv_cache: bool = True,
        **more: Any,
    ) -> Any:  # fmt: skip
        """q ``[tokens, heads * dim]``, k and v of this step; returns ``[tokens, heads * v_dim]``."""
        if layer.layer_id not in self.layers:
            return self.dense(q, k, v, layer, forward_batch, save_kv_cache, **more)
        from tmbench_kernels.triangle.paged import attend_paged

        sinks = more.pop("sinks", None)
        if unknown := [name for name, value in more.items() if value is not None and value is not False]:
            raise ValueError(
                f"layer {layer.layer_id} asks for {unknown[0]}, which the attention backend {NAME} does not have"
            )
        if k is not None and save_kv_cache:
            self.pool.set_kv_buffer(layer, self.write_loc(forward_batch, layer), k, v)
        out = attend_paged(
            self.pattern,
            q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim),
            self.pool.get_key_buffer(layer.layer_id),
            self.pool.get_value_buffer(layer.layer_id),
            self.prompts.req_to_token,
            self._chunks(forward_batch, layer.layer_id),
            scale=layer.scaling,
            softcap=max(layer.logit_cap, 0.0),
            sinks=sinks,
        )
        return out.flatten(1)

    def _chunks(self, batch: Any, layer: int) -> list[Chunk]:
        """The batch's, read once in each forward: at its first layer, since a batch's tensors may be filled anew."""
        if self._read is None or self._read[0]() is not batch or layer <= self._layer:
            self._read = weakref.ref(batch), chunks_of(batch)
        self._layer = layer
        return self._read[1]

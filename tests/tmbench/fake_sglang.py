"""As much of SGLang as a plug-in for attention meets: its objects with the fields and shapes of version 0.5.23.

Read there: ``arg_groups/choices.py`` and ``overrides.py``, ``layers/radix_attention.py``, ``attention_registry.py``,
``base_attn_backend.py`` and ``torch_native_backend.py`` in ``layers/attention``, ``mem_cache/memory_pool.py``
(``ReqToTokenPool``, ``MHATokenToKVPool``, ``KVWriteLoc``), ``managers/schedule_batch.py`` and
``model_executor/forward_batch_info.py``.
"""

from __future__ import annotations

import enum
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from tmbench_kernels.reference import causal_mask, masked_attention

ForwardMode = enum.IntEnum("ForwardMode", ["EXTEND", "DECODE", "MIXED", "IDLE", "TARGET_VERIFY"])
AttentionType = enum.Enum("AttentionType", {"DECODER": "decoder", "ENCODER_ONLY": "encoder_only"})


class RadixAttention(nn.Module):
    def __init__(self, layer_id, heads, kv_heads, dim, v_dim, **changes):
        super().__init__()
        self.layer_id = layer_id
        self.tp_q_head_num, self.tp_k_head_num, self.tp_v_head_num = heads, kv_heads, kv_heads
        self.qk_head_dim, self.v_head_dim = dim, v_dim
        self.scaling = 0.3
        self.logit_cap, self.logit_capping_method = 0.0, "tanh"
        self.sliding_window_size = -1
        self.is_cross_attention = self.use_irope = False
        self.attn_type = AttentionType.DECODER
        self.pos_encoding_mode, self.xai_temperature_len = "NONE", -1
        vars(self).update(changes)


@dataclass
class KVWriteLoc:
    loc: torch.Tensor

    @classmethod
    def for_layer(cls, forward_batch, layer):
        return cls(forward_batch.out_cache_loc)


class KVPool:
    """A slot for each token; slot 0 is padding, and what was not written is not a number."""

    def __init__(self, slots, layers, dtype, device):
        def room(heads, dim):
            return torch.full((slots, heads, dim), torch.nan, dtype=dtype, device=device)

        self.k = {layer.layer_id: room(layer.tp_k_head_num, layer.qk_head_dim) for layer in layers}
        self.v = {layer.layer_id: room(layer.tp_v_head_num, layer.v_head_dim) for layer in layers}
        self.get_key_buffer, self.get_value_buffer = self.k.__getitem__, self.v.__getitem__

    def set_kv_buffer(self, layer, loc_info, cache_k, cache_v):
        self.k[layer.layer_id][loc_info.loc], self.v[layer.layer_id][loc_info.loc] = cache_k, cache_v


@dataclass
class ForwardBatch:
    forward_mode: ForwardMode
    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor
    out_cache_loc: torch.Tensor
    orig_seq_lens: torch.Tensor | None
    extend_prefix_lens: torch.Tensor
    extend_seq_lens: torch.Tensor
    extend_prefix_lens_cpu: list[int] | None
    extend_seq_lens_cpu: list[int] | None


class DenseBackend:
    """Causal attention over the cache, by the definition; notes which layers it served."""

    def __init__(self, runner):
        self.req_to_token_pool, self.token_to_kv_pool = runner.req_to_token_pool, runner.token_to_kv_pool
        self.served = []

    def forward(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        decodes = forward_batch.forward_mode == ForwardMode.DECODE
        attend = self.forward_decode if decodes else self.forward_extend
        return attend(q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **kwargs)

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        return self._dense("decode", q, k, v, layer, forward_batch, save_kv_cache, [1] * len(forward_batch.seq_lens))

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        sizes = forward_batch.extend_seq_lens.tolist()
        return self._dense("extend", q, k, v, layer, forward_batch, save_kv_cache, sizes)

    def _dense(self, mode, q, k, v, layer, batch, save_kv_cache, sizes):
        self.served.append((mode, layer.layer_id))
        pool = self.token_to_kv_pool
        if save_kv_cache:
            pool.set_kv_buffer(layer, KVWriteLoc.for_layer(batch, layer), k, v)
        rows = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim).split(sizes)
        outs = []
        for row, request, length in zip(rows, batch.req_pool_indices.tolist(), batch.seq_lens.tolist(), strict=True):
            slots = self.req_to_token_pool.req_to_token[request, :length].long()
            keys, values = (x[layer.layer_id][slots].transpose(0, 1)[None] for x in (pool.k, pool.v))
            mask = causal_mask(length, queries=len(row)).to(q.device)
            out = masked_attention(row.transpose(0, 1)[None], keys, values, mask, scale=layer.scaling)
            outs.append(out[0].transpose(0, 1).to(q.dtype))
        return torch.cat(outs).flatten(1)


@dataclass
class Options:
    """Of ``ServerArgs``, what a plug-in may ask for."""

    attn_dp_size: int = 1
    attn_cp_size: int = 1
    dcp_size: int = 1
    pp_size: int = 1
    speculative_algorithm: str | None = None
    dllm_algorithm: str | None = None
    enable_two_batch_overlap: bool = False
    enable_pdmux: bool = False
    enable_kv_cache_sharding: bool = False
    prefill_graph: str = "breakable"

    @property
    def cuda_graph_config(self):
        return SimpleNamespace(prefill=SimpleNamespace(backend=self.prefill_graph))


@dataclass
class Runner:
    """A ``ModelRunner`` whose model has these attention layers."""

    layers: list[RadixAttention]
    server_args: Options = field(default_factory=Options)
    dtype: torch.dtype = torch.float32
    kv_cache_dtype: torch.dtype | None = None
    device: str = "cpu"
    decode_attention_backend_str: str = "torch_native"
    use_mla_backend: bool = False
    translates: bool = False
    requests: int = 4
    context: int = 400

    def __post_init__(self):
        self.model = nn.ModuleList(self.layers)
        self.model_config = SimpleNamespace(num_hidden_layers=max(layer.layer_id for layer in self.layers) + 1)
        self.kv_cache_dtype = self.kv_cache_dtype or self.dtype
        self.kv_index_translator = SimpleNamespace(is_translating=self.translates)
        slots = self.requests * self.context
        self.token_to_kv_pool = KVPool(slots + 1, self.layers, self.kv_cache_dtype, self.device)
        shuffled = 1 + torch.randperm(slots, generator=torch.Generator().manual_seed(0))
        table = shuffled.view(self.requests, self.context).to(torch.int32)
        self.req_to_token_pool = SimpleNamespace(req_to_token=table.to(self.device))

    def batch(self, mode, rows, *, host=True):
        """A batch of ``rows``: (request, first position, position behind the last, tokens of the prompt or text so far)."""
        requests, starts, ends, lengths = (torch.tensor(column, device=self.device) for column in zip(*rows, strict=True))
        slots = [self.req_to_token_pool.req_to_token[request, start:end] for request, start, end, _ in rows]
        return ForwardBatch(
            forward_mode=mode,
            req_pool_indices=requests,
            seq_lens=ends,
            out_cache_loc=torch.cat(slots).long(),
            orig_seq_lens=lengths.to(torch.int32),
            extend_prefix_lens=starts.to(torch.int32),
            extend_seq_lens=(ends - starts).to(torch.int32),
            extend_prefix_lens_cpu=starts.tolist() if host else None,
            extend_seq_lens_cpu=(ends - starts).tolist() if host else None,
        )


def install(monkeypatch):
    """Put these into ``sys.modules`` as SGLang's; returns (the names of backends that may be chosen, the registry)."""
    choices, backends = ["torch_native"], {"torch_native": DenseBackend}

    def register_attention_backend(name):
        return lambda create: backends.setdefault(name, create)

    contents: dict[str, dict[str, Any]] = {
        "arg_groups.choices": {"add_attention_backend_choices": choices.extend},
        "arg_groups.overrides": {"resolved_view": lambda server_args: server_args},
        "layers.attention.attention_registry": {
            "ATTENTION_BACKENDS": backends,
            "register_attention_backend": register_attention_backend,
        },
        "layers.radix_attention": {"RadixAttention": RadixAttention},
        "mem_cache.memory_pool": {"KVWriteLoc": KVWriteLoc},
    }
    for name, found in contents.items():
        parts = ["sglang", "srt", *name.split(".")]
        for depth in range(1, len(parts) + 1):
            module = ".".join(parts[:depth])
            if module not in sys.modules:
                monkeypatch.setitem(sys.modules, module, ModuleType(module))
        vars(sys.modules[".".join(parts)]).update(found)
    return choices, backends

"""What holds for every pattern of whole key blocks: selection is the definition, attention follows the selection."""

import weakref
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tmbench_kernels import (
    BlockTopK,
    Dense,
    FlashPrefill,
    FlexPrefill,
    OracleBlocks,
    XAttention,
    flash_prefill,
    scores,
    xattention,
)
from tmbench_kernels.block_sparse import lists
from tmbench_kernels.oracle_blocks import Like

PATTERNS = [
    FlexPrefill(gamma=0.6, min_budget=128),
    FlexPrefill(gamma=0.4, tau=0.7, min_budget=100, max_budget=300),
    FlexPrefill(gamma=0.9, tau=0, min_budget=1),
    XAttention(stride=16, threshold=0.6),
    XAttention(stride=8, threshold=0.8, first_chunk=512),
    XAttention(stride=128, threshold=0.3),
    FlashPrefill(alpha=0.6, sinks=1, window=1, last=1),
    FlashPrefill(alpha=0.9, sinks=0, window=2, last=0, min_budget=300),
    BlockTopK(3),
]
DEFAULTS = [
    FlexPrefill(),
    XAttention(),
    XAttention(first_chunk=2048),
    FlashPrefill(),
    FlashPrefill(min_budget=1024),
    BlockTopK(),
]
FULL = [
    FlexPrefill(min_budget=900),
    FlexPrefill(gamma=1, tau=0, min_budget=128),
    XAttention(threshold=1),
    XAttention(threshold=1, first_chunk=256),
    FlashPrefill(alpha=0),
    FlashPrefill(window=100),
    FlashPrefill(sinks=100),
    FlashPrefill(last=100),
    FlashPrefill(alpha=1, min_budget=900),
    BlockTopK(100),
]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("length", [1, 5, 127, 128, 129, 300, 1101])
def test_selection_is_the_definition(make_qkv, make_structured_qkv, pattern, length):
    for make, scale in ((make_qkv, 0.4), (make_structured_qkv, None)):
        q, k, _ = make(length, heads=2, kv_heads=1, dim=32, batch=2, seed=length)
        mask = pattern.mask(q, k, scale=scale)
        assert torch.equal(pattern.select(q, k, scale=scale).mask(), mask)
        assert pattern.pairs(q, k, scale=scale) == int(mask.sum())
        assert mask.any(3).all(), "no query is without a key"


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_the_patterns_of_these_tests_are_sparse(make_structured_qkv, pattern):
    """Otherwise the tests would show nothing."""
    q, k, _ = make_structured_qkv(1101)
    assert 0.1 < pattern.pairs(q, k) / Dense().pairs(q, k) < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize(("heads", "kv_heads", "batch", "scale"), [(2, 2, 1, None), (4, 2, 2, 0.4), (3, 1, 1, 0.1)])
def test_attention_over_the_selection(make_structured_qkv, assert_exact, pattern, heads, kv_heads, batch, scale):
    q, k, v = make_structured_qkv(450, heads=heads, kv_heads=kv_heads, batch=batch)
    assert_exact(pattern.attend(q, k, v, scale=scale), q, k, v, pattern.mask(q, k, scale=scale), scale)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_16_bit_tensors_are_summed_in_float32(make_structured_qkv, assert_exact, pattern, dtype):
    """So that the selection is that of the same values in float32, but for means that are rounded to be multiplied."""
    q, k, v = make_structured_qkv(600, heads=2, kv_heads=1, dtype=dtype)
    lists = pattern.select(q, k)
    if pattern.name != "flash_prefill":
        assert torch.equal(lists.to_map(), pattern.select(q.float(), k.float()).to_map())
    assert torch.equal(lists.mask(), pattern.mask(q, k))
    assert_exact(pattern.attend(q, k, v), q, k, v, lists.mask())


@pytest.mark.parametrize("pattern", FULL, ids=repr)
@pytest.mark.parametrize("length", [130, 900])
def test_a_full_budget_is_dense(make_qkv, pattern, length):
    q, k, v = make_qkv(length, batch=2)
    assert pattern.pairs(q, k) == Dense().pairs(q, k)
    torch.testing.assert_close(pattern.attend(q, k, v), Dense().attend(q, k, v))


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_layout_in_memory_does_not_matter(make_structured_qkv, pattern):
    q, k, _ = make_structured_qkv(700)
    expected = pattern.select(q, k).to_map()
    assert torch.equal(pattern.select(q.contiguous(), k.contiguous()).to_map(), expected)
    twice = (torch.stack([x, x], dim=-1).flatten(3)[..., ::2] for x in (q, k))
    assert torch.equal(pattern.select(*twice).to_map(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("elements", [1, 2**15])
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_tiles_do_not_change_the_selection(make_structured_qkv, monkeypatch, pattern, elements):
    q, k, _ = make_structured_qkv(700, heads=6, kv_heads=2, batch=2)
    expected = pattern.select(q, k).to_map()
    monkeypatch.setattr(scores, "TILE_ELEMENTS", elements)
    assert torch.equal(pattern.select(q, k).to_map(), expected)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels run in any case")
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_kernels_do_not_change_the_selection(make_structured_qkv, monkeypatch, pattern):
    """Of all steps that Triton takes over on a GPU, interpreted: for a whole prompt and for a chunk of one."""
    q, k, _ = make_structured_qkv(700, heads=2, kv_heads=1, dtype=torch.float16)
    expected = [pattern.select(part, k).to_map() for part in (q, q[:, :, 333:])]
    used = []
    for module in (lists, scores, xattention):
        monkeypatch.setattr(module, "runs_triton", lambda device, module=module: used.append(module) or True)
    for module in (scores, flash_prefill):
        monkeypatch.setattr(module, "triton_serves", lambda x, module=module: used.append(module) or True)
    for part, chosen in zip((q, q[:, :, 333:]), expected, strict=True):
        assert torch.equal(pattern.select(part, k).to_map(), chosen)
    expected_modules = {"flex_prefill": {scores}, "xattention": {scores, xattention}, "flash_prefill": {flash_prefill}}
    assert set(used) == {lists} | expected_modules.get(pattern.name, set())


class Memory(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, by storage; tensors of the meta device need none of them."""

    def __init__(self):
        super().__init__()
        self.views: Counter[int] = Counter()
        self.live, self.peak = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor)
        return result

    def _watch(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self.views[key] += 1
        self.live += size * (self.views[key] == 1)
        self.peak = max(self.peak, self.live)
        weakref.finalize(tensor, self._release, key, size)

    def _release(self, key, size):
        self.views[key] -= 1
        self.live -= size * (self.views[key] == 0)


def test_the_memory_counter_counts():
    with Memory() as memory:
        x = torch.empty(1000, device="meta")
        y = x[:10]
        del x
        z = torch.empty(500, device="meta")
        del y, z
        torch.empty(100, device="meta")
    assert memory.peak == 4 * 1500


@pytest.mark.slow
@pytest.mark.parametrize("pattern", DEFAULTS, ids=repr)
@pytest.mark.parametrize("length", [131072, 131000])
def test_selection_at_128k_reads_nothing_back_and_fits_8_gib(pattern, length):
    """Tensors of the meta device have no values: whatever a selection wanted to know of them would raise an error."""
    q = torch.empty(1, length, 32, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    k = torch.empty(1, length, 8, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    with Memory() as memory:
        lists = pattern.select(q, k)
    blocks = -(-length // pattern.block)
    assert lists.indices.shape == (1, 32, blocks, blocks)
    assert memory.peak < 8 * 2**30


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [OracleBlocks(), OracleBlocks(like=Like(FlashPrefill()))], ids=str)
def test_the_oracle_of_an_8b_model_at_32k_fits_4_gib(pattern):
    """The logits of one head alone would take 4 GiB, those of all of them 128."""
    q = torch.empty(1, 32768, 32, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    k = torch.empty(1, 32768, 8, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    with Memory() as memory:
        assert pattern.select(q, k).indices.shape == (1, 32, 256, 256)
    assert memory.peak < 4 * 2**30


def test_a_selection_that_reads_back_fails_on_the_meta_device():
    class Curious(BlockTopK):
        def block_map(self, q, k, scale):
            return super().block_map(q, k, scale) & bool(q.sum() > 0)

    with pytest.raises(RuntimeError, match="meta"):
        Curious().select(*(torch.empty(1, 1, 300, 16, device="meta") for _ in range(2)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", [*PATTERNS, *DEFAULTS], ids=repr)
def test_on_a_gpu(make_structured_qkv, assert_exact, pattern, dtype):
    """Nothing waits for the GPU, the blocks are those that the CPU selects, and the attention over them is right."""
    q, k, v = make_structured_qkv(3001, heads=8, kv_heads=2, dim=64, dtype=dtype)
    expected = pattern.select(q, k).to_map()
    q, k, v = (x.cuda() for x in (q, k, v))
    torch.use_deterministic_algorithms(False)  # running sums have no other implementation there
    try:
        pattern.select(q, k)
        torch.cuda.set_sync_debug_mode("error")
        lists = pattern.select(q, k)
        torch.cuda.set_sync_debug_mode("default")
        # Sums in another order turn a near tie now and then.
        assert (lists.to_map().cpu() != expected).float().mean() < 1e-3
        for backend in pattern.backends:
            if not backend.obstacle(pattern, q, k, v):
                assert_exact(backend.attend(pattern, q, k, v, 64**-0.5), q, k, v, lists.mask())
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(True)

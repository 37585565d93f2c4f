"""Which CUDA backend of dense attention is chosen, on machines that have none: the libraries are stood in for."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from importlib.machinery import PathFinder
from types import SimpleNamespace

import pytest
import torch

from tmbench_kernels import Dense, cuda
from tmbench_kernels.dense import few_queries, libraries
from tmbench_kernels.dense.libraries import CUDA_BACKENDS
from tmbench_kernels.reference import masked_attention, masked_lse

BACKENDS = {backend.name: backend for backend in Dense.backends}
FLASH = {
    "flash-attn-4": "flash_attn/cute/__init__.py",
    "flash-attn-3": "flash_attn_interface.py",
    "flash-attn-2": "flash_attn/flash_attn_interface.py",
}
CALLED = """
import torch.nn.functional as F
calls = []
def flash_attn_func(q, k, v, *, softmax_scale, causal):
    calls.append((q.shape, q.stride(), k.shape, softmax_scale, causal))
    x, y, z = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(x, y, z, is_causal=causal, scale=softmax_scale, enable_gqa=True)
    return RETURNED
"""


LIBRARIES = ("flash_attn", "flash_attn_interface")


class OnlyIn:
    """Finds the libraries in one folder and nowhere else, whatever is installed on this machine."""

    def __init__(self, folder):
        self.folder = str(folder)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in LIBRARIES:
            return None
        spec = PathFinder.find_spec(name, path or [self.folder])
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return spec


@pytest.fixture
def install(tmp_path, monkeypatch):
    """``install("flash-attn-4")``: a stand-in that keeps its calls and computes with torch, until the test ends."""

    def forget():
        for cached in (libraries.function, libraries.missing_module, libraries.capability, libraries._refuses_type):
            cached.cache_clear()
        names = [name for name in sys.modules if name.partition(".")[0] in LIBRARIES]
        return {name: sys.modules.pop(name) for name in names}

    def make(name, returned="out.transpose(1, 2), None", content=CALLED):
        path = tmp_path / FLASH[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content.replace("RETURNED", returned))
        if name == "flash-attn-2":
            path.with_name("__init__.py").write_text("from flash_attn.flash_attn_interface import flash_attn_func\n")
        forget()

    monkeypatch.setattr(sys, "meta_path", [OnlyIn(tmp_path), *sys.meta_path])
    installed = forget()
    yield make
    forget()
    sys.modules.update(installed)


@pytest.fixture
def gpu(monkeypatch, install):
    """``gpu(9)``: CUDA devices have this compute capability, torch this cuDNN, and only stand-ins are installed."""

    def make(major=9, cudnn=91700):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, 0))
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: cudnn > 0)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
        forget()

    def forget():
        ours = cuda.refuses_device, cuda.refuses_tensors
        for cached in (libraries.capability, libraries._refuses_type, libraries.cudnn_version, *ours):
            cached.cache_clear()

    torch.use_deterministic_algorithms(False)
    yield make
    torch.use_deterministic_algorithms(True)
    forget()


def on_cuda(dim=128, *, v_dim=None, length=256, queries=None, dtype=torch.bfloat16):
    """What backends ask of q, k and v on a GPU: no tensor can be there, so nothing is computed with these."""
    q, k, v = (
        SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=torch.Size((1, heads, tokens, width)))
        for heads, tokens, width in ((8, queries or length, dim), (2, length, dim), (2, length, v_dim or dim))
    )
    return q, k, v


def chosen(*q_k_v, forced="", **asked):
    return Dense(forced).backend(*q_k_v, **asked).name


def test_order_of_preference(install, gpu):
    gpu(9)
    assert chosen(*on_cuda()) == "cudnn"
    install("flash-attn-2")
    assert chosen(*on_cuda()) == "cudnn"
    install("flash-attn-3")
    assert chosen(*on_cuda()) == "flash-attn-3"
    install("flash-attn-4")
    assert chosen(*on_cuda()) == "flash-attn-4"
    first, *others = BACKENDS
    assert first == "cuda-hopper"
    assert others == ["flash-attn-4", "flash-attn-3", "cudnn", "flash-attn-2", "sdpa", "triton", "torch"]


@pytest.mark.parametrize(
    ("major", "changes", "names"),
    [
        (9, {}, ["flash-attn-4", "flash-attn-3", "cudnn", "flash-attn-2"]),
        (9, {"dim": 256}, ["flash-attn-4", "flash-attn-3", "flash-attn-2"]),
        (9, {"dim": 264}, []),
        (9, {"dim": 100}, []),
        (9, {"v_dim": 64}, []),
        (9, {"dtype": torch.float32}, []),
        (9, {"queries": 100}, ["flash-attn-4", "flash-attn-3", "flash-attn-2"]),
        (9, {"length": 1}, ["flash-attn-4", "flash-attn-3", "flash-attn-2"]),
        (9, {"dim": 192, "v_dim": 128}, ["flash-attn-4", "flash-attn-3"]),
        (10, {"dim": 192, "v_dim": 128}, ["flash-attn-4"]),
        (12, {"dim": 192, "v_dim": 128}, []),
        (8, {"dim": 192, "v_dim": 128}, []),
        (9, {"dim": 128, "v_dim": 192}, []),
        (10, {}, ["flash-attn-4", "cudnn", "flash-attn-2"]),
        (10, {"dim": 192}, ["flash-attn-2"]),
        (10, {"dim": 256}, ["flash-attn-4", "flash-attn-2"]),
        (12, {"dim": 256}, ["flash-attn-2"]),
        (8, {}, ["cudnn", "flash-attn-2"]),
        (7, {"dtype": torch.float16}, []),
    ],
)
def test_what_each_serves(install, gpu, major, changes, names):
    gpu(major)
    for name in FLASH:
        install(name)
    q_k_v = on_cuda(**changes)
    assert [backend.name for backend in CUDA_BACKENDS if not backend.obstacle(Dense(), *q_k_v)] == names
    assert chosen(*q_k_v) == [*names, "sdpa"][0]


@pytest.mark.parametrize(
    ("major", "changes", "name"),
    [
        (9, {"queries": 64, "length": 8192}, "cuda-hopper"),
        (9, {"queries": 1, "length": 4097}, "cuda-hopper"),
        (9, {"queries": 1024, "length": 8192}, "cuda-hopper"),
        (9, {"queries": 64, "length": 8192, "dim": 192, "v_dim": 128}, "cuda-hopper"),
        (9, {"queries": 64, "length": 8192, "dim": 256}, "cuda-hopper"),
        (9, {"queries": 1025, "length": 8192}, "flash-attn-4"),
        (9, {"queries": 64, "length": 4096}, "flash-attn-4"),
        (9, {"queries": 64, "length": 8192, "dtype": torch.float32}, "sdpa"),
        (10, {"queries": 64, "length": 8192}, "flash-attn-4"),
        (8, {"queries": 64, "length": 8192}, "sdpa"),
    ],
)
def test_few_queries_behind_many_keys_take_a_kernel_that_splits_the_keys(install, gpu, monkeypatch, major, changes, name):
    gpu(major)
    install("flash-attn-4")
    monkeypatch.setattr(few_queries, "multiprocessors", lambda device: 132)
    first, *others = Dense.backends
    monkeypatch.setattr(Dense, "backends", (replace(first, missing=str), *others))
    assert chosen(*on_cuda(**changes)) == name
    assert chosen(*on_cuda(**changes), softcap=30.0) != "cuda-hopper"


def test_cudnn_of_an_older_version(gpu):
    gpu(9, cudnn=91002)
    assert chosen(*on_cuda(length=256)) == "cudnn"
    assert chosen(*on_cuda(length=257)) == "sdpa"
    gpu(9, cudnn=0)
    assert chosen(*on_cuda(length=256)) == "sdpa"


def test_cudnn_is_not_deterministic(gpu):
    gpu(9)
    torch.use_deterministic_algorithms(True)
    assert chosen(*on_cuda()) == "sdpa"


@pytest.mark.parametrize(
    ("forced", "changes", "reason"),
    [
        ("flash-attn-4", {}, "flash-attn-4 is not installed (pip install flash-attn-4)"),
        ("flash-attn-3", {}, "flash-attn-3 is not installed (build"),
        ("cudnn", {"dtype": torch.float32}, "cudnn takes float16 or bfloat16, not float32"),
        ("cudnn", {"queries": 100}, "cudnn takes as many queries as keys, not 100 and 256"),
        ("cudnn", {"dim": 256}, "cudnn takes head sizes up to 128, not 256"),
        ("cudnn", {"dim": 192, "v_dim": 128}, "cudnn takes values as wide as queries, not 128 and 192"),
        ("triton", {"dim": 513}, "triton takes head sizes up to 512, not 513"),
    ],
)
def test_a_forced_backend_is_used_or_an_error(install, gpu, forced, changes, reason):
    gpu(9)
    with pytest.raises(ValueError, match=re.escape(reason)):
        chosen(*on_cuda(**changes), forced=forced)
    assert chosen(*on_cuda(), forced="sdpa") == "sdpa"
    install("flash-attn-2")
    assert chosen(*on_cuda(), forced="flash-attn-2") == "flash-attn-2"


def test_a_name_that_there_is_none_of():
    with pytest.raises(
        ValueError, match="dense_backend flash-attn-5 is unknown: choose from flash-attn-4, flash-attn-3, cudnn"
    ):
        Dense("flash-attn-5")


@pytest.mark.parametrize("name", FLASH)
def test_one_flash_attention_is_not_taken_for_another(install, name):
    install(name)
    assert [other for other in FLASH if not BACKENDS[other].missing()] == [name]


def test_a_library_that_does_not_load_is_passed_over(install, gpu):
    gpu(9)
    install("flash-attn-4", content="raise OSError('undefined symbol: _ZN3c10')\n")
    reason = BACKENDS["flash-attn-4"].missing()
    assert reason == "cannot be imported (OSError: undefined symbol: _ZN3c10) (pip install flash-attn-4)"
    assert chosen(*on_cuda()) == "cudnn"


def test_a_package_that_breaks_its_submodules(install):
    install("flash-attn-4")
    install("flash-attn-2", content="raise ImportError('libcudart.so.11.0: cannot open shared object file')\n")
    for name in ("flash-attn-4", "flash-attn-2"):
        assert "cannot be imported (ImportError: libcudart.so.11.0" in BACKENDS[name].missing()


@pytest.mark.parametrize("name", FLASH)
@pytest.mark.parametrize("returned", ["out.transpose(1, 2)", "(out.transpose(1, 2), None)"])
@pytest.mark.parametrize("contiguous", [True, False])
def test_the_call_and_its_layout(install, make_qkv, name, returned, contiguous):
    install(name, returned)
    q, k, v = make_qkv(70, heads=6, kv_heads=2, dim=32)
    if not contiguous:
        q, k, v = (x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v))
    out = BACKENDS[name].attend(Dense(), q, k, v, 0.3)
    torch.testing.assert_close(out.double(), masked_attention(q, k, v, Dense().mask(q, k), scale=0.3), rtol=0, atol=1e-5)
    module = FLASH[name].removesuffix("/__init__.py").removesuffix(".py").replace("/", ".")
    assert sys.modules[module].calls == [((1, 70, 6, 32), (70 * 6 * 32, 6 * 32, 32, 1), (1, 70, 2, 32), 0.3, True)]


CALLED_FOR_MORE = """
from tmbench_kernels.reference import causal_mask, masked_attention, masked_lse
calls = []
def flash_attn_func(q, k, v, *, softmax_scale, causal, **options):
    calls.append(options)
    x, y, z = (t.transpose(1, 2) for t in (q, k, v))
    mask = causal_mask(y.shape[2], queries=x.shape[2])
    asked = {"mask": mask, "scale": softmax_scale, "softcap": options.get("softcap", 0.0)}
    out = masked_attention(x, y, z, **asked).to(q.dtype).transpose(1, 2)
    return RETURNED if any(name.startswith("return_") for name in options) else out
"""


@pytest.mark.parametrize(
    ("name", "returned", "option"),
    [
        ("flash-attn-4", "(out, masked_lse(x, y, **asked).float())", "return_lse"),
        ("flash-attn-3", "(out, masked_lse(x, y, **asked).float())", "return_attn_probs"),
        ("flash-attn-2", "(out, masked_lse(x, y, **asked).float(), None)", "return_attn_probs"),
    ],
)
def test_the_call_for_a_log_sum_exp_or_a_cap(install, make_qkv, name, returned, option):
    install(name, returned, CALLED_FOR_MORE)
    q, k, v = make_qkv(70, heads=6, kv_heads=2, dim=32)
    mask = Dense().mask(q, k)
    lse = torch.empty(1, 6, 70)
    BACKENDS[name].attend(Dense(), q, k, v, 0.3, lse=lse)
    torch.testing.assert_close(lse.double(), masked_lse(q, k, mask, scale=0.3), rtol=0, atol=1e-5)
    out = BACKENDS[name].attend(Dense(), q, k, v, 0.3, softcap=2.0)
    exact = masked_attention(q, k, v, mask, scale=0.3, softcap=2.0)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5)
    module = FLASH[name].removesuffix("/__init__.py").removesuffix(".py").replace("/", ".")
    assert sys.modules[module].calls == [{option: True}, {"softcap": 2.0}]
    part = q[:, :, -20:]
    exact = masked_attention(part, k, v, Dense().mask(part, k), scale=0.3)
    torch.testing.assert_close(BACKENDS[name].attend(Dense(), part, k, v, 0.3).double(), exact, rtol=0, atol=1e-5)


def test_what_gives_neither_is_passed_over(install, gpu):
    gpu(9)
    assert chosen(*on_cuda(), lse=True) == chosen(*on_cuda(), softcap=30.0) == "triton"
    assert chosen(*on_cuda(dtype=torch.float32), softcap=30.0, lse=True) == "torch"
    install("flash-attn-2")
    assert chosen(*on_cuda(), lse=True) == chosen(*on_cuda(), softcap=30.0) == "flash-attn-2"
    for name in ("cudnn", "sdpa"):
        with pytest.raises(ValueError, match=f"{name} gives no log-sum-exp, which learned sinks take"):
            chosen(*on_cuda(), forced=name, lse=True)
        with pytest.raises(ValueError, match=f"{name} has no soft-capped logits"):
            chosen(*on_cuda(), forced=name, softcap=30.0)


def test_the_call_of_cudnn(monkeypatch, make_qkv):
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention

    def record(q, k, v, **options):
        calls.append((q.stride(-1), k.shape[1], options))
        with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]):
            return real(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    q, k, v = make_qkv(70, heads=6, kv_heads=2, dim=32)
    q = q.transpose(-1, -2).contiguous().transpose(-1, -2)
    out = BACKENDS["cudnn"].attend(Dense(), q, k, v, 0.3)
    assert calls == [(1, 2, {"is_causal": True, "scale": 0.3, "enable_gqa": True})]
    torch.testing.assert_close(out.double(), masked_attention(q, k, v, Dense().mask(q, k), scale=0.3), rtol=0, atol=1e-5)

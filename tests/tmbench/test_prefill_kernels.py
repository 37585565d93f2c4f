"""Kernels of a prefill by kind: benchmarks/prefill_kernels.py goes by their names and their times."""

from __future__ import annotations

import ast
import re

import pytest

KERNELS = {
    "attention": (
        "kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object_at__tensorptrbf16gmemalign16",
        "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<128, 128, 64, 4, false>>",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_128x128x128_4x1x1_kernel0_0",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)",
    ),
    "linear attention": (
        "chunk_gated_delta_rule_fwd_kernel_h_blockdim64",
        "chunk_fwd_kernel_o",
        "chunk_scaled_dot_kkt_fwd_kernel",
        "merge_16x16_to_64x64_inverse_kernel",
        "causal_conv1d_fwd_kernel",
        "l2norm_fwd_kernel",
        "_chunk_scan_fwd_kernel",
    ),
    "matrix products": (
        "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_kernel__5x_cublas",
        "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm::kernel::GemmUniversal<",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>",
        "void at::cuda::detail::prepare_grouped_gemm_data<cutlass::bfloat16_t>",
        "triton_tem_fused_mm_t_0",
    ),
    "gathers and sorts": (
        "void at::native::index_elementwise_kernel<128, 4, at::native::gpu_index_kernel<at::native::index_kernel_impl<",
        "void at::native::(anonymous namespace)::indexSelectLargeIndex<c10::BFloat16, long, unsigned int, 2, 2, -2, true>",
        "void at::native::_scatter_gather_elementwise_kernel<128, 8, at::native::_cuda_scatter_gather_internal_kernel<",
        "void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<at_cuda_detail::cub::DeviceRadixSortPolicy<",
        "void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>",
        "void at::native::vectorized_gather_kernel<16, long>",
    ),
    "elementwise": (
        "triton_red_fused__to_copy_add_index_put_mean_mul_pow_rsqrt_scaled_dot_product_attention_1",
        "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16>>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::(anonymous namespace)::OpaqueType<2u>>",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::ArgMaxOps<float>>>",
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
    ),
    "other": ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "spin_kernel"),
}


@pytest.fixture
def script(monkeypatch, pytestconfig):
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "benchmarks")
    import prefill_kernels

    return prefill_kernels


@pytest.mark.parametrize("kind", KERNELS)
def test_a_kernel_goes_by_its_name(script, kind):
    assert {name: script.kind_of(name) for name in KERNELS[kind]} == dict.fromkeys(KERNELS[kind], kind)


def test_all_kernels_of_ours_are_named(script, pytestconfig):
    folder = pytestconfig.rootpath / "kernels" / "tmbench_kernels"
    named = {
        name for path in folder.glob("*/*.cu") for name in re.findall(r"__global__[^{]*?(\w+)\(const", path.read_text())
    }
    for path in folder.rglob("*.py"):
        text = path.read_text()
        functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        jitted = {node.name for node in functions if "triton.jit" in " ".join(map(ast.unparse, node.decorator_list))}
        named |= {name for name in jitted if f"{name}[" in text}
    assert len(named) > 15
    assert named == set(script.OWN)


def test_time_counts_for_each_kernel_and_is_busy_once(script):
    names = ("nvjet_a", "nvjet_b", "_walk", "Memset (Device)")
    spans = ((0.0, 4000.0), (3000.0, 5000.0), (6000.0, 7000.0), (3500.0, 3600.0))
    rows = script.shares([script.Kernel(name, *span) for name, span in zip(names, spans, strict=True)], 8.0)
    found = {row["kind"]: (row["ms"], row["share"], row["launches"]) for row in rows if float(row["ms"])}
    assert found == {
        "attention": ("1.000", "0.1250", 1),
        "matrix products": ("6.000", "0.7500", 2),
        "elementwise": ("0.100", "0.0125", 1),
        "idle": ("2.000", "0.2500", 0),
        "all": ("8.000", "1.0000", 4),
    }
    assert [row["kind"] for row in rows] == [*script.KINDS, "idle", "all"]


def test_kernels_of_another_time_are_refused(script):
    with pytest.raises(ValueError, match=r"kernels of 9\.0 ms for a prefill of 8\.0 ms"):
        script.shares([script.Kernel("nvjet", 0.0, 9000.0)], 8.0)
    with pytest.raises(ValueError, match=r"kernels of 0\.0 ms"):
        script.shares([], 8.0)


def test_what_has_no_kind_is_told_by_name_the_heaviest_first(script):
    spans = [("new_a", 0.0, 1000.0), ("new_b", 1000.0, 3000.0), ("nvjet", 3000.0, 9000.0), ("new_a", 9000.0, 9500.0)]
    kernels = [script.Kernel(*span) for span in spans]
    assert script.unnamed(kernels) == [("new_b", 2.0), ("new_a", 1.5)]
    assert script.unnamed(kernels, 1) == [("new_b", 2.0)]

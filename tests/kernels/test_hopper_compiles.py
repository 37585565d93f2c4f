"""The kernels for Hopper compile to machine code without a GPU, so that a change that breaks one shows on any machine."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

import pytest
import torch

from tmbench_kernels.cuda import missing_hopper

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing_hopper()), reason=missing_hopper())]


SKIPS = "skip_softmax.hopper_backend"
MODULES = ["triangle.hopper_backend", "block_sparse.hopper_backend", SKIPS]


def kernels(names: str, cases: list[tuple[Any, ...]]) -> Any:
    """Every kernel with each of these head sizes that it has room for."""
    return pytest.mark.parametrize(
        f"module, {names}",
        [(module, *case) for module in MODULES for case in cases if module != SKIPS or (case[0] <= 192 and case[1] <= 128)],
    )


@kernels(
    "dim, v_dim, dtype, lse",
    [
        (128, 128, torch.bfloat16, False),
        (64, 64, torch.float16, True),
        (96, 40, torch.float16, False),
        (192, 128, torch.bfloat16, False),
        (256, 256, torch.bfloat16, True),
        (64, 192, torch.float16, False),
    ],
)
def test_it_compiles_for_hopper(module, dim, v_dim, dtype, lse):
    from tmbench_kernels import hopper

    host = import_module(f"tmbench_kernels.{module}")
    code = hopper.compile_source(host.SOURCE, host.settings(dim, v_dim, dtype, lse=lse))
    assert code[:4] == b"\x7fELF"
    assert host.KERNEL.encode() in code
    assert host.shared_bytes(dim, v_dim) <= 227 * 1024


@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (96, 40), (128, 128), (192, 128), (256, 256), (64, 192)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_that_lie_apart_compile_for_hopper(dim, v_dim, dtype):
    """Another build of the kernel over lists, held to what the others are."""
    from tmbench_kernels import hopper

    host = import_module("tmbench_kernels.block_sparse.hopper_backend")
    settings = host.settings(dim, v_dim, dtype, spread=True)
    log = hopper.compile_log(host.SOURCE, settings)
    assert "Compiling entry function" in log
    assert "serialized" not in log
    assert "setmaxnreg" not in log
    assert re.search(r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", log)
    assert f"Used {65536 // (128 * (1 + settings['CONSUMERS'])) // 8 * 8} registers" in log


@kernels("dim, v_dim, lse", [(128, 128, False), (128, 128, True), (192, 128, False), (256, 256, True)])
def test_its_products_run_beside_other_work(module, dim, v_dim, lse):
    """The assembler says so when it must wait for every product on its own, which makes the kernel half as fast."""
    from tmbench_kernels import hopper

    host = import_module(f"tmbench_kernels.{module}")
    log = hopper.compile_log(host.SOURCE, host.settings(dim, v_dim, torch.bfloat16, lse=lse))
    assert "Compiling entry function" in log
    assert "serialized" not in log
    assert re.search(r"\b0 bytes spill stores", log)


@kernels("dim, v_dim", [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_a_program_starts_with_the_registers_that_its_warpgroups_take(module, dim, v_dim):
    """With fewer, a consumer would wait for ever for those that it asks for."""
    from tmbench_kernels import hopper

    host = import_module(f"tmbench_kernels.{module}")
    log = hopper.compile_log(host.SOURCE, host.settings(dim, v_dim, torch.bfloat16, lse=True))
    used = re.search(r"Used (\d+) registers", log)
    assert used
    warpgroups = 1 + host.settings(dim, v_dim, torch.bfloat16)["CONSUMERS"]
    assert int(used[1]) == 65536 // (128 * warpgroups) // 8 * 8
    assert "setmaxnreg" not in log, "the assembler ignores one that is too small for its code"


def test_an_error_in_the_source_is_shown(tmp_path):
    from tmbench_kernels import hopper

    source = tmp_path / "broken.cu"
    source.write_text("this is not C++")
    with pytest.raises(RuntimeError, match=r"broken\.cu does not compile: .*error"):
        hopper.compile_source(source, {})

"""The Hopper kernel compiles to machine code without a GPU, so that a change that breaks it shows on any machine."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from tmbench_kernels import gluon_triangle as kernel

dim, heads = map(int, sys.argv[1:])
piece, keys, box = kernel.TEAM_ROWS // heads, kernel.KEYS, kernel.BOX
constants = dict(GROUPS=heads, HEADS=heads, HEADS_BLOCK=heads, HEAD_TILES=8, V_DIM=dim, STAGES=kernel.STAGES,
                 REGISTERS=kernel.REGISTERS)
tiles = dict(q_desc=[1, piece, heads, dim], k_desc=[1, 1, keys, dim], v_desc=[1, 1, keys, dim],
             k_box_desc=[1, 1, box, dim], v_box_desc=[1, 1, box, dim])
kinds = dict(out="*bf16", part_out="*fp32", part_lse="*fp32", scale_log2="fp32")
names = kernel._walk.arg_names
signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names}
for name, block in tiles.items():
    signature[name] = f"tensordesc<bf16{block},{kernel._layout(dim)!r}>"
source = GluonASTSource(kernel._walk, signature, constexprs={(names.index(k),): v for k, v in constants.items()})
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4))
assert "wgmma.mma_async" in compiled.asm["ptx"] and "cp.async.bulk.tensor" in compiled.asm["ptx"]
print(compiled.metadata.shared)
"""


@pytest.mark.parametrize(("dim", "heads"), [(128, 4), (64, 1)])
def test_it_compiles_for_hopper(dim, heads, tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(dim), str(heads)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) <= 227 * 1024

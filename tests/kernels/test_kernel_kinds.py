"""Each backend has its kind of kernel."""

from __future__ import annotations

from tmbench_kernels import BlockSparse, Dense, MInferenceHeads, Triangle, VerticalSlash, exports
from tmbench_kernels.kernel_kinds import HOPPER, KINDS, LIBRARY, TORCH, TRITON
from tmbench_kernels.pattern import Pattern


def test_every_backend_has_a_kind_and_every_kind_is_of_a_backend():
    patterns = [one for one in vars(exports).values() if isinstance(one, type) and issubclass(one, Pattern)]
    names = {backend.name for pattern in patterns for backend in getattr(pattern, "backends", ())}
    assert names == KINDS.keys()


def test_what_runs_on_a_cpu_is_torch_and_nothing_else_is():
    for pattern in (Dense, Triangle, VerticalSlash, MInferenceHeads, BlockSparse):
        for backend in pattern.backends:
            assert ("cpu" in backend.devices) == (KINDS[backend.name] is TORCH), backend.name


def test_kinds_are_slower_from_step_to_step():
    assert HOPPER.step == LIBRARY.step < TRITON.step < TORCH.step

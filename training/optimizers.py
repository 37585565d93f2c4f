"""Muon (Jordan et al. 2024): momentum whose singular values are all brought near one, for weight matrices."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def orthogonalised(matrices: Tensor, rounds: int = 5) -> Tensor:
    """A batch of matrices with their singular values pushed towards one, by Newton and Schulz's iteration in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.mT if tall else x
    return result


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum; matrices of one shape are updated together."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, decay: float = 0.01) -> None:
        shapes: dict[torch.Size, list[Tensor]] = {}
        for param in params:
            shapes.setdefault(param.shape, []).append(param)
        super().__init__([{"params": group} for group in shapes.values()], {"lr": lr})
        self.momentum, self.decay = momentum, decay

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update."""
        for group in self.param_groups:
            params: list[Tensor] = group["params"]
            gradients = torch.stack([p.grad for p in params if p.grad is not None])
            state = self.state[params[0]]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(gradients)
            buffer = state["momentum"]
            buffer.lerp_(gradients, 1 - self.momentum)
            update = orthogonalised(gradients.lerp(buffer, self.momentum)).to(params[0].dtype)
            scale = max(1.0, params[0].shape[0] / params[0].shape[1]) ** 0.5
            torch._foreach_mul_(params, 1 - group["lr"] * self.decay)
            torch._foreach_add_(params, list(update.unbind()), alpha=-group["lr"] * scale)

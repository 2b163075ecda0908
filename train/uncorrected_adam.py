"""Adam whose averages begin at zero and are taken as they are: the optimiser of the reference's retrieval."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

# Beside a norm, so that a gradient of zeros divides nothing by zero: torch's own clipping has the same.
_BESIDE_NORM = 1e-6


class UncorrectedAdam(torch.optim.Optimizer):
    """Adam without bias correction, with decoupled decay; each tensor's gradient is cut to a norm first.

    With m and v the averages of gradients g and of their squares, p -= lr (m / (sqrt(v) + eps) + decay p). The first
    step with moments (0.9, 0.98) moves by 0.7 of the rate, where a corrected one moves by all of it.

    Args:
        params: Parameters, or groups of them.
        lr: Rate.
        betas: Of the two averages.
        eps: Beside the root.
        weight_decay: Times the rate.
        tensor_norm: What the norm of each tensor's gradient is cut down to.

    Source:
        HJYao00/Side4Video at 5d72352, Retrieval/modules/optimization.py, `BertAdam`. There the schedule is a part of
        it; here train/recipe.py has it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        tensor_norm: float = 1.0,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "tensor_norm": tensor_norm}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group, [parameter for parameter in group["params"] if parameter.grad is not None])
        return loss

    def _step_group(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        if not parameters:
            return
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
        means = [self.state[parameter]["exp_avg"] for parameter in parameters]
        squares = [self.state[parameter]["exp_avg_sq"] for parameter in parameters]
        raw = [parameter.grad for parameter in parameters if parameter.grad is not None]
        shares = [(group["tensor_norm"] / (norm + _BESIDE_NORM)).clamp(max=1.0) for norm in torch._foreach_norm(raw)]
        gradients = torch._foreach_mul(raw, shares)
        first, second = group["betas"]
        torch._foreach_mul_(means, first)
        torch._foreach_add_(means, gradients, alpha=1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - second)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, group["eps"])
        moves = torch._foreach_div(means, roots)
        if group["weight_decay"]:
            torch._foreach_add_(moves, parameters, alpha=group["weight_decay"])
        torch._foreach_add_(parameters, moves, alpha=-group["lr"])

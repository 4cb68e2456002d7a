"""Kar2 and Kar3: sign descent along the gradient and along one or two of its running averages, each with its sign."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Kar2", "Kar3"]


class _Kar(Optimizer):
    """theta -= lr (sign g + sum_r sign m_r), then m_r <- beta_r m_r + (1 - beta_r) g; the averages start at zero."""

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, ...]) -> None:
        if not lr >= 0:
            raise ValueError(f"lr must not be negative, got {lr}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), got {betas if len(betas) > 1 else betas[0]}")
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update; each parameter moves by a whole number of steps of `lr`, at most one for each sign.

        Raises:
            ValueError: for sparse gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise ValueError(f"{type(self).__name__} does not take sparse gradients")
                alike.setdefault((parameter.device, parameter.dtype), []).append(parameter)
                state = self.state[parameter]
                if not state:
                    state["averages"] = [torch.zeros_like(parameter) for _ in group["betas"]]
            for parameters in alike.values():
                self._move(parameters, group["lr"], group["betas"])
        return loss

    def _move(self, parameters: list[Tensor], lr: float, betas: tuple[float, ...]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        steps = torch._foreach_sign(gradients)
        for r, beta in enumerate(betas):
            averages = [self.state[parameter]["averages"][r] for parameter in parameters]
            torch._foreach_add_(steps, torch._foreach_sign(averages))
            torch._foreach_lerp_(averages, gradients, 1 - beta)
        torch._foreach_add_(parameters, steps, alpha=-lr)


class Kar2(_Kar):
    """Sign descent with two signs: of the gradient, and of its running average as it was before this step.

    No weight decay, no clipping: a parameter moves by at most 2 `lr` a step. Suits slow nets, whose gradients differ
    by orders of magnitude from those of the layers that they feed.

    Args:
        params: parameters or groups of them.
        lr: step of each sign.
        beta: of the average.

    Raises:
        ValueError: for a negative `lr`, or a `beta` outside [0, 1).
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-4, beta: float = 0.95) -> None:
        super().__init__(params, lr, (beta,))


class Kar3(_Kar):
    """Sign descent with three signs: as `Kar2`, with a fast and a slow average. A step moves by at most 3 `lr`.

    The reference trains CIFAR-10 with lr 1.215e-3, betas (0.5, 0.95) or (0.75, 0.99), a linear rise of the rate over 8
    of 100 epochs, then a cosine to zero.

    Args:
        params: parameters or groups of them.
        lr: step of each sign.
        betas: of the two averages.

    Raises:
        ValueError: for a negative `lr`, or betas outside [0, 1).
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-4, betas: tuple[float, float] = (0.5, 0.95)) -> None:
        super().__init__(params, lr, betas)

"""Time along gradient flow, and the steps of an optimizer that it takes."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = ["LOSSES", "Loss", "checked_times", "time_per_step"]

Loss = Literal["sum", "mean", "mse"]
LOSSES: tuple[Loss, ...] = ("sum", "mean", "mse")


def time_per_step(lr: float, loss: Loss, samples: int | None, outputs: int = 1) -> float:
    """How far one step of gradient descent goes along the flow of `1/2 sum residual^2`.

    `lr` for "sum", that very loss; `lr / P` for "mean", `1/(2P) sum residual^2`; `2 lr / (P C)` for "mse", which is
    `nn.MSELoss` on `P` samples of `C` outputs.

    Raises:
        ValueError: for a rate that is not positive, an unknown loss, or a loss that needs `samples` without them.
    """
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr must be positive and finite, got {lr}")
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    if loss == "sum":
        return lr
    if samples is None or samples < 1:
        raise ValueError(f"loss={loss!r} needs the number of samples, got samples={samples}")
    return lr / samples if loss == "mean" else 2 * lr / (samples * outputs)


def checked_times(times: float | Tensor, name: str = "times") -> Tensor:
    """`times` in float64. Infinity is a time.

    Raises:
        ValueError: where one is negative or NaN.
    """
    found = torch.as_tensor(times, dtype=torch.float64)
    if not (found >= 0).all():
        raise ValueError(f"{name} must be at least 0, got {found[~(found >= 0)].flatten()[0].item()}")
    return found

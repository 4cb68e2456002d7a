"""Learning-rate schedules as plain values: each is a function of an optimiser and the number of its steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

__all__ = ["Schedule", "cosine", "one_cycle"]

Schedule = Callable[[Optimizer, int], LRScheduler]


def one_cycle(max_lr: float | list[float], **options: Any) -> Schedule:
    """Rise to `max_lr` over 30 % of the steps, then fall to almost nothing (Smith & Topin 2017, arXiv 1708.07120).

    Args:
        max_lr: the peak; a list gives one for each parameter group.
        options: further arguments of `torch.optim.lr_scheduler.OneCycleLR`, such as `pct_start`.
    """
    peaks = max_lr if isinstance(max_lr, (list, tuple)) else [max_lr]
    if not peaks or not all(math.isfinite(peak) and peak > 0 for peak in peaks):
        raise ValueError(f"max_lr must be positive, got {max_lr}")

    def schedule(optimizer: Optimizer, total_steps: int) -> LRScheduler:
        return OneCycleLR(optimizer, max_lr, total_steps=total_steps, **options)

    return schedule


def cosine(*, warmup: float = 0.0, final: float = 0.0) -> Schedule:
    """Half a cosine from the optimiser's own rate down to `final` times it (Loshchilov & Hutter 2016, 1608.03983).

    Args:
        warmup: share of the steps, in [0, 1), over which the rate first rises linearly.
        final: the last rate as a share of the first, in [0, 1].
    """
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup must be a share of the steps in [0, 1), got {warmup}")
    if not 0 <= final <= 1:
        raise ValueError(f"final must be a share of the rate in [0, 1], got {final}")

    def schedule(optimizer: Optimizer, total_steps: int) -> LRScheduler:
        rising = round(warmup * total_steps)

        def factor(step: int) -> float:
            if step < rising:
                return (step + 1) / rising
            done = min(1.0, (step - rising) / max(1, total_steps - rising))
            return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2

        return LambdaLR(optimizer, factor)

    return schedule

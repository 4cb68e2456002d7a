"""Elementary symmetric polynomials, `e_k(x) = sum over i_1 < ... < i_k of x_{i_1} ... x_{i_k}`, without any subset."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["elementary_symmetric", "elementary_symmetric_of_signs"]


def elementary_symmetric(power_sums: Sequence[Tensor]) -> list[Tensor]:
    """`e_0 .. e_n` from the power sums `p_k = sum_i x_i^k`, k = 1 .. n, by Newton's identities, elementwise.

    Scale `x` so that `p_2` is about 1: the values then stay within reach for any n.
    """
    e = [torch.ones_like(power_sums[0])]
    for k in range(1, len(power_sums) + 1):
        total = e[k - 1] * power_sums[0]
        for i in range(2, k + 1):
            total = torch.addcmul(total, e[k - i], power_sums[i - 1], value=1.0 if i % 2 else -1.0)
        e.append(total / k)
    return e


def elementary_symmetric_of_signs(N: int, n: int, device: torch.device | None = None) -> Float[Tensor, "order values"]:
    """`e_0 .. e_n` of N signs, which depend on their sum S alone: column c is S = 2 c - N, c = 0 .. N (Krawtchouk)."""
    S = 2.0 * torch.arange(N + 1, dtype=torch.float64, device=device) - N
    e = [torch.ones_like(S), S]
    for k in range(1, n):
        e.append((S * e[k] - (N - k + 1) * e[k - 1]) / (k + 1))
    return torch.stack(e[: n + 1])

"""Patterns and noisy examples of them, what their quality is, and the units of load and temperature."""

from __future__ import annotations

import itertools
import math

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

__all__ = [
    "beta_prime",
    "check_signs",
    "dataset_entropy",
    "estimate_quality",
    "examples",
    "load",
    "mattis_magnetization",
    "noise_couplings",
]


def beta_prime(beta: float, P: int) -> float:
    """`2 beta / P!`, in which temperature curves for different P lie on one scale; `beta` is the physical one."""
    _check_order(P)
    return 2 * beta / math.factorial(P)


def load(K: int, N: int, P: int) -> float:
    """`gamma = (P!/2) K / N^{P-1}`: K patterns in units of what N spins can hold (K/N at P = 2).

    Raises:
        ValueError: for K < 0, P < 2 or P > N.
    """
    _check_order(P)
    if K < 0 or P > N:
        raise ValueError(f"K must not be negative and N at least P = {P}, got K = {K} and N = {N}")
    return math.factorial(P) / 2 * K / float(N) ** (P - 1)


def dataset_entropy(r: float, M: int) -> float:
    """`rho = (1 - r^2) / (r^2 M)`: 0 for perfect data, infinite where examples say nothing.

    Raises:
        ValueError: for r outside (0, 1] or M < 1.
    """
    check_examples(r, M)
    return (1 - r * r) / (r * r * M)


def check_examples(r: float, M: int) -> None:
    if not 0 < r <= 1:
        raise ValueError(f"r, the quality of examples, must lie in (0, 1], got {r}")
    if M < 1:
        raise ValueError(f"M, the number of examples of a pattern, must be at least 1, got {M}")


def examples(
    xi: Num[Tensor, "K N"], r: float, M: int, generator: torch.Generator | None = None
) -> Num[Tensor, "K M N"]:
    """M noisy copies of each pattern: entries keep their sign with probability `(1 + r) / 2`, independently.

    Raises:
        ValueError: for patterns other than +-1, r outside (0, 1] or M < 1.
    """
    check_signs(xi, "xi")
    check_examples(r, M)
    u = torch.rand(len(xi), M, xi.shape[1], generator=generator, device=xi.device)
    return torch.where(u < (1 + r) / 2, xi.unsqueeze(1), -xi.unsqueeze(1))


def mattis_magnetization(s: Num[Tensor, "B N"], xi: Num[Tensor, "K N"]) -> Float[Tensor, "B K"]:
    """`m = mean_i s_i xi_i`, the overlap of every state with every archetype (which the network itself never sees)."""
    if s.shape[1] != xi.shape[1]:
        raise ValueError(f"s and xi must have as many spins, got {s.shape[1]} and {xi.shape[1]}")
    return s.double() @ xi.double().T / s.shape[1]


def estimate_quality(X: Num[Tensor, "B N"], y: Int[Tensor, " B"]) -> float:
    """r from data: `r^2` is the mean product of two different examples of a class, over all pairs and entries.

    0 where examples agree less than chance.

    Raises:
        ValueError: for examples other than +-1, labels of another number, or no class of two examples.
    """
    check_signs(X, "X")
    if len(X) != len(y):
        raise ValueError(f"X and y must hold as many examples as labels, got {len(X)} and {len(y)}")
    labels, place, counts = y.unique(return_inverse=True, return_counts=True)
    if not (counts > 1).any():
        raise ValueError("y must have a class of at least two examples, whose agreement is the quality")
    sums = torch.zeros(len(labels), X.shape[1], dtype=torch.float64, device=X.device).index_add(0, place, X.double())
    together = (sums.square() - counts.unsqueeze(1)).sum().item()
    pairs = (counts * (counts - 1)).sum().item() * X.shape[1]
    return math.sqrt(max(0.0, together / pairs))


def noise_couplings(N: int, P: int, w: float, generator: torch.Generator | None = None) -> Float[Tensor, "..."]:
    """Independent noise of standard deviation `w` on every entry of the Hebbian tensor of P indices, as couplings.

    In units of the entries that one pattern contributes: with K patterns and this noise the effective load is
    `(P!/2) (K + w^2) / N^{P-1}`. The tensor has N^P entries: for `DenseHebbian(..., couplings=)` of small networks.

    Raises:
        ValueError: for P < 2, P > N or a negative w.
    """
    _check_order(P)
    if P > N or not w >= 0:
        raise ValueError(f"N must be at least P = {P} and w not negative, got N = {N} and w = {w}")
    subsets = torch.combinations(torch.arange(N), P)
    values = w * float(N) ** (1 - P) * torch.randn(len(subsets), dtype=torch.float64, generator=generator)
    J = torch.zeros((N,) * P, dtype=torch.float64)
    for order in itertools.permutations(range(P)):
        J[tuple(subsets[:, order].unbind(1))] = values
    return J


def check_signs(values: Tensor, name: str, hint: str = "") -> None:
    wrong = values.abs() != 1
    if wrong.any():
        raise ValueError(f"{name} must hold +1 and -1 only, got {values[wrong][0].item():g}{hint}")


def _check_order(P: int) -> None:
    if P < 2:
        raise ValueError(f"P must be at least 2, got {P}")

"""Averages of tanh and its relatives over a Gaussian field `x = A + D Z`, for any A and D, to about twelve digits."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from lathe.core.gaussian import gauss_hermite

__all__ = ["log_cosh_mean", "sech4_mean", "tanh_means"]

#: Below this D the integrand is smooth in Z; above it in x, apart from what tanh does near zero.
_NARROW = 0.7


def tanh_means(A: Tensor, D: Tensor, order: int = 101) -> tuple[Tensor, Tensor]:
    """`E tanh x` and `E tanh^2 x`; `A` and `D >= 0` have one shape. `order` nodes at D < 0.7, where 30 reach 1e-8."""
    shape, A, D = A.shape, A.reshape(-1), D.reshape(-1)
    narrow = D < _NARROW
    m, q = torch.empty_like(A), torch.empty_like(A)
    z, w = gauss_hermite(order, A)
    t = torch.tanh(torch.addcmul(A[narrow].unsqueeze(1), D[narrow].unsqueeze(1), z))
    m[narrow], q[narrow] = t @ w, t.square_() @ w
    A, D = A[~narrow], D[~narrow]
    # tanh is the sign, and tanh^2 is one, but for what decays like exp(-2 |x|).
    below, above = _densities(A, D)
    odd, even, _, _ = _columns(A)
    m[~narrow] = torch.erf(A / (D * math.sqrt(2))) + (above - below) @ odd
    q[~narrow] = 1 + (above + below) @ even
    return m.reshape(shape), q.reshape(shape)


def log_cosh_mean(A: Tensor, D: Tensor) -> Tensor:
    """`E ln 2 cosh x`."""
    narrow = D < _NARROW
    z, w = gauss_hermite(101, A)
    x = (A.unsqueeze(-1) + torch.where(narrow, D, 0.0).unsqueeze(-1) * z).abs()
    small = (x + torch.log1p(torch.exp(-2 * x))) @ w
    below, above = _densities(A, D.clamp_min(_NARROW))
    wide = absolute_mean(A, D) + (above + below) @ _columns(A)[2]
    return torch.where(narrow, small, wide)


def sech4_mean(A: Tensor, D: Tensor) -> Tensor:
    """`E sech^4 x`."""
    narrow = D < _NARROW
    z, w = gauss_hermite(101, A)
    t = torch.tanh(A.unsqueeze(-1) + torch.where(narrow, D, 0.0).unsqueeze(-1) * z)
    below, above = _densities(A, D.clamp_min(_NARROW))
    return torch.where(narrow, (1 - t * t).square() @ w, (above + below) @ _columns(A)[3])


def absolute_mean(A: Tensor, D: Tensor) -> Tensor:
    """`E |x|`."""
    D = D.clamp_min(1e-300)
    u = A / D
    return A * torch.erf(u / math.sqrt(2)) + D * math.sqrt(2 / math.pi) * torch.exp(-0.5 * u * u)


def _densities(A: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """The density of x at minus and plus each node."""
    x = A.new_tensor(_half_line()[0])
    rate, scale = (1 / D).unsqueeze(-1), (1 / (D * math.sqrt(2 * math.pi))).unsqueeze(-1)
    A = A.unsqueeze(-1)
    return tuple(torch.exp(-0.5 * ((at - A) * rate).square()) * scale for at in (-x, x))  # type: ignore[return-value]


def _columns(like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_tensor(column) for column in _half_line()[1])


@functools.lru_cache(maxsize=1)
def _half_line() -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Gauss-Legendre nodes on x > 0, and with their weights: tanh - 1, tanh^2 - 1, ln(1 + exp(-2x)), sech^4."""
    nodes, weights = np.polynomial.legendre.leggauss(14)
    edges = np.array([0.0, 1.5, 3.5, 6.5, 11.0, 18.0])
    width = np.diff(edges)[:, None]
    x = (edges[:-1, None] + width * (nodes + 1) / 2).ravel()
    w = (width * weights / 2).ravel()
    t = np.tanh(x)
    decay = np.exp(-2 * x)
    return x, (-w * 2 * decay / (1 + decay), w * (t * t - 1), w * np.log1p(decay), w * (1 - t * t) ** 2)

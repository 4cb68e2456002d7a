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
    """`E tanh x` and `E tanh^2 x`; `A` and `D >= 0` have one shape. 101 nodes reach rounding, 31 about 1e-7."""
    shape, A, D = A.shape, A.reshape(-1), D.reshape(-1)
    narrow = D < _NARROW
    m, q = torch.empty_like(A), torch.empty_like(A)
    w = gauss_hermite(order, A)[1]
    t = torch.tanh(_spread(A[narrow], D[narrow], order))
    m[narrow], q[narrow] = t @ w, t.square_() @ w
    A, D = A[~narrow], D[~narrow]
    # tanh is the sign, and tanh^2 is one, but for what decays like exp(-2 |x|).
    below, above = _densities(A, D, order)
    odd, even, _, _ = _columns(A, order)
    m[~narrow] = torch.erf(A / (D * math.sqrt(2))) + (above - below) @ odd
    q[~narrow] = 1 + (above + below) @ even
    return m.reshape(shape), q.reshape(shape)


def log_cosh_mean(A: Tensor, D: Tensor, order: int = 101) -> Tensor:
    """`E ln 2 cosh x`."""
    narrow, mean = D < _NARROW, torch.empty_like(A)
    x = _spread(A[narrow], D[narrow], order).abs()
    mean[narrow] = (x + torch.log1p(torch.exp(-2 * x))) @ gauss_hermite(order, A)[1]
    A, D = A[~narrow], D[~narrow]
    below, above = _densities(A, D, order)
    mean[~narrow] = absolute_mean(A, D) + (above + below) @ _columns(A, order)[2]
    return mean


def sech4_mean(A: Tensor, D: Tensor, order: int = 101) -> Tensor:
    """`E sech^4 x`."""
    narrow, mean = D < _NARROW, torch.empty_like(A)
    t = torch.tanh(_spread(A[narrow], D[narrow], order))
    mean[narrow] = (1 - t * t).square() @ gauss_hermite(order, A)[1]
    A, D = A[~narrow], D[~narrow]
    below, above = _densities(A, D, order)
    mean[~narrow] = (above + below) @ _columns(A, order)[3]
    return mean


def _spread(A: Tensor, D: Tensor, order: int) -> Tensor:
    """The field at Gauss's nodes."""
    return torch.addcmul(A.unsqueeze(-1), D.unsqueeze(-1), gauss_hermite(order, A)[0])


def absolute_mean(A: Tensor, D: Tensor) -> Tensor:
    """`E |x|`."""
    D = D.clamp_min(1e-300)
    u = A / D
    return A * torch.erf(u / math.sqrt(2)) + D * math.sqrt(2 / math.pi) * torch.exp(-0.5 * u * u)


def _densities(A: Tensor, D: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """The density of x at minus and plus each node."""
    x = A.new_tensor(_half_line(order)[0])
    rate, scale = (1 / D).unsqueeze(-1), (1 / (D * math.sqrt(2 * math.pi))).unsqueeze(-1)
    A = A.unsqueeze(-1)
    return tuple(torch.exp(-0.5 * ((at - A) * rate).square()) * scale for at in (-x, x))  # type: ignore[return-value]


def _columns(like: Tensor, order: int) -> tuple[Tensor, ...]:
    return tuple(like.new_tensor(column) for column in _half_line(order)[1])


@functools.lru_cache(maxsize=8)
def _half_line(order: int) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Gauss-Legendre nodes on x > 0, and with their weights: tanh - 1, tanh^2 - 1, ln(1 + exp(-2x)), sech^4."""
    nodes, weights = np.polynomial.legendre.leggauss(min(14, order // 4))
    edges = np.array([0.0, 1.5, 3.5, 6.5, 11.0, 18.0])
    width = np.diff(edges)[:, None]
    x = (edges[:-1, None] + width * (nodes + 1) / 2).ravel()
    w = (width * weights / 2).ravel()
    t = np.tanh(x)
    decay = np.exp(-2 * x)
    return x, (-w * 2 * decay / (1 + decay), w * (t * t - 1), w * np.log1p(decay), w * (1 - t * t) ** 2)

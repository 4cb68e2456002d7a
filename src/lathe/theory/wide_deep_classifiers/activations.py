"""Activations whose deep networks are Bayes consistent in a given dimension: polynomials, and sines."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from scipy.optimize import brentq
from torch import Tensor, nn

__all__ = ["OptimalActivation", "SineActivation", "optimal_activation"]


class OptimalActivation(nn.Module):
    """The polynomial with `alpha = d`: `(h_1 + h_7) / sqrt 2` for d = 1, else
    `2^(-d/4) h_1 + sqrt(1 - 2^(1 - d/2)) h_2 + 2^(-d/4) h_3`.

    `h_k` are the Hermite polynomials, orthonormal under the standard normal distribution, so that `E phi^2 = 1`. The
    coefficient of `h_1` sets `dual'(0) = 2^(-d/2)` while `dual'(1) = 2` (4 and 1/2 for d = 1), hence
    `alpha = -2 log dual'(0) / log dual'(1) = d`.

    Args:
        d: dimension of the data, one less than their coordinates on the sphere.
        continuous: allow any real `d` from 2 on; the formula holds there too.

    Attributes:
        hermite: the coefficients of `h_0, h_1, ...`.

    Raises:
        ValueError: for `d < 1`, and for a `d` that is no integer (with `continuous`: for one between 1 and 2).

    Example:
        >>> OptimalActivation(2)(torch.ones(3)).shape
        torch.Size([3])
    """

    def __init__(self, d: float, *, continuous: bool = False) -> None:
        super().__init__()
        if not 1 <= d < math.inf:
            raise ValueError(f"d must be at least 1 and finite, got {d}")
        if d != int(d) and not continuous:
            raise ValueError(f"d must be an integer, got {d}; continuous=True allows any real number from 2 on")
        if 1 < d < 2:
            raise ValueError(f"d must be 1 or at least 2, got {d}; between them use SineActivation")
        self.d = d
        if d == 1:
            hermite = [0.0, math.sqrt(0.5), 0.0, 0.0, 0.0, 0.0, 0.0, math.sqrt(0.5)]
        else:
            outer = 2.0 ** (-d / 4)
            hermite = [0.0, outer, math.sqrt(max(0.0, 1 - 2.0 ** (1 - d / 2))), outer]
        self.hermite = tuple(hermite)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        square = x * x
        if self.d == 1:
            seventh = (((square - 21) * square + 105) * square - 105) * x
            return math.sqrt(0.5) * (x + seventh / math.sqrt(5040))
        _, first, second, third = self.hermite
        return (first + third / math.sqrt(6) * (square - 3)) * x + second / math.sqrt(2) * (square - 1)

    def extra_repr(self) -> str:
        return f"d={self.d:g}"


class SineActivation(nn.Module):
    """`sin(sqrt(q) u)`, normalised, with `q` such that `alpha = d`; odd and bounded, for any real `d > 1`.

    `dual(xi) = sinh(q xi) / sinh q`, so `alpha(q) = 2 log(sinh(q) / q) / log(q coth q)`, which rises from 1 at q = 0.

    Raises:
        ValueError: unless `1 < d` (below 1.0001 `q` is too small to be told from zero).

    Example:
        >>> round(SineActivation(2).q, 3)
        2.676
    """

    def __init__(self, d: float) -> None:
        super().__init__()
        if not 1.0001 <= d < math.inf:
            raise ValueError(
                f"d must be above 1 (at least 1.0001) and finite, got {d}; for d = 1 use OptimalActivation"
            )
        self.d = d
        high = 2 * d + 5
        while _sine_alpha(high) < d:
            high *= 2
        self.q = float(brentq(lambda q: _sine_alpha(q) - d, 1e-3, high, xtol=1e-13))
        # E sin^2(sqrt(q) u) = (1 - e^(-2q)) / 2
        self.norm = math.sqrt(-math.expm1(-2 * self.q) / 2)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return torch.sin(math.sqrt(self.q) * x) / self.norm

    def extra_repr(self) -> str:
        return f"d={self.d:g}, q={self.q:.6g}"


def optimal_activation(d: float, *, continuous: bool = False) -> OptimalActivation | SineActivation:
    """An activation with `alpha = d`: the polynomial, or the sine between 1 and 2 where no polynomial is known.

    Raises:
        ValueError: for `d < 1`, and for a `d` that is no integer unless `continuous`.
    """
    if continuous and 1.0001 <= d < 2:
        return SineActivation(d)
    return OptimalActivation(d, continuous=continuous)


def _sine_alpha(q: float) -> float:
    # The logarithm of sinh(q)/q, safe from overflow.
    log_ratio = q + math.log(-math.expm1(-2 * q) / (2 * q))
    return 2 * log_ratio / math.log(q / math.tanh(q))

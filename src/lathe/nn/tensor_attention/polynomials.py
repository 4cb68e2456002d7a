"""Polynomials for exp with a bounded relative error, and the monomial features that make them a matrix product.

Aggarwal and Alman 2022 (CCC 2022, 22) for the degree; Alman and Song 2023 (arXiv 2310.04064) for its use.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.polynomial import chebyshev, polynomial
from torch import Tensor

__all__ = ["degree_for", "error_bound", "exp_poly", "khatri_rao", "monomial_features", "poly_rank"]

Kind = Literal["chebyshev", "taylor"]
KINDS = ("chebyshev", "taylor")
_LARGEST_DEGREE = {"chebyshev": 64, "taylor": 4096}


def exp_poly(R: float, degree: int, kind: Kind = "chebyshev") -> tuple[Float[Tensor, " terms"], float]:
    """A polynomial P with |P(x) - e^x| <= rel_err * e^x on [-R, R].

    Relative, not absolute, error is what attention needs: a weight is a quotient of values of P, and P must stay
    positive, which rel_err < 1 guarantees.

    Args:
        R: half the width of the interval.
        degree: of the polynomial.
        kind: "taylor" about 0, or "chebyshev": the polynomial of least relative error (to a few percent, by reweighted
            least squares over Chebyshev points), which needs about two thirds of the degree.

    Returns:
        Coefficients c_0, ..., c_degree of P = sum_t c_t x^t in float64, and rel_err. The latter is exact for "taylor",
        and for "chebyshev" the largest value on a grid that is so fine that the true one is at most 0.1 % larger, which
        is added.

    Raises:
        ValueError: where R is not positive, the degree is negative, or R is too large for a Chebyshev fit in float64
            (above about 15: e^R and e^-R lie too far apart).
    """
    R, kind = _checked_radius(R), _checked_kind(kind)
    if degree < 0:
        raise ValueError(f"degree must be at least 0, got {degree}")
    coefficients, error = _fit(R, degree, kind)
    return torch.tensor(coefficients, dtype=torch.float64), error


@torch.compiler.assume_constant_result  # a compiled graph keeps the numbers, not the way to them
def _fit(R: float, degree: int, kind: Kind) -> tuple[tuple[float, ...], float]:
    return _fitted(R, degree, kind)


@lru_cache(maxsize=1024)
def _fitted(R: float, degree: int, kind: Kind) -> tuple[tuple[float, ...], float]:
    if kind == "taylor":
        return tuple(math.exp(-math.lgamma(t + 1.0)) for t in range(degree + 1)), _taylor_error(R, degree)
    if math.exp(2 * R) * np.finfo(np.float64).eps > 1e-3:
        raise ValueError(f"R must be at most 14.6 for a Chebyshev fit in float64, got {R:g}; take kind='taylor'")
    u = np.cos(np.pi * (np.arange(16 * (degree + 2)) + 0.5) / (16 * (degree + 2)))
    basis = chebyshev.chebvander(u, degree) * np.exp(-R * u)[:, None]
    # Lawson's iteration: least squares, with more weight where the error is large, tends to the least largest error.
    weight: np.ndarray = np.ones(len(u))
    best, least = np.zeros(degree + 1), math.inf
    for _ in range(40):
        root = np.sqrt(weight)[:, None]
        solution = np.linalg.lstsq(root * basis, root[:, 0], rcond=None)[0]
        error = np.abs(basis @ solution - 1.0)
        if error.max() < least:
            best, least = solution, float(error.max())
        weight = weight * error
        if not weight.sum() > 0.0:
            break
        weight /= weight.mean()
    coefficients = chebyshev.cheb2poly(best) / R ** np.arange(degree + 1)
    x = R * np.cos(np.linspace(0.0, np.pi, 64 * (degree + 2)))
    error = np.abs(polynomial.polyval(x, coefficients) * np.exp(-x) - 1.0)
    return tuple(coefficients.tolist()), 1.001 * float(error.max())


def _taylor_error(R: float, degree: int) -> float:
    """Exactly: it is largest at -R, where e^-x P(x) - 1 = +-int_0^R e^u u^g / g! du, a series of positive terms."""
    g, m = degree, np.arange(int(3 * R) + 80)
    terms = (g + 1 + m) * math.log(R) - np.array([math.lgamma(each + 1.0) for each in m]) - np.log(g + 1.0 + m)
    largest = terms.max()
    exponent = largest + math.log(np.exp(terms - largest).sum()) - math.lgamma(g + 1.0)
    return math.exp(exponent) if exponent < 700.0 else math.inf


def degree_for(bound: float, order: int, eps: float, kind: Kind = "chebyshev") -> int:
    """The least degree with relative error `eps` for logits up to bound**order, the range of entries up to `bound`.

    Grows like max(log(1/eps) / log(log(1/eps) / bound**order), bound**order): higher orders need smaller entries.

    Raises:
        ValueError: where bound or eps is not positive, order is below 2, or no degree within reach of float64 does.
    """
    if order < 2:
        raise ValueError(f"order must be at least 2, got {order}")
    if not bound > 0.0:
        raise ValueError(f"bound must be positive, got {bound:g}")
    return degree_within(bound**order, eps, kind)


def degree_within(R: float, eps: float, kind: Kind = "chebyshev") -> int:
    """As `degree_for`, for logits in [-R, R]."""
    R, kind = _checked_radius(R), _checked_kind(kind)
    if not eps > 0.0:
        raise ValueError(f"eps must be positive, got {eps:g}")
    # The error falls with the degree (Taylor's rises first, but never below that of degree 0).
    reached, most = 0, _LARGEST_DEGREE[kind]
    while _fit(R, reached, kind)[1] > eps:
        if reached == most:
            raise ValueError(f"eps must be within reach on [-{R:g}, {R:g}] by degree {most} ({kind}), got {eps:g}")
        reached = min(most, max(1, 2 * reached))
    missed = reached // 2
    while reached - missed > 1:
        middle = (reached + missed) // 2
        reached, missed = (middle, missed) if _fit(R, middle, kind)[1] <= eps else (reached, middle)
    return reached


def poly_rank(d: int, g: int) -> int:
    """Number of monomials of degree at most g in d variables, C(d + g, g): the rank of the approximation."""
    if d < 1 or g < 0:
        raise ValueError(f"d must be at least 1 and g at least 0, got {d} and {g}")
    return math.comb(d + g, g)


def error_bound(eps: float, vmax: float) -> float:
    """Largest possible error of an output entry: 2 eps / (1 - eps) * vmax.

    With weights a (1 + delta), |delta| <= eps, in place of a, each softmax weight a / Z becomes
    a / Z * (1 + delta) Z / Z', where Z' lies in [(1 - eps) Z, (1 + eps) Z]. The factor is within 2 eps / (1 - eps)
    of 1, the softmax weights add up to 1, and no product of values exceeds vmax.

    Args:
        eps: relative error of the polynomial, below 1.
        vmax: product of the largest absolute entries of the value matrices.

    Raises:
        ValueError: where eps does not lie in [0, 1): with 1 the normaliser may vanish.
    """
    if not 0.0 <= eps < 1.0:
        raise ValueError(f"eps must lie in [0, 1), got {eps:g}")
    return 2.0 * eps / (1.0 - eps) * vmax


def khatri_rao(
    A: Float[Tensor, "... rows_a d"], B: Float[Tensor, "... rows_b d"]
) -> Float[Tensor, "... rows_a*rows_b d"]:
    """The column-wise Kronecker product of the paper: row j * rows_b + k is A[j] * B[k].

    Raises:
        ValueError: where A and B differ in their number of columns.
    """
    if A.ndim < 2 or B.ndim < 2 or A.shape[-1] != B.shape[-1]:
        raise ValueError(f"A and B must have as many columns, got {tuple(A.shape)} and {tuple(B.shape)}")
    return (A.unsqueeze(-2) * B.unsqueeze(-3)).flatten(-3, -2)


def monomial_features(x: Float[Tensor, "... d"], g: int) -> Float[Tensor, "... r"]:
    """All monomials of degree at most g in the features of x, r = C(d + g, g), in the order of `monomial_weights`.

    By degree; within a degree by the largest variable in them, so that each block is a variable times the first few of
    the degree before.

    Raises:
        ValueError: where g is negative or x has no feature.
    """
    if x.ndim < 1 or x.shape[-1] < 1 or g < 0:
        raise ValueError(f"x must have a feature and g be at least 0, got {tuple(x.shape)} and {g}")
    return monomial_rows(x.unsqueeze(-1), g).squeeze(-1)


def monomial_rows(x: Float[Tensor, "... d n"], g: int) -> Float[Tensor, "... r n"]:
    """As `monomial_features`, a row a monomial: each is made by one multiplication of contiguous rows."""
    d = x.shape[-2]
    last = torch.ones_like(x[..., :1, :])
    degrees = [last]
    for t in range(1, g + 1):
        # Monomials of degree t - 1 in the first l + 1 variables: C(t - 1 + l, l) of them, which stand first.
        blocks = [x[..., l : l + 1, :] * last[..., : math.comb(t - 1 + l, l), :] for l in range(d)]
        last = torch.cat(blocks, -2)
        degrees.append(last)
    return torch.cat(degrees, -2)


@torch.compiler.assume_constant_result
def poly_weights(R: float, degree: int, kind: Kind, d: int) -> Float[Tensor, " r"]:
    """`monomial_weights` of `exp_poly(R, degree, kind)`."""
    return monomial_weights(exp_poly(R, degree, kind)[0], d)


@lru_cache(maxsize=64)
def _multinomials(d: int, g: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each monomial x^alpha, its degree t and t! / alpha!, by the recurrence of `monomial_rows`."""
    exponents, counts = np.zeros((1, d), dtype=np.int64), np.ones(1)
    all_counts, all_degrees = [counts], [np.zeros(1, dtype=np.int64)]
    for t in range(1, g + 1):
        blocks, sizes = [], []
        for l in range(d):
            block = exponents[: math.comb(t - 1 + l, l)].copy()
            block[:, l] += 1
            sizes.append(counts[: len(block)] * t / block[:, l])
            blocks.append(block)
        exponents, counts = np.concatenate(blocks), np.concatenate(sizes)
        all_counts.append(counts)
        all_degrees.append(np.full(len(counts), t))
    return np.concatenate(all_degrees), np.concatenate(all_counts)


def monomial_weights(coefficients: Float[Tensor, " terms"], d: int) -> Float[Tensor, " r"]:
    """w_alpha = c_t t! / alpha!, for which P(sum_l q_l a_l b_l) = sum_alpha w_alpha q^alpha a^alpha b^alpha."""
    degrees, counts = _multinomials(d, len(coefficients) - 1)
    return coefficients[torch.from_numpy(degrees)] * torch.from_numpy(counts)


def _checked_radius(R: float) -> float:
    if not 0.0 < R < math.inf:
        raise ValueError(f"R must be positive and finite, got {R:g}")
    return float(R)


def _checked_kind(kind: Kind) -> Kind:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return kind

"""How deep for its width? Fluctuations per depth over width, and the ratio at which outputs inform one another most."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor

from lathe.core.gaussian import ActivationLike, activation
from lathe.theory.deep_learning_theory.criticality import critical_point
from lathe.theory.deep_learning_theory.single import susceptibilities

__all__ = [
    "aspect_ratio",
    "fluctuation_rate",
    "information_series",
    "output_information",
    "residual_fluctuations",
    "residual_susceptibilities",
]


def aspect_ratio(act: ActivationLike, n_out: int, gamma: float | None = None) -> float:
    """The depth-to-width ratio `r* = 4 / ((20 + 3 n_out) nu)` of a critical network with `n_out` outputs.

    It maximises the mutual information of disjoint outputs over `r = L / n`, in a series in `nu r` that is cut after
    its second term (book, appendix A): a guide to the order of magnitude, not an exact optimum. Past `r*` networks
    differ ever more from draw to draw; around `1 / r*` is how many times wider than deep to build.

    Args:
        act: activation.
        n_out: number of outputs, at least 2.
        gamma: weight of the skip connection of residual blocks `z' = gamma z + b + W s(z)`, if there are any.

    Raises:
        ValueError: for `n_out < 2`, or `gamma` outside [0, 1); NoCriticalPoint where the activation has none.
    """
    if n_out < 2:
        raise ValueError(f"n_out must be at least 2, outputs inform each other, got {n_out}")
    return 4 / ((20 + 3 * n_out) * fluctuation_rate(act, gamma))


def fluctuation_rate(act: ActivationLike, gamma: float | None = None) -> float:
    """nu in `V / (n K^2) = nu L / n` at criticality: linear 2, ReLU 5, tanh and its class 2/3.

    With `gamma`, of residual blocks of a scale-invariant activation under Gaussian closure:
    `(1 - gamma^2) [(3 A_4/A_2^2 - 1)(1 - gamma^2) + 4 gamma^2]`. That is right for odd activations; for ReLU the
    closure leaves correlations out that survive through the skip, and fluctuations are larger than it says
    (`residual_fluctuations` measures them).
    """
    point = critical_point(act)
    if gamma is None or gamma == 0:
        return point.nu
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma must lie in [0, 1), got {gamma}")
    if point.universality != "scale-invariant":
        raise ValueError(f"gamma is for scale-invariant activations, got one of class {point.universality!r}")
    fresh = 1 - gamma**2
    return fresh * (point.nu * fresh + 4 * gamma**2)


def residual_susceptibilities(
    K: Float[Tensor, "*batch"], act: ActivationLike, C_W: float, gamma: float
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """`(chi_par, chi_perp)` of a block `z' = gamma z + b + W s(z)`: the plain layer's plus `gamma^2`.

    A scale-invariant block is critical at `C_W A_2 = 1 - gamma^2`.
    """
    par, perp, _ = susceptibilities(K, act, 0.0, C_W)
    return gamma**2 + par, gamma**2 + perp


def residual_fluctuations(
    act: ActivationLike,
    gamma: float,
    width: int = 128,
    blocks: int = 4,
    draws: int = 20_000,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Measured `V / K^2` after each of `blocks` critical blocks `z' = gamma z + b + W s(z)`, over sampled networks.

    Given one block's input the next block's neurons are independent and Gaussian, so that whole networks are sampled
    with `width` normal variables a block and no weight matrix.

    Raises:
        ValueError: for `gamma` outside [0, 1) or an activation that is not scale invariant.
    """
    fluctuation_rate(act, gamma)  # raises for what has no critical block
    s, point = activation(act), critical_point(act)
    C_W = point.C_W * (1 - gamma**2)
    z = torch.randn(draws, width, dtype=torch.float64, generator=generator)
    values = []
    for _ in range(blocks):
        scale = (C_W * s(z).square().mean(1, keepdim=True)).sqrt()
        z = gamma * z + scale * torch.randn(draws, width, dtype=torch.float64, generator=generator)
        square = z.square()
        pairs = (square.sum(1) ** 2 - square.square().sum(1)) / (width * (width - 1))
        values.append(width * (pairs.mean() / square.mean() ** 2 - 1))
    return torch.stack(values)


def information_series(m1: int, m2: int) -> tuple[Fraction, Fraction]:
    """`(c_2, c_3)` in the mutual information `c_2 v^2 + c_3 v^3 + ...` of `m1` and `m2` outputs, exactly.

    Outputs are Gaussian with one fluctuating variance `G` of relative variance `v`. Relative to the Gaussian of the
    same variance their density is `1 + sum_k mu_k (-1)^k L_k(|z|^2/2)` with generalised Laguerre polynomials of order
    `m/2 - 1` and central moments `mu_k` of `G`; with their orthogonality the entropy's deficit is
    `v^2 <L_2^2>/2 - v^3 <L_2^3>/6 + O(v^4)`, and the information is the deficit of all less those of the parts.
    """
    if m1 < 1 or m2 < 1:
        raise ValueError(f"m1 and m2 must be at least 1, got {m1} and {m2}")
    whole, first, second = (_deficit(m) for m in (m1 + m2, m1, m2))
    return whole[0] - first[0] - second[0], whole[1] - first[1] - second[1]


def _deficit(m: int) -> tuple[Fraction, Fraction]:
    # t = |z|^2 / 2 is Gamma(m/2): its moments are rising factorials of m/2.
    half = Fraction(m, 2)
    alpha = half - 1
    laguerre = [(alpha + 1) * (alpha + 2) / 2, -(alpha + 2), Fraction(1, 2)]
    square = _multiply(laguerre, laguerre)

    def mean(polynomial: list[Fraction]) -> Fraction:
        total, moment = Fraction(0), Fraction(1)
        for k, coefficient in enumerate(polynomial):
            total += coefficient * moment
            moment *= half + k
        return total

    return mean(square) / 2, -mean(_multiply(square, laguerre)) / 6


def _multiply(left: list[Fraction], right: list[Fraction]) -> list[Fraction]:
    product = [Fraction(0)] * (len(left) + len(right) - 1)
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            product[i + j] += a * b
    return product


def output_information(m1: int, m2: int, log_variance: float) -> float:
    """Mutual information (nats) of `m1` and `m2` outputs whose common variance is log-normal, by quadrature.

    `log_variance` is the variance of `log G`; the series in it is `(m1 m2/8) s^2 [1 - (3 (m1+m2) + 14) s/6 + ...]`.
    """
    if not log_variance >= 0:
        raise ValueError(f"log_variance must not be negative, got {log_variance}")
    whole, first, second = (_entropy_deficit(m, log_variance) for m in (m1 + m2, m1, m2))
    return whole - first - second


def _entropy_deficit(m: int, s: float) -> float:
    """What `sqrt(G) N(0, 1_m)`, `log G ~ N(0, s)`, lacks in entropy to the Gaussian of its covariance.

    Trapezoid sums over log G and over the log radius, of the small excess of one density over the other.
    """
    g = torch.linspace(-9, 9, 181, dtype=torch.float64)
    weight = torch.softmax(-0.5 * g * g, 0)
    log_g = math.sqrt(s) * g - s / 2  # the mean of G, exp(s / 2), taken out
    reach = 9 * math.sqrt(s)
    # In the logarithm of the radius the integrand dies as r^m below, and faster than exponentially above.
    log_r = torch.linspace(-40 / m - reach, 2.6 + reach / 2, 6001, dtype=torch.float64)
    square = torch.exp(2 * log_r)
    exponent = -0.5 * square.unsqueeze(-1) * torch.expm1(-log_g) - 0.5 * m * log_g
    excess = torch.expm1(exponent) @ weight
    log_gaussian = math.log(2) - 0.5 * m * math.log(2) - math.lgamma(m / 2) + m * log_r - 0.5 * square
    integrand = torch.exp(log_gaussian) * ((1 + excess) * torch.log1p(excess) - excess)
    return integrand.sum().item() * (log_r[1] - log_r[0]).item()

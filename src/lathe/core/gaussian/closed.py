"""Closed-form Gaussian moments `<s_a s_b>` and `<s'_a s'_b>` of the activations that have them.

Each takes the three numbers that a pair of jointly Gaussian pre-activations depends on, elementwise:
`(K_aa, K_ab, K_bb) -> (<s_a s_b>, <s'_a s'_b>)`. All are finite and differentiable at `K_aa = K_ab = K_bb`.

Arc-cosine kernels: Cho and Saul 2009; error function: Williams 1996; GELU: by parts on the Gaussian orthant integral.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "bell",
    "bent_line",
    "cosine",
    "error_function",
    "exponential",
    "gelu",
    "piecewise_constant",
    "piecewise_linear",
    "polynomial",
    "sine",
    "sinusoid",
]


def piecewise_linear(a_minus: float, a_plus: float) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Moments of the function `a_minus z` below zero and `a_plus z` above: arc-cosine kernels of order 1 and 0."""
    bend, line = (a_plus - a_minus) ** 2, a_plus * a_minus

    def moments(kaa: Tensor, kab: Tensor, kbb: Tensor) -> tuple[Tensor, Tensor]:
        if bend == 0:
            return line * kab, line * torch.ones_like(kab)
        area = kaa * kbb
        determinant = torch.addcmul(area, kab, kab, value=-1)
        if determinant.requires_grad:
            # The square root has no slope at zero; there its contribution vanishes anyway.
            open_angle = determinant > 0
            sine = torch.where(open_angle, determinant, 1.0).sqrt() * open_angle
        else:
            sine = determinant.clamp_(min=0).sqrt_()
        # The angle between the two pre-activations; atan2 keeps its accuracy where they are nearly parallel.
        upright = 0.5 - torch.atan2(sine, kab) / (2 * math.pi)
        kernel = bend * (sine / (2 * math.pi) + kab * upright)
        slope = bend * upright
        return (kernel, slope) if line == 0 else (kernel + line * kab, slope + line)

    return moments


def error_function(kaa: Tensor, kab: Tensor, kbb: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of `erf`."""
    area = (1 + 2 * kaa) * (1 + 2 * kbb)
    kernel = torch.asin(2 * kab / area.sqrt()) * (2 / math.pi)
    slope = (area - 4 * kab * kab).rsqrt() * (4 / math.pi)
    return kernel, slope


def gelu(kaa: Tensor, kab: Tensor, kbb: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of `z Phi(z)`, the exact GELU.

    With C = 1 + K and e = 1 / (2 pi sqrt(det C)), the density of C at the origin:
    `<s_a s_b> = K_ab P + e (K_aa K_bb + K_ab^2 (1/C_aa + 1/C_bb - 1))`,
    `<s'_a s'_b> = P + e K_ab (1/C_aa + 1/C_bb + 1/det C)`, where P is the probability of the positive orthant of C.
    """
    caa, cbb = 1 + kaa, 1 + kbb
    area = caa * cbb
    square = kab * kab
    determinant = area - square
    density = determinant.rsqrt() / (2 * math.pi)
    orthant = 0.25 + torch.asin(kab * area.rsqrt()) / (2 * math.pi)
    inverses = 1 / caa + 1 / cbb
    kernel = kab * orthant + density * (kaa * kbb + square * (inverses - 1))
    slope = orthant + density * kab * (inverses + 1 / determinant)
    return kernel, slope


def sine(kaa: Tensor, kab: Tensor, kbb: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of `sin`."""
    mean = (kaa + kbb) / 2
    difference, total = torch.exp(kab - mean), torch.exp(-kab - mean)
    return (difference - total) / 2, (difference + total) / 2


def cosine(kaa: Tensor, kab: Tensor, kbb: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of `cos`."""
    cos_slope, cos_kernel = sine(kaa, kab, kbb)
    return cos_kernel, cos_slope


def sinusoid(
    amplitude: float, frequency: float, phase: float
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Moments of `amplitude sin(frequency z + phase)`."""
    square = frequency**2
    turn = math.cos(2 * phase)

    def moments(kaa: Tensor, kab: Tensor, kbb: Tensor) -> tuple[Tensor, Tensor]:
        mean = (kaa + kbb) / 2
        difference, total = torch.exp(square * (kab - mean)), torch.exp(-square * (kab + mean)) * turn
        kernel = (difference - total) * (amplitude**2 / 2)
        return kernel, (difference + total) * (amplitude**2 * square / 2)

    return moments


def exponential(kaa: Tensor, kab: Tensor, kbb: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of `exp`, its own derivative."""
    kernel = torch.exp((kaa + kbb) / 2 + kab)
    return kernel, kernel


def bell(kaa: Tensor, kab: Tensor, kbb: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of `exp(-z^2)`: with D = det(1 + 2 K), `D^(-1/2)` and `4 K_ab D^(-3/2)`."""
    determinant = (1 + 2 * kaa) * (1 + 2 * kbb) - 4 * kab * kab
    kernel = determinant.rsqrt()
    return kernel, 4 * kab * kernel / determinant


def piecewise_constant(below: float, above: float) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Moments of `below` for negative and `above` for positive z: the arc-cosine kernel of order 0.

    The derivative is taken to be zero: the delta function at zero is left out.
    """

    def moments(kaa: Tensor, kab: Tensor, kbb: Tensor) -> tuple[Tensor, Tensor]:
        root = (kaa * kbb - kab * kab).clamp_min(0).sqrt()
        apart = torch.atan2(root, kab) / math.pi  # the probability of different signs
        kernel = (below**2 + above**2) / 2 * (1 - apart) + below * above * apart
        return kernel, torch.zeros_like(kernel)

    return moments


def polynomial(coefficients: Sequence[float]) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Moments of `sum_i a_i z^i`: `<z_a^i z_b^j>` is a sum over the k pairs of factors of different variables."""
    slope = [i * a for i, a in enumerate(coefficients)][1:]

    def pairs(a: Sequence[float], kaa: Tensor, kab: Tensor, kbb: Tensor) -> Tensor:
        total = torch.zeros_like(kaa * kab * kbb)
        for k in range(len(a)):
            sides = []
            for variance in (kaa, kbb):
                side = torch.zeros_like(variance)
                for m in range((len(a) - 1 - k) // 2 + 1):
                    i = k + 2 * m  # ways to leave k of i factors unpaired, and to pair the others
                    ways = math.factorial(i) / (2**m * math.factorial(m) * math.factorial(k))
                    side = side + a[i] * ways * variance**m
                sides.append(side)
            total = total + math.factorial(k) * sides[0] * sides[1] * kab**k
        return total

    def moments(kaa: Tensor, kab: Tensor, kbb: Tensor) -> tuple[Tensor, Tensor]:
        return pairs(coefficients, kaa, kab, kbb), pairs(slope, kaa, kab, kbb)

    return moments


def bent_line(
    bends: Sequence[tuple[float, float]], slope: float = 0.0, offset: float = 0.0
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Moments of `offset + slope z + sum_j c_j relu(z - k_j)`, for `(k_j, c_j)` in `bends`.

    The moments' derivatives by `K_ab` are moments of derivatives (Price 1958), and second derivatives of the function
    are delta functions: what is left is one integral of a bivariate density over the correlation's arc sine, for each
    pair of bends, by a Gauss rule.
    """
    nodes, weights = np.polynomial.legendre.leggauss(32)
    # Nodes crowd where the arc ends: there the density may change at once, if variables are nearly parallel.
    parts = [(1 - (u / 2) ** 2, w * u / 2) for u, w in zip(nodes + 1, weights)]

    def single(variance: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        root = variance.clamp_min(1e-300).sqrt()
        value, steep = torch.full_like(root, offset), torch.full_like(root, slope)
        places = []
        for place, change in bends:
            x = (place / root).clamp(-38.0, 38.0)
            beyond = torch.special.ndtr(-x)
            value = value + change * (root * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi) - place * beyond)
            steep = steep + change * beyond
            places.append(x)
        return value, steep, places

    def moments(kaa: Tensor, kab: Tensor, kbb: Tensor) -> tuple[Tensor, Tensor]:
        (first, first_slope, xs), (second, second_slope, ys) = single(kaa), single(kbb)
        area = kaa * kbb
        determinant = area - kab * kab
        open_angle = determinant > 0
        arc = torch.atan2(kab, torch.where(open_angle, determinant, 1.0).sqrt() * open_angle)
        size = area.clamp_min(1e-300).sqrt()
        kernel, steep = torch.zeros_like(arc), torch.zeros_like(arc)
        for part, weight in parts:
            sine = torch.sin(part * arc)
            scale = -0.5 / (1 - sine * sine).clamp_min(1e-300)
            density = torch.zeros_like(arc)
            for x, (_, c) in zip(xs, bends):
                for y, (_, d) in zip(ys, bends):
                    density = density + c * d * torch.exp((x - y * sine) ** 2 * scale - 0.5 * y * y)
            density = density * (weight / (2 * math.pi))
            steep = steep + density
            kernel = kernel + density * (kab - size * sine)
        slopes = first_slope * second_slope
        return first * second + kab * slopes + arc * kernel, slopes + arc * steep

    return moments

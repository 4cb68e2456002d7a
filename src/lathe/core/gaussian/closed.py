"""Closed-form Gaussian moments `<s_a s_b>` and `<s'_a s'_b>` of the activations that have them.

Each takes the three numbers that a pair of jointly Gaussian pre-activations depends on, elementwise:
`(K_aa, K_ab, K_bb) -> (<s_a s_b>, <s'_a s'_b>)`. All are finite and differentiable at `K_aa = K_ab = K_bb`.

Arc-cosine kernels: Cho and Saul 2009; error function: Williams 1996; GELU: by parts on the Gaussian orthant integral.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["cosine", "error_function", "gelu", "piecewise_linear", "sine"]


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

"""Gaussian expectations of activation functions, the integrals that theories of wide networks are made of.

`activation("gelu")` knows a function's derivatives, kinks and closed forms; `pair_moments` and `kernel_moments` give
`<s_a s_b>` and `<s'_a s'_b>` for pairs and whole kernels; `line_expectation` and `gaussian_expectation` integrate
anything over one or several jointly Gaussian variables. All in float64 if given float64, batched, differentiable.

Notation: `<f>_K` is the mean of `f(z)` over `z ~ N(0, K)`; `s` an activation, `s'` its derivative.
"""

from __future__ import annotations

from lathe.core.gaussian.activation import Activation, ActivationLike, activation, polynomial, sinusoid
from lathe.core.gaussian.blocks import BlockMoments, check_second_moment
from lathe.core.gaussian.pairs import kernel_moments, mirror_, pair_moments
from lathe.core.gaussian.quadrature import (
    gauss_hermite,
    gaussian_expectation,
    gaussian_nodes,
    line_expectation,
)
from lathe.core.gaussian.series import hermite_coefficients

__all__ = [
    "Activation",
    "ActivationLike",
    "BlockMoments",
    "activation",
    "check_second_moment",
    "gauss_hermite",
    "gaussian_expectation",
    "gaussian_nodes",
    "hermite_coefficients",
    "kernel_moments",
    "line_expectation",
    "mirror_",
    "pair_moments",
    "polynomial",
    "sinusoid",
]

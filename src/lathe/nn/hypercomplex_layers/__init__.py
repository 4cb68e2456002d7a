"""Parameterised hypercomplex layers: divide a network's parameters by n by swapping its layers.

For whoever must store, send or optimise fewer weights and keeps the cost of running them: the weight is a sum of n
Kronecker products of small learnt matrices and filter blocks, which contains complex, quaternion and octonion layers.
Grassucci, Zhang, Comminiello, "PHNNs: Lightweight Neural Networks via Parameterized Hypercomplex Convolutions", 2021,
arXiv 2110.04176 (section III: the PHC layer; section IV: the networks).
"""

from lathe.nn.hypercomplex_layers.algebras import algebra_span_angles, algebra_tensor
from lathe.nn.hypercomplex_layers.kronecker import (
    KroneckerFit,
    kronecker_singular_values,
    kronecker_sum,
    nearest_kronecker_sum,
)
from lathe.nn.hypercomplex_layers.layers import (
    HypercomplexLayer,
    PHConv1d,
    PHConv2d,
    PHConv3d,
    PHConvTranspose1d,
    PHConvTranspose2d,
    PHConvTranspose3d,
    PHLinear,
)

__all__ = [
    "HypercomplexLayer",
    "KroneckerFit",
    "PHConv1d",
    "PHConv2d",
    "PHConv3d",
    "PHConvTranspose1d",
    "PHConvTranspose2d",
    "PHConvTranspose3d",
    "PHLinear",
    "algebra_span_angles",
    "algebra_tensor",
    "kronecker_singular_values",
    "kronecker_sum",
    "nearest_kronecker_sum",
]

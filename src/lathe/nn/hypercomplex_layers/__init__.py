"""Parameterised hypercomplex layers: divide a network's parameters by n by swapping its layers.

For whoever must store, send or optimise fewer weights and keeps the cost of running them: the weight is a sum of n
Kronecker products of small learnt matrices and filter blocks, which contains complex, quaternion and octonion layers.
Grassucci, Zhang, Comminiello, "PHNNs: Lightweight Neural Networks via Parameterized Hypercomplex Convolutions", 2021,
arXiv 2110.04176 (section III: the PHC layer; section IV: the networks).
"""

from lathe.nn.hypercomplex_layers.algebras import algebra_span_angles, algebra_tensor
from lathe.nn.hypercomplex_layers.conversion import (
    TermPlan,
    algebra_report,
    choose_terms,
    param_groups,
    ph_expand,
    ph_fold,
)
from lathe.nn.hypercomplex_layers.kronecker import (
    KroneckerFit,
    kronecker_singular_values,
    kronecker_sum,
    nearest_kronecker_sum,
)
from lathe.nn.hypercomplex_layers.layers import (
    PHConv1d,
    PHConv2d,
    PHConv3d,
    PHConvTranspose1d,
    PHConvTranspose2d,
    PHConvTranspose3d,
    PHLinear,
)
from lathe.nn.hypercomplex_layers.networks import PHResNet, PHSEDNet, ph_resnet, ph_sednet, ph_vgg, to_hypercomplex
from lathe.nn.hypercomplex_layers.weight import HypercomplexLayer

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
    "PHResNet",
    "PHSEDNet",
    "TermPlan",
    "algebra_report",
    "algebra_span_angles",
    "algebra_tensor",
    "choose_terms",
    "kronecker_singular_values",
    "kronecker_sum",
    "nearest_kronecker_sum",
    "param_groups",
    "ph_expand",
    "ph_fold",
    "ph_resnet",
    "ph_sednet",
    "ph_vgg",
    "to_hypercomplex",
]

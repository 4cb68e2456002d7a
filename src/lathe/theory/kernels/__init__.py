"""Kernels of infinitely wide networks, composed as `nn.Sequential` is: NNGP and NTK of any activation, conv, residual.

net = Sequential(Dense(1.5, 0.1), Activation("gelu"), Dense())
nngp, ntk = net(x1, x2)
"""

from __future__ import annotations

from lathe.theory.kernels.empirical import empirical_ntk
from lathe.theory.kernels.images import AvgPool, Conv, Flatten, GlobalAvgPool
from lathe.theory.kernels.layers import (
    Activation,
    Dense,
    Kernels,
    Layer,
    LayerNorm,
    Residual,
    Scale,
    Sequential,
    Sum,
)
from lathe.theory.kernels.reading import from_module
from lathe.theory.kernels.regression import GradientFlow, KernelRegression, Prediction, posterior

__all__ = [
    "Activation",
    "AvgPool",
    "Conv",
    "Dense",
    "Flatten",
    "GlobalAvgPool",
    "GradientFlow",
    "KernelRegression",
    "Kernels",
    "Layer",
    "LayerNorm",
    "Prediction",
    "Residual",
    "Scale",
    "Sequential",
    "Sum",
    "empirical_ntk",
    "from_module",
    "posterior",
]

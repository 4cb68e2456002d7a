"""Predicts a network's signals, gradients and fluctuations from its shape: the effective theory of deep, wide networks.

Says for any activation how to initialise so that depth neither kills nor blows up signals, how to scale learning rates
by layer, how deep a network of a given width may be, and what finite width adds to the infinite-width kernel.

Roberts, Yaida and Hanin, "The Principles of Deep Learning Theory", 2021, arXiv 2106.10165: kernels and the order-1/n
tensors (chapters 4, 8, 11), criticality (5), learning rates (9), aspect ratio (appendix A), residual blocks (B).
Conventions: variance of biases `C_b`, of weights `C_W / fan_in`; learning rates `lambda_b`, `lambda_W / fan_in`.
"""

from __future__ import annotations

from lathe.theory.deep_learning_theory.aspect_ratio import (
    aspect_ratio,
    fluctuation_rate,
    information_series,
    output_information,
    residual_fluctuations,
    residual_susceptibilities,
)
from lathe.theory.deep_learning_theory.criticality import (
    CriticalPoint,
    NoCriticalPoint,
    critical_point,
    critical_points,
)
from lathe.theory.deep_learning_theory.finite_width import finite_width
from lathe.theory.deep_learning_theory.initialization import (
    Initialized,
    critical_init_,
    critical_param_groups,
    layer_rates,
)
from lathe.theory.deep_learning_theory.kernels import (
    KernelPrediction,
    first_kernel,
    kernel_prediction,
    kernel_recursion,
    ntk_recursion,
)
from lathe.theory.deep_learning_theory.measured import (
    DepthReport,
    depth_report,
    empirical_dntk,
    empirical_ntk,
    learning_rate_tensor,
)
from lathe.theory.deep_learning_theory.single import finite_width_single, susceptibilities

__all__ = [
    "CriticalPoint",
    "DepthReport",
    "Initialized",
    "KernelPrediction",
    "NoCriticalPoint",
    "aspect_ratio",
    "critical_init_",
    "critical_param_groups",
    "critical_point",
    "critical_points",
    "depth_report",
    "empirical_dntk",
    "empirical_ntk",
    "finite_width",
    "finite_width_single",
    "first_kernel",
    "fluctuation_rate",
    "information_series",
    "kernel_prediction",
    "kernel_recursion",
    "layer_rates",
    "learning_rate_tensor",
    "ntk_recursion",
    "output_information",
    "residual_fluctuations",
    "residual_susceptibilities",
    "susceptibilities",
]

"""Scalable neural network kernels: a layer as features of its input times features of its parameters.

For whoever wants fewer trained parameters: a compressed layer, an adapter of d m + d parameters inside a frozen
transformer, or a whole network bundled into one matrix with a closed-form optimum and no backpropagation.
Sehanobish, Choromanski, Zhao, Dubey, Likhosherstov, "Scalable Neural Network Kernels", 2023, arXiv 2310.13225
(SNNKs and universal random features: section 3; bundling; adapters).
"""

from lathe.nn.scalable_kernels.adapters import (
    BottleneckAdapter,
    SNNKAdapter,
    add_adapters,
    merge,
    trainable_parameters,
)
from lathe.nn.scalable_kernels.bundling import BundledNetwork, bundle
from lathe.nn.scalable_kernels.features import URF, ArcCosFeatures, arccos_kernel
from lathe.nn.scalable_kernels.layers import SNNKConv1x1, SNNKLinear
from lathe.nn.scalable_kernels.readout import fit_bundled
from lathe.nn.scalable_kernels.report import BundlingReport, BundlingRow, bundling_report
from lathe.nn.scalable_kernels.spectra import Spectrum, optimal_damping, second_moment, spectrum

__all__ = [
    "URF",
    "ArcCosFeatures",
    "BottleneckAdapter",
    "BundledNetwork",
    "BundlingReport",
    "BundlingRow",
    "SNNKAdapter",
    "SNNKConv1x1",
    "SNNKLinear",
    "Spectrum",
    "add_adapters",
    "arccos_kernel",
    "bundle",
    "bundling_report",
    "fit_bundled",
    "merge",
    "optimal_damping",
    "second_moment",
    "spectrum",
    "trainable_parameters",
]

"""Hypernetworks that train: one network for every value of a hyperparameter, out of any network.

For whoever would otherwise train a network for each strength of a regulariser, each trade-off or each resolution: the
weights are predicted from it, in the magnitude-invariant parametrisation (MIP) that keeps them and their gradients from
growing and shrinking with it. Gonzalez Ortiz, Guttag, Dalca, "Magnitude Invariant Parametrizations Improve Hypernetwork
Learning", 2023 (ICLR 2024), arXiv 2304.07645 (section 3: the problem; section 4: encoding and residual form).
"""

from lathe.nn.mip_hypernetworks.diagnostics import MagnitudeProfile, magnitude_profile
from lathe.nn.mip_hypernetworks.driven import HyperDriven, hypernetize, using_weights
from lathe.nn.mip_hypernetworks.encoding import InputSpec, encode
from lathe.nn.mip_hypernetworks.heads import AdapterHead, ChunkedHead, DenseHead, LowRankHead
from lathe.nn.mip_hypernetworks.hypernetwork import HyperNetwork, param_groups
from lathe.nn.mip_hypernetworks.layers import (
    ExternalWeights,
    HyperConv1d,
    HyperConv2d,
    HyperConv3d,
    HyperLinear,
    external_shapes,
)
from lathe.nn.mip_hypernetworks.tasks import (
    HyperMorph2d,
    Registration,
    RegistrationUNet,
    ScaleSpaceResize,
    integrate,
    registration_loss,
    smoothness,
    warp,
)

__all__ = [
    "AdapterHead",
    "ChunkedHead",
    "DenseHead",
    "ExternalWeights",
    "HyperConv1d",
    "HyperConv2d",
    "HyperConv3d",
    "HyperDriven",
    "HyperLinear",
    "HyperMorph2d",
    "HyperNetwork",
    "InputSpec",
    "LowRankHead",
    "MagnitudeProfile",
    "Registration",
    "RegistrationUNet",
    "ScaleSpaceResize",
    "encode",
    "external_shapes",
    "hypernetize",
    "integrate",
    "magnitude_profile",
    "param_groups",
    "registration_loss",
    "smoothness",
    "using_weights",
    "warp",
]

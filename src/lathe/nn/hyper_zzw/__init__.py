"""HyperZZW: kernels as large as the image out of small networks, and layers whose weights depend on what they see.

For whoever wants image-sized receptive fields with few parameters: small coordinate networks (slow nets) generate
kernels, which times the activations become weights that act on the activations (fast weights).
Zhang, "HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction", 2024, arXiv 2401.17948.
"""

from lathe.nn.hyper_zzw.block import SFNEBlock
from lathe.nn.hyper_zzw.components import RGU, HyperChannelInteraction, HyperInteraction, LocalBranch
from lathe.nn.hyper_zzw.convolutions import HyperConv1d, HyperConv2d
from lathe.nn.hyper_zzw.network import Terminator, norm_penalty, slow_neural_loss
from lathe.nn.hyper_zzw.operators import (
    apply_weights,
    hyperzzw_2e,
    hyperzzw_global,
    hyperzzw_local,
    long_convolution,
)
from lathe.nn.hyper_zzw.optimizers import Kar2, Kar3
from lathe.nn.hyper_zzw.slow_nets import ContextSlowNet, SlowNet
from lathe.nn.hyper_zzw.standardization import BatchStd, GroupInstanceBatchStd, instance_standardize

__all__ = [
    "RGU",
    "BatchStd",
    "ContextSlowNet",
    "GroupInstanceBatchStd",
    "HyperChannelInteraction",
    "HyperConv1d",
    "HyperConv2d",
    "HyperInteraction",
    "Kar2",
    "Kar3",
    "LocalBranch",
    "SFNEBlock",
    "SlowNet",
    "Terminator",
    "apply_weights",
    "hyperzzw_2e",
    "hyperzzw_global",
    "hyperzzw_local",
    "instance_standardize",
    "long_convolution",
    "norm_penalty",
    "slow_neural_loss",
]

"""What a layer was built with: the constructor arguments of a convolution or a linear layer, read back from it.

`Layer.like(layer)` of every drop-in layer stands on these.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

__all__ = ["conv_arguments", "linear_arguments"]


def conv_arguments(conv: nn.Module) -> dict[str, Any]:
    """Keyword arguments that build another convolution of the same shape, device and dtype as `conv`.

    Raises:
        TypeError: where `conv` is no convolution.
    """
    if not isinstance(conv, _ConvNd):
        raise TypeError(f"conv must be a convolution of torch.nn, got {type(conv).__name__}")
    arguments = {
        "in_channels": conv.in_channels,
        "out_channels": conv.out_channels,
        "kernel_size": conv.kernel_size,
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "groups": conv.groups,
        "bias": conv.bias is not None,
        "padding_mode": conv.padding_mode,
        "device": conv.weight.device,
        "dtype": conv.weight.dtype,
    }
    if isinstance(conv, _ConvTransposeNd):
        arguments["output_padding"] = conv.output_padding
    return arguments


def linear_arguments(linear: nn.Module) -> dict[str, Any]:
    """Keyword arguments that build another linear layer of the same shape, device and dtype as `linear`.

    Raises:
        TypeError: where `linear` is no `nn.Linear`.
    """
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
    return {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": linear.bias is not None,
        "device": linear.weight.device,
        "dtype": linear.weight.dtype,
    }

"""The paper's networks: residual and VGG networks for small images, and SEDnet for sound events.

Every convolution is hypercomplex, also the first and those of the shortcuts; normalisation, recurrent layers and the
last classifier stay ordinary. `n=None` builds the ordinary twin of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lathe.nn.hypercomplex_layers.layers import PHConv2d, PHLinear
from lathe.nn.hypercomplex_layers.weight import AlgebraOptions

__all__ = ["PHResNet", "PHSEDNet", "ph_resnet", "ph_sednet", "ph_vgg", "to_hypercomplex"]

Make = Callable[..., nn.Module]

# Depth -> (blocks of each stage, whether they are bottlenecks).
_RESNETS: dict[int, tuple[tuple[int, ...], bool]] = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
    20: ((3, 3, 3), False),
    56: ((9, 9, 9), False),
    110: ((18, 18, 18), False),
}
_VGGS: dict[int, tuple[int, ...]] = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


def to_hypercomplex(
    x: Float[Tensor, "batch channels *space"], n: int, pad: Literal["zero", "grey"] = "zero"
) -> Float[Tensor, "batch more_channels *space"]:
    """Appends channels up to the next multiple of n: zeros, or the mean of the channels that are there.

    RGB becomes four channels for n = 4 (and for n = 2), and stays as it is for n = 3.

    Raises:
        ValueError: where n is below 1 or `pad` is neither.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if pad not in ("zero", "grey"):
        raise ValueError(f"pad must be 'zero' or 'grey', got {pad!r}")
    missing = -x.shape[1] % n
    if missing == 0:
        return x
    extra = x.mean(1, keepdim=True) if pad == "grey" else x.new_zeros(()).expand_as(x[:, :1])
    return torch.cat([x, extra.expand(-1, missing, *x.shape[2:])], 1)


def ph_resnet(
    depth: Literal[18, 34, 50, 101, 152, 20, 56, 110],
    n: int | None = 4,
    in_channels: int | None = None,
    num_classes: int = 10,
    *,
    widths: Sequence[int] | None = None,
    blocks: Sequence[int] | None = None,
    bias: bool = False,
    **options: Unpack[AlgebraOptions],
) -> PHResNet:
    """A residual network for small images: 3x3 first convolution of stride 1, no max-pooling, average pool, linear.

    Args:
        depth: 18 to 152 have stages of 64-128-256-512 channels; 20, 56 and 110 three stages of 16-32-64.
        n: components; None for ordinary convolutions.
        in_channels: 3 padded up to a multiple of n by default (see `to_hypercomplex`).
        widths: of the stages. The paper's "Large" ones, 60-120-240-516 and 24-72-216, let n = 3 divide.
        blocks: of each stage, in place of those that the depth has.
        bias: of the convolutions, which normalisation makes useless; the reference code counts it.
        options: of `HypercomplexLayer`.

    Shape: `(batch, in_channels, height, width)` -> `(batch, num_classes)`.
    """
    if depth not in _RESNETS:
        raise ValueError(f"depth must be one of {', '.join(map(str, sorted(_RESNETS)))}, got {depth}")
    standard, bottleneck = _RESNETS[depth]
    if widths is None:
        widths = (64, 128, 256, 512) if len(standard) == 4 else (16, 32, 64)
    blocks = standard if blocks is None else tuple(blocks)
    if len(widths) != len(blocks):
        raise ValueError(f"widths must have a number for each of {len(blocks)} stages, got {tuple(widths)}")
    conv, _ = _makers(n, options)
    return PHResNet(conv, _default_channels(n, in_channels), num_classes, widths, blocks, bottleneck, bias)


class PHResNet(nn.Module):
    """Built by `ph_resnet`."""

    def __init__(
        self,
        conv: Make,
        in_channels: int,
        num_classes: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        bottleneck: bool,
        bias: bool,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            conv(in_channels, widths[0], 3, padding=1, bias=bias), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        channels, stages = widths[0], []
        for stage, (width, count) in enumerate(zip(widths, blocks)):
            out = 4 * width if bottleneck else width
            for position in range(count):
                stride = 2 if position == 0 and stage > 0 else 1
                stages.append(_Residual(conv, channels, width, out, stride, bottleneck, bias))
                channels = out
        self.blocks = nn.Sequential(*stages)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Class scores."""
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


class _Residual(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1 as a bottleneck, and a shortcut; activation after the sum."""

    def __init__(
        self, conv: Make, channels: int, width: int, out: int, stride: int, bottleneck: bool, bias: bool
    ) -> None:
        super().__init__()
        if bottleneck:
            shapes = [(channels, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
        else:
            shapes = [(channels, width, 3, stride), (width, out, 3, 1)]
        layers: list[nn.Module] = []
        for inputs, outputs, kernel, step in shapes:
            layers += [
                conv(inputs, outputs, kernel, stride=step, padding=kernel // 2, bias=bias),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
        self.residual = nn.Sequential(*layers[:-1])
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(conv(channels, out, 1, stride=stride, bias=bias), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.residual(x) + self.shortcut(x))


def ph_vgg(
    depth: Literal[16, 19],
    n: int | None = 4,
    in_channels: int | None = None,
    num_classes: int = 10,
    *,
    widths: Sequence[int] = (64, 128, 256, 512, 512),
    dropout: float = 0.5,
    bias: bool = False,
    **options: Unpack[AlgebraOptions],
) -> nn.Sequential:
    """A VGG network with batch normalisation for images of 32 x 32: five stages, each halved by a max-pool.

    The classifier is dropout, PHM, ReLU, twice, then an ordinary linear layer.

    Args:
        widths: of the five stages; the paper's "Large" ones for n = 3 are 24, 72, 216, 648, 648.
        n, in_channels, bias, options: as in `ph_resnet`.

    Shape: `(batch, in_channels, height, width)` -> `(batch, num_classes)`; any size from 32 x 32 is averaged to 1 x 1.
    """
    if depth not in _VGGS:
        raise ValueError(f"depth must be 16 or 19, got {depth}")
    if len(widths) != 5:
        raise ValueError(f"widths must have 5 numbers, got {tuple(widths)}")
    conv, linear = _makers(n, options)
    channels, layers = _default_channels(n, in_channels), []
    for width, count in zip(widths, _VGGS[depth]):
        for _ in range(count):
            layers += [conv(channels, width, 3, padding=1, bias=bias), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    for _ in range(2):
        layers += [nn.Dropout(dropout), linear(channels, channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(channels, num_classes))


def ph_sednet(
    n: int | None = 4,
    in_channels: int = 4,
    num_events: int = 14,
    *,
    frequencies: int = 256,
    widths: Sequence[int] = (64, 64, 64),
    pools: Sequence[int] = (8, 8, 2),
    hidden: int = 128,
    dropout: float = 0.05,
    **options: Unpack[AlgebraOptions],
) -> PHSEDNet:
    """SEDnet: which sound events are audible at each time, from magnitude spectra of ambisonics recordings.

    Blocks of 3x3 hypercomplex convolution, batch norm, ReLU, max-pool over frequency and dropout; two bidirectional
    GRUs; a linear head.

    Args:
        n: components, up to the number of channels; None for ordinary convolutions.
        in_channels: 4 for one first-order ambisonics microphone, 8 for two, 16 for two with phases.
        frequencies: of the input, which the product of `pools` must divide.
        widths, pools: channels and pooling over frequency of each block.
        hidden: size of each GRU in each direction.

    Shape: `(batch, in_channels, time, frequencies)` -> logits `(batch, time, num_events)`; the loss is
    `binary_cross_entropy_with_logits`.
    """
    if len(widths) != len(pools):
        raise ValueError(f"pools must have a number for each of {len(widths)} blocks, got {tuple(pools)}")
    conv, _ = _makers(n, options)
    left, blocks, channels = frequencies, [], in_channels
    for width, pool in zip(widths, pools):
        if left % pool:
            raise ValueError(
                f"frequencies must be a multiple of the product of pools {tuple(pools)}, got {frequencies}"
            )
        left //= pool
        blocks += [conv(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        blocks += [nn.MaxPool2d((1, pool)), nn.Dropout(dropout)]
        channels = width
    return PHSEDNet(nn.Sequential(*blocks), channels * left, hidden, num_events)


class PHSEDNet(nn.Module):
    """Built by `ph_sednet`."""

    def __init__(self, blocks: nn.Sequential, features: int, hidden: int, num_events: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.recurrent = nn.GRU(features, hidden, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, num_events)

    def forward(self, x: Float[Tensor, "batch channels time frequencies"]) -> Float[Tensor, "batch time events"]:
        """Logits of each event at each time."""
        features = self.blocks(x).permute(0, 2, 1, 3).flatten(2)
        return self.head(self.recurrent(features)[0])


def _makers(n: int | None, options: AlgebraOptions) -> tuple[Make, Make]:
    """How convolutions and linear layers are made."""
    if misplaced := {"device", "dtype"} & set(options):
        raise TypeError(
            f"a network takes no {', '.join(sorted(misplaced))}: use `with torch.device(...)` or `.to(...)`"
        )
    if n is None:
        if options:
            raise ValueError(f"an ordinary network (n = None) takes no options, got {', '.join(options)}")
        return nn.Conv2d, nn.Linear

    def conv(*args: Any, **kwargs: Any) -> nn.Module:
        return PHConv2d(*args, n=n, **kwargs, **options)

    def linear(*args: Any) -> nn.Module:
        return PHLinear(*args, n=n, **options)

    return conv, linear


def _default_channels(n: int | None, in_channels: int | None) -> int:
    if in_channels is not None:
        return in_channels
    # The paper's quaternion-like networks see RGB and one dummy channel, with n = 2 as with n = 4.
    return 3 if n is None else 3 + -3 % n

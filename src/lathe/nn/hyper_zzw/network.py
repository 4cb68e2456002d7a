"""Terminator: a classifier of a few wide SFNE blocks, and the two terms that its training adds to the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lathe.nn.hyper_zzw.block import SFNEBlock
from lathe.nn.hyper_zzw.components import LocalBranch, check_input, image_size
from lathe.nn.hyper_zzw.operators import Mode
from lathe.nn.hyper_zzw.slow_nets import kaiming_normal, slow_weights

__all__ = ["Terminator", "norm_penalty", "slow_neural_loss"]


class Terminator(nn.Module):
    """Classifies images or sequences at full resolution, without residual additions, attention or affine norms.

    Blocks follow one another; from the third on each also gets the output of the block before the last (and from the
    fifth on the one before that) as further channels: nothing is added, but earlier outputs are not out of reach.

    The defaults are the reference's for CIFAR, 1,336,855 parameters for size 32 and 10 classes, and the shift in front
    of each block and of the head that the reference forgets to register.

    Args:
        in_channels: of the input.
        num_classes: logits.
        size: of the image (one number: square; or (height, width)), or (length,) of the sequence.
        factors: output channels over input channels of each block.
        layers: of each block's global slow net; by default 3 in the first and 2 in the others.
        dropout: of each block; by default 0 in the first and 0.05 in the others.
        skips: for each block the blocks, counted from 0, whose outputs it gets beside the last; None as above.
        hidden, local_hidden, channel_hidden, interaction_hidden, local_sizes, omega0, mode, per_sample, running,
            pixel_bias, resize: as in `SFNEBlock`.

    Shape: `(batch, in_channels, *size)` -> `(batch, num_classes)`.

    Raises:
        ValueError: for lists of other lengths than `factors`, skips to blocks that do not come earlier, and as
            `SFNEBlock` does.

    Example:
        >>> net = Terminator(1, 10, size=8, factors=(12, 2), local_sizes=(3, 5))
        >>> net(torch.zeros(4, 1, 8, 8)).shape
        torch.Size([4, 10])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        size: int | Sequence[int],
        factors: Sequence[int] = (4, 3, 2, 2, 2),
        *,
        layers: Sequence[int] | None = None,
        dropout: Sequence[float] | None = None,
        skips: Sequence[Sequence[int]] | None = None,
        hidden: int = 64,
        local_hidden: int = 32,
        channel_hidden: int = 32,
        interaction_hidden: int = 16,
        local_sizes: Sequence[int] = (3, 9, 5, 7),
        omega0: float = 2000.0,
        mode: Mode = "matmul",
        per_sample: bool = False,
        running: bool = False,
        pixel_bias: bool = True,
        resize: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        count = len(factors)
        if count < 1 or num_classes < 1:
            raise ValueError(f"factors and num_classes must not be empty, got {tuple(factors)} and {num_classes}")
        layers = (3, *(2,) * (count - 1)) if layers is None else layers
        dropout = (0.0, *(0.05,) * (count - 1)) if dropout is None else dropout
        if skips is None:
            skips = [() if i < 2 else (i - 2,) if i < 4 else (i - 2, i - 3) for i in range(count)]
        for name, values in {"layers": layers, "dropout": dropout, "skips": skips}.items():
            if len(values) != count:
                raise ValueError(f"{name} must have one entry for each of {count} factors, got {len(values)}")
        if wrong := [j for i, each in enumerate(skips) for j in each if not 0 <= j < i]:
            raise ValueError(f"skips must name earlier blocks, counted from 0, got {wrong} in {[*map(tuple, skips)]}")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_channels, self.size, self.resize = in_channels, image_size(size), resize
        self.skips, self.factors = tuple(map(tuple, skips)), tuple(factors)
        # widths[i] goes into block i, and widths[i + 1] comes out.
        widths = [in_channels * math.prod(factors[:i]) for i in range(count + 1)]
        self.blocks = nn.ModuleList(
            SFNEBlock(
                widths[i],
                factors[i],
                self.size,
                skip_channels=[widths[j + 1] for j in self.skips[i]],
                hidden=hidden,
                layers=layers[i],
                local_hidden=local_hidden,
                channel_hidden=channel_hidden,
                interaction_hidden=interaction_hidden,
                local_sizes=local_sizes,
                omega0=omega0,
                mode=mode,
                dropout=dropout[i],
                per_sample=per_sample,
                running=running,
                pixel_bias=pixel_bias,
                resize=resize,
                **made,
            )
            for i in range(count)
        )
        self.shifts = nn.Parameter(torch.zeros(count, **made))
        self.head = nn.Linear(widths[-1], num_classes, **made)
        kaiming_normal(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Float[Tensor, "batch in_channels *positions"]) -> Float[Tensor, "batch num_classes"]:
        check_input(x, self.in_channels, self.size, self.resize)
        return self.head(self.features(x)[-1].flatten(2).mean(2) + self.shifts[-1])

    def features(self, x: Float[Tensor, "batch in_channels *positions"]) -> list[Tensor]:
        """The output of each block, `(batch, width, *size)`."""
        outputs: list[Tensor] = []
        for i, (block, skips) in enumerate(zip(self.blocks, self.skips)):
            outputs.append(block(outputs[-1] + self.shifts[i - 1] if outputs else x, *(outputs[j] for j in skips)))
        return outputs

    def kernels(self) -> list[Tensor]:
        """The generated global kernel of each block, `(1, width, *size)`."""
        return [block.kernel() for block in self.blocks if isinstance(block, SFNEBlock)]

    def slow_loss(self, mode: Literal["channel_sum", "tile"] = "channel_sum") -> Float[Tensor, ""]:
        """`slow_neural_loss` of the kernels, which do not depend on the input: to be added to the loss in training."""
        return slow_neural_loss(self.kernels(), mode, self.factors)


def slow_neural_loss(
    kernels: Sequence[Float[Tensor, "1 _ ..."]],
    mode: Literal["channel_sum", "tile"] = "channel_sum",
    factors: Sequence[int] | None = None,
) -> Float[Tensor, ""]:
    """How far the global kernels of a network's blocks lie apart: local feedback to the slow nets.

    Args:
        kernels: one for each block, in order; of another resolution, they are interpolated to the first one's.
        mode: "channel_sum", the reference's, takes the mean over pixels of (sum_c K^j - sum_c K^i)^2 for all pairs of
            blocks j < i; "tile" that of (K^j, repeated to the channels of K^i, - K^i)^2.
        factors: output over input channels of each block, of which "tile" checks that they lead from K^j to K^i.

    Raises:
        ValueError: for fewer than 1 kernel, an unknown mode, or factors that do not lead from one kernel's channels to
            the next one's.
    """
    if not kernels:
        raise ValueError("kernels must not be empty")
    if mode not in ("channel_sum", "tile"):
        raise ValueError(f"mode must be 'channel_sum' or 'tile', got {mode!r}")
    channels = [kernel.shape[1] for kernel in kernels]
    if mode == "tile":
        ratios = [after / before for before, after in pairwise(channels)]
        if factors is None:
            factors = [round(ratio) for ratio in ratios]
        if len(factors) < len(ratios) or any(ratio != factor for ratio, factor in zip(ratios, factors)):
            raise ValueError(f"factors must lead through the kernels' channels {channels}, got {tuple(factors)}")
    total = kernels[0].new_zeros(())
    for i, deep in enumerate(kernels):
        for shallow in kernels[:i]:
            if mode == "tile":
                repeats = (1, deep.shape[1] // shallow.shape[1], *(1,) * (deep.ndim - 2))
                difference = shallow.repeat(repeats) - deep
            else:
                difference = shallow.sum(1) - deep.sum(1)
            total = total + difference.square().mean()
    return total


def norm_penalty(net: nn.Module, slow: float = 1e-6) -> Float[Tensor, ""]:
    """The reference's regulariser, to be weighted by 4e-5 to 5e-5: L2 norms, not squared, of each parameter.

    Counted are, in full, the blocks' mixing and bottleneck layers and the local branches' shifts; times `slow`, the
    weights of slow nets over pixels and of RGUs. The reference chooses them by parts of their names; here they are
    named one by one.

    Raises:
        ValueError: where `net` holds no `SFNEBlock`.
    """
    blocks = [module for module in net.modules() if isinstance(module, SFNEBlock)]
    if not blocks:
        raise ValueError(f"net must hold an SFNEBlock, got {type(net).__name__}")
    total = blocks[0].bias.new_zeros(())
    for block in blocks:
        branches = [each for each in block.local_branches if isinstance(each, LocalBranch)]
        layers = [block.mix, block.bottleneck, *(branch.mix for branch in branches)]
        full = [parameter for layer in layers for parameter in layer.parameters()]
        for parameter in [*full, *(branch.bias for branch in branches)]:
            total = total + parameter.norm()
        units = (block.rgu_slow, block.rgu_fast)
        gates = [part.weight[None] for rgu in units for part in (rgu.k, rgu.v, rgu.q, rgu.y)]
        for weights in [*slow_weights(block), *gates]:
            total = total + slow * weights.flatten(1).norm(dim=1).sum()
    return total

"""The slow-fast neural encoding (SFNE) block: branches of different context, compressed into one output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lathe.nn.hyper_zzw.components import (
    RGU,
    HyperChannelInteraction,
    HyperInteraction,
    LocalBranch,
    check_input,
    image_size,
)
from lathe.nn.hyper_zzw.mixtures import mixed, mixture
from lathe.nn.hyper_zzw.operators import Mode, apply_weights, check_square
from lathe.nn.hyper_zzw.slow_nets import SlowNet, kaiming_normal
from lathe.nn.hyper_zzw.standardization import GroupInstanceBatchStd, instance_standardize

__all__ = ["SFNEBlock"]


class SFNEBlock(nn.Module):
    """Six branches of global context and some of local context, mixed into `factor * channels` channels.

    With What = x * K_g, m = IS(mix(x)), c = IS(HCI(x)) and fast = IS(RGU_slow(What) + RGU_fast(x)), the branches are
    o = What . fast, What . m, What . c, SiLU(o), fast, HI(o, x), and for each local size a depthwise convolution with a
    kernel made of the context at hand: of x over c, of c over x, of m over x, of x over m, and so on by turns. Outputs
    of earlier blocks join them. The mixture is standardised (G-IBS), activated (GELU), shifted and dropped out.

    The branches are never laid side by side: each adds its share to the output, so that a training step keeps nothing
    of the size of all of them together.

    Args:
        channels: of the input.
        factor: output channels over input channels.
        size: of the image (one number: square; or (height, width)), or (length,) of the sequence.
        skip_channels: channels of the earlier outputs that `forward` is given, each a divisor of `channels`.
        hidden, layers: of the global slow net (the one over pixels has as many hidden channels and 2 layers).
        local_hidden, channel_hidden, interaction_hidden: of the local slow nets and of those over channels in HCI, HI.
        local_sizes: kernel size, odd, of each local branch; the reference code has these four, the paper (5, 7, 9).
        omega0: frequency scale of all slow nets, see `SlowNet`.
        mode: how weights act on activations, see `apply_weights`; "matmul" needs a square image, or a sequence whose
            length is a square.
        dropout: chance that a channel is dropped.
        groups: of G-IBS; None: 12, or the largest divisor below.
        per_sample: nothing is averaged over the batch: local kernels and statistics are each sample's own.
        running: evaluation uses running averages of contexts and statistics, so that samples do not see one another.
        pixel_bias: the learnt maps p of slow nets and RGUs, which tie the block to `size`.
        resize: take inputs of any size: coordinates are sampled anew, maps p are interpolated, and sums over pixels
            are scaled as if they had as many terms as at `size`. Means something for small omega0 (1 to 30).

    Shape: x `(batch, channels, *size)`, earlier outputs `(batch, skip_channels[i], *size)` ->
    `(batch, factor * channels, *size)`.

    Raises:
        ValueError: for a mode that the size does not suit, even local sizes, skip_channels that do not divide, both
            `per_sample` and `running`, or inputs that do not fit.
    """

    def __init__(
        self,
        channels: int,
        factor: int,
        size: int | Sequence[int],
        *,
        skip_channels: Sequence[int] = (),
        hidden: int = 64,
        layers: int = 2,
        local_hidden: int = 32,
        channel_hidden: int = 32,
        interaction_hidden: int = 16,
        local_sizes: Sequence[int] = (3, 9, 5, 7),
        omega0: float = 2000.0,
        mode: Mode = "matmul",
        dropout: float = 0.0,
        groups: int | None = None,
        per_sample: bool = False,
        running: bool = False,
        pixel_bias: bool = True,
        resize: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, count in {"channels": channels, "factor": factor}.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if wrong := [each for each in skip_channels if each < 1 or channels % each]:
            raise ValueError(f"skip_channels must divide channels = {channels}, got {', '.join(map(str, wrong))}")
        if per_sample and running:
            raise ValueError("running averages over batches, which per_sample=True does not use: choose one")
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
        self.channels, self.factor, self.size, self.mode, self.resize = channels, factor, image_size(size), mode, resize
        self.dropout = dropout
        if mode == "matmul" and not resize:
            check_square(self.size)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        axes = len(self.size)
        slow: dict[str, Any] = {"omega0": omega0, **made}
        pixels: dict[str, Any] = {"pixel_bias": pixel_bias, **made}
        self.slow_net = SlowNet(axes, self.size, hidden, channels, layers, omega0=omega0, **pixels)
        self.rgu_slow = RGU(channels, self.size, resize=resize, **pixels)
        self.rgu_fast = RGU(channels, self.size, resize=resize, **pixels)
        self.mix = nn.Linear(channels, channels, **made)
        self.channel_interaction = HyperChannelInteraction(channels, hidden=channel_hidden, **slow)
        self.interaction = HyperInteraction(
            channels,
            self.size,
            hidden=interaction_hidden,
            spatial_hidden=hidden,
            omega0=omega0,
            resize=resize,
            **pixels,
        )
        self.local_branches = nn.ModuleList(
            LocalBranch(
                channels,
                each,
                data_dim=axes,
                hidden=local_hidden,
                omega0=omega0,
                per_sample=per_sample,
                running=running,
                **pixels,
            )
            for each in local_sizes
        )
        self.skip_channels = tuple(skip_channels)
        branches = 6 + len(self.local_branches) + len(self.skip_channels)
        self.bottleneck = nn.Linear(branches * channels, factor * channels, **made)
        for layer in (self.mix, self.bottleneck):
            kaiming_normal(layer.weight)
            nn.init.zeros_(layer.bias)
        made["keep_output"] = True
        self.norm = None if per_sample else GroupInstanceBatchStd(factor * channels, groups, running=running, **made)
        self.bias = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def forward(
        self, x: Float[Tensor, "batch channels *positions"], *earlier: Float[Tensor, "batch _ *positions"]
    ) -> Float[Tensor, "batch out_channels *positions"]:
        check_input(x, self.channels, self.size, self.resize)
        if len(earlier) != len(self.skip_channels):
            raise ValueError(f"the block needs {len(self.skip_channels)} earlier outputs, got {len(earlier)}")
        for each, channels in zip(earlier, self.skip_channels):
            if each.shape != (len(x), channels, *x.shape[2:]):
                expected = (len(x), channels, *x.shape[2:])
                raise ValueError(f"an earlier output must be {expected}, got shape {tuple(each.shape)}")
        branches, local = self._branches(x)
        parts = [*branches, *((each, "gelu") for each in local), *((each.flatten(2), "") for each in earlier)]
        weights = [*self.bottleneck.weight.split(self.channels, 1)]
        # An earlier output is repeated to the channels of x: the weights of its copies add up.
        for i, channels in enumerate(self.skip_channels, len(parts) - len(earlier)):
            weights[i] = weights[i].unflatten(1, (-1, channels)).sum(1)
        bias = self.bottleneck.bias
        for weight, branch in zip(weights[len(branches) :], self._local()):
            bias = bias + weight.sum(1) * branch.bias
        total = mixture(bias, [(weight, *part) for weight, part in zip(weights, parts)])
        total = instance_standardize(total, keep_output=True) if self.norm is None else self.norm(total)
        y = F.dropout1d(F.gelu(total) + self.bias, self.dropout, self.training)
        return y.view(len(x), self.factor * self.channels, *x.shape[2:])

    def kernel(self, size: Sequence[int] | None = None) -> Float[Tensor, "1 channels *positions"]:
        """The generated global kernel K_g."""
        return self.slow_net(size)

    def _branches(self, x: Tensor) -> tuple[list[tuple[Tensor, str]], list[Tensor]]:
        """The global branches, each with the activation that it still lacks, and the local ones, which lack GELU."""
        size, flat = x.shape[2:], x.flatten(2)
        weights = x * self.slow_net(size)
        slow, fast = self.rgu_slow.gated(weights.flatten(2)), self.rgu_fast.gated(flat)
        bias = self.rgu_slow.output_bias(size) + self.rgu_fast.output_bias(size)
        fast = mixture(bias, [(self.rgu_slow.y.weight, slow, "gelu"), (self.rgu_fast.y.weight, fast, "gelu")])
        fast = instance_standardize(fast, keep_output=True)
        m = instance_standardize(mixed(flat, self.mix.weight, self.mix.bias), keep_output=True).view(x.shape)
        c = instance_standardize(self.channel_interaction(x), keep_output=True)

        if tuple(size) != self.size and self.mode != "elementwise":
            ratio = math.prod(self.size) / math.prod(size)
            weights = weights * (ratio**0.5 if self.mode == "matmul" else ratio)
        o, o_m, o_c = (apply_weights(weights, y, self.mode) for y in (fast.view(x.shape), m, c))
        hyper = self.interaction(o, x)
        flats = [each.flatten(2) for each in (o, o_m, o_c, o, fast, hyper)]
        turns = ((x, c), (c, x), (m, x), (x, m))
        local = [branch.standardized(*turns[i % 4]) for i, branch in enumerate(self._local())]
        return list(zip(flats, ("", "", "", "silu", "", ""))), local

    def _local(self) -> list[LocalBranch]:
        return [branch for branch in self.local_branches if isinstance(branch, LocalBranch)]

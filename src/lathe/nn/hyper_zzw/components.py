"""The parts of an SFNE block: gates of channels, of pixels, of both, and the local branch.

All act alike on images and on sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lathe.nn.hyper_zzw.mixtures import local_mixture, mixed, mixture
from lathe.nn.hyper_zzw.operators import hyperzzw_2e
from lathe.nn.hyper_zzw.slow_nets import ContextSlowNet, SlowNet, axes_of, kaiming_normal, kaiming_uniform, resized
from lathe.nn.hyper_zzw.standardization import BatchStd, instance_standardize

__all__ = ["RGU", "HyperChannelInteraction", "HyperInteraction", "LocalBranch", "check_input", "image_size"]


class RGU(nn.Module):
    """Recursive gated unit: W_y (GELU(IS(W_k x * W_q W_v x)) + p).

    W_q W_v is multiplied out, which saves a product over all pixels; p is a learnt map of pixels, zero at the start.

    Args:
        channels: of input and output.
        size: of the image (one number: square) or, as a tuple of one, the length of the sequence.
        pixel_bias: whether there is a p.

    Shape: `(batch, channels, *size)` -> the same.

    Raises:
        ValueError: for other channels, or another size (which `resize=True` allows: p is interpolated).
    """

    def __init__(
        self,
        channels: int,
        size: int | Sequence[int],
        *,
        pixel_bias: bool = True,
        resize: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.channels, self.size, self.resize = channels, image_size(size), resize
        self.k, self.v, self.q, self.y = (nn.Linear(channels, channels, **made) for _ in range(4))
        for layer in (self.k, self.v, self.q, self.y):
            kaiming_uniform(layer.weight)
            nn.init.zeros_(layer.bias)
        self.pixel_bias = nn.Parameter(torch.zeros(self.size, **made)) if pixel_bias else None

    def forward(self, x: Float[Tensor, "batch channels *positions"]) -> Float[Tensor, "batch channels *positions"]:
        check_input(x, self.channels, self.size, self.resize)
        part = (self.y.weight, self.gated(x.flatten(2)), "gelu")
        return mixture(self.output_bias(x.shape[2:]), [part]).view(x.shape)

    def gated(self, x: Float[Tensor, "batch channels positions"]) -> Float[Tensor, "batch channels positions"]:
        """IS(W_k x * W_q W_v x), before GELU."""
        weight = torch.cat([self.k.weight, self.q.weight @ self.v.weight])
        bias = torch.cat([self.k.bias, torch.addmv(self.q.bias, self.q.weight, self.v.bias)])
        k, gate = mixed(x, weight, bias).chunk(2, 1)
        return instance_standardize(k * gate, keep_output=True)

    def output_bias(self, size: Sequence[int]) -> Tensor:
        """What W_y's bias and p add to the output."""
        if self.pixel_bias is None:
            return self.y.bias
        pixels = resized(self.pixel_bias, size).flatten()
        return torch.addr(self.y.bias[:, None], self.y.weight.sum(1), pixels)


class HyperChannelInteraction(nn.Module):
    """Gates channels: x * sigmoid(y K y) with y the mean of each channel and K a generated kernel over channels.

    Args:
        channels: of input and output.
        hidden, layers, omega0: of the slow net.

    Shape: `(batch, channels, *positions)` -> the same.

    Raises:
        ValueError: for other channels.
    """

    def __init__(
        self,
        channels: int,
        *,
        hidden: int = 32,
        layers: int = 2,
        omega0: float = 2000.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.slow_net = SlowNet(1, channels, hidden, 1, layers, omega0=omega0, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "batch channels *positions"]) -> Float[Tensor, "batch channels *positions"]:
        check_input(x, self.channels)
        scores = self.scores(x.flatten(2)).sigmoid()
        return x * scores.view(*scores.shape[:2], *(1,) * (x.ndim - 2))

    def scores(self, x: Float[Tensor, "batch channels positions"]) -> Float[Tensor, "batch channels 1"]:
        """y K y, before the sigmoid."""
        return hyperzzw_2e(x.mean(2), self.slow_net()[0])[..., None]


class HyperInteraction(nn.Module):
    """Gates channels and pixels together: x * sigmoid(s_s s_c), with scores of what `o` has over each.

    s_c = y_c K_c y_c with y_c the mean of each channel of o; s_s = y_s K_s y_s with y_s its mean at each pixel.

    Args:
        channels, size: of the input, as for `RGU`.
        hidden, spatial_hidden: of the slow nets over channels and over pixels.
        layers, omega0: of both.
        pixel_bias, resize: as for `RGU`.

    Shape: o, and x (o itself by default), `(batch, channels, *size)` -> the same.

    Raises:
        ValueError: for other channels, another size, or x of another shape than o.
    """

    def __init__(
        self,
        channels: int,
        size: int | Sequence[int],
        *,
        hidden: int = 16,
        spatial_hidden: int = 64,
        layers: int = 2,
        omega0: float = 2000.0,
        pixel_bias: bool = True,
        resize: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.size, self.resize = image_size(size), resize
        self.channel = HyperChannelInteraction(channels, hidden=hidden, layers=layers, omega0=omega0, **made)
        self.spatial_net = SlowNet(
            len(self.size), self.size, spatial_hidden, 1, layers, omega0=omega0, pixel_bias=pixel_bias, **made
        )

    def forward(
        self,
        o: Float[Tensor, "batch channels *positions"],
        x: Float[Tensor, "batch channels *positions"] | None = None,
    ) -> Float[Tensor, "batch channels *positions"]:
        x = o if x is None else x
        if x.shape != o.shape:
            raise ValueError(f"x and o must have one shape, got {tuple(x.shape)} and {tuple(o.shape)}")
        check_input(o, self.channel.channels, self.size, self.resize)
        flat = o.flatten(2)
        kernel = self.spatial_net(o.shape[2:]).flatten(2)
        scores = hyperzzw_2e(flat.mean(1, keepdim=True), kernel) * self.channel.scores(flat)
        return x * scores.sigmoid().view(x.shape)


class LocalBranch(nn.Module):
    """GELU(BS(mix(depthwise(z, K)))) + bias with a kernel K that a slow net makes of a context.

    Args:
        channels: of input and output.
        kernel_size: odd; one number an axis, or one for all.
        data_dim: axes: 2 for images, 1 for sequences.
        hidden, layers, omega0, pixel_bias: of the slow net.
        per_sample: a kernel for each sample, and standardisation in each sample instead of over the batch.
        running: evaluation uses running averages of the context and of the statistics.

    Shape: context and z (the context by default) `(batch, channels, *positions)` -> the same.

    Raises:
        ValueError: for an even kernel size, other channels, or both `per_sample` and `running`.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | Sequence[int],
        *,
        data_dim: int = 2,
        hidden: int = 32,
        layers: int = 2,
        omega0: float = 2000.0,
        pixel_bias: bool = True,
        per_sample: bool = False,
        running: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        size = axes_of(kernel_size, data_dim, "kernel_size")
        if any(each % 2 == 0 for each in size):
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.slow_net = ContextSlowNet(
            data_dim,
            size,
            hidden,
            channels,
            layers,
            omega0=omega0,
            pixel_bias=pixel_bias,
            per_sample=per_sample,
            running=running,
            **made,
        )
        self.mix = nn.Linear(channels, channels, **made)
        kaiming_normal(self.mix.weight)
        nn.init.zeros_(self.mix.bias)
        self.norm = None if per_sample else BatchStd(channels, running=running, keep_output=True, **made)
        self.bias = nn.Parameter(torch.zeros(1, **made))

    def forward(
        self,
        context: Float[Tensor, "batch channels *positions"],
        z: Float[Tensor, "batch channels *positions"] | None = None,
    ) -> Float[Tensor, "batch channels *positions"]:
        z = context if z is None else z
        return F.gelu(self.standardized(context, z)).view(z.shape) + self.bias

    def standardized(self, context: Tensor, z: Tensor) -> Float[Tensor, "batch channels positions"]:
        """BS(mix(depthwise(z, K))), before GELU."""
        y = local_mixture(z, self.slow_net(context).to(z.dtype), self.mix.weight, self.mix.bias)
        return instance_standardize(y, keep_output=True) if self.norm is None else self.norm(y)


def image_size(size: int | Sequence[int]) -> tuple[int, ...]:
    """One number is a square image, a tuple of one a sequence, of two an image (height, width)."""
    sizes = (size, size) if isinstance(size, int) else tuple(size)
    if len(sizes) not in (1, 2) or any(each < 1 for each in sizes):
        raise ValueError(f"size must be positive: a number, (height, width) or (length,), got {size}")
    return sizes


def check_input(
    x: Tensor, channels: int, size: tuple[int, ...] | None = None, resize: bool = True, name: str = "x"
) -> None:
    """Raises a ValueError that names the shape where x does not fit."""
    axes = "*positions" if size is None else ", ".join(map(str, size))
    wrong_axes = x.ndim < 3 if size is None else x.ndim != 2 + len(size)
    if wrong_axes or x.shape[1] != channels:
        raise ValueError(f"{name} must be (batch, {channels}, {axes}), got shape {tuple(x.shape)}")
    if size is not None and not resize and tuple(x.shape[2:]) != size:
        raise ValueError(
            f"{name} must have the size {size} that this was made for, got shape {tuple(x.shape)}; "
            "resize=True takes any size"
        )

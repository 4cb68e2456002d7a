"""Slow nets: small coordinate networks that generate kernels of any size (sections 3.1 and 3.3 of the paper).

A multiplicative filter network with sine filters, on coordinates c in [-1, 1] along each axis:

    h_0 = s_0(c),   h_i = s_i(c) * (A_i h_{i-1} + a_i) + p,   K = B h_L + b,   s_i(c) = sin(F_i c + f_i)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lathe.core.kept import Kept
from lathe.core.precision import at_least_single, without_autocast

__all__ = ["ContextSlowNet", "SlowNet", "axes_of", "resized"]

_POOLS: dict[int, Any] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
_INTERPOLATIONS = {1: "linear", 2: "bilinear", 3: "trilinear"}


def axes_of(size: int | Sequence[int], axes: int, name: str = "size") -> tuple[int, ...]:
    """`size` as one positive number an axis; a single number serves all axes."""
    sizes = (size,) * axes if isinstance(size, int) else tuple(size)
    if len(sizes) != axes or any(each < 1 for each in sizes):
        raise ValueError(f"{name} must be a positive number, or {axes} of them, got {size}")
    return sizes


def resized(pixels: Float[Tensor, "*positions"], size: Sequence[int]) -> Float[Tensor, "*new_positions"]:
    """A map of pixels interpolated to another size, its outermost pixels staying where the coordinates have them."""
    if pixels.shape == tuple(size):
        return pixels
    mode = _INTERPOLATIONS[pixels.ndim]
    return F.interpolate(pixels[None, None], size=tuple(size), mode=mode, align_corners=True)[0, 0]


class _CoordinateNet(nn.Module):
    """The parameters of a multiplicative filter network, and its sines on a grid."""

    def __init__(
        self,
        data_dim: int,
        size: int | Sequence[int],
        hidden: int,
        out_channels: int,
        layers: int,
        omega0: float,
        alpha: float,
        pixel_bias: bool,
        made: dict[str, Any],
    ) -> None:
        super().__init__()
        if data_dim not in _POOLS:
            raise ValueError(f"data_dim must be 1, 2 or 3, got {data_dim}")
        for name, count in {"hidden": hidden, "out_channels": out_channels, "layers": layers}.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if not (omega0 > 0 and alpha > 0):
            raise ValueError(f"omega0 and alpha must be positive, got {omega0} and {alpha}")
        self.size = axes_of(size, data_dim)
        self.hidden, self.out_channels, self.layers, self.omega0, self.alpha = (
            hidden,
            out_channels,
            layers,
            omega0,
            alpha,
        )
        self.filter_weight = nn.Parameter(torch.empty(layers + 1, hidden, data_dim, **made))
        self.filter_bias = nn.Parameter(torch.empty(layers + 1, hidden, **made))
        self.weight = nn.Parameter(torch.empty(layers, hidden, hidden, **made))
        self.bias = nn.Parameter(torch.empty(layers, hidden, **made))
        self.out_weight = nn.Parameter(torch.empty(out_channels, hidden, **made))
        self.out_bias = nn.Parameter(torch.empty(out_channels, **made))
        self.pixel_bias = nn.Parameter(torch.empty(self.size, **made)) if pixel_bias else None

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws everything anew.

        F_i as a 1x1 convolution starts, times 2 pi omega0 g with g ~ Gamma(alpha / (i + 1), 1) for each channel and
        axis; A_i and B from Kaiming's uniform rule, B scaled for the number of positions (Chang et al. 2020).
        """
        if self.weight.is_meta:
            return
        layers, hidden, axes = self.filter_weight.shape
        shapes = (self.alpha / torch.arange(1.0, layers + 1)).view(-1, 1, 1).expand(layers, hidden, axes)
        scales = torch._standard_gamma(shapes.contiguous(), generator=generator)
        bound = 1 / math.sqrt(axes)
        self.filter_weight.uniform_(-bound, bound, generator=generator)
        self.filter_weight.mul_(2 * math.pi * self.omega0 * scales.to(self.filter_weight))
        self.filter_bias.zero_()
        kaiming_uniform(self.weight, generator)
        self.bias.fill_(1.0)
        kaiming_uniform(self.out_weight, generator)
        self.out_weight.mul_(1 / math.sqrt(math.prod(self.size)))
        self.out_bias.zero_()
        if self.pixel_bias is not None:
            self.pixel_bias.zero_()

    def _sines(self, size: Sequence[int]) -> Float[Tensor, "filters hidden positions"]:
        """All s_i on the grid. Phases of omega0 = 2000 are about 1e5: float32 would round them to 0.01 rad."""
        device = self.filter_weight.device
        exact = torch.float32 if device.type == "mps" else torch.float64
        lines = [torch.linspace(-1, 1, n, dtype=exact, device=device) for n in size]
        grid = torch.stack(torch.meshgrid(*lines, indexing="ij")).flatten(1)
        filters, hidden, axes = self.filter_weight.shape
        frequencies = self.filter_weight.to(exact).reshape(filters * hidden, axes)
        phases = torch.addmm(self.filter_bias.to(exact).reshape(-1, 1), frequencies, grid)
        return phases.sin().to(at_least_single(self.weight).dtype).view(filters, hidden, -1)

    def _pixels(self, size: Sequence[int]) -> Tensor | None:
        return None if self.pixel_bias is None else resized(at_least_single(self.pixel_bias), size).reshape(1, -1)

    def extra_repr(self) -> str:
        return f"size={self.size}, hidden={self.hidden}, out_channels={self.out_channels}, layers={self.layers}"


class SlowNet(_CoordinateNet):
    """Generates a kernel from coordinates alone: the same for every input, with parameters that do not grow with it.

    In eval() without gradients the kernel is kept until a parameter changes.

    Args:
        data_dim: axes of the kernel: 2 for images, 1 for sequences and for kernels over channels.
        size: positions along each axis; one number serves all.
        hidden: channels of the network.
        out_channels: channels of the kernel.
        layers: number L of products of sines.
        omega0: scale of the frequencies, in turns over half an axis. The reference's 2000 aliases on any practical
            grid: the kernel starts as noise. For smooth kernels, and to change the resolution, take 1 to 30.
        alpha: shape of the Gamma distribution from which the first filter's scales are drawn.
        pixel_bias: the learnt map p, one number a position, which ties the network to `size`.

    Shape: nothing -> `(1, out_channels, *size)`.

    Raises:
        ValueError: for counts below 1, or a size that does not fit `data_dim`.
    """

    def __init__(
        self,
        data_dim: int,
        size: int | Sequence[int],
        hidden: int,
        out_channels: int,
        layers: int = 2,
        *,
        omega0: float = 2000.0,
        alpha: float = 6.0,
        pixel_bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        made = {"device": device, "dtype": dtype}
        super().__init__(data_dim, size, hidden, out_channels, layers, omega0, alpha, pixel_bias, made)
        self._kept = Kept()
        self.reset_parameters()

    def forward(self, size: Sequence[int] | None = None) -> Float[Tensor, "1 out_channels *positions"]:
        """The kernel, at another size where one is given: coordinates are sampled anew, p is interpolated."""
        size = self.size if size is None else axes_of(size, len(self.size))
        if self.training:
            return self._make(size)
        return self._kept.get([*self.parameters()], lambda: self._make(size), key=size)

    def last_hidden(self, size: Sequence[int] | None = None) -> Float[Tensor, "hidden positions"]:
        """h_L, of which the kernel is a linear map."""
        size = self.size if size is None else size
        with without_autocast(self.weight.device):
            sines, pixels = self._sines(size), self._pixels(size)
            weight, bias = (
                at_least_single(self.weight),
                at_least_single(self.bias),
            )
            h = sines[0]
            for i, sine in enumerate(sines[1:]):
                step = torch.addmm(bias[i, :, None], weight[i], h)
                h = sine * step if pixels is None else torch.addcmul(pixels, sine, step)
            return h

    def _make(self, size: tuple[int, ...]) -> Tensor:
        h = self.last_hidden(size)
        with without_autocast(self.weight.device):
            kernel = torch.addmm(
                at_least_single(self.out_bias)[:, None],
                at_least_single(self.out_weight),
                h,
            )
            return kernel.to(self.weight.dtype).view(1, self.out_channels, *size)


class ContextSlowNet(_CoordinateNet):
    """Generates a depthwise kernel from coordinates and from what the layer sees: a kernel for each batch, or sample.

    After each filter the hidden channels are renormalised, h <- renorm_alpha sg(h) + renorm_beta h / |h| (sg: no
    gradient), and gated by a function of the input pooled to the kernel's size, h <- h * (C_i u + c_i). The reference
    averages the pooled input over the batch, so that a sample's result depends on its neighbours.

    Args:
        data_dim, size, hidden, layers, omega0, alpha, pixel_bias: as in `SlowNet`.
        channels: of input and kernel.
        per_sample: a kernel for every sample from its own context.
        running: in evaluation, use a running average of the training batches' contexts: a fixed kernel.
        momentum: of that average.
        renorm_trainable: learn renorm_alpha and renorm_beta, which the reference leaves at 1 and 0.1.

    Shape: `(batch, channels, *positions)` -> `(channels, 1, *size)`, or `(batch, channels, 1, *size)` per sample.

    Raises:
        ValueError: for counts below 1, a size that does not fit, both `per_sample` and `running`, or an input of
            another number of channels or axes.
    """

    renorm_alpha: Tensor
    renorm_beta: Tensor

    def __init__(
        self,
        data_dim: int,
        size: int | Sequence[int],
        hidden: int,
        channels: int,
        layers: int = 2,
        *,
        omega0: float = 2000.0,
        alpha: float = 6.0,
        pixel_bias: bool = True,
        per_sample: bool = False,
        running: bool = False,
        momentum: float = 0.1,
        renorm_trainable: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if per_sample and running:
            raise ValueError("running averages contexts over batches, which per_sample=True does not use: choose one")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(data_dim, size, hidden, channels, layers, omega0, alpha, pixel_bias, made)
        self.per_sample, self.momentum = per_sample, momentum
        self.reduce = nn.Linear(channels, hidden, **made)
        self.fc1 = nn.Linear(hidden, hidden, **made)
        self.gate_weight = nn.Parameter(torch.empty(layers, hidden, hidden, **made))
        self.gate_bias = nn.Parameter(torch.empty(layers, hidden, **made))
        for name, value in {"renorm_alpha": 1.0, "renorm_beta": 0.1}.items():
            start = torch.full((layers, hidden), value, **made)
            if renorm_trainable:
                self.register_parameter(name, nn.Parameter(start))
            else:
                self.register_buffer(name, start)
        context = torch.zeros(channels, *self.size, **made) if running else None
        self.running_context: Tensor | None
        self.register_buffer("running_context", context)
        self._kept = Kept()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """As the slow net's, C_i from Kaiming's uniform rule, c_i = 1; `reduce` and `fc1` as torch starts them."""
        if self.weight.is_meta:
            return
        super().reset_parameters(generator)
        for linear in (self.reduce, self.fc1):
            bound = 1 / math.sqrt(linear.in_features)
            for parameter in linear.parameters():
                parameter.uniform_(-bound, bound, generator=generator)
        kaiming_uniform(self.gate_weight, generator)
        self.gate_bias.fill_(1.0)

    def forward(self, x: Float[Tensor, "batch channels *positions"]) -> Float[Tensor, "*kernel"]:
        axes = len(self.size)
        if x.ndim != 2 + axes or x.shape[1] != self.out_channels:
            raise ValueError(
                f"x must be (batch, {self.out_channels}, {axes} spatial axes) for a kernel of size {self.size}, "
                f"got shape {tuple(x.shape)}"
            )
        if self.running_context is not None and not self.training:
            stored = self.running_context
            kernel = self._kept.get([*self.parameters(), *self.buffers()], lambda: self._make(stored[None]))
        else:
            kernel = self._make(self._context(x))
        return kernel if self.per_sample else kernel[0]

    def _context(self, x: Tensor) -> Float[Tensor, "samples channels *size"]:
        """The input at the kernel's size. Averaging over the batch comes first: pooling is linear, and then cheaper."""
        pool = _POOLS[len(self.size)]
        if self.per_sample:
            return pool(x, self.size)
        context = pool(x.sum(0, keepdim=True) / max(len(x), 1), self.size)
        if self.running_context is not None and len(x):
            with torch.no_grad():
                self.running_context.lerp_(context[0].to(self.running_context.dtype), self.momentum)
        return context

    def last_hidden(
        self, context: Float[Tensor, "samples channels *size"]
    ) -> Float[Tensor, "samples hidden positions"]:
        """h_L for contexts of the kernel's size; the kernel is a linear map of it."""
        wide = at_least_single
        with without_autocast(self.weight.device):
            sines, pixels = self._sines(self.size), self._pixels(self.size)
            weight, bias = wide(self.weight), wide(self.bias)
            rows = wide(context).flatten(2).mT.to(weight.dtype)  # (samples, positions, channels)
            u = F.linear(rows, wide(self.reduce.weight), wide(self.reduce.bias))
            u = F.gelu(F.linear(u, wide(self.fc1.weight), wide(self.fc1.bias)))
            gates = F.linear(u, wide(self.gate_weight).flatten(0, 1), wide(self.gate_bias).flatten())
            gates = gates.unflatten(2, (self.layers, self.hidden)).permute(2, 0, 3, 1)  # layers, samples, hidden, ...
            alpha, beta = wide(self.renorm_alpha)[..., None], wide(self.renorm_beta)[..., None]
            h = sines[:1]
            for i, sine in enumerate(sines[1:]):
                step = weight[i] @ h + bias[i, :, None]
                h = sine * step if pixels is None else torch.addcmul(pixels, sine, step)
                h = torch.addcmul(alpha[i] * h.detach(), beta[i], F.normalize(h, dim=-1))
                h = h * gates[i]
            return h

    def _make(self, context: Tensor) -> Float[Tensor, "samples channels 1 *size"]:
        h = self.last_hidden(context)
        with without_autocast(self.weight.device):
            kernel = at_least_single(self.out_weight) @ h + at_least_single(self.out_bias)[:, None]
            return kernel.to(self.weight.dtype).view(-1, self.out_channels, 1, *self.size)


def kaiming_uniform(weight: Tensor, generator: torch.Generator | None = None) -> None:
    """Kaiming's rule for linear layers, for the last two axes of `weight`: variance 1 / fan_in."""
    bound = math.sqrt(3.0 / weight.shape[-1])
    with torch.no_grad():
        weight.uniform_(-bound, bound, generator=generator)


def kaiming_normal(weight: Tensor, generator: torch.Generator | None = None) -> None:
    """Kaiming's rule in front of a rectifier: variance 2 / fan_in."""
    with torch.no_grad():
        weight.normal_(std=math.sqrt(2.0 / weight[0].numel()), generator=generator)


def slow_weights(module: nn.Module) -> Iterator[Float[Tensor, "matrices out in"]]:
    """The weight matrices of all slow nets in `module` over at least two axes, stacked as each net holds them."""
    for net in module.modules():
        if isinstance(net, _CoordinateNet) and len(net.size) > 1:
            yield from (net.filter_weight, net.weight, net.out_weight[None])
            if isinstance(net, ContextSlowNet):
                yield from (net.reduce.weight[None], net.fc1.weight[None], net.gate_weight)

"""Hyper-kernel convolutions: in place of `nn.Conv1d` and `nn.Conv2d`, with parameters that do not grow with the kernel.

A 1x1 mixture of channels, then a depthwise convolution whose kernel a slow net generates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lathe.core.shapes import conv_arguments
from lathe.nn.hyper_zzw.operators import hyperzzw_local, long_convolution
from lathe.nn.hyper_zzw.slow_nets import ContextSlowNet, SlowNet, axes_of, kaiming_normal

__all__ = ["HyperConv1d", "HyperConv2d"]

Layer = TypeVar("Layer", bound="_HyperConv")

# From this many positions on, a kernel over long inputs is cheaper by FFT.
_LONG = {1: 129, 2: 289}


class _HyperConv(nn.Module):
    """Mixes channels, then convolves each with its generated kernel."""

    replaces: ClassVar[type[nn.Module]]
    axes: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = "same",
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        context: bool = True,
        hidden: int = 32,
        layers: int = 2,
        omega0: float = 2000.0,
        per_sample: bool = False,
        running: bool = False,
    ) -> None:
        super().__init__()
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"groups must divide {in_channels} and {out_channels} channels, got {groups}")
        if padding_mode not in ("zeros", "reflect", "replicate", "circular"):
            raise ValueError(f"padding_mode must be zeros, reflect, replicate or circular, got {padding_mode!r}")
        if not context and (per_sample or running):
            raise ValueError("per_sample and running are about the context, which context=False leaves out")
        axes = self.axes
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = axes_of(kernel_size, axes, "kernel_size")
        self.stride, self.dilation = axes_of(stride, axes, "stride"), axes_of(dilation, axes, "dilation")
        self.padding, self.padding_mode = padding, padding_mode
        self._pads = self._pads_of(padding)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *(1,) * axes, **made))
        kaiming_normal(self.weight)
        self.slow_net: SlowNet | ContextSlowNet
        options: dict[str, Any] = {"omega0": omega0, **made}
        if context:
            options |= {"per_sample": per_sample, "running": running}
            self.slow_net = ContextSlowNet(axes, self.kernel_size, hidden, out_channels, layers, **options)
        else:
            self.slow_net = SlowNet(axes, self.kernel_size, hidden, out_channels, layers, **options)
        self.bias = nn.Parameter(torch.zeros(out_channels, **made)) if bias else None
        self.relative_error: float | None = None

    def _pads_of(self, padding: str | int | Sequence[int]) -> list[tuple[int, int]]:
        """Padding before and after each axis."""
        if padding == "same":
            if max(self.stride) > 1:
                raise ValueError(f"padding='same' needs stride 1, got stride {self.stride}")
            spans = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size)]
            return [(span // 2, span - span // 2) for span in spans]
        if padding == "valid":
            return [(0, 0)] * self.axes
        if isinstance(padding, str):
            raise ValueError(f"padding must be 'same', 'valid' or numbers, got {padding!r}")
        pads = (padding,) * self.axes if isinstance(padding, int) else tuple(padding)
        if len(pads) != self.axes or any(pad < 0 for pad in pads):
            raise ValueError(f"padding must be 'same', 'valid' or {self.axes} numbers from 0, got {padding}")
        return [(pad, pad) for pad in pads]

    @classmethod
    def like(
        cls: type[Layer], conv: nn.Module, *, kernel_size: int | Sequence[int] | None = None, **options: Any
    ) -> Layer | None:
        """A fresh layer that fits where `conv` stood: same shapes, device, dtype and mode.

        Args:
            kernel_size: another one, such as a larger, which changes no number of parameters but that of the map p;
                a replacement of odd `kernel_size` pads so that the output's size stays.
            options: context, hidden, layers, omega0, per_sample, running, as in the constructor.

        Returns:
            None for a kernel of one position, which leaves nothing to generate.

        Raises:
            TypeError: where `conv` is not of the type that this layer replaces.
            ValueError: where `kernel_size` differs from the old one's by an odd number, and the output would shift.
        """
        if not isinstance(conv, cls.replaces):
            raise TypeError(f"{cls.__name__} replaces nn.{cls.replaces.__name__}, got {type(conv).__name__}")
        arguments = conv_arguments(conv)
        old = arguments["kernel_size"]
        new = old if kernel_size is None else axes_of(kernel_size, cls.axes, "kernel_size")
        if math.prod(new) == 1:
            return None
        grown = [d * (k - o) for d, k, o in zip(arguments["dilation"], new, old)]
        if new != old and not isinstance(arguments["padding"], str):
            padding = [pad + change // 2 for pad, change in zip(arguments["padding"], grown)]
            if any(change % 2 for change in grown) or min(padding) < 0:
                raise ValueError(
                    f"kernel_size must differ from {old} by even numbers that padding can take up, got {new}"
                )
            arguments["padding"] = padding
        made = cls(**(arguments | {"kernel_size": new}), **options)
        return made.train(conv.training)

    @classmethod
    @torch.no_grad()
    def from_trained(cls: type[Layer], conv: nn.Module, **options: Any) -> Layer | None:
        """As `like`, starting from the trained weight: the nearest depthwise-separable one, generated.

        Each output channel's filters are cut to rank one (one mixture of channels times one kernel), and the slow
        net's last layer is solved for these kernels by least squares, which is exact from `hidden` >= positions on.
        The gates start closed to the context, c_i = 1 and C_i = 0, and open as they learn. `relative_error` says what
        was lost, as a part of the weight's Frobenius norm.
        """
        if "kernel_size" in options:
            raise ValueError("kernel_size must stay what it is for a trained weight to be taken over")
        made = cls.like(conv, **options)
        if made is None:
            return None
        weight = cast(Tensor, conv.weight).detach().double()
        left, values, right = torch.linalg.svd(weight.flatten(2), full_matrices=False)
        roots = values[:, :1].sqrt()
        made.weight.copy_((left[..., 0] * roots).view_as(made.weight))
        kernels = roots * right[:, 0]
        net = made.slow_net
        if isinstance(net, ContextSlowNet):
            net.gate_weight.zero_()
            features = net.last_hidden(torch.zeros(1, made.out_channels, *net.size).to(made.weight))[0].double()
        else:
            features = net.last_hidden().double()
        ones = torch.ones_like(features[:1])
        solved = torch.linalg.lstsq(torch.cat([features, ones]).cpu().T, kernels.cpu().T, driver="gelsd").solution
        net.out_weight.copy_(solved[:-1].T)
        net.out_bias.copy_(solved[-1])
        if made.bias is not None:
            made.bias.copy_(cast(Tensor, conv.bias))
        kernel = (solved.T.to(features) @ torch.cat([features, ones]))[:, None]
        missing = (weight.flatten(2) - made.weight.double().flatten(1)[..., None] * kernel).norm()
        made.relative_error = float(missing / weight.norm()) if weight.any() else 0.0
        return made

    def forward(
        self, x: Float[Tensor, "batch in_channels *positions"]
    ) -> Float[Tensor, "batch out_channels *new_positions"]:
        if x.ndim != 2 + self.axes or x.shape[1] != self.in_channels:
            raise ValueError(
                f"x must be (batch, {self.in_channels}, {self.axes} spatial axes), got shape {tuple(x.shape)}"
            )
        if self.groups == 1:
            mix = self.weight.flatten(1).to(x.dtype)
            y = torch.bmm(mix.expand(len(x), *mix.shape), x.flatten(2)).unflatten(2, x.shape[2:])
        else:
            y = (F.conv1d if self.axes == 1 else F.conv2d)(x, self.weight, None, groups=self.groups)
        kernel = self.slow_net(y) if isinstance(self.slow_net, ContextSlowNet) else self.slow_net()[0, :, None]
        y = self._convolved(y, kernel.to(y.dtype))
        return y if self.bias is None else y + self.bias.view(-1, *(1,) * self.axes)

    def _convolved(self, y: Tensor, kernel: Tensor) -> Tensor:
        pads = self._pads
        outside = [pad for before, after in reversed(pads) for pad in (before, after)]
        if self.padding_mode != "zeros":
            y, pads = F.pad(y, outside, mode=self.padding_mode), [(0, 0)] * self.axes
        elif any(before != after for before, after in pads):
            y, pads = F.pad(y, outside), [(0, 0)] * self.axes
        plain = max(self.stride) == max(self.dilation) == 1
        same = [(k - 1, n) for k, n in zip(self.kernel_size, y.shape[2:])]
        fits = all(
            before == after == span // 2 and span % 2 == 0 and span < n
            for (before, after), (span, n) in zip(pads, same)
        )
        if plain and fits and math.prod(self.kernel_size) >= _LONG[self.axes]:
            return long_convolution(y, kernel.squeeze(-1 - self.axes).reshape(-1, self.out_channels, *self.kernel_size))
        padding = [before for before, _ in pads]
        return hyperzzw_local(y, kernel, stride=self.stride, padding=padding, dilation=self.dilation)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}" + f", groups={self.groups}" * (self.groups > 1)
        )


class HyperConv2d(_HyperConv):
    """2-D convolution with a generated kernel: a 1x1 mixture of channels, then a depthwise hyper-kernel.

    Takes the arguments of `nn.Conv2d` ("same" padding by default), then its own. The number of parameters does not
    depend on `kernel_size` but for the slow net's map p, one number a position.

    Args:
        context: let the kernel depend on what the layer sees (`ContextSlowNet`); False generates one kernel for all
            inputs (`SlowNet`), kept in evaluation.
        hidden, layers, omega0: of the slow net. Its 2000 is the reference's; kernels much larger than 9 want 1 to 30.
        per_sample: a kernel for each sample from its own context, instead of one for the batch.
        running: in evaluation, a fixed kernel from the running average of the contexts.

    Shape: `(batch, in_channels, height, width)` -> `(batch, out_channels, height', width')`.

    Raises:
        ValueError: for arguments that do not go together, and inputs of other channels or axes.
    """

    replaces = nn.Conv2d
    axes = 2


class HyperConv1d(_HyperConv):
    """1-D convolution with a generated kernel, as `HyperConv2d`; kernels as long as the sequence go by FFT.

    Takes the arguments of `nn.Conv1d` ("same" padding by default), then those of `HyperConv2d`.

    Shape: `(batch, in_channels, length)` -> `(batch, out_channels, length')`.

    Raises:
        ValueError: for arguments that do not go together, and inputs of other channels or axes.
    """

    replaces = nn.Conv1d
    axes = 1

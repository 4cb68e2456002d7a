"""Layers over the positions of images and sequences: convolutions and poolings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lathe.theory.kernels.fields import Field, filter_axis, wrap_axis
from lathe.theory.kernels.layers import Layer, Sizes, Weighted

__all__ = ["AvgPool", "Conv", "Flatten", "GlobalAvgPool"]


def _tuple(value: int | tuple[int, ...], dimensions: int, name: str) -> tuple[int, ...]:
    values = (value,) * dimensions if isinstance(value, int) else tuple(value)
    if len(values) != dimensions:
        raise ValueError(f"{name} must be a number or {dimensions} of them for such inputs, got {value}")
    return values


def _window(layer: Conv | AvgPool, sizes: Sizes) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Kernel size, stride and zeros on either side, for each dimension."""
    d = len(sizes)
    if not d:
        raise ValueError(f"{type(layer).__name__} takes images (n, channels, *sizes), got flat features")
    kernel = _tuple(layer.kernel_size, d, "kernel_size")
    stride = kernel if layer.stride is None else _tuple(layer.stride, d, "stride")
    assert not isinstance(layer.padding, str)
    return kernel, stride, _tuple(layer.padding, d, "padding")


def _window_sizes(
    sizes: Sizes, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
) -> Sizes:
    found = tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(sizes, kernel, stride, padding, dilation)
    )
    if min(found) < 1:
        raise ValueError(f"a window of {kernel} with padding {padding} does not fit an image of size {sizes}")
    return found


def _check_window(**values: int | tuple[int, ...] | None) -> None:
    for name, value in values.items():
        least = 0 if name == "padding" else 1
        if value is not None and min((value,) if isinstance(value, int) else value) < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class Conv(Weighted):
    """A convolution over one or two dimensions of space; weights have variance `weight_variance / fan_in`.

    Grouped convolutions have the same kernels, as long as there are many channels in a group.

    Args:
        kernel_size, stride, padding, dilation: as those of `nn.Conv2d`; `padding` may be "same" or "valid".
        weight_variance, bias_variance, parametrization, fan_in, weight_rate, bias_rate: as those of `Dense`.
        padding_mode: "zeros" or "circular".

    Raises:
        ValueError: for sizes below one, "same" with an even kernel or a stride, or what `Dense` refuses.
    """

    kernel_size: int | tuple[int, ...] = 3
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] | str = 0
    weight_variance: float = 1.0
    bias_variance: float = 0.0
    parametrization: str = "ntk"
    fan_in: int | None = None
    weight_rate: float | None = None
    bias_rate: float | None = None
    dilation: int | tuple[int, ...] = 1
    padding_mode: str = "zeros"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.padding_mode not in ("zeros", "circular"):
            raise ValueError(f"padding_mode must be 'zeros' or 'circular', got {self.padding_mode!r}")
        _check_window(kernel_size=self.kernel_size, stride=self.stride, dilation=self.dilation)
        if not isinstance(self.padding, str):
            _check_window(padding=self.padding)
            return
        if self.padding not in ("same", "valid"):
            raise ValueError(f"padding must be numbers, 'same' or 'valid', got {self.padding!r}")
        if self.padding == "valid":
            object.__setattr__(self, "padding", 0)
            return
        kernel = (self.kernel_size,) if isinstance(self.kernel_size, int) else self.kernel_size
        stride = (self.stride,) if isinstance(self.stride, int) else self.stride
        if max(stride) > 1 or any(k % 2 == 0 for k in kernel):
            raise ValueError(f"padding 'same' needs odd kernels and stride 1, got {self.kernel_size} and {self.stride}")
        width = max(len(kernel), 1 if isinstance(self.dilation, int) else len(self.dilation))
        pads = [
            d * (k - 1) // 2 for k, d in zip(kernel * (width // len(kernel)), _tuple(self.dilation, width, "dilation"))
        ]
        object.__setattr__(self, "padding", pads[0] if len(set(pads)) == 1 else tuple(pads))

    def sizes(self, sizes: Sizes) -> Sizes:
        return _window_sizes(sizes, *_window(self, sizes), _tuple(self.dilation, len(sizes), "dilation"))

    def propagate(self, f: Field) -> Field:
        kernel, stride, padding = _window(self, f.sizes)
        dilation = _tuple(self.dilation, len(f.sizes), "dilation")
        self.weigh(f, math.prod(kernel))
        for i in range(len(f.sizes)):
            pad = padding[i]
            if self.padding_mode == "circular" and pad:
                f.each(partial(wrap_axis, f=f, dimension=i, padding=pad))
                f.sizes = (*f.sizes[:i], f.sizes[i] + 2 * pad, *f.sizes[i + 1 :])
                pad = 0
            (out,) = _window_sizes(f.sizes[i : i + 1], *[(each,) for each in (kernel[i], stride[i], pad, dilation[i])])
            f.each(
                partial(filter_axis, f=f, dimension=i, size_out=out, window=(kernel[i], stride[i], pad, dilation[i]))
            )
            f.sizes = (*f.sizes[:i], out, *f.sizes[i + 1 :])
            offset = f.offsets[i]
            f.offsets = (*f.offsets[:i], None if offset is None else offset // stride[i], *f.offsets[i + 1 :])
        self.shift(f)
        return f


@dataclass(frozen=True)
class AvgPool(Layer):
    """Means over windows of positions; `kernel_size`, `stride` and `padding` (with zeros that count) as `nn.AvgPool2d`.

    After it, covariances between all positions matter, and the network costs the square of their number.
    """

    kernel_size: int | tuple[int, ...] = 2
    stride: int | tuple[int, ...] | None = None
    padding: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        _check_window(kernel_size=self.kernel_size, stride=self.stride, padding=self.padding)

    def sizes(self, sizes: Sizes) -> Sizes:
        return _window_sizes(sizes, *_window(self, sizes), (1,) * len(sizes))

    def propagate(self, f: Field) -> Field:
        kernel, stride, padding = _window(self, f.sizes)
        out = self.sizes(f.sizes)
        for i in range(len(f.sizes)):
            window = (kernel[i], stride[i], padding[i])
            axis = f.axis(i)
            for each in (axis, axis + 1):
                f.each(partial(_pool, axis=each, window=window))
            if f.mean is not None:
                f.mean = _pool(f.mean, i, window)
        f.sizes = out
        return f


def _pool(t: Tensor, axis: int, window: tuple[int, int, int]) -> Tensor:
    """Means over windows of one axis."""
    kernel, stride, padding = window
    if padding:
        shape = list(t.shape)
        shape[axis] = padding
        t = torch.cat([t.new_zeros(shape), t, t.new_zeros(shape)], axis)
    count = (t.shape[axis] - kernel) // stride + 1
    before = (slice(None),) * axis
    taps = [t[(*before, slice(tap, tap + stride * (count - 1) + 1, stride))] for tap in range(kernel)]
    total = taps[0] * (1 / kernel)
    for tap in taps[1:]:
        total = total.add_(tap, alpha=1 / kernel)
    return total


@dataclass(frozen=True)
class GlobalAvgPool(Layer):
    """The mean over all positions: `(n, channels, *sizes) -> (n, channels)`."""

    def sizes(self, sizes: Sizes) -> Sizes:
        if not sizes:
            raise ValueError("GlobalAvgPool takes images (n, channels, *sizes), got flat features")
        return ()

    def propagate(self, f: Field) -> Field:
        f.each(lambda t: t.flatten(0, -3).mean(0))
        f.mean = None if f.mean is None else f.mean_over_positions(f.mean)
        f.sizes, f.offsets = (), ()
        return f


@dataclass(frozen=True)
class Flatten(Layer):
    """All positions and channels side by side; for flat features nothing."""

    def sizes(self, sizes: Sizes) -> Sizes:
        return ()

    def propagate(self, f: Field) -> Field:
        for i, offset in enumerate(f.offsets):
            if offset is None:
                f.each(partial(_same_position, axis=i))
        if f.sizes:
            f.each(lambda t: t.flatten(0, -3).mean(0))
            f.mean = None if f.mean is None else f.mean_over_positions(f.mean)
        f.sizes, f.offsets = (), ()
        return f


def _same_position(t: Tensor, axis: int) -> Tensor:
    return t.diagonal(dim1=axis, dim2=axis + 1).movedim(-1, axis)

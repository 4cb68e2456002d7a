"""The HyperZZW operator: a kernel W times an activation Z makes weights of the moment, which act on an activation.

What = Z * W (first Z), then y = What . Z (second Z); the dot is a matrix product over the two spatial axes, a product
element by element, or a convolution. Equations 2-4 of the paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lathe.core.precision import at_least_float32, without_autocast

__all__ = ["Mode", "apply_weights", "hyperzzw_2e", "hyperzzw_global", "hyperzzw_local", "long_convolution"]

Mode = Literal["matmul", "elementwise", "convolution"]


def hyperzzw_global(
    z: Float[Tensor, "batch channels *positions"],
    kernel: Float[Tensor, "#batch channels *positions"],
    y: Float[Tensor, "batch channels *positions"],
    mode: Mode = "matmul",
) -> Float[Tensor, "batch channels *positions"]:
    """(z * kernel) . y with a kernel as large as the image.

    Args:
        mode: see `apply_weights`.

    Raises:
        ValueError: for an unknown mode, or shapes that do not go together.
    """
    return apply_weights(z * kernel, y, mode)


def apply_weights(
    weights: Float[Tensor, "batch channels *positions"],
    y: Float[Tensor, "batch channels *positions"],
    mode: Mode = "matmul",
) -> Float[Tensor, "batch channels *positions"]:
    """What . y for weights What that differ from sample to sample, channel by channel.

    Args:
        mode: "matmul", the reference's, multiplies matrices: pixel (h, w) sees row h of the weights and column w of y,
            at a cost of N sqrt(N) for N pixels; it needs square images, and folds a sequence into a square.
            "elementwise" costs N and mixes no pixels. "convolution" is circular, by FFT, for images and sequences of
            any size: every pixel sees every pixel, at a cost of N log N.

    Raises:
        ValueError: for an unknown mode, shapes that differ, and in "matmul" for images that are not square or sequences
            whose length is no square.
    """
    if weights.shape != y.shape:
        raise ValueError(f"weights and y must have one shape, got {tuple(weights.shape)} and {tuple(y.shape)}")
    if mode == "elementwise":
        return weights * y
    if mode == "convolution":
        return long_convolution(y, weights, padding="circular")
    if mode != "matmul":
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    side = check_square(y.shape[2:])
    if y.ndim == 4:
        return weights @ y
    folded = (*y.shape[:2], side, side)
    return (weights.reshape(folded) @ y.reshape(folded)).flatten(2)


def check_square(size: Sequence[int]) -> int:
    """The side of a square image, or of the square that a sequence folds into; a ValueError where there is none."""
    side = math.isqrt(math.prod(size))
    if len(size) not in (1, 2) or side**2 != math.prod(size) or size[-1] not in (side, side**2):
        raise ValueError(
            "mode 'matmul' needs square images, or sequences whose length is a square, got size "
            f"{tuple(size)}; 'elementwise' and 'convolution' take any"
        )
    return side


def hyperzzw_2e(
    z: Float[Tensor, "*shape"], kernel: Float[Tensor, "*kernel_shape"]
) -> Float[Tensor, "*broadcast_shape"]:
    """(z * kernel) * z: two products element by element, at linear cost; the scores over channels and pixels."""
    return z * kernel * z


def hyperzzw_local(
    z: Float[Tensor, "batch channels *positions"],
    kernel: Float[Tensor, "*kernel_shape"],
    *,
    stride: Sequence[int] | None = None,
    padding: Sequence[int] | None = None,
    dilation: Sequence[int] | None = None,
) -> Float[Tensor, "batch channels *new_positions"]:
    """Depthwise convolution with a generated kernel, the size of the input kept unless told otherwise.

    Args:
        kernel: `(channels, 1, *size)` for the whole batch, or `(batch, channels, 1, *size)`, one for each sample.
        stride, padding, dilation: a number an axis, as for torch's convolutions; padding (size - 1) / 2 by default.

    Raises:
        ValueError: where the kernel does not fit, or has an even size and no `padding` is given.
    """
    axes = z.ndim - 2
    per_sample = kernel.ndim == 3 + axes
    if per_sample and len(z) == 0 and len(kernel) == 0:  # no groups, which no convolution takes
        kernel, per_sample = kernel.sum(0), False
    lead = (*z.shape[:2], 1) if per_sample else (z.shape[1], 1)
    if axes not in (1, 2) or kernel.ndim != len(lead) + axes or tuple(kernel.shape[: len(lead)]) != lead:
        raise ValueError(
            f"kernel must be (channels, 1, *size) or (batch, channels, 1, *size) for z of shape {tuple(z.shape)}, "
            f"got {tuple(kernel.shape)}"
        )
    size = kernel.shape[len(lead) :]
    if padding is None:
        if any(each % 2 == 0 for each in size):
            raise ValueError(f"kernel must have odd sizes to keep the input's size, got {tuple(size)}")
        padding = [(each - 1) // 2 for each in size]
    one = (1,) * axes
    stride, padding, dilation = tuple(stride or one), tuple(padding), tuple(dilation or one)
    if axes == 1:  # as an image one pixel high, which takes the faster kernels
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
        z, kernel = z.unsqueeze(2), kernel.unsqueeze(-2)
    batch, channels = z.shape[:2]
    groups = channels
    if per_sample:
        z, kernel, groups = z.reshape(1, batch * channels, *z.shape[2:]), kernel.flatten(0, 1), batch * channels
    elif z.device.type == "cpu":
        # oneDNN's depthwise kernels are about three times as fast on channels that lie side by side.
        z = z.contiguous(memory_format=torch.channels_last)
    y = F.conv2d(z, kernel, None, stride, padding, dilation, groups)
    if per_sample:
        y = y.reshape(batch, channels, *y.shape[2:])
    return y.squeeze(2) if axes == 1 else y


def long_convolution(
    x: Float[Tensor, "batch channels *positions"],
    kernel: Float[Tensor, "#batch channels *size"],
    padding: Literal["zeros", "circular"] = "zeros",
) -> Float[Tensor, "batch channels *positions"]:
    """Depthwise convolution by FFT with a kernel up to the size of the input, for one or more axes.

    Equal to torch's convolution with padding="same": y[t] = sum_s kernel[s] x[t + s - (size - 1) // 2], where x is
    zero outside, or goes round. The cost does not depend on the kernel's size.

    Args:
        kernel: shared by the batch, or one for each sample.
        padding: "circular" lets a kernel as long as the input reach from every position to every other.

    Raises:
        ValueError: for an unknown padding, a kernel of other channels or axes, or one that is longer than the input.
    """
    positions, size = x.shape[2:], kernel.shape[2:]
    if padding not in ("zeros", "circular"):
        raise ValueError(f"padding must be 'zeros' or 'circular', got {padding!r}")
    fits = len(size) == len(positions) and all(s <= n for s, n in zip(size, positions))
    if not fits or kernel.shape[1] != x.shape[1] or kernel.shape[0] not in (1, x.shape[0]):
        raise ValueError(
            f"kernel must be (1 or batch, channels, *size) and not longer than x of shape {tuple(x.shape)}, "
            f"got {tuple(kernel.shape)}"
        )
    if x.numel() == 0:
        return x * kernel.sum()
    dtype = torch.promote_types(x.dtype, kernel.dtype)
    axes = tuple(range(2, x.ndim))
    points = [n if padding == "circular" else _fast_length(n + s - 1) for n, s in zip(positions, size)]
    with without_autocast(x.device):
        spectra = [torch.fft.rfftn(each.to(at_least_float32(dtype)), points, axes) for each in (x, kernel)]
        y = torch.fft.irfftn(spectra[0] * spectra[1].conj(), points, axes)
    y = y.roll([(s - 1) // 2 for s in size], axes)
    for axis, n in zip(axes, positions):
        y = y.narrow(axis, 0, n)
    return y.to(dtype)


def _fast_length(n: int) -> int:
    """The next product of powers of 2, 3 and 5: other lengths are slow to transform."""
    best = 1 << (n - 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            best = min(best, three << max(0, (-(-n // three) - 1).bit_length()))
            three *= 3
        five *= 5
    return best

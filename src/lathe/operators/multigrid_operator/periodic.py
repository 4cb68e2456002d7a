"""Periodic borders that keep the order of memory: padding a field by its own far ends, and the transpose of that.

torch's circular padding returns its default order, and every convolution after it pays for that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["fold_periodic", "pad_periodic"]

Widths = tuple[tuple[int, int], ...]


def pad_periodic(x: Tensor, widths: Widths) -> Tensor:
    """`x` with `(before, after)` points of its periodic continuation on each grid axis; none wider than the axis."""
    return _Pad.apply(x, widths)


def fold_periodic(x: Tensor, widths: Widths) -> Tensor:
    """The transpose of `pad_periodic`: the outer points of each axis are cut off and added where they came from."""
    return _Fold.apply(x, widths)


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, widths: Widths) -> Tensor:
        ctx.widths = widths
        grid = x.shape[2:]
        shape = (*x.shape[:2], *(n + before + after for n, (before, after) in zip(grid, widths)))
        padded = _empty_like_order(x, shape)
        body = padded
        for axis, (n, (before, _)) in enumerate(zip(grid, widths), start=2):
            body = body.narrow(axis, before, n)
        body.copy_(x)
        # Axis by axis over what is filled by then, so that corners come out right.
        for axis, (n, (before, after)) in enumerate(zip(grid, widths), start=2):
            padded.narrow(axis, 0, before).copy_(padded.narrow(axis, n, before))
            padded.narrow(axis, before + n, after).copy_(padded.narrow(axis, before, after))
        return padded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Fold.apply(gradients[0], ctx.widths), None


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, widths: Widths) -> Tensor:
        ctx.widths = widths
        folded = x.clone()
        for axis in range(x.ndim - 1, 1, -1):
            before, after = widths[axis - 2]
            n = x.shape[axis] - before - after
            folded.narrow(axis, n, before).add_(folded.narrow(axis, 0, before))
            folded.narrow(axis, before, after).add_(folded.narrow(axis, before + n, after))
            folded = folded.narrow(axis, before, n)
        body = _empty_like_order(x, tuple(folded.shape))
        return body.copy_(folded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Pad.apply(gradients[0], ctx.widths), None


def _empty_like_order(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uninitialised, with the channels innermost where those of `x` are."""
    innermost = x.ndim > 3 and x.shape[1] > 1 and x.stride(1) == 1
    order = (torch.channels_last if x.ndim == 4 else torch.channels_last_3d) if innermost else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=order)

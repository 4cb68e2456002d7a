"""Moments of two pre-activations, `<s_a s_b>` and `<s'_a s'_b>`, for whole kernel matrices at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from lathe.core.gaussian.activation import Activation
from lathe.core.gaussian.angles import AngleTables
from lathe.core.gaussian.quadrature import gaussian_nodes
from lathe.core.gaussian.series import HermiteSeries
from lathe.core.gaussian.tables import PairTables

Then: TypeAlias = Callable[[Tensor, Tensor | None, tuple[slice, slice]], tuple[Tensor, Tensor | None]]

__all__ = ["kernel_moments", "mirror_", "pair_moments"]

#: Rows of the strips in which a large kernel is worked through, so that a strip stays in the cache.
_TILE = 168
#: Pairs that the quadrature of an activation with kinks and without closed form takes at a time.
_PAIRS = 64
#: Pairs from which on tables in the angle are worth their making.
_MANY = 100


def pair_moments(
    act: Activation, kaa: Float[Tensor, ...], kab: Float[Tensor, ...], kbb: Float[Tensor, ...]
) -> tuple[Float[Tensor, ...], Float[Tensor, ...]]:
    """`<s_a s_b>` and `<s'_a s'_b>` for jointly Gaussian pairs; the three arguments broadcast; differentiable.

    In closed form where the activation has one; else by a Hermite series, cut where what it leaves out is below 1e-13
    of `<s^2>` and 1e-11 of `K <s'^2>` (the remainder is known, as the series at `rho = 1` is an integral over a line);
    with a kink at zero by tables in the angle, which pay for many pairs; else by quadrature that follows the kinks,
    which is thousands of times slower.
    """
    if act.pair is not None:
        return act.pair(kaa, kab, kbb)
    if not act.kinks:
        series = HermiteSeries.of(act, torch.cat([kaa.reshape(-1), kbb.reshape(-1)]))
        if series is not None:
            counts = [kaa.numel(), kbb.numel()]
            left, right = (c.reshape(-1, *k.shape) for c, k in zip(series.coefficients.split(counts, 1), (kaa, kbb)))
            return series.evaluate(left, right, kaa, kab, kbb)
    kaa, kab, kbb = torch.broadcast_tensors(kaa, kab, kbb)
    if act.kinks == (0.0,) and kab.numel() >= _MANY:
        tables = AngleTables.of(act, torch.stack([kaa.reshape(-1), kbb.reshape(-1)]))
        if tables is not None:
            a, ab, b = (each.reshape(-1, 1) for each in (kaa, kab, kbb))
            kernel, slope = tables(a, ab, b, lambda t: t[..., 0, :, None], lambda t: t[..., 1, :, None])
            assert slope is not None
            return kernel.reshape(kab.shape), slope.reshape(kab.shape)
    return _pair_quadrature(act, kaa, kab, kbb)


def kernel_moments(
    act: Activation,
    K: Float[Tensor, "n n"],
    slope: bool = True,
    *,
    then: Then | None = None,
    out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"] | None]:
    """`<s_a s_b>` and, unless `slope` is false, `<s'_a s'_b>` for all pairs of a symmetric kernel matrix.

    As `pair_moments`, with half the work: strip by strip from the diagonal on, mirrored below it. Smooth activations
    without closed form are tabulated first, where the kernel is large: see `PairTables`.

    Args:
        then: `then(kernel, slope, (rows, columns))` is applied to each strip while it is in the cache, and what it
            gives is stored instead; it has to be symmetric too.
        out: where the results of a large kernel go; K itself may be reused. What is below the diagonal is then left to
            `mirror_`, and not read either.
    """
    n = K.shape[-1]
    small = K.requires_grad or n <= _TILE
    smooth = act.pair is None and not act.kinks
    variance = K.diagonal().clone()
    if smooth and n:  # an input of zeros has no correlation with others; one that is almost zero has
        variance = variance.clamp_min(1e-24 * float(variance.detach().max()))
    tables = PairTables.of(act, variance, *_correlations(K, variance)) if smooth and not small else None
    series = HermiteSeries.of(act, variance) if smooth and tables is None else None
    angles = AngleTables.of(act, variance) if act.pair is None and act.kinks == (0.0,) and n * n >= _MANY else None

    def block(where: tuple[slice, slice]) -> tuple[Tensor, Tensor | None]:
        rows, columns = where
        kaa, kab, kbb = variance[rows, None], K[where], variance[None, columns]
        if tables is not None:
            kernel, slopes = tables(kaa, kab, kbb, where, slope)
        elif series is not None:
            c = series.coefficients
            kernel, slopes = series.evaluate(c[:, rows, None], c[:, None, columns], kaa, kab, kbb, slope)
        elif angles is not None:
            kernel, slopes = angles(kaa, kab, kbb, lambda t: t[..., rows, None], lambda t: t[..., None, columns], slope)
        elif act.pair is not None:
            kernel, slopes = act.pair(kaa, kab, kbb)
        else:
            kernel, slopes = _pair_quadrature(act, *torch.broadcast_tensors(kaa, kab, kbb))
        return (kernel, slopes) if then is None else then(kernel, slopes if slope else None, where)

    if small:
        return block((slice(0, n), slice(0, n)))
    kernel, slopes = out or (torch.empty_like(K), torch.empty_like(K) if slope else None)
    for i in range(0, n, _TILE):
        where = slice(i, min(i + _TILE, n)), slice(i, n)
        for whole, part in zip((kernel, slopes), block(where)):
            if whole is not None and part is not None:
                whole[where] = part
    if out is None:
        for whole in (kernel, slopes):
            if whole is not None:
                mirror_(whole)
    return kernel, slopes


def mirror_(K: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Copies what is above the diagonal to below it, in place."""
    for i in range(0, len(K), _TILE):
        rows, beyond = slice(i, i + _TILE), slice(i + _TILE, None)
        K[rows, rows] = K[rows, rows].triu() + K[rows, rows].triu(1).mT
        K[beyond, rows] = K[rows, beyond].mT
    return K


def _correlations(K: Tensor, variance: Tensor) -> tuple[float, float]:
    """A range that holds the correlations above the diagonal; its upper end is one, which is on the diagonal."""
    scale = variance.rsqrt()
    strips = [slice(i, i + _TILE) for i in range(0, len(K), _TILE)]
    lowest = min(float(((K[rows, rows.start :] * scale[rows.start :]).amin(1) * scale[rows]).min()) for rows in strips)
    return max(-1.0, min(lowest, 0.999)), 1.0


def _pair_quadrature(act: Activation, kaa: Tensor, kab: Tensor, kbb: Tensor) -> tuple[Tensor, Tensor]:
    shape = kab.shape
    K = torch.stack([torch.stack([kaa, kab], -1), torch.stack([kab, kbb], -1)], -2).reshape(-1, 2, 2)
    kernels, slopes = [], []
    order = 40 if act.kinks else 200  # fewer do not resolve the bend where variables are nearly parallel
    for block in K.split(_PAIRS):
        z, w = gaussian_nodes(block, order, act.kinks)
        first, second = z.unbind(-1)
        kernels.append((act(first) * act(second) * w).sum(-1))
        slopes.append((act.derivative(first) * act.derivative(second) * w).sum(-1))
    return torch.cat(kernels).reshape(shape), torch.cat(slopes).reshape(shape)

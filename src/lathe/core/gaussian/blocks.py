"""Moments of pairs out of a known set of Gaussian variables, block by block: what does not depend on the block is kept.

A kernel that is worked through in tiles, or over positions of images, meets the same variances again and again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from lathe.core.gaussian.activation import Activation
from lathe.core.gaussian.angles import AngleTables
from lathe.core.gaussian.pairs import _pair_quadrature
from lathe.core.gaussian.quadrature import line_expectation
from lathe.core.gaussian.series import HermiteSeries
from lathe.core.gaussian.tables import PairTables

__all__ = ["BlockMoments", "check_second_moment"]

View: TypeAlias = Callable[[Tensor], Tensor]
#: Variables from which on tables are worth their making.
_MANY = 168
#: Beyond how many standard deviations, and for which part of the whole, `<s^2>` counts as divergent.
_FAR, _PART = 8.0, 1e-6


class BlockMoments:
    """`<s_a s_b>` and `<s'_a s'_b>` for blocks of pairs of the variables whose variances are given.

    As `pair_moments`: closed form, else series (tables for many variables without places), tables in the angle for
    kinks at zero, else quadrature.

    Args:
        act: the activation.
        variance: of each variable, the last axis; the axes before are places (positions of an image).
    """

    def __init__(self, act: Activation, variance: Float[Tensor, "*places n"]) -> None:
        self.act = act
        if act.pair is None and variance.numel():  # an input of zeros has no correlation; one that is nearly zero has
            variance = variance.clamp_min(1e-24 * float(variance.detach().max()))
        self.variance = variance
        self._series: HermiteSeries | None = None
        self._tried_series = False
        self._tables: PairTables | None = None
        self._span = 0.0
        self._angles: AngleTables | None = None
        self._in_angles = act.pair is None and act.kinks == (0.0,) and variance.numel() > 0
        self._without_tables = act.kinks != () or variance.ndim > 1 or variance.numel() <= _MANY

    def __call__(
        self, kab: Tensor, left: View, right: View, where: tuple[slice, slice], slope: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """The moments of the pairs whose covariances are `kab`.

        `left` and `right` take a tensor whose last axes are those of `variance` to the part that belongs to the block,
        broadcastable to `kab`; `where` says the same for variables without places.
        """
        act, variance = self.act, self.variance
        kaa, kbb = left(variance), right(variance)
        if act.pair is not None:
            return act.pair(kaa, kab, kbb)
        if not act.kinks:
            tables = self._wide_enough(kaa, kab, kbb)
            if tables is not None:
                return tables(kaa, kab, kbb, where, slope)
            series, c = self._in_series()
            if series is not None:
                return series.evaluate(left(c), right(c), kaa, kab, kbb, slope)
        angles = self._tables_in_angle()
        if angles is not None:
            return angles(kaa, kab, kbb, left, right, slope)
        return _pair_quadrature(act, *torch.broadcast_tensors(kaa, kab, kbb))

    def alone(self, slope: bool = True) -> tuple[Tensor, Tensor | None]:
        """`<s^2>` and `<s'^2>` of each variable."""
        act, variance = self.act, self.variance
        if act.pair is not None:
            return act.pair(variance, variance, variance)
        series, c = self._in_series()
        if series is not None:
            return series.evaluate(c, c, variance, variance, variance, slope)
        angles = self._tables_in_angle()
        if angles is not None:
            v = variance.unsqueeze(-1)
            kernel, steep = angles(v, v, v, lambda t: t.unsqueeze(-1), lambda t: t.unsqueeze(-1), slope)
            return kernel.squeeze(-1), None if steep is None else steep.squeeze(-1)
        square = line_expectation(lambda z: act(z) ** 2, variance, act.kinks)
        return square, line_expectation(lambda z: act.derivative(z) ** 2, variance, act.kinks) if slope else None

    def mean(self) -> Tensor:
        """`<s>` of each variable."""
        return line_expectation(self.act, self.variance, self.act.kinks)

    def _in_series(self) -> tuple[HermiteSeries | None, Tensor]:
        """The Hermite series, None where it converges too slowly, and its coefficients (terms, *places, n)."""
        if not self._tried_series:
            self._tried_series = True
            self._series = None if self.act.kinks else HermiteSeries.of(self.act, self.variance.reshape(-1))
        if self._series is None:
            return None, self.variance
        return self._series, self._series.coefficients.reshape(-1, *self.variance.shape)

    def _tables_in_angle(self) -> AngleTables | None:
        if self._in_angles and self._angles is None:
            self._angles = AngleTables.of(self.act, self.variance)
            self._in_angles = self._angles is not None
        return self._angles

    def _wide_enough(self, kaa: Tensor, kab: Tensor, kbb: Tensor) -> PairTables | None:
        """Tables for correlations that reach as low as those of this block; made anew, wider, where they do not."""
        if self._without_tables or kab.requires_grad:
            return None
        span = 1.0 - float((kab * kaa.rsqrt() * kbb.rsqrt()).min())
        if self._tables is None or span > self._span:
            self._span = min(2.0, 2.0 ** math.ceil(math.log2(max(span, 2.0**-10))))
            self._tables = PairTables.of(self.act, self.variance, 1.0 - self._span, 1.0)
            self._without_tables = self._tables is None
        return self._tables


def check_second_moment(act: Activation, variance: Float[Tensor, "*variables"]) -> None:
    """Raises where `<s^2>` is infinite at one of the variances, or its integral runs too far out to be had.

    Raises:
        ValueError: naming the activation and the variance.
    """
    top = float(variance.detach().max()) if variance.numel() else 0.0
    u = torch.linspace(-10.0, 10.0, 2001, dtype=torch.float64)
    mass = act(u * math.sqrt(max(top, 0.0))).double() ** 2 * torch.exp(-0.5 * u * u)
    far = mass[u.abs() > _FAR].sum()
    if not math.isfinite(top) or not torch.isfinite(mass).all() or far > _PART * mass.sum():
        raise ValueError(
            f"activation {act.name} has no finite second moment at a pre-activation variance of {top:.3g}: it grows "
            "too fast there for a kernel to exist; take a bounded or polynomially growing one, or smaller variances"
        )

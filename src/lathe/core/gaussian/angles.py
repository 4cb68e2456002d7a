"""Moments of pairs for activations that are smooth but for a kink at zero, from tables in the angle between the pair.

Two jointly Gaussian variables are projections of a point in the plane on two directions, `theta` apart, where
`cos(theta)` is their correlation. Each changes sign along a line, and between such lines everything is smooth: moments
are analytic in the angle (in the correlation they are not, at one), and in the logarithms of the variances.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lathe.core.gaussian.activation import Activation
from lathe.core.gaussian.tables import _first_kinds, _nodes, _significant, _transform

__all__ = ["AngleTables"]

View: TypeAlias = Callable[[Tensor], Tensor]
#: Size of the coefficients that are left out, relative to the largest.
_TAIL = 1e-12
#: Numbers of variances and angles that are tried, and nodes along the radius.
_VARIANCES, _ANGLES, _RADII = (8, 16, 32, 64), (16, 32, 64), 48
#: Variances below this part of the largest count as this.
_FLOOR = 1e-14


class AngleTables:
    """`<s_a s_b>` and `<s'_a s'_b>` as polynomials in the angle and the two variances' logarithms.

    Attributes:
        tables: of both moments, coefficients (degrees in the angle, r, r).
        basis: Chebyshev polynomials of the logarithm of each variable's variance, (r, *places, n).
    """

    def __init__(self, tables: tuple[Float[Tensor, "first r r"], Float[Tensor, "second r r"]], basis: Tensor) -> None:
        self.tables, self.basis = tables, basis

    @classmethod
    def of(cls, act: Activation, variance: Float[Tensor, "*places n"]) -> AngleTables | None:
        """Tables for all pairs of the variances given; None where they would be too large."""
        floor = _FLOOR * float(variance.detach().max())
        logs = variance.double().clamp_min(max(floor, 1e-300)).log()
        first, last = float(logs.detach().min()), float(logs.detach().max())
        middle, half = (first + last) / 2, max((last - first) / 2, 1e-3)
        for count in _VARIANCES:
            roots = (0.5 * (middle + half * _nodes(count))).exp().to(logs.device)
            few = [_coefficients(each, count) for each in _moments(act, roots, 3)]
            sides = [_significant(each.transpose(0, 1).flatten(1), _TAIL) for each in few]
            if None not in sides:
                break
        else:
            return None
        r = max(side for side in sides if side is not None)
        for angles in _ANGLES:
            found = [_coefficients(each, count) for each in _moments(act, roots, angles)]
            degrees = [_significant(each, _TAIL) for each in found]
            if None not in degrees:
                kernel, slope = [each[:degree, :r, :r].to(variance) for each, degree in zip(found, degrees)]
                basis = _first_kinds(((logs - middle) / half).reshape(-1), count)[:, :r]
                return cls((kernel, slope), basis.mT.reshape(r, *variance.shape).to(variance))
        return None

    def __call__(
        self, kaa: Tensor, kab: Tensor, kbb: Tensor, left: View, right: View, slope: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """The moments of a block of pairs; `left` and `right` as those of `BlockMoments`."""
        determinant = torch.addcmul(kaa * kbb, kab, kab, value=-1)
        open_angle = determinant > 0  # the root has no slope at zero; its contribution vanishes there
        sine = torch.where(open_angle, determinant, 1.0).sqrt() * open_angle
        twice = torch.atan2(sine, kab) * (4 / math.pi) - 2
        a, b = left(self.basis), right(self.basis)
        values = [_clenshaw(table, twice, a, b) for table in self.tables[: 2 if slope else 1]]
        return values[0], values[1] if slope else None


def _clenshaw(coefficients: Tensor, twice: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`sum_m (a C_m b) T_m(x)` at `twice = 2 x`, for `a` (r, ..., rows, 1) and `b` (r, ..., 1, columns) or as `a`."""
    matrices = b.shape[-1] > 1 and a.shape[-2] > 1
    left = a.squeeze(-1).movedim(0, -1)
    right = b.squeeze(-2).movedim(0, -2) if matrices else b

    def product(c: Tensor) -> Tensor:
        if matrices:
            return (left @ c) @ right
        weighted = (left @ c).movedim(-1, 0).unsqueeze(-1)
        total = weighted[0] * right[0]
        for first, second in zip(weighted[1:], right[1:]):
            total = torch.addcmul(total, first, second)
        return total

    value, before = product(coefficients[-1]), None
    for m in range(len(coefficients) - 2, -1, -1):
        made = torch.addcmul(product(coefficients[m]), twice, value, value=1.0 if m else 0.5)
        value, before = (made if before is None else made.sub_(before)), value
    return value


def _coefficients(values: Float[Tensor, "angles r r"], count: int) -> Float[Tensor, "angles r r"]:
    sides = _transform(count).to(values)
    angles = _transform(len(values)).to(values)
    return torch.einsum("km,mij->kij", angles, sides @ values @ sides.mT)


def _moments(act: Activation, roots: Float[Tensor, " r"], angles: int) -> list[Float[Tensor, "angles r r"]]:
    """Both moments of all pairs of standard deviations at Chebyshev nodes of the angle, in polar coordinates."""
    # An activation may bend over a distance of one, which is a small angle where the variance is large.
    arcs = min(96, 20 + 4 * math.ceil(float(roots.max())))
    nodes, weights = [torch.from_numpy(each).to(roots) for each in np.polynomial.legendre.leggauss(arcs)]
    radius, mass = [torch.from_numpy(each).to(roots) for each in np.polynomial.legendre.leggauss(_RADII)]
    radius = 5 * (radius + 1)
    mass = 5 * mass * radius * torch.exp(-0.5 * radius * radius) / (2 * math.pi)
    found: list[list[Tensor]] = [[], []]
    for x in _nodes(angles).tolist():
        theta = (x + 1) * math.pi / 2
        # Between these directions neither of both changes sign.
        ends = roots.new_tensor([0.0, theta, math.pi, math.pi + theta, 2 * math.pi]) + math.pi / 2
        length = (ends[1:] - ends[:-1]).unsqueeze(1)
        alpha = (ends[:-1].unsqueeze(1) + length * (nodes + 1) / 2).reshape(-1, 1)
        weight = ((length * weights / 2).reshape(-1, 1) * mass).reshape(-1)
        first = roots.unsqueeze(1) * (torch.cos(alpha) * radius).reshape(-1)
        second = roots.unsqueeze(1) * (torch.cos(alpha - theta) * radius).reshape(-1)
        found[0].append((act(first) * weight) @ act(second).mT)
        found[1].append((act.derivative(first) * weight) @ act.derivative(second).mT)
    return [torch.stack(each) for each in found]

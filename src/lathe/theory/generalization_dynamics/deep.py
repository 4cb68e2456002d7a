"""Modes of deep linear networks: the same end, another way there (section 6)."""

from __future__ import annotations

import cmath
import math

import torch
from jaxtyping import Float
from torch import Tensor

from lathe.theory.generalization_dynamics.units import checked_times

__all__ = ["deep_linear_modes"]

_BISECTIONS = 64


def deep_linear_modes(
    lam: Float[Tensor, "*modes"] | float,
    s: Float[Tensor, "*modes"] | float,
    u0: Float[Tensor, "*modes"] | float,
    depth: int,
    times: Float[Tensor, " times"],
) -> Float[Tensor, "times *modes"]:
    """The product `u` of a mode's `depth` equal weights along gradient flow, `du/dt = D u^(2 - 2/D) (s - lam u)`.

    `depth` aligned layers started alike, `v = u0^(1/D)`, on the loss `lam/2 (u - s/lam)^2`; `s = lam zbar + sqrt(lam)
    eps` for a mode of section 3. Depth 1 is exponential, depth 2 logistic; deeper ones invert the time as a function of
    `u`, which is in closed form. All end at `s / lam`, strong modes first.

    Args:
        lam, s, u0: broadcast; `lam > 0`, and for depths above 1 `s` and `u0` of one sign, as the product of equal
            weights keeps it.
        times: in units of the flow.

    Raises:
        ValueError: for other values of these, `depth < 1` or negative times.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    times = checked_times(times)
    given = torch.broadcast_tensors(*(torch.as_tensor(each, dtype=torch.float64) for each in (lam, s, u0)))
    return _products(given[0], given[1], given[2], depth, times)


def _products(lam: Tensor, s: Tensor, u0: Tensor, depth: int, times: Tensor) -> Tensor:
    if not ((lam > 0) & torch.isfinite(lam)).all():
        raise ValueError("lam must be positive and finite: modes without an eigenvalue stay at u0")
    if not (torch.isfinite(s) & torch.isfinite(u0)).all():
        raise ValueError("s and u0 must be finite")
    if depth > 1 and not (s * u0 > 0).all():
        raise ValueError("s and u0 must not be zero and must have one sign where depth is above 1")
    t = times.reshape((-1,) + (1,) * lam.ndim)
    end = s / lam
    if depth == 1:
        return end + (u0 - end) * torch.exp(-lam * t)
    if depth == 2:
        return end / (1 + torch.expm1((u0 / end).log().neg()) * torch.exp(-2 * s.abs() * t))
    # With p = (u / end)^(1/D): F(p) - F(p0) = D lam |end|^(2 - 2/D) t, where F' = D / (p^(D-1) (1 - p^D)).
    p0 = (u0 / end) ** (1 / depth)
    target = _elapsed(p0, depth) + depth * lam * end.abs() ** (2 - 2 / depth) * t
    # F grows towards p = 1 from either side.
    near, far = p0.expand_as(target), torch.ones_like(target)
    for _ in range(_BISECTIONS):
        middle = (near + far) / 2
        early = _elapsed(middle, depth) < target
        near, far = torch.where(early, middle, near), torch.where(early, far, middle)
    p = torch.where(p0 == 1, 1.0, (near + far) / 2)
    return end * p**depth


def _elapsed(p: Tensor, depth: int) -> Tensor:
    """`F(p)`, an integral of `D / (p^(D-1) (1 - p^D))`, by partial fractions over the roots of unity, for `D >= 3`."""
    total = -depth / (depth - 2) * p ** (2 - depth) - (1 - p).abs().log()
    for k in range(1, depth):
        root = cmath.exp(2j * math.pi * k / depth)
        total = total - (root**-2 * torch.log(1 - root * p.to(torch.complex128))).real
    return total

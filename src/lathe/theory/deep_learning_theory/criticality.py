"""Critical initialisation: the (C_b, C_W) at which signals and gradients neither explode nor vanish with depth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import brentq

from lathe.core.gaussian import Activation, ActivationLike, activation
from lathe.theory.deep_learning_theory.single import Moments

__all__ = ["CriticalPoint", "NoCriticalPoint", "critical_point", "critical_points"]

#: Kernel values among which a critical point is looked for.
_GRID = np.logspace(-3, 4, 400)


class NoCriticalPoint(ValueError):
    """No choice of (C_b, C_W) makes the activation critical; the message says why."""


@dataclass(frozen=True)
class CriticalPoint:
    """A critical initialisation and how networks behave there.

    Attributes:
        C_b: variance of the biases.
        C_W: variance of the weights times their fan-in.
        K_star: fixed point of the kernel; None where any kernel is a fixed point (scale invariance).
        universality: "scale-invariant", "K*=0" or "half-stable".
        a1: curvature of the flow at zero, `s_3/s_1 + (3/4)(s_2/s_1)^2`; None away from the class K*=0.
        b1: `s_3/s_1 + (s_2/s_1)^2`; None away from the class K*=0.
        p_perp: `chi_perp ~ 1 - p_perp / l` deep in the network; zero under scale invariance. None for half-stable
            points: their flow is so slow (GELU: `chi_par'(K*) = -3e-4`) that no network reaches its power law.
        nu: growth of fluctuations, `V / (n K^2) -> nu l / n`.
    """

    C_b: float
    C_W: float
    K_star: float | None
    universality: str
    a1: float | None
    b1: float | None
    p_perp: float | None
    nu: float


def critical_point(act: ActivationLike) -> CriticalPoint:
    """The critical initialisation of an activation, found from the activation itself.

    Where there are several, the first of `critical_points`.

    Raises:
        NoCriticalPoint: with the reason, e.g. for sigmoid, softplus, the perceptron and powers above one.
    """
    return critical_points(act)[0]


def critical_points(act: ActivationLike) -> list[CriticalPoint]:
    """All critical initialisations with a kernel in `[1e-3, 1e4]`, those towards which the kernel flows down first.

    A fixed point `K* = C_b + C_W <s^2>` with `chi_par = chi_perp = 1` there: first scale invariance is tested, then
    `K* = 0` (its kernel must attract, `a_1 < 0`), then the roots of `<s s''>_K` are searched.

    Raises:
        NoCriticalPoint: where there is none, with the reason.
    """
    s = activation(act)
    slopes = _scale_invariant(s)
    if slopes is not None:
        return [_scale_invariant_point(*slopes)]
    at_zero = _at_zero(s)
    if isinstance(at_zero, CriticalPoint):
        return [at_zero]
    from_above: list[CriticalPoint] = []
    from_below: list[CriticalPoint] = []
    refused = [at_zero]
    roots = _roots(s)
    for K in roots:
        try:
            point, attracts_above = _half_stable_point(s, K)
        except NoCriticalPoint as reason:
            refused.append(str(reason))
        else:
            (from_above if attracts_above else from_below).append(point)
    if not roots:
        refused.append(f"chi_par = chi_perp nowhere between K = {_GRID[0]:g} and {_GRID[-1]:g}")
    if not from_above + from_below:
        raise NoCriticalPoint(f"{s.name} has no critical initialisation: {'; '.join(refused)}")
    return from_above + from_below


def _scale_invariant(s: Activation) -> tuple[float, float] | None:
    """The two slopes if `s(c z) = c s(z)` for all `c > 0` on a grid, else None."""
    if s.slopes is not None:
        return s.slopes
    one = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    c = torch.logspace(-3, 3, 25, dtype=torch.float64).unsqueeze(-1)
    a_minus, a_plus = (s(one) * one).tolist()
    if not torch.allclose(s(c * one), c * s(one), rtol=1e-10, atol=0) or a_minus == a_plus == 0:
        return None
    return a_minus, a_plus


def _scale_invariant_point(a_minus: float, a_plus: float) -> CriticalPoint:
    a2, a4 = (a_plus**2 + a_minus**2) / 2, (a_plus**4 + a_minus**4) / 2
    return CriticalPoint(0.0, 1 / a2, None, "scale-invariant", None, None, p_perp=0.0, nu=3 * a4 / a2**2 - 1)


def _at_zero(s: Activation) -> CriticalPoint | str:
    zero = torch.zeros(1, dtype=torch.float64)
    s0, s1 = s(zero).item(), s.derivative(zero).item()
    if abs(s0) > 1e-12:
        return f"K = 0 is no fixed point as s(0) = {s0:.3g}"
    if abs(s1) < 1e-12:
        return "K = 0 is not critical as s'(0) = 0"
    if 0.0 in s.kinks:
        return "K = 0 is not critical as s' or s'' jumps at 0"
    s2, s3 = s.derivative(zero, 2).item(), s.derivative(zero, 3).item()
    a1, b1 = s3 / s1 + 0.75 * (s2 / s1) ** 2, s3 / s1 + (s2 / s1) ** 2
    if not a1 < 0:
        return f"the kernel is driven away from K = 0 as a_1 = {a1:.3g} is not negative"
    return CriticalPoint(0.0, 1 / s1**2, 0.0, "K*=0", a1, b1, p_perp=b1 / a1, nu=2 / 3)


def _gap(s: Activation, K: torch.Tensor) -> torch.Tensor:
    """`<s s''>/<s'^2>`: zero where chi_par = chi_perp. By parts, so that kinks need no second derivative."""
    m = Moments(s, K)
    return (m["zsd"] / K - m["dd"]) / m["dd"].clamp_min(1e-300)


def _roots(s: Activation) -> list[float]:
    gap = _gap(s, torch.tensor(_GRID)).numpy()
    # Below this the gap is rounding, not a sign.
    gap = np.where(np.abs(gap) < 1e-11, 0.0, gap)
    changes = np.nonzero(gap[:-1] * gap[1:] < 0)[0]

    def at(K: float) -> float:
        return _gap(s, torch.tensor(K, dtype=torch.float64)).item()

    return [brentq(at, _GRID[i], _GRID[i + 1], xtol=1e-13, rtol=1e-14) for i in changes]


def _half_stable_point(s: Activation, K: float) -> tuple[CriticalPoint, bool]:
    """The critical point at a root `K`, and whether the kernel flows to it from above."""
    step = 1e-3 * K
    # Central differences of fourth order for the slopes of the two susceptibilities.
    grid = K + step * torch.tensor([0.0, -2.0, -1.0, 1.0, 2.0], dtype=torch.float64)
    m = Moments(s, grid)
    C_W = (1 / m["dd"][0]).item()
    C_b = K - C_W * m["ss"][0].item()
    if C_b < -1e-12 * K:
        raise NoCriticalPoint(f"chi_par = chi_perp at K = {K:.4g} would need a negative C_b = {C_b:.3g}")
    stencil = torch.tensor([0.0, 1.0, -8.0, 8.0, -1.0], dtype=torch.float64) / (12 * step)
    par_slope = C_W * (stencil @ (m["zsd"] / grid)).item()
    nu = C_W**2 * (m["ssss"][0] - m["ss"][0] ** 2).item() / K**2
    # K' - K* = d + chi_par'(K*) d^2 / 2: from above (d > 0) the kernel comes down to K* where that slope is negative.
    return CriticalPoint(max(C_b, 0.0), C_W, K, "half-stable", None, None, p_perp=None, nu=nu), par_slope < 0

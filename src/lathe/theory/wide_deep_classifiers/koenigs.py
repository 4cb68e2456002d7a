"""The singular kernel: the limit of the deep kernels up to scale, Koenigs' function of the dual activation at zero."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from scipy.interpolate import CubicSpline
from torch import Tensor

from lathe.core.gaussian import ActivationLike
from lathe.theory.wide_deep_classifiers.dual import DualActivation, as_dual
from lathe.theory.wide_deep_classifiers.tables import SMALLEST, GapTable

__all__ = ["Koenigs", "koenigs"]

#: Points an octave at which log psi is computed before a spline fills the table.
_COARSE = 48


def koenigs(phi: ActivationLike | DualActivation) -> Koenigs:
    """`psi(xi) = lim_L Sigma_L(xi) / a^L` with `a = dual'(0)`, for an activation of the singular class.

    `K_L / (L a^L)` has the same limit. `psi(dual(xi)) = a psi(xi)`, `psi(xi) = xi + O(xi^2)`, and near one
    `psi ~ |x - z|^-alpha`.

    Raises:
        ValueError: where `E phi != 0` or `E phi' = 0`: depth then leads to a majority vote or the nearest neighbour.
    """
    return Koenigs(as_dual(phi))


class Koenigs:
    """The singular kernel of one activation, as a function of `xi = <x, z>` or of the gap `e = 1 - xi`.

    Attributes:
        dual: the activation.
        a, b: `dual'(0)` and `dual'(1)`.
        p: `psi(1 - e) ~ e^-p`; half of `alpha`.
    """

    def __init__(self, dual: DualActivation) -> None:
        if dual.lead != 1:
            kind = "majority vote (E phi != 0)" if dual.lead == 0 else "nearest neighbour (E phi = E phi' = 0)"
            raise ValueError(
                f"phi ({dual.name}) must have E phi = 0 and E phi' != 0 for a singular kernel; its limit is the {kind}"
            )
        self.dual = dual
        self.a, self.b = dual.A_prime**2, dual.B_prime
        if not dual.linear and self.b < 1 + 1e-4:
            raise ValueError(f"phi ({dual.name}) is too close to linear: E phi'^2 = {self.b:.8g} must be above 1.0001")
        self.p = 0.0 if dual.linear else -math.log(self.a) / math.log(self.b)
        self._tables: dict[torch.device, GapTable] = {}

    def __call__(self, xi: Float[Tensor, "*shape"], *, log: bool = False) -> Float[Tensor, "*shape"]:
        """`psi(xi)`, infinite at 1; with `log` its logarithm, which needs `xi >= 0`.

        Near `xi = 1` only the gap tells how far from one it is: use `of_gap` there.

        Raises:
            ValueError: for `xi` outside of [-1, 1], and for `xi < 0` with `log`.
        """
        xi = xi.double()
        if not ((xi >= -1) & (xi <= 1)).all():
            raise ValueError("xi must be in [-1, 1]")
        if log:
            if (xi < 0).any():
                raise ValueError("xi must not be negative where the logarithm of psi is asked for")
            return self.of_gap(1 - xi, log=True)
        sign, logarithm = self.signed(1 - xi)
        return sign * logarithm.exp()

    def of_gap(self, e: Float[Tensor, "*shape"], *, log: bool = False) -> Float[Tensor, "*shape"]:
        """`psi(1 - e)` for gaps `e = |x - z|^2 / 2` in [0, 1], to full accuracy however small they are.

        Raises:
            ValueError: for gaps outside of [0, 1].
        """
        e = e.double()
        if not ((e >= 0) & (e <= 1)).all():
            raise ValueError("e must be in [0, 1]")
        logarithm = self.log_ratio(e) + torch.log1p(-e)
        return logarithm if log else logarithm.exp()

    def signed(self, e: Float[Tensor, "*shape"]) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
        """Sign and logarithm of the absolute value at gaps in [0, 2]: `xi` may be negative."""
        e = e.double()
        if self.dual.odd:
            gap = torch.minimum(e, 2 - e)
            return torch.where(e > 1, -1.0, 1.0).to(e), self.log_ratio(gap) + torch.log1p(-gap)
        xi, steps = 1 - e, torch.zeros_like(e)
        # Even terms lift a negative xi above zero sooner or later, or it dies out as a power of a.
        while (below := xi < -1e-17).any():
            xi = torch.where(below, self.dual.value(xi), xi)
            steps = steps + below
        gap = torch.where(steps > 0, 1 - xi, e)
        dead = gap > 1
        gap = torch.where(dead, 1.0, gap)
        logarithm = torch.where(dead, xi.abs().log(), self.log_ratio(gap) + torch.log1p(-gap))
        return torch.where(dead, -1.0, 1.0).to(e), logarithm - steps * math.log(self.a)

    def log_ratio(self, e: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """`log(psi(xi) / xi)` at gaps in [0, 1]: zero at `e = 1`, infinite at `e = 0`, smooth in between."""
        if self.dual.linear:
            return torch.zeros_like(e)
        flat = e.reshape(-1)
        gap = flat.clamp_min(1e-300)
        log_a, log_b = math.log(self.a), math.log(self.b)
        # Where g(e) = b e to rounding, all such steps are taken at once.
        jump = ((math.log(1e-14) - gap.log()) / log_b).floor().clamp_min(0)
        gap = gap * (jump * log_b).exp()
        steps = jump
        while (near := gap < 0.1).any():
            gap = torch.where(near, self.dual.gap(gap), gap)
            steps = steps + near
        xi = 1 - gap
        # psi(xi) = xi times the product of dual(xi_k) / (a xi_k) over the iterates xi_k of dual.
        total = torch.log1p(-gap) - torch.log1p(-flat) - steps * log_a
        while True:
            excess = self.dual.excess(xi)
            total = total + torch.log1p(excess)
            if excess.numel() == 0 or excess.max() < 1e-17:
                break
            xi = self.a * xi * (1 + excess)
        total = torch.where(flat == 1, 0.0, torch.where(flat == 0, math.inf, total))
        return total.reshape(e.shape)

    def table(self, device: torch.device) -> GapTable:
        """`log_ratio` at the cost of a shift of bits and two gathers, with an error below 3e-7; made once a device."""
        if device not in self._tables:
            # The error of a chord is p (relative width of a piece)^2 / 8.
            pieces = 1 << max(10, math.ceil(math.log2(1024 * math.sqrt(self.p / 2))) if self.p else 10)
            t = np.linspace(math.log(SMALLEST), 41 * math.log(2), 145 * _COARSE + 1)
            v = torch.from_numpy(np.exp(t))
            spline = CubicSpline(t, self.log_ratio(v / (1 + v)).numpy())
            self._tables[device] = GapTable(
                lambda e: torch.from_numpy(spline((e.log() - torch.log1p(-e)).numpy())),
                SMALLEST,
                pieces=pieces,
                degree=1,
                device=device,
            )
        return self._tables[device]

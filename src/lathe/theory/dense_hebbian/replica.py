"""Replica-symmetric theory at any temperature: retrieval and spin-glass solutions, their pressures, phase diagrams.

Equations are those of large N at `K = 2 gamma N^{P-1} / P!` patterns of M examples with entropy rho, P even, inverse
temperature `beta' = 2 beta / P!`. With v = 1 + sqrt(rho) g the average of a site's examples over r,

    V = E v tanh(A v + sqrt(C) x)      A = beta' (P/2) (1+rho)^{-P/2} V^{P-1}
    q = E tanh^2                       C = beta'^2 gamma (P/2) q^{P-1}, at P = 2 beta^2 gamma q / (1 - beta (1-q))^2
    m = E tanh                         n = V / (1+rho)

where g and x are standard normal. (At P = 2 the cross-talk acts back on itself, which has to be summed up.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import binom
from torch import Tensor

from lathe.theory.dense_hebbian.moments import log_cosh_mean, sech4_mean, tanh_means
from lathe.theory.dense_hebbian.patterns import dataset_entropy

__all__ = ["PHASES", "RSState", "phase_diagram", "replica_symmetric", "replica_symmetric_examples"]

#: What the numbers of `phase_diagram` mean.
PHASES = ("ergodic", "spin glass", "metastable retrieval", "retrieval")
#: Overlap from which a state counts as retrieved.
_RETRIEVED = 0.05


@dataclass(frozen=True)
class RSState:
    """A solution of the self-consistency equations, one an entry of the batch.

    Attributes:
        m: overlap with the archetype, which the network has not seen.
        q: overlap of two replicas.
        n: overlap with the examples' average, in units of its mean.
        pressure: `-beta f`, a spin; at temperature zero the energy gained, in units of `1 / beta'`.
        converged: whether the iteration settled.
        at_stable: whether the solution is stable against breaking the symmetry of replicas (de Almeida-Thouless).
    """

    m: Float[Tensor, "*batch"]
    q: Float[Tensor, "*batch"]
    n: Float[Tensor, "*batch"]
    pressure: Float[Tensor, "*batch"]
    converged: Bool[Tensor, "*batch"]
    at_stable: Bool[Tensor, "*batch"]


def replica_symmetric(
    P: int,
    beta_prime: float | Float[Tensor, "*b"],
    gamma: float | Float[Tensor, "*g"],
    rho: float | Float[Tensor, "*r"] = 0.0,
    *,
    branch: Literal["retrieval", "spin-glass"] = "retrieval",
    tolerance: float = 1e-12,
    max_iterations: int = 100_000,
) -> RSState:
    """The solution that iteration reaches from the archetype ("retrieval") or from m = 0, q = 1 ("spin-glass").

    Arguments broadcast. Past the spinodal "retrieval" ends in a state with m = 0, which is the answer. Near it the
    iteration is slow; `converged` says where it did not settle. With poor data at low temperature it may miss a
    retrieval state in the last percents below `critical_load`.

    Raises:
        ValueError: for an odd P, P < 2, a beta_prime that is not positive and finite, or a gamma or rho that is
            negative or not finite.
    """
    check_theory(P, beta_prime, gamma, rho)
    beta, loads, entropy = torch.broadcast_tensors(*(as_float64(each) for each in (beta_prime, gamma, rho)))
    shape = beta.shape
    law = Gaussian(entropy.reshape(-1))
    return _solve(P, beta.reshape(-1), loads.reshape(-1), law, branch, tolerance, max_iterations, shape)


def replica_symmetric_examples(
    P: int,
    beta_prime: float | Float[Tensor, "*b"],
    gamma: float | Float[Tensor, "*g"],
    r: float,
    M: int,
    *,
    branch: Literal["retrieval", "spin-glass"] = "retrieval",
    tolerance: float = 1e-12,
    max_iterations: int = 100_000,
) -> RSState:
    """As `replica_symmetric`, with the exact binomial law of M examples in place of a Gaussian: better for small M.

    Raises:
        ValueError: as there, and for r outside (0, 1] or M < 1.
    """
    check_theory(P, beta_prime, gamma, dataset_entropy(r, M))
    beta, loads = torch.broadcast_tensors(as_float64(beta_prime), as_float64(gamma))
    shape = beta.shape
    law = Binomial(r, M)
    return _solve(P, beta.reshape(-1), loads.reshape(-1), law, branch, tolerance, max_iterations, shape)


def phase_diagram(P: int, rho: float, gammas: Float[Tensor, " G"], temps: Float[Tensor, " T"]) -> Int[Tensor, "T G"]:
    """The phase at each load and temperature `T' = 1 / beta'`; numbers index `PHASES`.

    "Retrieval": the pressure of the retrieval solution is the largest. "Metastable retrieval": there is such a
    solution, and a memory that starts close by stays there. Without: "spin glass" where a solution with q > 0 has the
    lower replica-symmetric pressure (which bounds the true one from above), else "ergodic".

    Raises:
        ValueError: as `replica_symmetric`, and for temperatures that are not positive.
    """
    if not (torch.isfinite(temps) & (temps > 0)).all():
        raise ValueError(
            "temps must be positive and finite; critical_load(..., temperature=0.0) takes temperature zero"
        )
    check_theory(P, 1.0, gammas, rho)
    gamma, T = torch.broadcast_tensors(as_float64(gammas), as_float64(temps).unsqueeze(1))
    shape, beta, gamma = gamma.shape, (1 / T).reshape(-1), gamma.reshape(-1)
    law = Gaussian(torch.full_like(beta, rho), order=31)
    # What has not settled by then is within 1e-4 of a spinodal's load.
    retrieval = _solve(P, beta, gamma, law, "retrieval", 1e-6, 400, shape, classes_only=True)
    pressure, glass = disordered(P, beta, gamma, order=31)
    retrieved = retrieval.m > _RETRIEVED
    stable = retrieved & (retrieval.pressure > pressure.reshape(shape))
    phase = glass.reshape(shape).to(torch.int64)
    return torch.where(stable, 3, torch.where(retrieved, 2, phase))


def disordered(P: int, beta: Tensor, gamma: Tensor, *, order: int = 101) -> tuple[Tensor, Tensor]:
    """Pressure of the state without overlaps, and whether it is a spin glass; batches of one dimension."""
    zero = torch.zeros_like(beta)
    width, q = (1 + gamma.sqrt()) * beta, torch.ones_like(beta)
    width = torch.maximum(width, _width(P, beta, gamma, q, zero)[0])
    at = torch.arange(len(beta), device=beta.device)
    # The widest field that reproduces itself. The map is concave there, so that secants from above stay above.
    b, g, D = beta, gamma, width
    last, change = D, torch.full_like(D, math.inf)
    for step in range(4000):
        q_ = tanh_means(torch.zeros_like(D), D, order)[1]
        fresh = _width(P, b, g, q_, D)[0]
        moved = fresh - D
        secant = D - moved * (D - last) / (moved - change)
        good = torch.isfinite(secant) & (secant >= 0) & (secant <= fresh) & (step % 2 == 1)
        last, change, D = D, moved, torch.where(good, secant, fresh)
        if step % 4 == 3:
            width[at], q[at] = D, q_
            left = (moved.abs() > 1e-12 * (1 + D)) & (D > 1e-4)
            at = at[left]
            if not len(at):
                break
            b, g, D, last, change = b[left], g[left], D[left], last[left], change[left]
    law = Gaussian(zero, order)
    frozen = free_pressure(P, beta, gamma, zero, q, width, law, zero)
    ergodic = free_pressure(P, beta, gamma, zero, zero, zero, law, zero)
    # At P = 2 the paramagnet ends where the spin glass begins.
    glass = (q > 1e-4) & ((frozen <= ergodic) | (P == 2))
    return torch.where(glass, frozen, ergodic), glass


class Gaussian:
    """v = 1 + sqrt(rho) g, for each entry of a batch its own rho."""

    def __init__(self, rho: Tensor, order: int = 101) -> None:
        self.rho, self.order = rho, order

    def of(self, at: Tensor) -> Gaussian:
        return Gaussian(self.rho[at], self.order)

    def averages(self, A: Tensor, width: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`E tanh`, `E v tanh` (integrated by parts) and `E tanh^2`, the cross-talk `width` wide."""
        m, q = tanh_means(A, self._total(A, width), self.order)
        return m, m + self.rho * A * (1 - q), q

    def log_cosh(self, A: Tensor, width: Tensor) -> Tensor:
        return log_cosh_mean(A, self._total(A, width), self.order)

    def sech4(self, A: Tensor, width: Tensor) -> Tensor:
        return sech4_mean(A, self._total(A, width))

    def _total(self, A: Tensor, width: Tensor) -> Tensor:
        return (self.rho * A * A + width * width).sqrt()


class Binomial:
    """v = (2 k / M - 1) / r, k of M examples right, each with probability (1 + r) / 2."""

    def __init__(self, r: float, M: int) -> None:
        k = torch.arange(M + 1, dtype=torch.float64)
        self.v, self.p = (2 * k / M - 1) / r, torch.as_tensor(binom.pmf(k.numpy(), M, (1 + r) / 2))
        self.rho = torch.tensor(dataset_entropy(r, M), dtype=torch.float64)

    def of(self, at: Tensor) -> Binomial:
        return self

    def averages(self, A: Tensor, width: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t, t2 = tanh_means(*self._fields(A, width))
        return t @ self.p, t @ (self.p * self.v), t2 @ self.p

    def log_cosh(self, A: Tensor, width: Tensor) -> Tensor:
        return log_cosh_mean(*self._fields(A, width)) @ self.p

    def sech4(self, A: Tensor, width: Tensor) -> Tensor:
        return sech4_mean(*self._fields(A, width)) @ self.p

    def _fields(self, A: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        mean = A.unsqueeze(1) * self.v
        return mean, width.unsqueeze(1).expand_as(mean)


Law = Gaussian | Binomial


def signal(P: int, beta: Tensor, V: Tensor, rho: Tensor) -> Tensor:
    """A, the mean field on a site whose examples are all right, over the average of the examples."""
    return beta * (P / 2) * (1 + rho) ** (-P / 2) * V ** (P - 1)


def _width(P: int, beta: Tensor, gamma: Tensor, q: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """The width sqrt(C) of the other patterns' field, and its slope, squared, by which fluctuations grow.

    At P = 2 the fixed points of `D <- beta sqrt(gamma q) + beta (1-q) D` are those of C, and are approached evenly.
    """
    if P == 2:
        loose = beta * (1 - q)
        return beta * (gamma * q).sqrt() + loose * width, gamma * (beta / (1 - loose).clamp_min(1e-9)) ** 2
    unit = beta**2 * gamma * (P / 2)
    return (unit * q ** (P - 1)).sqrt(), unit * (P - 1) * q ** (P - 2)


def _solve(
    P: int,
    beta: Tensor,
    gamma: Tensor,
    law: Law,
    branch: str,
    tolerance: float,
    max_iterations: int,
    shape: torch.Size,
    *,
    classes_only: bool = False,
) -> RSState:
    """Iterates (V, width); entries that have settled are left out of the next steps.

    With `classes_only` entries whose overlap is lost are not followed further, and stability is not asked for.
    """
    if branch not in ("retrieval", "spin-glass"):
        raise ValueError(f"branch must be 'retrieval' or 'spin-glass', got {branch!r}")
    rho = law.rho.expand_as(beta)
    V = (1 + rho if branch == "retrieval" else torch.zeros_like(beta)).clone()
    q, m = torch.ones_like(beta), torch.zeros_like(beta)
    D = _width(P, beta, gamma, q, torch.zeros_like(beta))[0]
    at = torch.arange(len(beta), device=beta.device)
    converged = torch.zeros_like(beta, dtype=torch.bool)
    V_, D_, b, g, e, some = V, D, beta, gamma, rho, law
    for step in range(max_iterations):
        m_, V_new, q_ = some.averages(signal(P, b, V_, e), D_)
        V_new = V_new.clamp_min(0)  # rounding may take what has faded below
        D_new = _width(P, b, g, q_, D_)[0]
        moved = torch.maximum((V_new - V_).abs(), (D_new - D_).abs() / (1 + D_new))
        # The signal follows slowly, or it would be lost to the noise that the start, q = 1, exaggerates.
        V_, D_ = (V_ + V_new) / 2, D_new
        done = moved <= tolerance
        if classes_only:
            done |= V_new < 0.4 * _RETRIEVED
        if step % 8 == 7 or step == max_iterations - 1 or bool(done.all()):
            V[at], q[at], D[at], m[at], converged[at] = V_, q_, D_, m_.clamp_min(0), done
            left = ~done
            at = at[left]
            if not len(at):
                break
            V_, D_, b, g, e, some = V_[left], D_[left], b[left], g[left], e[left], some.of(left)
    pressure = free_pressure(P, beta, gamma, V, q, D, law, rho)
    at_stable = converged
    if not classes_only:
        at_stable = _width(P, beta, gamma, q, D)[1] * law.sech4(signal(P, beta, V, rho), D) < 1
    return RSState(*(each.reshape(shape) for each in (m, q, V / (1 + rho), pressure, converged, at_stable)))


def free_pressure(
    P: int, beta: Tensor, gamma: Tensor, V: Tensor, q: Tensor, D: Tensor, law: Law, rho: Tensor
) -> Tensor:
    pressure = law.log_cosh(signal(P, beta, V, rho), D) - (P - 1) * (beta / 2) * (1 + rho) ** (-P / 2) * V**P
    if P == 2:
        left = (1 - beta * (1 - q)).clamp_min(1e-9)
        return pressure - gamma / 2 * (left.log() - beta * q / left) - D * D * (1 - q) / 2 - beta * gamma / 2
    return pressure + beta**2 * gamma / 4 * (1 - P * q ** (P - 1) + (P - 1) * q**P)


def check_theory(
    P: int,
    beta_prime: float | Tensor = 1.0,
    gamma: float | Tensor = 0.0,
    rho: float | Tensor = 0.0,
) -> None:
    """Whether the theory is about these."""
    if P < 2 or P % 2:
        raise ValueError(f"P must be even and at least 2, for which the theory is made, got {P}")
    beta, load, entropy = as_float64(beta_prime), as_float64(gamma), as_float64(rho)
    if not (torch.isfinite(beta) & (beta > 0)).all():
        raise ValueError(
            f"beta_prime must be positive and finite, got {beta.min().item():g}; zero_temperature is its limit"
        )
    for name, value in (("gamma, the load,", load), ("rho, the entropy of the data,", entropy)):
        if not (torch.isfinite(value) & (value >= 0)).all():
            raise ValueError(f"{name} must be finite and not negative, got {value.min().item():g}")


def as_float64(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)

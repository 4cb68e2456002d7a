"""How much fits: temperature zero in closed form, critical loads, samples needed, and which order P to choose.

Solutions of the self-consistency equations form a curve on which the load is an explicit function (of the field's
signal-to-noise ratio at temperature zero, of the signal above); its highest point is the spinodal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from scipy.special import erfinv
from torch import Tensor

from lathe.theory.dense_hebbian.moments import absolute_mean
from lathe.theory.dense_hebbian.patterns import dataset_entropy, load
from lathe.theory.dense_hebbian.replica import (
    Gaussian,
    RSState,
    as_float64,
    check_theory,
    disordered,
    free_pressure,
    replica_symmetric,
)

__all__ = ["Design", "best_order", "critical_load", "one_step_overlap", "samples_needed", "zero_temperature"]


def one_step_overlap(
    P: int,
    gamma: float | Float[Tensor, "*g"],
    rho: float | Float[Tensor, "*r"] = 0.0,
    *,
    self_interaction: bool = False,
) -> Float[Tensor, "*batch"]:
    """Overlap with the archetype after all spins, started there, have aligned with their fields once.

    Exact for many spins, without replicas: `erf(a / (D sqrt 2))`, `a = (P/2)(1+rho)^{-P/2}`,
    `D^2 = rho a^2 + gamma P/2`, the last term `(2P-3)!! / (P-1)!` times that where indices may coincide.

    Raises:
        ValueError: for an odd P, P < 2, or a gamma or rho that is negative or not finite.
    """
    check_theory(P, gamma=gamma, rho=rho)
    load_, rho_ = torch.broadcast_tensors(as_float64(gamma), as_float64(rho))
    more = math.prod(range(2 * P - 3, 0, -2)) / math.factorial(P - 1) if self_interaction else 1.0
    a = (P / 2) * (1 + rho_) ** (-P / 2)
    return torch.erf(a / (2 * (rho_ * a * a + more * load_ * P / 2)).sqrt())


def samples_needed(r: float, overlap: float) -> float:
    """Examples a pattern for this overlap at low load and temperature zero, `2 (1/r^2 - 1) erfinv(m)^2`; round up.

    The memory then returns the majority vote of the examples, whatever P.

    Raises:
        ValueError: for r outside (0, 1] or an overlap outside [0, 1).
    """
    dataset_entropy(r, 1)
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must lie in [0, 1), got {overlap}")
    return 2 * (1 / r**2 - 1) * float(erfinv(overlap)) ** 2


def zero_temperature(P: int, gamma: float | Float[Tensor, "*g"], rho: float | Float[Tensor, "*r"] = 0.0) -> RSState:
    """The retrieval solution at temperature zero; q is 1. Past the spinodal m is 0.

    Raises:
        ValueError: for an odd P, P < 2, or a gamma or rho that is negative or not finite.
    """
    check_theory(P, gamma=gamma, rho=rho)
    loads, entropy = torch.broadcast_tensors(as_float64(gamma), as_float64(rho))
    V, C = 1 + entropy, torch.zeros_like(loads)  # C: the susceptibility beta (1 - q), which only P = 2 feels
    for _ in range(100_000):
        a, D = _cold_field(P, V, C, loads, entropy)
        u = a / D
        V_new = torch.erf(u / math.sqrt(2)) + 2 * entropy * _weighted(u)
        C_new = (2 * _density(u) / D).clamp_max(1 - 1e-9) if P == 2 else C
        moved = torch.maximum((V_new - V).abs(), (C_new - C).abs())
        V, C = V_new, (C + C_new) / 2
        if not (moved > 1e-14).any():
            break
    a, D = _cold_field(P, V, C, loads, entropy)
    settled, gone = moved < 1e-9, V < 1e-6
    m, V = (torch.where(gone, 0.0, each) for each in (torch.erf(a / D / math.sqrt(2)), V))
    gain = _cold_pressure(P, a, D, V, C, loads, entropy)
    return RSState(m, torch.ones_like(V), V / (1 + entropy), gain, settled | gone, loads == 0)


def critical_load(
    P: int,
    rho: float = 0.0,
    temperature: float = 0.0,
    kind: Literal["spinodal", "thermodynamic"] = "spinodal",
) -> float:
    """The largest load gamma at which the memory retrieves, at temperature `T' = 1 / beta'`; 0 where it never does.

    Args:
        kind: "spinodal": a retrieval state exists, so that a start close to it stays; "thermodynamic": it also has
            the largest pressure.

    Raises:
        ValueError: for an odd P, P < 2, a rho or temperature that is negative or not finite, or another kind.
    """
    check_theory(P, rho=rho)
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be finite and not negative, got {temperature}")
    if kind not in ("spinodal", "thermodynamic"):
        raise ValueError(f"kind must be 'spinodal' or 'thermodynamic', got {kind!r}")
    curve: Callable[[Tensor], tuple[Tensor, Callable[[], Tensor]]]
    if temperature == 0:
        top = math.log(1 / math.sqrt(rho)) if rho > 0 else math.log(12.0)

        def curve(t: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
            return _cold_curve(P, t.exp(), rho)

        low = min(math.log(0.05), top - 3)
    else:
        top = math.log((P / 2) * (1 + rho) ** (P / 2 - 1) / temperature)

        def curve(t: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
            return _warm_curve(P, t.exp(), 1 / temperature, rho)

        low = min(math.log(0.02), top - 3)
    peak, height = _first_peak(lambda t: curve(t)[0], low, top)
    if height <= 0 or kind == "spinodal":
        return max(0.0, height)
    # From the peak to the top the load falls to zero and the retrieval state gains on the disordered one.
    left, right, found = peak, top, height
    for _ in range(6):
        t = torch.linspace(left, right, 33, dtype=torch.float64)
        gammas, lead = curve(t)
        wins = (lead() >= 0) | (gammas < 0)  # what lies beyond no load at all is past the transition, if there is one
        first = int(wins.to(torch.uint8).argmax()) if wins.any() else len(t) - 1
        if first == 0:
            break
        left, right, found = t[first - 1].item(), t[first].item(), gammas[first - 1].item()
    return max(0.0, found)


def _first_peak(f: Callable[[Tensor], Tensor], low: float, high: float) -> tuple[float, float]:
    """Where and how high the first maximum of `f` is, seen from `high`, by grids that close in on it.

    Poor data at low temperature may have solutions of a second, weaker kind at a smaller signal, where other patterns
    are not retrieved either; a start at the archetype does not reach them.
    """
    left, right, count = low, high, 300
    for _ in range(6):
        t = torch.linspace(left, right, count, dtype=torch.float64)
        values = f(t)
        falls = (values[:-1] < values[1:]) & (values[1:] > 0)
        best = int(falls.nonzero()[-1, 0]) + 1 if falls.any() else int(values.argmax())
        left, right, count = t[max(0, best - 1)].item(), t[min(count - 1, best + 1)].item(), 25
    return t[best].item(), values[best].item()


def _warm_curve(P: int, A: Tensor, beta: float, rho: float) -> tuple[Tensor, Callable[[], Tensor]]:
    """Load at which A is the signal of a solution (-1 where none), and how far its pressure leads there.

    `V` follows from A, and then the noise from V, which decreases in it: `dV/dC = -E v tanh sech^2`, and v is of the
    sign of what multiplies it on average.
    """
    b, entropy = torch.full_like(A, beta), torch.full_like(A, rho)
    law = Gaussian(entropy)
    V = (A * (1 + rho) ** (P / 2) / (beta * P / 2)) ** (1 / (P - 1))
    zero = torch.zeros_like(A)
    possible = law.averages(A, zero)[1] >= V
    low, high = zero, (1 + rho) * A * math.sqrt(2 / math.pi) / V
    for _ in range(60):
        middle = (low + high) / 2
        above = law.averages(A, middle)[1] > V
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    D = (low + high) / 2
    q = law.averages(A, D)[2]
    if P == 2:
        left = 1 - beta * (1 - q)
        gammas, possible = (D * left / beta) ** 2 / q, possible & (left > 0)
    else:
        gammas = D * D / (beta**2 * (P / 2) * q ** (P - 1))
    gammas = torch.where(possible, gammas, -1.0)
    safe = gammas.clamp_min(0)
    return gammas, lambda: free_pressure(P, b, safe, V, q, D, law, entropy) - disordered(P, b, safe)[0]


def _cold_curve(P: int, u: Tensor, rho: float) -> tuple[Tensor, Callable[[], Tensor]]:
    """As `_warm_curve`, of `u = a / D` at temperature zero, where everything is explicit."""
    entropy = torch.full_like(u, rho)
    V = torch.erf(u / math.sqrt(2)) + 2 * rho * _weighted(u)
    a = (P / 2) * (1 + rho) ** (-P / 2) * V ** (P - 1)
    D = a / u
    C = 2 * _density(u) / D if P == 2 else torch.zeros_like(u)
    gammas = (D * D - rho * a * a) * (1 - C) ** 2 / (P / 2)
    gammas = torch.where(C < 1, gammas, -1.0)
    safe = gammas.clamp_min(0)
    lead = _cold_pressure(P, a, D, V, C, safe, entropy)
    if P == 2:
        width = safe.sqrt() + math.sqrt(2 / math.pi)
        loose = math.sqrt(2 / math.pi) / width
    else:
        width, loose = (safe * P / 2).sqrt(), torch.zeros_like(u)
    zero = torch.zeros_like(u)
    return gammas, lambda: lead - _cold_pressure(P, zero, width, zero, loose, safe, entropy)


def _cold_field(P: int, V: Tensor, C: Tensor, gamma: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and width of the fields at temperature zero, in units of `1 / beta'`."""
    a = (P / 2) * (1 + rho) ** (-P / 2) * V ** (P - 1)
    return a, (rho * a * a + gamma * (P / 2) / (1 - C) ** 2).sqrt().clamp_min(1e-150)


def _cold_pressure(P: int, a: Tensor, D: Tensor, V: Tensor, C: Tensor, gamma: Tensor, rho: Tensor) -> Tensor:
    gain = absolute_mean(a, D) - (P - 1) / 2 * (1 + rho) ** (-P / 2) * V**P
    if P == 2:
        gain = gain + gamma / 2 * (1 / (1 - C) - C / (1 - C) ** 2 - 1)
    return gain


def _density(u: Tensor) -> Tensor:
    return torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)


def _weighted(u: Tensor) -> Tensor:
    """`u phi(u)`, also where u is infinite."""
    u = u.clamp_max(40)
    return u * _density(u)


@dataclass(frozen=True)
class Design:
    """What each order P would retrieve.

    Attributes:
        orders: the orders compared.
        gamma: the load of each.
        m: predicted overlap with the archetype, 0 past the capacity.
        best: the smallest order within 0.001 of the largest.
    """

    orders: tuple[int, ...]
    gamma: Float[Tensor, " orders"]
    m: Float[Tensor, " orders"]
    best: int


def best_order(
    N: int, K: int, M: int, r: float, *, temperature: float = 0.0, orders: Sequence[int] = (2, 4, 6, 8, 10)
) -> Design:
    """Which P retrieves K patterns of N spins best, each known from M examples of quality r.

    Take r from `estimate_quality`, if it is not known. `temperature` is T' = 1 / beta'. For patterns that have nothing
    in common: images of one kind share a background, which asks for a larger P or for `recentre`.

    Raises:
        ValueError: for K < 1, orders that are odd or exceed N, or r, M or a temperature out of range.
    """
    if K < 1:
        raise ValueError(f"K must be at least 1, got {K}")
    if not orders:
        raise ValueError("orders must name at least one P")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be finite and not negative, got {temperature}")
    rho = dataset_entropy(r, M)
    for P in orders:
        check_theory(P)
    gammas = [load(K, N, P) for P in orders]
    solved = [
        replica_symmetric(P, 1 / temperature, gamma, rho) if temperature else zero_temperature(P, gamma, rho)
        for P, gamma in zip(orders, gammas)
    ]
    m = torch.stack([state.m for state in solved])
    best = orders[int((m >= m.max() - 1e-3).to(torch.uint8).argmax())]
    return Design(tuple(orders), torch.tensor(gammas, dtype=torch.float64), m, best)

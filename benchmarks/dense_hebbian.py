"""P-body Monte Carlo against explicit tensors and against dynamics that know overlaps only; a phase diagram in seconds.

The explicit tensor is what one writes first: J of N^P entries, one contraction with the state a spin. The parallel
dynamics are those of RobinTher/Dense_Associative_Network (Thériault and Tantari, "Dense Hopfield networks in the
teacher-student setting", arXiv 2401.04191, JAX), restated in plain torch: all overlaps anew each step, the field of the
distinct-index energy to leading order in 1/N, and Glauber flips of a random batch of spins.
"""

from __future__ import annotations

import math

import torch
from harness import Pair
from scipy.optimize import root
from torch import Tensor

from lathe.theory.dense_hebbian import DenseHebbian, phase_diagram, replica_symmetric

P = 4


def memory(K: int, N: int, seed: int = 0) -> tuple[DenseHebbian, Tensor]:
    xi = 2.0 * torch.randint(0, 2, (K, N), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1
    return DenseHebbian(xi, P), xi


def explicit_tensor(xi: Tensor) -> Tensor:
    K, N = xi.shape
    pairs = (xi.unsqueeze(2) * xi.unsqueeze(1)).reshape(K, N * N)
    J = (pairs.T @ pairs).reshape(N, N, N, N) * float(N) ** (1 - P)
    i = torch.arange(N)
    distinct = torch.ones(N, N, N, N, dtype=torch.bool)
    for a in range(P):
        for b in range(a):
            shape = [1] * P
            shape[a] = N
            other = [1] * P
            other[b] = N
            distinct &= i.reshape(shape) != i.reshape(other)
    return J * distinct


def sequential() -> Pair:
    """Ten sweeps of Glauber dynamics over 64 spins that hold 2,000 patterns, one chain."""
    N, K, beta, sweeps = 64, 2000, 12 / 0.3, 10
    network, xi = memory(K, N)
    J = explicit_tensor(xi)
    start = xi[:1].clone()
    start[:, :3] *= -1

    def ours() -> Tensor:
        return network.sample(start, beta, sweeps, generator=torch.Generator().manual_seed(1))

    def peer() -> Tensor:
        s, generator = start[0].clone(), torch.Generator().manual_seed(1)
        for _ in range(sweeps):
            u = torch.rand(1, N, dtype=torch.float64, generator=generator)[0]
            for i in range(N):
                h = J[i]
                for _ in range(P - 1):
                    h = h @ s
                if u[i] < 1 / (1 + torch.exp(2 * beta * s[i] * h / math.factorial(P - 1))):
                    s[i] = -s[i]
        return s.unsqueeze(0)

    title = f"{sweeps} Glauber sweeps, N = {N}, P = {P}, K = {K}"
    return Pair(title, ours, peer, "explicit tensor, contracted for each spin", target=100.0, tolerance=1e-9)


def parallel() -> Pair:
    """Ten sweeps of parallel dynamics on random halves, 100 chains over 500 patterns of 256 spins."""
    N, K, B, steps, beta = 256, 500, 100, 10, 12 / 0.3
    network, xi = memory(K, N)
    flips = torch.rand(B, N, generator=torch.Generator().manual_seed(2)) < 0.1
    start = torch.where(flips, -xi[:B], xi[:B])

    def ours() -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return network.sample(start, beta, steps, update="parallel", generator=generator) @ xi[0]

    def peer() -> Tensor:
        generator = torch.Generator().manual_seed(3)
        s = start.T.clone()  # spins first, as there
        for _ in range(2 * steps):  # half of the spins a step
            overlaps = xi @ s / N
            batch = torch.randperm(N, generator=generator)[: N // 2]
            # Half the energy a flip costs, to leading order: -(1/6) xi (m^3 - 3 m / N), coincident pairs taken out.
            h = -(xi[:, batch].T @ ((overlaps**2 - 3 / N) * overlaps)) / math.factorial(P - 1)
            cost = 2 * h * s[batch]
            accept = torch.rand(cost.shape, dtype=torch.float64, generator=generator) <= torch.sigmoid(beta * cost)
            s[batch] *= 1 - 2 * accept.double()
        return s.T @ xi[0]

    title = f"{steps} parallel sweeps, {B} chains, N = {N}, K = {K}"
    return Pair(title, ours, peer, "RobinTher/Dense_Associative_Network restated in torch", target=1.0, tolerance=1e-6)


def solver() -> list[Pair]:
    """Self-consistency equations on a grid of loads and temperatures, against scipy a point; and a whole diagram."""
    # Not colder: there the peer's 151 nodes no longer resolve tanh.
    loads = torch.linspace(0.01, 0.2, 100, dtype=torch.float64)
    temps = torch.linspace(0.4, 0.8, 100, dtype=torch.float64)
    few = slice(0, 100, 5)

    def grid(gammas: Tensor, T: Tensor) -> Tensor:
        return replica_symmetric(P, 1 / T.unsqueeze(1), gammas, 0.0, tolerance=1e-9).m

    z, w = (torch.tensor(each) for each in _hermite(151))

    def point(gamma: float, beta: float) -> float:
        def equations(x: list[float]) -> list[float]:
            m, q = x
            field = beta * 2 * m**3 + beta * math.sqrt(2 * gamma * abs(q) ** 3) * z
            t = torch.tanh(field)
            return [(t @ w).item() - m, (t * t @ w).item() - q]

        return float(root(equations, [1.0, 1.0]).x[0])

    def peer() -> Tensor:
        return torch.tensor([[point(g, 1 / T) for g in loads[few].tolist()] for T in temps[few].tolist()])

    def whole() -> Tensor:
        return phase_diagram(P, 0.0, torch.linspace(0, 0.6, 100), torch.linspace(0.01, 1, 100)).double().mean()

    def one_second() -> float:
        return 1.0

    def timed() -> float:
        import time

        start = time.perf_counter()
        whole()
        return time.perf_counter() - start

    return [
        Pair(
            "replica-symmetric solutions, 20 x 20 points", lambda: grid(loads[few], temps[few]), peer,
            "scipy.optimize.root, a point at a time", target=1.0, tolerance=1e-6,
        ),
        Pair(
            "a phase diagram of 100 x 100 points, both branches", timed, one_second, "one second",
            target=1.0, tolerance=None, timed=False,
        ),
    ]  # fmt: skip


def _hermite(order: int) -> tuple[list[float], list[float]]:
    from numpy.polynomial.hermite_e import hermegauss

    nodes, weights = hermegauss(order)
    return nodes.tolist(), (weights / weights.sum()).tolist()


def pairs() -> list[Pair]:
    return [sequential(), parallel(), *solver()]

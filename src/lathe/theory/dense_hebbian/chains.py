"""The state of several chains over one memory: exact P-body fields of many spins at a time, and cheap flips.

With `x = G_i s_i` removed from the tables of a pattern, the field of spin i is
`sum_k (-s_i)^{k-1} sum_mu G_{mu,i}^k e_{P-k}(mu)`, k = 1 .. P: products of a matrix of powers with the chains' tables.
The tables follow from power sums, of which the even ones never change and the odd ones take one addition a flip; for
patterns of signs everything depends on one whole number a pattern, and the tables are looked up.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lathe.theory.dense_hebbian.symmetric import elementary_symmetric, elementary_symmetric_of_signs

if TYPE_CHECKING:
    from lathe.theory.dense_hebbian.network import DenseHebbian

__all__ = ["Chains", "averaged", "contract"]

#: Entries of patterns of signs up to which they are kept in float64 while chains run (128 MiB).
_WIDE = 1 << 24


class Chains:
    """Chains of spins `s` (B, N), float64, which `flip` changes in place."""

    def __init__(self, memory: DenseHebbian, s: Tensor, *, mean: bool = False) -> None:
        self.memory, self.s, self.P, self.N = memory, s, memory.P, memory.N
        self.signs, self.mean = memory.signs, mean
        full = self.full = memory.self_interaction or mean
        #: What k-th powers of a removed spin count: 1 for distinct indices, 2^(k-1) / k! where indices may coincide.
        self.counts = [2.0 ** (k - 1) / math.factorial(k) if full else 1.0 for k in range(1, self.P + 1)]
        if self.signs:
            # Many patterns stay bytes, and are widened a block at a time.
            wide = memory.patterns.numel() <= _WIDE
            self.rows = memory.patterns.to(s).T if wide else memory.patterns.T.contiguous()
            self.weights = memory.weights * (self.N * memory.second_moment) ** (-self.P / 2)
            # Exact: sums of N signs are whole numbers that float64 holds.
            self.sums = (s @ self.rows if wide else s @ memory.patterns.to(s).T).unsqueeze(1)
            self._look_up()
        else:
            scale = (self.N * memory.second_moment).rsqrt()
            self.rows = memory.patterns.T * scale
            self.weights = memory.weights
            orders = range(1, 2 if full else self.P + 1)
            sums = {k: s @ self.rows**k if k % 2 else (self.rows**k).sum(0) for k in orders}
            self.even = {k: value for k, value in sums.items() if k % 2 == 0}
            self.odd = [k for k in orders if k % 2]
            self.sums = torch.stack([sums[k] for k in self.odd], 1)
        self.constant = self.N ** (1 - self.P / 2)
        every = torch.arange(len(s), device=s.device)
        self.tables = self._tables(every)

    def _look_up(self) -> None:
        e = elementary_symmetric_of_signs(self.N, self.P, self.s.device)
        if self.full:
            e = torch.stack([e[1] ** k / math.factorial(k) for k in range(self.P + 1)])
        self.top = e[self.P]
        if self.mean:
            self.by_sum = torch.stack([e[self.P - 1], torch.zeros_like(self.top)])
            return
        self.by_sum = torch.stack(
            [sum(self.counts[k - 1] * e[self.P - k] for k in range(first, self.P + 1, 2)) for first in (1, 2)]  # type: ignore[misc]
        )

    def _polynomials(self, chains: Tensor) -> list[Tensor]:
        """`e_0 .. e_P` (or `p_1^k / k!` where indices may coincide) of every pattern, each (chains, K)."""
        sums = self.sums[chains]
        if self.full:
            return [sums[:, 0] ** k / math.factorial(k) for k in range(self.P + 1)]
        power_sums = [
            self.even[k].expand(sums[:, 0].shape) if k % 2 == 0 else sums[:, k // 2] for k in range(1, self.P + 1)
        ]
        return elementary_symmetric(power_sums)

    def _tables(self, chains: Tensor) -> tuple[Tensor, Tensor]:
        """What odd and even powers of a spin's pattern entries are multiplied with."""
        if self.signs:
            place = ((self.sums[chains, 0] + self.N) * 0.5).long()
            odd, even = self.by_sum[0][place], self.by_sum[1][place]
            return odd.mul_(self.weights), (even @ self.weights).unsqueeze(1)
        e = self._polynomials(chains)
        if self.mean:
            return e[self.P - 1] * self.weights, e[0][:, :1] * 0
        odd, even = (
            torch.cat([self.counts[k - 1] * e[self.P - k] * self.weights for k in range(first, self.P + 1, 2)], 1)
            for first in (1, 2)
        )
        return odd, even

    def energy(self) -> Tensor:
        """(B,)."""
        if self.signs:
            place = ((self.sums[:, 0] + self.N) * 0.5).long()
            total = self.top[place] @ self.weights
        else:
            total = self._polynomials(torch.arange(len(self.s), device=self.s.device))[self.P] @ self.weights
        energy = -self.constant * total
        if self.memory.couplings is not None:
            energy = energy - (self.s * contract(self.memory.couplings, self.s)).sum(1) / self.P
        return energy

    def open(self, sites: slice | Tensor) -> None:
        """Makes the fields of these spins ready to be asked for."""
        self.sites = sites
        rows = self.rows[sites].to(self.s)
        self.left: tuple[Tensor, Tensor | None]
        if self.signs or self.mean:
            self.left = (rows.T, None)
        else:
            powers = [rows]
            for _ in range(1, self.P):
                powers.append(powers[-1] * rows)
            self.left = (torch.cat(powers[::2], 1).T, torch.cat(powers[1::2], 1).T)

    def field(self, chains: Tensor | None = None) -> Tensor:
        """Fields of the open spins, (chains, sites), for all chains or those listed."""
        odd, even = self.tables
        s = self.s
        if chains is not None:
            odd, even, s = odd[chains], even[chains], s[chains]
        here = s[:, self.sites]
        right = even if self.left[1] is None else even @ self.left[1]
        h = torch.addcmul(odd @ self.left[0], here, right, value=-1.0).mul_(self.constant)
        if self.memory.couplings is not None:
            h = h + contract(self.memory.couplings[self.sites], s)
        return h

    def flip(self, chains: Tensor, sites: Tensor) -> None:
        """Flips one spin in each of the chains listed."""
        before = self.s[chains, sites]
        self.s[chains, sites] = -before
        row = self.rows[sites].to(self.s)
        change = [row] if self.signs else [row**k for k in self.odd]
        self.sums[chains] -= 2 * before[:, None, None] * torch.stack(change, 1)
        for table, fresh in zip(self.tables, self._tables(chains)):
            table[chains] = fresh

    def flip_open(self, wanted: Tensor) -> None:
        """Flips the open spins where `wanted` (B, sites), all at once."""
        sites = torch.arange(self.N, device=self.s.device)[self.sites]
        moved = wanted.any(0)
        chains, sites = wanted.any(1).nonzero()[:, 0], sites[moved]
        if not len(chains):
            return
        here = self.s[chains.unsqueeze(1), sites]
        change = torch.where(wanted[chains][:, moved], -2 * here, 0.0)
        self.s[chains.unsqueeze(1), sites] = here + change
        rows = self.rows[sites].to(self.s)
        powers = [rows] if self.signs else [rows**k for k in self.odd]
        self.sums[chains] += torch.stack([change @ power for power in powers], 1)
        for table, fresh in zip(self.tables, self._tables(chains)):
            table[chains] = fresh


def averaged(memory: DenseHebbian, m: Tensor) -> tuple[Tensor, Tensor]:
    """Energy (B,) and field (B, N), its gradient with a minus, of independent spins with averages `m` (B, N)."""
    P, N = memory.P, memory.N
    G = memory.patterns.to(m).T * (N * memory.second_moment.to(m)).rsqrt()
    powers = [G]
    for _ in range(1, P):
        powers.append(powers[-1] * G)
    if memory.self_interaction:
        n = m @ G
        e = [n**k / math.factorial(k) for k in range(P + 1)]
    else:
        e = elementary_symmetric([m ** (k + 1) @ power for k, power in enumerate(powers)])
    weights, constant = memory.weights.to(m), N ** (1 - P / 2)
    h = (e[P - 1] * weights) @ G.T
    if not memory.self_interaction:
        for k in range(2, P + 1):
            h = torch.addcmul(h, (-m) ** (k - 1), (e[P - k] * weights) @ powers[k - 1].T)
    energy, h = -constant * (e[P] @ weights), constant * h
    if memory.couplings is not None:
        extra = contract(memory.couplings, m)
        energy, h = energy - (m * extra).sum(1) / P, h + extra
    return energy, h


def contract(couplings: Tensor, s: Tensor) -> Tensor:
    """`sum_{i_2 < ... < i_P} J_{i, i_2 .. i_P} s_{i_2} ... s_{i_P}`, J symmetric: (rows, N, ..., N) -> (B, rows)."""
    N, P = s.shape[1], couplings.ndim
    columns = s.T.to(couplings)
    left = couplings.reshape(-1, N) @ columns
    for _ in range(P - 2):
        left = (left.reshape(-1, N, len(s)) * columns).sum(1)
    return left.T.to(s) / math.factorial(P - 1)

"""One sweep with exact fields, the mean field, and one step of the TAP equations."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lathe.theory.dense_hebbian.chains import Chains, averaged

if TYPE_CHECKING:
    from lathe.theory.dense_hebbian.network import DenseHebbian

__all__ = ["mean_field", "sequential_sweep", "tap_step"]


def sequential_sweep(chains: Chains, thresholds: Tensor, block: int) -> int:
    """Visits all spins in order, flips those with `s_i h_i < thresholds_i`; returns a good `block` for the next sweep.

    Until something flips, fields that were computed together stay right: each round computes the fields of a block for
    all chains that have flipped something in it, and carries out the first flip of each. The result does not depend on
    the size of the blocks.
    """
    s = chains.s
    flips, every = 0, len(s)
    for start in range(0, chains.N, block):
        stop = min(chains.N, start + block)
        chains.open(slice(start, stop))
        sites = torch.arange(start, stop, device=s.device)
        active, at = None, None
        while True:
            here, bars = s[:, start:stop], thresholds[:, start:stop]
            if active is not None:
                here, bars = here[active], bars[active]
            wants = here * chains.field(active) < bars
            if at is not None:
                wants &= sites > at.unsqueeze(1)
            found = wants.any(1).nonzero()[:, 0]
            if not len(found):
                break
            first = sites[wants[found].to(torch.uint8).argmax(1)]
            active = found if active is None else active[found]
            at = first
            chains.flip(active, first)
            flips += len(active)
            if stop - start == 1:
                break
    rate = flips / max(1, every * chains.N)
    return min(128, max(1, round(1 / (rate + 0.01))))


def mean_field(patterns: Tensor, scale: Tensor, P: int, s: Tensor) -> Tensor:
    """`sum_mu scale_mu x_mu n_mu^{P-1} / (P-1)!`, n the overlaps `mean_i x_i s_i`: coincident indices are kept."""
    n = s @ patterns.T / s.shape[1]
    return (n ** (P - 1) * (scale / math.factorial(P - 1))) @ patterns


def tap_step(memory: DenseHebbian, m: Tensor, lagged: Tensor, beta: float, gamma: float) -> Tensor:
    """`m <- tanh(beta h(m) - C (P-1)(1-q) q^{P-2} m_lagged)`, C = beta'^2 gamma P/2 (Plefka's second order).

    The reaction of the other spins acts on the average of a step earlier, without which the iteration does not settle.
    At P = 2 it is summed to all orders, `beta^2 gamma (1-q) / (1 - beta (1-q))`.
    """
    P = memory.P
    q = m.square().mean(1, keepdim=True)
    beta_prime = 2 * beta / math.factorial(P)
    if P == 2:
        reaction = beta**2 * gamma * (1 - q) / (1 - beta * (1 - q)).clamp_min(1e-3)
    else:
        reaction = beta_prime**2 * gamma * (P / 2) * (P - 1) * (1 - q) * q ** (P - 2)
    return torch.tanh(beta * averaged(memory, m)[1] - reaction * lagged)

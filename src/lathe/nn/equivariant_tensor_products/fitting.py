"""Fit of the factors of a field product to the weights of a Clebsch-Gordan product, by alternating least squares."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["fit_factors"]

Key = tuple[int, int, int]
Factors = tuple[list[Tensor], list[Tensor], list[Tensor]]


def fit_factors(
    target: Mapping[Key, Tensor], tables: Mapping[Key, Tensor], start: Factors, iterations: int
) -> tuple[Factors, float]:
    """Factors a, b, c such that sum_(rst, z) k[r, s, t] a[r, u, z] b[s, v, z] c[t, w, z] is nearest to the weights.

    Args:
        target: for each path the weights (u, v, w); a path that is missing has weight 0.
        tables: for each path the coefficients k of its embeddings.
        start: for each side and term (embeddings, multiplicity, channels), in float64.
        iterations: sweeps over the three sides; fewer where the error stands still.

    Returns:
        The factors, and the norm of what is left over that of the target.
    """
    factors = [[part.clone() for part in side] for side in start]
    norm = float(torch.stack([weights.square().sum() for weights in target.values()]).sum().sqrt()) if target else 0.0
    if norm == 0.0:
        return ([part.zero_() for part in factors[0]], factors[1], factors[2]), 0.0
    error = float("inf")
    for _ in range(iterations):
        for side in range(3):
            for term in range(len(factors[side])):
                _solve(target, tables, factors, side, term)
        last, error = error, _error(target, tables, factors) / norm
        if error < 1e-12 or last - error < 1e-4 * last:
            break
    return (factors[0], factors[1], factors[2]), error


def _solve(
    target: Mapping[Key, Tensor], tables: Mapping[Key, Tensor], factors: list[list[Tensor]], side: int, term: int
) -> None:
    """The best factor of one term, all others fixed: a linear problem with the same matrix for each of its channels."""
    part = factors[side][term]
    rows, wanted = [], []
    first, second = (other for other in range(3) if other != side)
    for key, table in tables.items():
        if key[side] != term or not table.any():
            continue
        left, right = factors[first][key[first]], factors[second][key[second]]
        design = torch.einsum("rst,svz,twz->vwrz", table.movedim(side, 0), left, right)
        rows.append(design.flatten(2).flatten(0, 1))
        weights = target.get(key)
        goal = (
            part.new_zeros(part.shape[1], left.shape[1], right.shape[1])
            if weights is None
            else weights.movedim(side, 0)
        )
        wanted.append(goal.flatten(1).T)
    if rows:
        solution = torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted), driver="gelsd").solution
        part.copy_(solution.T.unflatten(1, (part.shape[0], part.shape[2])).transpose(0, 1))


def _error(target: Mapping[Key, Tensor], tables: Mapping[Key, Tensor], factors: list[list[Tensor]]) -> float:
    total = 0.0
    for key, table in tables.items():
        parts = [factors[side][key[side]] for side in range(3)]
        left = target.get(key, 0.0) - torch.einsum("rst,ruz,svz,twz->uvw", table, *parts)
        total += float(left.square().sum())
    return total**0.5

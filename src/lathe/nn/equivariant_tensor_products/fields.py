"""Fields that irreps can be written as, and their point-wise products: the Gaunt, matrix and vector-signal products.

A field is a set of values in which an irrep is embedded linearly (the values of a signal on a grid of the sphere, of a
vector field, the entries of a matrix), such that a simple product of fields is equivariant. A slot is one embedding of
an irrep: a scalar signal offers one, vector fields offer one for each degree l of the harmonics V^l_j.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lathe.nn.equivariant_tensor_products.harmonics import (
    coupling,
    grid_arrays,
    spherical_harmonics,
    vector_spherical_harmonics,
)
from lathe.nn.equivariant_tensor_products.irreps import Irrep

__all__ = ["Field", "Fields", "MatrixFields", "Slot", "SphereFields", "multiply", "slot_coefficients"]

Array = NDArray[np.float64]
Kind = Literal["mul", "dot", "cross", "matmul"]


class Field(NamedTuple):
    """Rank 0: a scalar signal; 1: a vector field; 2: a matrix. A signal of sign s gives degree l the parity s (-1)**l.

    Sign 1 is natural, -1 pseudoscalar; a vector field of sign -1 is polar, of sign 1 axial. The sign of a matrix is the
    parity of its irreps.
    """

    rank: int
    sign: int


class Slot(NamedTuple):
    """An irrep in a field, built from scalars of degree l."""

    irrep: Irrep
    field: Field
    l: int


class SphereFields:
    """Scalar signals and vector fields on one grid, exact for every product of three of them.

    Args:
        couplings: "signal" (scalar times scalar, the Gaunt product), "dot", "cross", "scalar" (scalar times vector).
        signs: the signs that vector fields may have.
        slots1, slots2, slots3: which irreps will be embedded, to choose the grid.
    """

    def __init__(self, couplings: Sequence[str], signs: Sequence[int] = (1, -1)) -> None:
        self.couplings, self.signs = tuple(couplings), tuple(signs)
        self.degree = 0

    def resolve(self, *slots: Iterable[Slot]) -> None:
        """Chooses the smallest grid on which the products of these slots are integrated exactly."""
        self.degree = sum(max((slot.l for slot in each), default=0) for each in slots)

    def slots(self, irrep: Irrep) -> list[Slot]:
        """Every embedding of an irrep."""
        found = []
        if {"signal", "dot", "scalar"} & set(self.couplings):
            found.append(Slot(irrep, Field(0, irrep.p * (-1) ** irrep.l), irrep.l))
        if {"dot", "cross", "scalar"} & set(self.couplings):
            for l in range(abs(irrep.l - 1), irrep.l + 2):
                sign = irrep.p * (-1) ** l
                if sign in self.signs:
                    found.append(Slot(irrep, Field(1, sign), l))
        return found

    def products(self) -> list[tuple[Field, Field, Kind, Field]]:
        """Which fields multiply to which."""
        found: list[tuple[Field, Field, Kind, Field]] = []
        kinds: dict[str, list[tuple[int, int, Kind, int]]] = {
            "signal": [(0, 0, "mul", 0)],
            "dot": [(1, 1, "dot", 0)],
            "cross": [(1, 1, "cross", 1)],
            "scalar": [(0, 1, "mul", 1), (1, 0, "mul", 1)],
        }
        for coupling_name in self.couplings:
            for rank1, rank2, kind, rank3 in kinds[coupling_name]:
                for a, b in itertools.product((1, -1), repeat=2):
                    found.append((Field(rank1, a), Field(rank2, b), kind, Field(rank3, a * b)))
        return found

    def embedding(self, slot: Slot) -> Array:
        """(irrep, components, points): the field of each basis vector."""
        return _on_grid(self.degree, slot.l, slot.irrep.l, slot.field.rank)

    def projection(self, slot: Slot) -> Array:
        """(components, points, irrep): the integral against each basis vector's field."""
        weighted = self.embedding(slot) * grid_arrays(self.degree)[1]
        return weighted.transpose(1, 2, 0)


class MatrixFields:
    """Matrices that turn under rotations from both sides; degree l is the part of them that turns as degree l.

    Args:
        space: "single": the space of spin t. "stacked": the sum of the spins 0 to t, as in e3x.
        t: spin; matrices of spin t hold degrees up to 2t.
    """

    def __init__(self, space: Literal["single", "stacked"], t: int) -> None:
        self.space, self.t = space, t

    @property
    def size(self) -> int:
        """Rows of the matrices."""
        return 2 * self.t + 1 if self.space == "single" else (self.t + 1) ** 2

    def resolve(self, *slots: Iterable[Slot]) -> None:
        """Matrices of spin t need no grid."""

    def slots(self, irrep: Irrep) -> list[Slot]:
        """The one embedding of an irrep, none where its degree exceeds 2t."""
        return [Slot(irrep, Field(2, irrep.p), irrep.l)] if irrep.l <= 2 * self.t else []

    def products(self) -> list[tuple[Field, Field, Kind, Field]]:
        """Parities multiply."""
        return [(Field(2, a), Field(2, b), "matmul", Field(2, a * b)) for a, b in itertools.product((1, -1), repeat=2)]

    def embedding(self, slot: Slot) -> Array:
        """(irrep, 1, entries): the matrix of each basis vector."""
        return _matrices(self.space, self.t, slot.l)

    def projection(self, slot: Slot) -> Array:
        """(1, entries, irrep)."""
        return self.embedding(slot).transpose(1, 2, 0)


Fields = SphereFields | MatrixFields


def multiply(kind: Kind, f: Tensor, g: Tensor) -> Tensor:
    """A product of two fields (..., components, points)."""
    if kind == "mul":
        return f * g
    if kind == "dot":
        return (f * g).sum(-2, keepdim=True)
    if kind == "cross":
        (a, b, c), (d, e, h) = f.unbind(-2), g.unbind(-2)  # torch.linalg.cross strides over the points
        return torch.stack([b * h - c * e, c * d - a * h, a * e - b * d], -2)
    size = math.isqrt(f.shape[-1])
    return (f.unflatten(-1, (size, size)) @ g.unflatten(-1, (size, size))).flatten(-2)


def slot_coefficients(
    fields: Fields, firsts: Sequence[Slot], seconds: Sequence[Slot], thirds: Sequence[Slot]
) -> dict[tuple[Slot, Slot, Slot], float]:
    """What the product of two slots, projected on a third, is as a multiple of the Clebsch-Gordan tensor.

    By Schur's lemma one number says it, which is found from the product of one random vector of each irrep. Where a
    triple is missing, it is zero.
    """
    rng = np.random.default_rng(0)
    probes1, probes2 = (
        {slot.irrep.l: rng.standard_normal(slot.irrep.dim) for slot in each} for each in (firsts, seconds)
    )
    found: dict[tuple[Slot, Slot, Slot], float] = {}
    for field1, field2, kind, field3 in fields.products():
        left, right, out = (
            [slot for slot in each if slot.field == field]
            for each, field in ((firsts, field1), (seconds, field2), (thirds, field3))
        )
        if not (left and right and out):
            continue
        f = torch.from_numpy(np.stack([np.tensordot(probes1[s.irrep.l], fields.embedding(s), 1) for s in left]))
        g = torch.from_numpy(np.stack([np.tensordot(probes2[s.irrep.l], fields.embedding(s), 1) for s in right]))
        back = torch.from_numpy(np.concatenate([fields.projection(s) for s in out], 2)).flatten(0, 1)
        answers = (multiply(kind, f[:, None], g[None]).flatten(2) @ back).split([s.irrep.dim for s in out], -1)
        for (a, first), (b, second) in itertools.product(enumerate(left), enumerate(right)):
            for third, answer in zip(out, answers):
                if third.irrep in first.irrep * second.irrep:
                    table = coupling(first.irrep.l, second.irrep.l, third.irrep.l)
                    one = np.tensordot(probes2[second.irrep.l], np.tensordot(probes1[first.irrep.l], table, 1), 1)
                    value = float(answer[a, b].numpy() @ one / (one @ one))
                    if abs(value) > 1e-12:
                        key = (first, second, third)
                        found[key] = found.get(key, 0.0) + value
    return found


@functools.lru_cache(maxsize=1024)
def _on_grid(degree: int, l: int, j: int, rank: int) -> Array:
    points = torch.from_numpy(grid_arrays(degree)[0])
    if rank == 0:
        return spherical_harmonics(l, points)[:, l * l :].T[:, None].numpy().copy()
    return vector_spherical_harmonics(l, j, points).permute(1, 2, 0).numpy().copy()


@functools.lru_cache(maxsize=256)
def _matrices(space: str, t: int, l: int) -> Array:
    if space == "single":
        return np.ascontiguousarray(coupling(t, t, l).transpose(2, 0, 1)).reshape(2 * l + 1, 1, -1)
    size = (t + 1) ** 2
    matrices = np.zeros((2 * l + 1, size, size))
    for a, b in itertools.product(range(t + 1), repeat=2):
        if abs(a - b) <= l <= a + b:
            block = coupling(a, b, l).transpose(2, 0, 1) * math.sqrt((2 * a + 1) * (2 * b + 1))
            matrices[:, a * a : (a + 1) ** 2, b * b : (b + 1) ** 2] = block
    return matrices.reshape(2 * l + 1, 1, -1)

"""Multiplication tables of known algebras as tensors A, and how far the spans of two such tensors lie apart.

`A[i, a, b]` is the e_a component of the product e_i e_b: A[i] is left multiplication by the basis element e_i.
"""

from __future__ import annotations

import re

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["algebra_span_angles", "algebra_tensor"]

# The seven quaternionic lines of the octonions: e_i e_j = e_k, cyclically (Cayley-Dickson doubling of the quaternions).
_OCTONION_LINES = ((1, 2, 3), (1, 4, 5), (1, 7, 6), (2, 4, 6), (2, 5, 7), (3, 4, 7), (3, 6, 5))


def algebra_tensor(name: str, *, dtype: torch.dtype | None = None) -> Float[Tensor, "n n n"]:
    """Left multiplication by each basis element of an algebra.

    Args:
        name: "real", "complex", "quaternion" (or "hamilton"), "octonion", or "clifford(p,q)": p generators square to
            +1, q to -1, and the 2**(p + q) blades are ordered by the binary number of the generators in them
            (1, e1, e2, e1 e2, e3, ...), so that clifford(0,1) is "complex" and clifford(0,2) "quaternion".

    Raises:
        ValueError: where the name is none of these.
    """
    clifford = re.fullmatch(r"clifford\(\s*(\d+)\s*,\s*(\d+)\s*\)", name)
    if clifford:
        return _clifford(int(clifford[1]), int(clifford[2]), dtype)
    if name == "octonion":
        return _octonion(dtype)
    generators = {"real": 0, "complex": 1, "quaternion": 2, "hamilton": 2}.get(name)
    if generators is None:
        raise ValueError(
            f"algebra must be 'real', 'complex', 'quaternion', 'hamilton', 'octonion' or 'clifford(p,q)', got {name!r}"
        )
    return _clifford(0, generators, dtype)


def _clifford(p: int, q: int, dtype: torch.dtype | None) -> Tensor:
    size = 2 ** (p + q)
    A = torch.zeros(size, size, size, dtype=dtype)
    for i in range(size):
        for b in range(size):
            # Moving b's generators past those of i that stand higher costs a sign each; a square of the last q too.
            swaps = sum((i >> shift).bit_count() for g in range(p + q) if b >> g & 1 for shift in [g + 1])
            negative_squares = ((i & b) >> p).bit_count()
            A[i, i ^ b, b] = (-1.0) ** (swaps + negative_squares)
    return A


def _octonion(dtype: torch.dtype | None) -> Tensor:
    A = torch.zeros(8, 8, 8, dtype=dtype)
    A[0] = torch.eye(8)
    for i in range(1, 8):
        A[i, i, 0], A[i, 0, i] = 1.0, -1.0
    for line in _OCTONION_LINES:
        for turn in range(3):
            i, j, k = line[turn], line[(turn + 1) % 3], line[(turn + 2) % 3]
            A[i, k, j], A[j, k, i] = 1.0, -1.0
    return A


def algebra_span_angles(A: Float[Tensor, "terms n n"], B: Float[Tensor, "other_terms n n"]) -> Float[Tensor, " angles"]:
    """Principal angles, in radians and ascending, between span{A_i} and span{B_i}.

    A layer's weight does not change when its A_i are mixed by any invertible matrix and its F_i by the inverse: where
    both were learnt, only the span of the A_i means something. All angles 0: the layer can be written in B's algebra.
    The angle is taken from its cosine or its sine, whichever is accurate.

    Raises:
        ValueError: where the matrices of A and B differ in size, or one of them spans nothing.
    """
    if A.ndim != 3 or B.ndim != 3 or A.shape[1:] != B.shape[1:]:
        raise ValueError(f"A and B must hold matrices of one size, got {tuple(A.shape)} and {tuple(B.shape)}")
    P, Q = _orthonormal(A), _orthonormal(B)
    if P.shape[1] < Q.shape[1]:
        P, Q = Q, P
    cosines = torch.linalg.svdvals(P.T @ Q).clamp(max=1.0)
    sines = torch.linalg.svdvals(Q - P @ (P.T @ Q)).flip(0).clamp(max=1.0)
    return torch.where(cosines**2 > 0.5, sines.asin(), cosines.acos())


def _orthonormal(A: Tensor) -> Tensor:
    """Columns that span vec(A_i), in float64."""
    left, values, _ = torch.linalg.svd(A.detach().double().flatten(1).T, full_matrices=False)
    rank = int((values > values[:1] * max(left.shape) * torch.finfo(A.dtype).eps).sum())
    if rank == 0:
        raise ValueError("the matrices of an algebra span nothing: they are all zero")
    return left[:, :rank]

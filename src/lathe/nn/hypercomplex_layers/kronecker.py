"""Sums of Kronecker products: `H = sum_i A_i (x) F_i` built in one matrix product, and the best such sum for a given H.

Legend: m terms, n components, s outputs, d inputs, k the kernel's positions (1 for a matrix);
A is (m, n, n), F is (m, s/n, d/n, *kernel), H is (s, d, *kernel) with
`H[a s/n + p, b d/n + q, k] = sum_i A[i, a, b] F[i, p, q, k]`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lathe.core.precision import at_least_float32, without_autocast

__all__ = ["KroneckerFit", "kronecker_singular_values", "kronecker_sum", "nearest_kronecker_sum"]


def kronecker_sum(
    A: Float[Tensor, "terms rows columns"], F: Float[Tensor, "terms p q *kernel"]
) -> Float[Tensor, "rows*p columns*q *kernel"]:
    """`sum_i A[i] (x) F[i]`, where the Kronecker product acts on the first two dimensions of F[i] only.

    One batched matrix product and one permutation: `terms * s * d * k / n**2` numbers are read and `s * d * k` written,
    and the backward pass keeps A and F alone. Half-precision factors are multiplied in float32 and rounded once.

    Raises:
        ValueError: where A and F differ in their number of terms.

    Source: Grassucci et al. 2021, equation of the PHC layer; for matrices Zhang et al. 2021.
    """
    if A.ndim != 3 or F.ndim < 3 or A.shape[0] != F.shape[0]:
        raise ValueError(
            "A must be (terms, rows, columns) and F (terms, p, q, *kernel) with equal terms, "
            f"got {tuple(A.shape)} and {tuple(F.shape)}"
        )
    dtype = torch.promote_types(A.dtype, F.dtype)
    wide = at_least_float32(dtype)
    _, rows, columns = A.shape
    _, p, q, *kernel = F.shape
    with without_autocast(F.device):
        # A product for each row of filters (p of them): what comes out is in order but for its two outermost
        # dimensions, so that the permutation moves runs of columns * q * k numbers. A is expanded by strides of 0.
        blocks = torch.bmm(A.to(wide).flatten(1).T.expand(p, -1, -1), F.to(wide).flatten(2).transpose(0, 1))
    weight = blocks.unflatten(1, (rows, columns)).transpose(0, 1)
    return weight.reshape(rows * p, columns * q, *kernel).to(dtype)


@dataclass(frozen=True)
class KroneckerFit:
    """A sum of Kronecker products that stands for a weight.

    Args:
        A: the small matrices, (terms, n, n).
        F: the filter blocks, (terms, s/n, d/n, *kernel).
        relative_error: Frobenius norm of what is missing, over that of the weight (0 for a weight of zeros).
        singular_values: of the rearranged weight, all of them, descending, in float64.
    """

    A: Float[Tensor, "terms n n"]
    F: Float[Tensor, "terms p q *kernel"]
    relative_error: float
    singular_values: Float[Tensor, " values"]


def kronecker_singular_values(
    weight: Float[Tensor, "out in *kernel"], n: int, *, groups: int = 1
) -> Float[Tensor, " values"]:
    """Singular values of the rearranged weight, in float64, descending.

    The smallest error of a sum of m Kronecker products is the root of the sum of squares of all but the first m.

    Raises:
        ValueError: where n does not divide both dimensions (per group) of `weight`.
    """
    return torch.linalg.svdvals(_rearranged(weight.detach(), n, groups))


def nearest_kronecker_sum(
    weight: Float[Tensor, "out in *kernel"],
    n: int,
    terms: int | None = None,
    *,
    algebra: Float[Tensor, "terms n n"] | None = None,
    groups: int = 1,
) -> KroneckerFit:
    """The sum of `terms` Kronecker products (n by default) that is nearest to `weight` in the Frobenius norm.

    The weight is rearranged into a matrix with a row for each of the n x n blocks (Van Loan and Pitsianis 1993), where
    a sum of m products is a matrix of rank m: the truncated singular value decomposition is the global optimum
    (Eckart-Young), with each singular value shared evenly by both factors. Computed in float64.

    Args:
        algebra: keeps A as given; F is then the least-squares solution.
        groups: of a grouped convolution, whose weight is (out, in / groups, *kernel); A is shared by the groups.

    Raises:
        ValueError: where n does not divide both dimensions (per group), or terms does not lie in 1 to n**2.
    """
    matrix = _rearranged(weight.detach(), n, groups)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    if algebra is not None:
        if algebra.ndim != 3 or algebra.shape[1:] != (n, n):
            raise ValueError(f"algebra must be (terms, {n}, {n}), got {tuple(algebra.shape)}")
        A = algebra.detach().to(matrix)
        # The pseudo-inverse also serves an algebra whose matrices depend on one another.
        F = torch.linalg.pinv(A.flatten(1).T) @ matrix
    else:
        terms = n if terms is None else terms
        if not 1 <= terms <= n * n:
            raise ValueError(f"terms must lie in 1 to n**2 = {n * n}, got {terms}")
        # A weight with fewer columns than terms has no further products to give: those stay zero.
        kept = min(terms, len(values))
        roots = values[:kept].sqrt()
        A, F = matrix.new_zeros(terms, n, n), matrix.new_zeros(terms, matrix.shape[1])
        A[:kept] = (left[:, :kept] * roots).T.unflatten(1, (n, n))
        F[:kept] = roots[:, None] * right[:kept]
    norm = torch.linalg.vector_norm(matrix)
    missing = torch.linalg.vector_norm(matrix - A.flatten(1).T @ F)
    _, width, *kernel = weight.shape
    return KroneckerFit(
        A.to(weight),
        F.unflatten(1, (weight.shape[0] // n, width // n, *kernel)).to(weight),
        float(missing / norm) if norm > 0 else 0.0,
        values,
    )


def _rearranged(weight: Tensor, n: int, groups: int) -> Tensor:
    """`weight` as a float64 matrix: a row for each block (a, b), a column for each (group, p, q, k)."""
    if weight.ndim < 2:
        raise ValueError(f"weight must have at least two dimensions, got shape {tuple(weight.shape)}")
    out, width, *kernel = weight.shape
    if n < 1 or groups < 1 or out % (groups * n) or width % n:
        raise ValueError(
            f"n = {n} must divide both dimensions of weight in each of {groups} group(s), got {tuple(weight.shape)}"
        )
    blocks = weight.double().reshape(groups, n, out // (groups * n), n, width // n, math.prod(kernel))
    return blocks.permute(1, 3, 0, 2, 4, 5).reshape(n * n, -1)

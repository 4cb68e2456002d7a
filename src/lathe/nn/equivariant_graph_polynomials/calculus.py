"""Arithmetic with the factors of a contraction, dense (a batch of torch matrices) or sparse (one SciPy matrix).

Factors are numbers, vectors over the values of one node's index and matrices over those of two. Every operation is done
once for the same operands, so that the polynomials of a list share what they have in common.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Calculus", "Dense", "Factor", "Sparse"]

# Entries of the largest matrix that a join makes at once: 8 MiB in float64, which stays in the cache of a core.
_CHUNK = 1 << 20


class Factor:
    """A number, vector or matrix; `number` tells it from all others, `lasting` whether it can come up again."""

    __slots__ = ("lasting", "number", "symmetric", "value")
    _numbers = itertools.count()

    def __init__(self, value: Any, *, symmetric: bool = False, lasting: bool = True) -> None:
        self.value, self.symmetric, self.lasting = value, symmetric, lasting
        self.number = next(self._numbers)


class Calculus:
    """What both kinds of arithmetic share: the memory of what was computed."""

    def __init__(self) -> None:
        self._known: dict[Any, Factor] = {}

    def once(self, what: Any, operands: Sequence[Factor], make: Callable[[], Any], symmetric: bool = False) -> Factor:
        """The result of an operation, from memory where it was done before."""
        key = (what, *(operand.number for operand in operands))
        if key not in self._known:
            lasting = all(operand.lasting for operand in operands)
            factor = Factor(make(), symmetric=symmetric, lasting=lasting)
            if not lasting:
                return factor
            self._known[key] = factor
        return self._known[key]

    def transpose(self, matrix: Factor) -> Factor:
        if matrix.symmetric:
            return matrix
        turned = self.once("transpose", [matrix], lambda: self._transposed(matrix.value))
        if turned.lasting:
            self._known["transpose", turned.number] = matrix
        return turned

    def times(self, one: Factor, other: Factor) -> Factor:
        """Entry by entry."""
        first, second = sorted((one, other), key=lambda factor: factor.number)
        symmetric = one.symmetric and other.symmetric
        return self.once("times", [first, second], lambda: self._times(first.value, second.value), symmetric)

    def power(self, factor: Factor, exponent: int) -> Factor:
        result = factor
        for _ in range(exponent - 1):
            result = self.times(result, factor)
        return result

    def diagonal(self, matrix: Factor) -> Factor:
        return self.once("diagonal", [matrix], lambda: self._diagonal(matrix.value))

    def apply(self, matrix: Factor, vector: Factor | None) -> Factor:
        """Matrix times vector; times a vector of ones where there is none."""
        if vector is None:
            return self.once("rows", [matrix], lambda: self._row_sums(matrix.value))
        return self.once("apply", [matrix, vector], lambda: self._apply(matrix.value, vector.value))

    def product(self, left: Factor, vector: Factor | None, right: Factor) -> Factor:
        """left diag(vector) right."""
        operands = [left, right] if vector is None else [left, right, vector]
        symmetric = left.lasting and self.transpose(left) is right
        scale = None if vector is None else vector.value
        return self.once("product", operands, lambda: self._product(left.value, scale, right.value), symmetric)

    _transposed: Callable[[Any], Any]
    _times: Callable[[Any, Any], Any]
    _diagonal: Callable[[Any], Any]
    _row_sums: Callable[[Any], Any]
    _apply: Callable[[Any, Any], Any]
    _product: Callable[[Any, Any, Any], Any]
    add: Callable[[Any, Any], Any]

    def total(self, vector: Factor, rows: Pairs | None) -> Factor:
        """The sum of a vector's entries, for each graph."""
        raise NotImplementedError

    def pairs(self, matrix: Factor, half: bool, width: int, groups: Sequence[Pairs | None]) -> Iterator[Pairs]:
        """The places of a matrix that are not zero, a chunk at a time."""
        raise NotImplementedError

    def rows(self, matrix: Factor, places: Any) -> Factor:
        """The rows of a matrix at these places."""
        raise NotImplementedError

    def entries(self, vector: Factor, places: Any) -> Factor:
        """The entries of a vector at these places."""
        raise NotImplementedError


class Pairs:
    """The values of a joined node's index: row and column in the matrix of the two that were joined, and its entry."""

    __slots__ = ("columns", "graphs", "rows", "weights")

    def __init__(self, rows: Any, columns: Any, weights: Factor, graphs: Any = None) -> None:
        self.rows, self.columns, self.weights, self.graphs = rows, columns, weights, graphs


class Dense(Calculus):
    """Matrices (batch, p, q), vectors (batch, p), numbers (batch,).

    Args:
        X: (batch, n, n) or (batch, n, n, channels), float or int64.
        everywhere: joins run over all pairs and not only over those with X != 0, which gradients need (the derivative
            at a zero is none) and so do compilers, who must know all shapes.
    """

    def __init__(self, X: Tensor, everywhere: bool) -> None:
        super().__init__()
        self.X, self.everywhere = X, everywhere
        self._leaves: dict[int, Factor] = {}

    def leaf(self, channel: int) -> Factor:
        """One channel of X."""
        if channel not in self._leaves:
            matrix = self.X if self.X.ndim == 3 else self.X[..., channel].contiguous()
            # Where derivatives are asked for, an entry and its mirror image are two variables even if they are equal.
            symmetric = not self.everywhere and torch.equal(matrix, matrix.mT)
            self._leaves[channel] = Factor(matrix, symmetric=symmetric)
        return self._leaves[channel]

    def _transposed(self, matrix: Tensor) -> Tensor:
        return matrix.mT

    def _times(self, one: Tensor, other: Tensor) -> Tensor:
        return one * other

    def _diagonal(self, matrix: Tensor) -> Tensor:
        return matrix.diagonal(dim1=-2, dim2=-1)

    def _row_sums(self, matrix: Tensor) -> Tensor:
        return matrix.sum(-1)

    def _apply(self, matrix: Tensor, vector: Tensor) -> Tensor:
        # As a row: with a column, batches of products take four times as long.
        return (vector[..., None, :] @ matrix.mT)[..., 0, :]

    def _product(self, left: Tensor, vector: Tensor | None, right: Tensor) -> Tensor:
        return (left if vector is None else left * vector[..., None, :]) @ right

    def add(self, one: Tensor, other: Tensor) -> Tensor:
        return one + other

    def total(self, vector: Factor, rows: Pairs | None) -> Factor:
        return self.once("total", [vector], lambda: vector.value.sum(-1))

    def pairs(self, matrix: Factor, half: bool, width: int, groups: Sequence[Pairs | None]) -> Iterator[Pairs]:
        values = matrix.value
        batch, p, q = values.shape
        if self.everywhere:
            if half:
                rows, columns = torch.triu_indices(p, q, device=values.device)
            else:
                rows = torch.arange(p, device=values.device).repeat_interleave(q)
                columns = torch.arange(q, device=values.device).repeat(p)
            rows, columns = rows.expand(batch, -1), columns.expand(batch, -1)
            weights = values[:, rows[0], columns[0]] if batch else values.new_zeros(rows.shape)
        else:
            graphs, found, other = (values.triu() if half else values).nonzero(as_tuple=True)
            counts = torch.bincount(graphs, minlength=batch)
            longest = int(counts.max()) if batch else 0
            # Graphs with fewer pairs than others are filled up with pairs of weight zero.
            place = torch.arange(len(graphs), device=values.device) - (counts.cumsum(0) - counts)[graphs]
            rows, columns = (torch.zeros(batch, longest, dtype=torch.long, device=values.device) for _ in range(2))
            rows[graphs, place], columns[graphs, place] = found, other
            weights = values.new_zeros(batch, longest)
            weights[graphs, place] = values[graphs, found, other]
        if half:  # pairs off the diagonal stand for both orders
            weights = weights * (2 - (rows == columns).to(weights.dtype))
        chunk = max(1, _CHUNK // max(1, batch * width))
        for begin in range(0, max(rows.shape[1], 1), chunk):
            part = slice(begin, begin + chunk)
            yield Pairs(rows[:, part], columns[:, part], Factor(weights[:, part], lasting=False))

    def rows(self, matrix: Factor, places: Tensor) -> Factor:
        values = matrix.value
        batch, p, q = values.shape
        # One copy of whole rows out of all graphs' rows: much faster than a gather entry by entry.
        flat = (places + p * torch.arange(batch, device=places.device)[:, None]).flatten()
        return Factor(values.reshape(batch * p, q).index_select(0, flat).view(*places.shape, q), lasting=False)

    def entries(self, vector: Factor, places: Tensor) -> Factor:
        return Factor(vector.value.gather(1, places), lasting=False)


class Sparse(Calculus):
    """SciPy matrices in rows over the nodes of all graphs of a batch, vectors over them, numbers for each graph.

    Polynomials of connected multigraphs never look from one graph into another; only sums know that there are several.

    Args:
        X: (n, n).
        graphs: to which graph each node belongs.
        count: how many graphs.
    """

    def __init__(self, X: Any, graphs: np.ndarray, count: int) -> None:
        super().__init__()
        self.graphs, self.count = graphs, count
        difference = X - X.T
        self._leaf = Factor(X, symmetric=difference.nnz == 0 or not difference.data.any())

    def leaf(self, channel: int) -> Factor:
        return self._leaf

    def _transposed(self, matrix: Any) -> Any:
        return matrix.T.tocsr()

    def _times(self, one: Any, other: Any) -> Any:
        return one * other if isinstance(one, np.ndarray) else one.multiply(other).tocsr()

    def _diagonal(self, matrix: Any) -> np.ndarray:
        return matrix.diagonal()

    def _row_sums(self, matrix: Any) -> np.ndarray:
        return matrix @ np.ones(matrix.shape[1], dtype=matrix.dtype)

    def _apply(self, matrix: Any, vector: np.ndarray) -> np.ndarray:
        return matrix @ vector

    def _product(self, left: Any, vector: np.ndarray | None, right: Any) -> Any:
        if vector is not None:
            left = left.copy()
            left.data = left.data * vector[left.indices]
        return left @ right

    def add(self, one: Any, other: Any) -> Any:
        return one + other

    def total(self, vector: Factor, rows: Pairs | None) -> Factor:
        graphs = self.graphs if rows is None else rows.graphs

        def summed() -> np.ndarray:
            result = np.zeros(self.count, dtype=vector.value.dtype)
            np.add.at(result, graphs, vector.value)
            return result

        return self.once("total", [vector], summed)

    def pairs(self, matrix: Factor, half: bool, width: int, groups: Sequence[Pairs | None]) -> Iterator[Pairs]:
        listed = matrix.value.tocoo()
        keep = listed.data != 0
        if half:
            keep &= listed.row <= listed.col
        rows, columns, weights = listed.row[keep], listed.col[keep], listed.data[keep]
        if half:
            weights = weights * (2 - (rows == columns).astype(weights.dtype))
        graphs = (self.graphs if groups[0] is None else groups[0].graphs)[rows]
        for begin in range(0, max(len(rows), 1), _CHUNK):
            part = slice(begin, begin + _CHUNK)
            yield Pairs(rows[part], columns[part], Factor(weights[part], lasting=False), graphs[part])

    def rows(self, matrix: Factor, places: np.ndarray) -> Factor:
        return Factor(matrix.value[places], lasting=False)

    def entries(self, vector: Factor, places: np.ndarray) -> Factor:
        return Factor(vector.value[places], lasting=False)

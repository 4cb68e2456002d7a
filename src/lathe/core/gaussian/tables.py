"""Moments of all pairs of a large kernel from tables: polynomials in the correlation and the two variances' logarithms.

A Hermite series needs as many terms as its slowest part asks for at `rho = 1`, hundreds for a wide or steep function.
The same function of `rho`, expanded in Chebyshev polynomials on the correlations that occur, has a tenth of them. Their
coefficients depend smoothly on the two variances, so that a handful of variances stands for all inputs.
"""

from __future__ import annotations

import functools
import math

import torch
from jaxtyping import Float
from torch import Tensor

from lathe.core.gaussian.activation import Activation
from lathe.core.gaussian.series import HermiteSeries

__all__ = ["ChebyshevTable", "PairTables"]

#: Size of the coefficients of `<s_a s_b>` and `<s'_a s'_b>` that are left out, relative to the largest.
_TAILS = (3e-14, 3e-13)
#: Variances that a table is made for at most: inputs whose variances span ten powers of e.
_MOST_VARIANCES = 56
#: Numbers of correlations that are tried.
_CORRELATIONS = (32, 64, 128, 256)


class ChebyshevTable:
    """`f_ab(x) = sum_m C_m(a, b) T_m(x)`, where the coefficients `C_m = basis @ coefficients[m] @ basis^T` are thin."""

    def __init__(
        self, coefficients: Float[Tensor, "degree r r"], basis: Float[Tensor, "n r"], tail: float, dtype: torch.dtype
    ) -> None:
        size = coefficients.abs().amax(1)
        position = torch.arange(1, size.shape[1] + 1, device=size.device)
        # Coefficients of high degree are small: fewer of the basis functions matter to them.
        ranks = ((size > tail * size.max()) * position).amax(1).clamp_min(1).tolist()
        # Signs + + - - let Clenshaw's rule b_m = C_m + 2 x b_(m+1) - b_(m+2) add where it would subtract: the product
        # that makes C_m then adds it to b_(m+2) where that lies.
        self.signs = [1.0 if m % 4 < 2 else -1.0 for m in range(len(ranks))]
        left = basis @ (coefficients * coefficients.new_tensor(self.signs).reshape(-1, 1, 1))
        self.left = [each[:, :rank].to(dtype).contiguous() for each, rank in zip(left, ranks)]
        self.right = basis.mT.to(dtype).contiguous()

    def __call__(
        self, twice: Float[Tensor, "rows columns"], rows: slice, columns: slice
    ) -> Float[Tensor, "rows columns"]:
        """The values at `twice = 2 x` for the pairs of a block."""
        # Parts of the rows make a batch: batches of thin products are spread over threads well, single ones are not.
        parts = next((each for each in range(torch.get_num_threads(), 17) if len(twice) % each == 0), 1)
        left = [each[rows].unflatten(0, (parts, -1)) for each in self.left]
        right = self.right[:, columns].expand(parts, -1, -1)
        twice = twice.unflatten(0, (parts, -1))
        value, last = torch.bmm(left[-1], right[:, : left[-1].shape[-1]]), len(left) - 1
        before = None
        for m in range(last - 1, -1, -1):
            factors = left[m], right[:, : left[m].shape[-1]]
            before = torch.bmm(*factors) if before is None else before.baddbmm_(*factors)
            sign = self.signs[m] * self.signs[m + 1] * (1.0 if m else 0.5)
            value, before = before.addcmul_(twice, value, value=sign), value
        return value.flatten(0, 1)


class PairTables:
    """`<s_a s_b>` and `<s'_a s'_b>` of a smooth activation for all pairs with given variances and correlations.

    Attributes:
        kernel, slope: the two tables.
        low, high: the correlations that x = -1 and x = 1 stand for.
    """

    def __init__(self, kernel: ChebyshevTable, slope: ChebyshevTable, low: float, high: float) -> None:
        self.kernel, self.slope, self.low, self.high = kernel, slope, low, high

    def __call__(
        self, kaa: Tensor, kab: Tensor, kbb: Tensor, where: tuple[slice, slice], slope: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """The moments of a block of pairs."""
        width = self.high - self.low
        twice = (kab * (kaa.rsqrt() * (4 / width))).mul_(kbb.rsqrt()).sub_(2 * (self.low + self.high) / width)
        return self.kernel(twice, *where), self.slope(twice, *where) if slope else None

    @classmethod
    def of(cls, act: Activation, variance: Float[Tensor, " n"], low: float, high: float) -> PairTables | None:
        """Tables for correlations from `low` to `high`; None where they would be large, or the series is too long."""
        logs = variance.double().log()
        first, last = float(logs.min()), float(logs.max())
        middle, half = (first + last) / 2, max((last - first) / 2, 1e-3)
        # A pole of s at i x becomes one at the imaginary part pi of log K, whatever K is: hence the number of nodes.
        ellipse = (math.pi + math.hypot(math.pi, half)) / half
        guess = 3 + math.ceil(-math.log(_TAILS[0]) / math.log(ellipse))
        if guess > _MOST_VARIANCES:
            return None
        for count in (guess, 2 * guess):
            t = (0.5 * (middle + half * _nodes(count).to(logs))).exp()
            series = HermiteSeries.of(act, t * t)
            if series is None or len(series.coefficients) < 2:
                return None
            c = series.coefficients
            k = torch.arange(len(c), dtype=c.dtype, device=c.device)
            values = _transform(count).to(c) @ c.mT
            slopes = _transform(count).to(c) @ (c[1:] * k[1:, None].sqrt() / t).mT
            ranks = [_significant(each, tail) for each, tail in zip((values, slopes), _TAILS)]
            if None not in ranks:
                break
        else:
            return None
        basis = _first_kinds((logs - middle) / half, count)
        kernel = _expand(values[: ranks[0]], low, high, _TAILS[0])
        slope = _expand(slopes[: ranks[1]], low, high, _TAILS[1])
        if kernel is None or slope is None:
            return None
        made = [
            ChebyshevTable(each, basis[:, :rank], tail, variance.dtype)
            for each, rank, tail in zip((kernel, slope), ranks, _TAILS)
        ]
        return cls(made[0], made[1], low, high)


def _expand(
    coefficients: Float[Tensor, "r terms"], low: float, high: float, tail: float
) -> Float[Tensor, "degree r r"] | None:
    """Chebyshev coefficients in rho of `sum_k c_ik c_jk rho^k`, for all i and j."""
    r, terms = coefficients.shape
    products = (coefficients.unsqueeze(1) * coefficients.unsqueeze(0)).reshape(r * r, terms).mT
    k = torch.arange(terms, dtype=coefficients.dtype, device=coefficients.device)
    for count in _CORRELATIONS:
        rho = (low + high) / 2 + (high - low) / 2 * _nodes(count).to(k)
        found = (_transform(count).to(k) @ rho.unsqueeze(-1) ** k) @ products
        degree = _significant(found, tail)
        if degree is not None:
            return found[:degree].reshape(degree, r, r)
    return None


def _significant(coefficients: Tensor, tail: float) -> int | None:
    """How many coefficients (first axis) matter; None where the last two do, so that there may be too few."""
    size = coefficients.abs().amax(1)
    matter = (size > tail * size.max()).nonzero()
    count = int(matter[-1, 0]) + 1 if len(matter) else 1
    return count if count <= len(size) - 2 else None


@functools.lru_cache(maxsize=16)
def _nodes(count: int) -> Float[Tensor, " count"]:
    """Zeros of the Chebyshev polynomial of degree `count`."""
    return torch.cos(math.pi * (torch.arange(count, dtype=torch.float64) + 0.5) / count)


@functools.lru_cache(maxsize=16)
def _transform(count: int) -> Float[Tensor, "count count"]:
    """Turns values at the nodes into Chebyshev coefficients."""
    transform = _first_kinds(_nodes(count), count).mT * (2 / count)
    transform[0] /= 2
    return transform


def _first_kinds(x: Float[Tensor, " points"], count: int) -> Float[Tensor, "points count"]:
    """Chebyshev polynomials of degrees below `count`."""
    columns = [torch.ones_like(x), x]
    for _ in range(count - 2):
        columns.append(2 * x * columns[-1] - columns[-2])
    return torch.stack(columns, -1)

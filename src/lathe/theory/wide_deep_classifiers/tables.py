"""Functions of the gap `e = 1 - xi` from a table whose pieces are found from the bits of a number."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["SMALLEST", "GapTable", "gaps"]

#: Gaps below this are the same point: 2^-104 is the square of the rounding of a coordinate.
SMALLEST = 2.0**-104
#: Below this gap `1 - <x, z>` has lost too many digits, and the difference of coordinates is taken instead.
_REFINE = 1e-6
#: Bits of a double's mantissa, and what is added to its exponent.
_MANTISSA, _BIAS = 52, 1023
#: The octave of v = e / xi at which tables end: below xi = 2^-40 it is the rounding of <x, z> that decides.
_LAST = 40


def gaps(
    x: Float[Tensor, "n features"], z: Float[Tensor, "m features"], out: Float[Tensor, "n m"] | None = None
) -> Float[Tensor, "n m"]:
    """`1 - <x, z> = |x - z|^2 / 2` of unit vectors, accurate where they are close; zero where they are equal."""
    e = torch.matmul(x, z.mT, out=out).neg_().add_(1) if not (x.requires_grad or z.requires_grad) else 1 - x @ z.mT
    if e.numel() and e.detach().amin() < _REFINE:
        near = (e.detach() < _REFINE).nonzero()
        for part in near.split(1 << 18):
            i, j = part.unbind(1)
            exact = (x[i] - z[j]).square().sum(1) / 2
            e = e.index_put((i, j), exact) if e.requires_grad else e.index_put_((i, j), exact)
    return e


class GapTable:
    """`f(e)` for gaps in [low, 1]: a polynomial in `v = e / xi` on each of `pieces` equal parts of each octave of `v`.

    `v` is `e` where points are close and `1 / xi` where they are nearly orthogonal, so that both ends are resolved. A
    lookup is a division, a shift of bits and as many gathers as the polynomial has coefficients, whatever `f` costs.

    Args:
        f: elementwise; smooth in the logarithms of `e` and of `xi = 1 - e`.
        low: the smallest gap; those below it are taken for it.
        pieces: per octave, a power of two.
        degree: of the polynomials.
    """

    def __init__(
        self,
        f: Callable[[Tensor], Tensor],
        low: float,
        *,
        pieces: int,
        degree: int,
        device: torch.device | str = "cpu",
    ) -> None:
        first = math.floor(math.log2(low))
        self.low, self.high = 2.0**first, 2.0**_LAST * (1 - 2.0**-50)
        self.shift = _MANTISSA - int(math.log2(pieces))
        self.base = (first + _BIAS) * pieces
        octave = torch.arange(first, _LAST, dtype=torch.float64).unsqueeze(1)
        # Chebyshev nodes u of a piece, whose points are start + (u + 1) / (2 pieces) in units of the octave.
        powers = torch.arange(degree + 1)
        u = torch.cos(math.pi * (powers.double() + 0.5) / (degree + 1))
        start = 1 + torch.arange(pieces, dtype=torch.float64) / pieces
        v = (octave.exp2().unsqueeze(-1) * (start.unsqueeze(1) + (u + 1) / (2 * pieces))).reshape(-1)
        values = torch.cat([f(part / (1 + part)) for part in v.split(1 << 16)]).reshape(-1, pieces, degree + 1)
        local = torch.einsum("cn,opn->cop", torch.linalg.inv(u.unsqueeze(-1) ** powers), values)
        # From powers of u to powers of v: u = slope v + offset. The coefficients are of the size of the values again.
        slope, offset = 2 * pieces * (-octave).exp2(), -2 * pieces * start - 1
        table = torch.zeros_like(local)
        for k in range(degree + 1):
            for j in range(k + 1):
                table[j] += math.comb(k, j) * slope**j * offset ** (k - j) * local[k]
        self.coefficients = [row.contiguous() for row in table.reshape(degree + 1, -1).to(device)]

    def __call__(self, e: Float[Tensor, "*shape"], xi: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The values at gaps `e`, given `xi = 1 - e` too; what lies outside of the table has the values at its ends."""
        v = torch.div(e, xi.clamp_min(1e-300)).clamp_(self.low, self.high)
        index = (v.view(torch.int64) >> self.shift).sub_(self.base).to(torch.int32).reshape(-1)
        total = self._gather(-1, index, v)
        for k in range(len(self.coefficients) - 2, -1, -1):
            total = total.mul_(v).add_(self._gather(k, index, v))
        return total

    def _gather(self, k: int, index: Tensor, v: Tensor) -> Tensor:
        return self.coefficients[k].index_select(0, index).reshape(v.shape)

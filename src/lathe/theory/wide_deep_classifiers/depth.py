"""Kernels of wide networks at any depth, in logarithms, so that what depth makes vanish can still be compared."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lathe.core.gaussian import ActivationLike, mirror_
from lathe.theory.wide_deep_classifiers.dual import DualActivation, as_dual
from lathe.theory.wide_deep_classifiers.sphere import unit_rows
from lathe.theory.wide_deep_classifiers.tables import SMALLEST, GapTable, gaps

__all__ = ["DeepKernel", "check_depth", "log_kernels", "nngp", "ntk", "signed_kernel"]

#: Rows of the strips in which a large kernel is made: a strip stays in the cache, and its mirror image is copied.
_TILE = 168
#: Pairs from which on a table pays.
_MANY = 1 << 14


def nngp(
    x: Float[Tensor, "n features"],
    z: Float[Tensor, "m features"] | None,
    phi: ActivationLike | DualActivation,
    depth: int,
    *,
    log: bool = False,
) -> Float[Tensor, "n m"]:
    """`Sigma_L`: `Sigma_0 = <x, z>`, `Sigma_(l+1) = dual(Sigma_l)`, of a network with `depth` hidden layers.

    Large matrices are read from a table of the function of one variable that `Sigma_L` is: their cost does not depend
    on depth. Computed in float64; differentiable by `x` and `z`.

    Args:
        x: points on the unit sphere.
        z: others; None for `x` itself.
        phi: activation; a name, a module, a function or a `DualActivation`.
        depth: hidden layers, from 0.
        log: return `log Sigma_L`, which does not underflow. Needs `<x, z> >= 0`.

    Raises:
        ValueError: for rows that are not of norm one within 1e-6 or not finite, a negative `depth`, or, with `log`, a
            negative inner product.
    """
    return _kernel(x, z, phi, depth, "nngp", log)


def ntk(
    x: Float[Tensor, "n features"],
    z: Float[Tensor, "m features"] | None,
    phi: ActivationLike | DualActivation,
    depth: int,
    *,
    log: bool = False,
) -> Float[Tensor, "n m"]:
    """`K_L`: `K_0 = <x, z>`, `K_(l+1) = Sigma_(l+1) + K_l dual'(Sigma_l)`; otherwise as `nngp`.

    On the diagonal it is `sum_(l <= L) B'^l`. Off the diagonal `K_L / (L a^L) -> psi` in the singular class.
    """
    return _kernel(x, z, phi, depth, "ntk", log)


def log_kernels(dual: DualActivation, e: Float[Tensor, "*shape"], depth: int, kind: str) -> Float[Tensor, "*shape"]:
    """`log Sigma_L` ("nngp") or `log K_L` ("ntk") at gaps `e = 1 - xi` in [0, 1], layer by layer.

    Beside the logarithm of `Sigma_l` its gap `1 - Sigma_l` is carried along, which is accurate where that one is not.
    """
    e = e.clamp(0, 1)
    sigma = torch.log1p(-e)
    kernel = sigma
    for _ in range(depth):
        slope = dual.log_derivative(sigma) if kind == "ntk" else None
        e = dual.gap(e)
        near = e < 0.1
        if near.all():
            sigma = torch.log1p(-e)
        else:  # the inner where keeps the gradient of the branch that is not taken finite
            sigma = torch.where(near, torch.log1p(-torch.where(near, e, 0.0)), dual.log_value(sigma))
        kernel = sigma if slope is None else torch.logaddexp(sigma, kernel + slope)
    return kernel


class DeepKernel:
    """One kernel as a function of the gap, from a table where there are many pairs.

    Args:
        pairs: how many pairs will be asked for.
        low: the smallest gap among them that is not zero.
        high: the largest, above 1 where inner products are negative.
    """

    def __init__(
        self,
        dual: DualActivation,
        depth: int,
        kind: str,
        pairs: int,
        low: float,
        high: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.dual, self.depth, self.kind = dual, depth, kind
        self.at_zero = _log_diagonal(dual, depth, kind)
        # As xi -> 0 the kernel is xi^power times something smooth.
        self.power = 1 if dual.lead == 1 else 0
        self.low = max(low, SMALLEST)
        self.wanted = pairs >= _MANY and dual.lead <= 1
        self.table = _checked_table(self._smooth, self.low, device) if self.wanted else None
        self.mirrored: GapTable | None = None
        if self.table is not None and high > 1:
            self.mirrored = _checked_table(self._opposite, max(2 - high, SMALLEST), device)
            if self.mirrored is None:
                self.table = None

    def serves(self, pairs: int, low: float) -> bool:
        """Whether it will do for as many pairs, down to this gap."""
        return (self.wanted or pairs < _MANY) and (self.table is None or low >= self.low)

    def _smooth(self, e: Tensor) -> Tensor:
        logarithm = log_kernels(self.dual, e, self.depth, self.kind)
        return logarithm - self.power * torch.log1p(-e) if self.power else logarithm

    def _opposite(self, e: Tensor) -> Tensor:
        """The kernel at `-xi`, over `xi^power`."""
        return signed_kernel(self.dual, 2 - e, self.depth, self.kind) / (1 - e) ** self.power

    def log(self, e: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The logarithm of the kernel at gaps in [0, 1]."""
        if self.table is None:
            return self._direct(lambda part: log_kernels(self.dual, part, self.depth, self.kind), e)
        xi = (1 - e).clamp_min(0)
        found = self.table(e, xi)
        return self._at_equal(found + xi.log() if self.power else found, e, self.at_zero)

    def value(self, e: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The kernel itself, at gaps up to the largest that it was made for."""
        if self.table is None:
            return self._direct(lambda part: signed_kernel(self.dual, part, self.depth, self.kind), e)
        xi = 1 - e
        positive = xi.clamp_min(0)
        value = self.table(e, positive).exp_()
        value = self._at_equal(value.mul_(positive) if self.power else value, e, math.exp(self.at_zero))
        if self.mirrored is not None and e.amax() > 1:
            opposite = xi.neg().clamp_min_(0)
            below = self.mirrored(1 - opposite, opposite)
            value = torch.where(xi < 0, below.mul_(opposite) if self.power else below, value)
        return value

    @staticmethod
    def _direct(f: Callable[[Tensor], Tensor], e: Tensor) -> Tensor:
        return torch.cat([f(part) for part in e.reshape(-1).split(1 << 16)]).reshape(e.shape)

    def _at_equal(self, found: Tensor, e: Tensor, there: float) -> Tensor:
        assert self.table is not None
        # Most blocks have no equal points; finding that out is cheap.
        return torch.where(e < self.table.low, there, found) if e.amin() < self.table.low else found


def _checked_table(f: Callable[[Tensor], Tensor], low: float, device: torch.device | str) -> GapTable | None:
    """A table of `f`; None where it would be too coarse, so that the recursion has to be gone through pair by pair."""
    table = GapTable(f, low, pieces=64, degree=3, device=device)
    ends = math.log(table.low), math.log(table.high)
    v = torch.linspace(*ends, 1009, dtype=torch.float64, device=device).exp()
    e = v / (1 + v)
    exact = f(e)
    return table if ((table(e, 1 - e) - exact).abs() / (1 + exact.abs())).max() < 1e-8 else None


def _kernel(
    x: Tensor, z: Tensor | None, phi: ActivationLike | DualActivation, depth: int, kind: str, log: bool
) -> Tensor:
    check_depth(depth)
    dual = as_dual(phi)
    x = unit_rows(x, "x")
    other = x if z is None else unit_rows(z, "z")
    if other.shape[1] != x.shape[1]:
        raise ValueError(f"x and z must have as many features, got {x.shape[1]} and {other.shape[1]}")
    e = gaps(x, other)
    if not e.numel():
        return e
    high = float(e.detach().amax())
    if log and high > 1 + 1e-12:
        raise ValueError("log=True needs <x, z> >= 0: the logarithm of a negative kernel does not exist")
    if e.requires_grad:
        return (log_kernels if log else signed_kernel)(dual, e, depth, kind)
    positive = e[e >= SMALLEST]
    low = float(positive.amin()) if len(positive) else 1.0
    deep = DeepKernel(dual, depth, kind, e.numel() // (2 if z is None else 1), low, high, e.device)
    f: Callable[[Tensor], Tensor] = deep.log if log else deep.value
    if z is not None:
        for i in range(0, len(e), _TILE):
            e[i : i + _TILE] = f(e[i : i + _TILE])
        return e
    for i in range(0, len(e), _TILE):
        e[i : i + _TILE, i:] = f(e[i : i + _TILE, i:].contiguous())
    return mirror_(e)


def signed_kernel(dual: DualActivation, e: Float[Tensor, "*shape"], depth: int, kind: str) -> Float[Tensor, "*shape"]:
    """The kernel itself at gaps in [0, 2]; where inner products are negative, by the plain recursion."""
    positive = log_kernels(dual, e, depth, kind).exp()
    if not e.numel() or not e.detach().amax() > 1:
        return positive
    sigma = kernel = 1 - e.clamp(1, 2)
    for _ in range(depth):
        slope = dual.derivative(sigma)
        sigma = dual.value(sigma)
        kernel = sigma if kind == "nngp" else sigma + kernel * slope
    return torch.where(e > 1, kernel, positive)


def _log_diagonal(dual: DualActivation, depth: int, kind: str) -> float:
    """Logarithm of the kernel at `xi = 1`: of 1, or of `1 + B' + ... + B'^depth`."""
    if kind == "nngp":
        return 0.0
    b, terms = dual.B_prime, depth + 1
    if abs(b - 1) < 1e-9:
        return math.log(terms)
    # The larger of 1 and B'^terms taken out, so that nothing overflows.
    return max(0.0, terms * math.log(b)) + math.log(-math.expm1(-abs(terms * math.log(b)))) - math.log(abs(b - 1))


def check_depth(depth: float) -> None:
    if isinstance(depth, bool) or depth != int(depth) or depth < 0:
        raise ValueError(f"depth must be a whole number of hidden layers, at least 0, got {depth!r}")

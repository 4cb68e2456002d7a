"""Moments of two pre-activations, `<s_a s_b>` and `<s'_a s'_b>`, for whole kernel matrices at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from lathe.core.gaussian.activation import Activation
from lathe.core.gaussian.quadrature import _line_nodes, gaussian_nodes

Then: TypeAlias = Callable[[Tensor, Tensor | None, tuple[slice, slice]], tuple[Tensor, Tensor | None]]

__all__ = ["hermite_coefficients", "kernel_moments", "pair_moments"]

#: Rows and columns of the blocks in which a large kernel is worked through: a block stays in a core's cache, and is
#: small enough that torch does not spread one operation over threads (the blocks are spread instead).
_TILE = 168
#: Pairs that the quadrature of an activation with kinks and without closed form takes at a time.
_PAIRS = 64
#: Parts of <s^2> and of K <s'^2> that a cut Hermite series may leave out, at worst (at rho = 1).
_TAILS = (1e-12, 1e-10)
_MOST_TERMS = 2048
#: How far out, in standard deviations, an activation's own values matter.
_REACH = 9.0


def hermite_coefficients(act: Activation, K: Float[Tensor, "*batch"], count: int) -> Float[Tensor, "*batch count"]:
    """Coefficients `c_k = <s(sqrt(K) u) h_k(u)>` of an activation in the orthonormal Hermite polynomials `h_k`.

    Then `<s_a s_b> = sum_k c_k(K_aa) c_k(K_bb) rho^k` with `rho = K_ab / sqrt(K_aa K_bb)` (Mehler).
    """
    u, w = _trapezoid(_reach(count), 0.05, K) if not act.kinks else _line_nodes(torch.ones_like(K), act.kinks)
    return (act(u * K.sqrt().unsqueeze(-1)).unsqueeze(-2) @ _weighted_hermite(u, w, count)).squeeze(-2)


def pair_moments(
    act: Activation, kaa: Float[Tensor, ...], kab: Float[Tensor, ...], kbb: Float[Tensor, ...]
) -> tuple[Float[Tensor, ...], Float[Tensor, ...]]:
    """`<s_a s_b>` and `<s'_a s'_b>` for jointly Gaussian pairs; the three arguments broadcast; differentiable.

    In closed form where the activation has one; else by a Hermite series, cut where what it leaves out is below 1e-12
    of `<s^2>` and 1e-10 of `K <s'^2>` (the remainder is known, as the series at `rho = 1` is an integral over a line);
    else, with kinks, by quadrature that follows them, which is a thousand times slower.
    """
    if act.pair is not None:
        return act.pair(kaa, kab, kbb)
    if not act.kinks:
        series = _Series.of(act, torch.cat([kaa.reshape(-1), kbb.reshape(-1)]))
        if series is not None:
            a, b = kaa.numel(), kbb.numel()
            left, right = (c.reshape(-1, *k.shape) for c, k in zip(series.coefficients.split([a, b], 1), (kaa, kbb)))
            return series.evaluate(left, right, kaa, kab, kbb)
    return _pair_quadrature(act, *torch.broadcast_tensors(kaa, kab, kbb))


def kernel_moments(
    act: Activation, K: Float[Tensor, "n n"], slope: bool = True, *, then: Then | None = None
) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"] | None]:
    """`<s_a s_b>` and, unless `slope` is false, `<s'_a s'_b>` for all pairs of a symmetric kernel matrix.

    As `pair_moments`, with half the work: block by block above the diagonal, mirrored below it, the blocks spread over
    torch's threads. `then(kernel, slope, (rows, columns))` is applied to each block while it is in the cache, and what
    it gives is stored instead; it has to be symmetric too.
    """
    n = K.shape[-1]
    variance = K.diagonal()
    series = _Series.of(act, variance) if act.pair is None and not act.kinks else None

    def block(where: tuple[slice, slice]) -> tuple[Tensor, Tensor | None]:
        kernel, slopes = _tile(act, series, variance, K, *where, slope)
        return (kernel, slopes) if then is None else then(kernel, slopes if slope else None, where)

    if K.requires_grad or n <= _TILE:
        return block((slice(0, n), slice(0, n)))
    kernel, slopes = torch.empty_like(K), torch.empty_like(K) if slope else None

    def fill(where: tuple[slice, slice]) -> None:
        for whole, part in zip((kernel, slopes), block(where)):
            if whole is not None and part is not None:
                whole[where] = part
                if where[0] != where[1]:
                    whole[where[1], where[0]] = part.mT

    strips = [slice(i, min(i + _TILE, n)) for i in range(0, n, _TILE)]
    blocks = list(itertools.combinations_with_replacement(strips, 2))
    if K.is_cuda or torch.get_num_threads() == 1:
        for where in blocks:
            fill(where)
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(fill, blocks))
    return kernel, slopes


def _tile(
    act: Activation,
    series: _Series | None,
    variance: Tensor,
    K: Tensor,
    rows: slice,
    columns: slice,
    slope: bool = True,
) -> tuple[Tensor, Tensor | None]:
    kaa, kab, kbb = variance[rows, None], K[rows, columns], variance[None, columns]
    if act.pair is not None:
        return act.pair(kaa, kab, kbb)
    if series is not None:
        c = series.coefficients
        return series.evaluate(c[:, rows, None], c[:, None, columns], kaa, kab, kbb, slope)
    return _pair_quadrature(act, *torch.broadcast_tensors(kaa, kab, kbb))


class _Series:
    """A cut Hermite series: coefficients (terms, points), and which of them matter."""

    def __init__(self, coefficients: Tensor, even: list[int], odd: list[int]) -> None:
        self.coefficients, self.even, self.odd = coefficients, even, odd

    @classmethod
    def of(cls, act: Activation, K: Tensor) -> _Series | None:
        """The series for variances `K`, or None where it converges too slowly to be of use."""
        root = K.sqrt().unsqueeze(-1)
        spacing = _step(act, K.detach())
        if spacing is None:
            return None
        top = K.detach().max()
        count = 24
        while True:
            step = min(spacing, 2 * math.pi / (2 * math.sqrt(count) + 12))  # no aliasing with the last polynomial
            u, w = _trapezoid(_reach(count), step, K)
            polynomials = _weighted_hermite(u, w, count)
            # The widest variable converges last: count its terms before the whole batch is transformed.
            z = u * top.sqrt()
            value, slope = act(z), act.derivative(z)
            c = value @ polynomials
            k = torch.arange(count, dtype=K.dtype, device=K.device)
            goal = torch.stack([(value * value * w).sum(), top * (slope * slope * w).sum()])
            left_out = goal.unsqueeze(-1) - torch.stack([(c * c), k * c * c]).cumsum(-1)
            tails = goal.new_tensor(_TAILS) * goal
            enough = (left_out <= tails.unsqueeze(-1).clamp_min(1e-300)).all(0).nonzero()
            if len(enough):
                count = int(enough[0, 0]) + 1
                break
            if count >= _MOST_TERMS:
                return None
            count = min(2 * count, _MOST_TERMS)
        polynomials = polynomials[:, :count]
        # Few rows at a time, for the cache, and lest torch start its threads for every one of many small operations.
        parts = root.split(max(1, _TILE**2 // len(u)))
        coefficients = torch.cat([act(u * part) @ polynomials for part in parts]).mT.contiguous()
        size = coefficients.detach().abs().amax(1)
        negligible = 1e-16 * size.max()
        kept = [k for k in range(count) if size[k] > negligible]
        return cls(coefficients, [k for k in kept if k % 2 == 0], [k for k in kept if k % 2 == 1])

    def evaluate(
        self, left: Tensor, right: Tensor, kaa: Tensor, kab: Tensor, kbb: Tensor, slope: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Even and odd part by Horner's rule in rho^2, with the derivative by rho alongside."""
        scale = kaa.rsqrt() * kbb.rsqrt()
        rho = kab * scale
        square = rho * rho
        even, even_slope = _horner(left, right, self.even, square, slope)
        odd, odd_slope = _horner(left, right, self.odd, square, slope)
        kernel = torch.addcmul(even, rho, odd)
        if not slope:
            return kernel, kernel
        # d/d rho of E(rho^2) + rho O(rho^2), and d rho / d K_ab = scale.
        return kernel, scale * (odd + 2 * rho * torch.addcmul(even_slope, rho, odd_slope))


def _horner(left: Tensor, right: Tensor, kept: list[int], x: Tensor, slope: bool) -> tuple[Tensor, Tensor]:
    if not kept:
        return torch.zeros_like(x), torch.zeros_like(x)
    value, derivative = (left[kept[-1]] * right[kept[-1]]).expand_as(x), torch.zeros_like(x)
    in_place = not (x.requires_grad or left.requires_grad)
    if in_place:
        value = value.clone()
    for k in range(kept[-1] - 2, kept[0] - 1, -2):
        if in_place:
            if slope:
                derivative.mul_(x).add_(value)
            value.mul_(x).addcmul_(left[k], right[k])
        else:
            derivative = torch.addcmul(value, derivative, x)
            value = torch.addcmul(left[k] * right[k], value, x)
    for _ in range(kept[0] // 2):
        derivative = torch.addcmul(value, derivative, x)
        value = value * x
    return value, derivative


def _step(act: Activation, K: Tensor) -> float | None:
    """Spacing of the trapezoid rule at which `<s^2>` at the largest variance has converged, if there is one."""
    root = K.max().sqrt()
    step = 0.2
    while step > 0.004:
        u, w = _trapezoid(_REACH, step, K)
        term = act(u * root) ** 2 * w
        # Every second node is the rule of twice the spacing; its error is about the root of the finer rule's.
        fine, coarse = term.sum(), 2 * term[1::2].sum()
        if (fine - coarse).abs() <= 1e-7 * fine.abs():
            return step
        step /= 2
    return None


def _reach(count: int) -> float:
    return max(_REACH, 7.0 + math.sqrt(count))


def _trapezoid(reach: float, step: float, like: Tensor) -> tuple[Tensor, Tensor]:
    # Converges exponentially for functions analytic near the real line, faster than Gauss-Hermite where a pole is near.
    half = math.ceil(reach / step)
    u = torch.arange(-half, half + 1, dtype=like.dtype, device=like.device) * step
    return u, torch.exp(-0.5 * u * u) * (step / math.sqrt(2 * math.pi))


def _weighted_hermite(u: Tensor, w: Tensor, count: int) -> Tensor:
    """Orthonormal Hermite polynomials `h_0 .. h_{count-1}` at `u` times the weights `w`, last axis."""
    # Far out the polynomials overflow where the weights underflow; the recurrence runs on their geometric middle.
    root = w.sqrt()
    columns = [root, u * root][:count]
    for k in range(1, count - 1):
        columns.append((u * columns[-1] - math.sqrt(k) * columns[-2]) / math.sqrt(k + 1))
    return torch.stack(columns, -1) * root.unsqueeze(-1)


def _pair_quadrature(act: Activation, kaa: Tensor, kab: Tensor, kbb: Tensor) -> tuple[Tensor, Tensor]:
    shape = kab.shape
    K = torch.stack([torch.stack([kaa, kab], -1), torch.stack([kab, kbb], -1)], -2).reshape(-1, 2, 2)
    kernels, slopes = [], []
    order = 12 if act.kinks else 200
    for block in K.split(_PAIRS):
        z, w = gaussian_nodes(block, order, act.kinks)
        first, second = z.unbind(-1)
        kernels.append((act(first) * act(second) * w).sum(-1))
        slopes.append((act.derivative(first) * act.derivative(second) * w).sum(-1))
    return torch.cat(kernels).reshape(shape), torch.cat(slopes).reshape(shape)

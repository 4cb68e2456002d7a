"""Hermite series of activations: `<s_a s_b> = sum_k c_k(K_aa) c_k(K_bb) rho^k`, with a known remainder (Mehler)."""

from __future__ import annotations

import functools
import math

import torch
from jaxtyping import Float
from torch import Tensor

from lathe.core.gaussian.activation import Activation
from lathe.core.gaussian.quadrature import _line_nodes

__all__ = ["HermiteSeries", "hermite_coefficients"]

#: Parts of <s^2> and of K <s'^2> that a cut series may leave out, at worst (at rho = 1).
_TAILS = (1e-13, 1e-11)
_MOST_TERMS = 2048
#: Variances times nodes that are transformed at a time: they stay in a core's cache.
_BLOCK = 1 << 15
#: How far out, in standard deviations, an activation's own values matter.
_REACH = 9.0


def hermite_coefficients(act: Activation, K: Float[Tensor, "*batch"], count: int) -> Float[Tensor, "*batch count"]:
    """Coefficients `c_k = <s(sqrt(K) u) h_k(u)>` of an activation in the orthonormal Hermite polynomials `h_k`.

    Then `<s_a s_b> = sum_k c_k(K_aa) c_k(K_bb) rho^k` with `rho = K_ab / sqrt(K_aa K_bb)` (Mehler).
    """
    u, w = _trapezoid(_reach(count), 0.05, K) if not act.kinks else _line_nodes(torch.ones_like(K), act.kinks)
    return (act(u * K.sqrt().unsqueeze(-1)).unsqueeze(-2) @ _weighted_hermite(u, w, count)).squeeze(-2)


class HermiteSeries:
    """A cut Hermite series: coefficients (terms, points), and which of them matter."""

    def __init__(self, coefficients: Tensor, even: list[int], odd: list[int]) -> None:
        self.coefficients, self.even, self.odd = coefficients, even, odd

    @classmethod
    def of(cls, act: Activation, K: Tensor) -> HermiteSeries | None:
        """The series for variances `K`, or None where it converges too slowly to be of use."""
        root = K.sqrt().unsqueeze(-1)
        spacing = _step(act, K.detach())
        if spacing is None:
            return None
        top = K.detach().max()
        count = 24
        while True:
            u, w, polynomials = (each.to(K) for each in _rule(count, spacing))
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
        # Few rows at a time, lest torch start its threads for every one of many small operations.
        parts = root.split(max(1, _BLOCK // len(u)))
        coefficients = torch.cat([act(u * part) @ polynomials for part in parts]).mT.contiguous()
        size = coefficients.detach().abs().amax(1)
        kept = (size > 1e-16 * size.max()).nonzero().flatten().tolist()
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


@functools.lru_cache(maxsize=8)
def _rule(count: int, spacing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes, weights, and the weighted Hermite polynomials of degrees below `count` at the nodes."""
    step = min(spacing, 2 * math.pi / (2 * math.sqrt(count) + 12))  # no aliasing with the last polynomial
    u, w = _trapezoid(_reach(count), step, torch.empty(0, dtype=torch.float64))
    return u, w, _weighted_hermite(u, w, count)


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

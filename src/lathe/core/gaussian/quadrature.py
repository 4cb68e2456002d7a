"""Expectations over Gaussian variables by quadrature: one or several dimensions, smooth or kinked, batched."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import roots_hermitenorm
from torch import Tensor

from lathe.core.gaussian.activation import Activation

__all__ = ["gauss_hermite", "gaussian_expectation", "gaussian_nodes", "line_expectation"]

#: Where a standard normal variable is cut off: what lies beyond carries a mass of 1e-23.
_REACH = 10.0
#: Values that one block of an expectation may hold at a time (64 MiB in float64).
_BLOCK = 1 << 23


@functools.lru_cache(maxsize=64)
def _hermite(order: int) -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = roots_hermitenorm(order)
    return nodes, weights / weights.sum()


@functools.lru_cache(maxsize=64)
def _legendre(order: int) -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(order)


def gauss_hermite(order: int, like: Tensor) -> tuple[Float[Tensor, " order"], Float[Tensor, " order"]]:
    """Nodes and weights of the Gauss rule of a standard normal variable, on `like`'s device and dtype."""
    if order < 1:
        raise ValueError(f"order must be at least 1, got {order}")
    nodes, weights = _hermite(order)
    return like.new_tensor(nodes), like.new_tensor(weights)


def gaussian_nodes(
    K: Float[Tensor, "*batch d d"],
    order: int = 100,
    kinks: Sequence[float] = (),
) -> tuple[Float[Tensor, "*batch nodes d"], Float[Tensor, "*weights nodes"]]:
    """Nodes `z` and weights `w` with `<f(z)> = sum w f(z)` for `z ~ N(0, K)`.

    Without kinks this is a product Gauss-Hermite rule of `order` nodes a dimension, exact for polynomials of degree
    `2 order - 1`, with weights of shape `(nodes,)`. With kinks, every variable's line is split where that variable,
    given the ones before it, meets a kink, with `order` Gauss-Legendre nodes a panel. `K` may be singular.
    """
    root = _semidefinite_cholesky(K)
    d = K.shape[-1]
    if kinks:
        return _split_nodes(root, order, tuple(kinks))
    grid, weights = (each.to(K) for each in _grid(order, d))
    return grid @ root.mT, weights


@functools.lru_cache(maxsize=8)
def _grid(order: int, d: int) -> tuple[Tensor, Tensor]:
    """The product rule of `d` independent standard normal variables."""
    u, w = gauss_hermite(order, torch.empty(0, dtype=torch.float64))
    weights = functools.reduce(lambda a, b: torch.outer(a, b).reshape(-1), [w] * d)
    return torch.cartesian_prod(*[u] * d).reshape(-1, d), weights


def line_expectation(
    f: Callable[[Tensor], Tensor],
    K: Float[Tensor, "*batch"],
    kinks: Sequence[float] = (),
) -> Float[Tensor, "*values"]:
    """`<f(z)>` over one variable `z ~ N(0, K)` for each variance in `K`.

    `f` acts elementwise, `(*batch, nodes) -> (*batch, nodes)`; it may give several values, on axes in front.

    Panels that shrink geometrically towards zero resolve functions with structure at any scale between 1e-3 and 10
    standard deviations, so that variances from 1e-6 to 1e6 need no tuning; zero and `kinks` are panel edges.
    """
    z, w = _line_nodes(K, tuple(kinks))
    return (f(z) * w).sum(-1)


def gaussian_expectation(
    f: Callable[..., Tensor] | Sequence[Activation],
    K: Float[Tensor, "*batch d d"] | Float[Tensor, ""],
    method: str = "hermite",
    order: int = 100,
    *,
    kinks: Sequence[float] = (),
    tolerance: float = 1e-10,
) -> Float[Tensor, "*batch"]:
    """`<f(z_1, ..., z_d)>` over `z ~ N(0, K)`, one for each matrix of the batch; differentiable where `K` is regular.

    Args:
        f: a function of `d` tensors, elementwise; or `d` activations, which stands for their product.
        K: covariances, symmetric and positive semi-definite; a scalar is one variable's variance.
        method: "hermite" (product Gauss rule), "split" (the lines split at the kinks), "adaptive" (one variable:
            panels split until each is converged, kinks found by itself; several: the order doubles until the value
            settles) or "closed" (the product of two equal activations that have a closed form).
        order: nodes per dimension ("hermite") or per panel ("split").
        kinks: where `f` is not smooth in one of its arguments; taken from the activations if `f` is a product.
            Given kinks turn "hermite" into "split".
        tolerance: what "adaptive" reaches, relative to the largest value of the batch.

    Raises:
        ValueError: for an unknown method, a `K` that is not square or not finite, a product of the wrong length, no
            closed form, or where "adaptive" does not settle.
    """
    if K.ndim == 0:
        K = K.reshape(1, 1)
    d = K.shape[-1]
    if not torch.isfinite(K).all():
        raise ValueError("K must be finite, got infinite or NaN entries")
    factors: tuple[Activation, ...] = ()
    function: Callable[..., Tensor]
    if not callable(f) or isinstance(f, Activation):
        factors = (f,) if isinstance(f, Activation) else tuple(f)
        if len(factors) != d:
            raise ValueError(f"f must have as many activations as K has variables, got {len(factors)} for {d}")
        kinks = tuple(kinks) or tuple(sorted({k for factor in factors for k in factor.kinks}))
        function = functools.partial(_product, factors)
    else:
        function = f
    if method == "closed":
        if d != 2 or not factors or factors[0] is not factors[1] or factors[0].pair is None:
            raise ValueError("method 'closed' needs two equal activations with a closed form; use 'hermite'")
        return factors[0].pair(K[..., 0, 0], K[..., 0, 1], K[..., 1, 1])[0]
    if method == "adaptive":
        if d == 1:
            return _adaptive_line(function, K[..., 0, 0], tolerance)
        return _adaptive_order(function, K, tolerance, tuple(kinks))
    if method not in ("hermite", "split"):
        raise ValueError(f"method must be 'hermite', 'split', 'adaptive' or 'closed', got {method!r}")
    return _on_nodes(function, K, order, tuple(kinks) or ((0.0,) if method == "split" else ()))


def _product(factors: Sequence[Activation], *z: Tensor) -> Tensor:
    return functools.reduce(torch.mul, [factor(variable) for factor, variable in zip(factors, z)])


def _on_nodes(f: Callable[..., Tensor], K: Tensor, order: int, kinks: tuple[float, ...]) -> Tensor:
    """Sum over the nodes, in blocks of the batch that keep memory bounded."""
    d = K.shape[-1]
    per_matrix = ((order * (len(kinks) + 1)) if kinks else order) ** d * (d + 2)
    flat = K.reshape(-1, d, d)
    values = []
    for block in flat.split(max(1, _BLOCK // per_matrix)):
        z, w = gaussian_nodes(block, order, kinks)
        values.append((f(*z.unbind(-1)) * w).sum(-1))
    return torch.cat(values).reshape(K.shape[:-2]) if values else K.new_zeros(K.shape[:-2])


def _semidefinite_cholesky(K: Tensor) -> Tensor:
    """Lower triangular `L` with `L L^T = K`; a pivot lost to rounding becomes a column of zeros."""
    d = K.shape[-1]
    if K.shape[-2] != d:
        raise ValueError(f"K must be square in its last two dimensions, got {tuple(K.shape)}")
    columns: list[Tensor] = []
    for j in range(d):
        column = K[..., :, j]
        for earlier in columns:
            column = column - earlier * earlier[..., j : j + 1]
        pivot = column[..., j : j + 1]
        regular = pivot > 8 * torch.finfo(K.dtype).eps * K[..., j, j].unsqueeze(-1)
        column = torch.where(regular, column, 0.0) / torch.where(regular, pivot, 1.0).sqrt()
        below = torch.arange(d, device=K.device) >= j
        columns.append(torch.where(below, column, 0.0))
    return torch.stack(columns, dim=-1)


@functools.lru_cache(maxsize=8)
def _graded_edges(levels: int) -> np.ndarray:
    positive = _REACH * 0.5 ** np.arange(levels)[::-1]
    return np.concatenate([-positive[::-1], [0.0], positive])


def _panel_nodes(edges: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes in the panels between sorted `edges` (..., E), with the standard normal's weights."""
    nodes, weights = _legendre(order)
    left, width = edges[..., :-1, None], edges[..., 1:, None] - edges[..., :-1, None]
    u = left + width * (edges.new_tensor(nodes) + 1) / 2
    w = width * edges.new_tensor(weights / 2) * torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)
    return u.flatten(-2), w.flatten(-2)


@functools.lru_cache(maxsize=1)
def _graded_nodes() -> tuple[np.ndarray, np.ndarray]:
    u, w = _panel_nodes(torch.tensor(_graded_edges(14)), 20)
    return u.numpy(), w.numpy()


def _line_nodes(K: Tensor, kinks: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    scale = (K if K.requires_grad else K.clamp_min(0)).sqrt().unsqueeze(-1)
    extra = [kink for kink in kinks if kink != 0]
    if not extra:  # zero is an edge anyway, and the nodes are the same for all variances
        nodes, weights = _graded_nodes()
        return K.new_tensor(nodes) * scale, K.new_tensor(weights)
    safe = torch.where(scale > 0, scale, 1.0)
    cuts = torch.clamp(torch.cat([kink / safe for kink in extra], -1), -_REACH, _REACH)
    edges = K.new_tensor(_graded_edges(14)).expand(*K.shape, -1)
    u, w = _panel_nodes(torch.cat([edges, cuts], -1).sort(-1).values, 20)
    return u * scale, w


def _split_nodes(root: Tensor, order: int, kinks: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    *batch, d, _ = root.shape
    # Few nodes cannot follow the density far into its tails; there is nothing to win there either.
    reach = min(_REACH, 3.0 + 0.3 * order)
    u = root.new_zeros(*batch, 1, 0)
    w = root.new_ones(*batch, 1)
    for i in range(d):
        mean = u @ root[..., i, :i].unsqueeze(-1)
        cuts = [_cut(kink - mean[..., 0], root[..., i, i].unsqueeze(-1), reach) for kink in kinks]
        if i == 0 and d == 2:
            # Where the second variable is nearly a function of the first, it meets its own kinks along this line too.
            cuts += [_cut(torch.full_like(w, k), root[..., 1, 0].unsqueeze(-1), reach) for k in kinks if k != 0]
            # Grade the outer line towards zero, where a nearly parallel second variable bends sharply.
            cuts += [torch.full_like(w, s * reach * 0.5**j) for j in (1, 2, 3, 5) for s in (-1, 1)]
        ends = torch.full_like(w, reach)
        edges = torch.stack([-ends, *cuts, ends], -1).sort(-1).values
        fresh, weight = _panel_nodes(edges, order)
        count = fresh.shape[-1]
        u = torch.cat([u.repeat_interleave(count, dim=-2), fresh.reshape(*batch, -1, 1)], -1)
        w = (w.unsqueeze(-1) * weight).reshape(*batch, -1)
    return u @ root.mT, w


def _cut(distance: Tensor, slope: Tensor, reach: float) -> Tensor:
    flat = slope.abs() < 1e-300
    return torch.where(flat, 0.0, distance / torch.where(flat, 1.0, slope)).clamp(-reach, reach)


def _adaptive_line(f: Callable[[Tensor], Tensor], K: Tensor, tolerance: float) -> Tensor:
    """Bisect the panels on which 10 and 20 Gauss-Legendre nodes disagree, for any member of the batch."""
    scale = K.sqrt().unsqueeze(-1)
    edges = torch.linspace(-_REACH, _REACH, 9, dtype=K.dtype, device=K.device)
    left, right = edges[:-1], edges[1:]
    total = torch.zeros_like(K)
    for _ in range(60):
        fine, coarse = (_panel_sums(f, scale, left, right, order) for order in (20, 10))
        error = (fine - coarse).abs().reshape(-1, len(left)).amax(0)
        size = (total + fine.sum(-1)).detach().abs().max().clamp_min(1e-300)
        # A panel narrower than this cannot be split in a way that the variable would notice.
        done = (error <= tolerance * size * 0.1) | (right - left < 1e-14)
        total = total + (fine * done).sum(-1)
        if done.all():
            return total
        left, right = left[~done], right[~done]
        middle = (left + right) / 2
        left, right = torch.cat([left, middle]), torch.cat([middle, right])
    raise ValueError(f"method 'adaptive' did not reach a tolerance of {tolerance:g}; is f integrable?")


def _panel_sums(f: Callable[[Tensor], Tensor], scale: Tensor, left: Tensor, right: Tensor, order: int) -> Tensor:
    u, w = _panel_nodes(torch.stack([left, right], -1), order)
    values = f((scale.unsqueeze(-1) * u).flatten(-2)).reshape(*scale.shape[:-1], *u.shape)
    return (values * w).sum(-1)


def _adaptive_order(f: Callable[..., Tensor], K: Tensor, tolerance: float, kinks: tuple[float, ...]) -> Tensor:
    order = 6 if kinks else 16
    coarse = _on_nodes(f, K, order, kinks)
    most = _BLOCK * 4
    while (2 * order) ** K.shape[-1] <= most:
        order *= 2
        fine = _on_nodes(f, K, order, kinks)
        if (fine - coarse).abs().max() <= tolerance * fine.abs().max().clamp_min(1e-300):
            return fine
        coarse = fine
    raise ValueError(
        f"method 'adaptive' did not settle to {tolerance:g} with {order} nodes a dimension; name the kinks"
    )

"""Attention of any order in almost linear time, where the logits are bounded: polynomial features in place of exp.

Alman and Song 2023 (arXiv 2310.04064), the upper bound. With phi(x) all monomials of degree at most g, a polynomial P
of degree g for exp, and w its weights, P(q . (k1 * k2)) = phi(q)^T diag(w) (phi(k1) * phi(k2)), and the sum over all
pairs factorises:

    sum_jk P(logit[i, j, k]) V1[j] * V2[k] = phi(q[i])^T diag(w) [ (phi(K1)^T V1) * (phi(K2)^T V2) ]

Nothing of size n^2 is made. Causal and windowed attention factorise in the same way, with a state for each query that
is the product of running sums.

Legend: B problems, n queries, m rows of a key matrix, d features, r monomials, v features of the values, and 1 more for
the normaliser.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lathe.nn.tensor_attention.polynomials import (
    Kind,
    degree_within,
    error_bound,
    exp_poly,
    monomial_rows,
    poly_rank,
    poly_weights,
)

__all__ = ["PolyPlan", "approximate", "plan_poly", "remade"]

# Numbers in the largest intermediate of one step: on CPUs it should stay in the caches.
_CHUNK = {"cpu": 2**18}
_CHUNK_ELSEWHERE = 2**24
_LARGEST_RANK = 10**6
_ROUNDING = 1e-6  # of inputs that are as large as their bound says, in float32


@dataclass(frozen=True)
class PolyPlan:
    """What an approximation will cost and how far it can be off, known before it is run."""

    radius: float
    """The logits lie in [-radius, radius]."""
    degree: int
    rank: int
    """Number of monomials."""
    relative_error: float
    """Of the polynomial, against exp on that interval."""
    error: float
    """Largest possible error of an output entry, in exact arithmetic; inf where nothing is certain: the relative error
    is 1 or more, logits may lie beyond the radius, or values could not be looked at."""
    kind: Kind
    measured: float | None
    """What the logits can reach by the largest entry of each feature; None where it could not be looked at."""


def plan_poly(
    q: Float[Tensor, "... _n _d"],
    ks: Sequence[Float[Tensor, "... _m _d"]],
    vs: Sequence[Float[Tensor, "... _m _v"]],
    *,
    scale: float | None = None,
    bound: float | None = None,
    degree: int | None = None,
    tol: float | None = None,
    kind: Kind = "chebyshev",
) -> PolyPlan:
    """The polynomial for `tensor_attention(q, ks, vs, method="poly", ...)`, with its certified error.

    Args:
        q, ks, vs, scale: as in `tensor_attention`.
        bound: largest absolute entry of q and ks; the logits then reach `scale * d * bound**order`. By default the
            inputs are measured: `scale * sum_l max|q[:, l]| prod_t max|k_t[:, l]|`, which is never larger.
        degree: of the polynomial; by default the least that keeps the error within `tol`.
        tol: largest error of an output entry; 1e-3 by default.
        kind: as in `exp_poly`.

    Raises:
        ValueError: where bound, degree or tol are out of range, or no degree reaches `tol`.
    """
    d, order = q.shape[-1], len(ks) + 1
    scale = 1.0 / d if scale is None else scale
    if bound is not None and not bound > 0.0:
        raise ValueError(f"bound must be positive, got {bound:g}")
    if degree is not None and degree < 0:
        raise ValueError(f"degree must be at least 0, got {degree}")
    if tol is not None and not tol > 0.0:
        raise ValueError(f"tol must be positive, got {tol:g}")
    with torch.no_grad():
        measured = None
        if not (q.is_meta or torch.compiler.is_compiling()):
            reach = torch.stack([_largest(each) for each in (q, *ks)]).double().prod(0).sum()
            measured = float(abs(scale) * reach)
        if bound is None and measured is None and (degree is None or kind != "taylor"):
            raise ValueError("bound must be given where inputs cannot be measured (compiled graphs, meta tensors)")
        vmax = math.inf
        if measured is not None:
            vmax = math.prod(float(v.abs().amax()) if v.numel() else 0.0 for v in vs)
    if bound is not None:
        radius = abs(scale) * d * bound**order * (1.0 + _ROUNDING)
    elif measured is not None:
        if not math.isfinite(measured):
            raise ValueError(f"q and ks must be finite, got logits up to {measured:g}")
        radius = _rounded_up(max(measured, 1e-6) * (1.0 + _ROUNDING))
    else:
        radius = 1.0  # of no consequence: the coefficients of Taylor's polynomial do not depend on it
    if degree is None:
        # 2 eps / (1 - eps) vmax <= tol
        tol = 1e-3 if tol is None else tol
        degree = degree_within(radius, tol / (2.0 * vmax + tol) if math.isfinite(vmax) else tol / (2.0 + tol), kind)
    _, relative_error = exp_poly(radius, degree, kind)
    certain = relative_error < 1.0 and (measured is None or measured <= radius)
    error = error_bound(relative_error, vmax) if certain else math.inf
    return PolyPlan(radius, degree, poly_rank(d, degree), relative_error, error, kind, measured)


def _largest(x: Tensor) -> Tensor:
    """The largest absolute entry of each feature."""
    return x.detach().abs().flatten(0, -2).amax(0) if x.numel() else x.new_zeros(x.shape[-1])


def _rounded_up(radius: float) -> float:
    """To the next sixteenth of an octave, so that inputs of similar range share a polynomial that is fitted once."""
    return 2.0 ** (math.ceil(16.0 * math.log2(radius)) / 16.0)


def approximate(
    q: Float[Tensor, "B n d"],
    ks: Sequence[Float[Tensor, "B _m d"]],
    vs: Sequence[Float[Tensor, "B _m v"]],
    *,
    plan: PolyPlan,
    biases: Sequence[Tensor | None],
    lookback: Sequence[int | None] | None = None,
) -> tuple[Float[Tensor, "B n v"], Float[Tensor, "B n"]]:
    """Outputs and logarithms of the normalisers; rows without any key give 0 and -inf.

    Args:
        q: scaled already.
        biases: added to the logits, for each key matrix (B or 1, 1, m).
        lookback: None lets every query see all; else, for each key matrix, how many rows a query sees up to and with
            its own (None: all of them).

    Raises:
        ValueError: where the rank is beyond a million.
    """
    if plan.rank > _LARGEST_RANK:
        raise ValueError(
            f"degree {plan.degree} in {q.shape[-1]} features needs {plan.rank:,} monomials, more than "
            f"{_LARGEST_RANK:,}: take method='exact', a lower degree or fewer features"
        )
    # Where logits are low, terms cancel: a rounding of the largest term is e^(2 R) roundings of the smallest weight.
    # And running sums that rows leave again gather roundings.
    rounding = math.exp(min(2.0 * plan.radius, 700.0)) * torch.finfo(q.dtype).eps
    leaving = lookback is not None and any(back is not None for back in lookback)
    wide = torch.float64 if leaving or rounding > 0.1 * plan.relative_error else q.dtype
    weights = poly_weights(plan.radius, plan.degree, plan.kind, q.shape[-1]).to(device=q.device, dtype=wide)
    with_one = [torch.cat([v, torch.ones_like(v[..., :1])], -1) for v in vs]
    factors = [None if bias is None else bias.squeeze(1).exp() for bias in biases]
    inputs = [_transposed(x, wide) for x in (q, *ks)]
    values = [v.to(wide) if f is None else v.to(wide) * f.to(wide).unsqueeze(-1) for v, f in zip(with_one, factors)]
    if lookback is None:
        sums = _over_all(inputs, values, weights, plan.degree)
        alive = torch.stack([(value[..., -1] > 0.0).any(1, keepdim=True) for value in values]).all(0)
    else:
        sums = _running(inputs, values, weights, plan.degree, lookback)
        alive = torch.stack([_any_within(value[..., -1] > 0.0, back) for value, back in zip(values, lookback)]).all(0)
    numerator, normaliser = sums[..., :-1], sums[..., -1].masked_fill(~alive, 1.0)
    out = (numerator / normaliser.unsqueeze(-1)).masked_fill(~alive.unsqueeze(-1), 0.0)
    return out.to(q.dtype), normaliser.log().masked_fill(~alive, -math.inf).to(q.dtype)


def _transposed(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).mT.contiguous()


def _rows_at_a_time(numbers: int, device: torch.device) -> int:
    """How many rows of so many numbers each make one step."""
    return max(1, _CHUNK.get(device.type, _CHUNK_ELSEWHERE) // max(1, numbers))


def remade(function: Callable[..., Any], *arguments: Any, random: bool = False) -> Any:
    """Calls the function; a backward pass calls it again in place of keeping what it made on the way."""
    if torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=random)
    return function(*arguments)


def _over_all(inputs: list[Tensor], values: list[Tensor], weights: Tensor, g: int) -> Tensor:
    """(B, n, v + 1): every query against the same state, the product of one (r, v + 1) matrix for each key matrix."""
    step = _rows_at_a_time(len(inputs[0]) * len(weights), weights.device)

    def summed(x: Tensor, value: Tensor) -> Tensor:
        return torch.bmm(monomial_rows(x, g), value)

    def read(x: Tensor, state: Tensor) -> Tensor:
        return torch.bmm(monomial_rows(x, g).mT, state)

    state: Tensor | None = None
    for x, value in zip(inputs[1:], values):
        total: Tensor | None = None
        for x_part, value_part in zip(x.split(step, -1), value.split(step, 1)):
            part = remade(summed, x_part, value_part)
            total = part if total is None else total + part
        assert total is not None
        state = total if state is None else state * total
    assert state is not None
    state = weights.unsqueeze(1) * state
    return torch.cat([remade(read, x_part, state) for x_part in inputs[0].split(step, -1)], 1)


def _running(
    inputs: list[Tensor], values: list[Tensor], weights: Tensor, g: int, lookback: Sequence[int | None]
) -> Tensor:
    """(B, n, v + 1): query i against the product of sums over rows up to i, less those that fell out of the window."""
    q, *keys = inputs
    B, _, n = q.shape
    r, width = len(weights), values[0].shape[-1]
    step = _rows_at_a_time(B * r * width, weights.device)
    # Rows that leave at step i are row i - window: the same rows, later.
    left: list[tuple[Tensor, Tensor] | None] = []
    for key, value, back in zip(keys, values, lookback):
        if back is None or back >= n:
            left.append(None)
        else:
            late_key = torch.cat([torch.zeros_like(key[..., :back]), key[..., : n - back]], -1)
            late_value = torch.cat([torch.zeros_like(value[:, :back]), value[:, : n - back]], 1)
            left.append((late_key, late_value))

    def outer(x: Tensor, value: Tensor) -> Tensor:
        return monomial_rows(x, g).mT.unsqueeze(-1) * value.unsqueeze(-2)  # (B, c, r, v + 1)

    def advance(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        product, ends = None, []
        for at in range(0, len(rest), 5):
            state, key, value, late_key, late_value = rest[at : at + 5]
            change = outer(key, value)
            if late_key is not None:
                change = change - outer(late_key, late_value)
            states = change.cumsum(1) + state.unsqueeze(1)
            ends.append(states[:, -1])
            product = states if product is None else product * states
        assert product is not None
        rows = (monomial_rows(x, g) * weights.unsqueeze(1)).mT  # (B, c, r)
        return (torch.einsum("bcr,bcrv->bcv", rows, product), *ends)

    states = [value.new_zeros(B, r, width) for value in values]
    found = []
    for i in range(0, n, step):
        part = slice(i, i + step)
        arguments: list[Any] = []
        for state, key, value, late in zip(states, keys, values, left):
            arguments += [state, key[..., part], value[:, part]]
            arguments += [None, None] if late is None else [late[0][..., part], late[1][:, part]]
        out, *states = remade(advance, q[..., part], *arguments)
        found.append(out)
    return torch.cat(found, 1) if found else values[0].new_zeros(B, 0, width)


def _any_within(alive: Tensor, back: int | None) -> Tensor:
    """Whether any of the last `back` rows, the own one included, is alive: (B, n)."""
    count = alive.long().cumsum(1)
    if back is not None and back < count.shape[1]:
        count = count - torch.cat([torch.zeros_like(count[:, :back]), count[:, : count.shape[1] - back]], 1)
    return count > 0

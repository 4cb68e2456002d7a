"""`tensor_attention`: softmax attention of a query over tuples of keys, in tiles or approximately in linear time.

Alman and Song 2023 (arXiv 2310.04064), the definition of tensor attention and its general order.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import reduce
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lathe.core.precision import at_least_float32, without_autocast
from lathe.nn.tensor_attention.approximate import PolyPlan, approximate, plan_poly, remade
from lathe.nn.tensor_attention.exact import attend
from lathe.nn.tensor_attention.polynomials import Kind, khatri_rao

__all__ = ["tensor_attention"]

Method = Literal["auto", "exact", "poly"]
METHODS = ("auto", "exact", "poly")
Mask = Float[Tensor, "..."] | Bool[Tensor, "..."]


class Options(TypedDict, total=False):
    """The keyword arguments of `tensor_attention` but for `return_lse`."""

    scale: float | None
    attn_mask: Mask | Sequence[Mask | None] | None
    key_padding_mask: Mask | Sequence[Mask | None] | None
    is_causal: bool
    window: int | Sequence[int] | None
    dropout: float
    method: Method
    degree: int | None
    poly: Kind
    bound: float | None
    tol: float | None
    strict: bool


# Numbers in the windows of keys and values that are laid out at a time.
_WINDOWS = 2**22
# Largest number of keys that several short axes become together.
_MULTIPLIED_OUT = 2**12


@overload
def tensor_attention(
    q: Tensor,
    ks: Sequence[Tensor],
    vs: Sequence[Tensor],
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[Options],
) -> Tensor: ...


@overload
def tensor_attention(
    q: Tensor, ks: Sequence[Tensor], vs: Sequence[Tensor], *, return_lse: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...


def tensor_attention(
    q: Float[Tensor, "... _n _d"],
    ks: Sequence[Float[Tensor, "... _m _d"]],
    vs: Sequence[Float[Tensor, "... _m _v"]],
    *,
    scale: float | None = None,
    attn_mask: Mask | Sequence[Mask | None] | None = None,
    key_padding_mask: Mask | Sequence[Mask | None] | None = None,
    is_causal: bool = False,
    window: int | Sequence[int] | None = None,
    dropout: float = 0.0,
    method: Method = "auto",
    degree: int | None = None,
    poly: Kind = "chebyshev",
    bound: float | None = None,
    tol: float | None = None,
    strict: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of order len(ks) + 1: one query against every tuple of keys, with one joint softmax over the tuples.

        out[i] = sum over (j_1, .., j_{k-1}) of softmax(logit[i])[j_1, .., j_{k-1}] * V_1[j_1] * .. * V_{k-1}[j_{k-1}]
        logit[i, j_1, .., j_{k-1}] = scale * sum_l Q[i, l] K_1[j_1, l] .. K_{k-1}[j_{k-1}, l]

    One key matrix is ordinary attention, two are the paper's tensor attention. The exact method takes time
    n^order * (d + v) and memory for one tile of logits, also in the backward pass, which makes each tile again. The
    polynomial method takes time n * C(d + degree, degree) * v; `plan_poly` tells its certified error beforehand.

    Args:
        q: queries, (..., n, d).
        ks, vs: for each further axis, keys (..., m_t, d) and values (..., m_t, v). Leading dimensions broadcast.
        scale: of the logits; 1 / d by default, as in the paper (ordinary attention takes 1 / sqrt(d)).
        attn_mask: as in `scaled_dot_product_attention`, false leaves out, or numbers that are added to the logits:
            one tensor that broadcasts to (..., n, m_1, .., m_{k-1}); or a sequence with a mask (or None) for each axis,
            broadcasting to (..., n, m_t), which is never multiplied out. Masks get no gradient.
        key_padding_mask: as in `nn.MultiheadAttention`, true leaves a key out of its axis, or numbers that are added:
            (..., m), for all axes, or a sequence with one for each.
        is_causal: query i sees the keys up to i on every axis.
        window: query i sees the keys i - window + 1 to i on every axis; a sequence has a window for each axis. This is
            causal, and takes time n * window^(order - 1).
        dropout: part of the weights set to zero, drawn from torch's global generator.
        method: "exact"; "poly"; or "auto", which approximates only where `tol` allows an error, the error can be
            certified, and it costs less.
        degree: of the polynomial; by default the least whose certified error is within `tol`.
        poly: "chebyshev" or "taylor", see `exp_poly`.
        bound: largest absolute entry of q and ks that the polynomial shall be made for; by default they are measured.
        tol: largest error of an output entry; 1e-3 for method="poly" without a degree.
        strict: raise, in place of a warning, where logits may lie beyond what `bound` says.
        return_lse: also return the logarithm of the sum of exp(logit) over all tuples, (..., n).

    Returns:
        (..., n, v); rows with everything masked are 0 (and their lse is -inf). Half-precision inputs are computed in
        float32.

    Raises:
        ValueError: where ks and vs do not pair up, shapes do not fit, a mask does not broadcast, causal or windowed
            attention has axes of other lengths than the queries, or the polynomial method is asked for a mask that does
            not factorise (one over tuples, or over queries and keys) or for dropout.
    """
    ks, vs = list(ks), list(vs)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must lie in 0 to 1, got {dropout:g}")
    batch, sizes = _checked_shapes(q, ks, vs)
    n, d, v = q.shape[-2], q.shape[-1], vs[0].shape[-1]
    windows = _checked_windows(window, sizes, n)
    if is_causal and any(m != n for m in sizes):
        raise ValueError(f"is_causal needs as many keys as queries on every axis, got {n} queries and {sizes} keys")
    wide = at_least_float32(q.dtype)
    biases, joint = _masks(attn_mask, key_padding_mask, batch, n, sizes, wide)
    scale = 1.0 / d if scale is None else scale

    plan = None
    factorises = joint is None and dropout == 0.0 and all(bias is None or bias.shape[1] == 1 for bias in biases)
    if method == "poly":
        if not factorises:
            raise ValueError("method='poly' takes masks of keys alone and no dropout, got attn_mask or dropout")
        plan = plan_poly(q, ks, vs, scale=scale, bound=bound, degree=degree, tol=tol, kind=poly)
        _warn_beyond(plan, strict)
    elif method == "auto" and tol is not None and factorises:
        tuples = n * math.prod(windows or sizes)
        plan = _worthwhile(q, ks, vs, tuples, scale=scale, bound=bound, degree=degree, tol=tol, kind=poly)

    with without_autocast(q.device):
        flat = [_flattened(each.to(wide), batch) for each in (q, *ks, *vs)]
        query, keys, values = flat[0] * scale, flat[1 : len(ks) + 1], flat[len(ks) + 1 :]
        if plan is not None:
            lookback: Sequence[int | None] | None = windows or ([None] * len(ks) if is_causal else None)
            out, lse = approximate(query, keys, values, plan=plan, biases=biases, lookback=lookback)
        elif windows is not None:
            out, lse = _windowed(query, keys, values, windows, biases, joint, dropout)
        else:
            out, lse = _exact(query, keys, values, biases, joint, is_causal, dropout)
        out = out.view(*batch, n, v).to(q.dtype)
    return (out, lse.view(*batch, n)) if return_lse else out


def _exact(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    biases: list[Tensor | None],
    joint: Tensor | None,
    causal: bool,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Of (B, n, d) queries: the longest axis becomes the inner one, where matrix products want it, the others outer.

    Short axes are multiplied out into the inner one as well: once, instead of with each query.
    """
    sizes = [each.shape[1] for each in keys]
    longest = len(sizes) - 1 - sizes[::-1].index(max(sizes))
    outer = [t for t in range(len(keys)) if t != longest]
    k, v, bias = keys[longest], values[longest], biases[longest]
    if joint is not None:
        joint = joint.permute(0, 1, *(2 + t for t in (*outer, longest)))
    elif not causal:
        for t in reversed(outer):
            together = (bias, biases[t])
            simple = all(each is None or each.shape[1] == 1 for each in together)
            if not simple or k.shape[1] > 2 * query.shape[1] or k.shape[1] * sizes[t] > _MULTIPLIED_OUT:
                break
            k, v = khatri_rao(keys[t], k), khatri_rao(values[t], v)
            if any(each is not None for each in together):
                inner, other = (query.new_zeros(1, 1, 1) if each is None else each for each in together)
                rows = k.shape[1] // sizes[t]
                bias = (other.unsqueeze(-1) + inner.unsqueeze(-2)).expand(-1, -1, sizes[t], rows).flatten(2)
            outer.remove(t)
    K, V = (
        reduce(khatri_rao, [each[t] for t in outer]) if outer else torch.ones_like(each[longest][:, :1])
        for each in (keys, values)
    )
    return attend(
        query,
        K,
        V,
        k,
        v,
        sizes=[*(sizes[t] for t in outer), k.shape[1]],
        biases=[*(biases[t] for t in outer), bias],
        mask=joint,
        causal=causal,
        dropout=dropout,
    )


def _windowed(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    windows: Sequence[int],
    biases: list[Tensor | None],
    joint: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Each query becomes a problem of its own, with the keys of its windows laid out for it."""
    B, n, d = query.shape
    step = max(1, _WINDOWS // max(1, B * sum(windows) * (d + values[0].shape[-1])))
    padded = [
        [torch.nn.functional.pad(each, (0, 0, w - 1, 0)) for each, w in zip(rows, windows)] for rows in (keys, values)
    ]

    def part(i: int, query: Tensor, *padded: Tensor) -> tuple[Tensor, Tensor]:
        rows = query.shape[1]
        at = torch.arange(i, i + rows, device=query.device)
        seen = [at.unsqueeze(1) + torch.arange(1 - w, 1, device=query.device) for w in windows]  # (rows, w)

        def laid_out(mask: Tensor) -> Tensor:
            return mask.expand(B, *mask.shape[1:]).reshape(B * rows, 1, *mask.shape[2:])

        own_keys, own_values = (
            [each.unfold(1, w, 1).mT.reshape(B * rows, w, each.shape[2]) for each, w in zip(some, windows)]
            for some in (padded[: len(windows)], padded[len(windows) :])
        )
        own_biases: list[Tensor | None] = []
        for bias, index in zip(biases, seen):
            if bias is None and i >= index.shape[1] - 1:
                own_biases.append(None)
                continue
            own = query.new_zeros(1, rows, index.shape[1]).masked_fill(index < 0, -math.inf)
            if bias is not None:
                chosen = bias[:, i : i + rows] if bias.shape[1] > 1 else bias.expand(-1, rows, -1)
                own = own + chosen.gather(2, index.clamp(min=0).expand(len(bias), -1, -1))
            own_biases.append(laid_out(own))
        own_joint = None
        if joint is not None:
            axes = [[-1 if each == t else 1 for each in range(len(windows))] for t in range(len(windows))]
            tuples: Any = [
                (which.clamp(min=0) if size > 1 else which * 0).view(rows, *shape)
                for which, size, shape in zip(seen, joint.shape[2:], axes)
            ]
            row = (at if joint.shape[1] > 1 else at * 0).view(rows, *[1] * len(windows))
            own_joint = laid_out(joint[:, row, *tuples])
        out, lse = _exact(query.reshape(B * rows, 1, d), own_keys, own_values, own_biases, own_joint, False, dropout)
        return out.view(B, rows, out.shape[-1]), lse.view(B, rows)

    found = []
    for i in range(0, n, step):
        rows = min(step, n - i)
        pieces = [each[:, i : i + rows + w - 1] for some in padded for each, w in zip(some, windows)]
        own = query[:, i : i + rows]
        found.append(remade(part, i, own, *pieces, random=dropout > 0.0) if n > step else part(i, own, *pieces))
    if not found:
        return query.new_zeros(B, 0, values[0].shape[-1]), query.new_zeros(B, 0)
    out, lse = zip(*found)
    return torch.cat(out, 1), torch.cat(lse, 1)


# --- what may be approximated -----------------------------------------------------------------------------------------


def _worthwhile(
    q: Tensor,
    ks: list[Tensor],
    vs: list[Tensor],
    tuples: int,
    *,
    scale: float,
    bound: float | None,
    degree: int | None,
    tol: float,
    kind: Kind,
) -> PolyPlan | None:
    """A plan that is certified to keep the error within `tol` and costs less than the exact method, if there is one."""
    if bound is None and (q.is_meta or torch.compiler.is_compiling()):
        return None
    try:
        plan = plan_poly(q, ks, vs, scale=scale, bound=bound, degree=degree, tol=tol, kind=kind)
    except ValueError:  # no degree does
        return None
    width = vs[0].shape[-1]
    cost = plan.rank * (width + 1) * (q.shape[-2] + sum(k.shape[-2] for k in ks))
    # The features are worth a few products each, and running sums more.
    return plan if plan.error <= tol and 8 * cost < tuples * (q.shape[-1] + width) else None


def _warn_beyond(plan: PolyPlan, strict: bool) -> None:
    if plan.measured is not None and plan.measured > plan.radius:
        message = (
            f"logits may reach {plan.measured:.4g}, beyond the {plan.radius:.4g} that bound stands for: "
            "the error is not certified"
        )
        if strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=3)


# --- shapes and masks -------------------------------------------------------------------------------------------------


def _checked_shapes(q: Tensor, ks: list[Tensor], vs: list[Tensor]) -> tuple[tuple[int, ...], list[int]]:
    """The common leading dimensions, and the number of keys on each axis."""
    if not ks or len(ks) != len(vs):
        raise ValueError(f"ks and vs must hold one matrix an axis, at least one each, got {len(ks)} and {len(vs)}")
    shapes = f"q {tuple(q.shape)}, ks {[tuple(k.shape) for k in ks]}, vs {[tuple(v.shape) for v in vs]}"
    if any(each.ndim < 2 for each in (q, *ks, *vs)):
        raise ValueError(f"q, ks and vs must have rows and features, got {shapes}")
    if any(k.shape[-1] != q.shape[-1] for k in ks) or q.shape[-1] == 0:
        raise ValueError(f"ks must have the features of q, got {shapes}")
    if any(v.shape[-1] != vs[0].shape[-1] for v in vs):
        raise ValueError(f"vs must have equal numbers of features, got {shapes}")
    if any(k.shape[-2] != v.shape[-2] for k, v in zip(ks, vs)):
        raise ValueError(f"keys and values of one axis must have as many rows, got {shapes}")
    if any(each.dtype != q.dtype for each in (*ks, *vs)):
        raise ValueError(f"ks and vs must have the type of q, got {[each.dtype for each in (q, *ks, *vs)]}")
    try:
        batch = torch.broadcast_shapes(*(each.shape[:-2] for each in (q, *ks, *vs)))
    except RuntimeError:
        raise ValueError(f"leading dimensions must broadcast, got {shapes}") from None
    return tuple(batch), [k.shape[-2] for k in ks]


def _checked_windows(window: int | Sequence[int] | None, sizes: list[int], n: int) -> list[int] | None:
    if window is None:
        return None
    windows = [window] * len(sizes) if isinstance(window, int) else list(window)
    if len(windows) != len(sizes) or any(w < 1 for w in windows):
        raise ValueError(f"window must be positive, one for all or one for each of {len(sizes)} axes, got {window}")
    if any(m != n for m in sizes):
        raise ValueError(f"window needs as many keys as queries on every axis, got {n} queries and {sizes} keys")
    return [max(1, min(w, n)) for w in windows]


def _masks(
    attn_mask: Mask | Sequence[Mask | None] | None,
    key_padding_mask: Mask | Sequence[Mask | None] | None,
    batch: tuple[int, ...],
    n: int,
    sizes: list[int],
    dtype: torch.dtype,
) -> tuple[list[Tensor | None], Tensor | None]:
    """What is added along each axis, (B or 1, n or 1, m_t), and the mask over tuples, of sizes n and m_t or 1."""
    biases: list[Tensor | None] = [None] * len(sizes)
    joint = None
    if isinstance(attn_mask, Tensor) and len(sizes) > 1:
        joint = _leading(_checked_mask("attn_mask", attn_mask, (*batch, n, *sizes)), batch, len(sizes) + 1)
    elif attn_mask is not None:
        masks = [attn_mask] if isinstance(attn_mask, Tensor) else list(attn_mask)
        if len(masks) != len(sizes):
            raise ValueError(f"attn_mask must have a mask or None for each of {len(sizes)} axes, got {len(masks)}")
        for t, (mask, m) in enumerate(zip(masks, sizes)):
            if mask is not None:
                mask = _leading(_checked_mask("attn_mask", mask, (*batch, n, m)), batch, 2)
                biases[t] = _added(mask, dtype).expand(-1, -1, m)
    if key_padding_mask is not None:
        alike = isinstance(key_padding_mask, Tensor)
        masks = [key_padding_mask] * len(sizes) if isinstance(key_padding_mask, Tensor) else list(key_padding_mask)
        if len(masks) != len(sizes):
            raise ValueError(f"key_padding_mask must have a mask for each of {len(sizes)} axes, got {len(masks)}")
        if alike and len(set(sizes)) > 1:
            raise ValueError(f"key_padding_mask must have a mask for each axis where these differ, got axes of {sizes}")
        for t, (mask, m) in enumerate(zip(masks, sizes)):
            if mask is None:
                continue
            mask = _checked_mask("key_padding_mask", mask, (*batch, m)).unsqueeze(-2)
            padding = _added(~mask if mask.dtype == torch.bool else mask, dtype)
            padding = _leading(padding, batch, 2).expand(-1, -1, m)
            bias = biases[t]
            biases[t] = padding if bias is None else bias + padding
    return biases, joint


def _checked_mask(name: str, mask: Tensor, target: tuple[int, ...]) -> Tensor:
    if not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(f"{name} must be of booleans or floating-point numbers, got {mask.dtype}")
    if mask.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must not require a gradient: masks get none")
    try:
        fits = torch.broadcast_shapes(mask.shape, target) == torch.Size(target)
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"{name} must broadcast to {target}, got {tuple(mask.shape)}")
    return mask


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """As numbers: what is false is left out."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -math.inf)
    return mask.to(dtype)


def _leading(mask: Tensor, batch: tuple[int, ...], trailing: int) -> Tensor:
    """(B or 1, *the last `trailing` dimensions)."""
    mask = mask[(None,) * max(0, trailing - mask.ndim)]
    lead, rest = mask.shape[:-trailing], mask.shape[-trailing:]
    if all(size == 1 for size in lead):
        return mask.reshape(1, *rest)
    return mask.expand(*batch, *rest).reshape(-1, *rest)


def _flattened(x: Tensor, batch: tuple[int, ...]) -> Tensor:
    return x.expand(*batch, *x.shape[-2:]).reshape(math.prod(batch), *x.shape[-2:])

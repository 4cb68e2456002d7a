"""Pooling over windows, and kernels of a sequence as matrices."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lathe.core.gaussian import Activation
from lathe.theory.prediction.signals import Function, Geometry, Signal

__all__ = ["attended", "from_matrix", "largest", "matrix", "pooled", "pooled_mean", "unpooled"]

_SAMPLES = 8192


def _window(options: dict[str, Any]) -> list[tuple[int, ...]]:
    return list(itertools.product(*[range(k) for k in options["kernel"]]))


def _moved(options: dict[str, Any], offset: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(s * d + y - x for s, d, x, y in zip(options["stride"], offset, a, b))


def _at_tap(images: Tensor, tap: tuple[int, ...], grid: tuple[int, ...], options: dict[str, Any]) -> Tensor:
    """(..., *input grid) -> (..., *output grid): what each window has at one of its taps; zero in the padding."""
    margins = []
    for size, out, s, p, t in reversed(
        list(zip(images.shape[-len(grid) :], grid, options["stride"], options["padding"], tap))
    ):
        last = (out - 1) * s + t - p
        margins += [p, max(0, last - size + 1)]
    padded = F.pad(images, margins)
    for axis, (out, s, t) in enumerate(zip(grid, options["stride"], tap)):
        where = images.ndim - len(grid) + axis
        padded = padded.narrow(where, t, (out - 1) * s + 1)
        index: tuple[Any, ...] = (*[slice(None)] * where, slice(None, None, s))
        padded = padded[index]
    return padded


def pooled(kernel: Tensor, source: Geometry, geometry: Geometry, options: dict[str, Any]) -> Tensor:
    """The kernel of averages over windows."""
    taps = _window(options)
    images = kernel.unflatten(-1, source.grid)
    out = torch.zeros(geometry.shape, dtype=kernel.dtype)
    for a in taps:
        near = _at_tap(images, a, geometry.grid, options).flatten(2)
        for b in taps:
            columns = [source.index[_moved(options, offset, a, b)] for offset in geometry.offsets]
            out += near[:, columns]
    return out / len(taps) ** 2


def pooled_mean(mean: Tensor, source: Geometry, options: dict[str, Any]) -> Tensor:
    grid = tuple(
        (size + 2 * p - k) // s + 1
        for size, p, k, s in zip(source.grid, options["padding"], options["kernel"], options["stride"])
    )
    images = mean.unflatten(-1, source.grid)
    return torch.stack([_at_tap(images, tap, grid, options) for tap in _window(options)]).mean(0).flatten(1)


def unpooled(
    gradient: Tensor, geometry: Geometry, target: Geometry, options: dict[str, Any], one: bool = False
) -> Tensor:
    """The kernel of gradients before pooling; with `one`, where only the largest of a window gets any."""
    taps = _window(options)
    sizes = [size + 2 * p + k for size, p, k in zip(target.grid, options["padding"], options["kernel"])]
    out = torch.zeros(len(gradient), len(target.offsets), *sizes, dtype=gradient.dtype)
    images = gradient.unflatten(-1, geometry.grid)
    for a in taps:
        place: list[Any] = [
            slice(t, t + (size - 1) * s + 1, s) for t, size, s in zip(a, geometry.grid, options["stride"])
        ]
        for number, offset in enumerate(geometry.offsets):
            for b in taps:
                if one and number == 0 and a != b:
                    continue  # a window has one largest
                column = target.index[_moved(options, offset, a, b)]
                weight = len(taps) if one and number == 0 else 1
                out[(slice(None), column, *place)] += weight * images[:, number]
    for axis, (size, p) in enumerate(zip(target.grid, options["padding"])):
        out = out.narrow(2 + axis, p, size)
    # With `one`: one in len(taps) that a position is the largest; else 1 / len(taps) of the gradient for each.
    return out.flatten(2) / len(taps) ** 2 * target.inside


def largest(
    signal: Signal, source: Geometry, geometry: Geometry, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the largest over windows, by sampling: second moments, means, and slopes of the function that is pooled.

    Covariances are averaged over positions. Where the signal is a function of a Gaussian field the slopes are that
    function's at the largest, `E[f'(a) f'(b)]` over pairs; else one.
    """
    act = Activation(lambda z: z, name="linear")
    mean = torch.zeros(source.inputs, 1, dtype=torch.float64)
    base, bent = signal, False
    scale, atom = signal.terms[0]
    plain = len(signal.terms) == 1 and not isinstance(scale, Tensor) and scale == 1
    if plain and isinstance(atom, Function) and atom.of.is_gaussian:
        act, base, bent = atom.act, atom.of, True
    K = base.second(source)
    if not base.is_gaussian:
        mean = base.mean(source).mean(1, keepdim=True)
    count = source.inside.sum(-1).clamp_min(1)
    K = K.sum(-1) / count - mean[source.first] * mean[source.second]  # (pairs, offsets)
    taps = _window(options)
    k = len(taps)
    inner = [source.index[_moved(options, geometry.offsets[0], a, b)] for a in taps for b in taps]
    own = K[: source.inputs, inner].reshape(-1, k, k)
    kernel, slopes = torch.zeros(geometry.shape, dtype=torch.float64), torch.ones(geometry.shape, dtype=torch.float64)
    noise = torch.randn(_SAMPLES // 2, 2 * k, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = torch.cat([noise, -noise])
    means = torch.zeros(source.inputs, dtype=torch.float64)
    for number, offset in enumerate(geometry.offsets):
        across = K[:, [source.index[_moved(options, offset, a, b)] for a in taps for b in taps]].reshape(-1, k, k)
        first, second = own[source.first], own[source.second]
        joint = torch.cat([torch.cat([first, across], 2), torch.cat([across.mT, second], 2)], 1)
        values, vectors = torch.linalg.eigh(joint)
        root = vectors * values.clamp_min(0).sqrt().unsqueeze(1)
        z = noise @ root.mT  # (pairs, samples, 2 k)
        sides = z[..., :k] + mean[source.first].unsqueeze(1), z[..., k:] + mean[source.second].unsqueeze(1)
        (a, at_a), (b, at_b) = (act(side).max(-1, keepdim=True) for side in sides)
        a, b = a.squeeze(-1), b.squeeze(-1)
        if bent:
            slope_a, slope_b = (act.derivative(side.gather(-1, at)) for side, at in zip(sides, (at_a, at_b)))
            slopes[:, number] = (slope_a * (slope_a if number == 0 else slope_b)).mean(1)
        if number == 0:  # an input with itself at one place: one window
            kernel[: source.inputs, 0] = a[: source.inputs].square().mean(1, keepdim=True)
            kernel[source.inputs :, 0] = (a * b)[source.inputs :].mean(1, keepdim=True)
            means = a[: source.inputs].mean(1)
        else:
            kernel[:, number] = (a * b).mean(1, keepdim=True)
    return kernel * geometry.inside, means.unsqueeze(1).expand(-1, geometry.positions), slopes


def attended(value: Tensor, query: Tensor, key: Tensor, pairs: Geometry, causal: bool, sharpness: float) -> Tensor:
    """Kernel matrices of what attention puts out, from those of values, queries and keys, all (pairs, P, P).

    Logits of many heads are Gaussian with the covariances of queries times those of keys; the mean of a product of two
    attention weights goes as that of the exponentials, `exp(c_a / 2 + c_b / 2 + c_ab)`, normalised.
    """
    P = value.shape[-1]
    q, k = (m[: pairs.inputs].diagonal(dim1=1, dim2=2) for m in (query, key))  # (inputs, P)
    seen = torch.ones(P, P, dtype=value.dtype)
    seen = seen.tril() if causal else seen
    out = torch.empty_like(value)
    for number, (i, j) in enumerate(zip(pairs.first.tolist(), pairs.second.tolist())):
        for p in range(P):
            # (p', key position of i, key position of j)
            own = torch.exp(sharpness * q[i, p] * k[i] / 2) * seen[p]
            other = torch.exp(sharpness * q[j].unsqueeze(-1) * k[j] / 2) * seen
            joint = torch.exp(sharpness * query[number, p].reshape(P, 1, 1) * key[number])
            weight = joint * own.reshape(1, P, 1) * other.unsqueeze(1)
            out[number, p] = (weight * value[number]).sum((1, 2)) / weight.sum((1, 2))
    return out


def matrix(kernel: Tensor, geometry: Geometry) -> Tensor:
    """(rows, offsets, positions) of a sequence as (rows, positions, positions); zero where nothing is known."""
    P = geometry.positions
    full = torch.zeros(len(kernel), P * P, dtype=kernel.dtype)
    place = (torch.arange(P) * P + geometry.far_position)[geometry.inside]
    full[:, place] = kernel[:, geometry.inside]
    return full.reshape(-1, P, P)


def from_matrix(full: Tensor, geometry: Geometry) -> Tensor:
    P = geometry.positions
    place = torch.arange(P) * P + geometry.far_position
    return full.flatten(1)[:, place] * geometry.inside

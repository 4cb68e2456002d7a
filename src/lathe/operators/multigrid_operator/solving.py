"""The cycle as a solver: planting classical kernels, fitting a given operator, preconditioning conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import numpy as np
import torch
from jaxtyping import Inexact
from torch import Tensor, nn

from lathe.operators.multigrid_operator.cycle import _Kernel, _Level, _MultigridConv

__all__ = ["Solved", "fit_linear_operator", "flexible_cg", "plant"]


@torch.no_grad()
def plant(
    layer: _MultigridConv,
    stencil: Tensor,
    spacing: float,
    *,
    smoother: Literal["jacobi", "spai"] = "jacobi",
    damping: float = 0.8,
    coarse_damping: float = 1.0,
) -> None:
    """Write the classical multigrid cycle for `stencil / spacing**2` into channel 0 of `layer`, in place.

    On level l, with h = 2**l * spacing: A = stencil / h**2; S = damping * h**2 / centre ("jacobi"), or the sparse
    approximate inverse, the S of 3 taps an axis that minimises ||I - S A||_F ("spai"; not damped); R full weighting;
    P linear interpolation. Channel 0 then reads from no other channel, so it is exactly the cycle, also where the layer
    has a learned Pi (planted as 0). The other channels keep their weights: a start for learned solvers.

    Args:
        layer: a cycle with `residual=True` and no norm, whose kernels have at least 3 taps an axis.
        stencil: 3 entries an axis, for instance `[[0, -1, 0], [-1, 4, -1], [0, -1, 0]]`, the negative Laplacian.
        spacing: distance between the points of the finest grid.
        smoother: "jacobi" or "spai".
        damping: of the Jacobi steps; 0.8 smooths the 5-point Laplacian best.
        coarse_damping: of the Jacobi steps on the coarsest level; 1 solves a coarsest grid of one point exactly.

    Raises:
        ValueError: where the stencil or the layer does not fit.
    """
    d = layer.ndim
    if tuple(stencil.shape) != (3,) * d or stencil[(1,) * d] == 0:
        raise ValueError(f"stencil must have 3 entries on {d} axes and a centre that is not 0, got {stencil.tolist()}")
    if not layer.residual or any(level.norm is not None for level in layer.levels):
        raise ValueError(
            "layer must have residual=True and norm=None: a classical cycle restricts the residual, unscaled"
        )
    if min(layer.kernel_size) < 3:
        raise ValueError(f"layer must have a kernel_size of at least 3, got {layer.kernel_size}")
    if smoother not in ("jacobi", "spai"):
        raise ValueError(f"smoother must be 'jacobi' or 'spai', got {smoother!r}")
    averaging = _outer([0.25, 0.5, 0.25], d)
    interpolation = _outer([0.5, 1.0, 0.5, 0.0], d)
    for l, level in enumerate(layer.levels):
        assert isinstance(level, _Level)
        h2 = (2**l * spacing) ** 2
        strength = coarse_damping if l == len(layer.levels) - 1 else damping
        taps = _approximate_inverse(stencil) if smoother == "spai" else _jacobi(stencil, strength)
        for kernel in level.smoothers:
            _plant_channel(kernel, h2 * taps)
        for kernel in level.operators:
            _plant_channel(kernel, stencil / h2)
        if level.restriction is not None:
            _plant_channel(level.restriction, averaging)
        if level.injection is not None:
            _plant_channel(level.injection, torch.zeros_like(averaging))
        if level.prolongation is not None:
            level.prolongation.weight[:, 0] = 0  # a transposed convolution's weight is (inputs, outputs, taps)
            level.prolongation.weight[0, 0] = interpolation.to(level.prolongation.weight)


def fit_linear_operator(
    layer: nn.Module,
    apply_fn: Callable[[Tensor], Tensor],
    sampler: Callable[[torch.Generator], Tensor],
    steps: int,
    *,
    lr: float = 5e-3,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Fit `layer`, in place, to a linear operator that can be applied, for instance an inverse.

    Adam with a one-cycle schedule on the mean relative L2 error of fresh batches.

    Args:
        layer: a cycle, or a module that contains cycles (with a pointwise head, say).
        apply_fn: the operator: a batch of f to a batch of u.
        sampler: draws a batch of f from a generator.
        steps: optimiser steps.
        lr: the schedule's highest learning rate.
        seed: seeds the generator that `sampler` is given.
        progress: called with (steps done, steps).

    Returns:
        The mean relative L2 error on a batch that was not trained on.

    Raises:
        ValueError: for fewer than 1 step, or where the two outputs have different shapes.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(layer.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1)
    for step in range(steps):
        error = _relative_error(layer, apply_fn, sampler(generator))
        optimizer.zero_grad(set_to_none=True)
        error.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, steps)
    with torch.no_grad():
        return float(_relative_error(layer, apply_fn, sampler(generator)))


@dataclass(frozen=True)
class Solved:
    """What `flexible_cg` found.

    Attributes:
        solution: the last iterate.
        residuals: (iterations + 1, batch), ||b - A x|| / ||b|| before each iteration and at the end.
        converged: (batch,), whether the tolerance was met.
    """

    solution: Tensor
    residuals: Tensor
    converged: Tensor

    @property
    def iterations(self) -> int:
        return len(self.residuals) - 1


@torch.no_grad()
def flexible_cg(
    apply_fn: Callable[[Tensor], Tensor],
    b: Inexact[Tensor, batch * rest],
    precondition: Callable[[Tensor], Tensor] | None = None,
    *,
    tol: float = 1e-8,
    max_iterations: int = 200,
) -> Solved:
    """Solve A x = b for a symmetric positive definite A, with any preconditioner, a learned cycle for instance.

    Each sample of the batch is its own system. The preconditioner need be neither symmetric nor even right: a step is
    taken along z = M r, made A-orthogonal to the last direction (Notay, "Flexible conjugate gradients", 2000), with the
    exact step length; where <z, r> <= 0 the plain residual is used instead. So the energy norm of the error falls in
    every iteration, and a bad preconditioner costs time but never the solution.

    Args:
        apply_fn: x -> A x.
        b: right-hand sides.
        precondition: r -> an approximation of A^-1 r; None is plain conjugate gradients.
        tol: ends when ||b - A x|| <= tol * ||b|| for every sample.
        max_iterations: ends then at the latest.

    Raises:
        ValueError: where A turns out not to be positive definite along a direction.
    """

    def dot(x: Tensor, y: Tensor) -> Tensor:
        return (x.conj() * y).flatten(1).sum(1).real.reshape(-1, *(1,) * (b.ndim - 1))

    x, r = torch.zeros_like(b), b.clone()
    norm = dot(b, b).sqrt().clamp_min(torch.finfo(b.dtype).tiny)
    residuals = [dot(r, r).sqrt() / norm]
    p = ap = pap = None
    while len(residuals) <= max_iterations and bool((residuals[-1] > tol).any()):
        z = r if precondition is None else precondition(r)
        z = torch.where(dot(z, r) > 0, z, r)
        if p is not None and ap is not None and pap is not None:
            z = z - p * (dot(ap, z) / pap)
        p, ap = z, apply_fn(z)
        open_ = residuals[-1] > tol
        pap = dot(p, ap)
        if bool((open_ & (pap <= 0)).any()):
            raise ValueError("apply_fn must be symmetric positive definite, got <p, A p> <= 0 for a direction p")
        pap = torch.where(pap > 0, pap, 1.0)
        alpha = torch.where(open_, dot(p, r) / pap, 0.0)
        x = x + alpha * p
        r = r - alpha * ap
        residuals.append(dot(r, r).sqrt() / norm)
    history = torch.stack(residuals).flatten(1)
    return Solved(x, history, history[-1] <= tol)


def _relative_error(layer: nn.Module, apply_fn: Callable[[Tensor], Tensor], f: Tensor) -> Tensor:
    with torch.no_grad():
        u = apply_fn(f)
    fitted = layer(f)
    if fitted.shape != u.shape:
        raise ValueError(f"layer must return what apply_fn does, {tuple(u.shape)}, got {tuple(fitted.shape)}")
    return ((fitted - u).flatten(1).norm(dim=1) / u.flatten(1).norm(dim=1)).mean()


def _outer(taps: list[float], d: int) -> Tensor:
    line = torch.tensor(taps, dtype=torch.float64)
    return reduce(lambda x, y: x[..., None] * y, [line] * d)


def _jacobi(stencil: Tensor, damping: float) -> Tensor:
    taps = torch.zeros_like(stencil)
    centre = (1,) * stencil.ndim
    taps[centre] = damping / stencil[centre]
    return taps


def _approximate_inverse(stencil: Tensor) -> Tensor:
    """The 3**d taps whose convolution with the stencil is nearest to a delta, by least squares."""
    d = stencil.ndim
    shifts = list(np.ndindex(*(3,) * d))
    columns = stencil.new_zeros(len(shifts), *(5,) * d)
    for column, shift in zip(columns, shifts):
        column[tuple(slice(i, i + 3) for i in shift)] = stencil
    delta = stencil.new_zeros((5,) * d)
    delta[(2,) * d] = 1
    return torch.linalg.lstsq(columns.flatten(1).T, delta.reshape(-1, 1)).solution.reshape((3,) * d)


def _plant_channel(kernel: nn.Module, taps: Tensor) -> None:
    """The taps, centred, from channel 0 to channel 0, and nothing else into channel 0."""
    assert isinstance(kernel, _Kernel)
    kernel.weight[0] = 0
    if kernel.bias is not None:
        kernel.bias[0] = 0
    inside = tuple(slice((size - 3) // 2, (size + 3) // 2) for size in kernel.weight.shape[2:])
    kernel.weight[0, 0][inside] = taps.to(kernel.weight)

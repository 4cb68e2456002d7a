"""Partial differential equations whose solution operators networks learn: random inputs, and solvers that are right.

Random fields and coefficients are drawn from an explicit generator; solvers work in float64 on the CPU but for
Navier-Stokes, which runs where its input is, and return the precision of their input. Grids are said where they matter.
Settings follow Li et al. 2020 (arXiv 2010.08895), Kossaifi et al. 2023 (2310.00120), He et al. 2023 (2310.19809).

    -div(a grad u) = f, u = 0 on the boundary                         darcy_2d
    -Lap u = f                                                        poisson
    Lap u + (omega / c)^2 u = 0, du/dn = 1 on the top, else 0         helmholtz_2d
    w_t + (u . grad) w = nu Lap w + f, u = curl psi, -Lap psi = w     navier_stokes_2d
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import scipy.fft
import torch
from jaxtyping import Float, Inexact
from scipy.sparse import csc_array
from scipy.sparse.linalg import splu
from torch import Tensor

__all__ = [
    "darcy_2d",
    "gaussian_random_field",
    "helmholtz_2d",
    "helmholtz_speed",
    "multiscale_coefficient",
    "navier_stokes_2d",
    "poisson",
    "two_phase_coefficient",
]


def gaussian_random_field(
    samples: int,
    shape: Sequence[int],
    *,
    alpha: float,
    tau: float,
    length: float = 1.0,
    boundary: Literal["periodic", "neumann"] = "periodic",
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, samples * grid]:
    """Gaussian fields of mean 0 and covariance tau^(2 alpha - d) (-Lap + tau^2)^-alpha, without the constant mode.

    Args:
        samples: how many.
        shape: grid points along each of the d axes.
        alpha: smoothness: the field's energy at frequency k falls as |k|^(-2 alpha).
        tau: inverse correlation length.
        length: of the domain along each axis.
        boundary: "periodic": points j * length / n; "neumann": cosine modes at the cell centres (j + 1/2) * length / n.
        generator: source of randomness.
        dtype: of the result; the transform is float64.

    Raises:
        ValueError: for an unknown boundary, or alpha or tau not positive.
    """
    if boundary not in ("periodic", "neumann"):
        raise ValueError(f"boundary must be 'periodic' or 'neumann', got {boundary!r}")
    if alpha <= 0 or tau <= 0:
        raise ValueError(f"alpha and tau must be positive, got {alpha} and {tau}")
    shape = tuple(shape)
    d, points, axes = len(shape), math.prod(shape), tuple(range(1, len(shape) + 1))
    if boundary == "periodic":
        lines = [torch.fft.fftfreq(n, 1 / n, dtype=torch.float64) * (2 * math.pi / length) for n in shape]
    else:
        lines = [torch.arange(n, dtype=torch.float64) * (math.pi / length) for n in shape]
    square = torch.stack([k**2 for k in torch.meshgrid(*lines, indexing="ij")]).sum(0)
    root = tau ** ((2 * alpha - d) / 2) * (square + tau**2) ** (-alpha / 2)
    root[(0,) * d] = 0
    if boundary == "periodic":
        # E|xi|^2 = 1; the real part halves the variance, the factor sqrt 2 restores it.
        noise = torch.randn(samples, *shape, dtype=torch.complex128, generator=generator)
        field = torch.fft.ifftn(points * math.sqrt(2) * root * noise, dim=axes).real
    else:
        noise = torch.randn(samples, *shape, dtype=torch.float64, generator=generator)
        modes = (math.sqrt(points) * root * noise).numpy()
        field = torch.from_numpy(scipy.fft.idctn(modes, type=2, norm="ortho", axes=axes))
    return field.to(dtype)


def two_phase_coefficient(
    samples: int,
    n: int,
    *,
    alpha: float = 2.0,
    tau: float = 3.0,
    high: float = 12.0,
    low: float = 3.0,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "samples n n"]:
    """Conductivities that are `high` where a Gaussian field is positive and `low` elsewhere, on n x n cells.

    tau = 3 gives the usual large patches; tau near 20 the rough, finely mixed ones.
    """
    field = gaussian_random_field(samples, (n, n), alpha=alpha, tau=tau, boundary="neumann", generator=generator)
    return torch.where(field >= 0, high, low).to(dtype)


def multiscale_coefficient(
    samples: int, n: int, *, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "samples n n"]:
    """Trigonometric coefficients with six scales, on n x n cells.

    prod over k = 1..6 of (1 + cos(a_k pi (x + y)) / 2) (1 + sin(a_k pi (y - 3 x)) / 2),
    a_k uniform in [2^(k-1), 1.5 * 2^(k-1)].
    """
    x = ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]
    y = x.T
    scale = 2.0 ** torch.arange(6, dtype=torch.float64)
    frequency = math.pi * scale * (1 + 0.5 * torch.rand(samples, 6, dtype=torch.float64, generator=generator))
    a = torch.ones(samples, n, n, dtype=torch.float64)
    for k in frequency.T[:, :, None, None]:
        a *= (1 + 0.5 * torch.cos(k * (x + y))) * (1 + 0.5 * torch.sin(k * (y - 3 * x)))
    return a.to(dtype)


def darcy_2d(
    a: Float[Tensor, "samples n1 n2"], f: Float[Tensor, "samples n1 n2"] | float = 1.0
) -> Float[Tensor, "samples n1 n2"]:
    """Solve -div(a grad u) = f on the unit square, u = 0 on its boundary, by cell-centred finite volumes.

    Fluxes use harmonic means between cells and half a cell to the boundary; the sparse system is factorised for each
    sample. Second order for smooth a, and exact fluxes for layered a.

    Args:
        a: positive conductivity of each cell.
        f: source of each cell, or one number.

    Raises:
        ValueError: where a is not positive and finite everywhere.
    """
    if not bool((torch.isfinite(a) & (a > 0)).all()):
        raise ValueError(f"a must be positive and finite, got values from {float(a.min())} to {float(a.max())}")
    n1, n2 = a.shape[1:]
    conductivity = a.detach().cpu().double().numpy()
    source = np.broadcast_to(f.detach().cpu().double().numpy() if isinstance(f, Tensor) else float(f), a.shape)
    cell = np.arange(n1 * n2).reshape(n1, n2)
    harmonic = lambda p, q: 2 * p * q / (p + q)  # noqa: E731
    across1 = n1**2 * harmonic(conductivity[:, 1:], conductivity[:, :-1])
    across2 = n2**2 * harmonic(conductivity[:, :, 1:], conductivity[:, :, :-1])
    diagonal = np.zeros_like(conductivity)
    diagonal[:, 1:] += across1
    diagonal[:, :-1] += across1
    diagonal[:, :, 1:] += across2
    diagonal[:, :, :-1] += across2
    for edge, weight in ((np.s_[:, 0], n1), (np.s_[:, -1], n1), (np.s_[:, :, 0], n2), (np.s_[:, :, -1], n2)):
        diagonal[edge] += 2 * weight**2 * conductivity[edge]
    rows = [cell, cell[1:], cell[:-1], cell[:, 1:], cell[:, :-1]]
    columns = [cell, cell[:-1], cell[1:], cell[:, :-1], cell[:, 1:]]
    entries = [diagonal, -across1, -across1, -across2, -across2]
    return _solve_each(rows, columns, entries, source, a)


def poisson(
    f: Float[Tensor, samples * grid], *, boundary: Literal["dirichlet", "periodic"] = "dirichlet"
) -> Float[Tensor, samples * grid]:
    """Solve -Lap_h u = f on the unit cube, second-order differences, exactly, by a fast sine or Fourier transform.

    Args:
        f: "dirichlet": at the interior nodes j / (n + 1), u = 0 on the boundary; "periodic": at j / n, its mean is
            dropped, and u has mean 0.
        boundary: "dirichlet" or "periodic".
    """
    if boundary not in ("dirichlet", "periodic"):
        raise ValueError(f"boundary must be 'dirichlet' or 'periodic', got {boundary!r}")
    values = f.detach().cpu().double().numpy()
    grid, axes = values.shape[1:], tuple(range(1, values.ndim))
    eigenvalues: np.ndarray = np.zeros(grid)
    for axis, n in enumerate(grid):
        mode = np.arange(1, n + 1) / (2 * (n + 1)) if boundary == "dirichlet" else np.arange(n) / n
        spacing = 1 / (n + 1) if boundary == "dirichlet" else 1 / n
        line = (2 * np.sin(np.pi * mode) / spacing) ** 2
        eigenvalues = eigenvalues + line.reshape(-1, *(1,) * (len(grid) - axis - 1))
    if boundary == "dirichlet":
        u = scipy.fft.idstn(scipy.fft.dstn(values, type=1, axes=axes) / eigenvalues, type=1, axes=axes)
    else:
        eigenvalues[(0,) * len(grid)] = np.inf
        u = scipy.fft.ifftn(scipy.fft.fftn(values, axes=axes) / eigenvalues, axes=axes).real
    return torch.from_numpy(np.ascontiguousarray(u)).to(f)


def helmholtz_speed(
    samples: int, n: int, *, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "samples n n"]:
    """Wave speeds c = 20 + tanh(g) on n x n nodes of the unit square, g a smooth Gaussian field with Neumann ends.

    g has covariance proportional to (-Lap + 9)^-2, scaled to unit variance over the square on average.
    """
    field = gaussian_random_field(
        samples, (n, n), alpha=2.0, tau=3.0, boundary="neumann", generator=generator, dtype=torch.float64
    )
    modes = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) * math.pi] * 2, indexing="ij")
    energy = 9 * (modes[0] ** 2 + modes[1] ** 2 + 9) ** -2
    energy[0, 0] = 0
    return (20 + torch.tanh(field / energy.sum().sqrt())).to(dtype)


def helmholtz_2d(
    c: Float[Tensor, "samples n n"], omega: float = 1000.0, *, damping: float = 0.0
) -> Inexact[Tensor, "samples n n"]:
    """Solve Lap u + (omega / c)^2 (1 + i damping) u = 0 on the unit square; du/dn = 1 on the top side, 0 on the others.

    Second-order differences on the nodes j / (n - 1), mirrored ghost nodes; the second axis points up. Sparse LU for
    each sample.

    Args:
        c: wave speed at the nodes.
        omega: angular frequency; give each wave length 2 pi c / omega ten nodes or more.
        damping: loss factor; the solution is complex where it is not 0.
    """
    samples, n, n2 = c.shape
    if n != n2 or n < 3:
        raise ValueError(f"c must be (samples, n, n) with n of at least 3, got shape {tuple(c.shape)}")
    spacing = 1 / (n - 1)
    wave = (omega / c.detach().cpu().double().numpy()) ** 2 * (1 + 1j * damping if damping else 1.0)
    node = np.arange(n * n).reshape(n, n)
    # An end's mirrored ghost node gives its one neighbour twice the weight.
    right, left = np.ones((n - 1, 1)), np.ones((n - 1, 1))
    right[0] = left[-1] = 2
    over = np.broadcast_to(1 / spacing**2, (samples, n - 1, n))
    rows = [node, node[:-1], node[1:], node[:, :-1], node[:, 1:]]
    columns = [node, node[1:], node[:-1], node[:, 1:], node[:, :-1]]
    up = over.transpose(0, 2, 1)
    entries = [wave - 4 / spacing**2, over * right, over * left, up * right.T, up * left.T]
    source = np.zeros_like(wave)
    source[:, :, -1] = -2 / spacing  # the ghost node beyond the top lies 2 h above its mirror image
    return _solve_each(rows, columns, entries, source, c)


def navier_stokes_2d(
    vorticity: Float[Tensor, "samples n n"],
    forcing: Float[Tensor, "#samples n n"] | float = 0.0,
    *,
    viscosity: float,
    time: float,
    dt: float,
    length: float = 1.0,
    frames: int = 1,
    scheme: Literal["if-rk4", "cn-euler"] = "if-rk4",
) -> Float[Tensor, "samples frames n n"]:
    """Vorticity of a periodic two-dimensional flow at `frames` equally spaced times up to `time`.

    Pseudo-spectral with the 2/3 rule; the first grid axis is x. "if-rk4" treats viscosity exactly (integrating factor)
    and the rest by the classical Runge-Kutta method, fourth order; "cn-euler" is Li et al.'s first-order scheme.

    Args:
        vorticity: at the start.
        forcing: of the vorticity, constant in time.
        viscosity: nu, one over the Reynolds number.
        time: of the last frame.
        dt: step, shortened so that a whole number of them makes a frame.
        length: side of the domain.
        frames: how many to return.
        scheme: "if-rk4" or "cn-euler".

    Raises:
        ValueError: for an unknown scheme, or non-positive time, dt or frames.
        FloatingPointError: where the flow outruns the step (dt * max|u| * k_max > 1.7) or is no longer finite; names
            the time.
    """
    if scheme not in ("if-rk4", "cn-euler"):
        raise ValueError(f"scheme must be 'if-rk4' or 'cn-euler', got {scheme!r}")
    if time <= 0 or dt <= 0 or frames < 1:
        raise ValueError(f"time, dt and frames must be positive, got {time}, {dt} and {frames}")
    n = vorticity.shape[-1]
    options: dict[str, Any] = {"dtype": vorticity.dtype, "device": vorticity.device}
    k1 = torch.fft.fftfreq(n, 1 / n, **options)[:, None]
    k2 = torch.arange(n // 2 + 1, **options)
    kept = (k1.abs() <= n / 3) & (k2 <= n / 3)
    k1, k2 = k1 * (2 * math.pi / length), k2 * (2 * math.pi / length)
    square = k1**2 + k2**2
    inverse = torch.where(square > 0, 1 / square.clamp_min(1e-30), 0.0)
    # For a field w: (u, v, w_x, w_y) = F^-1 of these multiples of F w.
    symbols = torch.stack([1j * k2 * inverse, -1j * k1 * inverse, 1j * k1.expand_as(square), 1j * k2.expand_as(square)])
    force = torch.fft.rfft2(forcing.expand_as(vorticity)) if isinstance(forcing, Tensor) else 0.0
    highest = n / 3 * 2 * math.pi / length

    def advection(w: Tensor, now: float, check: bool = False) -> Tensor:
        u, v, wx, wy = torch.fft.irfft2(symbols * w[:, None], s=(n, n)).unbind(1)
        if check:
            speed = float(torch.maximum(u.abs().amax(), v.abs().amax()))
            # A comparison that nan fails too.
            if not step * speed * highest <= 1.7:
                raise FloatingPointError(
                    f"the flow is too fast or not finite at time {now:.4g}: dt * max|u| * k_max = "
                    f"{step * speed * highest:.3g} > 1.7 with dt = {step:.3g}; take a smaller dt"
                )
        return force - torch.where(kept, torch.fft.rfft2(u * wx + v * wy), 0.0)

    per_frame = math.ceil(time / frames / dt - 1e-9)
    step = time / frames / per_frame
    half = torch.exp(-0.5 * step * viscosity * square)
    implicit, explicit = 1 + 0.5 * step * viscosity * square, 1 - 0.5 * step * viscosity * square
    w = torch.fft.rfft2(vorticity)
    states = []
    for frame in range(frames):
        for i in range(per_frame):
            now = (frame * per_frame + i) * step
            slope = advection(w, now, check=True)
            if scheme == "cn-euler":
                w = (explicit * w + step * slope) / implicit
                continue
            halfway = half * w
            second = advection(halfway + 0.5 * step * half * slope, now)
            third = advection(halfway + 0.5 * step * second, now)
            fourth = advection(half * (halfway + step * third), now)
            w = half * (half * (w + step / 6 * slope) + step / 3 * (second + third)) + step / 6 * fourth
        states.append(torch.fft.irfft2(w, s=(n, n)))
    result = torch.stack(states, 1)
    if not bool(torch.isfinite(result).all()):
        raise FloatingPointError(f"the flow is not finite at time {time:.4g}; take a smaller dt than {step:.3g}")
    return result


def _solve_each(
    rows: list[np.ndarray], columns: list[np.ndarray], entries: list[np.ndarray], source: np.ndarray, like: Tensor
) -> Tensor:
    """Factorise and solve one sparse system a sample; all share their pattern, which is sorted once."""
    samples, unknowns = source.shape[0], source[0].size
    row, column = (np.concatenate([part.ravel() for part in parts]) for parts in (rows, columns))
    data = np.concatenate([part.reshape(samples, -1) for part in entries], axis=1)
    order = np.lexsort((row, column))
    pointers = np.searchsorted(column[order], np.arange(unknowns + 1))
    solutions = np.empty_like(source, dtype=data.dtype)
    for i in range(samples):
        matrix = csc_array((data[i, order], row[order], pointers), shape=(unknowns, unknowns))
        # Both operators are symmetric in pattern, and diagonally strong where they are definite.
        factors = splu(matrix, permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True})
        solutions[i] = factors.solve(source[i].ravel().astype(data.dtype)).reshape(source.shape[1:])
    result = torch.from_numpy(solutions).to(like.device)
    return result.to(torch.promote_types(like.dtype, torch.complex32)) if result.is_complex() else result.to(like.dtype)

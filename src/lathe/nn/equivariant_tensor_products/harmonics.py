"""Spherical harmonics, Clebsch-Gordan and Gaunt coefficients, and signals on the sphere.

Conventions are those of e3nn: real harmonics with the polar axis y, order m = -l to l, so that l = 1 is (x, y, z).
Signals use the "integral" normalisation, where the harmonics are orthonormal on the sphere. Tables are computed once in
float64; each is a numpy array that callers cast once.
"""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "clebsch_gordan",
    "from_sphere",
    "gaunt_coefficients",
    "sphere_grid",
    "spherical_harmonics",
    "to_sphere",
    "vector_spherical_harmonics",
    "wigner_d",
]

Array = NDArray[np.float64]


def clebsch_gordan(
    l1: int, l2: int, l3: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Float[Tensor, "dim1 dim2 dim3"]:
    """The real Clebsch-Gordan tensor of unit Frobenius norm; e3nn's `o3.wigner_3j`.

    Raises:
        ValueError: where the degrees are negative or form no triangle |l1 - l2| <= l3 <= l1 + l2.
    """
    if min(l1, l2, l3) < 0 or not abs(l1 - l2) <= l3 <= l1 + l2:
        raise ValueError(f"degrees must be >= 0 with |l1 - l2| <= l3 <= l1 + l2, got ({l1}, {l2}, {l3})")
    return torch.tensor(coupling(l1, l2, l3), dtype=dtype or torch.get_default_dtype(), device=device)


def gaunt_coefficients(
    l1: int, l2: int, l3: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Float[Tensor, "dim1 dim2 dim3"]:
    """The integrals of Y_l1 Y_l2 Y_l3 over the sphere; zero unless l1 + l2 + l3 is even and a triangle."""
    if min(l1, l2, l3) < 0:
        raise ValueError(f"degrees must be >= 0, got ({l1}, {l2}, {l3})")
    if not abs(l1 - l2) <= l3 <= l1 + l2:
        table: Array = np.zeros((2 * l1 + 1, 2 * l2 + 1, 2 * l3 + 1))
    else:
        table = gaunt_factor(l1, l2, l3) * coupling(l1, l2, l3)
    return torch.tensor(table, dtype=dtype or torch.get_default_dtype(), device=device)


def spherical_harmonics(
    l: int, xyz: Float[Tensor, "*batch 3"], *, normalize: bool = True, normalization: str = "integral"
) -> Float[Tensor, "*batch dim"]:
    """All harmonics of degrees 0 to l of vectors, side by side: the irreps 0e + 1o + 2e + ... .

    Polynomials in x, y, z: differentiable as often as one likes, at the poles too.

    Args:
        l: highest degree.
        normalize: divide the vectors by their length first; else degree l grows with the length to the power l. The
            zero vector has the harmonics (Y_0, 0, 0, ...).
        normalization: "integral" (orthonormal on the sphere), "component" (mean square of each component is 1), "norm"
            (each degree has norm 1).

    Raises:
        ValueError: where l is negative, the last axis has not three components, or the normalisation is unknown.
    """
    if l < 0:
        raise ValueError(f"l must be at least 0, got {l}")
    if xyz.shape[-1:] != (3,):
        raise ValueError(f"xyz must have 3 components in its last axis, got {tuple(xyz.shape)}")
    if normalization not in ("integral", "component", "norm"):
        raise ValueError(f"normalization must be 'integral', 'component' or 'norm', got {normalization!r}")
    if normalize:
        xyz = torch.nn.functional.normalize(xyz, dim=-1)
    x, y, z = xyz.unbind(-1)
    square = (xyz * xyz).sum(-1)
    # Around the polar axis: the real and imaginary parts of (z + i x)^m.
    cosine, sine = [torch.ones_like(x)], [torch.zeros_like(x)]
    for _ in range(l):
        real, imaginary = cosine[-1], sine[-1]
        cosine.append(z * real - x * imaginary)
        sine.append(z * imaginary + x * real)
    parts: list[list[Tensor]] = []
    for degree in range(l + 1):
        legendre: list[Tensor] = []
        for m in range(degree + 1):
            first, second = _recursion(degree, m)
            if m == degree:
                legendre.append(torch.full_like(y, first))
            elif m == degree - 1:
                legendre.append(first * y * parts[degree - 1][m])
            else:
                legendre.append(first * y * parts[degree - 1][m] - second * square * parts[degree - 2][m])
        parts.append(legendre)
    columns = []
    for degree, legendre in enumerate(parts):
        scale = {
            "integral": 1.0,
            "component": math.sqrt(4 * math.pi),
            "norm": math.sqrt(4 * math.pi / (2 * degree + 1)),
        }[normalization]
        columns += [scale * legendre[m] * sine[m] for m in range(degree, 0, -1)]
        columns += [scale * legendre[m] * cosine[m] for m in range(degree + 1)]
    return torch.stack(columns, -1)


def sphere_grid(
    degree: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[Float[Tensor, "points 3"], Float[Tensor, " points"]]:
    """The smallest product grid whose quadrature is exact for polynomials up to `degree`: points, and weights.

    Gauss-Legendre in the height y, uniform around the axis: ceil((degree + 1) / 2) times (degree + 1) points.
    """
    points, weights = grid_arrays(degree)
    dtype = dtype or torch.get_default_dtype()
    return torch.tensor(points, dtype=dtype, device=device), torch.tensor(weights, dtype=dtype, device=device)


def to_sphere(
    coefficients: Float[Tensor, "*batch dim"], points: Float[Tensor, "points 3"]
) -> Float[Tensor, "*batch points"]:
    """The signal sum_lm c_lm Y_lm at `points`; `coefficients` are degrees 0 to L side by side, (L + 1)**2 of them."""
    lmax = degree_of(coefficients, "coefficients")
    return coefficients @ spherical_harmonics(lmax, points.to(coefficients)).T


def from_sphere(
    values: Float[Tensor, "*batch points"],
    lmax: int,
    points: Float[Tensor, "points 3"],
    weights: Float[Tensor, " points"],
) -> Float[Tensor, "*batch dim"]:
    """The coefficients of degrees 0 to `lmax` of a signal on a grid: exact where the grid is (see `sphere_grid`).

    Raises:
        ValueError: where there is not one value a point.
    """
    if values.shape[-1:] != points.shape[:1]:
        raise ValueError(f"values must have one value for each of {len(points)} points, got {tuple(values.shape)}")
    harmonics = spherical_harmonics(lmax, points.to(values)) * weights.to(values)[:, None]
    return values @ harmonics


def vector_spherical_harmonics(l: int, j: int, xyz: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch dim 3"]:
    """The tensor harmonics V^l_jm of spin 1: vector fields that turn as degree j, built from scalars of degree l.

    V^l_jm = sqrt(2j + 1) sum_(mu nu) C^(l 1 j)_(mu nu m) Y_(l mu) e_nu, orthonormal on the sphere; as polar vectors
    they have parity -(-1)**l, as axial vectors (-1)**l.

    Raises:
        ValueError: where l, 1 and j form no triangle.
    """
    if min(l, j) < 0 or not abs(l - 1) <= j <= l + 1:
        raise ValueError(f"l and j must differ by at most 1 and not both be 0, got l = {l}, j = {j}")
    scalars = spherical_harmonics(l, xyz)[..., l * l :]
    table = torch.tensor(math.sqrt(2 * j + 1) * coupling(l, 1, j), dtype=xyz.dtype, device=xyz.device)
    return torch.einsum("...a,avm->...mv", scalars, table)


def wigner_d(l: int, rotation: Float[Tensor, "3 3"]) -> Float[Tensor, "dim dim"]:
    """The matrix D with Y_l(R r) = D Y_l(r) for a proper rotation R."""
    points, weights = sphere_grid(2 * l, dtype=torch.float64, device=rotation.device)
    still = spherical_harmonics(l, points)[:, l * l :]
    turned = spherical_harmonics(l, points @ rotation.double().T)[:, l * l :]
    return ((turned * weights[:, None]).T @ still).to(rotation.dtype)


def degree_of(coefficients: Tensor, name: str) -> int:
    """L of (..., (L + 1)**2); raises a ValueError that calls the tensor `name`."""
    count = coefficients.shape[-1] if coefficients.ndim else 0
    lmax = math.isqrt(count) - 1
    if count == 0 or (lmax + 1) ** 2 != count:
        raise ValueError(f"{name} must have (L + 1)**2 components in its last axis, got {tuple(coefficients.shape)}")
    return lmax


@functools.cache
def coupling(l1: int, l2: int, l3: int) -> Array:
    """The real Clebsch-Gordan tensor of unit norm, from the complex one by the change of basis of each factor."""
    complex_table: NDArray[np.complex128] = np.zeros((2 * l1 + 1, 2 * l2 + 1, 2 * l3 + 1), dtype=np.complex128)
    for m1 in range(-l1, l1 + 1):
        for m2 in range(max(-l2, -l3 - m1), min(l2, l3 - m1) + 1):
            complex_table[l1 + m1, l2 + m2, l3 + m1 + m2] = _clebsch_gordan_su2(l1, m1, l2, m2, l3)
    bases = (_real_basis(l1), _real_basis(l2), _real_basis(l3).conj())
    table = np.einsum("abc,ai,bj,ck->ijk", complex_table, *bases, optimize=True).real
    table[np.abs(table) < 1e-14] = 0.0
    return table / np.linalg.norm(table)


def gaunt_factor(l1: int, l2: int, l3: int) -> float:
    """What the integral of three harmonics is, as a multiple of the Clebsch-Gordan tensor."""
    if (l1 + l2 + l3) % 2:
        return 0.0
    product = math.prod(2 * l + 1 for l in (l1, l2, l3)) / (4 * math.pi)
    # |(l1 l2 l3; 0 0 0)| = <l1 0 l2 0 | l3 0> / sqrt(2 l3 + 1)
    return math.sqrt(product / (2 * l3 + 1)) * abs(_clebsch_gordan_su2(l1, 0, l2, 0, l3))


@functools.lru_cache(maxsize=64)
def grid_arrays(degree: int) -> tuple[Array, Array]:
    """`sphere_grid` in numpy; the points run around the axis first."""
    if degree < 0:
        raise ValueError(f"degree must be at least 0, got {degree}")
    height, of_height = np.polynomial.legendre.leggauss(degree // 2 + 1)
    angle = 2 * math.pi * np.arange(degree + 1) / (degree + 1)
    radius = np.sqrt(1 - height**2)[:, None]
    axes = np.broadcast_arrays(radius * np.sin(angle), height[:, None], radius * np.cos(angle))
    weights = np.repeat(of_height * 2 * math.pi / (degree + 1), degree + 1)
    return np.stack(axes, -1).reshape(-1, 3), weights


def _recursion(l: int, m: int) -> tuple[float, float]:
    """Factors of y P_(l-1)m and of r**2 P_(l-2)m in P_lm, normalised for orthonormal real harmonics; P_mm itself."""
    if l == m:
        constant = math.prod((2 * k + 1) / (2 * k) for k in range(1, m + 1)) / (4 * math.pi)
        return math.sqrt(constant * (2 if m else 1)), 0.0
    first = math.sqrt((4 * l * l - 1) / (l * l - m * m))
    return first, first * math.sqrt(((l - 1) ** 2 - m * m) / (4 * (l - 1) ** 2 - 1)) if l > m + 1 else 0.0


@functools.cache
def _real_basis(l: int) -> NDArray[np.complex128]:
    """Columns: the real harmonics in terms of the complex ones; the phase (-i)**l makes all coupling tensors real."""
    basis: NDArray[np.complex128] = np.zeros((2 * l + 1, 2 * l + 1), dtype=np.complex128)
    half = math.sqrt(0.5)
    basis[l, l] = 1
    for m in range(1, l + 1):
        basis[l - m, [l + m, l - m]] = half, -1j * half
        basis[l + m, [l + m, l - m]] = (-1) ** m * half, 1j * (-1) ** m * half
    return (-1j) ** l * basis


@functools.cache
def _clebsch_gordan_su2(l1: int, m1: int, l2: int, m2: int, l3: int) -> float:
    """<l1 m1 l2 m2 | l3 m1+m2> by Racah's sum, in exact integers up to the last root."""
    m3 = m1 + m2
    excess = l1 + l2 - l3
    total = 0
    for k in range(max(0, l2 - l3 - m1, l1 - l3 + m2), min(excess, l1 - m1, l2 + m2) + 1):
        term = math.comb(excess, k) * math.comb(l1 - l2 + l3, l1 - m1 - k) * math.comb(l2 - l1 + l3, l2 + m2 - k)
        total += (-1) ** k * term
    square = Fraction(
        math.comb(2 * l1, excess) * math.comb(2 * l2, excess),
        math.comb(l1 + l2 + l3 + 1, excess)
        * math.comb(2 * l1, l1 - m1)
        * math.comb(2 * l2, l2 - m2)
        * math.comb(2 * l3, l3 - m3),
    )
    return math.copysign(math.sqrt(square * total**2), total) if total else 0.0

"""The planted cycle against dense multigrid and PyAMG, fitted operators, and flexible conjugate gradients."""

from __future__ import annotations

import itertools
from functools import reduce

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lathe.operators.multigrid_operator import (
    MultigridConv1d,
    MultigridConv2d,
    MultigridConv3d,
    fit_linear_operator,
    flexible_cg,
    plant,
)

LAPLACIAN = torch.tensor([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]], dtype=torch.float64)
CYCLES = {1: MultigridConv1d, 2: MultigridConv2d, 3: MultigridConv3d}


def laplacian(d):
    stencil = torch.zeros((3,) * d, dtype=torch.float64)
    stencil[(1,) * d] = 2 * d
    for axis in range(d):
        for end in (0, 2):
            stencil[tuple(end if a == axis else 1 for a in range(d))] = -1
    return stencil


def dense_laplacian(d, n, h):
    line = (2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)) / h**2
    return sum(reduce(np.kron, [line if a == axis else np.eye(n) for a in range(d)]) for axis in range(d))


def dense_cycle(d, n, h, damping=0.8, visits=1):
    """The matrix of one classical (1, 1) cycle from the zero guess, on n**d interior nodes: Kronecker products only."""
    A = dense_laplacian(d, n, h)
    smooth = damping * h**2 / (2 * d) * np.eye(n**d)
    if n == 1:
        return h**2 / (2 * d) * np.eye(1)
    m = (n - 1) // 2
    line = np.zeros((n, m))
    for j in range(m):
        line[2 * j : 2 * j + 3, j] = [0.5, 1, 0.5]
    P = reduce(np.kron, [line] * d)
    R = P.T / 2**d
    B = smooth.copy()
    coarse = dense_cycle(d, m, 2 * h, damping, visits)
    for _ in range(visits if m > 1 else 1):
        B = B + P @ coarse @ R @ (np.eye(n**d) - A @ B)
    return B + smooth @ (np.eye(n**d) - A @ B)


@pytest.mark.parametrize("d, n", [(1, 31), (2, 15), (2, 7), (3, 7)])
@pytest.mark.parametrize("cycle", ["v", "w"])
def test_planted_cycle_is_dense_multigrid(d, n, cycle):
    h = 1 / (n + 1)
    layer = CYCLES[d].from_stencil(laplacian(d), h, (n + 1).bit_length() - 1, cycle=cycle)
    expected = dense_cycle(d, n, h, visits=2 if cycle == "w" else 1)
    np.testing.assert_allclose(layer.as_matrix(n).detach(), expected, atol=1e-12 * np.abs(expected).max())


def asymptotic_factor(layer, n, padding="zeros"):
    h = 1 / (n + 1) if padding == "zeros" else 1 / (n if padding == "circular" else n - 1)
    x = np.random.default_rng(0).standard_normal((n, n))
    if padding == "circular":
        f = torch.from_numpy(x - x.mean())
    elif padding == "reflect":
        ends = np.ones(n)
        ends[[0, -1]] = 0.5
        f = torch.from_numpy(x - (x * np.outer(ends, ends)).sum() / ends.sum() ** 2)
    else:
        f = torch.from_numpy(x)
    u, norms = torch.zeros(1, 1, n, n, dtype=torch.float64), []
    with torch.no_grad():
        for _ in range(11):
            padded = F.pad(u, (1,) * 4, **({} if padding == "zeros" else {"mode": padding}))
            defect = f - F.conv2d(padded, LAPLACIAN[None, None]) / h**2
            norms.append(float(defect.norm()))
            u = u + layer(defect)
    return norms[-1] / norms[-2]


def test_contraction_does_not_depend_on_the_grid():
    factors = [
        asymptotic_factor(MultigridConv2d.from_stencil(LAPLACIAN, 1 / (n + 1), (n + 1).bit_length() - 1), n)
        for n in (15, 31, 63)
    ]
    assert max(factors) < 0.4 and max(factors) - min(factors) < 0.05


@pytest.mark.parametrize("padding, n", [("circular", 32), ("reflect", 33)])
def test_planted_cycle_solves_other_boundaries(padding, n):
    h = 1 / n if padding == "circular" else 1 / (n - 1)
    options = {"coarse": 3, "coarse_damping": 0.8, "padding_mode": padding}
    assert asymptotic_factor(MultigridConv2d.from_stencil(LAPLACIAN, h, 5, **options), n, padding) < 0.4


def test_approximate_inverse_smooths_better():
    n = 31
    jacobi, spai = (
        asymptotic_factor(MultigridConv2d.from_stencil(LAPLACIAN, 1 / 32, 5, smoother=smoother), n)
        for smoother in ("jacobi", "spai")
    )
    assert spai < 0.15 < 0.3 < jacobi


def test_planted_cycle_is_in_line_with_pyamg():
    """PyAMG gives the exact solution, and a classical AMG cycle whose factor is of the same order."""
    pyamg = pytest.importorskip("pyamg")
    n = 31
    h = 1 / (n + 1)
    A = pyamg.gallery.poisson((n, n), format="csr") / h**2
    f = np.random.default_rng(0).standard_normal(n * n)
    solver = pyamg.ruge_stuben_solver(A.tocsr())
    norms: list[float] = []
    exact = solver.solve(f, tol=1e-13, residuals=norms)
    theirs = norms[6] / norms[5]
    layer = MultigridConv2d.from_stencil(LAPLACIAN, h, 5).requires_grad_(False)
    ours = asymptotic_factor(layer, n)
    assert 0.2 < ours < 0.4 and ours < 10 * max(theirs, 0.05)

    def apply(u):
        return F.conv2d(u, LAPLACIAN[None, None], padding=1) / h**2

    solved = flexible_cg(apply, torch.from_numpy(f).view(1, 1, n, n), layer, tol=1e-12)
    np.testing.assert_allclose(solved.solution.flatten(), exact, atol=1e-10 * np.abs(exact).max())


def test_planted_channel_is_the_cycle_inside_a_wide_layer(rng):
    wide = MultigridConv2d(
        3, 4, steps=[(1, 1), (1, 1), (1, 0)], transfer="pi", transfer_padding=0, bias=True, dtype=torch.float64
    )
    untouched = wide.levels[0].smoothers[0].weight[1:].clone()
    plant(wide, LAPLACIAN, 1 / 8)
    f = torch.randn(2, 3, 7, 7, dtype=torch.float64, generator=rng)
    expected = dense_cycle(2, 7, 1 / 8) @ f[:, 0].flatten(1).numpy().T
    np.testing.assert_allclose(wide(f)[:, 0].detach().flatten(1).T, expected, atol=1e-12)
    assert torch.equal(wide.levels[0].smoothers[0].weight[1:], untouched)


def test_planting_refuses_what_does_not_fit():
    layer = MultigridConv2d(1, 1, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="3 entries on 2 axes"):
        plant(layer, torch.ones(3, dtype=torch.float64), 0.1)
    with pytest.raises(ValueError, match="norm=None"):
        plant(MultigridConv2d(1, 1, 2, norm="layer", dtype=torch.float64), LAPLACIAN, 0.1)
    with pytest.raises(ValueError, match="kernel_size of at least 3"):
        plant(MultigridConv2d(1, 1, 2, kernel_size=1, dtype=torch.float64), LAPLACIAN, 0.1)
    with pytest.raises(ValueError, match="residual=True"):
        plant(MultigridConv2d(1, 1, 2, residual=False, dtype=torch.float64), LAPLACIAN, 0.1)


# ---------------------------------------------------------------------------------------------- flexible CG, fitting


def spd(n, rng):
    root = torch.randn(n, n, dtype=torch.float64, generator=rng)
    return root @ root.T + 0.1 * n * torch.eye(n, dtype=torch.float64)


def test_flexible_cg_solves_each_system_of_a_batch(rng):
    A = spd(12, rng)
    b = torch.randn(4, 12, dtype=torch.float64, generator=rng)
    b[2] = 0
    solved = flexible_cg(lambda x: x @ A, b, tol=1e-12)
    torch.testing.assert_close(solved.solution, torch.linalg.solve(A, b.T).T, rtol=1e-9, atol=1e-9)
    assert solved.converged.all() and solved.residuals.shape == (solved.iterations + 1, 4)


def test_plain_flexible_cg_ends_like_conjugate_gradients(rng):
    """At most as many iterations as unknowns, and SciPy's iterates' residual."""
    from scipy.sparse.linalg import cg

    A, b = spd(10, rng), torch.randn(1, 10, dtype=torch.float64, generator=rng)
    ours = flexible_cg(lambda x: x @ A, b, tol=0.0, max_iterations=5).solution[0]
    theirs, _ = cg(A.numpy(), b[0].numpy(), rtol=0.0, maxiter=5)
    np.testing.assert_allclose(ours, theirs, rtol=1e-8)
    assert flexible_cg(lambda x: x @ A, b, tol=1e-8).iterations <= 11


def test_cycle_preconditions_better_than_nothing():
    n = 31

    def apply(u):
        return F.conv2d(u, LAPLACIAN[None, None], padding=1) * (n + 1) ** 2

    b = torch.ones(1, 1, n, n, dtype=torch.float64)
    cycle = MultigridConv2d.from_stencil(LAPLACIAN, 1 / (n + 1), 5)
    assert flexible_cg(apply, b, cycle).iterations < 12 < 25 < flexible_cg(apply, b).iterations


def test_any_preconditioner_lowers_the_energy_norm(rng):
    """An untrained random cycle, neither symmetric nor definite: the error's energy falls in every iteration."""
    n = 15
    h = 1 / (n + 1)
    A = torch.from_numpy(dense_laplacian(2, n, h))

    def apply(u):
        return (u.flatten(1) @ A).view_as(u)

    b = torch.randn(1, 1, n, n, dtype=torch.float64, generator=rng)
    exact = torch.linalg.solve(A, b.flatten())
    bad = MultigridConv2d(1, 1, 4, dtype=torch.float64)
    energies = []
    for k in range(12):
        error = flexible_cg(apply, b, bad, tol=0.0, max_iterations=k).solution.flatten() - exact
        energies.append(float(error @ A @ error))
    assert all(after < before for before, after in itertools.pairwise(energies))
    assert flexible_cg(apply, b, bad, tol=1e-8, max_iterations=500).converged.all()


def test_indefinite_operator_is_refused(rng):
    with pytest.raises(ValueError, match="positive definite"):
        flexible_cg(lambda x: -x, torch.ones(1, 4, dtype=torch.float64))


def test_fitting_finds_a_convolution(rng):
    """The operator lies in the layer's reach, so a short fit gets near it."""
    taps = torch.randn(1, 1, 3, 3, generator=rng)
    layer = MultigridConv2d(1, 2, 2, pre=2)
    layer = torch.nn.Sequential(layer, torch.nn.Conv2d(2, 1, 1, bias=False))
    told = []
    error = fit_linear_operator(
        layer,
        lambda f: F.conv2d(f, taps, padding=1),
        lambda generator: torch.randn(8, 1, 8, 8, generator=generator),
        steps=150,
        lr=5e-2,
        progress=lambda done, total: told.append((done, total)),
    )
    assert error < 0.05 and told[-1] == (150, 150)


def test_fitting_refuses_other_shapes():
    with pytest.raises(ValueError, match="what apply_fn does"):
        fit_linear_operator(MultigridConv2d(1, 2, 2), lambda f: f, lambda g: torch.ones(1, 1, 8, 8), steps=1)

"""Solvers against closed forms, manufactured solutions and orders of convergence; random fields against spectra."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lathe.data.pdes import (
    darcy_2d,
    gaussian_random_field,
    helmholtz_2d,
    helmholtz_speed,
    multiscale_coefficient,
    navier_stokes_2d,
    poisson,
    two_phase_coefficient,
)

DOUBLE = {"dtype": torch.float64}


def centres(n):
    return (torch.arange(n, **DOUBLE) + 0.5) / n


def order(errors):
    """The last observed order of convergence when the step halves."""
    return math.log2(errors[-2] / errors[-1])


# ---------------------------------------------------------------------------------------------------------- fields


def test_periodic_field_has_the_stated_spectrum(rng):
    """Mean energy per mode against tau^(2 alpha - d) (k^2 + tau^2)^-alpha; the std of the known forcing."""
    f = gaussian_random_field(2000, (16, 16), alpha=4.0, tau=3.0, length=2 * math.pi, generator=rng, **DOUBLE)
    energy = (np.abs(np.fft.fft2(f.numpy()) / 256) ** 2).mean(0)
    k = np.fft.fftfreq(16, 1 / 16)
    expected = 3.0**6 * (k[:, None] ** 2 + k**2 + 9) ** -4
    low = (np.abs(k[:, None]) < 4) & (np.abs(k) < 4)
    low[0, 0] = False
    np.testing.assert_allclose(energy[low], expected[low], rtol=0.15)
    assert energy[0, 0] < 1e-20
    assert float(f.std()) == pytest.approx(0.9675, rel=0.02)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_neumann_field_has_flat_ends_and_the_stated_variance(d, rng):
    n = 12
    f = gaussian_random_field(1500, (n,) * d, alpha=3.0, tau=4.0, boundary="neumann", generator=rng, **DOUBLE)
    k = np.stack(np.meshgrid(*[np.arange(n) * np.pi] * d, indexing="ij"))
    energy = 4.0 ** (6 - d) * ((k**2).sum(0) + 16) ** -3.0
    energy[(0,) * d] = 0
    assert float(f.square().mean()) == pytest.approx(energy.sum(), rel=0.1)
    assert f.flatten(1).mean(1).abs().max() < 1e-12


def test_fields_follow_their_generator():
    def make(seed):
        return two_phase_coefficient(2, 8, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(make(3), make(3)) and not torch.equal(make(3), make(4))
    assert set(make(3).unique().tolist()) == {3.0, 12.0}


def test_multiscale_coefficient_is_the_product(rng):
    state = rng.get_state()
    a = multiscale_coefficient(3, 10, generator=rng, **DOUBLE)
    draws = torch.rand(3, 6, generator=rng.set_state(state), **DOUBLE).numpy()
    x = (np.arange(10) + 0.5) / 10
    for sample, draw in zip(a.numpy(), draws):
        expected = np.ones((10, 10))
        for k in range(1, 7):
            frequency = 2 ** (k - 1) + draw[k - 1] * (1.5 * 2 ** (k - 1) - 2 ** (k - 1))
            for p, q in np.ndindex(10, 10):
                expected[p, q] *= 1 + 0.5 * math.cos(frequency * math.pi * (x[p] + x[q]))
                expected[p, q] *= 1 + 0.5 * math.sin(frequency * math.pi * (x[q] - 3 * x[p]))
        np.testing.assert_allclose(sample, expected, rtol=1e-12)
    assert (a > 0).all()


# ----------------------------------------------------------------------------------------------------------- Darcy


def test_constant_darcy_is_the_sine_series():
    errors = []
    for n in (16, 32, 64):
        x = centres(n)
        series = torch.zeros(n, n, **DOUBLE)
        for p in range(1, 120, 2):
            for q in range(1, 120, 2):
                series += (
                    16
                    / (math.pi**4 * p * q * (p * p + q * q))
                    * torch.sin(p * math.pi * x)[:, None]
                    * torch.sin(q * math.pi * x)
                )
        errors.append(float((darcy_2d(torch.full((1, n, n), 3.0, **DOUBLE))[0] - series / 3).abs().max()))
    assert order(errors) > 1.7


def test_layered_darcy_is_the_one_dimensional_closed_form():
    """a jumps from 1 to 5 at x = 1/2; for f = sin(pi y), u = g(x) sin(pi y) with -(a g')' + a pi^2 g = 1."""
    errors = []
    for n in (16, 32, 64):
        x, y = centres(n)[:, None], centres(n)
        a = torch.where(x < 0.5, 1.0, 5.0).expand(n, n).to(torch.float64)
        # u = g(x) sin(pi y); g is A sinh(pi x) left and B sinh(pi (1 - x)) right of the jump, plus a particular g:
        # on each side a (g'' - pi^2 g) = -1 has the particular solution 1 / (a pi^2).
        left, right = 1 / math.pi**2, 1 / (5 * math.pi**2)
        c, s = math.cosh(math.pi / 2), math.sinh(math.pi / 2)
        # Left: left (1 - cosh pi x) + A sinh pi x; right: the mirror image with right and B. Continuity of g and a g'.
        system = np.array([[s, -s], [c, 5 * c]])
        load = np.array([right * (1 - c) - left * (1 - c), (left + 5 * right) * s])
        A, B = np.linalg.solve(system, load)
        g = torch.where(
            x < 0.5,
            left * (1 - torch.cosh(math.pi * x)) + A * torch.sinh(math.pi * x),
            right * (1 - torch.cosh(math.pi * (1 - x))) + B * torch.sinh(math.pi * (1 - x)),
        )
        f = torch.sin(math.pi * y).expand(n, n)
        u = darcy_2d(a[None], f[None].contiguous())[0]
        errors.append(float((u - g * torch.sin(math.pi * y)).abs().max() / g.max()))
    assert errors[-1] < 1e-3 and order(errors) > 1.8


def test_smooth_darcy_is_second_order():
    errors = []
    for n in (16, 32, 64):
        x, y = centres(n)[:, None], centres(n)
        pi = math.pi
        a = 2 + torch.sin(pi * x) * torch.cos(pi * y)
        ax, ay = pi * torch.cos(pi * x) * torch.cos(pi * y), -pi * torch.sin(pi * x) * torch.sin(pi * y)
        u = torch.sin(pi * x) * torch.sin(2 * pi * y)
        ux, uy = pi * torch.cos(pi * x) * torch.sin(2 * pi * y), 2 * pi * torch.sin(pi * x) * torch.cos(2 * pi * y)
        f = -(ax * ux + ay * uy - 5 * pi**2 * a * u)
        errors.append(float((darcy_2d(a[None], f[None])[0] - u).abs().max()))
    assert 1.8 < order(errors) < 2.2


def test_rectangular_darcy_balances_fluxes(rng):
    """On 6 x 9 cells: total source = flux through the boundary; a transposed problem has the transposed solution."""
    a = 1 + torch.rand(2, 6, 9, generator=rng, **DOUBLE)
    u = darcy_2d(a)
    flux = 2 * (6 / 9 * (a * u)[:, [0, -1]].sum((1, 2)) + 9 / 6 * (a * u)[:, :, [0, -1]].sum((1, 2)))
    torch.testing.assert_close(flux, torch.ones(2, **DOUBLE))
    torch.testing.assert_close(darcy_2d(a.mT.contiguous()), u.mT.contiguous())
    assert darcy_2d(a.float()).dtype == torch.float32


def test_darcy_refuses_impossible_conductivity():
    with pytest.raises(ValueError, match="positive"):
        darcy_2d(torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="finite"):
        darcy_2d(torch.full((1, 4, 4), math.nan))


# --------------------------------------------------------------------------------------------- Poisson, Helmholtz


@pytest.mark.parametrize("grid", [(9,), (7, 10), (4, 5, 6)])
@pytest.mark.parametrize("boundary", ["dirichlet", "periodic"])
def test_poisson_inverts_the_differences(grid, boundary, rng):
    f = torch.randn(2, *grid, generator=rng, **DOUBLE)
    u = poisson(f, boundary=boundary).numpy()
    negative = np.zeros_like(u)
    for axis, n in enumerate(grid, start=1):
        width = [(1, 1) if i == axis else (0, 0) for i in range(u.ndim)]
        padded = np.pad(u, width, mode="constant" if boundary == "dirichlet" else "wrap")
        negative -= np.diff(padded, 2, axis=axis) * (n + 1 if boundary == "dirichlet" else n) ** 2
    expected = f.numpy() - (
        0 if boundary == "dirichlet" else f.flatten(1).mean(1).numpy().reshape(-1, *(1,) * len(grid))
    )
    np.testing.assert_allclose(negative, expected, atol=1e-10)


def test_helmholtz_wave_in_a_homogeneous_medium_is_second_order():
    """c = const: u = -cos(k y) / (k sin k), the only solution that does not vary along x."""
    errors = []
    for n in (33, 65, 129):
        y = torch.arange(n, **DOUBLE) / (n - 1)
        k = 4.0
        exact = -torch.cos(k * y) / (k * math.sin(k))
        errors.append(float((helmholtz_2d(torch.full((1, n, n), 5.0, **DOUBLE), 20.0)[0] - exact).abs().max()))
    assert 1.8 < order(errors) < 2.2


def test_damped_helmholtz_is_the_complex_closed_form():
    n = 129
    y = torch.arange(n, **DOUBLE) / (n - 1)
    k = torch.sqrt(torch.tensor(16 * (1 + 0.3j), dtype=torch.complex128))
    exact = -torch.cos(k * y) / (k * torch.sin(k))
    u = helmholtz_2d(torch.full((1, n, n), 5.0, **DOUBLE), 20.0, damping=0.3)[0]
    assert u.is_complex() and float((u - exact).abs().max() / exact.abs().max()) < 2e-3


def test_helmholtz_satisfies_its_equation_inside(rng):
    c = helmholtz_speed(1, 25, generator=rng, **DOUBLE)
    assert (c > 19).all() and (c < 21).all() and c.std() > 0.1
    u = helmholtz_2d(c, 100.0)[0].numpy()
    laplacian = (u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2] - 4 * u[1:-1, 1:-1]) * 24**2
    wave = (100 / c[0].numpy()[1:-1, 1:-1]) ** 2 * u[1:-1, 1:-1]
    np.testing.assert_allclose(laplacian, -wave, atol=1e-8 * np.abs(wave).max())


# ---------------------------------------------------------------------------------------------------- Navier-Stokes


def torus(n):
    x = torch.arange(n, **DOUBLE) * 2 * math.pi / n
    return x[:, None], x


@pytest.mark.parametrize("scheme, tolerance", [("if-rk4", 1e-12), ("cn-euler", 1e-6)])
def test_taylor_green_vortices_decay_exponentially(scheme, tolerance):
    x, y = torus(16)
    w0 = (2 * torch.cos(x) * torch.cos(y))[None]
    w = navier_stokes_2d(w0, viscosity=0.01, time=2.0, dt=0.05, length=2 * math.pi, frames=2, scheme=scheme)
    expected = torch.stack([w0 * math.exp(-0.02), w0 * math.exp(-0.04)], 1)
    torch.testing.assert_close(w, expected, rtol=0, atol=tolerance)


def test_flow_follows_the_vorticity_equation_in_the_first_instant(rng):
    """w_t by a short step against -u . grad w + nu Lap w + f, with velocities from the stream function by NumPy."""
    x, y = torus(24)
    w0 = torch.sin(x) * torch.cos(2 * y) + 0.5 * torch.cos(3 * x + y)
    f = torch.cos(x) * torch.ones_like(y)
    psi = torch.sin(x) * torch.cos(2 * y) / 5 + 0.05 * torch.cos(3 * x + y)
    k = np.fft.fftfreq(24, 1 / 24)

    def derivative(z, axis):
        return np.fft.ifft(1j * (k[:, None] if axis == 0 else k) * np.fft.fft(z.numpy(), axis=axis), axis=axis).real

    u, v = derivative(psi, 1), -derivative(psi, 0)
    laplacian = -5 * torch.sin(x) * torch.cos(2 * y) - 5 * torch.cos(3 * x + y)
    slope = -u * derivative(w0, 0) - v * derivative(w0, 1) + 0.02 * laplacian.numpy() + f.numpy()
    h = 1e-4
    step = navier_stokes_2d(w0[None], f[None], viscosity=0.02, time=h, dt=h, length=2 * math.pi)[0, 0]
    np.testing.assert_allclose(((step - w0) / h).numpy(), slope, atol=1e-3)


@pytest.mark.parametrize("scheme, expected", [("if-rk4", 4), ("cn-euler", 1)])
def test_schemes_converge_at_their_order(scheme, expected):
    x, y = torus(16)
    w0 = (torch.sin(x) * torch.cos(2 * y) + torch.cos(x + y))[None]
    f = torch.sin(x + y)[None]

    def solve(dt):
        return navier_stokes_2d(w0, f, viscosity=0.02, time=0.8, dt=dt, length=2 * math.pi, scheme=scheme)

    reference = navier_stokes_2d(w0, f, viscosity=0.02, time=0.8, dt=0.005, length=2 * math.pi)
    errors = [float((solve(dt) - reference).abs().max()) for dt in (0.2, 0.1, 0.05)]
    assert abs(order(errors) - expected) < 0.35


def test_inviscid_flow_keeps_energy_and_enstrophy():
    x, y = torus(24)
    w0 = (torch.sin(x) * torch.cos(2 * y) + torch.cos(x + y))[None]
    w = navier_stokes_2d(w0, viscosity=0.0, time=1.0, dt=0.02, length=2 * math.pi)
    k = np.fft.fftfreq(24, 1 / 24)
    square = k[:, None] ** 2 + k**2
    square[0, 0] = np.inf

    def energy(z):
        return (np.abs(np.fft.fft2(z.squeeze().numpy())) ** 2 / square).sum()

    assert float(w.square().sum() / w0.square().sum()) == pytest.approx(1, abs=1e-6)
    assert energy(w) / energy(w0) == pytest.approx(1, abs=1e-6)


def test_steps_that_are_too_long_name_the_time():
    x, y = torus(16)
    with pytest.raises(FloatingPointError, match=r"at time 0: dt \* max\|u\| \* k_max = .*smaller dt"):
        navier_stokes_2d(
            (50 * torch.sin(3 * x) * torch.cos(y))[None], viscosity=1e-3, time=1.0, dt=0.5, length=2 * math.pi
        )
    with pytest.raises(ValueError, match="dt"):
        navier_stokes_2d(torch.zeros(1, 8, 8), viscosity=1e-3, time=1.0, dt=0.0)

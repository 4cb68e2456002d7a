"""Sobolev losses against closed forms of single modes, sums in physical space, and eigenvalues."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.fft
import torch

from lathe.training.sobolev import SobolevLoss

FORMS = [
    {"form": "spectral"},
    {"form": "spectral", "truncate": 3},
    {"form": "spectral", "order": 2.5},
    {"form": "differences", "boundary": "zero"},
    {"form": "differences", "boundary": "periodic"},
    {"form": "differences", "boundary": "one-sided"},
    {"form": "differences", "order": 0},
]


def field(*shape, rng):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("grid", [(16,), (8, 9), (6, 5, 4)])
def test_multiple_of_the_target_has_error_one_minus_c(options, grid, rng):
    u = field(3, 2, *grid, rng=rng)
    loss = SobolevLoss(**options)
    assert float(loss(0.7 * u, u)) == pytest.approx(3 * 0.3, rel=1e-12)
    assert float(SobolevLoss(reduction="mean", **options)(-u, u)) == pytest.approx(2, rel=1e-12)
    assert SobolevLoss(reduction="none", **options)(1.5 * u, u).tolist() == pytest.approx([0.5] * 3)


@pytest.mark.parametrize("n", [16, 17])
@pytest.mark.parametrize("k", [1, 5, 8])
def test_single_mode_is_weighted_by_its_frequency(n, k):
    """Target of frequency 2, error of frequency k: the norms are to each other as the weights times amplitudes."""
    j = torch.arange(n, dtype=torch.float64) * 2 * math.pi / n
    target = torch.cos(2 * j)[None, None]
    error = torch.cos(k * j + 0.3)[None, None]
    for order, a in ((1, 1.0), (2, 0.5)):

        def w(q, order=order, a=a):
            return (1 + a**2 * q**2) ** (order / 2)

        expected = w(k) / w(2) * float(error.norm() / target.norm())
        assert float(SobolevLoss(order, a)(target + error, target)) == pytest.approx(expected, rel=1e-12)


def test_truncated_axis_counts_as_frequency_zero():
    x = torch.arange(64, dtype=torch.float64) * 2 * math.pi / 64
    target = torch.cos(x)[:, None] * torch.cos(x) + 0
    error = torch.cos(25 * x)[:, None] * torch.cos(3 * x)
    loss = SobolevLoss(truncate=20)
    assert float(loss((target + error)[None, None], target[None, None])) == pytest.approx(math.sqrt(10) / math.sqrt(3))
    edge = torch.cos(20 * x)[:, None] * torch.cos(3 * x)
    assert float(loss((target + edge)[None, None], target[None, None])) == pytest.approx(math.sqrt(10) / math.sqrt(3))


@pytest.mark.parametrize("grid", [(8, 6), (7, 9)])
def test_parseval_against_the_physical_sum(grid, rng):
    """For order 2 with no target scaling: ||u||^2 + 2 |grad u|^2 + |lap u|^2, derivatives by NumPy's full transform."""
    u = field(1, 1, *grid, rng=rng)
    k = np.meshgrid(*[np.fft.fftfreq(n, 1 / n) for n in grid], indexing="ij")
    U = np.fft.fft2(u[0, 0].numpy())
    parts = [np.fft.ifft2(1j * q * U) for q in k]
    square = np.sum(u[0, 0].numpy() ** 2) + sum(np.sum(np.abs(p) ** 2) for p in parts)
    value = SobolevLoss(1, relative=False)(u, torch.zeros_like(u))
    assert float(value) ** 2 == pytest.approx(square, rel=1e-12)


def test_zero_boundary_is_the_discrete_dirichlet_energy(rng):
    """sum d^2 + |grad d|^2 = <d, (1 - Lap_h) d>: by the sine transform's eigenvalues."""
    u = field(1, 1, 9, 9, rng=rng)
    modes = scipy.fft.dstn(u[0, 0].numpy(), type=1, norm="ortho")
    line = (2 * 9 * np.sin(np.pi * np.arange(1, 10) / 20)) ** 2
    energy = np.sum(modes**2 * (1 + line[:, None] + line))
    loss = SobolevLoss(form="differences", relative=False)
    assert float(loss(u, torch.zeros_like(u))) ** 2 == pytest.approx(energy, rel=1e-12)


def test_central_difference_of_a_sine_has_the_known_factor():
    n, k = 32, 3
    h = 2 / n
    x = torch.arange(n, dtype=torch.float64) * h
    u = torch.sin(math.pi * k * x)[None, None]
    loss = SobolevLoss(form="differences", boundary="periodic", lengths=2.0, relative=False)
    expected = n / 2 * (1 + (math.sin(math.pi * k * h) / h) ** 2)
    assert float(loss(u, torch.zeros_like(u))) ** 2 == pytest.approx(expected)


def test_one_sided_ends_are_exact_for_quadratics_and_third_order():
    """A quadratic has exact differences everywhere; the ends of a quartic err by the third power of the spacing."""
    errors = []
    for n in (16, 32):
        x = torch.arange(n, dtype=torch.float64) / n
        loss = SobolevLoss(form="differences", boundary="one-sided", field_weight=0.0, relative=False)
        zero = torch.zeros(1, 1, n, dtype=torch.float64)
        assert float(loss((x**2)[None, None], zero)) == pytest.approx(float((2 * x).norm()), rel=1e-12)
        ends = loss._difference((x**4)[None, None], 2)[0, 0, [0, -1]] * n - 4 * x[[0, -1]] ** 3
        errors.append(float(ends.abs().max()))
    assert 7.5 < errors[0] / errors[1] < 8.5


def test_helmholtz_loss_is_absolute_and_weights_the_field(rng):
    p, u = field(2, 1, 6, 6, rng=rng), field(2, 1, 6, 6, rng=rng)
    d = np.pad((p - u)[:, 0].numpy(), ((0, 0), (1, 1), (1, 1)))
    gradient = (np.diff(d[:, :, 1:-1], axis=1) ** 2).sum((1, 2)) + (np.diff(d[:, 1:-1], axis=2) ** 2).sum((1, 2))
    expected = np.sqrt(10 * (d**2).sum((1, 2)) + 36 * gradient).mean()
    loss = SobolevLoss(form="differences", field_weight=10.0, relative=False, reduction="mean")
    assert float(loss(p, u)) == pytest.approx(expected)


@pytest.mark.parametrize("options", FORMS)
def test_gradient_is_right_and_finite_at_an_exact_prediction(options, rng):
    u = field(2, 1, 6, 7, rng=rng)
    loss = SobolevLoss(**options)
    assert torch.autograd.gradcheck(lambda p: loss(p, u), (field(2, 1, 6, 7, rng=rng).requires_grad_(),))
    exact = u.clone().requires_grad_()
    loss(exact, u).backward()
    assert torch.isfinite(exact.grad).all()
    zero = torch.zeros_like(u).requires_grad_()
    loss(zero, torch.zeros_like(u)).backward()
    assert torch.isfinite(zero.grad).all()


def test_wrong_arguments_are_refused():
    u = torch.zeros(1, 1, 3, 8)
    with pytest.raises(ValueError, match="order must be 0 or 1"):
        SobolevLoss(2, form="differences")
    with pytest.raises(ValueError, match="spectral form"):
        SobolevLoss(1, truncate=3, form="differences")
    with pytest.raises(ValueError, match="at least 4 points"):
        SobolevLoss(form="differences", boundary="one-sided")(u, u)
    with pytest.raises(ValueError, match="length for each"):
        SobolevLoss(form="differences", lengths=(1.0,))(u, u)
    # Under the tests' shape checks the signature itself refuses; elsewhere the loss does.
    with pytest.raises((ValueError, TypeError), match=r"1, ?1, ?3, ?8"):
        SobolevLoss()(u[:, :, 0], u)

"""Against scipy's adaptive integration, Isserlis' theorem, Price's theorem, closed forms and limits."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate
from scipy.stats import multivariate_normal
from torch import nn
from torch.nn import functional as F

from lathe.core.gaussian import (
    Activation,
    activation,
    gauss_hermite,
    gaussian_expectation,
    gaussian_nodes,
    hermite_coefficients,
    kernel_moments,
    line_expectation,
    pair_moments,
)

SMOOTH = ["tanh", "swish", "sigmoid", "softplus", "mish", "gelu", "erf", "sin", "cos"]
KINKED = ["relu", "leaky_relu", "elu", "selu", "hardtanh", "relu6", "hardswish"]


def numbers(*values: float) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(value, dtype=torch.float64) for value in values)


def by_scipy(f, g, kaa, kab, kbb):
    """`<f(z_a) g(z_b)>` by conditioning: two nested adaptive integrals, split where the functions bend."""
    root, rest = math.sqrt(kaa), math.sqrt(max(kbb - kab**2 / kaa, 0))

    def scalar(function, z):
        return float(function(torch.tensor(z, dtype=torch.float64)))

    def inner(z):
        mean = kab / kaa * z
        cuts = sorted({min(max((k - mean) / rest, -9.5), 9.5) for k in (-3, -1, 0, 1, 3, 6)})
        return integrate.quad(
            lambda v: scalar(g, mean + rest * v) * math.exp(-v * v / 2), -10, 10, points=cuts, epsabs=1e-9, limit=200
        )[0]

    def outer(u):
        return scalar(f, root * u) * inner(root * u) * math.exp(-u * u / 2)

    cuts = sorted({min(max(k / root, -9.5), 9.5) for k in (-3, -1, 0, 1, 3, 6)})
    edges = [-8.0, *[c for c in cuts if abs(c) < 8], 8.0]
    nodes, weights = np.polynomial.legendre.leggauss(12)
    total = 0.0
    for left, right in itertools.pairwise(edges):
        total += (
            (right - left) / 2 * sum(w * outer(left + (right - left) * (x + 1) / 2) for x, w in zip(nodes, weights))
        )
    return total / (2 * math.pi)


@pytest.mark.parametrize("name", ["relu", "gelu", "erf", "tanh"])
def test_pair_moments_are_the_double_integral(name):
    act = activation(name)
    kernel, slope = pair_moments(act, *numbers(1.3, 0.5, 0.8))
    assert kernel.item() == pytest.approx(by_scipy(act, act, 1.3, 0.5, 0.8), abs=2e-6)
    prime = act.derivative
    assert slope.item() == pytest.approx(by_scipy(prime, prime, 1.3, 0.5, 0.8), abs=2e-6)


def test_hard_tanh_has_the_moments_of_a_box():
    def in_box(kab):
        normal = multivariate_normal(cov=[[1.3, kab], [kab, 0.8]])
        return normal.cdf([1, 1]) - normal.cdf([-1, 1]) - normal.cdf([1, -1]) + normal.cdf([-1, -1])

    kernel, slope = pair_moments(activation("hardtanh"), *numbers(1.3, 0.5, 0.8))
    assert slope.item() == pytest.approx(in_box(0.5), abs=1e-7)
    # The function is odd, so the kernel starts from zero at K_ab = 0 and its slope is the box's probability.
    assert kernel.item() == pytest.approx(integrate.fixed_quad(np.vectorize(in_box), 0, 0.5, n=8)[0], abs=1e-7)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "linear", "erf", "gelu", "sin", "cos"])
@pytest.mark.parametrize("kernel", [(1.0, 0.3, 2.0), (0.2, -0.15, 0.2), (5.0, 4.9, 5.0), (1.5, 1.5, 1.5)])
def test_closed_forms_are_the_quadratures(name, kernel):
    act = activation(name)
    kaa, kab, kbb = numbers(*kernel)
    K = torch.stack([kaa, kab, kab, kbb]).reshape(2, 2)
    order = 60 if act.kinks else 200
    value, slope = pair_moments(act, kaa, kab, kbb)
    assert value.item() == pytest.approx(gaussian_expectation((act, act), K, order=order).item(), abs=1e-8)
    assert gaussian_expectation((act, act), K, method="closed").item() == value.item()
    if kab < kaa or not act.kinks:  # at equal inputs the product of jumps is no function on the line
        numeric = gaussian_expectation(
            lambda a, b: act.derivative(a) * act.derivative(b), K, order=order, kinks=act.kinks
        )
        assert slope.item() == pytest.approx(numeric.item(), abs=1e-8)


@pytest.mark.parametrize("name", [*SMOOTH, "relu", "linear"])
def test_slope_is_the_derivative_of_the_kernel_by_prices_theorem(name):
    act = activation(name)
    kaa, kab, kbb = numbers(1.2, 0.7, 0.9)
    kab.requires_grad_()
    value, slope = pair_moments(act, kaa, kab, kbb)
    (gradient,) = torch.autograd.grad(value, kab)
    assert gradient.item() == pytest.approx(slope.item(), abs=1e-8)


@pytest.mark.parametrize("name", ["relu", "gelu", "erf", "tanh"])
def test_gradients_are_finite_and_right_for_a_whole_kernel_with_its_diagonal(name, rng):
    x = torch.randn(4, 3, dtype=torch.float64, generator=rng).requires_grad_()

    def total(x):
        kernel, slope = kernel_moments(activation(name), x @ x.mT / 3 + 0.1)
        return (kernel * torch.arange(16.0).reshape(4, 4)).sum() + (slope - slope.diagonal().diag()).sum()

    assert torch.autograd.gradcheck(total, x, atol=1e-5)


def kernel_of(rng, count=41, *, size=1.0, spread=0.0):
    """Of random inputs whose lengths vary by factors of about `exp(spread)`; the largest variance is `size`."""
    x = torch.randn(count, 7, dtype=torch.float64, generator=rng)
    x *= torch.exp(spread * torch.randn(count, 1, dtype=torch.float64, generator=rng))
    K = x @ x.mT
    return K * (size / K.max())


@pytest.mark.parametrize("size", [1e-6, 0.1, 14.0])
@pytest.mark.parametrize("act", ["relu", "gelu", "tanh", "swish", "mish", lambda z: torch.tanh(z) + 0.3 * z * z])
def test_a_kernel_in_strips_is_the_kernel_pair_by_pair(act, size, rng, monkeypatch):
    monkeypatch.setattr("lathe.core.gaussian.pairs._TILE", 16)
    K = kernel_of(rng, size=size, spread=0.3)
    kernel, slope = kernel_moments(activation(act), K)
    v = K.diagonal()
    whole, whole_slope = pair_moments(activation(act), v[:, None], K, v[None])
    torch.testing.assert_close(kernel, whole, atol=2e-11 * whole.abs().max().item(), rtol=0)
    torch.testing.assert_close(slope, whole_slope, atol=1e-8, rtol=0)
    assert torch.equal(kernel, kernel.mT) and torch.equal(slope, slope.mT)
    assert torch.equal(kernel_moments(activation(act), K, slope=False)[0], kernel)


@pytest.mark.parametrize("name", ["tanh", "swish"])
def test_tables_give_the_integrals(name, rng, monkeypatch):
    monkeypatch.setattr("lathe.core.gaussian.pairs._TILE", 16)
    act, K = activation(name), kernel_of(rng, size=9.0 if name == "swish" else 1.0)
    kernel, slope = kernel_moments(act, K)
    for moment, f in ((kernel, act.fn), (slope, act.derivative)):
        line = line_expectation(lambda z, f=f: f(z) ** 2, K.diagonal())
        torch.testing.assert_close(moment.diagonal(), line, atol=1e-9, rtol=0)
        for i, j in ((0, 1), (3, 30), (40, 17)):
            block = K[[i, j]][:, [i, j]]
            value = gaussian_expectation(lambda a, b, f=f: f(a) * f(b), block, order=300)
            assert moment[i, j].item() == pytest.approx(value.item(), abs=1e-8)


@pytest.mark.parametrize("spread", [0.0, 1.0, 6.0])
def test_tables_serve_equal_inputs_and_very_different_ones(spread, rng, monkeypatch):
    K = kernel_of(rng, size=5.0, spread=spread) if spread else torch.full((41, 41), 0.7, dtype=torch.float64)
    whole = kernel_moments(activation("tanh"), K)
    monkeypatch.setattr("lathe.core.gaussian.pairs._TILE", 16)
    for strips, once in zip(kernel_moments(activation("tanh"), K), whole):
        torch.testing.assert_close(strips, once, atol=1e-9, rtol=0)


def test_inputs_of_zeros_are_no_exception(rng, monkeypatch):
    K = kernel_of(rng)
    K[5], K[:, 5] = 0, 0
    expected = line_expectation(lambda z: 1 - torch.tanh(z) ** 2, K.diagonal())  # s'(0) is 1
    for tile in (168, 16):
        monkeypatch.setattr("lathe.core.gaussian.pairs._TILE", tile)
        kernel, slope = kernel_moments(activation("tanh"), K)
        assert kernel[5].abs().max() < 1e-11
        torch.testing.assert_close(slope[5], expected, atol=1e-9, rtol=0)


def test_single_precision_is_kept(rng, monkeypatch):
    monkeypatch.setattr("lathe.core.gaussian.pairs._TILE", 16)
    K = kernel_of(rng)
    for single, double in zip(kernel_moments(activation("tanh"), K.float()), kernel_moments(activation("tanh"), K)):
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), double, atol=1e-5, rtol=0)


def test_threads_change_nothing(rng, monkeypatch):
    monkeypatch.setattr("lathe.core.gaussian.pairs._TILE", 16)
    K = kernel_of(rng, 40)
    alone = kernel_moments(activation("tanh"), K)[0]
    torch.set_num_threads(2)
    try:
        together = kernel_moments(activation("tanh"), K)[0]
    finally:
        torch.set_num_threads(1)
    assert torch.allclose(alone, together, atol=1e-14, rtol=0)


@given(
    variance=st.floats(1e-4, 30.0),
    other=st.floats(1e-4, 30.0),
    correlation=st.floats(-1.0, 1.0),
    name=st.sampled_from(["relu", "gelu", "erf", "tanh", "sin"]),
)
@settings(max_examples=60, deadline=None)
def test_moments_obey_cauchy_and_schwarz_at_any_scale(variance, other, correlation, name):
    kaa, kbb = numbers(variance, other)
    act = activation(name)
    kab = correlation * (kaa * kbb).sqrt()
    value, slope = pair_moments(act, kaa, kab, kbb)
    bound = (line_expectation(lambda z: act(z) ** 2, torch.stack([kaa, kbb]), act.kinks)).prod().sqrt()
    assert torch.isfinite(slope) and value.abs() <= bound * (1 + 1e-9) + 1e-12


def test_a_long_series_is_still_the_integral():
    # tanh at variance 20 is nearly a step: a thousand terms, checked at equal inputs, an integral over a line.
    K = torch.tensor(20.0, dtype=torch.float64)
    act = activation("tanh")
    kernel, slope = pair_moments(act, K, K, K)
    assert kernel.item() == pytest.approx(line_expectation(lambda z: act(z) ** 2, K).item(), abs=1e-11)
    assert slope.item() == pytest.approx(line_expectation(lambda z: act.derivative(z) ** 2, K).item(), abs=1e-9)


def test_hermite_series_of_a_cubic_is_exact():
    c = hermite_coefficients(Activation(lambda z: z**3), *numbers(2.0), 6)
    # z^3 = 2^{3/2} u^3, and u^3 = sqrt(6) h_3 + 3 h_1.
    expected = torch.tensor([0, 3, 0, math.sqrt(6), 0, 0], dtype=torch.float64) * 2**1.5
    torch.testing.assert_close(c, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", ["hermite", "split", "adaptive"])
def test_products_of_four_variables_follow_isserlis(method, rng):
    root = torch.randn(3, 4, 4, dtype=torch.float64, generator=rng) / 2
    K = root @ root.mT
    order = 8 if method == "hermite" else 10
    d = 2 if method == "adaptive" else 4
    if d == 4:
        value = gaussian_expectation(lambda a, b, c, d: a * b * c * d, K, method=method, order=order)
        expected = K[:, 0, 1] * K[:, 2, 3] + K[:, 0, 2] * K[:, 1, 3] + K[:, 0, 3] * K[:, 1, 2]
    else:
        value = gaussian_expectation(lambda a, b: a**2 * b**2, K[:, :2, :2], method=method)
        expected = K[:, 0, 0] * K[:, 1, 1] + 2 * K[:, 0, 1] ** 2
    torch.testing.assert_close(value, expected, atol=3e-3 if method == "split" else 1e-10, rtol=1e-3)


def test_adaptive_finds_kinks_by_itself():
    K = torch.tensor([[[0.3]], [[2.0]]], dtype=torch.float64)
    value = gaussian_expectation(lambda z: (z - 0.37).clamp_min(0), K, method="adaptive")
    a = 0.37 / K[:, 0, 0].sqrt()
    density = torch.exp(-a * a / 2) / math.sqrt(2 * math.pi)
    expected = K[:, 0, 0].sqrt() * density - 0.37 * torch.special.ndtr(-a)
    torch.testing.assert_close(value, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("variance", [1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_line_expectation_holds_at_any_variance(variance):
    K = torch.tensor(variance, dtype=torch.float64)
    square = line_expectation(lambda z: z * z * torch.erf(z) ** 2, K)
    exact, _ = integrate.quad(
        lambda z: z * z * math.erf(z) ** 2 * math.exp(-z * z / (2 * variance)) / math.sqrt(2 * math.pi * variance),
        -9 * math.sqrt(variance), 9 * math.sqrt(variance), points=[-2, 0, 2], epsabs=0, epsrel=1e-11, limit=400,
    )  # fmt: skip
    assert square.item() == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("kinks", [(), (0.0,), (-1.0, 1.0)])
def test_singular_kernels_are_integrated_too(kinks):
    K = torch.ones(3, 3, dtype=torch.float64)
    value = gaussian_expectation(lambda a, b, c: a * b * c * c, K, order=12, kinks=kinks)
    assert value.item() == pytest.approx(3.0, abs=1e-5)


@given(batch=st.lists(st.integers(0, 3), max_size=2), d=st.integers(1, 3), order=st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_shapes_follow_the_batch(batch, d, order):
    K = torch.eye(d, dtype=torch.float64).expand(*batch, d, d)
    z, w = gaussian_nodes(K, order)
    assert z.shape == (*batch, order**d, d) and w.shape == (order**d,)
    assert gaussian_expectation(lambda *z: z[0] * 0 + 1, K, order=order).shape == tuple(batch)


def test_dtype_is_kept():
    nodes, weights = gauss_hermite(5, torch.zeros(1, dtype=torch.float32))
    assert nodes.dtype == weights.dtype == torch.float32 and weights.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("name", [*SMOOTH, *KINKED, "linear"])
def test_derivatives_are_the_slopes(name, rng):
    act = activation(name)
    z = torch.randn(50, dtype=torch.float64, generator=rng) * 2
    for order in (1, 2, 3):
        h = 1e-5
        numeric = (act.derivative(z + h, order - 1) - act.derivative(z - h, order - 1)) / (2 * h)
        torch.testing.assert_close(act.derivative(z, order), numeric, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(
    ("spec", "function"),
    [
        (nn.LeakyReLU(0.2), lambda z: F.leaky_relu(z, 0.2)),
        (nn.PReLU(), lambda z: F.leaky_relu(z, 0.25)),
        (nn.ReLU(inplace=True), torch.relu),
        (nn.ELU(0.7, inplace=True), lambda z: F.elu(z, 0.7)),
        (nn.GELU(approximate="tanh"), lambda z: F.gelu(z, approximate="tanh")),
        (nn.SiLU(), F.silu),
        (nn.Hardtanh(-2, 2), lambda z: z.clamp(-2, 2)),
        (torch.atan, torch.atan),
        ("SiLU", F.silu),
    ],
)
def test_modules_and_functions_are_understood(spec, function):
    z = torch.linspace(-3, 3, 13, dtype=torch.float64)
    before = z.clone()
    spec = spec.double() if isinstance(spec, nn.Module) else spec
    torch.testing.assert_close(activation(spec)(z), function(z), atol=1e-14, rtol=0)
    assert (z == before).all()


def test_bad_arguments_are_refused():
    K = torch.eye(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"spec must name a known activation.*'tahn'"):
        activation("tahn")
    with pytest.raises(ValueError, match=r"method must be.*'simpson'"):
        gaussian_expectation(lambda a, b: a * b, K, method="simpson")
    with pytest.raises(ValueError, match="got 1 for 2"):
        gaussian_expectation((activation("relu"),), K)
    with pytest.raises(ValueError, match="closed form"):
        gaussian_expectation((activation("tanh"),) * 2, K, method="closed")
    with pytest.raises(ValueError, match="K must be finite"):
        gaussian_expectation(lambda a, b: a * b, K * math.nan)
    with pytest.raises(ValueError, match="order must be at least 1, got 0"):
        gaussian_nodes(K, 0)

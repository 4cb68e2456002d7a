"""Kernels, criticality and single inputs: against closed forms, exact products, sampled networks, limits and a peer."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lathe.core.gaussian import Activation, activation, line_expectation
from lathe.theory.deep_learning_theory import (
    NoCriticalPoint,
    aspect_ratio,
    critical_point,
    critical_points,
    finite_width_single,
    first_kernel,
    fluctuation_rate,
    information_series,
    kernel_prediction,
    kernel_recursion,
    ntk_recursion,
    output_information,
    residual_fluctuations,
    residual_susceptibilities,
    susceptibilities,
)


def one(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_relu_kernels_are_arc_cosine_kernels(rng):
    x = torch.randn(4, 5, dtype=torch.float64, generator=rng)
    C_b, C_W, lam_b, lam_W = 0.2, 1.7, 0.3, 0.6
    K, theta = ntk_recursion(x, 3, "relu", C_b, C_W, lam_b, lam_W)
    k, t = C_b + C_W * x.numpy() @ x.numpy().T / 5, lam_b + lam_W * x.numpy() @ x.numpy().T / 5
    for layer in range(3):
        np.testing.assert_allclose(K[layer], k, atol=1e-10)
        np.testing.assert_allclose(theta[layer], t, atol=1e-7)
        norm = np.sqrt(np.outer(k.diagonal(), k.diagonal()))
        angle = np.arccos(np.clip(k / norm, -1, 1))
        kernel = norm * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / (2 * np.pi)
        t = lam_b + lam_W * kernel + C_W * (np.pi - angle) / (2 * np.pi) * t
        k = C_b + C_W * kernel


def test_erf_kernels_are_arc_sine_kernels(rng):
    x = torch.randn(4, 5, dtype=torch.float64, generator=rng)
    K = kernel_recursion(x, 2, "erf", 0.1, 1.3)
    k = K[0].numpy()
    area = np.outer(1 + 2 * k.diagonal(), 1 + 2 * k.diagonal())
    np.testing.assert_allclose(K[1], 0.1 + 1.3 * 2 / np.pi * np.arcsin(2 * k / np.sqrt(area)), atol=1e-12)


@pytest.mark.parametrize("act", ["relu", "tanh", "elu"])
def test_kernels_are_the_covariances_of_wide_networks(act, rng):
    x = torch.randn(3, 4, dtype=torch.float64, generator=rng)
    function = {"relu": torch.relu, "tanh": torch.tanh, "elu": nn.functional.elu}[act]
    h = x
    for _ in range(3):
        z = math.sqrt(0.1) * torch.randn(4000, dtype=torch.float64, generator=rng) + h @ torch.randn(
            h.shape[1], 4000, dtype=torch.float64, generator=rng
        ) * math.sqrt(1.5 / h.shape[1])
        h = function(z)
    torch.testing.assert_close(kernel_recursion(x, 3, act, 0.1, 1.5)[-1], z @ z.mT / 4000, rtol=0.15, atol=0.15)


def test_layers_that_are_asked_for_are_the_same_layers(rng):
    x = torch.randn(3, 4, dtype=torch.float64, generator=rng)
    whole, theta = ntk_recursion(x, 6, "gelu", 0.1, 1.2)
    some, some_theta = ntk_recursion(x, 6, "gelu", 0.1, 1.2, layers=[2, 6])
    assert torch.equal(some, whole[[1, 5]]) and torch.equal(some_theta, theta[[1, 5]])
    torch.testing.assert_close(kernel_recursion(x, 6, "gelu", 0.1, 1.2), whole)


@pytest.mark.parametrize("act", ["relu", "swish"])
def test_large_kernels_are_carried_as_halves_and_returned_whole(act, rng, monkeypatch):
    x = torch.randn(20, 5, dtype=torch.float64, generator=rng)
    whole = ntk_recursion(x, 4, act, 0.1, 1.5)
    monkeypatch.setattr("lathe.core.gaussian.pairs._TILE", 8)
    for strips, once in zip(ntk_recursion(x, 4, act, 0.1, 1.5), whole):
        torch.testing.assert_close(strips, once, atol=1e-10, rtol=0)
    K1 = first_kernel(x, 0.1, 1.5)
    before = K1.clone()
    torch.testing.assert_close(
        kernel_recursion(x, 4, act, 0.1, 1.5, K1=K1, layers=[1, 4]), whole[0][[0, 3]], atol=1e-10, rtol=0
    )
    assert torch.equal(K1, before)


def test_a_closed_form_that_returns_its_argument_is_safe(rng):
    x = torch.randn(3, 4, dtype=torch.float64, generator=rng)
    own = Activation(lambda z: z, torch.ones_like, torch.zeros_like, pair=lambda a, b, c: (b, torch.ones_like(b)))
    mine, named = (ntk_recursion(x, 4, act, 0.1, 1.2, 0.3, 0.7) for act in (own, "linear"))
    torch.testing.assert_close(mine[0], named[0])
    torch.testing.assert_close(mine[1], named[1])


def test_kernels_can_be_differentiated_by_inputs(rng):
    x = torch.randn(3, 2, dtype=torch.float64, generator=rng).requires_grad_()
    weights = torch.randn(3, 3, dtype=torch.float64, generator=rng)
    assert torch.autograd.gradcheck(
        lambda x: (kernel_recursion(x, 3, "tanh", 0.1, 1.2)[-1] * weights).sum(), x, atol=1e-5
    )


def test_predictions_interpolate_and_follow_the_linear_model(rng):
    x, x_test = (torch.randn(n, 3, dtype=torch.float64, generator=rng) for n in (3, 5))
    y = torch.randn(3, 1, dtype=torch.float64, generator=rng)
    at_train = kernel_prediction(x, y, x, 3, "gelu", 0.2, 1.5)
    torch.testing.assert_close(at_train.trained, y)
    torch.testing.assert_close(at_train.bayesian, y)
    assert at_train.bayesian_variance.abs().max() < 1e-9
    # A linear network of one layer without bias is minimum-norm regression.
    linear = kernel_prediction(x, y, x_test, 1, "linear", 0.0, 1.0, 0.0, 1.0)
    torch.testing.assert_close(linear.trained, x_test @ torch.linalg.pinv(x) @ y)


def test_the_reference_network_has_the_books_numbers():
    x = torch.tensor([0.9, -0.4, 1.1], dtype=torch.float64)
    K1 = first_kernel(x[None], 0.1, 1.2)[0, 0]
    found = finite_width_single(K1, [3, 24, 24, 24], "tanh", 0.1, 1.2, 0.3, 0.7)
    expected = {"K": 0.453294, "Theta": 1.207855, "V": 0.119732, "D": -0.089258, "F": 0.130563, "A": 0.079386}
    expected |= {"B": 0.811858, "P": -0.260341, "Q": -0.111543}
    for name, value in expected.items():
        assert found[name][2].item() == pytest.approx(value, abs=6e-7), name


@pytest.mark.parametrize(("act", "C_W", "nu"), [("linear", 1.0, 2.0), ("relu", 2.0, 5.0)])
def test_fluctuations_are_the_first_order_of_the_exact_product(act, C_W, nu):
    # E[G^2]/E[G]^2 = prod (1 + nu / n_l) for scale-invariant activations; V is its part of order 1/n.
    widths = [3, 10, 20, 40, 80]
    found = finite_width_single(one(1.7), widths, act, 0.0, C_W)
    for layer in range(1, 5):
        first_order = sum(nu / n for n in widths[1:layer])
        relative = (found["V"][layer - 1] / found["K"][layer - 1] ** 2 / widths[layer - 1]).item()
        assert relative == pytest.approx(first_order, abs=1e-12)


@pytest.mark.parametrize(("act", "nu"), [("linear", 2), ("relu", 5)])
def test_sampled_networks_fluctuate_as_the_exact_product(act, nu, rng):
    n, depth, nets = 16, 3, 4000
    function = torch.relu if act == "relu" else (lambda z: z)
    h = torch.ones(nets, 1, n, dtype=torch.float64)
    for _ in range(depth):
        W = torch.randn(nets, n, n, dtype=torch.float64, generator=rng) * math.sqrt((2 if act == "relu" else 1) / n)
        h = function(h @ W)
    G = h.square().mean((1, 2)) * (2 if act == "relu" else 1)
    relative = G.square().mean() / G.mean() ** 2
    bootstrap = torch.stack([
        (lambda g: g.square().mean() / g.mean() ** 2)(G[torch.randint(nets, (nets,), generator=rng)])
        for _ in range(100)
    ])  # fmt: skip
    assert abs(relative - (1 + nu / n) ** depth) < 4 * bootstrap.std()


def test_linear_networks_have_polynomial_tensors():
    # Without biases, at C_W = lambda_W = K = 1: Theta^(l) = l; the others solve their recursions with s' = 1.
    found = finite_width_single(one(1.0), [1] * 9, "linear", 0.0, 1.0, 0.0, 1.0)
    layers = torch.arange(1, 9, dtype=torch.float64)
    torch.testing.assert_close(found["Theta"], layers)
    torch.testing.assert_close(found["V"], 2 * (layers - 1))
    torch.testing.assert_close(found["F"], layers * (layers - 1) / 2)
    torch.testing.assert_close(found["B"], (layers - 1) * layers * (2 * layers - 1) / 6)
    assert found["P"].abs().max() < 1e-12


def test_relu_moves_no_kernel_by_p():
    found = finite_width_single(one(1.3), [1] * 6, "relu", 0.1, 1.7, 0.3, 0.7)
    assert found["P"].abs().max() < 1e-12 and found["Q"][-1] > 0.1


@given(K=st.floats(0.01, 20.0), act=st.sampled_from(["tanh", "gelu", "swish", "sin", "erf", "relu", "elu", "hardtanh"]))
@settings(max_examples=25, deadline=None)
def test_three_formulas_of_chi_agree(K, act):
    kernel = one(K).requires_grad_()
    s = activation(act)
    by_moments, _, h = susceptibilities(kernel.detach(), act, 0.0, 1.4)
    square = line_expectation(lambda z: s(z) ** 2, kernel, s.kinks)
    (by_autograd,) = torch.autograd.grad(1.4 * square, kernel)
    weighted = line_expectation(lambda z: s(z) ** 2 * (z * z - K), kernel.detach(), s.kinks)
    assert by_moments.item() == pytest.approx(by_autograd.item(), abs=1e-8)
    assert by_moments.item() == pytest.approx(1.4 / (2 * K * K) * weighted.item(), abs=1e-8)
    if not s.kinks:
        curve = line_expectation(lambda z: s.derivative(z) ** 2 + s(z) * s.derivative(z, 2), kernel.detach())
        assert by_moments.item() == pytest.approx(1.4 * curve.item(), abs=1e-8)
        step = 1e-4 * K
        up, down = (susceptibilities(one(K + d), act, 0.0, 1.4)[1] for d in (step, -step))
        assert h.item() == pytest.approx(((up - down) / (4 * step)).item(), abs=1e-6)


def test_gelu_moments_in_closed_form():
    K = one((3 + math.sqrt(17)) / 2)
    e = 1 / (2 * math.pi * torch.sqrt(1 + 2 * K))
    orthant = 0.25 + torch.asin(K / (1 + K)) / (2 * math.pi)
    square = line_expectation(lambda z: (z * torch.special.ndtr(z)) ** 2, K)
    assert square.item() == pytest.approx((K * orthant + 2 * K * K * e / (1 + K)).item(), abs=1e-10)
    perp = susceptibilities(K, "gelu", 0.0, 1.0)[1]
    assert perp.item() == pytest.approx((orthant + K * e * (2 / (1 + K) + 1 / (1 + 2 * K))).item(), abs=1e-10)
    point = critical_point("gelu")
    assert point.K_star == pytest.approx(K.item(), abs=1e-10)
    assert pytest.approx(1 / perp.item(), abs=1e-10) == point.C_W
    assert point.C_b == pytest.approx((K - square / perp).item(), abs=1e-10)


@pytest.mark.parametrize(
    ("act", "C_b", "C_W", "universality"),
    [
        ("relu", 0, 2, "scale-invariant"),
        ("linear", 0, 1, "scale-invariant"),
        (nn.LeakyReLU(0.5), 0, 1.6, "scale-invariant"),
        ("tanh", 0, 1, "K*=0"),
        ("sin", 0, 1, "K*=0"),
        ("erf", 0, math.pi / 4, "K*=0"),
        ("gelu", 0.17292239, 1.98305826, "half-stable"),
        ("swish", 0.55514317, 1.98800468, "half-stable"),
    ],
)
def test_critical_points_of_the_table(act, C_b, C_W, universality):
    point = critical_point(act)
    assert (point.C_b, point.C_W) == (pytest.approx(C_b, abs=1e-8), pytest.approx(C_W, abs=1e-8))
    assert point.universality == universality


@pytest.mark.parametrize("act", ["gelu", "swish", nn.GELU(approximate="tanh"), "mish", "hardswish"])
def test_critical_points_are_fixed_and_marginal(act):
    for point in critical_points(act):
        par, perp, _ = susceptibilities(one(point.K_star), act, point.C_b, point.C_W)
        assert par.item() == pytest.approx(1, abs=1e-9) and perp.item() == pytest.approx(1, abs=1e-9)
        found = finite_width_single(one(point.K_star), [1] * 4, act, point.C_b, point.C_W)
        torch.testing.assert_close(found["K"], torch.full((3,), point.K_star, dtype=torch.float64))
        assert (found["V"][2] / found["K"][2] ** 2).item() == pytest.approx(2 * point.nu, rel=1e-9)


def test_a_users_activation_is_solved_for():
    point = critical_point(lambda z: torch.atan(2 * z))
    assert (point.C_W, point.a1) == (pytest.approx(0.25), pytest.approx(-8.0))
    scaled = critical_point(Activation(lambda z: 3 * z.clamp_min(0), kinks=(0.0,)))
    assert (scaled.C_W, scaled.universality, scaled.nu) == (pytest.approx(2 / 9), "scale-invariant", pytest.approx(5))


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        ("sigmoid", "no fixed point"),
        ("softplus", "nowhere"),
        ("perceptron", "s'"),
        (Activation(lambda z: z**2, name="square"), "square.*s'\\(0\\) = 0"),
        (Activation(lambda z: z**3, name="cube"), "cube"),
    ],
)
def test_no_critical_point_is_said_with_the_reason(act, reason):
    with pytest.raises(NoCriticalPoint, match=reason):
        critical_point(act)


def test_tanh_decays_as_a_power_with_the_predicted_constants():
    found = finite_width_single(one(1.0), [1] * 1001, "tanh", 0.0, 1.0)
    assert 2 * 1000 * found["K"][999].item() == pytest.approx(1, abs=0.01)
    assert 2 * 200 * found["K"][199].item() == pytest.approx(1.013, abs=1e-3)
    assert (found["V"][199] / found["K"][199] ** 2).item() / 200 == pytest.approx(0.656, abs=1e-3)
    par, perp, _ = susceptibilities(found["K"][-1], "tanh", 0.0, 1.0)
    assert 1000 * (1 - par.item()) == pytest.approx(2, abs=0.02) and 1000 * (1 - perp.item()) == pytest.approx(
        1, abs=0.01
    )


def test_bias_and_weight_parts_of_the_critical_ntk():
    bias = finite_width_single(one(1.0), [1] * 401, "tanh", 0.0, 1.0, 1.0, 0.0)["Theta"][-1] / 400
    weight = finite_width_single(one(1.0), [1] * 401, "tanh", 0.0, 1.0, 0.0, 1.0)["Theta"][-1]
    assert bias.item() == pytest.approx(1 / 2, abs=0.02) and weight.item() == pytest.approx(1 / 2, abs=0.02)
    relu = finite_width_single(one(3.0), [1] * 8, "relu", 0.0, 2.0, 0.3, 0.7, theta1=one(0.3 + 0.7 * 1.5))["Theta"]
    torch.testing.assert_close(relu, (0.3 + 0.7 * 3.0 / 2) * torch.arange(1, 8, dtype=torch.float64))


def test_aspect_ratios_and_the_series_behind_them():
    assert aspect_ratio("relu", 10) == pytest.approx(4 / (50 * 5)) and aspect_ratio("tanh", 1 + 1) == pytest.approx(
        4 / 26 * 1.5
    )
    for m1, m2 in ((1, 1), (2, 3), (5, 5)):
        second, third = information_series(m1, m2)
        assert 8 * second == m1 * m2 and 6 * third == -second * (3 * (m1 + m2) + 20)
        # The maximum of second r^2 + third r^3.
        assert float(-2 * second / (3 * third)) == pytest.approx(4 / (3 * (m1 + m2) + 20))
    s = 1e-3
    series = 6 / 8 * s**2 * (1 - (3 * 5 + 14) * s / 6)
    assert output_information(2, 3, s) == pytest.approx(series, rel=1e-4)
    assert output_information(2, 3, 0.0) == 0
    assert fluctuation_rate("linear", 0.8) == pytest.approx(2 * (1 - 0.8**4))
    assert aspect_ratio("relu", 10, 0.95) > 4 * aspect_ratio("relu", 10)


def test_residual_fluctuations_of_linear_blocks_are_the_closure(rng):
    measured = residual_fluctuations("linear", math.sqrt(0.5), width=128, blocks=3, draws=20_000, generator=rng)
    torch.testing.assert_close(measured, 1.5 * torch.arange(1, 4, dtype=torch.float64), rtol=0.06, atol=0)
    # For ReLU the closure (2.25 a block) holds for the first block only.
    relu = residual_fluctuations("relu", math.sqrt(0.5), width=128, blocks=3, draws=20_000, generator=rng)
    assert relu[0].item() == pytest.approx(2.25, rel=0.06) and relu[2] > 1.3 * 6.75
    par, perp = residual_susceptibilities(one(0.7), "relu", 2 * 0.5, math.sqrt(0.5))
    assert par.item() == pytest.approx(1) and perp.item() == pytest.approx(1)


def test_neural_tangents_gives_the_same_kernels(rng, monkeypatch):
    if not os.environ.get("LATHE_NEURAL_TANGENTS_PYTHON"):
        pytest.skip("LATHE_NEURAL_TANGENTS_PYTHON names no interpreter")
    folder = str(Path(__file__).parents[2] / "benchmarks")
    monkeypatch.syspath_prepend(folder)
    sys.modules.pop("deep_learning_theory", None)
    from deep_learning_theory import neural_tangents

    x = torch.randn(6, 5, dtype=torch.float64, generator=rng)
    for act, layer in (("relu", "Relu()"), ("erf", "Erf()"), ("gelu", "Gelu(approximate=False)")):
        K, theta, _ = neural_tangents(x, layer, 0.1, 1.3, depth=4)
        ours, our_theta = ntk_recursion(x, 4, act, 0.1, 1.3, 0.1, 1.3, layers=[4])
        torch.testing.assert_close(ours[0], K, atol=1e-6, rtol=0)
        torch.testing.assert_close(our_theta[0], theta, atol=1e-6, rtol=0)


def test_bad_arguments_are_refused(rng):
    x = torch.randn(2, 3, dtype=torch.float64, generator=rng)
    with pytest.raises(ValueError, match="C_W must be positive, got 0"):
        kernel_recursion(x, 2, "relu", 0.0, 0.0)
    with pytest.raises(ValueError, match=r"C_b must not be negative, got -0\.1"):
        ntk_recursion(x, 2, "relu", -0.1, 1.0)
    with pytest.raises(ValueError, match="x must be finite"):
        kernel_recursion(x * math.inf, 2, "relu", 0.0, 1.0)
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        kernel_recursion(x, 0, "relu", 0.0, 1.0)
    with pytest.raises(ValueError, match=r"layers must lie in 1 \.\. 2"):
        kernel_recursion(x, 2, "relu", 0.0, 1.0, layers=[3])
    with pytest.raises(ValueError, match="widths must be"):
        finite_width_single(one(1.0), [3, 0, 2], "relu", 0.0, 1.0)
    with pytest.raises(ValueError, match="K must be positive"):
        susceptibilities(one(0.0), "relu", 0.0, 1.0)
    with pytest.raises(ValueError, match=r"n_out must be at least 2.*got 1"):
        aspect_ratio("relu", 1)
    with pytest.raises(ValueError, match="gamma must lie"):
        aspect_ratio("relu", 10, 1.0)

"""Feature maps against complex arithmetic, quadrature, Monte Carlo and closed forms; readouts against scikit-learn."""

from __future__ import annotations

import math

import jaxtyping
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.optimize
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from lathe.nn.scalable_kernels import (
    URF,
    ArcCosFeatures,
    arccos_kernel,
    fit_bundled,
    optimal_damping,
    second_moment,
    spectrum,
)
from lathe.nn.scalable_kernels.projections import projection

ACTIVATIONS = {
    "cos": np.cos,
    "sin": np.sin,
    "gauss": lambda z: np.exp(-z * z / 2),
    "sech": lambda z: 1 / np.cosh(z),
    "cauchy": lambda z: 1 / (1 + z * z),
    "sinc": lambda z: np.sin(z) / z,
    "tanh": np.tanh,
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "softplus": lambda z: np.log1p(np.exp(z)),
    "gelu": lambda z: z * scipy.stats.norm.cdf(z),
    "relu": lambda z: np.maximum(z, 0),
}
EXACT = ["cos", "sin", "gauss", "sech", "cauchy", "sinc"]


@pytest.fixture
def unchecked():
    """Switches the shape and type checks of the tests off, which would refuse first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def ball(count, dimension, norm, rng):
    x = torch.randn(count, dimension, dtype=torch.float64, generator=rng)
    return norm * x / x.norm(dim=1, keepdim=True)


# --- spectra ---


@pytest.mark.parametrize("name", ["gauss", "sech", "cauchy", "sinc"])
def test_closed_transforms_give_the_activation_back_by_quadrature(name):
    known = spectrum(name)
    z = np.array([0.3, 1.0, 2.5])
    reach = float(known.xi[-1] + known.cell / 2)
    density = lambda xi: float(known.density(torch.tensor([xi], dtype=torch.float64))[0])  # noqa: E731
    for each in z:
        value, _ = scipy.integrate.quad(lambda xi: density(xi) * math.cos(2 * math.pi * xi * each), 0, reach, limit=200)  # noqa: B023
        assert value == pytest.approx(ACTIVATIONS[name](each), abs=1e-8)
    assert known.mass == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize(("name", "tolerance"), [("tanh", 1e-9), ("sigmoid", 1e-9), ("gelu", 1e-9), ("relu", 2e-3)])
@pytest.mark.parametrize("window", [1.5, 6.0])
def test_series_of_continued_activations_are_the_activation_within_the_window(name, tolerance, window):
    series = spectrum(name, window=window)
    z = np.linspace(-window, window, 101)
    waves = np.exp(2j * np.pi * np.outer(z, series.xi.numpy()))
    value = series.constant + (waves @ series.amplitude.numpy()).real
    np.testing.assert_allclose(value, ACTIVATIONS[name](z), atol=tolerance)


@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from([*EXACT, "tanh", "gelu"]),
    count=st.integers(1, 300),
    M=st.sampled_from([0.0, 0.1, "auto"]),
    seed=st.integers(0, 1000),
)
def test_weights_of_draws_are_a_fair_price_for_their_probability(name, count, M, seed):
    """Over many draws the mean of weight * exp(2 pi i xi z) is the activation: probabilities were divided out."""
    known = spectrum(name)
    generator = torch.Generator().manual_seed(seed)
    draws = [known.draw(count, 8, M=M, squared_norm=1.0, generator=generator) for _ in range(max(1, 600 // count))]
    value = draws[0].constant + np.mean(
        [(d.weight.numpy() * np.exp(2j * np.pi * 0.7 * d.xi.numpy())).real.mean() for d in draws]
    )
    # What is cut off of a continued activation is at most its noise at this count.
    slack = 0.25 if name in EXACT else 0.25 + 8 / math.sqrt(count)
    assert value == pytest.approx(ACTIVATIONS[name](0.7), abs=slack if count < 200 else slack / 2)
    for d in draws[:1]:
        assert (d.xi > 0).all()
        assert (d.M >= 0).all()


def test_activations_that_cannot_be_expanded_are_refused(unchecked):
    with pytest.raises(ValueError, match=r"one of cos, sin.*got 'swishy'"):
        spectrum("swishy")
    with pytest.raises(ValueError, match="finite for"):
        spectrum(torch.log)
    with pytest.raises(ValueError, match="elementwise function, got Softmax"):
        spectrum(nn.Softmax(-1))
    with pytest.raises(ValueError, match=r"window must be positive and finite, got -1"):
        spectrum("tanh", window=-1.0)


# --- directions ---


def test_orthogonal_directions_are_orthogonal_in_blocks_with_norms_of_independent_gaussians():
    G = projection(6, 600, orthogonal=True, generator=None, dtype=torch.float64).weight
    for block in G.split(6):
        products = block @ block.T
        assert (products - products.diagonal().diag()).abs().max() < 1e-12
    assert scipy.stats.kstest(G.norm(dim=1), scipy.stats.chi(6).cdf).pvalue > 1e-3
    assert scipy.stats.kstest(G[:, 0], scipy.stats.norm.cdf).pvalue > 1e-3


@pytest.mark.parametrize("d", [1, 2, 5, 8, 24, 32])
def test_structured_directions_are_rows_of_products_of_signs_and_hadamard_matrices(d):
    made = projection(d, 40, orthogonal="hadamard", generator=None, dtype=torch.float64)
    D = made.dimension
    H = scipy.linalg.hadamard(D) / math.sqrt(D)
    rows = []
    for block in range(made.signs.shape[1]):
        G = np.eye(D)
        for signs in made.signs[:, block].numpy():
            G = H @ np.diag(signs) @ G
        rows.append(G)
    G = (np.concatenate(rows)[:40] * made.norms.numpy()[:, None])[:, :d]
    x = torch.randn(3, 2, d, dtype=torch.float64)
    np.testing.assert_allclose(made(x), x.numpy() @ G.T, atol=1e-12)
    np.testing.assert_allclose(made.squared_norms(), made.norms.square())


# --- universal random features ---


def complex_features(features: URF, u: np.ndarray, a: float) -> np.ndarray:
    """L(g, rho u) m^(-1/2) as the paper writes it, in complex numbers, for u already scaled; (inputs, m)."""
    xi, M = features.xi.numpy(), features.M.numpy()
    G = features.projection.weight.numpy() / (a * np.sqrt(np.pi * xi * (1 + 4 * M)))[:, None]
    rho = np.sqrt(2j * np.pi * xi)
    d, m = G.shape[1], len(xi)
    exponent = -M * (G * G).sum(1) + np.sqrt(1 + 4 * M) * rho * (u @ G.T) - rho**2 * (u * u).sum(1)[:, None] / 2
    return (1 + 4 * M) ** (d / 4) * np.exp(exponent) / math.sqrt(m)


@pytest.mark.parametrize("M", [0.0, 0.3, "auto"])
@pytest.mark.parametrize("name", ["cos", "sin", "sech", "sigmoid"])
def test_the_real_form_is_the_complex_one(name, M, rng):
    features = URF(name, 5, 12, M=M, input_scale=0.7, dtype=torch.float64, seed=1)
    x, w, b = ball(4, 5, 1.2, rng), ball(3, 5, 0.6, rng), torch.randn(3, dtype=torch.float64, generator=rng)
    left, right = complex_features(features, 0.7 * x.numpy(), 0.7), complex_features(features, w.numpy() / 0.7, 0.7)
    weights = features.gain.numpy() * np.exp(1j * (features.phase.numpy() + 2 * np.pi * np.outer(b, features.xi)))
    expected = (left @ (right * weights).T).real
    if features.constant is not None:
        expected = expected + float(features.constant)
    np.testing.assert_allclose(features.phi(x) @ features.psi(w, b).T, expected, atol=1e-12, rtol=1e-12)
    assert features.phi(x).shape == (4, features.feature_dim)


@settings(max_examples=30, deadline=None)
@given(xi=st.floats(0.01, 1.0), M=st.floats(0, 1), x=st.floats(-1.5, 1.5), w=st.floats(-1.5, 1.5), a=st.floats(0.5, 2))
def test_one_draw_is_unbiased_by_quadrature_over_its_direction(xi, M, x, w, a):
    """d = 1: the integral over g of phi(x) . psi(w) is cos(2 pi xi x w), for any damping and scale."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(150)
    features = URF("cos", 1, len(nodes), M=0.0, orthogonal=False, dtype=torch.float64)
    m = len(nodes)
    features.xi.fill_(xi)
    features.M.fill_(M)
    features.scale.fill_(a)
    features.gain.copy_(torch.as_tensor(m * weights / math.sqrt(2 * math.pi)))
    g = torch.as_tensor(nodes)
    features.log_scale.copy_(math.log1p(4 * M) / 4 - M * g**2 - math.log(m) / 2)
    features.projection.weight.copy_((a * math.sqrt(math.pi * xi * (1 + 4 * M)) * g)[:, None])
    one = lambda value: torch.tensor([[value]], dtype=torch.float64)  # noqa: E731
    estimate = float(features.phi(one(x)) @ features.psi(one(w)).T)
    assert estimate == pytest.approx(math.cos(2 * math.pi * xi * x * w), abs=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_many_features_give_the_layer(name, rng):
    x, w = ball(20, 8, 0.7, rng), ball(15, 8, 0.7, rng)
    b = 0.5 * torch.randn(15, dtype=torch.float64, generator=rng)
    features = URF(name, 8, 16384, M="auto", window=3.0, squared_norm=1.0, seed=0, dtype=torch.float64)
    estimate = features.phi(x) @ features.psi(w, b).T
    truth = torch.as_tensor(ACTIVATIONS[name]((x @ w.T + b).numpy()))
    error = float((estimate - truth).norm() / truth.norm())
    # A window full of a growing function has a large mass: more noise for the same m.
    assert error < {"gelu": 0.08, "relu": 0.15}.get(name, 0.05)
    # As predicted, but for the gain of orthogonal directions and what is cut off.
    assert error < 2 * features.relative_error(x, w, b) + 0.02


def test_any_function_can_be_the_activation(rng):
    x, w = ball(10, 4, 0.7, rng), ball(10, 4, 0.7, rng)
    f = lambda z: z * torch.exp(-z.square())  # noqa: E731
    features = URF(f, 4, 16384, M="auto", window=1.0, squared_norm=1.0, seed=0, dtype=torch.float64)
    truth = f(x @ w.T)
    assert float((features.phi(x) @ features.psi(w).T - truth).norm() / truth.norm()) < 0.15


@settings(max_examples=15, deadline=None)
@given(a=st.floats(0.2, 5.0), name=st.sampled_from(["cos", "sech", "gelu", "relu", "arccos"]), seed=st.integers(0, 99))
def test_balancing_is_scaling_both_sides(a, name, seed):
    rng = torch.Generator().manual_seed(seed)
    x, w, b = ball(3, 6, 1.0, rng), ball(4, 6, 1.0, rng), torch.randn(4, dtype=torch.float64, generator=rng)

    def make(scale):
        if name == "arccos":
            return ArcCosFeatures(6, 9, bias=True, input_scale=scale, seed=seed, dtype=torch.float64)
        return URF(name, 6, 9, M="auto", input_scale=scale, seed=seed, dtype=torch.float64)

    scaled, plain = make(a), make(1.0)
    torch.testing.assert_close(scaled.phi(x), plain.phi(a * x), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scaled.psi(w, b), plain.psi(w / a, b), rtol=1e-6, atol=1e-9)


def test_features_turn_with_the_space(rng):
    R, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=rng))
    x, w = ball(3, 5, 1.0, rng), ball(4, 5, 1.0, rng)
    for features in (URF("sech", 5, 8, dtype=torch.float64), ArcCosFeatures(5, 8, dtype=torch.float64)):
        before = features.phi(x), features.psi(w)
        features.projection.weight.copy_(features.projection.weight @ R)
        torch.testing.assert_close(features.phi(x @ R), before[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(features.psi(w @ R), before[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("M", [0.0, 0.05])
def test_the_second_moment_of_a_draw_by_monte_carlo(M, rng):
    d, xi = 6, 0.15
    x, w = ball(1, d, 0.7, rng).numpy()[0], ball(1, d, 0.8, rng).numpy()[0]
    g = np.random.default_rng(0).standard_normal((400_000, d))
    rho = np.sqrt(2j * np.pi * xi)

    def L(u):
        exponent = -M * (g * g).sum(1) + np.sqrt(1 + 4 * M) * rho * (g @ u) - rho**2 * (u @ u) / 2
        return (1 + 4 * M) ** (d / 4) * np.exp(exponent)

    z = L(x) * L(w)
    assert np.mean(z) == pytest.approx(np.exp(2j * np.pi * xi * (w @ x)), abs=0.01)
    s = 2 * math.pi * xi * float((x + w) @ (x + w))
    assert float(second_moment(s, d, M)) == pytest.approx(np.mean(np.abs(z) ** 2), rel=0.02)


@settings(max_examples=50, deadline=None)
@given(s=st.floats(1e-3, 200), d=st.integers(1, 512))
def test_the_optimal_damping_is_the_minimum_of_the_second_moment(s, d):
    best = float(optimal_damping(s, d))
    log_moment = lambda M: d * (math.log1p(4 * M) - math.log1p(8 * M) / 2) + (1 + 4 * M) / (1 + 8 * M) * s  # noqa: E731
    found = scipy.optimize.minimize_scalar(log_moment, bounds=(0, 2 * best + 1e-3), method="bounded")
    assert log_moment(best) <= found.fun + 1e-9 * abs(found.fun)
    assert best > 0


def test_the_predicted_variance_is_that_over_directions(rng):
    x, w, b = ball(3, 4, 0.8, rng), ball(2, 4, 0.9, rng), torch.tensor([0.2, -0.4], dtype=torch.float64)
    for name, M in (("cos", 0.0), ("sech", 0.1), ("gelu", "auto")):
        features = URF(name, 4, 4, M=M, orthogonal=False, input_scale=1.1, seed=3, dtype=torch.float64)
        predicted = features.variance(x, w, b)
        # 40,000 estimates at once: the same four frequencies, other directions.
        many = URF(name, 4, 160_000, M=0.0, orthogonal=False, input_scale=1.1, seed=4, dtype=torch.float64)
        repeat = lambda buffer: buffer.repeat(40_000)  # noqa: E731
        g = torch.randn(160_000, 4, dtype=torch.float64, generator=rng)
        M_of, xi = repeat(features.M), repeat(features.xi)
        many.xi.copy_(xi)
        many.gain.copy_(repeat(features.gain))
        many.phase.copy_(repeat(features.phase))
        many.log_scale.copy_(torch.log1p(4 * M_of) - M_of * g.square().sum(1) - math.log(4) / 2)
        many.projection.weight.copy_((1.1 * torch.sqrt(math.pi * xi * (1 + 4 * M_of)))[:, None] * g)
        phi, psi = many.phi(x)[:, :320_000], many.psi(w, b)[:, :320_000]
        terms = phi[:, None] * psi
        estimates = (terms[..., :160_000] + terms[..., 160_000:]).unflatten(-1, (40_000, 4)).sum(-1)
        torch.testing.assert_close(estimates.var(-1), predicted, rtol=0.1, atol=1e-4)


def test_orthogonal_directions_have_less_variance_than_independent_ones(rng):
    """Nearly all of what they take from a complex draw is in its sine, where w^T x is small."""
    x, w = ball(8, 16, 1.0, rng), ball(8, 16, 1.0, rng)
    truth = torch.sin(x @ w.T)

    def error(orthogonal):
        estimates = [URF("sin", 16, 16, orthogonal=orthogonal, seed=seed, dtype=torch.float64) for seed in range(150)]
        return float(torch.stack([(each.phi(x) @ each.psi(w).T - truth).square().mean() for each in estimates]).mean())

    independent = error(False)
    assert error(True) < 0.8 * independent
    assert error("hadamard") < 0.8 * independent


def test_the_number_of_features_for_a_wanted_error_reaches_it(rng):
    x, w = ball(20, 8, 0.8, rng), ball(20, 8, 0.8, rng)
    m = URF("sech", 8, 256, M="auto", seed=0, dtype=torch.float64).required_features(x, w, error=0.1)
    truth = torch.as_tensor(ACTIVATIONS["sech"]((x @ w.T).numpy()))
    features = [URF("sech", 8, m, M="auto", seed=seed, dtype=torch.float64) for seed in range(5)]
    errors = [float((each.phi(x) @ each.psi(w).T - truth).norm() / truth.norm()) for each in features]
    assert 0.03 < np.mean(errors) < 0.12


# --- arc-cosine features ---


@pytest.mark.parametrize("order", [0, 1, 2])
def test_arc_cosine_kernels_by_monte_carlo(order, rng):
    x, w = ball(3, 3, 1.3, rng), ball(2, 3, 0.6, rng)
    g = np.random.default_rng(1).standard_normal((1_000_000, 3))
    power = (lambda z: (z > 0).astype(float)) if order == 0 else (lambda z: np.maximum(z, 0) ** order)
    expected = power(g @ x.numpy().T).T @ power(g @ w.numpy().T) / len(g)
    np.testing.assert_allclose(arccos_kernel(x, w, order), expected, rtol=0.01, atol=0.002)
    features = ArcCosFeatures(3, 200_000, order=order, seed=0, dtype=torch.float64)
    np.testing.assert_allclose(features.phi(x) @ features.psi(w).T, expected, rtol=0.05, atol=0.003)
    assert float(features.phi(x).square().sum(1).mean()) == pytest.approx(features.mean_squared_norm(1.3**2), rel=0.03)


def test_arc_cosine_features_with_a_bias_are_those_of_one_more_coordinate(rng):
    features = ArcCosFeatures(3, 50, bias=True, input_scale=0.5, seed=0, dtype=torch.float64)
    G = features.projection.weight / 0.5
    x, w, b = ball(4, 3, 1.0, rng), ball(2, 3, 1.0, rng), torch.tensor([0.3, -1.0], dtype=torch.float64)
    u = torch.cat([0.5 * x, torch.ones(4, 1, dtype=torch.float64)], 1)
    v = torch.cat([w / 0.5, b[:, None]], 1)
    torch.testing.assert_close(features.phi(x), functional.relu(u @ G.T))
    torch.testing.assert_close(features.psi(w, b), functional.relu(v @ G.T))


def test_a_floor_makes_leaky_features():
    features = ArcCosFeatures(2, 4, floor=-0.5, dtype=torch.float64)
    x = torch.randn(30, 2, dtype=torch.float64)
    expected = torch.clamp(2 * x @ features.projection.weight.T, min=-0.5) / 2
    torch.testing.assert_close(features.phi(x), expected)


def test_feature_maps_refuse_what_cannot_be(unchecked):
    with pytest.raises(ValueError, match="num_features must be at least 1, got 0"):
        URF("cos", 4, 0)
    with pytest.raises(ValueError, match=r"M must be finite and at least 0, got -0.1"):
        URF("cos", 4, 4, M=-0.1)
    with pytest.raises(ValueError, match="M must be a number or 'auto', got 'best'"):
        URF("cos", 4, 4, M="best")
    with pytest.raises(ValueError, match="input_scale must be positive"):
        URF("cos", 4, 4, input_scale=0.0)
    with pytest.raises(ValueError, match=r"x must have 4 features in its last dimension, got \(2, 3\)"):
        URF("cos", 4, 4).phi(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"weight must have 4 features.*\(2, 3\)"):
        URF("cos", 4, 4).psi(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"bias must be \(2,\).*got \(3,\)"):
        ArcCosFeatures(4, 4, bias=True).psi(torch.zeros(2, 4), torch.zeros(3))
    with pytest.raises(ValueError, match="bias must be None"):
        ArcCosFeatures(4, 4).psi(torch.zeros(2, 4), torch.zeros(2))
    with pytest.raises(ValueError, match="order must be 0, 1 or 2, got 3"):
        ArcCosFeatures(4, 4, order=3)
    with pytest.raises(ValueError, match="order must be 0, 1 or 2, got -1"):
        arccos_kernel(torch.zeros(2, 4), torch.zeros(2, 4), -1)


# --- readouts in closed form ---


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 30),
    m=st.integers(1, 8),
    outputs=st.integers(1, 3),
    ridge=st.floats(1e-3, 10),
    intercept=st.booleans(),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_ridge_readouts_are_scikit_learns_and_a_stationary_point(n, m, outputs, ridge, intercept, weighted, seed):
    from sklearn.linear_model import Ridge

    rng = torch.Generator().manual_seed(seed)
    P, Y = (torch.randn(n, k, dtype=torch.float64, generator=rng) for k in (m, outputs))
    weights = torch.rand(n, dtype=torch.float64, generator=rng) + 0.1 if weighted else None
    A = fit_bundled(P, Y, ridge, intercept=intercept, sample_weight=weights)
    columns = torch.cat([P, torch.ones(n, 1, dtype=torch.float64)], 1) if intercept else P
    theirs = Ridge(alpha=ridge, fit_intercept=False).fit(columns.numpy(), Y.numpy(), sample_weight=weights)
    np.testing.assert_allclose(A, np.reshape(theirs.coef_, A.shape), rtol=1e-7, atol=1e-9)
    A.requires_grad_()
    errors = (columns @ A.T - Y).square().sum(1)
    loss = ((errors if weights is None else weights * errors).sum() + ridge * A.square().sum()) / n
    assert float(torch.autograd.grad(loss, A)[0].abs().max()) < 1e-8


def test_fishers_discriminant_is_scikit_learns():
    from sklearn.datasets import load_iris
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    X, y = load_iris(return_X_y=True)
    A = fit_bundled(torch.as_tensor(X), torch.as_tensor(y), 0.0, loss="fisher", intercept=True).numpy()
    scores = X @ A[:, :-1].T + A[:, -1]
    # scikit-learn divides the scatter by n, we without bias by n - classes: its odds are ours up to that factor.
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(X, y)
    ours = scores - scores[:, :1]
    expected = theirs.decision_function(X)
    expected = (expected - expected[:, :1]) * (len(X) - 3) / len(X)
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-8)
    assert (scores.argmax(1) == theirs.predict(X)).all()


def test_integer_targets_are_classes_and_features_of_half_precision_are_summed_in_float64():
    P, y = torch.randn(50, 4), torch.arange(50) % 3
    A = fit_bundled(P, y, 0.1)
    torch.testing.assert_close(A, fit_bundled(P, functional.one_hot(y).float(), 0.1))
    assert fit_bundled(P.bfloat16(), y, 0.1).dtype == torch.bfloat16
    assert fit_bundled(P, P[:, 0], 1e-9).shape == (1, 4)


def test_readouts_refuse_what_cannot_be_fitted(unchecked):
    P, y = torch.randn(9, 4), torch.arange(9) % 3
    with pytest.raises(ValueError, match="loss must be 'mse' or 'fisher'"):
        fit_bundled(P, y, loss="hinge")
    with pytest.raises(ValueError, match="needs integer classes"):
        fit_bundled(P, P, loss="fisher", intercept=True)
    with pytest.raises(ValueError, match="needs integer classes"):
        fit_bundled(P, y, loss="fisher")
    with pytest.raises(ValueError, match=r"must pair up, got \(9, 4\) and \(5, 3\)"):
        fit_bundled(P, y[:5])
    with pytest.raises(ValueError, match="ridge must be finite and at least 0, got -1"):
        fit_bundled(P, y, -1.0)
    with pytest.raises(ValueError, match="linearly dependent"):
        fit_bundled(torch.zeros(9, 4), y, 0.0)
    with pytest.raises(ValueError, match="at least one sample"):
        fit_bundled(P[:0], P[:0])
    with pytest.raises(ValueError, match="sample_weight must be at least 0"):
        fit_bundled(P, y, sample_weight=-torch.ones(9))

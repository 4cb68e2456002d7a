"""Linear theory, deep modes: against integrals, closed forms, the Stieltjes transform, ODE solvers and drawn nets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad, solve_ivp

from lathe.theory.generalization_dynamics import LinearTheory, deep_linear_modes, gradient_flow


def by_scipy(alpha, f):
    """`int rho f` by adaptive quadrature in lambda, Marchenko-Pastur written out."""
    low, half = (math.sqrt(alpha) - 1) ** 2, 2 * math.sqrt(alpha)

    def in_angle(theta):
        # (high - lam) (lam - low) = (half sin)^2, without the differences that round.
        lam = low + 2 * half * math.sin(theta / 2) ** 2
        return (half * math.sin(theta)) ** 2 / (2 * math.pi * lam) * f(lam) if lam else 0.0

    # Near alpha = 1 the density turns within the root of the spectral gap, which adaptive quadrature has to be told.
    near = [angle for angle in math.sqrt(low) * np.logspace(-1, 3, 5) if 0 < angle < 3]
    return quad(in_angle, 0, math.pi, epsabs=1e-11, epsrel=1e-10, limit=500, points=near)[0]


def one(value):
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("alpha", [0.05, 0.5, 0.97, 1.05, 2.0, 40.0])
def test_integrals_of_the_spectrum_are_the_known_moments(alpha):
    # |w|^2/N at infinity is the mass, E_t(0) the mean, E_g(inf) the inverse mean of the spectrum.
    assert LinearTheory(alpha, sigma_eps=0.0).weight_norm(1e15).item() == pytest.approx(min(1, alpha), abs=1e-8)
    assert LinearTheory(alpha, sigma_eps=0.0).train_error(0.0).item() == pytest.approx(1.0, abs=1e-8)
    inverse = LinearTheory(alpha, sigma_w=0.0, sigma_eps=1.0).test_error(1e15).item() - 1
    assert inverse == pytest.approx(min(1, alpha) / abs(alpha - 1), rel=1e-8)
    density = LinearTheory(alpha, snr=1.0).spectrum
    total, _ = quad(
        lambda x: density(one(x)).item(), *(edge.item() for edge in LinearTheory(alpha, snr=1.0).edges), limit=200
    )
    assert total == pytest.approx(min(1, alpha), abs=1e-5)


@given(
    alpha=st.floats(0.02, 50.0),
    start=st.floats(0, 2.0),
    noise=st.floats(0, 2.0),
    t=st.floats(1e-4, 1e4),
)
@settings(max_examples=40, deadline=None)
def test_errors_are_the_integrals_of_the_paper(alpha, start, noise, t):
    theory = LinearTheory(alpha, sigma_w=1.3, sigma_0=start, sigma_eps=noise)
    S0, e2 = 1.3**2 + start**2, noise**2
    frozen = max(0.0, 1 - alpha)
    test = by_scipy(
        alpha, lambda lam: S0 * math.exp(-2 * lam * t) + (e2 * math.expm1(-lam * t) ** 2 / lam if lam > 0 else 0)
    )
    assert theory.test_error(t).item() == pytest.approx(test + frozen * S0 + e2, rel=1e-7, abs=1e-9)
    train = by_scipy(alpha, lambda lam: (lam * S0 + e2) * math.exp(-2 * lam * t)) / alpha
    assert theory.train_error(t).item() == pytest.approx(train + max(0, 1 - 1 / alpha) * e2, rel=1e-7, abs=1e-9)


def test_errors_start_and_end_in_closed_form():
    alpha = torch.tensor([0.3, 0.5, 2.0, 7.0], dtype=torch.float64)
    theory = LinearTheory(alpha, sigma_w=1.2, sigma_0=0.7, sigma_eps=0.6)
    S0, noise = 1.2**2 + 0.49, 0.36
    torch.testing.assert_close(theory.test_error(0.0), torch.full_like(alpha, S0 + noise), atol=1e-10, rtol=0)
    torch.testing.assert_close(theory.train_error(0.0), torch.full_like(alpha, S0 + noise), atol=1e-10, rtol=0)
    few = noise + (1 - alpha) * S0 + noise * alpha / (1 - alpha)
    end = torch.where(alpha < 1, few, noise * alpha / (alpha - 1))
    for t in (1e6, math.inf):
        torch.testing.assert_close(theory.test_error(t), end, atol=1e-9, rtol=0)
        torch.testing.assert_close(theory.train_error(t), noise * (1 - 1 / alpha).clamp_min(0), atol=1e-9, rtol=0)
    torch.testing.assert_close(theory.final_error(), end)
    assert LinearTheory(1.0, snr=2.0).final_error() == math.inf
    assert LinearTheory(1.0, snr=math.inf).final_error() == 0


def test_the_worst_case_overtrains_as_the_root_of_time():
    t = torch.logspace(6, 10, 5, dtype=torch.float64)
    grown = LinearTheory(1.0, sigma_eps=0.7).test_error(t) / 0.49 - 1
    torch.testing.assert_close(
        grown / t.sqrt(), torch.full_like(t, 2 * (2 - math.sqrt(2)) / math.sqrt(math.pi)), rtol=2e-3, atol=0
    )
    early = LinearTheory(1.0, sigma_eps=1.0).test_error(torch.tensor([1e2, 1e3, 1e4]).double()) - 1
    np.testing.assert_allclose(early / np.sqrt([1e2, 1e3, 1e4]), [0.6156, 0.6457, 0.6560], atol=3e-4)


@pytest.mark.parametrize(
    ("alpha", "start", "noise", "time", "stopped", "ridge"),
    [
        (0.5, 0.0, 0.1, 4.787045, 0.6770357, 0.6741657),
        (0.5, 0.0, 1.0, 0.6965095, 1.7835896, 1.7807764),
        (2.0, 0.0, 0.1, 4.000185, 0.1873697, 0.1844289),
        (2.0, 0.0, 1.0, 0.6185241, 1.4232315, 1.4142136),
        (0.5, 0.5, 0.5, 1.747178, 1.5072698, 1.2071068),
    ],
)
def test_stopping_has_the_derived_numbers(alpha, start, noise, time, stopped, ridge):
    theory = LinearTheory(alpha, sigma_0=start**0.5, sigma_eps=noise**0.5)
    t, error = theory.optimal_stopping()
    assert t.item() == pytest.approx(time, abs=2e-6) and error.item() == pytest.approx(stopped, abs=1e-7)
    assert theory.ridge().item() == pytest.approx(ridge, abs=1e-7)


@given(alpha=st.floats(0.01, 100.0), snr=st.floats(1e-2, 1e4), start=st.floats(0, 3.0))
@settings(max_examples=30, deadline=None)
def test_stopping_is_the_minimum_of_the_curve(alpha, snr, start):
    theory = LinearTheory(alpha, snr=snr, sigma_0=start)
    t, error = theory.optimal_stopping()
    around = theory.test_error(t * torch.logspace(-3, 3, 301, dtype=torch.float64))
    assert around.min() >= error - 1e-12
    moment = t.clone().requires_grad_()
    (slope,) = torch.autograd.grad(theory.test_error(moment), moment)
    assert abs(slope * t) < 1e-8 * (1 + error)
    # The best single modes bracket it.
    first, last = theory.mode_stopping(torch.stack(theory.edges[::-1]))
    assert first <= t * (1 + 1e-9) and t <= last * (1 + 1e-9)


def test_a_mode_stops_where_its_own_error_is_least():
    lam, S0, noise = 1.7, 1.25, 0.3
    t = LinearTheory(1.0, sigma_0=0.5, sigma_eps=noise**0.5).mode_stopping(one(lam)).item()
    times = np.linspace(0.9 * t, 1.1 * t, 2001)
    errors = S0 * np.exp(-2 * lam * times) + noise / lam * (1 - np.exp(-lam * times)) ** 2
    assert times[errors.argmin()] == pytest.approx(t, rel=2e-4)
    # The filter that it leaves is that of the best ridge penalty.
    assert 1 - math.exp(-lam * t) == pytest.approx(lam / (lam + noise / S0))


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 2.0, 30.0])
@pytest.mark.parametrize("gamma", [1e-3, 0.4, 50.0])
def test_ridge_is_its_integral(alpha, gamma):
    theory = LinearTheory(alpha, sigma_w=1.3, sigma_0=4.0, sigma_eps=0.8)
    integral = by_scipy(alpha, lambda lam: (gamma**2 * 1.69 + 0.64 * lam) / (lam + gamma) ** 2)
    assert theory.ridge(gamma).item() == pytest.approx(integral + max(0, 1 - alpha) * 1.69 + 0.64, rel=1e-8)


def test_the_best_ridge_is_the_stieltjes_transform():
    alpha = torch.logspace(-2, 2, 21, dtype=torch.float64)
    gamma = 0.3
    G = (-(gamma + alpha - 1) + ((gamma + alpha - 1) ** 2 + 4 * gamma).sqrt()) / (2 * gamma)
    torch.testing.assert_close(LinearTheory(alpha, snr=1 / gamma).ridge(), gamma * (1 + G), rtol=1e-10, atol=0)
    assert LinearTheory(2.0, snr=1.0).ridge().item() == pytest.approx(math.sqrt(2), abs=1e-12)
    theory = LinearTheory(alpha, snr=1 / gamma)
    for other in (0.1, 0.29, 0.31, 2.0):
        assert (theory.ridge(other) > theory.ridge()).all()


def test_ridge_without_a_penalty_is_training_for_ever():
    theory = LinearTheory(torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64), snr=4.0)
    torch.testing.assert_close(theory.ridge(0.0), theory.final_error())
    torch.testing.assert_close(theory.ridge(1e-14)[::2], theory.final_error()[::2], rtol=1e-9, atol=0)
    torch.testing.assert_close(theory.ridge(math.inf), torch.full((3,), 1.25, dtype=torch.float64))


def test_no_noise_never_stops_and_no_signal_never_starts():
    t, error = LinearTheory(torch.tensor([0.5, 2.0]), sigma_eps=0.0).optimal_stopping()
    assert torch.isinf(t).all() and error.tolist() == [0.5, 0.0]
    t, error = LinearTheory(0.5, sigma_w=0.0, sigma_eps=2.0).optimal_stopping()
    assert (t.item(), error.item()) == (0.0, 4.0)


def test_parameters_and_times_broadcast_curve_by_curve():
    alpha, snr = torch.tensor([0.5, 1.0, 3.0])[:, None], torch.tensor([0.5, 2.0])
    times = torch.tensor([[0.0, 0.3], [2.0, math.inf]])
    whole = LinearTheory(alpha, snr=snr, sigma_0=0.4)
    for kind in ("test_error", "train_error", "weight_norm"):
        found = getattr(whole, kind)(times)
        assert found.shape == (3, 2, 2, 2)
        for i, j in ((0, 1), (1, 0), (2, 1)):
            alone = getattr(LinearTheory(alpha[i, 0].item(), snr=snr[j].item(), sigma_0=0.4), kind)
            for m, n in ((0, 1), (1, 0), (1, 1)):
                torch.testing.assert_close(found[i, j, m, n], alone(times[m, n].item()))
    assert whole.ridge().shape == whole.final_error().shape == whole.optimal_stopping()[0].shape == (3, 2)
    assert whole.spectrum(torch.ones(4)).shape == (3, 2, 4) and whole.frozen[0].tolist() == [0.5, 0.5]
    many = LinearTheory(torch.linspace(0.1, 3, 700), snr=1.0).test_error(torch.linspace(0, 3, 20))
    torch.testing.assert_close(many[699], LinearTheory(3.0, snr=1.0).test_error(torch.linspace(0, 3, 20)))


def test_curves_can_be_differentiated():
    alpha = torch.tensor([0.5, 1.3], dtype=torch.float64, requires_grad=True)
    noise = one(0.7).requires_grad_()
    t = torch.tensor([0.1, 2.0], dtype=torch.float64, requires_grad=True)
    theory = lambda a, e: LinearTheory(a, sigma_0=0.3, sigma_eps=e)  # noqa: E731
    assert torch.autograd.gradcheck(lambda a, e, t: theory(a, e).test_error(t), (alpha, noise, t))
    assert torch.autograd.gradcheck(lambda a, e, t: theory(a, e).train_error(t), (alpha, noise, t))
    assert torch.autograd.gradcheck(lambda a, e: theory(a, e).optimal_stopping(), (alpha, noise))
    assert torch.autograd.gradcheck(lambda a, e: theory(a, e).ridge(0.3), (alpha, noise))


def test_drawn_students_follow_the_theory(rng):
    # A closed form knows nothing of drawing: 40 students of 120 inputs, at finite-size accuracy.
    N, draws = 120, 40
    for P in (60, 240):
        x = torch.randn(draws, P, N, dtype=torch.float64, generator=rng) / math.sqrt(N)
        teacher, start = (torch.randn(draws, N, dtype=torch.float64, generator=rng) for _ in range(2))
        y = (x @ teacher.unsqueeze(-1)).squeeze(-1) + 0.5 * torch.randn(draws, P, dtype=torch.float64, generator=rng)
        times = torch.tensor([0.3, 3.0, 30.0], dtype=torch.float64)
        run = gradient_flow(x, y, 0.6 * start, times=times)
        theory = LinearTheory(P / N, sigma_0=0.6, sigma_eps=0.5)
        test = (run.weights - teacher).square().mean(-1) + 0.25
        for drawn, expected in (
            (test, theory.test_error(times)),
            (run.train, theory.train_error(times)),
            (run.weights.square().mean(-1), theory.weight_norm(times)),
        ):
            error = drawn.std(1) / math.sqrt(draws)
            assert ((drawn.mean(1) - expected).abs() < 4 * error + 0.02 * expected).all()


def test_time_becomes_steps_at_every_convention():
    theory = LinearTheory(2.0, snr=1.0)
    assert theory.steps(3.0, 0.1).item() == pytest.approx(30)
    assert theory.steps(3.0, 0.1, loss="mean", samples=200).item() == pytest.approx(6000)
    assert theory.steps(3.0, 0.1, loss="mse", samples=200).item() == pytest.approx(3000)
    # Inputs of unit variance: N = 100 times as fast.
    assert theory.steps(3.0, 0.1, loss="mean", samples=200, input_variance=1.0).item() == pytest.approx(60)
    bound = 2 / (1 + math.sqrt(2)) ** 2
    with pytest.raises(ValueError, match=f"lr must be below {bound:.6g}"):
        theory.steps(3.0, 0.4)


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
@pytest.mark.parametrize("u0", [0.01, 1.75, 4.0])
def test_deep_modes_are_the_flow_of_their_weights(depth, u0):
    lam, s = 0.4, 0.7
    times = torch.tensor([0.0, 0.5, 3.0, 20.0], dtype=torch.float64)
    found = deep_linear_modes(lam, s, u0, depth, times)
    for t, value in zip(times.tolist()[1:], found.tolist()[1:]):
        flow = solve_ivp(
            lambda _, v: v ** (depth - 1) * (s - lam * v**depth), (0, t), [u0 ** (1 / depth)], rtol=1e-10, atol=1e-12
        )
        assert value == pytest.approx(flow.y[0, -1] ** depth, abs=1e-6)
    torch.testing.assert_close(deep_linear_modes(-1 * -lam, -s, -u0, depth, times), -found)
    assert found[0].item() == pytest.approx(u0)


def test_two_layers_are_logistic_and_all_depths_end_alike():
    lam, s, times = torch.tensor([0.5, 2.0]), torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.2, 1.0, 500.0])
    end, u0 = s.double() / lam.double(), 0.01
    logistic = end / (1 + (end / u0 - 1) * torch.exp(-2 * s.double() * times.double()[:, None]))
    torch.testing.assert_close(deep_linear_modes(lam, s, u0, 2, times), logistic)
    for depth in (1, 2, 3, 4):
        torch.testing.assert_close(deep_linear_modes(lam, s, u0, depth, times)[-1], end, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0, "snr": 1.0}, "alpha must be positive, got 0.0"),
        ({"alpha": math.inf, "snr": 1.0}, "alpha must be positive"),
        ({"alpha": 1.0}, "one of snr and sigma_eps, got neither"),
        ({"alpha": 1.0, "snr": 1.0, "sigma_eps": 1.0}, "not both"),
        ({"alpha": 1.0, "snr": 0.0}, "snr must be positive"),
        ({"alpha": 1.0, "snr": 1.0, "sigma_0": -0.1}, "sigma_0 must be at least 0, got -0.1"),
        ({"alpha": 1.0, "sigma_eps": math.nan}, "sigma_eps must be at least 0"),
    ],
)
def test_parameters_out_of_the_domain_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LinearTheory(**options)


def test_bad_times_and_strengths_are_refused():
    theory = LinearTheory(1.0, snr=1.0)
    for call in (theory.test_error, theory.train_error, theory.weight_norm):
        with pytest.raises(ValueError, match="t must be at least 0, got -1"):
            call(torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match="gamma must be at least 0"):
        theory.ridge(-0.1)
    with pytest.raises(ValueError, match="needs the number of samples"):
        theory.steps(1.0, 0.1, loss="mean")
    with pytest.raises(ValueError, match="depth must be at least 1"):
        deep_linear_modes(1.0, 1.0, 1.0, 0, torch.ones(1))
    with pytest.raises(ValueError, match="one sign"):
        deep_linear_modes(1.0, -1.0, 1.0, 2, torch.ones(1))
    with pytest.raises(ValueError, match="lam must be positive"):
        deep_linear_modes(0.0, 1.0, 1.0, 1, torch.ones(1))

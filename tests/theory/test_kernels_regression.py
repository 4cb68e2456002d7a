"""Predictions: against scikit-learn, an ODE solver, the exponential of a matrix, descent itself, and limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from scipy.linalg import expm
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF
from torch import nn

from lathe.core.gaussian import sinusoid
from lathe.theory.kernels import (
    Activation,
    Dense,
    GradientFlow,
    KernelRegression,
    Sequential,
    empirical_ntk,
    posterior,
)

NET = Sequential(Dense(1.5, 0.1), Activation("erf"), Dense(1.3, 0.2))


def double(*shape: int, rng: torch.Generator) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=rng)


@pytest.fixture
def data(rng):
    """Kernels of 6 training and 4 test inputs, and two targets."""
    x = double(10, 3, rng=rng)
    nngp, ntk = NET(x)
    return x, double(6, 2, rng=rng), nngp, ntk


def test_posteriors_are_those_of_scikit_learn(rng):
    x, t, y = double(12, 3, rng=rng), double(5, 3, rng=rng), double(12, rng=rng)
    radial = Sequential(Dense(3.0), Activation(sinusoid(2**0.5, 2**-0.5, math.pi / 4)))  # length scale sqrt(2)
    peer = GaussianProcessRegressor(RBF(2**0.5), alpha=0.3, optimizer=None).fit(x, y)
    mean, covariance = peer.predict(t, return_cov=True)
    ours = KernelRegression(radial, x, y, noise=0.3)
    found = ours.posterior(t)
    np.testing.assert_allclose(found.mean, mean, atol=1e-9)
    np.testing.assert_allclose(found.variance, covariance.diagonal(), atol=1e-9)
    assert ours.log_likelihood().item() == pytest.approx(peer.log_marginal_likelihood_value_, abs=1e-9)
    both = posterior(radial(x).nngp, y, radial(t, x).nngp, radial(t).nngp, noise=0.3)
    np.testing.assert_allclose(both.variance, covariance, atol=1e-9)
    two = KernelRegression(radial, x, torch.stack([y, 2 * y], 1), noise=0.3)
    np.testing.assert_allclose(two.posterior(t).mean, np.stack([mean, 2 * mean], 1), atol=1e-9)
    single = GaussianProcessRegressor(RBF(2**0.5), alpha=0.3, optimizer=None).fit(x, 2 * y)
    total = peer.log_marginal_likelihood_value_ + single.log_marginal_likelihood_value_
    assert two.log_likelihood().item() == pytest.approx(total, abs=1e-8)


@pytest.mark.parametrize(("loss", "scale"), [("sum", 1.0), ("mean", 1 / 6), ("mse", 2 / 12)])
def test_gradient_flow_solves_its_differential_equation(data, loss, scale):
    _, y, _, ntk = data
    theta, across = ntk[:6, :6].numpy(), ntk[6:, :6].numpy()
    flow = GradientFlow(ntk[:6, :6], y, loss=loss, rate=0.7)
    times = torch.tensor([0.0, 0.5, 4.0, 30.0], dtype=torch.float64)

    def slope(_, f: np.ndarray) -> np.ndarray:
        error = f.reshape(10, 2)[:6] - y.numpy()
        return -0.7 * scale * np.concatenate([theta @ error, across @ error]).ravel()

    solved = solve_ivp(slope, (0, 30), np.zeros(20), t_eval=times.tolist(), rtol=1e-10, atol=1e-11)
    expected = solved.y.T.reshape(4, 10, 2)
    np.testing.assert_allclose(
        flow.at(times, ntk[:, :6]).mean, np.concatenate([expected[:, :6], expected[:, 6:]], 1), atol=1e-7
    )
    one = flow.at(4.0, ntk[6:, :6])
    np.testing.assert_allclose(one.mean, expected[2, 6:], atol=1e-7)
    assert one.variance is None


def test_the_variance_is_that_of_a_random_start_carried_along(data):
    _, y, nngp, ntk = data
    flow = GradientFlow(ntk[:6, :6], y, nngp=nngp[:6, :6], loss="sum")
    generator = np.zeros((10, 10))
    generator[:, :6] = -ntk[:, :6].numpy()
    for t in (0.0, 0.3, 5.0):
        carried = expm(generator * t)  # what the flow makes of the outputs at the start
        expected = carried @ nngp.numpy() @ carried.T
        whole = flow.at(t, ntk[:, :6], nngp[:, :6], nngp)
        np.testing.assert_allclose(whole.variance, expected, atol=1e-9)
        alone = flow.at(torch.tensor([t]).double(), ntk[:, :6], nngp[:, :6], nngp.diagonal())
        np.testing.assert_allclose(alone.variance[0], expected.diagonal(), atol=1e-9)


def test_finite_steps_are_those_of_descent_on_the_linearised_network(rng):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x, y = double(8, 3, rng=rng), double(5, 2, rng=rng)
    parameters = dict(model.named_parameters())
    start = {name: value.detach().clone() for name, value in parameters.items()}
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(start)
    moved = {name: torch.zeros_like(value, requires_grad=True) for name, value in start.items()}
    first = model(x).detach()

    def outputs() -> torch.Tensor:
        return first + sum((jacobian[name] * moved[name]).flatten(2).sum(-1) for name in moved)

    optimizer = torch.optim.SGD(moved.values(), lr=0.2)
    for _ in range(25):
        optimizer.zero_grad()
        nn.functional.mse_loss(outputs()[:5], y).backward()
        optimizer.step()
    # One output a row: the flow of several outputs that share weights.
    full = empirical_ntk(model, x, outputs="full").transpose(1, 2).reshape(16, 16)
    flow = GradientFlow(full[:10, :10], y.reshape(-1), loss="mse")
    initial = first.reshape(-1)[:10], first.reshape(-1)
    found = flow.after(25, 0.2, full[:, :10], initial=initial)
    torch.testing.assert_close(found.mean.reshape(8, 2), outputs().detach())
    several = flow.after(torch.tensor([24.0, 25.0]), 0.2, full[:, :10], initial=initial)
    torch.testing.assert_close(several.mean[1], found.mean)
    assert not torch.allclose(several.mean[0], found.mean)


def test_small_steps_become_the_flow_and_infinite_time_the_regression(data):
    x, y, nngp, ntk = data
    flow = GradientFlow(ntk[:6, :6], y, nngp=nngp[:6, :6], loss="sum")
    rate = 1e-6
    steps = flow.after(int(2.0 / rate), rate, ntk[6:, :6], nngp[6:, :6], nngp[6:, 6:])
    smooth = flow.at(2.0, ntk[6:, :6], nngp[6:, :6], nngp[6:, 6:])
    torch.testing.assert_close(steps.mean, smooth.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(steps.variance, smooth.variance, atol=1e-5, rtol=0)
    regression = KernelRegression(NET, x[:6], y)
    torch.testing.assert_close(regression.trained(x[6:]).mean, regression.ridge(x[6:]).mean)
    end = regression.trained(x[:6], torch.tensor([0.0, math.inf]))
    torch.testing.assert_close(end.mean[1], y)
    torch.testing.assert_close(end.variance[0], nngp.diagonal()[:6])
    assert end.variance[1].abs().max() < 1e-8
    noisy = KernelRegression(NET, x[:6], y, noise=0.2)
    torch.testing.assert_close(noisy.trained(x[6:]).mean, noisy.ridge(x[6:]).mean)
    torch.testing.assert_close(noisy.flow.at(math.inf, ntk[6:, :6]).mean, noisy.trained(x[6:]).mean)


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 8), seed=st.integers(0, 99), noise=st.floats(1e-4, 2.0))
def test_data_never_make_a_posterior_less_certain(n, seed, noise):
    rng = torch.Generator().manual_seed(seed)
    x, t, y = double(n, 2, rng=rng), double(3, 2, rng=rng), double(n, rng=rng)
    found = KernelRegression(NET, x, y, noise=noise).posterior(t)
    prior = NET.diagonal(t).nngp
    assert (found.variance <= prior + 1e-12).all() and (found.variance > -1e-9).all()


def test_kernels_that_are_not_definite_are_refused(data):
    x, y, _, ntk = data
    double_input = torch.cat([x[:5], x[:1]])
    with pytest.raises(ValueError, match=r"least eigenvalue is -?\d.*add noise \(a jitter\) of at least"):
        posterior(ntk[:6, :6] - 2 * torch.eye(6), y, ntk[6:, :6])
    repeated = KernelRegression(NET, double_input, y)
    assert torch.isfinite(repeated.trained(x[6:], 3.0).mean).all()  # finite times need no inverse
    with pytest.raises(ValueError, match=r"ntk must be positive definite.*remove repeated inputs.*finite times"):
        repeated.trained(x[6:])
    assert torch.isfinite(KernelRegression(NET, double_input, y, noise=1e-6).posterior(x[6:]).mean).all()
    with pytest.raises(ValueError, match="ntk must be positive definite, but its least eigenvalue is -1"):
        GradientFlow(-torch.eye(3), y[:3])


def test_bad_arguments_are_refused(data):
    x, y, nngp, ntk = data
    flow = GradientFlow(ntk[:6, :6], y)
    assert flow.largest_rate == pytest.approx(12 / 2 * 2 / torch.linalg.eigvalsh(ntk[:6, :6])[-1].item())
    cases = [
        (lambda: GradientFlow(ntk[:6, :6], y, loss="l1"), "loss must be 'sum', 'mean' or 'mse', got 'l1'"),
        (lambda: GradientFlow(ntk[:6, :6], y, rate=0.0), "rate must be positive, got 0"),
        (lambda: GradientFlow(ntk[:6, :6] * math.nan, y), "ntk must be a finite square matrix"),
        (lambda: flow.at(-1.0, ntk[6:, :6]), "times must not be negative"),
        (lambda: flow.at(1.0, ntk[6:, :6], nngp[6:, :6], nngp[6:, 6:]), "the variance needs nngp"),
        (lambda: flow.after(3, 100.0, ntk[6:, :6]), "where descent diverges, got 100"),
        (lambda: KernelRegression(NET, x, y), "y must have a row for each of the 10 inputs, got 6"),
        (lambda: KernelRegression(NET, x[:6], y, noise=-1.0), "noise must not be negative, got -1"),
        (lambda: posterior(ntk[:6, :6], y, ntk[6:, :6], noise=-1.0), "noise must not be negative, got -1"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()

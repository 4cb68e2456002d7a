"""Kernel spaces and ensembles: against scikit-learn, closed forms, draws, finite differences, networks one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import special, stats
from sklearn.datasets import load_digits
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF
from torch import nn
from torch.nn import functional as F

from lathe.theory.inductive_bias import (
    KernelHypotheses,
    kernel_hypotheses,
    kernel_inductive_bias,
    ncx2_log_cdf,
    network_inductive_bias,
    relative_bias,
    required_bias_curve,
    train_networks,
)
from lathe.theory.inductive_bias import kernel_space as module
from lathe.theory.kernels import Activation, Dense, Sequential


@pytest.fixture(scope="module")
def digits():
    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.data))[:200]
    x, y = torch.from_numpy(bunch.data[order] / 16), torch.from_numpy(bunch.target[order])
    return x[:150], y[:150], x[150:], y[150:]


@pytest.fixture
def small():
    generator = torch.Generator().manual_seed(2)
    x, t = (torch.randn(n, 3, dtype=torch.float64, generator=generator) for n in (12, 8))
    return x, torch.stack([x.sum(1), x[:, 0] ** 2], 1), t, torch.stack([t.sum(1), t[:, 0] ** 2], 1)


def test_hypotheses_are_the_posterior_of_scikit_learn(digits):
    x, y, t, _ = digits
    found = kernel_hypotheses(*digits, lengthscale=2.0, jitter=1e-6)
    one_hot = np.eye(10)[y]
    peer = GaussianProcessRegressor(RBF(2.0), optimizer=None, alpha=1e-6).fit(x.numpy(), one_hot)
    mean, cov = peer.predict(t.numpy(), return_cov=True)
    np.testing.assert_allclose(found.mean, mean, atol=1e-8)
    np.testing.assert_allclose(found.cov, cov[..., 0], atol=1e-8)
    assert found.residual == pytest.approx(np.abs(peer.predict(x.numpy()) - one_hot).max(), rel=1e-3)
    assert found.lengthscale == 2.0 and found.jitter == 1e-6 and found.train_size == 150


def test_the_exact_law_is_that_of_drawn_functions(digits):
    found = kernel_hypotheses(*digits, lengthscale=2.0)
    functions = found.sample_functions(2000, seed=3)
    losses = (functions - found.targets).square().mean((1, 2))
    drawn = found.sample(8000, seed=4)
    for sample in (losses, drawn):
        assert stats.kstest(sample.numpy(), lambda e: found.cdf(torch.from_numpy(e)).numpy()).pvalue > 1e-3
    kappa = found.cumulants(3)
    assert drawn.mean().item() == pytest.approx(kappa[0].item(), rel=3e-3)
    assert drawn.var().item() == pytest.approx(kappa[1].item(), rel=0.07)
    grid = torch.linspace(float(kappa[0] - 4 * kappa[1].sqrt()), float(kappa[0] + 4 * kappa[1].sqrt()), 400)
    area = torch.trapezoid(found.log_prob(grid.double()).exp(), grid.double())
    assert area.item() == pytest.approx(1, abs=1e-3)
    errors = (functions.argmax(2) != found.targets.argmax(1)).double().mean(1)
    again = found.sample_errors(2000, seed=3)
    torch.testing.assert_close(errors, again)


def test_one_point_and_one_output_have_a_closed_form(small):
    x, y, t, target = small
    found = kernel_hypotheses(x, y[:, 0], t[:1], target[:1, 0], lengthscale=1.0)
    mean, sd, q = found.mean.item(), found.cov.item() ** 0.5, math.sqrt(1e-4)
    gap = abs(mean - target[0, 0].item())
    exact = special.ndtr((q - gap) / sd) - special.ndtr(-(q + gap) / sd)
    for method, accuracy in (("exact", 1e-8), ("saddlepoint", 0.02)):
        value = kernel_inductive_bias(x, y[:, 0], t[:1], target[:1, 0], 1e-4, lengthscale=1.0, method=method).value
        assert value.item() == pytest.approx(-math.log(exact), rel=accuracy)


def test_short_lengthscales_leave_pure_chance(small):
    x, y, t, target = small
    eps = torch.tensor([0.01, 0.3, 1.0], dtype=torch.float64)
    found = kernel_inductive_bias(x, y, t, target, eps, lengthscale=1e-3, jitter=0.0)
    count = target.numel()
    torch.testing.assert_close(found.value, -ncx2_log_cdf(eps * count, float(count), target.square().sum()))


def test_bias_does_not_depend_on_the_unit_of_the_targets(digits):
    x, y, t, target = digits
    Y, wanted, a = F.one_hot(y).double(), F.one_hot(target).double(), 3.0

    def rbf(u, v):
        return torch.exp(-torch.cdist(u, v).square() / 8)

    plain = kernel_inductive_bias(x, Y, t, wanted, 0.03, kernel=rbf)
    scaled = kernel_inductive_bias(x, a * Y, t, a * wanted, a * a * 0.03, kernel=lambda u, v: a * a * rbf(u, v))
    assert scaled.value.item() == pytest.approx(plain.value.item(), rel=1e-9)
    by_name = kernel_inductive_bias(x, y, t, target, 0.03, lengthscale=2.0)
    assert by_name.value.item() == pytest.approx(plain.value.item(), rel=1e-6)
    sharper = kernel_inductive_bias(x, y, t, target, torch.tensor([0.01, 0.02, 0.05, 0.5]), lengthscale=2.0)
    assert (sharper.value.diff() < 0).all() and sharper.value[-1] < 1e-6
    assert sharper.law.log_cdf(0.02).isfinite() and sharper.plot().to_dict()["layer"]
    bits = kernel_inductive_bias(x, y, t, target, 0.03, lengthscale=2.0, base="bits")
    assert bits.value.item() == pytest.approx(by_name.value.item() / math.log(2))


def test_sampling_agrees_with_the_exact_law_where_it_can(digits):
    exact = kernel_inductive_bias(*digits, None, lengthscale=2.0, num_samples=2000)
    sampled = kernel_inductive_bias(*digits, None, lengthscale=2.0, num_samples=2000, method="sample")
    assert exact.eps == sampled.eps and exact.extrapolation == 0 and sampled.n == 2000
    assert abs(exact.value - sampled.value) < 4 * sampled.sd + 0.1 * exact.value
    errors = kernel_inductive_bias(*digits, 0.25, lengthscale=2.0, num_samples=2000, loss="0-1")
    share = (errors.source.sample_errors(10_000, seed=5) <= 0.25).double().mean()
    assert errors.value.item() == pytest.approx(-math.log(share), abs=0.6)


def test_more_data_leave_less_to_know(digits):
    x, y, t, target = digits
    curve = required_bias_curve(*digits, torch.tensor([0.02, 0.05]), sizes=(20, 75, 150), lengthscale=2.0)
    assert (curve.value.diff(dim=0) < 0).all()
    alone = kernel_inductive_bias(x[:75], y[:75], t, target, torch.tensor([0.02, 0.05]), lengthscale=2.0)
    torch.testing.assert_close(curve.value[1], alone.value, rtol=1e-9, atol=0)
    assert curve.plot().to_dict()["mark"]
    assert required_bias_curve(*digits, 0.02).sizes == (9, 18, 37, 75, 150)


@pytest.mark.parametrize("lengthscale", [2.0, 0.4])
def test_bias_can_be_differentiated_by_the_lengthscale(lengthscale, digits):
    # At 0.4 most eigenvalues of the covariance are one, where a derivative of eigh would be infinite.
    def bias(value):
        return kernel_inductive_bias(*digits, 0.05, lengthscale=value).value

    scale = torch.tensor(lengthscale, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(bias(scale), scale)
    step = 1e-4 * lengthscale
    difference = (bias(lengthscale + step) - bias(lengthscale - step)) / (2 * step)
    assert slope.item() == pytest.approx(difference.item(), rel=1e-5, abs=1e-8)


def test_noise_and_centring_are_what_they_say(digits):
    x, y, t, target = digits
    Y, wanted = F.one_hot(y).double(), F.one_hot(target).double()
    peer = GaussianProcessRegressor(RBF(2.0), optimizer=None, alpha=0.01 + 1e-6).fit(x.numpy(), Y.numpy())
    found = kernel_hypotheses(x, y, t, target, lengthscale=2.0, noise=0.1)
    np.testing.assert_allclose(found.mean, peer.predict(t.numpy()), atol=1e-8)
    centred = kernel_hypotheses(x, y, t, target, lengthscale=2.0, center=True)
    shifted = kernel_hypotheses(x, Y - Y.mean(0), t, wanted - Y.mean(0), lengthscale=2.0)
    torch.testing.assert_close(centred.shifts, shifted.shifts)
    laplace = kernel_hypotheses(x, y, t, target, kernel="laplace", lengthscale=2.0)
    by_hand = kernel_hypotheses(x, y, t, target, kernel=lambda u, v: torch.exp(-torch.cdist(u, v) / 2))
    torch.testing.assert_close(laplace.mean, by_hand.mean, atol=1e-6, rtol=0)


def test_infinitely_wide_networks_are_kernel_spaces(digits):
    x, y, t, target = digits
    net = Sequential(Dense(2.0), Activation("relu"), Dense(1.0))
    for space in ("nngp", "ntk"):
        named = kernel_hypotheses(x, y, t, target, kernel=net, space=space)
        by_hand = kernel_hypotheses(x, y, t, target, kernel=lambda u, v, space=space: getattr(net(u, v), space))
        torch.testing.assert_close(named.mean, by_hand.mean, atol=1e-7, rtol=0)
    # In a network of one layer gradient descent from a random start samples the posterior: both kernels are the same.
    linear = Sequential(Dense(1.0))
    one, other = (
        kernel_hypotheses(x[:20], y[:20], t, target, kernel=linear, space=space, jitter=1e-9)
        for space in ("nngp", "trained")
    )
    torch.testing.assert_close(one.mean, other.mean)
    torch.testing.assert_close(one.cov, other.cov, atol=1e-6, rtol=1e-5)


def test_trained_networks_spread_as_gradient_descent_from_random_starts(rng):
    x, t = (torch.randn(n, 4, dtype=torch.float64, generator=rng) for n in (6, 5))
    net = Sequential(Dense(2.0), Activation("relu"), Dense(1.0))
    found = kernel_hypotheses(x, x[:, 0], t, t[:, 0], kernel=net, space="trained", jitter=1e-10)
    # Functions at the start, then the linear dynamics of the NTK to the end.
    both = torch.cat([x, t])
    nngp, ntk = net(both)
    start = torch.linalg.cholesky(nngp + 1e-10 * torch.eye(11)) @ torch.randn(
        11, 100_000, dtype=torch.float64, generator=rng
    )
    end = start[6:] + ntk[6:, :6] @ torch.linalg.solve(ntk[:6, :6], x[:, :1] - start[:6])
    torch.testing.assert_close(found.mean[:, 0], end.mean(1), atol=0.03, rtol=0)
    torch.testing.assert_close(found.cov, torch.cov(end), atol=0.05, rtol=0)


def test_conjugate_gradients_have_the_same_fixed_point(digits, monkeypatch):
    direct = kernel_hypotheses(*digits, lengthscale=2.0)
    monkeypatch.setattr(module, "_LARGEST_CHOLESKY", 10)
    iterated = kernel_hypotheses(*digits, lengthscale=2.0)
    torch.testing.assert_close(iterated.mean, direct.mean, atol=1e-7, rtol=0)
    torch.testing.assert_close(iterated.cov, direct.cov, atol=1e-7, rtol=0)
    assert iterated.residual == pytest.approx(direct.residual, rel=1e-2)


def test_what_cannot_vary_is_a_floor():
    mean, cov = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    found = KernelHypotheses.of(mean, cov, torch.zeros(2, 1))
    assert found.min_loss == pytest.approx(0.5)
    assert found.log_cdf(0.5) == -math.inf
    assert found.cdf(1.5).item() == pytest.approx(stats.chi2.cdf(1.0, 1))
    assert found.log_prob(0.4) == -math.inf
    with pytest.raises(ValueError, match="single hypothesis"):
        KernelHypotheses.of(mean, torch.zeros(2, 2), torch.zeros(2, 1))


def mlp():
    return nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))


def cnn():
    layers = nn.Conv2d(1, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(36, 10)
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *layers)


@pytest.mark.parametrize("make_model", [mlp, cnn])
@pytest.mark.parametrize("batch_size", [None, 64])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_stack_trains_as_networks_one_by_one(make_model, batch_size, optimizer, digits):
    x, y, t, _ = digits
    x, y, t = x.float(), F.one_hot(y).float(), t.float()
    found = train_networks(
        make_model, (x, y), num_models=3, train_steps=7, lr=0.01, optimizer=optimizer, batch_size=batch_size, seed=5
    )
    for number in range(3):
        torch.manual_seed(5 * 1_000_003 + number)
        model = make_model()
        moved = torch.optim.Adam(model.parameters(), lr=0.01)
        if optimizer == "sgd":
            moved = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        order, generator = None, torch.Generator().manual_seed(5 * 1_000_003 + number + 1)
        for step in range(7):
            pick = torch.arange(150)
            if batch_size:
                order = torch.randperm(150, generator=generator) if step % 3 == 0 else order
                pick = order[torch.arange(64 * (step % 3), 64 * (step % 3 + 1)) % 150]
            moved.zero_grad()
            F.mse_loss(model(x[pick]), y[pick]).backward()
            moved.step()
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(found.predict(t)[number], model(t), atol=1e-5, rtol=1e-5)
            assert found.train_losses[number].item() == pytest.approx(F.mse_loss(model(x), y).item(), rel=1e-5)


def test_networks_do_not_depend_on_how_they_are_run(digits):
    x, y, t, _ = digits
    data, options = (x.float(), F.one_hot(y).float()), {"num_models": 5, "train_steps": 6, "lr": 0.01}
    torch.manual_seed(7)
    at_once = train_networks(mlp, data, **options)
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(7))
    for way in ({"chunk": 2}, {"vectorize": False}, {"optimizer": lambda p: torch.optim.Adam(p, lr=0.01)}):
        again = train_networks(mlp, data, **options, **way)
        torch.testing.assert_close(again.predict(t.float()), at_once.predict(t.float()))
    other = train_networks(mlp, data, **options, seed=1)
    assert not torch.allclose(other.predict(t.float()), at_once.predict(t.float()))


def test_networks_are_taken_when_they_fit_and_left_out_when_they_do_not(digits):
    x, y, t, target = (part.float() if part.is_floating_point() else part for part in digits)
    options = {"num_models": 25, "train_steps": 40, "lr": 0.02}
    told = []
    found = network_inductive_bias(
        mlp, (x, y), (t, target), 0.07, tolerance=0.075, progress=lambda *p: told.append(p), **options
    )
    ensemble = found.source
    assert 20 <= int(ensemble.fits.sum()) == found.n < 25 and told[-1][1] == 40
    fitted = ensemble.train_losses[ensemble.fits]
    assert (fitted <= 0.075).all() and (fitted > 0.05).all() and (ensemble.train_losses[~ensemble.fits] > 0.075).all()
    # Each was kept at its first step below: one step less, and it was above.
    number = int(ensemble.steps.argmin())
    options_before = {**options, "train_steps": int(ensemble.steps[number]) - 1}
    before = train_networks(mlp, (x, F.one_hot(y).float()), **options_before)
    assert before.train_losses[number] > 0.075
    losses = ensemble.losses(t, F.one_hot(target).float())
    by_hand = (ensemble.predict(t) - F.one_hot(target)).square().mean((1, 2)).double()
    torch.testing.assert_close(losses, by_hand[ensemble.fits], atol=1e-7, rtol=1e-6)
    with pytest.raises(ValueError, match="only 0 of 25 networks reached the tolerance 1e-09"):
        network_inductive_bias(mlp, (x, y), (t, target), 0.07, tolerance=1e-9, **options)


def test_a_network_and_a_kernel_space_can_be_compared(digits):
    x, y, t, target = digits
    broad = kernel_inductive_bias(x, y, t, target, 0.05, lengthscale=2.0)
    single = (x.float(), y), (t.float(), target)
    narrow = network_inductive_bias(mlp, *single, 0.05, num_models=24, train_steps=60, lr=0.02)
    assert relative_bias(broad, narrow).value > 10
    elsewhere = kernel_inductive_bias(x, y, t.flip(0), target, 0.05, lengthscale=2.0)
    with pytest.raises(ValueError, match="same test"):
        relative_bias(elsewhere, narrow)
    errors = network_inductive_bias(mlp, *single, num_models=24, train_steps=60, lr=0.02, loss="0-1")
    assert errors.tail == "beta" and 0 < errors.eps < 0.5


def test_test_points_among_training_points_warn(digits):
    x, y, t, target = digits
    with pytest.warns(UserWarning, match="2 of the test points"):
        kernel_hypotheses(x, y, torch.cat([t, x[:2]]), torch.cat([target, y[:2]]))


X, Y = torch.randn(6, 2, dtype=torch.float64), torch.randn(6)
T, Z = torch.randn(5, 2, dtype=torch.float64), torch.randn(5)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((X, Y, T, Z, -0.1), {}, "eps must be positive"),
        ((X[:0], Y[:0], T, Z, 0.1), {}, "x_train and y_train must be as many, and not none, got 0 and 0"),
        ((X, Y[:5], T, Z, 0.1), {}, "got 6 and 5"),
        ((X, Y, T[:, :1], Z, 0.1), {}, r"same features, got \(6, 2\) and \(5, 1\)"),
        ((X.half(), Y, T, Z, 0.1), {}, "x_train must be float32 or float64, got torch.float16"),
        ((X, Y, T / 0, Z, 0.1), {}, "x_test must be finite"),
        ((X, Y, T, Z.long(), 0.1), {}, "of one kind"),
        ((X, -torch.ones(6).long(), T, Z.long(), 0.1), {}, "labels 0, 1"),
        ((X, Y, T, Z, 0.1), {"kernel": "linear"}, "kernel must be .* got 'linear'"),
        ((X, Y, T, Z, 0.1), {"space": "ntk"}, "space='ntk' needs a network"),
        ((X, Y, T, Z, 0.1), {"space": "mlp"}, "space must be .* got 'mlp'"),
        ((X, Y, T, Z, 0.1), {"lengthscale": 0.0}, "lengthscale must be positive, got 0"),
        ((X, Y, T, Z, 0.1), {"lengthscale": "mean"}, "lengthscale must be a number or 'median'"),
        ((X[:1], Y[:1], T, Z, 0.1), {}, "at least two training inputs"),
        ((X[:1].repeat(6, 1), Y, T, Z, 0.1), {}, "'median' is zero"),
        ((X, Y, T, Z, 0.1), {"jitter": -1.0}, "jitter and noise must not be negative"),
        ((X, Y, T, Z, 0.1), {"method": "imhof"}, "method must be .* got 'imhof'"),
        ((X, Y, T, Z, 0.1), {"loss": "hinge"}, "loss must be .* got 'hinge'"),
    ],
)
def test_bad_tasks_are_told(arguments, options, words, shape_checks_off):
    with pytest.raises(ValueError, match=words):
        kernel_inductive_bias(*arguments, **options)


def test_kernels_that_are_not_positive_definite_are_told():
    with pytest.raises(RuntimeError, match=r"not positive definite with 1\.0e-03 on its diagonal"):
        kernel_inductive_bias(X, Y, T, Z, 0.1, kernel=lambda a, b: 1 - torch.cdist(a, b))
    with pytest.raises(ValueError, match="sizes must lie between 1 and 6, got 7"):
        required_bias_curve(X, Y, T, Z, 0.1, sizes=(7,))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_models": 0}, "num_models must be positive, got 0"),
        ({"train_steps": -1}, "train_steps must be positive, got -1"),
        ({"tolerance": 0.0}, "tolerance must be positive, got 0.0"),
        ({"optimizer": "lamb"}, "optimizer must be .* got 'lamb'"),
        ({"loss": "hinge"}, "loss must be .* got 'hinge'"),
    ],
)
def test_bad_training_is_told(options, words, digits, shape_checks_off):
    x, y, t, target = digits
    with pytest.raises(ValueError, match=words):
        network_inductive_bias(mlp, (x.float(), y), (t.float(), target), **options)
    with pytest.raises(ValueError, match=r"outputs of the shape of the targets, \(10,\), got \(4,\)"):
        network_inductive_bias(lambda: nn.Linear(64, 4), (x.float(), y), (t.float(), target))

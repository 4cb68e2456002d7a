"""Given features and networks: against ODE solvers, optimizers step by step, scikit-learn, lstsq, a peer's numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from scipy.optimize import minimize
from sklearn.linear_model import Ridge
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lathe import data
from lathe.theory.generalization_dynamics import (
    LinearTheory,
    ModeSpectrum,
    RandomFeatures,
    TeacherStudent,
    conditioning_bound,
    gradient_descent,
    gradient_flow,
    learning_curves,
    rademacher_bound,
    recommend,
    ridge_regression,
    size_sweep,
)


def problem(rng, samples, features, outputs=2):
    phi = torch.randn(samples, features, dtype=torch.float64, generator=rng) / math.sqrt(features)
    y = torch.randn(samples, outputs, dtype=torch.float64, generator=rng)
    return phi, y, torch.randn(features, outputs, dtype=torch.float64, generator=rng)


@pytest.mark.parametrize(("samples", "features"), [(12, 7), (7, 12), (8, 8)])
def test_flow_is_what_an_ode_solver_finds(samples, features, rng):
    phi, y, w0 = problem(rng, samples, features)
    times = torch.tensor([0.0, 0.4, 20.0], dtype=torch.float64)
    run = gradient_flow(phi, y, w0, times=times)
    X, Y = phi.numpy(), y.numpy()
    for t, weights in zip(times.tolist()[1:], run.weights[1:]):
        flow = solve_ivp(
            lambda _, w: (X.T @ (Y - X @ w.reshape(-1, 2))).ravel(), (0, t), w0.numpy().ravel(), rtol=1e-9, atol=1e-11,
            method="DOP853",
        )  # fmt: skip
        np.testing.assert_allclose(weights, flow.y[:, -1].reshape(-1, 2), atol=1e-7)
    assert torch.allclose(run.weights[0], w0, atol=1e-12)
    torch.testing.assert_close(run.train, (phi @ run.weights - y).square().mean(1))
    torch.testing.assert_close(run.test(phi, y), run.train)
    torch.testing.assert_close(run.predict(phi[:3]), phi[:3] @ run.weights)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize(("loss", "lr"), [("sum", 0.3), ("mean", 3.0), ("mse", 2.0)])
def test_descent_is_what_sgd_does_step_by_step(momentum, loss, lr, rng):
    phi, y, w0 = problem(rng, 9, 6)
    w = w0.clone().requires_grad_()
    optimizer = torch.optim.SGD([w], lr=lr, momentum=momentum)
    seen = []
    for _ in range(151):
        seen.append(w.detach().clone())
        residual = phi @ w - y
        scale = {"sum": 0.5, "mean": 0.5 / 9, "mse": 1 / 18}[loss]
        optimizer.zero_grad()
        (scale * residual.square().sum()).backward()
        optimizer.step()
    steps = torch.tensor([0, 1, 2, 37, 150])
    run = gradient_descent(phi, y, w0, steps=steps, lr=lr, loss=loss, momentum=momentum)
    torch.testing.assert_close(run.weights, torch.stack([seen[k] for k in steps]), atol=1e-12, rtol=1e-10)


def test_descent_by_tiny_steps_is_flow(rng):
    phi, y, w0 = problem(rng, 9, 6)
    flow = gradient_flow(phi, y, w0, times=torch.tensor([0.5, 4.0]))
    steps = gradient_descent(phi, y, w0, steps=torch.tensor([5_000_000, 40_000_000]), lr=1e-7)
    torch.testing.assert_close(steps.weights, flow.weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("samples", "features"), [(30, 12), (12, 30), (15, 15)])
def test_for_ever_from_zero_is_least_norm_least_squares(samples, features, rng):
    x = torch.randn(samples, 20, dtype=torch.float64, generator=rng)
    phi = RandomFeatures(20, features, generator=rng)(x)
    y = torch.randn(samples, dtype=torch.float64, generator=rng)
    found = gradient_flow(phi, y, times=torch.tensor([math.inf])).weights[0]
    np.testing.assert_allclose(found, np.linalg.lstsq(phi.numpy(), y.numpy(), rcond=1e-12)[0], rtol=1e-7)


@pytest.mark.parametrize(("samples", "features"), [(20, 8), (8, 20)])
def test_ridge_is_scikit_learns(samples, features, rng):
    phi, y, _ = problem(rng, samples, features)
    gammas = [0.01, 0.7, 30.0]
    run = ridge_regression(phi, y, gammas=torch.tensor(gammas))
    for gamma, weights, train in zip(gammas, run.weights, run.train):
        peer = Ridge(alpha=float(torch.tensor(gamma)), fit_intercept=False).fit(phi.numpy(), y.numpy())
        np.testing.assert_allclose(weights, peer.coef_.T, atol=1e-7)
        np.testing.assert_allclose(train, ((peer.predict(phi.numpy()) - y.numpy()) ** 2).mean(0), atol=1e-7)
    ends = ridge_regression(phi, y, gammas=torch.tensor([0.0, math.inf]))
    torch.testing.assert_close(ends.weights[0], torch.linalg.pinv(phi) @ y)
    assert ends.weights[1].abs().max() == 0


def test_neural_tangents_predicts_the_same():
    # neural-tangents 0.6.5, predict.gradient_descent_mse on the Gram matrix, t = P times ours, float64 on a processor.
    i, j = torch.arange(1, 7).double()[:, None], torch.arange(1, 5).double()
    phi, y = torch.cos(i * j + 0.3 * i), torch.arange(1, 7).double().sin()
    run = gradient_flow(phi[:4], y[:4], times=torch.tensor([0.5, 3.0, 20.0]))
    train = [
        [0.2686226171556447, 0.3273759224944738, 0.15199452556951268, -0.34446087990959795],
        [0.7795631451970941, 0.8524944595824911, 0.1494240584556058, -0.7105969956961217],
        [0.841490527613039, 0.9093162724593679, 0.14117023490020142, -0.7567465244628772],
    ]
    test = [
        [0.1232657991557184, -0.42955914821512703],
        [0.3892348484899801, -1.1679478352909025],
        [0.44239643082413393, -1.2587913913070565],
    ]
    np.testing.assert_allclose(run.predict(phi[:4]), train, atol=1e-10)
    np.testing.assert_allclose(run.predict(phi[4:]), test, atol=1e-10)


def test_frozen_directions_never_move(rng):
    phi, y, w0 = problem(rng, 6, 15)
    run = gradient_flow(phi, y, w0, times=torch.tensor([0.1, 10.0, 1e8, math.inf]))
    null = torch.linalg.svd(phi)[2][6:]
    assert (null @ (run.weights - w0)).abs().max() < 1e-12
    # Dependent features freeze too, among few as among many.
    twin = torch.cat([phi[:, :3], phi[:, :3]], 1)
    moved = gradient_flow(twin, y, times=torch.tensor([math.inf])).weights[0]
    torch.testing.assert_close(moved[:3], moved[3:])


@given(samples=st.integers(1, 6), features=st.integers(1, 6), scale=st.floats(1e-3, 1e3))
@settings(max_examples=30, deadline=None)
def test_training_never_raises_the_training_error(samples, features, scale):
    rng = torch.Generator().manual_seed(samples * 7 + features)
    phi, y, w0 = problem(rng, samples, features)
    run = gradient_flow(scale * phi, y, w0, times=torch.logspace(-6, 6, 13))
    assert (run.train[1:] <= run.train[:-1] + 1e-12).all() and torch.isfinite(run.weights).all()


def test_batches_and_single_outputs_are_each_by_itself(rng):
    phi = torch.randn(3, 2, 10, 4, dtype=torch.float64, generator=rng)
    y = torch.randn(3, 2, 10, dtype=torch.float64, generator=rng)
    times = torch.tensor([0.2, 3.0])
    run = gradient_flow(phi, y, times=times)
    assert run.weights.shape == (2, 3, 2, 4) and run.train.shape == (2, 3, 2) == run.test(phi, y).shape
    alone = gradient_flow(phi[1, 0], y[1, 0], times=times)
    torch.testing.assert_close(run.weights[:, 1, 0], alone.weights)
    torch.testing.assert_close(run.train[:, 1, 0], alone.train)
    double = gradient_flow(phi[1, 0], torch.stack([y[1, 0], y[1, 1]], 1), times=times)
    torch.testing.assert_close(double.weights[..., 0], alone.weights)
    assert gradient_flow(phi[0, 0].float(), y[0, 0].float(), times=times).weights.dtype == torch.float64


def test_isotropic_spectra_are_the_linear_theory_of_the_instance(rng):
    N, P, noise = 400, 200, 0.5
    phi = torch.randn(P, N, dtype=torch.float64, generator=rng) / math.sqrt(N)
    times = torch.tensor([0.3, 3.0, math.inf])
    spectrum = ModeSpectrum.from_features(phi)
    found = type(spectrum)(spectrum.eigenvalues, spectrum.weights, spectrum.frozen_weight, P, N, 1.0, noise)
    theory = LinearTheory(P / N, sigma_0=0.3, sigma_eps=noise)
    torch.testing.assert_close(found.test_error(times, 0.3), theory.test_error(times), rtol=0.02, atol=0)
    torch.testing.assert_close(found.train_error(times, 0.3), theory.train_error(times), rtol=0.03, atol=1e-9)
    assert found.ridge() == pytest.approx(LinearTheory(P / N, sigma_eps=noise).ridge().item(), rel=0.02)
    assert found.optimal_stopping(0.3)[0] == pytest.approx(theory.optimal_stopping()[0].item(), rel=0.05)
    assert found.frozen == P == 400 * found.frozen_fraction and found.gamma == noise**2
    assert found.smallest == pytest.approx((1 - math.sqrt(0.5)) ** 2, rel=0.25)
    around = found.test_error(found.optimal_stopping()[0] * torch.logspace(-2, 2, 101))
    assert around.min() >= found.optimal_stopping()[1] - 1e-9


@pytest.mark.parametrize(("samples", "features"), [(60, 25), (25, 60)])
def test_signal_and_noise_are_the_most_likely_ones(samples, features, rng):
    phi = torch.randn(samples, features, dtype=torch.float64, generator=rng) / math.sqrt(features)
    w = torch.randn(features, 3, dtype=torch.float64, generator=rng)
    y = phi @ w + 0.4 * torch.randn(samples, 3, dtype=torch.float64, generator=rng)
    found = ModeSpectrum.from_features(phi, y)
    K, Y = (phi @ phi.T).numpy(), y.numpy()

    def negative(logs):
        C = np.exp(logs[0]) * K + np.exp(logs[1]) * np.eye(samples)
        return 3 * np.linalg.slogdet(C)[1] + np.trace(Y.T @ np.linalg.solve(C, Y))

    best = minimize(negative, [0.0, -1.0], method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-10})
    np.testing.assert_allclose([found.sigma_w**2, found.sigma_eps**2], np.exp(best.x), rtol=1e-4)


def test_estimates_find_the_truth_and_know_when_there_is_none(rng):
    phi = torch.randn(900, 500, dtype=torch.float64, generator=rng) / math.sqrt(500)
    w = 1.5 * torch.randn(500, dtype=torch.float64, generator=rng)
    y = phi @ w + 0.6 * torch.randn(900, dtype=torch.float64, generator=rng)
    found = ModeSpectrum.from_features(phi, y)
    assert found.sigma_w == pytest.approx(1.5, rel=0.08) and found.sigma_eps == pytest.approx(0.6, rel=0.08)
    exact = ModeSpectrum.from_features(phi, phi @ w)
    assert exact.sigma_eps < 1e-3 and exact.optimal_stopping()[0] > 100
    silent = ModeSpectrum.from_features(phi, torch.zeros(900, dtype=torch.float64))
    assert silent.sigma_w == silent.sigma_eps == 0
    with pytest.raises(ValueError, match="made without targets"):
        ModeSpectrum.from_features(phi).optimal_stopping()


def digits(count, noise, rng):
    found = data.load("digits")
    labels = torch.where(
        torch.rand(len(found), generator=rng) < noise, torch.randint(10, (len(found),), generator=rng), found.labels
    )
    return found.float()[:count], labels[:count]


@pytest.mark.parametrize("kind", ["last", "output", "ntk"])
def test_theory_foretells_the_curves_of_a_network_on_digits(kind, rng):
    x, y = digits(500 if kind != "ntk" else 70, 0.3, rng)
    hidden = 360 if kind != "ntk" else 20
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, 10))
    if kind == "output":
        model = model[:3]
    model.train()
    before = [p.clone() for p in model.parameters()]
    found = recommend(model, (x, y), features=kind, generator=rng)
    assert model.training and all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    curves = found.curves
    near = (curves.times.log() - math.log(found.stopping_time)).abs().argmin()
    assert curves.test[near] < 1.1 * curves.test.min() < 0.9 * curves.test[0]
    late = curves.times > found.stopping_time / 3
    held = curves.test_theory[late] / curves.test[late]
    assert held.min() > 0.5 and held.max() < 2 and curves.test[-1] > 1.5 * curves.test.min()
    assert found.features == {"last": 360, "output": 360, "ntk": 20 * 75 + 10}[kind]
    assert found.frozen == found.features - len(curves.spectrum.eigenvalues)
    assert found.overtraining > 1.3 and "stop after" in str(found)
    assert found.ridge_error <= found.best_error * 1.001
    assert found.plot().to_dict()["layer"]


def test_recommended_steps_are_steps_of_an_optimizer(rng):
    teacher = TeacherStudent(30, None, snr=1.0, generator=rng)
    x, y = teacher.sample(80, rng)
    found = recommend(
        nn.Linear(30, 1).double(), (x, y), lr=0.1, held_out=0.25, generator=torch.Generator().manual_seed(3)
    )
    order = torch.randperm(80, generator=torch.Generator().manual_seed(3))[:60]
    a, b = x[order] - x[order].mean(0), (y[order] - y[order].mean()).unsqueeze(1)
    w = torch.zeros(30, 1, dtype=torch.float64, requires_grad=True)
    for _ in range(round(found.stopping_steps)):
        loss = nn.functional.mse_loss(a @ w, b)
        (gradient,) = torch.autograd.grad(loss, w)
        w = (w - 0.1 * gradient).detach().requires_grad_()
    flow = gradient_flow(a, b, times=torch.tensor([found.stopping_time]))
    torch.testing.assert_close(w.detach(), flow.weights[0], atol=0.02, rtol=0)
    largest = torch.linalg.eigvalsh(a.T @ a)[-1].item()
    assert found.largest_lr == pytest.approx(60 / largest) and found.advice


def test_batches_give_what_the_whole_gives(rng):
    x, y = digits(200, 0.0, rng)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 10))
    whole = learning_curves(model, (x[:150], y[:150]), (x[150:], y[150:]))
    loaders = [DataLoader(TensorDataset(*part), batch_size=64) for part in ((x[:150], y[:150]), (x[150:], y[150:]))]
    torch.testing.assert_close(learning_curves(model, *loaders, layer="3").test, whole.test)


def test_students_of_all_sizes_share_their_features(rng):
    big = RandomFeatures(5, 12, "tanh", generator=rng)
    x = torch.randn(4, 5, dtype=torch.float64, generator=rng)
    small = big.narrow(3)
    torch.testing.assert_close(small(x) * math.sqrt(3), (big(x) * math.sqrt(12))[:, :3])
    torch.testing.assert_close(big(x) * math.sqrt(12), torch.tanh(x @ big.weight.T))
    assert RandomFeatures(5, 12).load_state_dict(big.state_dict())


@pytest.mark.parametrize(("n_teacher", "act"), [(None, "relu"), (6, "relu"), (4, "gelu"), (5, "tanh")])
def test_teachers_have_mean_zero_and_variance_one(n_teacher, act, rng):
    teacher = TeacherStudent(8, n_teacher, snr=4.0, activation=act, generator=rng)
    x, y = teacher.sample(200_000, rng)
    clean = teacher(x)
    assert abs(clean.mean()) < 0.015 and clean.var() == pytest.approx(1, rel=0.02)
    assert (y - clean).var() == pytest.approx(0.25, rel=0.02)


def test_sweeps_peak_where_features_are_samples(rng):
    teacher = TeacherStudent(10, 8, snr=2.0, generator=rng)
    train, x = teacher.sample(40, rng), teacher.sample(500, rng)[0]
    sweep = size_sweep(train, (x, teacher(x)), (5, 40, 400), times=torch.logspace(-2, 9, 40), generator=rng)
    assert sweep.test.shape == sweep.train.shape == (3, 40) and sweep.final.argmax() == 1
    assert sweep.final[1] > 5 * sweep.final[2] and sweep.stopped[1] < 2 * sweep.stopped[2]
    assert sweep.train[1, -1] < 1e-6 and sweep.plot().to_dict()["layer"]


@pytest.mark.parametrize(("samples", "features"), [(30, 10), (10, 30)])
def test_the_error_stays_below_the_conditioning_bound(samples, features, rng):
    root = torch.randn(features, features, dtype=torch.float64, generator=rng) / math.sqrt(features)
    phi = torch.randn(samples, features, dtype=torch.float64, generator=rng) @ root.T
    best, w0 = torch.randn(2, features, dtype=torch.float64, generator=rng)
    y = phi @ best + torch.randn(samples, dtype=torch.float64, generator=rng)
    times = torch.logspace(-3, 6, 30)
    run = gradient_flow(phi, y, w0, times=times)
    away = run.weights - best
    excess = ((away @ (root @ root.T)) * away).sum(-1)
    bound = conditioning_bound(phi, y, best, root @ root.T, w0=w0, times=times)
    for_ever = conditioning_bound(phi, y, best, root @ root.T, w0=w0)
    assert (excess <= bound).all() and (bound <= for_ever * (1 + 1e-12)).all()
    # With an isotropic population and one mode's worth of data the first bound is an equality at the start.
    flat = conditioning_bound(phi, y, best, torch.eye(features, dtype=torch.float64), w0=w0, times=torch.zeros(1))
    assert flat.item() == pytest.approx((w0 - best).square().sum().item())


def test_the_norm_based_bound_grows_with_size():
    assert rademacher_bound(0.3, 2.0, 1.5, 100).item() == pytest.approx(0.3 + 2 * 3 / 10)
    grown = rademacher_bound(torch.zeros(3), torch.tensor([1.0, 2.0, 4.0]), 1.0, 50)
    assert (grown.diff() > 0).all()
    with pytest.raises(ValueError, match="weight_norm must be at least 0"):
        rademacher_bound(0.1, -1.0, 1.0, 10)


def test_bad_input_is_refused(rng, shape_checks_off):
    phi, y, _ = problem(rng, 6, 4)
    times = torch.ones(1)
    for call, message in [
        (lambda: gradient_flow(phi, y, times=-times), "times must be at least 0"),
        (lambda: gradient_flow(phi, y[:5], times=times), r"targets must have shape \(6,\)"),
        (lambda: gradient_flow(phi * math.nan, y, times=times), "features must be finite"),
        (lambda: gradient_flow(phi, y, y, times=times), r"w0 must have shape \(4, 2\)"),
        (lambda: gradient_flow(phi[:0], y[:0], times=times), "none of them zero"),
        (lambda: gradient_descent(phi, y, steps=torch.tensor([1]), lr=1e3), "lr must be below"),
        (lambda: gradient_descent(phi, y, steps=torch.tensor([-1]), lr=0.1), "steps must be whole"),
        (lambda: gradient_descent(phi, y, steps=torch.tensor([1]), lr=-0.1), "lr must be positive"),
        (lambda: gradient_descent(phi, y, steps=torch.tensor([1]), lr=0.1, loss="l1"), "loss must be one of"),
        (lambda: gradient_descent(phi, y, steps=torch.tensor([1]), lr=0.1, momentum=1.0), "momentum must be in"),
        (lambda: ridge_regression(phi, y, gammas=-times), "gammas must be at least 0"),
        (lambda: ModeSpectrum.from_features(0 * phi), "must not all be zero"),
        (lambda: ModeSpectrum.from_features(phi, y, held_out=phi[:, :2]), "held_out must be samples by 4"),
        (lambda: RandomFeatures(0, 3), "at least 1"),
        (lambda: RandomFeatures(2, 3).narrow(4), "between 1 and 3"),
        (lambda: TeacherStudent(2, 3, snr=0.0), "snr must be positive"),
        (lambda: size_sweep((phi, y), (phi, y), (), times=times), "sizes must not be empty"),
        (lambda: recommend(nn.ReLU(), (phi, y)), "ReLU has no nn.Linear"),
        (lambda: recommend(nn.Linear(4, 2), (phi.float(), y), layer="x"), "layer must name a module"),
        (lambda: recommend(nn.Linear(4, 2), (phi.float(), y), held_out=1.0), "held_out must leave samples"),
        (lambda: recommend(nn.Linear(4, 2), (phi.float(), y), features="all"), "features must be last"),
        (lambda: recommend(nn.Linear(4, 3), (phi.float(), y), features="ntk"), "3 outputs, but there are 2"),
        (lambda: recommend(nn.Unflatten(1, (2, 2)), (phi, y), features="output"), "pool them"),
        (lambda: recommend(nn.Linear(4, 2), (phi.float(), y[:3])), "as many targets as inputs"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="features must be floating point"):
        gradient_flow(phi.long(), y, times=times)

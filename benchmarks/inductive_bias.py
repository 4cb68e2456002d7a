"""Posteriors against minimising by Adam as the paper's code does, tails against SciPy, ensembles against one by one.

The paper's code finds `k(X,X)^-1 Y` and `k(X,X)^-1 k(X,T)` by descent over blocks of the kernel matrix; what such a
descent takes is timed here on our own formulation of it, some epochs standing for the ten thousand that it makes.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import scipy
import torch
from harness import Pair
from scipy import stats
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF
from torch import Tensor, nn
from torch.nn import functional as F

from lathe.theory.inductive_bias import (
    ScaledChi2,
    fit_losses,
    kernel_hypotheses,
    train_networks,
    weighted_chi2_log_cdf,
)

TRAIN, TEST, CLASSES, LENGTHSCALE = 500, 100, 10, 2.0
EPOCHS, TIMED_EPOCHS, BLOCK = 10_000, 5, 5


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(seed).permutation(len(bunch.data))[:count]
    return torch.from_numpy(bunch.data[order] / 16), torch.from_numpy(bunch.target[order])


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def epochs_of_adam(x: Tensor, targets: Tensor, epochs: int) -> Tensor:
    """Minimises `|K a - targets|^2 / 2` over `a`, a few rows of the kernel matrix at a time, as they are computed."""
    a = torch.zeros_like(targets, requires_grad=True)
    optimizer = torch.optim.Adam([a], lr=1e-2)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(BLOCK):
            k = torch.exp(-torch.cdist(x[rows], x).square() / (2 * LENGTHSCALE**2))
            loss = (k @ a - targets[rows]).square().sum() / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return a.detach()


def posterior() -> Pair:
    x, y = images(TRAIN + TEST, 0)
    data = x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:]

    def ours() -> float:
        return seconds(lambda: kernel_hypotheses(*data, lengthscale=LENGTHSCALE))

    # What is solved, and how well: descent of any length is far from it, so that a direct solver stands in.
    found = kernel_hypotheses(*data, lengthscale=LENGTHSCALE)
    peer = GaussianProcessRegressor(RBF(LENGTHSCALE), optimizer=None, alpha=1e-6)
    mean = peer.fit(data[0].numpy(), np.eye(CLASSES)[data[1]]).predict(data[2].numpy())
    if not np.abs(found.mean.numpy() - mean).max() < 1e-8:
        raise AssertionError("we and scikit-learn differ in the posterior's mean")
    k = torch.exp(-torch.cdist(data[0], data[2]).square() / (2 * LENGTHSCALE**2))
    targets = torch.cat([F.one_hot(data[1]).double(), k], 1)
    per_epoch = seconds(lambda: epochs_of_adam(data[0], targets, TIMED_EPOCHS)) / TIMED_EPOCHS
    return Pair(
        f"posterior mean and covariance, {TRAIN} training and {TEST} test points, {EPOCHS} epochs of the peer",
        ours,
        lambda: per_epoch * EPOCHS,
        f"minibatch Adam, torch {torch.__version__}",
        target=1000.0,
        tolerance=None,
        timed=False,
    )


def tails() -> list[Pair]:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(100_000, dtype=torch.float64, generator=generator) ** 4
    shifts2 = 0.3 * torch.rand(100_000, dtype=torch.float64, generator=generator) ** 4
    eps = 0.8 * (weights + shifts2).sum()
    exact = weighted_chi2_log_cdf(eps, weights, shifts2)
    quick = weighted_chi2_log_cdf(eps, weights, shifts2, method="saddlepoint")
    if not (exact - quick).abs() < 1e-3:
        raise AssertionError(f"saddle point and inversion differ: {quick} and {exact}")
    return [
        Pair(
            "one tail of 100,000 terms by the saddle point: the peer is 10 ms",
            lambda: seconds(lambda: weighted_chi2_log_cdf(eps, weights, shifts2, method="saddlepoint")),
            lambda: 0.01,
            "a clock",
            target=1.0,
            tolerance=None,
            timed=False,
        ),
    ]


def fit() -> Pair:
    losses = ScaledChi2(50.0, 30.0, 0.01).sample(10_000)
    array = losses.numpy()

    def ours() -> float:
        return seconds(lambda: fit_losses(losses))

    found, peer = fit_losses(losses).law, stats.ncx2.fit(array, floc=0)
    gap = stats.ncx2.logpdf(array, *peer).mean() - found.log_prob(losses).mean().item()
    if not gap < 1e-6:
        raise AssertionError(f"scipy's law is likelier, by {gap:.1e} nats a loss")
    return Pair(
        "maximum likelihood of df, non-centrality and scale, 10,000 losses",
        ours,
        lambda: seconds(lambda: stats.ncx2.fit(array, floc=0)),
        f"scipy {scipy.__version__} ncx2.fit",
        target=10.0,
        tolerance=None,
        timed=False,
    )


def ensemble() -> Pair:
    x, y = images(200, 1)
    x, targets, steps, count = x.float(), F.one_hot(y, CLASSES).float(), 30, 64

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))

    def at_once() -> Tensor:
        return train_networks(make, (x, targets), num_models=count, train_steps=steps, lr=3e-3).predict(x)

    def one_by_one() -> Tensor:
        outputs = []
        for seed in range(count):
            torch.manual_seed(seed)
            model = make()
            optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
            for _ in range(steps):
                optimizer.zero_grad()
                F.mse_loss(model(x), targets).backward()
                optimizer.step()
            outputs.append(model(x).detach())
        return torch.stack(outputs)

    return Pair(
        f"{count} MLPs 64-48-48-10, {steps} steps on 200 images",
        at_once,
        one_by_one,
        f"one by one, torch {torch.__version__}",
        target=6.4,
        # Adam turns rounding errors of gradients near zero into whole steps.
        tolerance=5e-3,
    )


def pairs() -> list[Pair]:
    return [posterior(), *tails(), fit(), ensemble()]

"""Neural collapse against what the authors' scripts do and what a metrics package does, told in our words.

The authors solve a polynomial a class symbolically, and form an outer product a sample for the within-class covariance.
rhubarbwu/neural-collapse (MIT, on no package index) goes over the features twice and inverts a d x d matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from harness import Pair
from sympy import Symbol, solve
from sympy.core.cache import clear_cache
from torch import Tensor, nn

from lathe.theory.neural_collapse import DeepLinearHead, NeuralCollapse, gof

CLASSES, SAMPLES, FEATURES, BATCH = 10, 5000, 512, 500


def solved_symbolically(counts: list[int], decay: float, depth: int) -> Tensor:
    """w_k of equal penalties by the largest real root of the stationarity condition, as the authors find it."""
    N = sum(counts)
    b = depth * N * (N * decay ** (depth + 1)) ** (1 / depth)
    x = Symbol("x", real=True)
    roots = [max(solve(b / n - depth * x ** (depth - 1) / (x**depth + 1) ** 2, x, rational=False)) for n in counts]
    return N * decay * torch.tensor([max(float(root), 0.0) for root in roots], dtype=torch.float64) ** depth


def closed_form(depth: int, penalties: list[float]) -> Pair:
    """The paper's unequal CIFAR-10, over penalties; sympy's cache is emptied first, since a script solves once."""
    counts = [500, 500, 400, 400, 300, 300, 200, 200, 100, 100]

    def symbolic() -> list[Tensor]:
        clear_cache()
        return [solved_symbolically(counts, decay, depth) for decay in penalties]

    return Pair(
        f"lengths of 10 classes, {depth} layers, {len(penalties)} penalt{'y' if len(penalties) == 1 else 'ies'}",
        lambda: [gof(counts, decay, decay, depth=depth).classifier_norms.square() for decay in penalties],
        symbolic,
        "sympy's solve, class by class, as the authors do",
        target=1000.0,
        tolerance=1e-9,
    )


def features_of_classes() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    means = torch.randn(CLASSES, FEATURES, generator=generator)
    features = means[target] + 0.3 * torch.randn(SAMPLES, FEATURES, generator=generator)
    return features, target, torch.randn(CLASSES, FEATURES, generator=generator)


def ours(features: Tensor, target: Tensor, weight: Tensor) -> Callable[[], dict[str, float]]:
    def metrics() -> dict[str, float]:
        collapse = NeuralCollapse(CLASSES)
        for h, y in zip(features.split(BATCH), target.split(BATCH)):
            collapse.update(h, y)
        report = collapse.compute(weight, reference="etf")
        return {name: getattr(report, name) for name in ("nc1", "nc2_w", "nc2_h", "nc3")}

    return metrics


def frames(means: Tensor, centre: Tensor, weight: Tensor) -> dict[str, float]:
    simplex = (torch.eye(CLASSES) - 1 / CLASSES) / math.sqrt(CLASSES - 1)
    centred = means - centre
    products = {"nc2_w": weight @ weight.mT, "nc2_h": centred @ centred.mT, "nc3": weight @ centred.mT}
    return {name: float((P / P.norm() - simplex.to(P)).norm()) for name, P in products.items()}


def outer_products(features: Tensor, target: Tensor, weight: Tensor) -> Callable[[], dict[str, float]]:
    """As the authors: for each class a tensor (n_k, d, d), SciPy's pseudo-inverse of a d x d matrix."""

    def metrics() -> dict[str, float]:
        centre = features.mean(0)
        means = torch.stack([features[target == k].mean(0) for k in range(CLASSES)])
        within = torch.zeros(FEATURES, FEATURES)
        for k in range(CLASSES):
            rest = features[target == k] - means[k]
            within += (rest[:, :, None] @ rest[:, None, :]).sum(0)
        between = sum(torch.outer(m, m) for m in means - centre) / CLASSES
        nc1 = np.trace(within.numpy() / SAMPLES @ scipy.linalg.pinv(between.numpy())) / CLASSES
        return {"nc1": float(nc1), **frames(means, centre, weight)}

    return metrics


def two_passes(features: Tensor, target: Tensor, weight: Tensor, dtype: torch.dtype) -> Callable[[], dict[str, float]]:
    """As rhubarbwu/neural-collapse: means in one pass, the covariance in another, torch's pseudo-inverse."""
    classes = torch.arange(CLASSES)
    batches = list(zip(features.split(BATCH), target.split(BATCH)))

    def metrics() -> dict[str, float]:
        sums, counts = torch.zeros(CLASSES, FEATURES, dtype=dtype), torch.zeros(CLASSES, dtype=dtype)
        for h, y in batches:
            chosen = (y[:, None] == classes).to(dtype)
            counts += chosen.sum(0)
            sums += chosen.mT @ h.to(dtype)
        means, centre = sums / counts[:, None], sums.sum(0) / counts.sum()
        within = torch.zeros(FEATURES, FEATURES, dtype=dtype)
        for h, y in batches:
            rest = h.to(dtype) - means[y]
            within += rest.mT @ rest
        centred = means - centre
        between = centred.mT @ centred / CLASSES
        nc1 = torch.trace(torch.linalg.pinv(between) @ within / SAMPLES) / CLASSES
        return {"nc1": float(nc1), **frames(means, centre, weight.to(dtype))}

    return metrics


def deep_heads(depth: int) -> Pair:
    """A training step of a head: forward and backward."""
    torch.manual_seed(0)
    head = DeepLinearHead(FEATURES, CLASSES, depth)
    layers = [nn.Linear(FEATURES, FEATURES, bias=False) for _ in range(depth - 1)]
    chain = nn.Sequential(*layers, nn.Linear(FEATURES, CLASSES))
    with torch.no_grad():
        for layer, weight in zip(chain, head.weights):
            layer.weight.copy_(weight)
        chain[-1].bias.copy_(head.bias)
    x = torch.randn(BATCH, FEATURES)

    def step(module: nn.Module) -> Callable[[], list[Tensor]]:
        weights = list(module.weights) if isinstance(module, DeepLinearHead) else [layer.weight for layer in module]
        entering = x.clone().requires_grad_()

        def run() -> list[Tensor]:
            y = module(entering)
            return [y, *torch.autograd.grad(y.square().sum(), [entering, *weights])]

        return run

    title = f"head of {depth} layers, forward and backward, {BATCH} samples of {FEATURES} features"
    return Pair(title, step(head), step(chain), "nn.Linear after nn.Linear", target=1.0, saved_memory=True)


def pairs() -> list[Pair]:
    data = features_of_classes()
    title = f"NC1 to NC3 of {SAMPLES} samples, {FEATURES} features"
    package = "two passes and pinv, as rhubarbwu/neural-collapse does"
    return [
        closed_form(3, [1e-5]),
        closed_form(3, [1e-6, 3e-6, 1e-5, 3e-5, 1e-4]),
        closed_form(6, [1e-5]),
        Pair(
            title, ours(*data), outer_products(*data), "outer products, as the authors do", target=20.0, tolerance=1e-3
        ),
        Pair(f"{title}, in float64", ours(*data), two_passes(*data, torch.float64), package, tolerance=1e-6),
        Pair(title, ours(*data), two_passes(*data, torch.float32), f"{package} by default, in float32", tolerance=1e-3),
        deep_heads(3),
        deep_heads(6),
    ]

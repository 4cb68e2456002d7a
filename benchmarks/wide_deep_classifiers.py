"""The classifier at infinite depth against depth-100 kernels and a dense solve; kernels of depth 100 against peers.

The paper's reference code iterates the dual activation 100 times over the Gram matrices of training and test points,
elementwise, sets the diagonal to one and solves. It is on no package index: `reference` does the same in a few lines of
torch. Its share of the time that the solve takes grows with the number of points; both sides do the same work here.

neural-tangents lives in an environment of its own: see deep_learning_theory.py for how to make it and name it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from deep_learning_theory import neural_tangents
from harness import Pair, PeerMissing
from torch import Tensor

from lathe.theory.wide_deep_classifiers import SingularKernelClassifier, nngp, ntk, to_sphere

POINTS, DEPTH = 1500, 100
INPUTS, FEATURES = 1000, 64
#: E phi(u)^2 of the activations, and their names in stax.
MOMENTS = {"erf": (2 / math.pi * math.asin(2 / 3), "Erf()"), "relu": (0.5, "Relu()")}


def reference(X: Tensor, y: Tensor, query: Tensor) -> Tensor:
    """Labels by the NNGP of depth 100 of the optimal activation for d = 2, whose dual is (xi + xi^3) / 2."""

    def deep(gram: Tensor) -> Tensor:
        for _ in range(DEPTH):
            gram = (gram + gram**3) / 2
            gram = torch.clamp(gram, -1, 1)
        return gram

    K = deep(X @ X.mT)
    K.fill_diagonal_(1.0)
    weights = torch.linalg.solve(K, 2.0 * y.double() - 1)
    return (deep(query @ X.mT) @ weights > 0).long()


def mixture(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two overlapping classes on the non-negative part of the sphere, d = 2."""
    y = torch.randint(0, 2, (n,), generator=generator)
    powers = torch.where(y.unsqueeze(1) == 1, torch.tensor([2.0, 0.7, 1.0]), torch.tensor([0.7, 1.5, 1.0]))
    draws = torch.rand(n, 3, dtype=torch.float64, generator=generator) ** powers
    return to_sphere(draws + 1e-3, "normalise"), y


def classifier() -> Pair:
    generator = torch.Generator().manual_seed(0)
    X, y = mixture(POINTS, generator)
    query, _ = mixture(POINTS, generator)

    def ours() -> Tensor:
        return torch.as_tensor(SingularKernelClassifier(2).fit(X, y).predict(query))

    return Pair(
        f"fit and predict, {POINTS} training points and queries, d = 2",
        ours,
        lambda: reference(X, y, query),
        f"the reference's formulation: NNGP of depth {DEPTH}, dense solve (torch)",
        target=50.0,
        tolerance=0.0,
    )


def kernels(name: str) -> Pair:
    moment, layer = MOMENTS[name]
    x = torch.randn(INPUTS, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x / x.norm(dim=1, keepdim=True)
    # In stax every dense layer has the weight variance 1 / moment; that of the first one is divided out.
    K, theta, seconds = neural_tangents(x * math.sqrt(FEATURES * moment), layer, 0.0, 1 / moment, DEPTH + 1)
    for mine, theirs in ((nngp(x, None, name, DEPTH), K), (ntk(x, None, name, DEPTH), theta)):
        worst = ((mine - theirs).abs().max() / theirs.abs().max()).item()
        if not worst < 1e-6:
            raise AssertionError(f"{name}: we and neural-tangents differ by {worst:.1e}")

    def clock() -> float:
        start = time.perf_counter()
        nngp(x, None, name, DEPTH)
        ntk(x, None, name, DEPTH)
        return time.perf_counter() - start

    return Pair(
        f"NNGP and NTK, {name}, {INPUTS} inputs, depth {DEPTH}",
        clock,
        lambda: seconds,
        "neural-tangents 0.6.5",
        target=5.0,
        tolerance=None,
        timed=False,
    )


def pairs() -> list[Pair]:
    found = [classifier()]
    makers: list[Callable[[], Pair]] = [lambda name=name: kernels(name) for name in MOMENTS]  # type: ignore[misc]
    for make in makers:
        try:
            found.append(make())
        except PeerMissing:
            break
    return found

"""Scalable kernels against the reference's way to compute them, ordinary adapters, and scikit-learn's random features.

The reference code (arijitthegame/neural-network-kernels) has no package: what it computes is formulated here anew. Its
ReLU features are a scaled element-wise maximum with a tensor of constants, behind which weights, modulation and
residual follow one by one; its universal random features are complex numbers for xi and -xi, concatenated. The
`adapters` package does not run on current transformers; its bottleneck adapter is two linear layers, a ReLU and a sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sklearn
import torch
from harness import Pair
from sklearn.kernel_approximation import RBFSampler
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from lathe.nn.scalable_kernels import (
    URF,
    BottleneckAdapter,
    SNNKAdapter,
    SNNKLinear,
    bundle,
    fit_bundled,
)

REFERENCE = "reference formulation"
SKLEARN = f"scikit-learn {sklearn.__version__}"


def relu_features(x: Tensor, G: Tensor, floor: float = 0.0) -> Tensor:
    """Arc-cosine features, with the scale and the maximum as steps of their own."""
    product = torch.einsum("...j,kj->...k", x, G)
    return torch.maximum(product, floor * torch.ones_like(product)) / math.sqrt(len(G))


def pairs() -> list[Pair]:
    """Adapters as they are trained, layers as they are used, and solving instead of training."""
    torch.manual_seed(0)
    return [
        adapter_step(768, 16, (32, 128), target=1.5),
        adapter_step(768, 64, (32, 128), target=1.5),
        layer(64, 64, 256, 4096, target=1.5),
        layer(256, 256, 128, 4096, target=1.5),
        layer(768, 768, 64, 4096, target=1.0),
        complex_features(64, 256, 2048, target=1.5),
        beside_bottleneck(target=1.0),
        ridge(4000, 1024, 10, target=1.0),
        pipeline(1257, 64, 512, 10, target=1.0),
    ]


def step(run: Callable[[Tensor], Tensor], x: Tensor, learnt: list[Tensor], outputs: int = 0) -> Callable[[], Any]:
    """Forward and backward pass; what both must agree on."""

    gradient = torch.ones(*x.shape[:-1], outputs or x.shape[-1]) / x.numel() ** 0.5

    def both() -> Any:
        y = run(x)
        return y, torch.autograd.grad(y, [x, *learnt], gradient)

    return both


def adapter_step(d: int, m: int, tokens: tuple[int, int], target: float) -> Pair:
    adapter = SNNKAdapter(d, num_features=m)
    nn.init.normal_(adapter.modulation)
    # The same directions: what Lathe keeps scaled, the reference scales at every call.
    G = adapter.features.projection.weight * math.sqrt(m)
    x = torch.randn(*tokens, d, requires_grad=True)

    def reference(x: Tensor) -> Tensor:
        return x + adapter.modulation * (relu_features(x, G) @ adapter.weight.T)

    learnt = [adapter.weight, adapter.modulation]
    return Pair(
        f"training step of an SNNK adapter, d={d}, m={m}, {tokens[0]}x{tokens[1]} tokens",
        step(adapter, x, learnt),
        step(reference, x, learnt),
        REFERENCE,
        target=target,
        tolerance=1e-3,
        saved_memory=True,
    )


def layer(d: int, outputs: int, m: int, rows: int, target: float) -> Pair:
    snnk = SNNKLinear(d, outputs, bias=False, num_features=m)
    G = snnk.features.projection.weight * math.sqrt(m)
    x = torch.randn(rows, d, requires_grad=True)
    return Pair(
        f"training step of a ReLU-SNNK layer {d}->{outputs}, m={m}, {rows} rows",
        step(snnk, x, [snnk.weight], outputs),
        step(lambda x: relu_features(x, G) @ snnk.weight.T, x, [snnk.weight], outputs),
        REFERENCE,
        target=target,
        tolerance=1e-3,
        saved_memory=True,
    )


def complex_features(d: int, m: int, rows: int, target: float) -> Pair:
    """cos: one frequency; the reference takes it with both signs in complex numbers."""
    features = URF("cos", d, m)
    G = features.projection.weight / math.sqrt(0.5)
    x, w = 0.1 * torch.randn(rows, d), 0.1 * torch.randn(256, d)
    psi = features.psi(w)

    def signed(u: Tensor, sign: float) -> Tensor:
        rho = torch.tensor(sign * 1j, dtype=torch.complex64).sqrt()
        squares = u.square().sum(-1, keepdim=True)
        return torch.exp((u.to(torch.complex64) @ (rho * G).T) - rho**2 * squares / 2) / math.sqrt(2 * m)

    def both(u: Tensor) -> Tensor:
        return torch.cat([signed(u, 1.0), signed(u, -1.0)], -1)

    of_weights = both(w)

    @torch.no_grad()
    def ours() -> Tensor:
        return features.phi(x) @ psi.T

    @torch.no_grad()
    def reference() -> Tensor:
        return (both(x) @ of_weights.T).real

    return Pair(
        f"cos-SNNK layer {d}->256, m={m}, {rows} rows", ours, reference, REFERENCE, target=target, tolerance=1e-3
    )


def beside_bottleneck(target: float) -> Pair:
    """An SNNK adapter beside the ordinary one that it stands against in the paper."""
    ours, plain = SNNKAdapter(768, num_features=16), BottleneckAdapter(768, bottleneck=48)
    x = torch.randn(32, 128, 768, requires_grad=True)
    return Pair(
        "training step of an SNNK adapter (m=16) beside a bottleneck of 48, d=768, 32x128 tokens",
        step(ours, x, list(ours.parameters())),
        step(plain, x, list(plain.parameters())),
        f"torch {torch.__version__} bottleneck adapter",
        target=target,
        tolerance=None,
        saved_memory=True,
    )


def ridge(rows: int, m: int, outputs: int, target: float) -> Pair:
    P = torch.randn(rows, m, dtype=torch.float64)
    Y = torch.randn(rows, outputs, dtype=torch.float64)
    return Pair(
        f"ridge readout of {m} features, {rows} samples, {outputs} outputs",
        lambda: fit_bundled(P, Y, 1e-2),
        lambda: Ridge(alpha=1e-2, fit_intercept=False).fit(P.numpy(), Y.numpy()).coef_,
        SKLEARN,
        target=target,
        tolerance=1e-6,
    )


def pipeline(rows: int, d: int, m: int, outputs: int, target: float) -> Pair:
    """From images to a classifier: features and readout."""
    x = torch.rand(rows, d)
    Y = torch.eye(outputs)[torch.randint(outputs, (rows,))]
    x_theirs, Y_theirs = x.double().numpy(), Y.double().numpy()  # as scikit-learn's own data sets are
    net = nn.Sequential(nn.Linear(d, 128), nn.ReLU(), nn.Linear(128, outputs))

    def ours() -> Tensor:
        return bundle(net, m, x, refit=False, seed=0).fit(x, Y, 1e-4).weight

    def theirs() -> Any:
        features = RBFSampler(n_components=m, random_state=0).fit_transform(x_theirs)
        return Ridge(alpha=1e-4).fit(features, Y_theirs).coef_

    return Pair(
        f"network of {m} features bundled and solved for, {rows} samples of {d}",
        ours,
        theirs,
        f"{SKLEARN} RBFSampler and Ridge",
        target=target,
        tolerance=None,
    )

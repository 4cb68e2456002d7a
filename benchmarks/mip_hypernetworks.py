"""Driven networks against the authors' package (hyperlight): a step, a gamma a sample, and the call for one gamma.

Both hold the same weights, so that they must answer the same. A dense head has hidden x |theta| weights, and the time
of a step with one gamma is that of writing the gradient of that many numbers: there is little to gain. What differs is
how often the hypernetwork runs, and how a batch of gammas is computed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from harness import Pair, PeerMissing
from torch import Tensor, nn

from lathe.nn.mip_hypernetworks import HyperDriven, hypernetize

try:
    import hyperlight
except ImportError:
    hyperlight = None  # type: ignore[assignment]

HIDDEN = (16, 128)


def pairs() -> list[Pair]:
    if hyperlight is None:
        raise PeerMissing("pip install --no-deps hyperlight==0.0.5")
    torch.manual_seed(0)
    peer_name = "hyperlight 0.0.5"
    small, deep = (Both(convolutions(widths), image) for widths, image in ((SMALL, (3, 16, 16)), (DEEP, (3, 8, 8))))
    return [
        small.step(peer_name, target=1.0),
        deep.step(peer_name, target=1.0),
        small.each_its_own(peer_name, 32, target=32 / 3),
        small.beside_one(32, target=1 / 3),
        small.fixed(peer_name, target=1.3),
    ]


SMALL, DEEP = (16, 32, 32, 32), (32,) * 20


def convolutions(widths: tuple[int, ...]) -> nn.Module:
    """3x3 convolutions and LeakyReLUs, average pooling, a linear layer."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip((3, *widths), widths):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.LeakyReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


class Both:
    """One network, driven by ours and by the peer's hypernetwork with the same weights."""

    def __init__(self, net: nn.Module, image: tuple[int, ...]) -> None:
        self.image, self.layers = image, sum(isinstance(module, nn.Conv2d) for module in net.modules())
        self.ours: HyperDriven = hypernetize(net, hidden=HIDDEN)
        theirs = copy.deepcopy(net)
        modules = hyperlight.find_modules_of_type(theirs, [nn.Conv2d, nn.Linear])
        self.primary = hyperlight.hypernetize(theirs, modules=modules)
        self.hyper = hyperlight.HyperNet(
            input_shapes={"gamma": (1,)}, output_shapes=self.primary.external_shapes(), hidden_sizes=list(HIDDEN)
        )
        hyper = self.ours.hyper
        linears = [module for module in self.hyper.backbone if isinstance(module, nn.Linear)]
        with torch.no_grad():
            for mine, other in zip((hyper.trunk[0], hyper.trunk[2]), linears):
                other.load_state_dict(mine.state_dict())
            linears[-1].weight.copy_(hyper.head.weight)
            linears[-1].bias.copy_(hyper.flat_theta0)

    def _predict(self, x: Tensor, gamma: Tensor) -> Tensor:
        with self.primary.using_externals(self.hyper(gamma=gamma)):
            return self.primary(x)

    def _pair(
        self, title: str, ours: Callable[[], Tensor], peer: Callable[[], Tensor], name: str, target: float
    ) -> Pair:
        """Value and gradients of both, of the layers whose order is the same."""

        def trained(predict: Callable[[], Tensor], parameters: list[nn.Parameter]) -> Callable[[], Any]:
            def run() -> Any:
                y = predict()
                return y, torch.autograd.grad(y.square().mean(), parameters)

            return run

        # The head's bias is theirs, theta_0 ours; both come last.
        mine = [*self.ours.hyper.trunk.parameters(), self.ours.hyper.head.weight, self.ours.hyper.flat_theta0]
        return Pair(title, trained(ours, mine), trained(peer, [*self.hyper.backbone.parameters()]), name, target, 1e-3)

    def step(self, name: str, target: float) -> Pair:
        """Forward and backward pass of a batch with one gamma."""
        x, gamma = torch.randn(16, *self.image), torch.tensor([0.3])
        return self._pair(
            f"training step, {self.layers} convolutions, one gamma, batch 16",
            lambda: self.ours(x, gamma=gamma),
            lambda: self._predict(x, gamma),
            name,
            target,
        )

    def each_its_own(self, name: str, batch: int, target: float) -> Pair:
        """A gamma a sample, for which the peer's authors advise a loop that accumulates gradients."""
        x, gammas = torch.randn(batch, *self.image), torch.rand(batch, 1)
        return self._pair(
            f"training step, {self.layers} convolutions, {batch} gammas, one a sample",
            lambda: self.ours(x, gamma=gammas),
            lambda: torch.cat([self._predict(x[i : i + 1], gammas[i]) for i in range(batch)]),
            name,
            target,
        )

    def beside_one(self, batch: int, target: float) -> Pair:
        """What a gamma a sample costs beside one gamma for all: at most three times as much."""
        x, gammas = torch.randn(batch, *self.image), torch.rand(batch, 1)
        parameters = [*self.ours.parameters()]

        def step(gamma: Tensor) -> Any:
            return torch.autograd.grad(self.ours(x, gamma=gamma).square().mean(), parameters)

        return Pair(
            f"training step, {self.layers} convolutions, {batch} gammas, one a sample",
            lambda: step(gammas),
            lambda: step(gammas[0]),
            "the same step with one gamma",
            target,
            tolerance=None,
        )

    def fixed(self, name: str, target: float) -> Pair:
        """Evaluation again and again at one gamma."""
        x, gamma = torch.randn(1, *self.image), torch.tensor([0.3])
        ours = copy.deepcopy(self.ours).eval()

        @torch.no_grad()
        def mine() -> Tensor:
            return ours(x, gamma=gamma)

        @torch.no_grad()
        def theirs() -> Tensor:
            return self._predict(x, gamma)

        return Pair(f"inference, {self.layers} convolutions, the same gamma, batch 1", mine, theirs, name, target)

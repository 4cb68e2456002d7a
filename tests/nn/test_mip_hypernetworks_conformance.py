"""Hypernetworks and layers with external weights through the shared checks of all layers."""

from __future__ import annotations

import pytest
import torch
from conformance import check_compiles, check_layer
from torch import Tensor, nn

from lathe.nn.mip_hypernetworks import (
    HyperConv1d,
    HyperConv2d,
    HyperConv3d,
    HyperDriven,
    HyperLinear,
    HyperMorph2d,
    HyperNetwork,
    ScaleSpaceResize,
    hypernetize,
)


class AtGamma(nn.Module):
    """A driven layer at one gamma, which it keeps as a buffer: a layer of one input, as the checks want them."""

    def __init__(self, driven: HyperDriven, gammas: int | None = None) -> None:
        super().__init__()
        self.driven = driven
        self.register_buffer("gamma", torch.full((1,) if gammas is None else (gammas, 1), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        gamma = self.gamma if self.gamma.ndim == 1 else self.gamma[: len(x)]
        return self.driven(x, gamma=gamma)


class Flat(nn.Module):
    """All predictions for rows of gamma as one tensor."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.hyper = HyperNetwork(2, {"w": (3, 2), "b": (3,)}, (6, 5), **options)

    def forward(self, gamma: Tensor) -> Tensor:
        return self.hyper.flat(gamma=gamma)


class Registers(nn.Module):
    """Moves the first channel onto the second."""

    def __init__(self) -> None:
        super().__init__()
        self.morph = HyperMorph2d(hidden=(4,))

    def forward(self, pair: Tensor) -> Tensor:
        return self.morph(pair[:, :1], pair[:, 1:], gamma=0.3).moved


class Resizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.resize = ScaleSpaceResize()

    def forward(self, x: Tensor) -> Tensor:
        return self.resize(x, 0.6)


def like(layer: nn.Module) -> AtGamma:
    ours = {nn.Linear: HyperLinear, nn.Conv1d: HyperConv1d, nn.Conv2d: HyperConv2d, nn.Conv3d: HyperConv3d}
    return AtGamma(hypernetize(ours[type(layer)].like(layer), hidden=(4, 5)))


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_external_linear_layers_do_what_every_layer_does():
    x = random(3, 8)
    check_layer(lambda: like(nn.Linear(8, 4)), x, wrong_inputs=[x[:, :7], x[0, 0]])


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_external_convolutions_do_what_every_layer_does(axes):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    x = random(2, 4, *(5, 4, 3)[:axes])
    wrong = [x[:, :3], x[0, 0], x[None, None]]
    check_layer(lambda: like(conv(4, 6, 3, 2, 1, groups=2)), x, wrong_inputs=wrong)


@pytest.mark.parametrize("options", [{}, {"head_rank": 2}, {"head_chunk": 2}, {"adapter_rank": 1}], ids=str)
def test_networks_with_a_gamma_do_what_every_layer_does(options):
    x = random(3, 2, 5, 5)

    def make() -> AtGamma:
        return AtGamma(hypernetize(nn.Sequential(nn.Conv2d(2, 3, 3), nn.GELU(), nn.GroupNorm(3, 3)), "*", **options))

    check_layer(make, x, gradcheck_input=x[:2, :, :4, :4])


def test_networks_with_a_gamma_for_each_sample_do_what_every_layer_does():
    x = random(3, 8)

    def make() -> AtGamma:
        return AtGamma(hypernetize(nn.Sequential(nn.Linear(8, 4), nn.Tanh()), hidden=(4,)), gammas=3)

    check_layer(make, x, wrong_inputs=[torch.cat([x, x])], export=False)


@pytest.mark.parametrize("options", [{}, {"head_rank": 2}, {"head_chunk": 2}, {"adapter_rank": 1}], ids=str)
@pytest.mark.parametrize("encoding", ["mip", "none"])
def test_hypernetworks_do_what_every_layer_does(encoding, options):
    gammas = torch.rand(3, 2, generator=torch.Generator().manual_seed(0))
    wrong = [gammas[:, :1], gammas[0, 0], gammas[None]]
    check_layer(
        lambda: Flat(encoding=encoding, **options), gammas, wrong_inputs=wrong, gradcheck_input=0.1 + 0.8 * gammas
    )


def test_registration_and_resizing_do_what_every_layer_does():
    pair = random(2, 2, 9, 7)
    # Gradients at the kinks of max-pooling and of bilinear reading are in the tests of the tasks.
    check_layer(Registers, pair, gradcheck=False, bfloat16_tolerance=0.2)
    check_layer(Resizes, pair, wrong_inputs=[pair[0]])


@pytest.mark.compile
def test_driven_networks_and_hypernetworks_compile():
    check_compiles(Flat, torch.rand(3, 2))
    make = lambda: AtGamma(hypernetize(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh()), "*"))  # noqa: E731
    check_compiles(make, random(3, 2, 5, 5))

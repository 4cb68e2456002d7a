"""Every layer of scalable kernels through the shared checks, and by `swap` into networks that were not made for it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conformance import check_compiles, check_layer
from networks import language_model, residual_network, trains, vision_transformer
from torch import nn

from lathe.core.surgery import swap
from lathe.nn.scalable_kernels import (
    URF,
    ArcCosFeatures,
    BottleneckAdapter,
    BundledNetwork,
    SNNKAdapter,
    SNNKConv1x1,
    SNNKLinear,
)

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(2, 8, 3, 4, generator=torch.Generator().manual_seed(0))
LAYERS = [
    {},
    {"activation": "cos", "bias": False},
    {"activation": "gelu", "M": 0.0},
    {"activation": "tanh", "orthogonal": "hadamard"},
    {"activation": "relu2", "orthogonal": False},
]
ADAPTERS = [{}, {"activation": "sigmoid"}, {"bottleneck": 3}, {"norm": "before"}, {"norm": "after", "init": "bert"}]


@pytest.mark.parametrize("options", LAYERS)
def test_linear_layers_do_what_every_layer_does(options):
    make = lambda: SNNKLinear(8, 5, num_features=6, **options)  # noqa: E731
    check_layer(make, X, wrong_inputs=[X[:, :7], X[0, 0]])
    check_layer(make, X[:, None].expand(3, 2, 8), gradcheck=False, export=False)


def test_pointwise_convolutions_do_what_every_layer_does():
    make = lambda: SNNKConv1x1(8, 5, stride=(2, 1), num_features=6)  # noqa: E731
    check_layer(make, IMAGE, wrong_inputs=[IMAGE[:, :7], X, X[0, 0]])


@pytest.mark.parametrize("options", ADAPTERS)
def test_adapters_do_what_every_layer_does(options):
    check_layer(lambda: SNNKAdapter(8, num_features=6, **options), X, wrong_inputs=[X[:, :7], X[0, 0]])


def test_bottleneck_adapters_do_what_every_layer_does():
    check_layer(lambda: BottleneckAdapter(8, bottleneck=3), X, wrong_inputs=[X[:, :7], X[0, 0]])


def test_bundled_networks_and_feature_maps_do_what_every_layer_does():
    def make():
        return BundledNetwork([ArcCosFeatures(8, 6), URF("tanh", 6, 5, M="auto")], torch.ones(3, 10), torch.ones(3))

    check_layer(make, X, wrong_inputs=[X[:, :7], X[0, 0]])


@pytest.mark.compile
def test_layers_and_adapters_compile():
    check_compiles(lambda: SNNKLinear(8, 5, num_features=6, activation="gelu"), X)
    check_compiles(lambda: SNNKAdapter(8, num_features=6, orthogonal="hadamard"), X)


# --- networks not made for them ---


@pytest.mark.parametrize("make", [residual_network, vision_transformer, language_model])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_they_replace_the_linear_layers_of_any_network(make, activation):
    net, x = make()
    linear = partial(SNNKLinear.like, num_features=8, activation=activation)
    rules = {nn.Linear: linear, nn.Conv2d: SNNKConv1x1.like}
    if make is language_model:
        matrix = type(net.transformer.h[0].mlp.c_fc)
        rules[matrix] = lambda old: linear(nn.Linear(*old.weight.shape))
    report = swap(net, rules, where=lambda name: name != "lm_head", example_input=x)
    assert len(report.replaced) == {"residual_network": 1, "vision_transformer": 13, "language_model": 8}[make.__name__]
    trains(net, x)


def test_pointwise_convolutions_of_a_bottleneck_are_replaced_with_their_activation():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.LazyLinear(2)
    )
    x = torch.randn(4, 3, 8, 8)
    net(x)
    report = swap(net, {(nn.Conv2d, nn.ReLU): lambda conv, act: SNNKConv1x1.like(conv, num_features=8)})
    assert [each.name for each in report.replaced] == ["1"]
    trains(net, x)

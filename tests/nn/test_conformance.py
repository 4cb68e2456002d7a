"""Every layer of `lathe.nn` through the shared checks, and by `swap` into networks that were not made for it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conformance import check_compiles, check_layer
from networks import language_model, residual_network, trains, vision_transformer
from torch import nn

from lathe.core.surgery import swap
from lathe.nn import evonorm, hypercomplex_layers

NORMS = [getattr(evonorm, f"EvoNorm{name}") for name in ("B0", "B1", "B2", "S0", "S1", "S2")]
CONVOLUTIONS = [getattr(hypercomplex_layers, f"PHConv{way}{axes}d") for way in ("", "Transpose") for axes in (1, 2, 3)]
IMAGE = torch.randn(3, 8, 5, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layer", NORMS)
def test_evonorm_layers_do_what_every_layer_does(layer):
    wrong = [IMAGE[:, :7], IMAGE[0, 0, 0]]
    check_layer(lambda: layer(8), IMAGE, wrong_inputs=wrong, gradcheck_input=IMAGE[:2, :, :2, :3])


@pytest.mark.parametrize("options", [{"nonlinear": False}, {"nonlinear": False, "linear": "group"}, {"group_size": 2}])
def test_evonorm_variants_do_what_every_layer_does(options):
    check_layer(lambda: evonorm.EvoNormS0(8, **options), IMAGE, gradcheck_input=IMAGE[:2, :, :2, :3])


@pytest.mark.parametrize("options", [{}, {"algebra": "quaternion"}, {"rank": 1, "terms": 3}])
def test_hypercomplex_linear_layers_do_what_every_layer_does(options):
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    make = lambda: hypercomplex_layers.PHLinear(8, 12, n=4, **options)  # noqa: E731
    check_layer(make, x, wrong_inputs=[x[:, :7], x[0, 0]])
    check_layer(make, x[:, None].expand(3, 2, 8))


@pytest.mark.parametrize("layer", CONVOLUTIONS)
def test_hypercomplex_convolutions_do_what_every_layer_does(layer):
    axes = int(layer.__name__[-2])
    x = torch.randn(2, 8, *(5, 4, 3)[:axes], generator=torch.Generator().manual_seed(0))
    make = lambda: layer(8, 4, 3, stride=2, padding=1, groups=2, n=2)  # noqa: E731
    check_layer(make, x, wrong_inputs=[x[:, :7], x[0, 0], x[None, None]])


@pytest.mark.compile
@pytest.mark.parametrize("layer", [evonorm.EvoNormB0, evonorm.EvoNormS0, evonorm.EvoNormS2])
def test_evonorm_layers_compile(layer):
    check_compiles(lambda: layer(8), IMAGE)


@pytest.mark.compile
def test_hypercomplex_layers_compile():
    check_compiles(lambda: hypercomplex_layers.PHLinear(8, 12, n=4), IMAGE[:, :, 0, 0])
    check_compiles(lambda: hypercomplex_layers.PHConv2d(8, 4, 3, n=4), IMAGE)


# --- networks not made for them ---


@pytest.mark.parametrize("layer", NORMS)
def test_evonorm_replaces_norm_and_activation_of_a_residual_network(layer):
    net, x = residual_network()
    report = swap(net, {(nn.BatchNorm2d, nn.ReLU): lambda norm, relu: layer.like(norm)})
    assert len(report.replaced) == 4
    assert not any(isinstance(module, (nn.BatchNorm2d, nn.ReLU)) for module in net.modules())
    trains(net, x)


@pytest.mark.parametrize("make", [residual_network, vision_transformer, language_model])
def test_hypercomplex_layers_replace_the_weights_of_any_network(make):
    net, x = make()
    before = sum(parameter.numel() for parameter in net.parameters())
    rules = {
        nn.Linear: partial(hypercomplex_layers.PHLinear.like, n=2, on_indivisible="skip"),
        nn.Conv2d: partial(hypercomplex_layers.PHConv2d.like, n=2, on_indivisible="skip"),
    }
    report = swap(net, rules, where=lambda name: name != "lm_head", example_input=x)
    assert len(report.replaced) == {"residual_network": 5, "vision_transformer": 13, "language_model": 0}[make.__name__]
    assert sum(parameter.numel() for parameter in net.parameters()) < before or make is language_model
    trains(net, x)


def test_the_matrices_of_a_language_model_become_hypercomplex():
    net, x = language_model()
    conv1d = type(net.transformer.h[0].mlp.c_fc)
    like = hypercomplex_layers.PHLinear.like

    def rule(matrix):
        inputs, outputs = matrix.weight.shape
        return like(nn.Linear(inputs, outputs), n=4)

    report = swap(net, {conv1d: rule})
    assert len(report.replaced) == 8
    trains(net, x)


def test_trained_hypercomplex_layers_with_all_terms_change_no_output():
    for make in (residual_network, vision_transformer):
        net, x = make()
        net.eval()
        answer = lambda net=net, x=x: getattr(net(x), "logits", None) if make is vision_transformer else net(x)  # noqa: B023, E731
        before = answer()
        rules = {nn.Linear: partial(hypercomplex_layers.PHLinear.from_trained, n=2, terms=4, on_indivisible="skip")}
        assert swap(net, rules).replaced
        torch.testing.assert_close(answer(), before, rtol=1e-4, atol=1e-5)

"""Every layer through the shared checks, generated convolutions against torch's, and both in networks of others."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conformance import check_compiles, check_layer
from networks import language_model, residual_network, trains, vision_transformer
from torch import nn
from torch.nn import functional as F

from lathe.core.surgery import swap
from lathe.nn.hyper_zzw import (
    RGU,
    BatchStd,
    ContextSlowNet,
    GroupInstanceBatchStd,
    HyperChannelInteraction,
    HyperConv1d,
    HyperConv2d,
    HyperInteraction,
    LocalBranch,
    SFNEBlock,
    SlowNet,
    Terminator,
)

# Half precision cannot hold the frequencies of omega0 = 2000; at this scale a rounded one is still a smooth kernel's.
SLOW = {"omega0": 0.02}
SMALL = {"hidden": 6, "local_hidden": 4, "channel_hidden": 4, "interaction_hidden": 4, "local_sizes": (3, 5), **SLOW}
IMAGE = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
WRONG = [IMAGE[:, :3], IMAGE[0], IMAGE[:, :, :, 0]]


@pytest.mark.parametrize("options", [{}, {"running": True}])
def test_standardisations_do_what_every_layer_does(options):
    check = partial(check_layer, example_input=IMAGE, wrong_inputs=WRONG[:1], gradcheck_input=IMAGE[:2, :, :2, :2])
    check(lambda: BatchStd(4, **options))
    check(lambda: GroupInstanceBatchStd(4, 4, **options))
    check_layer(lambda: GroupInstanceBatchStd(4, 2, **options), IMAGE[..., 0])


@pytest.mark.parametrize("pixel_bias", [True, False])
def test_gates_do_what_every_layer_does(pixel_bias):
    check = partial(check_layer, example_input=IMAGE, gradcheck_input=IMAGE[:2])
    check(lambda: RGU(4, 5, pixel_bias=pixel_bias), wrong_inputs=[*WRONG, IMAGE[..., :4]])
    check(lambda: HyperChannelInteraction(4, hidden=6, **SLOW), wrong_inputs=WRONG[:1])
    check(
        lambda: HyperInteraction(4, 5, hidden=4, spatial_hidden=6, pixel_bias=pixel_bias, **SLOW),
        wrong_inputs=[*WRONG, IMAGE[..., :4]],
    )


# The renormalisation stops gradients, so that finite differences see more of a contextual kernel than gradients do:
# what it lets through is checked in test_hyper_zzw.py.
@pytest.mark.parametrize("options", [{}, {"per_sample": True}, {"running": True}])
def test_local_branches_do_what_every_layer_does(options):
    check_layer(lambda: LocalBranch(4, 3, hidden=4, **SLOW, **options), IMAGE, wrong_inputs=WRONG, gradcheck=False)
    check_layer(lambda: LocalBranch(4, 5, data_dim=1, hidden=4, **SLOW, **options), IMAGE[..., 0], gradcheck=False)


# Chains of products of sines, gates and matrices in bfloat16, standardised: their errors are not small.
@pytest.mark.parametrize("options", [{}, {"running": True}])
def test_blocks_do_what_every_layer_does(options):
    make = lambda: SFNEBlock(4, 3, 5, **SMALL, **options)  # noqa: E731
    check_layer(make, IMAGE, wrong_inputs=WRONG, gradcheck=False, bfloat16_tolerance=0.3)


@pytest.mark.parametrize("options", [{"per_sample": True}, {"mode": "convolution", "resize": True}])
def test_networks_do_what_every_layer_does(options):
    make = lambda: Terminator(4, 3, 5, (3, 2), dropout=(0, 0.1), **(SMALL | {"local_sizes": (3,)}), **options)  # noqa: E731
    check_layer(make, IMAGE, wrong_inputs=WRONG, gradcheck=False, export=False, bfloat16_tolerance=0.3)


@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "padding": 1, "groups": 2}, {"per_sample": True, "padding_mode": "reflect"}, {"running": True}],
)
def test_generated_convolutions_do_what_every_layer_does(options):
    make = lambda: HyperConv2d(4, 6, 3, hidden=4, **SLOW, **options)  # noqa: E731
    check_layer(make, IMAGE, wrong_inputs=WRONG, gradcheck=False)
    make = lambda: HyperConv1d(4, 6, 3, hidden=4, **SLOW, **options)  # noqa: E731
    check_layer(make, IMAGE[..., 0], wrong_inputs=[IMAGE], gradcheck=False)


@pytest.mark.parametrize("size", [3, 17])
def test_convolutions_without_context_have_true_gradients(size):
    make = lambda: HyperConv2d(2, 4, size, context=False, hidden=4, layers=1, **SLOW)  # noqa: E731
    check_layer(
        make, torch.randn(2, 2, 18, 19), gradcheck_input=torch.randn(1, 2, 18, 18) if size > 3 else IMAGE[:1, :2]
    )


@pytest.mark.compile
def test_layers_compile():
    check_compiles(lambda: HyperConv2d(4, 6, 3, hidden=4, **SLOW), IMAGE)
    check_compiles(lambda: GroupInstanceBatchStd(4, 2, running=True), IMAGE)


@pytest.mark.compile
def test_a_network_compiles_into_one_graph():
    net = Terminator(1, 3, 6, (12, 2), dropout=(0, 0), **SMALL)
    x = torch.randn(3, 1, 6, 6)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-4)
    parameters = [*net.parameters()]
    gradients = [torch.autograd.grad(each(x).square().sum() + net.slow_loss(), parameters) for each in (net, compiled)]
    for expected, found in zip(*gradients):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


# --- generated convolutions ---


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": (1, 2), "dilation": 2},
        {"padding": 1, "padding_mode": "circular", "bias": False},
        {"groups": 2, "padding": "valid"},
        {"padding": "same", "dilation": 2},
    ],
)
def test_a_generated_convolution_is_a_mixture_and_a_depthwise_convolution(options):
    plain = nn.Conv2d(4, 6, (3, 5), dtype=torch.float64, **options)
    layer = HyperConv2d.like(plain, hidden=4, **SLOW)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(2, 4, 9, 10, dtype=torch.float64)
    y = F.conv2d(x, layer.weight, groups=layer.groups)
    depthwise = nn.Conv2d(6, 6, (3, 5), dtype=torch.float64, **(options | {"groups": 6}))
    depthwise.weight.data, bias = layer.slow_net(y).detach(), options.get("bias", True)
    if bias:
        depthwise.bias.data = layer.bias.detach()
    torch.testing.assert_close(layer(x), depthwise(y))
    assert layer(x).shape == plain(x).shape


@pytest.mark.parametrize("context", [True, False])
def test_long_kernels_give_the_same_by_fft(context, monkeypatch):
    from lathe.nn.hyper_zzw import convolutions

    layers = [
        (HyperConv1d(3, 4, 129, context=context, hidden=4, omega0=3.0), torch.randn(2, 3, 150)),
        (HyperConv2d(3, 4, 17, context=context, hidden=4, omega0=3.0), torch.randn(2, 3, 20, 21)),
        (HyperConv1d(3, 4, 129, hidden=4, per_sample=True, omega0=3.0), torch.randn(2, 3, 150)),
    ]
    by_fft = [layer(x) for layer, x in layers]
    monkeypatch.setattr(convolutions, "_LONG", {1: 10**9, 2: 10**9})
    for (layer, x), found in zip(layers, by_fft):
        torch.testing.assert_close(found, layer(x), rtol=1e-3, atol=1e-4)


def test_replacements_have_shape_dtype_and_mode_and_may_grow():
    conv = nn.Conv2d(4, 8, 3, padding=1, dtype=torch.float64).eval()
    layer = HyperConv2d.like(conv)
    assert (layer.weight.dtype, layer.training) == (torch.float64, False)
    large = HyperConv2d.like(conv, kernel_size=9)
    assert large.padding == [4, 4]
    count = lambda module: sum(parameter.numel() for parameter in module.parameters())  # noqa: E731
    assert count(large) - count(layer) == 81 - 9
    x = torch.randn(2, 4, 10, 10, dtype=torch.float64)
    assert large(x).shape == layer(x).shape == conv(x).shape
    assert HyperConv2d.like(nn.Conv2d(4, 8, 1)) is None
    with pytest.raises(ValueError, match=r"kernel_size must differ from \(3, 3\) by even numbers.*got \(4, 4\)"):
        HyperConv2d.like(conv, kernel_size=4)
    with pytest.raises(TypeError, match=r"HyperConv2d replaces nn\.Conv2d, got Conv1d"):
        HyperConv2d.like(nn.Conv1d(4, 8, 3))


@pytest.mark.parametrize("context", [True, False])
def test_a_trained_convolution_that_is_separable_is_taken_over_exactly(context):
    conv = nn.Conv2d(4, 8, 3, padding=1, dtype=torch.float64)
    with torch.no_grad():
        conv.weight.copy_(torch.randn(8, 4, 1, 1) * torch.randn(8, 1, 3, 3))
    layer = HyperConv2d.from_trained(conv, context=context, omega0=2.0)
    assert layer.relative_error < 1e-6
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-5, atol=1e-5)


def test_what_a_trained_convolution_loses_is_told():
    conv = nn.Conv2d(4, 8, 3, dtype=torch.float64)
    layer = HyperConv2d.from_trained(conv, omega0=2.0)
    values = torch.linalg.svdvals(conv.weight.detach().flatten(2))
    expected = float(values[:, 1:].norm() / values.norm())
    assert layer.relative_error == pytest.approx(expected, rel=1e-6)
    one = HyperConv1d.from_trained(nn.Conv1d(1, 8, 5), omega0=2.0)
    assert one.relative_error < 1e-4  # one input channel is separable
    assert HyperConv2d.from_trained(nn.Conv2d(4, 8, 1)) is None
    with pytest.raises(ValueError, match="kernel_size must stay"):
        HyperConv2d.from_trained(conv, kernel_size=5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"groups": 3}, "groups must divide 4 and 8 channels, got 3"),
        ({"stride": 2}, "padding='same' needs stride 1"),
        ({"padding": "full"}, "padding must be 'same', 'valid' or numbers, got 'full'"),
        ({"padding": -1}, "numbers from 0, got -1"),
        ({"padding_mode": "mirror"}, "padding_mode must be zeros"),
        ({"context": False, "running": True}, "context=False leaves out"),
    ],
)
def test_convolutions_that_cannot_work_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        HyperConv2d(4, 8, 3, **options)


# --- networks not made for them ---


@pytest.mark.parametrize("options", [{}, {"per_sample": True}, {"context": False, "omega0": 3.0}, {"kernel_size": 7}])
def test_generated_convolutions_replace_those_of_a_residual_network(options):
    net, x = residual_network()
    rules = {nn.Conv2d: partial(HyperConv2d.like, hidden=8, **({"omega0": 10.0} | options))}
    report = swap(net, rules, where=lambda name: name != "0" or "kernel_size" not in options)
    assert len(report.replaced) == (5 if "kernel_size" not in options else 4)
    trains(net, x)


def test_group_standardisation_replaces_the_norms_of_a_residual_network():
    net, x = residual_network()
    with pytest.warns(UserWarning, match="8 channels do not divide into 12 groups"):
        report = swap(net, {nn.BatchNorm2d: GroupInstanceBatchStd.like})
    assert len(report.replaced) == 4
    trains(net, x)
    net.eval()
    torch.testing.assert_close(net(x)[:1], net(x[:1]))


@pytest.mark.parametrize("make", [vision_transformer, language_model])
def test_networks_without_what_they_replace_are_left_alone_and_say_so(make):
    net, x = make()
    patches = {"vision_transformer": 1, "language_model": 0}[make.__name__]
    rules = {
        nn.Conv2d: partial(HyperConv2d.like, hidden=8, omega0=10.0),
        nn.Conv1d: HyperConv1d.like,
        nn.BatchNorm2d: GroupInstanceBatchStd.like,
    }
    report = swap(net, rules)
    assert len(report.replaced) == patches  # the embedding of patches is a strided convolution
    trains(net, x)


class AsLayer(nn.Module):
    """A slow net takes no input, and a contextual one gives a kernel: here a layer that scales it."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        kernel = self.net(x) if isinstance(self.net, ContextSlowNet) else self.net()
        return x.flatten(1).sum(1)[:, None] * kernel.flatten()


def test_slow_nets_do_what_every_layer_does():
    check_layer(lambda: AsLayer(SlowNet(2, 3, 4, 4, **SLOW)), IMAGE)
    check_layer(lambda: AsLayer(ContextSlowNet(2, 3, 4, 4, **SLOW)), IMAGE, gradcheck=False)

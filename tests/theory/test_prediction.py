"""What `predict` says of a network: against closed forms, the network drawn many times, and the kernel library."""

from __future__ import annotations

import itertools
import math

import networks
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lathe
from lathe.theory.deep_learning_theory import NoCriticalPoint, kernel_recursion, susceptibilities
from lathe.theory.prediction import UnsupportedNetwork, critical_init_, predict


def mlp(act, depth, width, C_W=None, n_in=20, n_out=10):
    sizes = [n_in, *[width] * depth]
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), act())]
    net = nn.Sequential(*layers, nn.Linear(width, n_out))
    if C_W is not None:
        for layer in net:
            if isinstance(layer, nn.Linear):
                # Exactly that variance, so that closed forms hold exactly.
                weight = torch.randn_like(layer.weight)
                layer.weight.data = weight * (C_W / layer.in_features / weight.square().mean()).sqrt()
                layer.bias.data.zero_()
    return net


def agrees(found, most=4.0, relative=0.06):
    """Each layer within four standard errors, or six percent."""
    for layer in found.layers:
        for told, measured, z in (
            (layer.kernel, layer.measured_kernel, layer.kernel_z),
            (layer.gradient, layer.measured_gradient, layer.gradient_z),
        ):
            if measured is not None and z is not None:
                assert abs(z) < most or abs(measured / told - 1) < relative, (layer.name, told, measured, z)


class Wrapped(nn.Module):
    """`function(x, *parts)` as a network."""

    def __init__(self, function, *parts):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, x):
        return self.function(x, *self.parts)


# --- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("act", "half"), [(nn.Identity, 1.0), (nn.ReLU, 0.5)])
def test_linear_and_relu_kernels_are_products(act, half):
    x = torch.randn(3, 20)
    found = predict(mlp(act, 4, 32, C_W=1.5), x, draws=0)
    size = 1.5 * float(x.double().square().mean())
    for layer in found.layers:
        assert layer.kernel == pytest.approx(size, rel=1e-5)
        size *= 1.5 * half
    # Backwards: the readout's ten outputs have gradients of one.
    power = 10.0
    for layer in reversed(found.layers):
        assert layer.gradient_norm**2 == pytest.approx(power, rel=1e-5)
        power *= 1.5 * half
    assert all(layer.chi_parallel == pytest.approx(1.5 * half, rel=1e-5) for layer in found.layers[1:])
    assert all(layer.chi_perpendicular == pytest.approx(1.5 * half, rel=1e-5) for layer in found.layers[1:])
    # Fluctuations are the first order of the exact product of 1 + nu / n.
    nu = {1.0: 2, 0.5: 5}[half]
    assert [layer.fluctuation for layer in found.layers] == pytest.approx([nu * i / 32 for i in range(5)], abs=1e-4)
    assert found.depth_to_width.ratio == pytest.approx(4 / 32)


@pytest.mark.parametrize(("act", "name"), [(nn.Tanh, "tanh"), (nn.GELU, "gelu"), (nn.SiLU, "swish")])
def test_kernels_and_susceptibilities_are_the_recursions(act, name):
    x = torch.randn(3, 20)
    found = predict(mlp(act, 3, 24, C_W=1.7), x, draws=0)
    K = kernel_recursion(x.double(), 4, name, 0.0, 1.7)
    torch.testing.assert_close(found.kernel, K.diagonal(dim1=1, dim2=2), rtol=1e-5, atol=0)
    scale = K.diagonal(dim1=1, dim2=2).sqrt()
    off = K / scale.unsqueeze(2) / scale.unsqueeze(1)
    assert found.layers[2].correlation == pytest.approx(float(off[2][[0, 0, 1], [1, 2, 2]].mean()), abs=1e-4)
    par, perp, _ = susceptibilities(K[1].diagonal(), name, 0.0, 1.7)
    one = predict(mlp(act, 3, 24, C_W=1.7), x[:1], draws=0)
    assert one.layers[2].chi_parallel == pytest.approx(float(par[0]), rel=1e-4)
    assert one.layers[2].chi_perpendicular == pytest.approx(float(perp[0]), rel=1e-4)


def test_convolutions_are_those_of_the_kernel_library():
    kernels = pytest.importorskip("lathe.theory.kernels")
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16 * 9, 5),
    )  # fmt: skip
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    default = {"weight_variance": 1 / 3}
    layers = [
        kernels.Conv(3, padding=1, bias_variance=1 / 81, **default), kernels.Activation("relu"),
        kernels.Conv(3, padding=1, bias_variance=1 / 432, **default), kernels.Activation("relu"),
        kernels.AvgPool(2), kernels.Flatten(), kernels.Dense(bias_variance=1 / 432, **default),
    ]  # fmt: skip
    told = kernels.Sequential(*layers)(x, kernels=("nngp",)).nngp
    found = predict(net.double(), x, draws=0)
    torch.testing.assert_close(found.kernel[-1], told.diagonal(), rtol=1e-9, atol=0)
    assert found.layers[-1].correlation == pytest.approx(float(told[0, 1] / told.diagonal().prod().sqrt()), abs=1e-9)


# --- the network itself -----------------------------------------------------------------------------------------------


def pre_norm_block(width):
    parts = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
    return Wrapped(lambda x, norm, up, down: x + down(F.gelu(up(norm(x)))), *parts)


def bare_block(width):
    parts = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
    return Wrapped(lambda x, a, b: x + 0.7 * b(F.relu(a(F.relu(x)))), *parts)


def post_activation_block(width):
    return Wrapped(lambda x, a, b: F.relu(x + b(F.relu(a(x)))), nn.Linear(width, width), nn.Linear(width, width))


NETWORKS = {
    "tanh": lambda: (mlp(nn.Tanh, 4, 128), torch.randn(3, 20)),
    "gelu": lambda: (mlp(nn.GELU, 3, 128), torch.randn(3, 20)),
    "pre-norm residual": lambda: (
        nn.Sequential(nn.Linear(20, 64), *[pre_norm_block(64) for _ in range(3)], nn.LayerNorm(64), nn.Linear(64, 4)),
        torch.randn(3, 20),
    ),
    "post-activation residual": lambda: (
        nn.Sequential(nn.Linear(20, 96), nn.ReLU(), *[post_activation_block(96) for _ in range(2)], nn.Linear(96, 4)),
        torch.randn(2, 20),
    ),
    "convolutions": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 48, 3, stride=2, padding=1), nn.ReLU(), bare_block(48), nn.AvgPool2d(2),
            nn.Flatten(), nn.Linear(48 * 9, 4),
        ),
        torch.randn(2, 3, 12, 12),
    ),
    "swiglu and groups": lambda: (
        nn.Sequential(
            nn.Linear(20, 128),
            Wrapped(lambda x, a, b: F.silu(a(x)) * b(x), nn.Linear(128, 128), nn.Linear(128, 128)),
            nn.Linear(128, 128), nn.GroupNorm(2, 128), nn.Dropout(0.2), nn.Linear(128, 8),
        ),
        torch.randn(3, 20),
    ),
    "batch norm": lambda: (
        nn.Sequential(nn.Linear(20, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 4)),
        torch.randn(16, 20),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_drawn_networks_do_what_is_predicted(name):
    net, x = NETWORKS[name]()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    modes = [module.training for module in net.eval().modules()]
    agrees(predict(net, x, draws=40, seed=1))
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes


def test_max_pooling_and_batch_normalised_images_are_close():
    net = nn.Sequential(
        nn.Conv2d(3, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(48, 48, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 4),
    )  # fmt: skip
    found = predict(net, torch.randn(8, 3, 8, 8), draws=40)
    agrees(found, relative=0.15)
    assert any("max pooling" in note for note in found.notes)


def test_the_networks_of_other_tests_are_read():
    net, x = networks.residual_network()
    found = predict(net, x, draws=0)
    assert [layer.kind for layer in found.layers].count("sum") == 2
    assert found.criticality.verdict == "steady"
    net, x = networks.language_model()
    names = [layer.name for layer in predict(net, x, draws=0).layers]
    assert "transformer.h.1.mlp.c_fc" in names and "lm_head" in names
    with pytest.raises(UnsupportedNetwork, match=r"vit.embeddings.*class tokens"):
        predict(*networks.vision_transformer())


def test_a_transformer_layer_is_followed_with_a_say_so():
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, norm_first=True, batch_first=True, activation="gelu")
    found = predict(layer, torch.randn(2, 5, 64), draws=30)
    agrees(found, relative=0.1)
    assert any("attention" in note for note in found.notes)


# --- criticality ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "C_W", "verdict", "chi"),
    [
        (nn.ReLU, 2.0, "critical", 1.0),
        (nn.ReLU, 1.0, "ordered", 0.5),  # Xavier: half a layer
        (nn.ReLU, 3.0, "chaotic", 1.5),
        (nn.Tanh, 1.0, "critical", 1.0),
        (nn.Tanh, 0.8, "ordered", 0.8),
        (nn.Identity, 1.0, "critical", 1.0),
    ],
)
def test_known_initialisations_get_their_verdict(act, C_W, verdict, chi):
    found = predict(mlp(act, 6, 256, C_W=C_W), torch.randn(2, 20), draws=0).criticality
    assert found.verdict == verdict and found.critical == (verdict == "critical")
    assert found.chi == pytest.approx(chi, abs=2e-3)
    length = math.inf if verdict == "critical" else 1 / abs(math.log(chi))
    assert found.correlation_length == pytest.approx(length, rel=1e-2)


def test_tanh_with_large_weights_is_chaotic():
    assert predict(mlp(nn.Tanh, 4, 128, C_W=2.0), torch.randn(2, 20), draws=0).criticality.verdict == "chaotic"


@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU, nn.Tanh])
def test_critical_init_makes_it_critical(act, rng):
    net, x = mlp(act, 5, 256), torch.randn(2, 20)
    told = predict(net, x, draws=0).criticality
    assert told.verdict == "ordered" and all(change.needed for change in told.changes)
    assert critical_init_(net, x, generator=rng) == told.changes
    assert predict(net, x, draws=0).criticality.verdict == "critical"


def test_residual_branches_are_weighed_down(rng):
    def block():
        return Wrapped(lambda x, a, b: x + b(F.relu(a(F.relu(x)))), nn.Linear(64, 64), nn.Linear(64, 64))

    net, x = nn.Sequential(nn.Linear(20, 64), *[block() for _ in range(8)]), torch.randn(2, 20)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    assert predict(net, x, draws=0).criticality.verdict == "exploding"
    critical_init_(net, x, generator=rng)
    found = predict(net, x, draws=0)
    assert found.criticality.verdict == "steady" and found.criticality.gradient_growth < 4
    # Appendix B: a block multiplies by the plain layers' susceptibility plus one.
    assert found.layers[-1].chi_perpendicular == pytest.approx(1 + 1 / 8, rel=0.1)


def test_what_has_no_critical_point_is_told():
    net, x = mlp(nn.Sigmoid, 3, 32), torch.randn(2, 20)
    assert "no critical initialisation" in predict(net, x, draws=0).criticality.explanation
    with pytest.raises(NoCriticalPoint, match="sigmoid"):
        critical_init_(net, x)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_followed_is_named_with_what_to_do():
    with pytest.raises(UnsupportedNetwork, match=r"lstm: recurrent layers"):
        predict(nn.LSTM(4, 4), torch.randn(2, 3, 4))
    mixing = nn.Sequential(nn.Conv1d(4, 8, 1), nn.Linear(6, 6))
    with pytest.raises(UnsupportedNetwork, match=r"1: linear: a linear layer over positions"):
        predict(mixing, torch.randn(2, 4, 6))
    with pytest.raises(UnsupportedNetwork, match="leave the last softmax out"):
        predict(nn.Sequential(nn.Linear(4, 4), nn.LogSoftmax(-1)), torch.randn(2, 4))


@pytest.mark.parametrize("function", [lambda z: torch.exp(z.square()), torch.reciprocal, torch.tan])
def test_activations_without_a_second_moment_are_refused(function):
    net = Wrapped(lambda x, a, b: b(function(a(x))), nn.Linear(20, 16), nn.Linear(16, 2))
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    with pytest.raises(ValueError, match="no finite Gaussian second moment"):
        predict(net, torch.randn(2, 20), draws=0)


def test_bad_input_is_refused():
    net, x = mlp(nn.ReLU, 2, 16), torch.randn(2, 20)
    with pytest.raises(ValueError, match="kernel at '0' is zero"):
        predict(mlp(nn.ReLU, 2, 16, C_W=2.0), torch.zeros(2, 20), draws=0)
    with pytest.raises(ValueError, match="draws must be 0, or at least 2"):
        predict(net, x, draws=1)
    with pytest.raises(ValueError, match="does not run on example_input in '0'"):
        predict(net, torch.randn(2, 21))
    with pytest.raises(ValueError, match="infinite or NaN"):
        predict(net, torch.full((2, 20), float("nan")))
    with pytest.raises(ValueError, match="must hold a tensor"):
        predict(net, "x")
    with pytest.raises(ValueError, match="found none"):
        predict(nn.Sequential(nn.ReLU()), x)


def test_predict_is_at_the_front_door():
    assert lathe.predict is predict

"""Kernels read from modules, and empirical NTKs: against gradients by brute force, and both against each other."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lathe.theory.kernels import (
    Activation,
    AvgPool,
    Conv,
    Dense,
    Flatten,
    GlobalAvgPool,
    LayerNorm,
    Residual,
    Scale,
    Sequential,
    Sum,
    empirical_ntk,
    from_module,
)


def double(*shape: int, rng: torch.Generator) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=rng)


class Block(nn.Module):
    """A pre-activation block, with a convolution on the shortcut where it has a stride."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.short = nn.Conv2d(channels, channels, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.short(x) + 0.5 * self.second(torch.relu(self.first(F.relu(x))))


class ResNet(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.Sequential(Block(channels), Block(channels, 2))
        self.drop, self.head = nn.Dropout(), nn.Linear(channels, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.blocks(self.stem(x)))
        h = F.adaptive_avg_pool2d(h, 1)
        return self.head(self.drop(h.view(h.size(0), -1)))


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_sequential_network_is_read_layer_by_layer():
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding="same"), nn.GELU(), nn.AvgPool2d(2), nn.GroupNorm(1, 8), nn.Dropout(0.3)),
        *(nn.Conv2d(8, 8, (3, 2), (2, 1), padding_mode="circular", padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.LazyLinear(6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2, bias=False)),
    )
    model(torch.zeros(1, 3, 8, 8))
    found = from_module(model, weight_variance={"0": 1.5}, bias_variance=0.25, parametrization="ntk")
    kinds = [type(layer) for layer in found.layers]
    expected = [Conv, Activation, AvgPool, LayerNorm, Conv, Activation, Flatten, Dense, LayerNorm, Activation, Dense]
    assert kinds == expected
    first, second, last = found.layers[0], found.layers[4], found.layers[-1]
    assert (first.weight_variance, first.bias_variance, first.padding, first.kernel_size) == (1.5, 0.25, 1, 3)
    assert (second.kernel_size, second.stride, second.padding_mode) == ((3, 2), (2, 1), "circular")
    assert (last.bias_variance, last.rates[1]) == (0.0, 0.0)
    assert last.weight_variance == pytest.approx(1 / 3)  # nn.Linear's initialisation, recognised
    nn.init.normal_(model[-1].weight)
    measured = from_module(model).layers[-1]
    assert measured.weight_variance == pytest.approx(6 * model[-1].weight.detach().square().mean().item())
    assert found(torch.randn(2, 3, 8, 8)).ntk.shape == (2, 2)
    assert "Activation(gelu), AvgPool(kernel_size=2, stride=2, padding=0), LayerNorm" in repr(found)


def test_a_graph_with_sums_is_read_as_residual_blocks():
    found = from_module(ResNet(8), weight_variance=1.0, bias_variance=0.0, parametrization="ntk")
    conv, strided = Conv(3, 1, 1, bias_rate=0.0), Conv(3, 2, 1, bias_rate=0.0)
    relu, half = Activation("relu"), Scale(0.5)
    branch = Sequential(relu, conv, relu, Conv(3, 1, 1), half)
    long = Sequential(relu, strided, relu, Conv(3, 1, 1), half)
    composed = Sequential(
        *(Conv(3, 1, 1), Residual(branch), Sum(Conv(1, 2), long), relu, GlobalAvgPool(), Flatten(), Dense()),
    )
    x = torch.randn(3, 3, 6, 6)
    for read, known in zip(found(x), composed(x)):
        torch.testing.assert_close(read, known)


def test_functions_and_methods_are_read_as_modules_are():
    class Functions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv2d(3, 8, 3), nn.Linear(8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = F.avg_pool2d(F.leaky_relu(self.conv(x), 0.2), 2)
            return self.out(F.dropout(h, 0.1, self.training).mean((2, 3)).flatten(1)) * 2

    found = from_module(Functions(), weight_variance=1.0, bias_variance=0.1)
    conv = Conv(3, bias_variance=0.1, parametrization="standard", fan_in=27)
    out = Dense(bias_variance=0.1, parametrization="standard", fan_in=8)
    net = Sequential(conv, Activation(nn.LeakyReLU(0.2)), AvgPool(2), GlobalAvgPool(), out, Scale(2.0))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(found(x).ntk, net(x).ntk)


def test_what_has_no_kernel_is_named_with_what_to_do():
    shared = nn.Linear(4, 4)
    weighted = [nn.Linear(4, 4), nn.ReLU()]
    depthwise = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))

    class Branches(nn.Module):
        def forward(self, x):
            return x + x.relu()

    class Looks(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    class Gate(nn.Module):
        def forward(self, x):
            return x * x.sigmoid()

    cases = [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), r"1 \(BatchNorm2d\).*use nn.LayerNorm or nn.GroupNorm"),
        (nn.Sequential(nn.MaxPool2d(2)), r"0 \(MaxPool2d\).*use nn.AvgPool2d"),
        (nn.Sequential(*weighted, nn.Softmax(-1)), r"2 \(Softmax\).*up to the logits"),
        (nn.Sequential(nn.Linear(4, 4), nn.PReLU(4)), r"1 \(PReLU\).*one slope"),
        (nn.Sequential(nn.Embedding(5, 4)), r"0 \(Embedding\).*embedded inputs"),
        (nn.Sequential(nn.Bilinear(2, 2, 2)), "takes|Bilinear|input"),
        (nn.Sequential(nn.GroupNorm(4, 4)), r"0 \(GroupNorm\)"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(2)), "only output size 1"),
        (nn.Sequential(nn.AvgPool2d(3, padding=1, count_include_pad=False)), "zeros count"),
        (depthwise, "depthwise"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.LayerNorm(6)), r"2 \(LayerNorm\).*one dimension of an image"),
        (nn.Sequential(shared, nn.ReLU(), shared), "0 is called more than once|shared weights"),
        (Branches(), "the sum add of model: 2 branches of a sum do not end in weights"),
        (Looks(), "torch.fx cannot trace Looks"),
        (Gate(), "products of signals"),
    ]
    for model, message in cases:
        with pytest.raises(ValueError, match=message):
            from_module(model)
    with pytest.raises(ValueError, match="weight_variance has names that are no modules: 7"):
        from_module(nn.Sequential(*weighted), weight_variance={"7": 1.0})


# --- empirical kernels ------------------------------------------------------------------------------------------------


def brute(model: nn.Module, x1: torch.Tensor, x2: torch.Tensor, rates: dict | None = None) -> torch.Tensor:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def gradients(x: torch.Tensor) -> list[list[dict]]:
        out = model(x).flatten(1)
        rows = []
        for a in range(len(x)):
            row = []
            for i in range(out.shape[1]):
                found = torch.autograd.grad(out[a, i], list(named.values()), retain_graph=True, allow_unused=True)
                row.append({name: g for name, g in zip(named, found) if g is not None})
            rows.append(row)
        return rows

    def inner(p: dict, q: dict) -> float:
        return sum(float(((rates or {}).get(k, 1.0) * p[k] * q[k]).sum()) for k in p if k in q)

    g1, g2 = gradients(x1), gradients(x2)
    return torch.tensor([[[[inner(p, q) for q in b] for p in a] for b in g2] for a in g1], dtype=torch.float64)


class Odd(nn.Module):
    """Parameters of all kinds: a layer used twice, one used as a matrix, norms, plain parameters, a layer not used."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.tied, self.unused = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(2, 2)
        self.norm, self.plain = nn.LayerNorm(5), nn.Parameter(torch.randn(5))
        self.line = nn.Conv1d(1, 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.twice(torch.tanh(self.twice(x))) * self.plain
        return self.norm(self.tied(h)) @ self.tied.weight + self.line(h[:, None]).mean((1, 2))[:, None]


NETWORKS = {
    "dense, in place": (lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 3)), (5,)),
    "convolutional": (
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 4, 3, 2, 1), nn.BatchNorm2d(4).eval(), nn.ReLU(inplace=True)),
            *(nn.Conv2d(4, 4, 2, groups=2), nn.Tanh(), nn.Conv2d(4, 6, 2, dilation=1, bias=False), nn.Flatten()),
            nn.Linear(6, 2),
        ),
        (2, 6, 6),
    ),
    "positions": (lambda: nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Flatten(), nn.Linear(8, 2)), (2, 3)),
    "odd": (Odd, (5,)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_empirical_kernels_are_inner_products_of_gradients(name, rng):
    make, shape = NETWORKS[name]
    model = make().double().eval()
    x1, x2 = double(3, *shape, rng=rng), double(2, *shape, rng=rng)
    whole = brute(model, x1, x2)
    full = empirical_ntk(model, x1, x2, outputs="full")
    torch.testing.assert_close(full, whole)
    torch.testing.assert_close(empirical_ntk(model, x1, x2, outputs="diagonal"), whole.diagonal(dim1=2, dim2=3))
    mean = whole.diagonal(dim1=2, dim2=3).mean(-1)
    torch.testing.assert_close(empirical_ntk(model, x1, x2, block=1), mean)
    own = brute(model, x1, x1)
    for block in (1, 2, None):
        torch.testing.assert_close(empirical_ntk(model, x1, outputs="full", block=block), own)
    names = [name for name, _ in model.named_parameters()]
    rates: dict = {names[0]: 0.3, names[1]: torch.rand(dict(model.named_parameters())[names[1]].shape).double()}
    torch.testing.assert_close(empirical_ntk(model, x1, x2, outputs="full", rates=rates), brute(model, x1, x2, rates))
    parts = [empirical_ntk(model, x1, x2, parameters=[name], outputs="full") for name in names]
    torch.testing.assert_close(sum(parts), whole)


def test_sums_over_pairs_of_positions_equal_gradients_multiplied_out(rng):
    from lathe.theory.kernels import empirical

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(64, 5)).double()
    x = double(3, 3, 6, 6, rng=rng)
    found = empirical_ntk(model, x)
    ways = []
    for outputs in ("trace", "diagonal"):
        gradients = empirical._Gradients(model, {n: 1.0 for n, _ in model.named_parameters()}, outputs, x[:1])
        ways.append(sum(isinstance(part, empirical._Factors) for part in gradients(x)))
    assert ways == [2, 1]  # factors stay apart for the last convolution's trace, and for the linear layer
    torch.testing.assert_close(found, empirical_ntk(model, x, outputs="diagonal").mean(-1))


def test_frozen_parameters_do_not_count(rng):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    model[0].weight.requires_grad_(False)
    x = double(3, 4, rng=rng)
    torch.testing.assert_close(empirical_ntk(model, x, outputs="full"), brute(model, x, x))
    assert all(p.grad is None for p in model.parameters())


def test_wide_networks_have_the_kernels_that_are_read_from_them(rng):
    x = torch.randn(3, 3, 6, 6, generator=rng)
    found = []
    covariance = torch.zeros(3, 3)
    network = from_module(ResNet(96))
    for seed in range(30):
        torch.manual_seed(seed)
        model = ResNet(96).eval()
        with torch.no_grad():
            out = model(x)
        covariance += out @ out.mT / out.shape[1] / 30
        if seed < 6:
            found.append(empirical_ntk(model, x))
    drawn = torch.stack(found).double()
    nngp, ntk = network(x)
    error = drawn.std(0) / len(drawn) ** 0.5
    # Within the spread of the draws, and what a width of 96 leaves.
    assert ((drawn.mean(0) - ntk).abs() < 4 * error + 0.03 * ntk).all()
    # 120 outputs in all: a covariance is known to about sqrt(2 / 120) of itself.
    torch.testing.assert_close(covariance.double(), nngp, rtol=4 * (2 / 120) ** 0.5, atol=0)


def test_bad_arguments_are_refused():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), torch.randn(2, 3)
    with pytest.raises(ValueError, match=r"BatchNorm while training\); call model.eval"):
        empirical_ntk(model, x)
    model.eval()
    with pytest.raises(ValueError, match="outputs must be 'trace', 'diagonal' or 'full', got 'all'"):
        empirical_ntk(model, x, outputs="all")
    with pytest.raises(ValueError, match=r"no parameters: 0\.gain"):
        empirical_ntk(model, x, parameters=["0.gain"])
    with pytest.raises(ValueError, match="rates must not be negative"):
        empirical_ntk(model, x, rates={"0.weight": -1.0})
    with pytest.raises(ValueError, match="no parameters that count"):
        empirical_ntk(model.requires_grad_(False), x)
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        empirical_ntk(model, x, block=0)

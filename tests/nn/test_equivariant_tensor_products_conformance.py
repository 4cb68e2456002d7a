"""Tensor products through the checks that every layer passes, and by `swap` into networks not made for them."""

from __future__ import annotations

import pytest
import torch
from conformance import check_compiles, check_layer
from torch import nn

from lathe.core.surgery import swap
from lathe.nn.equivariant_tensor_products import (
    ClebschGordanProduct,
    GauntProduct,
    Irreps,
    MatrixProduct,
    VectorSignalProduct,
    cheapest_product,
    cost,
    expressivity,
    interaction_report,
    interactions,
    spherical_harmonics,
)
from lathe.nn.equivariant_tensor_products.field_product import ExpressivityError

IN1, IN2, OUT = "3x0e+2x1o", "0e+1o+2e", "2x0e+2x1o+1x1e"
KINDS = [
    lambda: ClebschGordanProduct(IN1, IN2, OUT, "fully_connected"),
    lambda: ClebschGordanProduct(IN1, "2x0e+1x1o+1x1e+1x0e", OUT, "fully_connected"),
    lambda: ClebschGordanProduct(IN1, IN2, mode="channelwise"),
    lambda: ClebschGordanProduct(IN1, IN2),
    lambda: ClebschGordanProduct("0e+1o+1e+1x0o+1x0e", IN2, sparse=True),
    lambda: GauntProduct(IN1, IN2, OUT),
    lambda: GauntProduct(IN1, IN2, OUT, backend="paths"),
    lambda: GauntProduct("0e+1o+1e+1x0o", "0e+1o+2e+0o", weights=False, backend="grid"),
    lambda: MatrixProduct(IN1, IN2, OUT),
    lambda: MatrixProduct(IN1, IN2, OUT, space="stacked"),
    lambda: VectorSignalProduct(IN1, IN2, OUT),
    lambda: VectorSignalProduct(IN1, IN2, OUT, backend="grid"),
]


class OneInput(nn.Module):
    """A product of two features that stand side by side in one tensor, as the checks want it."""

    def __init__(self, product):
        super().__init__()
        self.product, self.sizes = product, (product.irreps_in1.dim, product.irreps_in2.dim)

    def forward(self, both):
        if both.ndim == 0 or both.shape[-1] != sum(self.sizes):
            return self.product(both, both)
        return self.product(*both.split(self.sizes, -1))


def example(make):
    product = make()
    return torch.randn(4, product.irreps_in1.dim + product.irreps_in2.dim, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", KINDS)
def test_products_do_what_every_layer_does(make):
    both = example(make)
    check_layer(lambda: OneInput(make()), both, wrong_inputs=[both[:, 1:], both[0, 0]], training=(True, False))


def test_products_on_the_torus_run_in_both_precisions():
    for backend in ("fourier", "fourier_direct"):
        product = GauntProduct(IN1, IN2, OUT, backend=backend)
        single = product(*(irreps.randn(3) for irreps in (product.irreps_in1, product.irreps_in2)))
        assert single.dtype == torch.float32
        assert product.double()(torch.randn(3, 9).double(), torch.randn(3, 9).double()).dtype == torch.float64


@pytest.mark.compile
@pytest.mark.parametrize("make", [KINDS[0], KINDS[3], KINDS[5]])
def test_products_compile(make):
    check_compiles(lambda: OneInput(make()), example(make))


# --- networks that no product was made for ---


class Convolution(nn.Module):
    """Messages along the edges of a point cloud, as equivariant networks are built with e3nn."""

    def __init__(self, product):
        super().__init__()
        self.product = product

    def forward(self, features, edges, harmonics):
        messages = self.product(features[edges[0]], harmonics)
        return features.new_zeros(len(features), messages.shape[-1]).index_add(0, edges[1], messages)


class PointCloudNetwork(nn.Module):
    def __init__(self, o3, hidden, last):
        super().__init__()
        self.first = Convolution(o3.FullyConnectedTensorProduct("2x0e", "0e+1o+2e", hidden))
        self.layers = nn.ModuleList([Convolution(o3.FullyConnectedTensorProduct(hidden, "0e+1o+2e", hidden))])
        self.head = {"product": o3.FullyConnectedTensorProduct(hidden, hidden, last)}
        self.last = self.head["product"]

    def forward(self, points):
        edges = (torch.cdist(points, points) < 2.0).nonzero().T
        harmonics = spherical_harmonics(2, points[edges[0]] - points[edges[1]])
        features = self.first(points.new_ones(len(points), 2), edges, harmonics)
        for layer in self.layers:
            features = features + layer(features, edges, harmonics)
        return self.last(features, features).mean(0)


@pytest.mark.parametrize("hidden", ["4x0e+4x1o", "4x0e+2x1o+2x1e+2x2e", "3x0e+2x0o+2x1o"])
@pytest.mark.parametrize("kind", [ClebschGordanProduct, GauntProduct, MatrixProduct, VectorSignalProduct])
def test_products_replace_those_of_three_e3nn_networks(hidden, kind):
    o3 = pytest.importorskip("e3nn.o3")
    network, points = PointCloudNetwork(o3, hidden, "3x0e"), torch.randn(6, 3)
    before = network(points)
    options = {} if kind is ClebschGordanProduct else {"lost": "ignore"}
    report = swap(network, {o3.FullyConnectedTensorProduct: lambda layer: kind.from_trained(layer, **options)})
    assert len(report.replaced) == 3
    if kind is ClebschGordanProduct:
        torch.testing.assert_close(network(points), before, rtol=1e-4, atol=1e-5)
    after = network(points)
    turned = points @ torch.linalg.qr(torch.randn(3, 3))[0]
    torch.testing.assert_close(network(turned), after, rtol=1e-3, atol=1e-4)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        losses.append((network(points) - torch.tensor([1.0, -1.0, 0.5])).square().sum())
        losses[-1].backward()
        optimizer.step()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []
    assert float(losses[-1]) < float(losses[0])


def test_products_come_back_from_a_replacement_with_what_is_lost_told():
    o3 = pytest.importorskip("e3nn.o3")
    network = nn.ModuleList([o3.FullyConnectedTensorProduct("2x0e+2x1o", "0e+1o", "2x1e")])
    with pytest.raises(ExpressivityError, match="1o x 1o -> 1e"):
        swap(network, {o3.FullyConnectedTensorProduct: lambda layer: GauntProduct.like(layer, lost="raise")})
    assert isinstance(network[0], o3.FullyConnectedTensorProduct)


# --- measures ---


@pytest.mark.parametrize("l", range(1, 5))
def test_expressivity_follows_the_formulas(l):
    irreps = Irreps.spherical_harmonics(l)
    assert expressivity(GauntProduct(irreps, irreps, weights=False)) == 4 * l + 1
    assert expressivity(GauntProduct(irreps, irreps, irreps, weights=False)) == 3 * l + 1
    assert expressivity(MatrixProduct(irreps, irreps, weights=False)) == 6 * l
    assert expressivity(ClebschGordanProduct(irreps, irreps)) == (l + 1) * (2 * (l + 1) ** 2 + 1) // 3
    natural = [c for _, _, c in ClebschGordanProduct(irreps, irreps).interactions() if c.natural]
    assert len(natural) == (l + 1) * (l + 2) * (2 * l + 3) // 6
    with_channels = ClebschGordanProduct(2 * irreps, irreps, "3x0e", "fully_connected")
    assert expressivity(with_channels) == with_channels.weight_numel


def test_expressivity_of_weighted_products_grows_with_channels_up_to_all_paths():
    irreps = Irreps("2x0e+2x1o")
    ranks = [expressivity(GauntProduct(irreps, "0e+1o", irreps, channels=channels)) for channels in (1, 2, 4, 8)]
    assert ranks == sorted(ranks)
    assert ranks[-1] == ClebschGordanProduct(irreps, "0e+1o", irreps, "fully_connected").weight_numel


def test_who_meets_whom():
    irreps = Irreps.spherical_harmonics(2)
    gaunt, vector = (kind(irreps, irreps, weights=False) for kind in (GauntProduct, VectorSignalProduct))
    assert all((a.l + b.l + c.l) % 2 == 0 for a, b, c in interactions(gaunt))
    assert interactions(vector) == interactions(ClebschGordanProduct(irreps, irreps))
    assert ("1o", "1o", "1e") in {tuple(map(str, triple)) for triple in interactions(vector)}


def test_costs_are_counted():
    small, large = (GauntProduct(f"{n}x0e+{n}x1o", "0e+1o", "4x0e+4x1o", backend="grid") for n in (2, 8))
    assert 0 < cost(small, 10).flops < cost(large, 10).flops
    assert cost(small, 20).flops == 2 * cost(small, 10).flops
    assert cost(small, 20).saved_bytes > cost(small, 10).saved_bytes
    assert all(parameter.grad is None for parameter in small.parameters())
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        cost(small, 0)


def test_the_cheapest_product_makes_what_is_needed():
    irreps = ("2x0e+2x1o", "0e+1o", "2x0e+2x1e")
    odd = ("1o", "1o", "1e")
    assert tuple(map(str, odd)) in {tuple(map(str, t)) for t in cheapest_product(*irreps, batch=4).interactions()}
    found = cheapest_product(*irreps, needed=[odd], batch=4)
    assert not isinstance(found, GauntProduct)
    assert found(torch.randn(3, 8), torch.randn(3, 4)).shape == (3, 8)
    with pytest.raises(ExpressivityError, match="0e x 0e -> 1o"):
        cheapest_product(*irreps, needed=[("0e", "0e", "1o")])


def test_a_report_says_what_is_lost_and_what_has_no_input():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = GauntProduct("2x0e+2x1o", "0e+1o", "2x0e+2x1o+2x1e")
            self.second = ClebschGordanProduct("2x0e+2x1o+2x1e", "0e+1o", "2x0e+1x0o", "fully_connected")

        def forward(self, x, y):
            return self.second(self.first(x, y), y)

    report = interaction_report(Network(), torch.randn(3, 8), torch.randn(3, 4))
    assert {tuple(map(str, t)) for t in report.possible["first"] - report.expressed["first"]} == {("1o", "1o", "1e")}
    assert {tuple(map(str, t)) for t in report.expressed["second"] - report.active["second"]} == {("1e", "1o", "0o")}
    assert "second: 3 interactions, 0 lost, 1 without input" in str(report)
    assert "without input: 1e x 1o -> 0o" in str(report)

"""Blocks and networks through the checks of all layers, and by `swap` in networks that were not made for them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conformance import check_compiles, check_layer
from torch import nn

from lathe.core.surgery import swap
from lathe.data.graphs import random_graphs
from lathe.nn.equivariant_graph_polynomials import PPGN, GraphPolynomials, PPGNBlock, PPGNConv, missing_polynomials

PAIRS = torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(0))
GRAPHS = random_graphs(3, 6, 0.5, generator=torch.Generator().manual_seed(0)).adjacency.float()[:, None]
WRONG = [PAIRS[:, :1], PAIRS[..., :4], PAIRS[0]]
BOTH = (True, False)


@pytest.mark.parametrize(
    "options", [{}, {"transpose": False, "depth": 1}, {"aggr": "mean", "activation": nn.Tanh}, {"identity": False}]
)
def test_blocks_do_what_every_layer_does(options):
    check_layer(lambda: PPGNBlock(2, 4, **options), PAIRS, wrong_inputs=WRONG, empty_batch=BOTH)


@pytest.mark.parametrize("task", ["graph", "node", "edge"])
def test_networks_do_what_every_layer_does(task):
    make = lambda: PPGN(2, 4, 2, 3, task=task, aggr="mean")  # noqa: E731
    check_layer(make, PAIRS, wrong_inputs=WRONG, empty_batch=BOTH)


@pytest.mark.parametrize("scale", ["log", "unit"])
def test_networks_with_features_do_what_every_layer_does(scale):
    # The unit scale is not smooth at an entry of zero, where finite differences mean nothing.
    make = lambda: PPGN(1, 4, 1, 2, features="minimal", scale=scale, aggr="mean")  # noqa: E731
    options = {"empty_batch": BOTH, "wrong_inputs": [GRAPHS[..., :5]], "gradcheck": scale == "log"}
    check_layer(make, GRAPHS, **options, gradcheck_input=GRAPHS[:1, :, :4, :4] + 0.1)


def test_polynomials_do_what_every_layer_does():
    graphs = [*missing_polynomials(5, "ppgn"), *missing_polynomials(6, "ppgn")[:4]]
    x = GRAPHS[:, 0]
    check_layer(lambda: GraphPolynomials(graphs), x, wrong_inputs=[x[..., :5], x[0, 0]], empty_batch=BOTH)
    check_layer(lambda: GraphPolynomials(graphs[:1], injective=True), x[:, :5, :5], empty_batch=BOTH)


class OnOneGraph(nn.Module):
    """The adjacency of a batch is not its first dimension: here it is part of the layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.register_buffer("adjacency", torch.tensor(GRAPHS[0, 0].tolist()))

    def forward(self, x):
        return self.layer(x, self.adjacency)


def test_convolutions_do_what_every_layer_does():
    x = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    make = lambda: OnOneGraph(PPGNConv(4, 3, hidden=5))  # noqa: E731
    check_layer(make, x, wrong_inputs=[x[..., :3], x[0]], empty_batch=BOTH)


# --- networks not made for them: dense networks of PyTorch Geometric ---


def dense_networks():
    dense = pytest.importorskip("torch_geometric.nn.dense")

    class Two(nn.Module):
        def __init__(self, first, second):
            super().__init__()
            self.first, self.second, self.out = first, second, nn.Linear(6, 4)

        def forward(self, x, adj, mask):
            x = self.first(x, adj, mask).relu()
            return self.out(self.second(x, adj, mask).mean(1))

    return [
        Two(dense.DenseGCNConv(3, 6), dense.DenseGCNConv(6, 6)),
        Two(dense.DenseSAGEConv(3, 6), dense.DenseSAGEConv(6, 6)),
        Two(dense.DenseGraphConv(3, 6), dense.DenseGraphConv(6, 6)),
    ]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_convolutions_replace_dense_layers_and_train(which):
    net = dense_networks()[which]
    kinds = {type(net.first): partial(PPGNConv.like, aggr="mean")}
    report = swap(net, kinds)
    assert len(report.replaced) == 2
    x, adj = torch.randn(3, 6, 3), GRAPHS[:, 0]
    mask = torch.arange(6) < torch.tensor([6, 4, 5])[:, None]
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x, adj, mask), torch.arange(3))
        loss.backward()
        assert all(parameter.grad is not None for parameter in net.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_layers_on_edge_lists_are_told_what_to_do_instead():
    geometric = pytest.importorskip("torch_geometric.nn")
    with pytest.raises(NotImplementedError, match="GCNConv works on edge lists; give it more features with augment"):
        PPGNConv.like(geometric.GCNConv(3, 4))
    with pytest.raises(TypeError, match="dense graph layers with in_channels and out_channels, got Linear"):
        PPGNConv.like(nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"adj must be \(batch, 6, 6\), got \(3, 5, 6\)"):
        PPGNConv(3, 4)(torch.zeros(3, 6, 3), GRAPHS[:, 0, :5])


@pytest.mark.compile
def test_blocks_compile():
    check_compiles(lambda: PPGNBlock(2, 4), PAIRS)


@pytest.mark.compile
def test_networks_with_features_compile_around_them():
    net = PPGN(1, 4, 1, 2, features="minimal", aggr="mean")
    compiled = torch.compile(net, backend="aot_eager")
    x = GRAPHS.clone().requires_grad_()
    (expected,) = torch.autograd.grad(net(x).square().sum(), x)
    (found,) = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(found, expected)

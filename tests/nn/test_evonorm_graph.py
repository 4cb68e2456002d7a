"""Graphs against the fused layers, torch's normalisations, and a naive NumPy interpreter; draws against uniformity."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lathe.nn import evonorm
from lathe.nn.evonorm import BASELINE_GRAPHS, EVONORM_GRAPHS, NormActGraph, mutate, random_graph
from lathe.nn.evonorm.graph import ARITY, INDEX_SETS, PRIMITIVES

DOUBLE = torch.float64


def naive(graph: NormActGraph, x: np.ndarray, v0: np.ndarray, v1: np.ndarray, groups: int) -> np.ndarray:
    """Every node at the full shape of x (batch, channels, positions), straight from the paper's table of primitives."""
    eps = guard = 1e-5
    batch, channels, _ = x.shape

    def mean(a: np.ndarray, over: str) -> np.ndarray:
        out = np.empty_like(a)
        size = channels // groups
        for b in range(batch):
            for c in range(channels):
                first = c // size * size
                block = {
                    "batch": a[:, c],
                    "layer": a[b],
                    "instance": a[b, c],
                    "group": a[b, first : first + size],
                }[over]
                out[b, c] = block.sum() / block.size
        return out

    full = np.ones_like(x)
    values = [x, 0 * full, v0[None, :, None] * full, v1[None, :, None] * full]
    for node in graph.nodes:
        a = values[node.operands[0]]
        b = values[node.operands[-1]]
        values.append(
            {
                "add": lambda a=a, b=b: a + b,
                "mul": lambda a=a, b=b: a * b,
                "div": lambda a=a, b=b: a / (b + np.where(b >= 0, guard, -guard)),
                "max": lambda a=a, b=b: np.maximum(a, b),
                "neg": lambda a=a: -a,
                "sigmoid": lambda a=a: 1 / (1 + np.exp(-a)),
                "tanh": lambda a=a: np.tanh(a),
                "exp": lambda a=a: np.exp(a),
                "log": lambda a=a: np.sign(a) * np.log(np.abs(a) + guard),
                "abs": lambda a=a: np.abs(a),
                "square": lambda a=a: a * a,
                "sqrt": lambda a=a: np.sign(a) * np.sqrt(np.abs(a) + guard),
                "mean": lambda a=a, n=node: mean(a, n.over),
                "rms": lambda a=a, n=node: np.sqrt(mean(a * a, n.over) + eps),
                "std": lambda a=a, n=node: np.sqrt(mean((a - mean(a, n.over)) ** 2, n.over) + eps),
            }[node.op]()
        )
    return values[-1]


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid")
def test_layers_equal_a_naive_interpreter_on_random_graphs(rng):
    x = torch.randn(3, 6, 5, generator=rng, dtype=DOUBLE)
    compared = 0
    for _ in range(300):
        graph = random_graph(rng)
        layer = graph.to_module(6, groups=3, dtype=DOUBLE)
        v0, v1 = torch.randn(2, 6, generator=rng, dtype=DOUBLE)
        with torch.no_grad():
            for parameter, value in ((layer.v0, v0), (layer.v1, v1)):
                if parameter is not None:
                    parameter.copy_(value)
            y = layer(x).numpy()
        expected = naive(graph, x.numpy(), v0.numpy(), v1.numpy(), 3)
        if np.isfinite(expected).all() and np.abs(expected).max() < 1e6:
            compared += 1
            np.testing.assert_allclose(y, expected, rtol=1e-7, atol=1e-7)
    assert compared > 200


@pytest.mark.parametrize("name", list(EVONORM_GRAPHS))
def test_graphs_equal_the_fused_layers_in_value_and_gradient(name, rng):
    x = torch.randn(4, 6, 5, 3, generator=rng, dtype=DOUBLE) * 1.7
    options = {"groups": 3} if name.startswith("S") else {}
    fused = getattr(evonorm, f"EvoNorm{name}")(6, dtype=DOUBLE, **options)
    graph = EVONORM_GRAPHS[name].to_module(6, groups=3, guard=0.0, dtype=DOUBLE)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.copy_(torch.randn(6, generator=rng, dtype=DOUBLE))
        graph.weight.copy_(fused.weight)
        graph.bias.copy_(fused.bias)
        if fused.v is not None:
            graph.v1.copy_(fused.v)
    for training in (True, False):
        results = []
        for layer in (fused.train(training), graph.train(training)):
            leaf = x.clone().requires_grad_()
            vectors = [layer.weight, layer.bias] + (
                [] if fused.v is None else [layer.v if layer is fused else layer.v1]
            )
            y = layer(leaf)
            results.append([y, *torch.autograd.grad(y.cos().sum(), [leaf, *vectors])])
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_baseline_graphs_equal_torch(rng):
    x = torch.randn(4, 6, 5, 3, generator=rng, dtype=DOUBLE)
    peers = {
        "BN-ReLU": nn.Sequential(nn.BatchNorm2d(6), nn.ReLU()),
        "BN-SiLU": nn.Sequential(nn.BatchNorm2d(6), nn.SiLU()),
        "GN-ReLU": nn.Sequential(nn.GroupNorm(3, 6), nn.ReLU()),
        "GN-SiLU": nn.Sequential(nn.GroupNorm(3, 6), nn.SiLU()),
        "LN-ReLU": nn.Sequential(nn.GroupNorm(1, 6), nn.ReLU()),
    }
    for name, peer in peers.items():
        layer = BASELINE_GRAPHS[name].to_module(6, groups=3, guard=0.0, dtype=DOUBLE)
        torch.testing.assert_close(layer(x), peer.double()(x), atol=1e-10, rtol=1e-10)


def test_batch_moments_are_running_averages_in_evaluation(rng):
    graph = NormActGraph([("mean", (0,), "batch"), ("rms", (0,), "batch"), ("std", (0,), "batch"), ("add", (4, 5)),
                          ("add", (6, 7)), ("add", (8, 0))])  # fmt: skip
    layer = graph.to_module(3, dtype=DOUBLE)
    mean, square, variance = 0.0, 1.0, 1.0
    for _ in range(3):
        x = torch.randn(4, 3, 7, generator=rng, dtype=DOUBLE) + 1
        layer(x)
        mean = 0.9 * mean + 0.1 * x.mean((0, 2))
        square = 0.9 * square + 0.1 * x.square().mean((0, 2))
        variance = 0.9 * variance + 0.1 * x.var((0, 2), correction=0)
    expected = x + (mean + (square + 1e-5).sqrt() + (variance + 1e-5).sqrt()).view(1, 3, 1)
    torch.testing.assert_close(layer.eval()(x), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["B0", "S0", "S2"])
def test_graph_layers_differentiate_twice(name, rng):
    x = torch.randn(2, 4, 3, generator=rng, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradgradcheck(EVONORM_GRAPHS[name].to_module(4, groups=2, dtype=DOUBLE), x)


@given(seed=st.integers(0, 10_000), independent=st.booleans())
@settings(max_examples=60, deadline=None)
def test_simplifying_keeps_the_function_and_the_hash(seed, independent):
    rng = torch.Generator().manual_seed(seed)
    graph = random_graph(rng, batch_independent=independent)
    small = graph.simplify()
    assert small.hash() == graph.hash() and small.simplify() == small and len(small.nodes) <= len(graph.nodes)
    assert len(small.live) - sum(k < 4 for k in small.live) == len(small.nodes)
    if independent:
        assert graph.batch_independent
    x = np.random.default_rng(seed).normal(size=(2, 4, 3))
    v0, v1 = np.full(4, 0.3), np.full(4, -0.7)
    with np.errstate(all="ignore"):
        a, b = naive(graph, x, v0, v1, 2), naive(small, x, v0, v1, 2)
    np.testing.assert_array_equal(a, b)


def test_hash_sees_through_dead_nodes_repeats_and_the_order_of_sums():
    graph = NormActGraph([("exp", (0,)), ("tanh", (2,)), ("tanh", (2,)), ("add", (5, 0))])
    other = NormActGraph([("tanh", (2,)), ("add", (0, 4))])
    assert graph.hash() == other.hash() and graph.simplify() == other.simplify()
    assert graph != other and graph.live == {0, 2, 5, 7}
    divided = [NormActGraph([("tanh", (2,)), ("div", pair)]).hash() for pair in ((0, 4), (4, 0))]
    assert divided[0] != divided[1]


def test_mutation_redraws_one_node_and_nothing_else(rng):
    graph = random_graph(rng)
    places = Counter()
    for _ in range(4000):
        child = mutate(graph, rng)
        changed = [k for k, (a, b) in enumerate(zip(graph.nodes, child.nodes)) if a != b]
        assert len(child.nodes) == len(graph.nodes) and len(changed) <= 1
        places.update(changed)
    assert set(places) == set(range(10))
    # A redraw may give the same node again, most often near the start where there are few operands.
    assert all(4000 / 10 * 0.7 < count < 4000 / 10 + 4 * math.sqrt(4000 * 0.1 * 0.9) for count in places.values())


def test_draws_are_uniform_within_three_sigma(rng):
    ops, sets, operands = Counter(), Counter(), Counter()
    for _ in range(10_000):
        for k, node in enumerate(random_graph(rng).nodes):
            ops[node.op] += 1
            sets[node.over] += 1
            if k == 9:
                operands.update(node.operands)
    draws = 100_000

    def within(counter, keys, total):
        share = 1 / len(keys)
        sigma = math.sqrt(total * share * (1 - share))
        return all(abs(counter[key] - total * share) < 3 * sigma for key in keys)

    assert within(ops, PRIMITIVES, draws)
    moments = draws - sets.pop(None)
    assert within(sets, INDEX_SETS, moments)
    assert within(operands, range(13), sum(operands.values()))


def test_formulas_read_like_the_paper():
    assert EVONORM_GRAPHS["B0"].expression() == "x / max(std_batch(x), v1 * x + std_instance(x))"
    assert EVONORM_GRAPHS["B2"].expression() == "x / max(std_batch(x), rms_instance(x) - x)"
    assert EVONORM_GRAPHS["S0"].expression() == "x * sigmoid(v1 * x) / std_group(x)"
    assert EVONORM_GRAPHS["S2"].latex() == r"\frac{x \, \sigma(x)}{r_{\mathrm{group}}(x)}"
    assert NormActGraph([("add", (0, 2)), ("square", (4,)), ("neg", (5,))]).expression() == "-(x + v0)^2"
    assert NormActGraph([("mul", (0, 2)), ("div", (0, 4))]).expression() == "x / (x * v0)"
    assert len(EVONORM_GRAPHS["B0"].nodes) == 6


def test_table_of_primitives_is_the_papers():
    assert len(PRIMITIVES) == 15
    assert [name for name in PRIMITIVES if ARITY[name] == 2] == ["add", "mul", "div", "max"]


def test_bad_graphs_are_refused():
    for nodes, message in (
        ([], "at least one"),
        ([("relu", (0,))], "unknown primitive 'relu'"),
        ([("add", (0,))], "takes 2 operands"),
        ([("neg", (4,))], r"earlier nodes \(0 to 3\), got \(4,\)"),
        ([("neg", (-1,))], "earlier nodes"),
        ([("mean", (0,))], "needs an index set"),
        ([("exp", (0,), "layer")], "takes no index set"),
    ):
        with pytest.raises(ValueError, match=message):
            NormActGraph(nodes)
    with pytest.raises(ValueError, match="n_nodes"):
        random_graph(torch.Generator(), n_nodes=0)
    with pytest.raises(ValueError, match="must have 4 channels"):
        EVONORM_GRAPHS["S0"].to_module(4)(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="num_features"):
        EVONORM_GRAPHS["S0"].to_module(0)

"""Against exact Hessians from torch.autograd.functional in float64, against quadratics, and by exhausting all signs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lathe.core.curvature import Hessian, hessian_trace


@pytest.fixture
def net(rng):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


@pytest.fixture
def batches(rng):
    inputs = torch.randn(12, 4, generator=rng, dtype=torch.float64)
    targets = torch.randint(0, 3, (12,), generator=rng)
    return [(inputs[:8], targets[:8]), (inputs[8:], targets[8:])]


def exact_hessian(model, batches):
    """The Hessian of the mean loss over all samples, from torch's own reference implementation."""
    names, values = zip(*model.named_parameters())
    inputs, targets = (torch.cat(each) for each in zip(*batches))

    def loss(flat):
        pieces = flat.split([value.numel() for value in values])
        weights = {name: piece.view_as(value) for name, piece, value in zip(names, pieces, values)}
        return F.cross_entropy(torch.func.functional_call(model, weights, (inputs,)), targets)

    flat = torch.cat([value.detach().flatten() for value in values])
    return torch.autograd.functional.hessian(loss, flat), {
        name: slice(start, start + value.numel())
        for name, value, start in zip(names, values, itertools.accumulate([0] + [v.numel() for v in values]))
    }


@pytest.mark.parametrize("vectorize", [False, True])
def test_products_are_those_with_the_exact_hessian(net, batches, rng, vectorize):
    exact, _ = exact_hessian(net, batches)
    vectors = [torch.randn(3, *p.shape, generator=rng, dtype=torch.float64) for p in net.parameters()]
    products = Hessian(net, F.cross_entropy, batches).products(vectors, vectorize=vectorize)
    expected = torch.cat([v.flatten(1) for v in vectors], 1) @ exact
    torch.testing.assert_close(torch.cat([p.flatten(1) for p in products], 1), expected, atol=1e-12, rtol=1e-9)


def test_gradient_is_that_of_the_mean_over_all_samples(net, batches):
    inputs, targets = (torch.cat(each) for each in zip(*batches))
    expected = torch.autograd.grad(F.cross_entropy(net(inputs), targets), list(net.parameters()))
    for ours, theirs in zip(Hessian(net, F.cross_entropy, batches).gradient(), expected):
        torch.testing.assert_close(ours, theirs)


def test_quadratic_forms_equal_those_of_the_exact_hessian(net, batches, rng):
    exact, where = exact_hessian(net, batches)
    names = ["0.weight", "2.weight", "4.weight"]
    errors = [{name: torch.randn(net.get_parameter(name).shape, generator=rng, dtype=torch.float64)} for name in names]
    dense = torch.zeros(3, exact.shape[0], dtype=torch.float64)
    for row, error in enumerate(errors):
        for name, value in error.items():
            dense[row, where[name]] = value.flatten()
    ours = Hessian(net, F.cross_entropy, batches, names).forms(errors)
    torch.testing.assert_close(ours, dense @ exact @ dense.T, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("probe", ["joint", "block"])
def test_two_hundred_probes_come_within_four_standard_errors_of_every_blocks_trace(net, batches, probe):
    exact, where = exact_hessian(net, batches)
    blocks = {"first": ["0.weight", "0.bias"], "second": ["2.weight"], "third": ["4.weight", "4.bias"]}
    traces = hessian_trace(net, F.cross_entropy, batches, blocks, probes=200, probe=probe, vectorize=True)
    for block, names in blocks.items():
        trace = sum(float(exact[where[name], where[name]].trace()) for name in names)
        assert abs(traces[block].mean - trace) <= 4 * traces[block].stderr
        assert 0 < traces[block].stderr < abs(trace)


def test_all_sign_vectors_of_a_tiny_block_give_its_trace_exactly(net, batches):
    exact, where = exact_hessian(net, batches)
    hessian = Hessian(net, F.cross_entropy, batches, ["4.bias"])
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3)), dtype=torch.float64)
    (products,) = hessian.products([signs])
    estimate = (signs * products).sum(1).mean()
    torch.testing.assert_close(estimate, exact[where["4.bias"], where["4.bias"]].trace(), atol=1e-13, rtol=0)


def test_block_probes_scatter_less_than_joint_ones(net, batches):
    joint, block = (
        hessian_trace(net, F.cross_entropy, batches, probes=200, probe=probe, vectorize=True)
        for probe in ("joint", "block")
    )
    assert sum(block[name].stderr for name in block) < sum(joint[name].stderr for name in joint)


def test_a_diagonal_hessian_is_exact_at_the_first_probe_and_stops_there():
    layer = nn.Linear(3, 1, bias=False).double()
    scales = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    loss = lambda output, weight=layer.weight: (scales * layer.weight**2).sum() / 2 + 0 * output.sum()  # noqa: E731
    batch = (torch.zeros(1, 3, dtype=torch.float64),)
    trace = hessian_trace(layer, loss, [batch], probes=100, at_once=2, tol=0.05)[""]
    assert trace.probes == 2
    assert trace.mean == pytest.approx(6.0, abs=1e-12)
    assert trace.stderr == pytest.approx(0.0, abs=1e-12)


def test_the_stopping_rule_keeps_going_until_every_block_is_sure(net, batches):
    loose = hessian_trace(net, F.cross_entropy, batches, probes=400, tol=0.5, vectorize=True)
    tight = hessian_trace(net, F.cross_entropy, batches, probes=400, tol=0.15, vectorize=True)
    probes = {name: trace.probes for name, trace in tight.items()}
    assert len(set(probes.values())) == 1
    assert loose["0"].probes < probes["0"]
    assert probes["0"] == 400 or all(t.stderr <= 0.15 * abs(t.mean) for t in tight.values())


def test_a_loss_linear_in_the_weights_has_no_curvature():
    layer = nn.Linear(2, 1)
    trace = hessian_trace(layer, lambda output: output.mean(), [(torch.ones(4, 2),)], probes=3)
    assert trace[""].mean == 0.0


def test_the_network_is_left_as_it_was(net, batches):
    net.train()
    net[0].eval()
    net[2].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    Hessian(net, F.cross_entropy, batches, ["2.weight"]).product([torch.ones(4, 5, dtype=torch.float64)])
    assert net.training and not net[0].training and not net[2].weight.requires_grad
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_attention_is_differentiated_twice(rng):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(8, 24)

        def forward(self, x):
            q, k, v = self.project(x).chunk(3, dim=-1)
            return F.scaled_dot_product_attention(q, k, v).mean((1, 2))

    batch = (torch.randn(2, 5, 8, generator=rng), torch.zeros(2))
    traces = hessian_trace(Attention(), F.mse_loss, [batch], probes=4)
    assert torch.isfinite(torch.tensor(traces["project"].mean)) and traces["project"].stderr > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": 0}, "probes and at_once must be at least 1, got 0"),
        ({"tol": -1.0}, "tol must be positive, got -1.0"),
        ({"params": {"a": []}}, r"at least one parameter, got \['a'\]"),
        ({"params": {"a": ["nothing"]}}, r"must name parameters of the model, got \['nothing'\]"),
    ],
)
def test_bad_arguments_are_refused(net, batches, options, message):
    with pytest.raises(ValueError, match=message):
        hessian_trace(net, F.cross_entropy, batches, **options)


def test_no_batches_are_refused(net):
    with pytest.raises(ValueError, match="at least one batch"):
        hessian_trace(net, F.cross_entropy, [])


def test_a_loss_a_sample_is_refused(net, batches):
    with pytest.raises(ValueError, match=r"scalar tensor, got a tensor of shape \(8,\)"):
        hessian_trace(net, lambda o, t: F.cross_entropy(o, t, reduction="none"), batches, probes=1)

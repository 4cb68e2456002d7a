"""Several inputs at order 1/n, and real networks: against autograd, sampled networks, single inputs and symmetries."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lathe.core.gaussian import activation
from lathe.studies.deep_learning_theory import draw_networks, observe
from lathe.theory.deep_learning_theory import (
    NoCriticalPoint,
    critical_init_,
    critical_param_groups,
    critical_point,
    depth_report,
    empirical_dntk,
    empirical_ntk,
    finite_width,
    finite_width_single,
    learning_rate_tensor,
    ntk_recursion,
)
from lathe.theory.deep_learning_theory.finite_width import _four_points, _pair_tables

TENSORS = "VDFABPQ"
WIDTHS = [3, 20, 35, 10, 17]


def inputs(rng, n=2):
    return torch.randn(n, 3, dtype=torch.float64, generator=rng)


@pytest.mark.parametrize("act", ["tanh", "gelu", "relu", "elu"])
def test_equal_indices_are_the_single_input(act, rng):
    x = inputs(rng)
    several = finite_width(x, WIDTHS, act, 0.1, 1.2, 0.3, 0.7)
    single = finite_width_single(0.1 + 1.2 * (x * x).sum(1) / 3, WIDTHS, act, 0.1, 1.2, 0.3, 0.7)
    i = torch.arange(2)
    for name in TENSORS:
        torch.testing.assert_close(several[name][:, i, i, i, i], single[name], atol=2e-7, rtol=1e-6, msg=name)
    K, theta = ntk_recursion(x, 4, act, 0.1, 1.2, 0.3, 0.7)
    torch.testing.assert_close(several["K"], K, atol=1e-8, rtol=0)
    torch.testing.assert_close(several["Theta"], theta, atol=1e-7, rtol=0)


def test_nearly_equal_inputs_go_over_into_the_single_input(rng):
    x = inputs(rng, 1) * 0.7
    near = finite_width(torch.cat([x, x * (1 + 1e-7)]), WIDTHS, "tanh", 0.1, 1.2, 0.3, 0.7)
    single = finite_width_single(0.1 + 1.2 * (x * x).sum(1) / 3, WIDTHS, "tanh", 0.1, 1.2, 0.3, 0.7)
    for name in TENSORS:
        expected = single[name][:, 0].reshape(-1, 1, 1, 1, 1).expand_as(near[name])
        torch.testing.assert_close(near[name], expected, atol=1e-5, rtol=1e-5, msg=name)


def test_inputs_do_not_disturb_each_other_and_order_does_not_matter(rng):
    x = inputs(rng, 4) * 0.3

    def tensors(x):
        return finite_width(x, WIDTHS[:4], "tanh", 0.1, 1.2, 0.3, 0.7, order=20)

    order = torch.tensor([3, 1, 0, 2])
    four, two, moved = tensors(x), tensors(x[:2]), tensors(x[order])
    for name in TENSORS:
        torch.testing.assert_close(four[name][:, :2, :2, :2, :2], two[name], atol=1e-9, rtol=0)
        shuffled = four[name]
        for axis in range(1, 5):
            shuffled = shuffled.index_select(axis, order)
        torch.testing.assert_close(moved[name], shuffled, atol=1e-3, rtol=0)  # the grid turns with the order


def test_tensors_have_their_symmetries(rng):
    t = {name: value[-1] for name, value in finite_width(inputs(rng, 3), WIDTHS, "tanh", 0.1, 1.2, 0.3, 0.7).items()}
    for name, permutations in {
        "V": [(1, 0, 2, 3), (0, 1, 3, 2), (2, 3, 0, 1)],
        "A": [(1, 0, 2, 3), (0, 1, 3, 2), (2, 3, 0, 1)],
        "D": [(1, 0, 2, 3), (0, 1, 3, 2)],
        "F": [(2, 3, 0, 1)],
        "B": [(1, 0, 3, 2), (2, 3, 0, 1)],
        "P": [(0, 2, 1, 3)],
    }.items():
        for permutation in permutations:
            torch.testing.assert_close(t[name], t[name].permute(permutation), atol=1e-10, rtol=0)


def test_delta_functions_of_relu_are_where_they_belong():
    K = torch.tensor([[1.2, 0.4], [0.4, 0.7]], dtype=torch.float64)
    relu = activation("relu")
    _, _, curve, _, both = _pair_tables(relu, K)
    # <delta(z_0) z_1^+>: the density at zero times the mean of what is left of z_1.
    left = 0.7 - 0.4**2 / 1.2
    expected = math.sqrt(left / (2 * math.pi)) / math.sqrt(2 * math.pi * 1.2)
    assert curve[0, 1].item() == pytest.approx(expected, abs=1e-8)
    assert both[0, 1].item() == pytest.approx(1 / (2 * math.pi * math.sqrt(1.2 * 0.7 - 0.4**2)), abs=1e-8)
    bent = _four_points(relu, K, None, {"bent"})["bent"]
    # A delta function meets s' at its own jump: delta s'^m counts 1 / (m + 1).
    for index, share in {
        (0, 1, 1, 1): 1,
        (0, 0, 1, 1): 1 / 2,
        (0, 1, 0, 1): 1 / 2,
        (0, 0, 0, 1): 1 / 3,
        (0, 1, 1, 0): 0,
    }.items():
        assert bent[index].item() == pytest.approx(share * expected, abs=1e-8), index


def test_curvature_by_parts_is_the_curvature(rng):
    # A smooth activation that claims a kink goes the way of the kinked ones.
    smooth, kinked = activation("gelu"), dataclasses.replace(activation("gelu"), kinks=(0.0,))
    x = inputs(rng, 3) * 0.7
    a, b = (finite_width(x, WIDTHS[:4], act, 0.1, 1.2, 0.3, 0.7) for act in (smooth, kinked))
    for name in TENSORS:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=0, msg=name)


def test_sampled_networks_have_these_tensors(rng):
    # Unequal widths, two inputs; everything of the sample comes from autograd and the conditional metric.
    x = inputs(rng) * 0.7
    n = 16
    parts = observe(draw_networks(4000, [3, 24, n, 2], 0.1, 1.2, rng), x)
    theory = {name: value[2] for name, value in finite_width(x, [3, 24, n, 2], "tanh", 0.1, 1.2, 0.3, 0.7).items()}
    z, G, H, dH = (parts[name] for name in ("z", "G", "H", "dH"))
    dG, DH = G - G.mean(0), H - H.mean(0)
    z0, z1 = z[..., 0], z[..., 1]
    estimates = {
        "V": torch.einsum("tab,tcd->tabcd", dG, dG),
        "D": torch.einsum("ta,tb,tcd->tabcd", z0, z0, DH[..., 1, 1]),
        "F": torch.einsum("ta,tb,tcd->tacbd", z0, z1, H[..., 0, 1]),
        "A": torch.einsum("tab,tcd->tabcd", DH[..., 0, 0], DH[..., 1, 1]),
        "B": torch.einsum("tab,tcd->tacbd", H[..., 0, 1], H[..., 0, 1]),
        "P": torch.einsum("tabc,td->tabcd", dH[..., 0, 1, 1], z0),
        "Q": torch.einsum("tabc,td->tabcd", dH[..., 0, 0, 1], z1),
    }
    for name, values in estimates.items():
        mean, error = n * values.mean(0), n * values.std(0) / math.sqrt(len(values))
        allowed = 4 * error + 3 / n * theory[name].abs().max()
        assert ((mean - theory[name]).abs() <= allowed).all(), name
    torch.testing.assert_close(H[..., 0, 0].mean(0), theory["Theta"], atol=0.03, rtol=0)


def test_repeated_and_too_many_inputs(rng):
    x = inputs(rng)
    with pytest.warns(UserWarning, match="repeated rows"):
        twice = finite_width(torch.cat([x, x[:1]]), WIDTHS[:3], "tanh", 0.1, 1.2)
    once = finite_width(x, WIDTHS[:3], "tanh", 0.1, 1.2)
    back = torch.tensor([0, 1, 0])
    torch.testing.assert_close(twice["V"][1], once["V"][1][back][:, back][:, :, back][:, :, :, back])
    with pytest.raises(ValueError, match=r"at most 8 rows, got 9.*MB"):
        finite_width(inputs(rng, 9), WIDTHS, "tanh", 0.1, 1.2)
    with pytest.raises(ValueError, match=r"tensors must be among.*got Z"):
        finite_width(x, WIDTHS, "tanh", 0.1, 1.2, tensors=["Z"])
    with pytest.raises(ValueError, match="3 features, got 4"):
        finite_width(x, [4, 5], "tanh", 0.1, 1.2)


def test_empirical_ntk_is_the_inner_product_of_gradients(rng):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x = inputs(rng, 3)
    rates = learning_rate_tensor(model, 0.3, 0.7)
    assert rates["0.weight"] == pytest.approx(0.7 / 3) and rates["2.bias"] == 0.3
    H = empirical_ntk(model, x, rates)
    named = dict(model.named_parameters())
    gradients = [[torch.autograd.grad(model(x)[a, i], list(named.values())) for i in range(2)] for a in range(3)]
    for a, b, i, j in [(0, 1, 0, 1), (2, 2, 1, 1), (1, 2, 0, 0)]:
        expected = sum(rates[k] * (p * q).sum() for k, p, q in zip(named, gradients[a][i], gradients[b][j]))
        assert H[a, b, i, j].item() == pytest.approx(expected.item(), abs=1e-12)
    with pytest.raises(ValueError, match="no parameters: nothing"):
        empirical_ntk(model, x, {"nothing": 1.0})


def test_one_step_of_descent_moves_the_ntk_by_its_differential(rng):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x, rates = inputs(rng), learning_rate_tensor(model, 0.3, 0.7)
    error = torch.randn(2, 2, dtype=torch.float64, generator=rng)
    dH, eta = empirical_dntk(model, x, rates), 1e-5
    stepped = copy.deepcopy(model)
    gradients = torch.autograd.grad((stepped(x) * error).sum(), list(stepped.parameters()))
    with torch.no_grad():
        for (name, parameter), gradient in zip(stepped.named_parameters(), gradients):
            parameter -= eta * rates[name] * gradient
    moved = (empirical_ntk(stepped, x, rates) - empirical_ntk(model, x, rates)) / eta
    predicted = -torch.einsum("abcijk,ck->abij", dH, error)
    torch.testing.assert_close(moved, predicted + predicted.permute(1, 0, 3, 2), atol=1e-5, rtol=1e-4)


class Residual(nn.Module):
    """A stream with a skip weight, branches of two layers, functions in place of modules."""

    def __init__(self):
        super().__init__()
        self.enter, self.first, self.second, self.out = (
            nn.Linear(a, b) for a, b in ((6, 64), (64, 64), (64, 64), (64, 3))
        )

    def forward(self, x):
        z = self.enter(x)
        z = 0.8 * z + self.second(F.relu(self.first(F.relu(z))))
        return self.out(F.relu(z))


def test_every_layer_gets_the_point_of_the_activation_that_feeds_it(rng):
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(64, 64, 3), nn.GELU(), nn.Flatten(),
        nn.Dropout(0.1), nn.Linear(256, 400), nn.ReLU(), nn.Linear(400, 300),
    )  # fmt: skip
    done = critical_init_(model, generator=rng)
    gelu = critical_point("gelu")
    assert [(d.name, d.activation, d.fan_in) for d in done] == [
        ("0", "tanh", 27), ("3", "tanh", 576), ("7", "gelu", 256), ("9", "relu", 400),
    ]  # fmt: skip
    for name, C_b, C_W, fan_in in [("3", 0, 1, 576), ("7", gelu.C_b, gelu.C_W, 256), ("9", 0, 2, 400)]:
        layer = model.get_submodule(name)
        assert layer.weight.var().item() * fan_in == pytest.approx(C_W, rel=0.04)
        assert layer.bias.var().item() == pytest.approx(C_b, rel=0.25, abs=1e-12)
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 300)


def test_the_layer_that_closes_a_branch_makes_room_for_the_skip(rng):
    model = Residual()
    done = {d.name: d.C_W for d in critical_init_(model, residual_gamma=0.8, generator=rng)}
    assert done == {"enter": 2.0, "first": 2.0, "second": pytest.approx(2 * 0.36), "out": 2.0}
    with pytest.raises(ValueError, match="no layer's output is added"):
        critical_init_(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), residual_gamma=0.5)


def test_the_activation_can_be_given_where_there_is_no_graph():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x))) if x.sum() > 0 else self.b(self.a(x))

    with pytest.raises(TypeError, match=r"torch.fx cannot trace Untraceable.*act="):
        critical_init_(Untraceable())
    assert [d.activation for d in critical_init_(Untraceable(), act="tanh")] == ["tanh", "tanh"]


def test_nothing_changes_where_an_activation_has_no_critical_point():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 5), nn.Sigmoid(), nn.Linear(5, 2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NoCriticalPoint, match="sigmoid"):
        critical_init_(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_param_groups_carry_the_rates_of_the_equivalence_principle():
    for act in ("relu", "tanh"):
        depth, n = 12, 5
        model = nn.Sequential(
            *[m for _ in range(depth) for m in (nn.Linear(n, n), nn.Tanh() if act == "tanh" else nn.ReLU())]
        )
        groups = critical_param_groups(model, lr=1.0)
        assert len(groups) == 2 * depth and sum(len(g["params"]) for g in groups) == 2 * depth
        weights, biases = ([g["lr"] for g in groups[k::2]] for k in (0, 1))
        if act == "relu":
            assert weights == pytest.approx([1 / depth / n] * depth) and biases == pytest.approx([1 / depth] * depth)
        else:
            assert weights == pytest.approx([1 / n] * depth)
            assert biases == pytest.approx([1 / layer for layer in range(1, depth + 1)])
        torch.optim.SGD(groups)
    with pytest.raises(ValueError, match="lr must be positive"):
        critical_param_groups(model, lr=0.0)


def test_depth_report_of_a_persons_network_follows_theory(rng):
    layers = [nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 30), nn.Tanh(), nn.Linear(30, 2)]
    model = nn.Sequential(*layers)
    before = copy.deepcopy(model.state_dict())
    report = depth_report(model, torch.randn(3, 6, generator=rng), draws=1000, generator=rng)
    assert report.kernel_theory is not None and report.names == ("0", "2", "4", "6")
    torch.testing.assert_close(report.kernel, report.kernel_theory, rtol=0.05, atol=0)
    torch.testing.assert_close(report.chi_par, report.chi_par_theory, rtol=0.1, atol=0.02)
    torch.testing.assert_close(report.chi_perp, report.chi_perp_theory, rtol=0.1, atol=0.02)
    torch.testing.assert_close(report.fluctuation, report.fluctuation_theory, rtol=0.25, atol=0.02)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert "theory" in str(report) and report.plot().to_dict()["concat"]


def test_depth_report_refuses_bad_arguments():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    with pytest.raises(ValueError, match="draws must be at least 2"):
        depth_report(model, torch.ones(1, 3), draws=1)
    with pytest.raises(ValueError, match="given together"):
        depth_report(model, torch.ones(1, 3), C_W=1.0)
    with pytest.raises(ValueError, match="no zero row"):
        depth_report(model, torch.zeros(1, 3))

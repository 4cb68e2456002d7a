"""Networks against the reference's exact parameter counts; folding, expanding and budgets against exhaustive search."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from lathe.nn.hypercomplex_layers import (
    HypercomplexLayer,
    PHConv2d,
    PHConvTranspose2d,
    PHLinear,
    algebra_report,
    choose_terms,
    kronecker_singular_values,
    kronecker_sum,
    param_groups,
    ph_expand,
    ph_fold,
    ph_resnet,
    ph_sednet,
    ph_vgg,
    to_hypercomplex,
)

LARGE = (60, 120, 240, 516)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("depth", "widths", "n", "channels", "expected", "biases"),
    [
        (18, None, 2, 4, 5_599_594, 4_800),
        (18, None, 4, 4, 2_810_762, 4_800),
        (18, LARGE, 2, 4, 5_450_906, 4_680),
        (18, LARGE, 3, 3, 3_640_594, 4_680),
        (18, LARGE, 4, 4, 2_736_258, 4_680),
        (50, None, 2, 4, 11_824_498, 26_560),
        (50, None, 4, 4, 5_965_514, 26_560),
        (50, LARGE, 2, 4, 11_331_446, 25_692),
        (50, LARGE, 3, 3, 7_587_841, 25_692),
        (50, LARGE, 4, 4, 5_717_766, 25_692),
    ],
)
def test_residual_networks_have_the_references_parameters(depth, widths, n, channels, expected, biases):
    with torch.device("meta"):
        assert count(ph_resnet(depth, n, widths=widths, bias=True)) == expected
        without = ph_resnet(depth, n, widths=widths)
    assert count(without) == expected - biases
    assert without.stem[0].in_channels == channels


@pytest.mark.parametrize(
    ("depth", "widths", "expected"),
    [(18, None, 11_173_962), (18, LARGE, 10_877_062), (50, None, 23_520_842), (50, LARGE, 22_538_086)],
)
def test_ordinary_twins_have_the_references_parameters(depth, widths, expected):
    with torch.device("meta"):
        assert count(ph_resnet(depth, None, widths=widths)) == expected


@pytest.mark.parametrize("depth", [20, 56, 110])
def test_small_residual_networks_have_their_depth(depth):
    with torch.device("meta"):
        net = ph_resnet(depth, 4)
    shortcuts = 2
    layers = [m for m in net.modules() if isinstance(m, (PHConv2d, nn.Linear))]
    assert len(layers) - shortcuts == depth


@pytest.mark.parametrize(("depth", "widths", "n"), [(16, None, 4), (19, None, 2), (16, (24, 72, 216, 648, 648), 3)])
def test_vgg_networks_hold_what_their_layers_do(depth, widths, n):
    options = {} if widths is None else {"widths": widths}
    with torch.device("meta"):
        net = ph_vgg(depth, n, **options)
    layers = [m for m in net.modules() if isinstance(m, HypercomplexLayer)]
    assert len(layers) == depth - 1
    channels = [3 + -3 % n]
    for width, convs in zip(widths or (64, 128, 256, 512, 512), {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}[depth]):
        channels += [width] * convs
    expected = sum(n**3 + 9 * d * s // n + 2 * s for d, s in itertools.pairwise(channels))
    last = channels[-1]
    expected += 2 * (n**3 + last * last // n + last) + 10 * last + 10
    assert count(net) == expected


@pytest.mark.parametrize("n", [None, 2, 4])
def test_networks_run_and_learn(n):
    x = torch.rand(4, 3, 8, 8)
    x = x if n is None else to_hypercomplex(x, 4)
    net = ph_resnet(20, n, num_classes=5, widths=(8, 8, 16), blocks=(1, 1, 1))
    sound = ph_sednet(n, 4, 3, frequencies=16, widths=(8, 8), pools=(4, 2), hidden=4)
    loss = net(x).square().sum() + sound(torch.rand(2, 4, 6, 16)).square().sum()
    loss.backward()
    assert net(x).shape == (4, 5)
    assert sound(torch.rand(2, 4, 6, 16)).shape == (2, 6, 3)
    assert all(p.grad is not None and p.grad.isfinite().all() for m in (net, sound) for p in m.parameters())
    assert ph_vgg(16, n, widths=(8,) * 5)(torch.rand(2, 3 if n is None else 4, 32, 32)).shape == (2, 10)


def test_networks_refuse_what_they_are_not():
    with pytest.raises((ValueError, TypeError)):
        ph_resnet(19)
    with pytest.raises(ValueError, match="widths must have a number for each of 4 stages"):
        ph_resnet(18, widths=(8, 16))
    with pytest.raises(ValueError, match="takes no options"):
        ph_resnet(18, None, rank=2)
    with pytest.raises(ValueError, match="frequencies must be a multiple"):
        ph_sednet(4, frequencies=100)
    with pytest.raises(TypeError, match="takes no dtype"):
        ph_vgg(16, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="in_channels must be a multiple of n = 4"):
        ph_resnet(18, 4, in_channels=3)


def test_images_get_the_channels_that_are_missing():
    x = torch.rand(2, 3, 4, 4)
    zero, grey = to_hypercomplex(x, 4), to_hypercomplex(x, 4, "grey")
    assert torch.equal(zero[:, :3], x)
    assert not zero[:, 3].any()
    torch.testing.assert_close(grey[:, 3], (x[:, 0] + x[:, 1] + x[:, 2]) / 3)
    assert to_hypercomplex(x, 3) is x
    assert to_hypercomplex(x, 8).shape == (2, 8, 4, 4)
    assert to_hypercomplex(x[:, :, 0, 0], 2).shape == (2, 4)
    with pytest.raises(ValueError, match="n must be at least 1"):
        to_hypercomplex(x, 0)


def test_folding_gives_ordinary_layers_and_the_same_function_and_expanding_undoes_it():
    model = nn.Sequential(
        PHConv2d(4, 8, 3, n=4, padding=1, padding_mode="circular"),
        nn.BatchNorm2d(8),
        PHConvTranspose2d(8, 8, 2, stride=2, groups=2, n=2),
        nn.Flatten(),
        PHLinear(8 * 8 * 8, 12, n=4, rank=3),
    ).double()  # fmt: skip
    shared = PHLinear(12, 12, n=4).double()
    model.append(shared).append(shared).eval()
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    folded = ph_fold(model)
    assert not any(isinstance(m, HypercomplexLayer) for m in folded.modules())
    assert any(isinstance(m, HypercomplexLayer) for m in model.modules())
    assert folded[5] is folded[6]
    assert not folded.training
    torch.testing.assert_close(folded(x), model(x), atol=1e-12, rtol=1e-12)
    expanded = ph_expand(folded, n=2, terms=4)
    assert sum(isinstance(m, HypercomplexLayer) for m in expanded.modules()) == 4
    torch.testing.assert_close(expanded(x), model(x), atol=1e-11, rtol=1e-11)


def test_n_terms_give_a_folded_network_back():
    model = nn.Sequential(PHLinear(16, 32, n=4), nn.ReLU(), PHLinear(32, 8, n=4)).double()
    x = torch.randn(5, 16, dtype=torch.float64)
    expanded = ph_expand(ph_fold(model), n=4)
    assert count(expanded) == count(model)
    assert all(layer.relative_error < 1e-12 for layer in (expanded[0], expanded[2]))
    torch.testing.assert_close(expanded(x), model(x), atol=1e-12, rtol=1e-12)


def test_expanding_leaves_alone_what_it_is_told_to():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 6))
    one = ph_expand(model, n=4, where=lambda name: name == "1")
    assert [type(layer) for layer in one] == [nn.Linear, PHLinear, nn.Linear]
    some = ph_expand(model, n=2, terms={"0": 1, "2": 3})
    assert [getattr(layer, "terms", None) for layer in some] == [1, None, 3]
    with pytest.raises(ValueError, match="got 7"):
        ph_expand(model, terms={"7": 1})


def test_budget_of_equal_layers_is_spent_as_exhaustive_search_would():
    torch.manual_seed(1)
    n, layers = 2, 3
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(layers)))
    with torch.no_grad():
        for i, layer in enumerate(model):
            # The first is one product and a little noise, the last has no structure at all.
            product = kronecker_sum(torch.randn(1, n, n), torch.randn(1, 8, 8))
            layer.weight.copy_((2 - i) * product + 0.3 * i * torch.randn(16, 16) + 0.01 * torch.randn(16, 16))
    price, plain = n * n + 16 * 16 // n**2, 16 * 16
    tails = []
    for layer in model:
        energy = kronecker_singular_values(layer.weight.detach(), n) ** 2
        tails.append([float(energy[m:].sum() / energy.sum()) for m in range(5)])
    # One to three products, of which the fourth would cost more than the layer itself, or that layer (no error).
    choices = {m: (m * price, [tail[m] for tail in tails]) for m in (1, 2, 3)} | {None: (plain, [0.0] * layers)}
    errors: list[float] = []
    for products in range(3, 13):
        plan = choose_terms(model, n=n, parameters=products * price)
        chosen = [plan.terms.get(str(i)) for i in range(layers)]
        assert plan.parameters == sum(choices[m][0] for m in chosen) <= products * price
        # The last purchases may be bettered, but not with the price of one layer less to spend.
        best = min(
            sum(choices[m][1][i] for i, m in enumerate(every))
            for every in itertools.product(choices, repeat=layers)
            if sum(choices[m][0] for m in every) <= max(products * price - plain, layers * price)
        )
        errors.append(sum(choices[m][1][i] for i, m in enumerate(chosen)))
        assert errors[-1] <= best + 1e-9
        smaller = ph_expand(model, n=n, terms=plan.terms)
        assert count(smaller) == plan.parameters
        for i, layer in enumerate(smaller):
            error = getattr(layer, "relative_error", 0.0)
            assert error == pytest.approx(plan.relative_error[str(i)], abs=1e-5)
    # The structured layer is content with one product for as long as others want more.
    assert choose_terms(model, n=n, parameters=6 * price).terms["0"] == 1
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0.0


def test_budgets_as_parts_reach_from_one_product_to_the_network_itself():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 32, 3), nn.Linear(32, 10))
    errors = []
    for part in (0.25, 0.4, 0.6, 0.8, 0.999):
        plan = choose_terms(model, n=4, parameters=part)
        smaller = ph_expand(model, n=4, terms=plan.terms)
        assert count(smaller) == plan.parameters <= part * count(model)
        assert set(plan.relative_error) == {"2"}
        errors.append(plan.relative_error["2"])
    assert errors == sorted(errors, reverse=True)
    assert choose_terms(model, n=4, parameters=1.0).terms == {}
    with pytest.raises(ValueError, match="one product a layer"):
        choose_terms(model, n=4, parameters=0.05)


def test_tied_weights_are_no_saving_and_stay():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    plan = choose_terms(model, n=2, parameters=0.8)
    assert set(plan.terms) == {"2"}
    assert count(ph_expand(model, n=2, terms=plan.terms)) == plan.parameters


def test_algebras_are_not_decayed():
    model = nn.Sequential(PHLinear(8, 8), nn.BatchNorm1d(8), PHLinear(8, 8, algebra="quaternion"), nn.Linear(8, 2))
    decayed, algebras = param_groups(model, 5e-4)
    assert decayed["weight_decay"] == 5e-4
    assert algebras == {"params": [model[0].A], "weight_decay": 0.0}
    assert len(decayed["params"]) + 1 == len(list(model.parameters()))


def test_the_report_finds_an_algebra_behind_any_basis():
    quaternion = PHLinear(8, 8, n=4, algebra="quaternion", learn_algebra=True)
    with torch.no_grad():
        quaternion.A.copy_(torch.einsum("ij,jab->iab", torch.randn(4, 4), quaternion.A))
    model = nn.ModuleDict({"found": quaternion, "random": PHConv2d(8, 8, 3), "pairs": PHLinear(4, 4, n=2)})
    report = algebra_report(model)
    assert report["found"]["quaternion"] < 1e-5 < report["found"]["clifford(1,1)"]
    assert report["random"]["quaternion"] > 0.5
    assert set(report["pairs"]) == {"complex"}

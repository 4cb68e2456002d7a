"""Sensitivities against closed forms and exact Hessians; searches against scans and exhaustive enumeration."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lathe.compression.mixed_precision_quantization import (
    Interactions,
    Range,
    Simulator,
    Top1,
    allocate,
    augmented_scores,
    bisect_precision,
    calibrate,
    floor_confidence,
    fold_batch_norms,
    greedy_pairs,
    greedy_precision,
    half_pair_scores,
    hessian_interactions,
    hessian_scores,
    noise_scores,
    pairwise_interactions,
    quantization_errors,
    refine_scales,
    sensitivity_order,
)

# --- interactions -----------------------------------------------------------------------------------------------------


class Sum(nn.Module):
    """Linear layers side by side, added up: the output is linear in all weights, so a squared loss is quadratic."""

    def __init__(self, layers, sizes=3):
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(sizes, 2, bias=False) for _ in range(layers))

    def forward(self, x):
        return sum(branch(part) for branch, part in zip(self.branches, x.chunk(len(self.branches), dim=1)))


class Apart(Sum):
    """The same layers, each with outputs of its own."""

    def forward(self, x):
        return torch.cat([b(part) for b, part in zip(self.branches, x.chunk(len(self.branches), dim=1))], dim=1)


def exact(simulator):
    """Inputs are on every grid: only weights are rounded, as second-order theory assumes."""
    for layer in simulator.layers.values():
        layer.clips[4] = (layer.clip(4)[0], torch.tensor(7.0))
    return simulator


def sign_batch(rng, columns, outputs, rows=40):
    x = torch.randint(0, 2, (rows, columns), generator=rng).double() * 2 - 1
    return x, torch.randn(rows, outputs, generator=rng, dtype=torch.float64)


def test_quadratic_loss_has_the_interactions_of_second_order_theory(rng):
    torch.manual_seed(0)
    net = Sum(4).double()
    x, y = sign_batch(rng, 12, 2)
    simulator = exact(Simulator(net, calibrate(net, [(x, y)], bits=[4])))
    # Simulated layers compute in float32; closed forms below are in the same weights in float64.
    found = pairwise_interactions(simulator, F.mse_loss, [(x, y)], 4)
    errors = [error.double() for error in simulator.errors(4).values()]
    shifts = [part @ error.T for part, error in zip(x.chunk(4, 1), errors)]
    residual = net(x).detach() - y
    for i in range(4):
        # g^T e + e^T H e / 2, written out for the mean of squares.
        expected = (2 * residual * shifts[i] + shifts[i] ** 2).mean()
        assert float(found.single[i]) == pytest.approx(float(expected), abs=1e-6)
        for j in range(4):
            if i != j:
                assert float(found.pair[i, j]) == pytest.approx(float((2 * shifts[i] * shifts[j]).mean()), abs=1e-6)


def test_hessian_products_give_the_interactions_of_a_quadratic_loss(rng):
    torch.manual_seed(0)
    net = Sum(3).double()
    x, y = sign_batch(rng, 9, 2)
    simulator = exact(Simulator(net, calibrate(net, [(x, y)], bits=[4])))
    products = hessian_interactions(simulator, F.mse_loss, [(x, y)], 4)
    errors = [error.double() for error in simulator.errors(4).values()]
    shifts = [part @ error.T for part, error in zip(x.chunk(3, 1), errors)]
    for i, j in itertools.combinations(range(3), 2):
        assert float(products.pair[i, j]) == pytest.approx(float((2 * shifts[i] * shifts[j]).mean()), abs=1e-10)
    for i in range(3):
        assert float(products.single[i]) == pytest.approx(float((shifts[i] ** 2).mean()), abs=1e-10)


def test_layers_that_share_no_output_do_not_interact_and_all_orders_agree(rng):
    torch.manual_seed(0)
    net = Apart(5)
    with torch.no_grad():
        for n, branch in enumerate(net.branches):
            branch.weight *= [3.0, 0.1, 1.0, 0.3, 10.0][n]
    x = torch.randint(0, 2, (64, 15), generator=rng).float() * 2 - 1
    # At the minimum: the gradient is zero and the Hessian block-diagonal.
    batch = (x, net(x).detach())
    simulator = exact(Simulator(net, calibrate(net, [batch], bits=[4])))
    interactions = pairwise_interactions(simulator, F.mse_loss, [batch], 4)
    assert float(interactions.pair.abs().max()) < 1e-6 * float(interactions.single.max())
    hessian = hessian_scores(simulator, F.mse_loss, [batch], 4, probes=20)
    expected = interactions.single.argsort().tolist()
    assert augmented_scores(hessian, interactions).argsort().tolist() == expected
    assert half_pair_scores(interactions).argsort().tolist() == expected
    assert greedy_pairs(interactions.single, interactions.pair) == expected
    assert greedy_pairs(*hessian_interactions(simulator, F.mse_loss, [batch], 4)) == expected
    assert expected == [1, 3, 2, 0, 4]


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 1)
        )

    def forward(self, x):
        y = self.body(x)
        y += x  # writes into a module's result
        return F.hardswish(y, inplace=True)


@pytest.fixture
def conv_net():
    torch.manual_seed(0)
    shared = Block(4)  # called twice
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), shared, Block(4), shared, nn.Flatten(), nn.Linear(144, 3)
    )


@pytest.fixture
def conv_batch(rng):
    return torch.randn(10, 1, 8, 8, generator=rng), torch.randint(0, 3, (10,), generator=rng)


def test_reused_activations_give_the_very_same_answer(conv_net, conv_batch):
    simulator = Simulator(conv_net, calibrate(conv_net, [conv_batch]))
    batches = [tuple(each[:6] for each in conv_batch), tuple(each[6:] for each in conv_batch)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reused = pairwise_interactions(simulator, F.cross_entropy, batches, 3)
    plain = pairwise_interactions(simulator, F.cross_entropy, batches, 3, reuse=False)
    assert torch.equal(reused.single, plain.single)
    assert torch.equal(reused.pair, plain.pair)
    assert simulator.config == dict.fromkeys(simulator.layers, 16)


def test_pairs_are_loss_differences_of_whole_networks(conv_net, conv_batch):
    simulator = Simulator(conv_net, calibrate(conv_net, [conv_batch]))
    names = list(simulator.layers)
    found = pairwise_interactions(simulator, F.cross_entropy, conv_batch, 3, layers=[names[3], names[0]])

    def loss(*layers):
        with torch.no_grad():
            return float(F.cross_entropy(simulator.configure(dict.fromkeys(layers, 3))(conv_batch[0]), conv_batch[1]))

    a, b = names[3], names[0]
    assert float(found.single[0]) == pytest.approx(loss(a) - loss(), abs=1e-7)
    assert float(found.pair[0, 1]) == pytest.approx(loss(a, b) - loss(a) - loss(b) + loss(), abs=1e-7)
    assert float(found.together()[0, 1]) == pytest.approx(loss(a, b) - loss(), abs=1e-7)


def test_reuse_does_a_third_of_the_work_on_a_chain():
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(16)])
    batch = (torch.randn(3, 4), torch.randn(3, 4))
    simulator = Simulator(net, calibrate(net, [batch]))
    calls = []
    for layer in simulator.layers.values():
        layer.map = lambda *args, map=layer.map: (calls.append(1), map(*args))[1]
        layer.layer.register_forward_hook(lambda *_: calls.append(1))
    pairwise_interactions(simulator, F.mse_loss, [batch], 4)
    reused = len(calls)
    calls.clear()
    pairwise_interactions(simulator, F.mse_loss, [batch], 4, reuse=False)
    assert len(calls) == 16 * (1 + 16 + 120)
    assert reused <= len(calls) / 2.4  # L (L + 1) / 3 and two clean runs


def test_a_network_that_changes_its_path_is_run_in_full(rng):
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
            self.runs = 0

        def forward(self, x):
            self.runs += 1
            first, second = (self.b, self.c) if self.runs % 2 else (self.c, self.b)
            return self.a(second(first(x)))

    net = Fickle()
    batch = (torch.randn(5, 4, generator=rng), torch.randn(5, 4, generator=rng))
    simulator = Simulator(net, calibrate(net, [batch]))
    with pytest.warns(RuntimeWarning, match="Fickle does not call its modules in a fixed order"):
        pairwise_interactions(simulator, F.mse_loss, [batch], 4)


# --- orders -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def simulated(conv_net, conv_batch):
    return Simulator(conv_net, calibrate(conv_net, [conv_batch]))


@pytest.mark.parametrize(
    "method",
    ["augmented", "hessian", "qe", "noise", "random", "single", "greedy_pairs", "half_pairs", "hessian_pairs"],
)
def test_every_order_names_every_layer_once_and_is_repeatable(simulated, conv_batch, method):
    first, second = (
        sensitivity_order(simulated, method, loss_fn=F.cross_entropy, batches=[conv_batch], probes=5) for _ in range(2)
    )
    assert first == second
    assert sorted(first) == sorted(simulated.layers)


def test_hessian_scores_are_the_exact_traces_times_errors(rng):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    batch = (torch.randn(20, 3, generator=rng), torch.randint(0, 2, (20,), generator=rng))
    simulator = Simulator(net, calibrate(net, [batch]))
    scores = hessian_scores(simulator, F.cross_entropy, [batch], 4, probes=400, tol=None)
    for place, name in enumerate(["0", "2"]):
        weight = net.get_submodule(name).weight

        def loss(value, name=name):
            return F.cross_entropy(torch.func.functional_call(net, {f"{name}.weight": value}, (batch[0],)), batch[1])

        hessian = torch.autograd.functional.hessian(loss, weight.detach()).reshape(weight.numel(), -1)
        error = (simulator.layers[name].rounded(4) - weight.detach()).square().sum()
        expected = float(hessian.trace().clamp_min(0) / weight.numel() * error)
        assert float(scores[place]) == pytest.approx(expected, rel=0.2)


def test_rounding_errors_are_relative_to_the_weights(simulated):
    errors = quantization_errors(simulated, 4)
    for found, layer in zip(errors, simulated.layers.values()):
        expected = (layer.rounded(4) - layer.weight).norm() / layer.weight.norm()
        assert float(found) == pytest.approx(float(expected))


def test_noise_of_the_errors_size_costs_what_theory_says(rng):
    net = nn.Linear(6, 3, bias=False)
    x = torch.randn(4000, 6, generator=rng)
    batch = (x, net(x).detach())
    simulator = Simulator(net, calibrate(net, [batch]))
    size = simulator.errors(3)[""].square().mean()
    (score,) = noise_scores(simulator, F.mse_loss, [batch], 3, draws=400)
    assert float(score) == pytest.approx(float(size * x.square().sum(1).mean()), rel=0.15)


def test_augmented_scores_by_hand():
    interactions = Interactions(torch.tensor([1.0, 2.0]), torch.tensor([[0.0, 3.0], [3.0, 0.0]]))
    assert interactions.together().tolist() == [[1.0, 6.0], [6.0, 2.0]]
    # Row sums 7 and 8, mean 7.5; Hessian 1 and 3, mean 2.
    scores = augmented_scores(torch.tensor([1.0, 3.0]), interactions, weight=2.0)
    assert scores.tolist() == pytest.approx([0.5 + 2 * 7 / 7.5, 1.5 + 2 * 8 / 7.5])
    assert half_pair_scores(interactions).tolist() == [2.5, 3.5]


def test_greedy_on_pairs_avoids_company_that_hurts():
    single = torch.tensor([1.0, 1.1, 1.2])
    pair = torch.tensor([[0.0, 5.0, 0.0], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert greedy_pairs(single, pair) == [0, 2, 1]


def test_equal_scores_keep_the_order_of_running():
    net = nn.Sequential(*[nn.Linear(3, 3) for _ in range(6)])
    for layer in net[1:]:
        layer.load_state_dict(net[0].state_dict())
    ranges = {str(n): Range(True, {4: 1.0}, (1, 3)) for n in range(6)}
    assert sensitivity_order(Simulator(net, ranges), "qe") == [str(n) for n in range(6)]


def test_refined_scales_come_closer_to_the_unquantised_network(rng):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(64, 8, generator=rng)
    simulator = Simulator(net, calibrate(net, (x,)))
    kept = net.state_dict()
    simulator.configure({"0": 3, "2": 3})

    def distance():
        with torch.no_grad():
            return float((simulator(x) - net(x)).square().mean())

    before = distance()
    losses = refine_scales(simulator, (x,), 3, 60, lr=1e-2)
    assert losses[0] == pytest.approx(before * 1.0, rel=1e-4)
    assert distance() < 0.9 * before
    assert all(torch.equal(net.state_dict()[name], value) for name, value in kept.items())


# --- searches ---------------------------------------------------------------------------------------------------------


def additive(losses, calls=None):
    def score(config):
        if calls is not None:
            calls.append(config)
        return -sum(losses[name][bits] for name, bits in config.items())

    return score


def random_losses(layers, seed):
    generator = torch.Generator().manual_seed(seed)
    eight = torch.rand(layers, generator=generator)
    four = eight + 4 * torch.rand(layers, generator=generator)
    return {f"l{n}": {16: 0.0, 8: float(eight[n]), 4: float(four[n])} for n in range(layers)}


def longest_prefixes(score, names, floor):
    config = dict.fromkeys(names, 16)
    for bits in (8, 4):
        trials = [config | {name: min(config[name], bits) for name in names[:m]} for m in range(len(names) + 1)]
        config = [trial for trial in trials if score(trial) >= floor][-1]
    return config


@given(st.integers(1, 40), st.integers(0, 1000), st.floats(0.0, 1.2))
@settings(max_examples=60, deadline=None)
def test_bisection_finds_the_longest_prefixes_in_logarithmically_many_evaluations(layers, seed, share):
    losses = random_losses(layers, seed)
    floor = -share * sum(each[4] for each in losses.values())
    calls = []
    found = bisect_precision(additive(losses, calls), list(losses), floor=floor)
    assert len(calls) <= 2 * math.ceil(math.log2(layers + 1)) + 1
    assert found == longest_prefixes(additive(losses), list(losses), floor)


@given(st.integers(1, 20), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_what_bisection_returns_was_evaluated_above_the_floor_even_where_accuracy_is_not_monotone(layers, seed):
    generator = torch.Generator().manual_seed(seed)
    seen = {}

    def score(config):
        key = tuple(config.values())
        if key not in seen:
            seen[key] = 1.0 if set(key) == {16} else float(torch.rand((), generator=generator))
        return seen[key]

    found = bisect_precision(score, [f"l{n}" for n in range(layers)], floor=0.6)
    assert seen[tuple(found.values())] >= 0.6


@given(st.integers(1, 12), st.integers(0, 1000), st.floats(0.0, 1.0))
@settings(max_examples=40, deadline=None)
def test_greedy_search_keeps_the_floor_and_is_maximal(layers, seed, share):
    losses = random_losses(layers, seed)
    floor = -share * sum(each[4] for each in losses.values())
    calls = []
    found = greedy_precision(additive(losses, calls), list(losses), floor=floor)
    assert len(calls) <= 2 * layers + 1
    assert additive(losses)(found) >= floor
    for name, bits in found.items():
        if bits == 8:
            assert additive(losses)(found | {name: 4}) < floor


def test_layers_that_may_not_be_lowered_are_passed_over():
    losses = random_losses(6, 0)
    found = bisect_precision(
        additive(losses),
        list(losses),
        floor=-1e9,
        may_lower=lambda name, bits: name != "l2" and (name, bits) != ("l3", 4),
    )
    assert found == {"l0": 4, "l1": 4, "l2": 16, "l3": 8, "l4": 4, "l5": 4}


def brute_force(cost, increase, budget, pairs, conversions):
    best = math.inf
    for choice in itertools.product((16, 8, 4), repeat=len(cost)):
        config = dict(zip(cost, choice))
        loss = sum(increase[name][bits] for name, bits in config.items())
        loss += sum(omega for (i, j), omega in pairs.items() if config[i] == config[j] == 4)
        if loss <= budget:
            price = sum(cost[name][bits] for name, bits in config.items())
            price += sum(value for (i, j), value in conversions.items() if config[i] == 16 and config[j] < 16)
            best = min(best, price)
    return best


@given(st.integers(1, 6), st.integers(0, 10_000), st.floats(0.05, 0.9))
@settings(max_examples=25, deadline=None)
def test_the_integer_program_finds_the_optimum_of_exhaustive_search(layers, seed, share):
    generator = torch.Generator().manual_seed(seed)
    increase = random_losses(layers, seed)
    names = list(increase)
    size = torch.rand(layers, generator=generator) + 0.1
    cost = {name: {b: float(size[n]) * b for b in (16, 8, 4)} for n, name in enumerate(names)}
    pair = torch.randn(layers, layers, generator=generator)
    pairs = {(names[i], names[j]): float(pair[i, j]) for i, j in itertools.combinations(range(layers), 2)}
    conversions = {(names[i], names[i + 1]): float(pair[i + 1, i].abs()) for i in range(layers - 1)}
    budget = share * sum(each[4] for each in increase.values())
    found = allocate(cost, increase, budget, pairs=pairs, conversions=conversions)
    price = sum(cost[name][bits] for name, bits in found.items())
    price += sum(value for (i, j), value in conversions.items() if found[i] == 16 and found[j] < 16)
    assert price == pytest.approx(brute_force(cost, increase, budget, pairs, conversions), rel=1e-5)


@given(st.integers(2, 7), st.integers(0, 1000), st.floats(0.1, 0.9))
@settings(max_examples=20, deadline=None)
def test_bisection_along_an_order_never_beats_the_optimum_over_all_assignments(layers, seed, share):
    losses = random_losses(layers, seed)
    budget = share * sum(each[4] for each in losses.values())
    cost = {name: {b: float(b) for b in (16, 8, 4)} for name in losses}
    order = sorted(losses, key=lambda name: losses[name][4])
    found = bisect_precision(additive(losses), order, floor=-budget)
    best = brute_force(cost, losses, budget, {}, {})
    assert best <= sum(found.values()) + 1e-9 <= 4 * best
    assert sum(allocate(cost, losses, budget).values()) == pytest.approx(best)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": (16, 9)}, r"bits must be 2 to 8, or 16, got \(16, 9\)"),
        ({"bits": (8, 16)}, "bits must fall"),
        ({"floor": 1.0}, "floor must be within reach of the unquantised network, got 1.0 where it scores"),
    ],
)
def test_impossible_searches_are_refused(arguments, message):
    losses = random_losses(3, 0)
    with pytest.raises(ValueError, match=message):
        bisect_precision(additive(losses), list(losses), **{"floor": -1.0, **arguments})


def test_a_budget_below_everything_is_refused():
    losses = {"a": {16: 1.0, 8: 2.0}}
    with pytest.raises(ValueError, match="budget must allow some configuration"):
        allocate({"a": {16: 2.0, 8: 1.0}}, losses, 0.5)


# --- certainty --------------------------------------------------------------------------------------------------------


def test_floor_confidence_is_that_of_resampling_by_hand(rng):
    base = torch.rand(300, generator=rng) < 0.9
    quantized = base ^ (torch.rand(300, generator=rng) < 0.05)
    hits = 0
    for _ in range(4000):
        chosen = torch.randint(300, (300,), generator=rng)
        hits += int(quantized[chosen].double().mean() >= 0.97 * base[chosen].double().mean())
    assert floor_confidence(base, quantized, 0.97) == pytest.approx(hits / 4000, abs=0.03)
    assert 0.02 < hits / 4000 < 0.98


@pytest.mark.parametrize(("right", "expected"), [(1.0, 1.0), (0.0, 0.0)])
def test_floor_confidence_of_a_clear_case_is_certain(right, expected):
    base = torch.ones(50, dtype=torch.bool)
    assert floor_confidence(base, torch.full((50,), bool(right)), 0.9) == expected


def test_accuracy_stops_early_only_where_the_floor_is_decided(rng):
    labels = torch.randint(0, 2, (4000,), generator=rng)
    inputs = F.one_hot(labels, 2).float()
    judge = Top1(list(zip(inputs.split(100), labels.split(100))))
    same, wrong = nn.Identity(), nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        wrong.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    reference = judge.correct(same)
    assert float(reference.double().mean()) == 1.0
    judge.seen = 0
    assert judge.against(wrong, reference, 0.99) < 1
    assert judge.seen == 100
    judge.seen = 0
    assert judge.against(same, reference, 1.0) == 1.0
    assert judge.seen == 4000  # equal to the floor: no number of samples but all decides


@given(st.integers(0, 500), st.floats(0.0, 0.08))
@settings(max_examples=25, deadline=None)
def test_an_early_stop_decides_as_all_samples_would(seed, broken):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(3000, dtype=torch.long)
    right = torch.rand(3000, generator=generator) >= broken
    outputs = F.one_hot((~right).long(), 2).float()
    judge = Top1(list(zip(outputs.split(100), labels.split(100))), confidence=0.9999)
    reference = torch.ones(3000, dtype=torch.bool)
    share = float(right.double().mean())
    assert (judge.against(nn.Identity(), reference, 0.96) >= 1) == (share >= 0.96)


# --- bad arguments ----------------------------------------------------------------------------------------------------


def test_an_unknown_order_is_refused(simulated):
    with pytest.raises(ValueError, match="method must be one of augmented"):
        sensitivity_order(simulated, "alphabet", batches=[(torch.zeros(1),)])  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["augmented", "hessian", "noise"])
def test_an_order_without_what_it_needs_is_refused(simulated, conv_batch, method):
    with pytest.raises(ValueError, match="batches must be given"):
        sensitivity_order(simulated, method)
    with pytest.raises(ValueError, match="loss_fn must be given"):
        sensitivity_order(simulated, method, batches=[conv_batch])


def test_a_network_without_layers_to_quantise_is_refused():
    with pytest.raises(ValueError, match="model must have a layer that can be quantised"):
        Simulator(nn.ReLU(), {})


def test_folding_and_simulation_leave_the_network_alone(conv_net, conv_batch):
    before = {name: value.clone() for name, value in conv_net.state_dict().items()}
    conv_net.train()
    folded = fold_batch_norms(conv_net, conv_batch[0])
    Simulator(folded, calibrate(folded, [conv_batch])).configure({"0": 4})(conv_batch[0])
    assert conv_net.training
    assert all(torch.equal(before[name], value) for name, value in conv_net.state_dict().items())

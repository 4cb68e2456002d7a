"""Scaling rules and limits: against the paper's table, symmetries, brute force, sampled networks, a peer's kernels."""

from __future__ import annotations

import json
import os
import subprocess
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lathe.theory.infinite_width_feature_learning import (
    ABC,
    ABCNetwork,
    InfiniteWord2Vec,
    KernelLearner,
    LinearMuPLimit,
    LinearNetwork,
    MeanFieldLimit,
    ParticleLimit,
    Word2Vec,
    first_order_maml,
    two_layer_limit,
)

HALF = Fraction(1, 2)
exponents = st.integers(-4, 4).map(lambda k: Fraction(k, 2))


# Classification.


@pytest.mark.parametrize(
    ("abc", "r", "regime"),
    [
        (ABC.standard(2), HALF, "kernel"),
        (ABC.standard(3, 0), -1, "unstable"),
        (ABC.ntk(2), HALF, "kernel"),
        (ABC.ntk(5), HALF, "kernel"),
        (ABC.mean_field(), 0, "feature learning"),
        (ABC.mup(1), 0, "feature learning"),
        (ABC.mup(4), 0, "feature learning"),
        (ABC((-HALF, 0, HALF), (HALF, HALF, HALF), Fraction(1, 4)), Fraction(1, 4), "trivial"),
    ],
)
def test_the_named_rules_are_what_the_paper_says(abc, r, regime):
    assert (abc.r, abc.regime) == (r, regime)
    assert abc.stable is (regime != "unstable")
    assert bool(abc.reasons) is (regime in ("unstable", "trivial"))


def test_rates_between_the_stable_and_the_feature_learning_one_blow_up_the_logits():
    abc = ABC.standard(2, 0.5)
    assert not abc.stable
    assert any("2 a_3 + c_3" in reason for reason in abc.reasons)


def test_layers_that_make_up_the_kernel():
    assert ABC.ntk(2).kernel_layers == (1, 2, 3)
    assert ABC.standard(2).kernel_layers == (2, 3)  # the first layer drops out
    assert ABC.mup(2).kernel_layers == ()


def test_mean_field_is_mup_shifted():
    assert ABC.mup(1).shift(HALF) == ABC.mean_field()
    assert ABC.mup(1).canonical() == ABC.mean_field().canonical()


@given(a=st.tuples(exponents, exponents, exponents), b=st.tuples(exponents, exponents, exponents), c=exponents,
       theta=st.tuples(exponents, exponents, exponents), optimizer=st.sampled_from(["sgd", "adam"]))  # fmt: skip
def test_shifts_change_nothing(a, b, c, theta, optimizer):
    abc = ABC(a, b, c, optimizer)
    for moved in (abc.shift(theta[0]), abc.shift(theta)):
        for name in ("r_layer", "change_exponents", "regime", "maximal", "kernel_layers", "maximally_updated"):
            assert getattr(moved, name) == getattr(abc, name), name
        assert moved.canonical() == abc.canonical()


@given(a=st.tuples(exponents, exponents), b=st.tuples(exponents, exponents), c=exponents)
def test_a_rule_that_trains_either_learns_features_or_is_a_kernel(a, b, c):
    abc = ABC(a, b, c)
    assert abc.nontrivial == (abc.feature_learning != abc.kernel_regime)
    if abc.feature_learning:
        assert a[-1] + b[-1] >= 1  # the output starts at zero
    if abc.maximal:
        assert abc.canonical() == ABC.mup(1).canonical()


def test_floats_within_a_billionth_count_as_equal():
    third = 1 / 3
    assert ABC.mup(2).shift(third).feature_learning
    assert not ABC((-0.5, 0.001, 0.5), (0.5, 0.5, 0.5)).stable


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("rule", ["mup", "ntk", "standard"])
def test_measured_changes_follow_the_exponents(rule, optimizer):
    abc = getattr(ABC, rule)(2, optimizer=optimizer)
    widths, changes = (128, 512, 2048), []
    for width in widths:
        moved = []
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(4, 4, dtype=torch.float64, generator=generator)
            y = torch.randn(4, 1, dtype=torch.float64, generator=generator)
            net = ABCNetwork(abc, width, 4, generator=generator)
            kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam
            stepper = kind(net.param_groups(0.3 if optimizer == "sgd" else 0.1))
            before = [h.detach() for h in net.preactivations(x)]
            (0.5 * (net(x) - y).square().mean()).backward()
            stepper.step()
            moved.append([(h - old).abs().mean().item() for h, old in zip(net.preactivations(x), before)])
        changes.append(torch.tensor(moved).mean(0))
    slopes = (changes[-1] / changes[0]).log2() / 4
    torch.testing.assert_close(slopes, -torch.tensor([float(e) for e in abc.change_exponents]), atol=0.2, rtol=0)


@given(theta=st.sampled_from([-1, HALF, 1]))
@settings(max_examples=3, deadline=None)
def test_shifted_networks_train_alike(theta):
    x, y = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 1, dtype=torch.float64)
    outputs = []
    for abc in (ABC.mup(2), ABC.mup(2).shift(theta)):
        net = ABCNetwork(abc, 32, 4, generator=torch.Generator().manual_seed(1))
        optimizer = torch.optim.SGD(net.param_groups(0.2), momentum=0.5)
        for _ in range(10):
            optimizer.zero_grad()
            (net(x) - y).square().mean().backward()
            optimizer.step()
        outputs.append(net(x))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (((0, 0), (0, 0, 0), 0), "one exponent a layer"),
        (((0,), (0,), 0), "at least one hidden layer"),
        (((0, float("nan")), (0, 0), 0), "a must hold finite"),
        (((0, 0), (0, 0), 0, "lion"), "'sgd' or 'adam'"),
    ],
)
def test_bad_exponents_are_refused(arguments, says, shape_checks_off):
    with pytest.raises(ValueError, match=says):
        ABC(*arguments)
    with pytest.raises(ValueError, match="L must be at least 1"):
        ABC.mup(0)


# Limits.


def test_the_linear_limit_is_the_scalar_recursion_and_the_mean_of_networks(rng):
    x, y = torch.randn(6, dtype=torch.float64, generator=rng), torch.randn(6, dtype=torch.float64, generator=rng)
    limit = LinearMuPLimit(1, 1, dtype=torch.float64)
    nets, width = 1000, 256
    U = torch.randn(nets, width, dtype=torch.float64, generator=rng)
    V = torch.randn(nets, width, dtype=torch.float64, generator=rng)
    A, B, C, D = 1.0, 0.0, 0.0, 1.0
    for xi, target in zip(x.tolist(), y.tolist()):
        f = limit(torch.tensor([[xi]], dtype=torch.float64))
        assert f.item() == pytest.approx((A * C + B * D) * xi, abs=1e-12)
        limit.zero_grad()
        (0.5 * (f - target).square().sum()).backward()
        with torch.no_grad():
            for parameter in limit.parameters():
                parameter -= 0.3 * parameter.grad
        step = 0.3 * ((A * C + B * D) * xi - target) * xi
        A, B, C, D = A - step * C, B - step * D, C - step * A, D - step * B
        steps = 0.3 * ((U * V).mean(1, keepdim=True) * xi - target) * xi
        U, V = U - steps * V, V - steps * U
    slopes = (U * V).mean(1)
    # Each network is off by O(1/sqrt(width)), their mean by O(1/width) on top of its own error.
    assert abs(slopes.mean() - (A * C + B * D)) < 4 * slopes.std() / nets**0.5 + 1 / width


@given(d=st.integers(1, 4), o=st.integers(1, 3), beta=st.sampled_from([0.0, 0.7]))
@settings(max_examples=10, deadline=None)
def test_sampled_networks_have_the_limits_outputs_and_stay_with_it(d, o, beta):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, d, dtype=torch.float64, generator=generator)
    y = torch.randn(5, o, dtype=torch.float64, generator=generator)
    limit = LinearMuPLimit(d, o, hidden_bias=beta, dtype=torch.float64)
    net = limit.sample(40_000, generator)
    for each in (limit, net):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.2)
        for _ in range(5):
            optimizer.zero_grad()
            F.mse_loss(each(x), y).backward()
            optimizer.step()
    torch.testing.assert_close(net(x), limit(x), atol=0.1, rtol=0)


def test_gradient_flow_of_the_linear_limit_conserves_the_difference_of_grams(rng):
    x, y = torch.randn(5, 3, dtype=torch.float64, generator=rng), torch.randn(5, 2, dtype=torch.float64, generator=rng)
    drifts = []
    for halvings in (0, 1):
        limit = LinearMuPLimit(3, 2, dtype=torch.float64)
        start = (limit.U @ limit.U.mT - limit.V.mT @ limit.V).detach()
        optimizer = torch.optim.SGD(limit.parameters(), lr=0.02 / 2**halvings)
        for _ in range(50 * 2**halvings):
            optimizer.zero_grad()
            F.mse_loss(limit(x), y).backward()
            optimizer.step()
        drifts.append((limit.U @ limit.U.mT - limit.V.mT @ limit.V - start).norm().item())
    assert drifts[0] < 0.05
    assert drifts[1] == pytest.approx(drifts[0] / 2, rel=0.1)


def test_the_quadrature_limit_is_the_particles_and_the_wide_network(rng):
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).unsqueeze(1)
    y = torch.sin(2 * x)
    wide = ABCNetwork(ABC.mup(1), 100_000, 1, act="tanh", generator=rng)
    outputs = []
    for net in (
        MeanFieldLimit("tanh", 80),
        MeanFieldLimit("tanh", 100),
        ParticleLimit(1, 1, "tanh", particles=100_000, generator=rng),
        wide,
    ):
        groups = wide.param_groups(0.1) if net is wide else net.parameters()
        optimizer = torch.optim.SGD(groups, lr=0.1)
        for _ in range(30):
            optimizer.zero_grad()
            (0.5 * (net(x) - y).square().mean()).backward()
            optimizer.step()
        outputs.append(net(x).detach())
    quadrature, finer, particles, network = outputs
    torch.testing.assert_close(quadrature, finer, atol=1e-6, rtol=0)
    assert quadrature.abs().max() > 0.1
    # The standard error of a mean over 1e5 neurons of V phi(U x), whose size is of order one.
    torch.testing.assert_close(particles, quadrature, atol=3 * 2 / 100_000**0.5, rtol=0)
    torch.testing.assert_close(network, quadrature, atol=3 * 2 / 100_000**0.5, rtol=0)


def test_the_limit_of_two_hidden_layers_is_the_mean_of_wide_networks(rng):
    x = torch.tensor([[1.0, 0.5], [-0.3, 1.2]], dtype=torch.float64)
    y = torch.tensor([1.0, -1.0], dtype=torch.float64)
    limit = two_layer_limit(x, lambda f: (f - y).square().mean(), 0.5, 3, samples=40_000, generator=rng)
    runs = []
    for seed in range(10):
        net = ABCNetwork(ABC.mup(2), 1024, 2, generator=torch.Generator().manual_seed(seed))
        optimizer = torch.optim.SGD(net.param_groups(0.5))
        outputs = []
        for _ in range(4):
            f = net(x).squeeze(-1)
            outputs.append(f.detach())
            optimizer.zero_grad()
            (f - y).square().mean().backward()
            optimizer.step()
        runs.append(torch.stack(outputs))
    mean, error = torch.stack(runs).mean(0), torch.stack(runs).std(0) / 10**0.5
    assert ((limit - mean).abs() < 4 * (error + 1 / 40_000**0.5)).all()
    assert limit[-1].abs().min() > 0.5


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LinearMuPLimit(0, 1), "in_features and out_features"),
        (lambda: LinearMuPLimit(2, 1).sample(0), "width must be at least 1"),
        (lambda: LinearNetwork(torch.zeros(3, 2), torch.zeros(1, 4)), "must have one width"),
        (lambda: ParticleLimit(1, particles=0), "particles must be"),
        (lambda: two_layer_limit(torch.zeros(1, 1), lambda f: f.sum(), 0.1, 0), "steps must be"),
        (lambda: ABCNetwork(ABC.mup(1), 0, 1), "width must be"),
        (lambda: InfiniteWord2Vec(1), "vocab_size must be"),
        (lambda: Word2Vec(5, 2).train_epoch(torch.tensor([0, 7])), "vocabulary of 5"),
        (lambda: KernelLearner("rbf", 2), "kernel must be"),
    ],
)
def test_bad_limits_are_refused(make, says, shape_checks_off):
    with pytest.raises(ValueError, match=says):
        make()


# MAML.


@pytest.mark.parametrize(("steps", "beta"), [(0, 0.0), (1, 0.5), (3, 0.5)])
def test_maml_is_what_loops_over_tasks_with_autograd_give(steps, beta, rng):
    tasks, ways, d = 3, 4, 6
    support, queries = (torch.randn(tasks, ways, d, dtype=torch.float64, generator=rng) for _ in range(2))
    labels = torch.arange(ways).expand(tasks, ways)
    model = LinearMuPLimit(d, ways, sigma_v=0.3, alpha=1.3, hidden_bias=beta, dtype=torch.float64).sample(9, rng)
    found = first_order_maml(model, support, labels, queries, labels, 0.4, inner_steps=steps)
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    losses = []
    for s, q in zip(support, queries):
        adapted = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
        for _ in range(steps):
            loss = F.cross_entropy(torch.func.functional_call(model, adapted, s), torch.arange(ways))
            gradients = torch.autograd.grad(loss, list(adapted.values()))
            adapted = {
                name: (p - 0.4 * g).detach().requires_grad_() for (name, p), g in zip(adapted.items(), gradients)
            }
        losses.append(F.cross_entropy(torch.func.functional_call(model, adapted, q), torch.arange(ways)))
        for name, gradient in zip(adapted, torch.autograd.grad(losses[-1], list(adapted.values()))):
            total[name] += gradient / tasks
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, total[name], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(found.loss, torch.stack(losses).mean().detach())


def test_maml_refuses_tasks_that_do_not_match(rng, shape_checks_off):
    model = LinearMuPLimit(3, 2)
    x, y = torch.randn(2, 4, 3), torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"queries must be \(2, examples, 3\), got \(2, 4, 5\)"):
        first_order_maml(model, x, y, torch.randn(2, 4, 5), y, 0.1)
    with pytest.raises(ValueError, match="labels must match"):
        first_order_maml(model, x, y[:, :3], x, y, 0.1)


# Word2Vec.


def reference_cbow(U, V, around, words, rate, decay):
    """word2vec's step for one centre, in plain Python over rows."""
    mean = U[around].mean(0)
    back = torch.zeros_like(mean)
    for place, word in enumerate(words):
        if place > 0 and word == words[0]:
            continue
        f = float(mean @ V[word])
        told = 1.0 if f > 6 else 0.0 if f < -6 else 1 / (1 + torch.tensor(-f, dtype=mean.dtype).exp().item())
        g = ((place == 0) - told) * rate
        back += g * V[word]
    return mean, back


@pytest.mark.parametrize("width", [4, None])
def test_an_epoch_one_centre_at_a_time_is_word2vec(width, rng, monkeypatch):
    vocabulary = 7
    net = InfiniteWord2Vec(vocabulary, dtype=torch.float64)
    if width:
        net = Word2Vec(vocabulary, width, generator=rng, dtype=torch.float64)
    net.readout.normal_(generator=rng)
    U, V = net.embedding.clone(), net.readout.clone()
    tokens = torch.randint(vocabulary, (30,), generator=rng)
    steps = []
    step = net._step
    monkeypatch.setattr(net, "_step", lambda *a: (steps.append(a), step(*a))[1])
    net.train_epoch(tokens, lr=0.1, negatives=3, window=2, subsample=0, weight_decay=0.01, batch_size=1, generator=rng)
    assert len(steps) == 30
    for contexts, mask, centre, others, rate, _ in steps:
        around = contexts[0][mask[0] > 0].tolist()
        words = [centre.item(), *others[0].tolist()]
        mean, back = reference_cbow(U, V, around, words, rate, 0.01)
        old = V.clone()
        for place, word in enumerate(words):
            if place > 0 and word == words[0]:
                continue
            f = float(mean @ old[word])
            told = 1.0 if f > 6 else 0.0 if f < -6 else float(torch.sigmoid(torch.tensor(f, dtype=torch.float64)))
            V[word] = V[word] * (1 - rate * 0.01) + ((place == 0) - told) * rate * mean
        # Repeated context words: decayed for each time, then moved; sums commute to first order in rate x decay.
        for word in set(around):
            times = around.count(word)
            U[word] = U[word] * (1 - rate * 0.01) ** times + times * back / len(around)
    torch.testing.assert_close(net.readout, V, atol=2e-3, rtol=0)
    torch.testing.assert_close(net.embedding, U, atol=2e-3, rtol=0)


def test_a_batch_without_decay_is_a_gradient_step(rng):
    net = Word2Vec(9, 5, generator=rng, dtype=torch.float64)
    net.readout.normal_(0, 0.3, generator=rng)
    contexts = torch.randint(9, (6, 4), generator=rng)
    mask = (torch.rand(6, 4, generator=rng) < 0.7).double()
    mask[0] = 0  # a centre without a context
    centres, others = torch.randint(9, (6,), generator=rng), torch.randint(9, (6, 3), generator=rng)
    U, V = net.embedding.clone().requires_grad_(), net.readout.clone().requires_grad_()
    loss = 0.0
    for i in range(6):
        mean = (mask[i].unsqueeze(1) * U[contexts[i]]).sum(0) / mask[i].sum().clamp_min(1)
        loss = loss - F.logsigmoid(mean @ V[centres[i]])
        for word in others[i][others[i] != centres[i]]:
            loss = loss - F.logsigmoid(-mean @ V[word])
    gradients = torch.autograd.grad(loss, (U, V))
    told = net._step(contexts, mask, centres, others, 0.05, 0.0)
    assert told == pytest.approx(loss.item())
    torch.testing.assert_close(net.embedding, U.detach() - 0.05 * gradients[0])
    torch.testing.assert_close(net.readout, V.detach() - 0.05 * gradients[1])


def test_wide_word2vec_approaches_its_limit(rng):
    tokens = torch.randint(12, (400,), generator=rng).sort().values
    options = {"lr": 0.1, "negatives": 4, "window": 2, "subsample": 0, "batch_size": 20}
    scores = []
    for net in (InfiniteWord2Vec(12), Word2Vec(12, 80_000, generator=rng)):
        net.train_epoch(tokens, generator=torch.Generator().manual_seed(3), **options)
        scores.append(net(torch.arange(12).unsqueeze(1)))
    torch.testing.assert_close(scores[1], scores[0], atol=0.05, rtol=0)


# Kernels.


def test_kernel_learners_are_descent_on_the_kernel(rng):
    x, labels = torch.randn(5, 3, dtype=torch.float64, generator=rng), torch.tensor([0, 1, 0, 2, 1])
    for kernel in ("gp", "ntk", "linear"):
        learner = KernelLearner(kernel, 3, bias_var=0.2, chunk=4)
        f, K = torch.zeros(5, 3, dtype=torch.float64), learner.similarities(x, x)
        for _ in range(4):
            learner.step(x, labels, 0.5)
            f = f - 0.5 / 5 * K @ (f.softmax(-1) - F.one_hot(labels, 3))
        torch.testing.assert_close(learner.predict(x), f)
        fresh = KernelLearner(kernel, 3, bias_var=0.2)
        torch.testing.assert_close(fresh.adapt(x[None], labels[None], x[None], 0.5, 4)[0], f)


def test_a_full_learner_forgets_the_oldest(rng):
    x, step = torch.randn(7, 2, generator=rng), torch.randn(7, 1, generator=rng)
    short, long = KernelLearner("linear", 1, capacity=4), KernelLearner("linear", 1)
    for i in range(7):
        short.append(x[i : i + 1], step[i : i + 1])
    long.append(x[3:], step[3:])
    assert (len(short), len(long)) == (4, 4)
    torch.testing.assert_close(short.predict(x), long.predict(x))


NT_INPUTS = [[0.6, -1.1, 0.3], [0.2, 0.4, -0.9]]
#: neural-tangents 0.6.5, stax.serial(Dense(1, 1.3, 0.4), Relu(), Dense(1, 1, None)), parameterization "ntk", float64.
NT_NNGP = [[0.5475666666666668, 0.10176532865593982], [0.10176532865593982, 0.3644833333333334]]
NT_NTK = [[1.0951333333333335, 0.0639992883510167], [0.0639992883510167, 0.7289666666666668]]
NEURAL_TANGENTS = """
import json, sys, jax
jax.config.update("jax_enable_x64", True)
import numpy as np
from neural_tangents import stax
x = np.array(json.loads(sys.argv[1]))
kernel = stax.serial(stax.Dense(1, W_std=1.3, b_std=0.4), stax.Relu(), stax.Dense(1, W_std=1.0, b_std=None))[2]
found = kernel(x, None, ("nngp", "ntk"))
print(json.dumps([np.asarray(found.nngp).tolist(), np.asarray(found.ntk).tolist()]))
"""


def our_kernels():
    x = torch.tensor(NT_INPUTS, dtype=torch.float64)
    # NT divides by the fan-in, and trains biases too: its NTK has (weight_var x.x' + bias_var) E[phi' phi'].
    scaled = torch.cat([x * (1.3**2 / 3) ** 0.5, torch.full((2, 1), 0.4, dtype=torch.float64)], 1)
    return [KernelLearner(kernel, 1).similarities(scaled, scaled) for kernel in ("gp", "ntk")]


def test_kernels_are_those_of_neural_tangents():
    # At equal inputs the slope of a kinked activation is known to the root of rounding only, and with it the NTK.
    for ours, theirs, tolerance in zip(our_kernels(), (NT_NNGP, NT_NTK), (1e-10, 5e-9)):
        torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), atol=tolerance, rtol=0)
        off = torch.tensor(theirs, dtype=torch.float64)[0, 1]
        torch.testing.assert_close(ours[0, 1], off, atol=1e-10, rtol=0)


@pytest.mark.skipif("LATHE_NEURAL_TANGENTS_PYTHON" not in os.environ, reason="neural-tangents is not at hand")
def test_neural_tangents_still_says_so():
    command = [os.environ["LATHE_NEURAL_TANGENTS_PYTHON"], "-c", NEURAL_TANGENTS, json.dumps(NT_INPUTS)]
    told = json.loads(subprocess.run(command, check=True, capture_output=True).stdout.splitlines()[-1])
    for ours, theirs in zip(our_kernels(), told):
        torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), atol=1e-10, rtol=0)

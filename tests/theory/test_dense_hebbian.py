"""Energies, fields, recall, chains: against all subsets, Newton, Krawtchouk, the Gibbs measure, Hopfield networks."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lathe.theory.dense_hebbian import (
    DenseHebbian,
    DenseHebbianClassifier,
    beta_prime,
    elementary_symmetric,
    estimate_quality,
    examples,
    load,
    mattis_magnetization,
    noise_couplings,
    one_step_overlap,
    replica_symmetric_examples,
)
from lathe.theory.dense_hebbian.dynamics import tap_step
from tests.conformance import check_layer


def signs(*shape: int, generator: torch.Generator) -> torch.Tensor:
    return 2.0 * torch.randint(0, 2, shape, generator=generator, dtype=torch.float64) - 1


def every_state(N: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=N)), dtype=torch.float64)


def by_subsets(patterns: np.ndarray, s: np.ndarray, P: int, *, R: np.ndarray, weight: float = 1.0) -> float:
    """The definition, one product for every set of P different spins."""
    N = patterns.shape[1]
    total = 0.0
    for subset in itertools.combinations(range(N), P):
        total += float(np.sum(R ** (-P / 2) * np.prod(patterns[:, subset] * s[list(subset)], axis=1)))
    return -weight * N ** (1 - P) * total


@pytest.mark.parametrize("P", [2, 3, 4, 6])
@pytest.mark.parametrize("kind", ["signs", "averages"])
def test_energies_and_fields_are_sums_over_all_subsets(P, kind, rng):
    N = 8
    patterns = signs(3, N, generator=rng)
    if kind == "averages":
        patterns = 2 * torch.rand(3, N, dtype=torch.float64, generator=rng) - 1
    memory = DenseHebbian(patterns, P)
    s = signs(2, N, generator=rng)
    R = (patterns**2).mean(1).numpy()
    for state, energy, field in zip(s.numpy(), memory.energy(s), memory.field(s)):
        expected = by_subsets(patterns.numpy(), state, P, R=R)
        assert abs(energy - expected) < 1e-12
        assert abs(energy + (state * field.numpy()).sum() / P) < 1e-12
        for i in range(N):
            flipped = state.copy()
            flipped[i] *= -1
            cost = by_subsets(patterns.numpy(), flipped, P, R=R) - expected
            assert abs(cost - 2 * state[i] * field[i].item()) < 1e-12


def test_energies_of_averages_are_multilinear(rng):
    memory = DenseHebbian(2 * torch.rand(3, 7, dtype=torch.float64, generator=rng) - 1, 4)
    m = 2 * torch.rand(1, 7, dtype=torch.float64, generator=rng) - 1
    states = every_state(7)
    weights = ((1 + states * m) / 2).prod(1)
    assert torch.allclose(memory.energy(m, real=True), weights @ memory.energy(states), atol=1e-13)
    assert torch.allclose(memory.field(m, real=True)[0], weights @ memory.field(states), atol=1e-13)


@pytest.mark.parametrize("real", [False, True])
def test_coinciding_indices_make_powers_of_overlaps(real, rng):
    N, P = 9, 4
    patterns = torch.rand(2, N, dtype=torch.float64, generator=rng) if real else signs(2, N, generator=rng)
    memory = DenseHebbian(patterns, P, self_interaction=True, second_moment=0.7)
    s = signs(1, N, generator=rng)

    def energy(s: torch.Tensor) -> torch.Tensor:
        return -N / math.factorial(P) * 0.7 ** (-P / 2) * ((s @ patterns.T / N) ** P).sum(1)

    assert torch.allclose(memory.energy(s), energy(s), atol=1e-13)
    for i in range(N):
        flipped = s.clone()
        flipped[:, i] *= -1
        assert torch.allclose(energy(flipped) - energy(s), 2 * s[:, i] * memory.field(s)[:, i], atol=1e-13)
    gradient = torch.autograd.functional.jacobian(lambda s: -energy(s), s).reshape(1, N)
    assert torch.allclose(memory.mean_field(s), gradient, atol=1e-13)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 12), order=st.integers(1, 8), seed=st.integers(0, 999))
def test_newton_agrees_with_adding_one_variable_at_a_time(n, order, seed):
    x = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) / math.sqrt(n)
    found = elementary_symmetric([(x**k).sum().reshape(1) for k in range(1, order + 1)])
    e = [1.0] + [0.0] * order
    for value in x.tolist():
        for j in range(order, 0, -1):
            e[j] += value * e[j - 1]
    assert np.allclose([each.item() for each in found], e, atol=1e-12)


def test_fourth_order_by_power_sums_and_by_one_number(rng):
    N, P = 50, 4
    averages = torch.rand(6, N, dtype=torch.float64, generator=rng)
    s = signs(3, N, generator=rng)
    x = (averages * s.unsqueeze(1)).numpy()
    p1, p2, p3, p4 = ((x**k).sum(-1) for k in (1, 2, 3, 4))
    e4 = (p1**4 - 6 * p1**2 * p2 + 3 * p2**2 + 8 * p1 * p3 - 6 * p4) / 24
    expected = -(float(N) ** (1 - P)) * e4.sum(1)
    np.testing.assert_allclose(DenseHebbian(averages, P, second_moment=1.0).energy(s), expected, rtol=1e-9)
    patterns = signs(6, N, generator=rng)
    S = (s @ patterns.T).numpy()
    e4 = (S**4 - (6 * N - 8) * S**2 + 3 * N**2 - 6 * N) / 24
    np.testing.assert_allclose(DenseHebbian(patterns, P).energy(s), -(float(N) ** (1 - P)) * e4.sum(1), rtol=1e-9)


def test_two_body_memories_are_hopfield_networks_without_diagonal(rng):
    patterns, s = signs(5, 40, generator=rng), signs(4, 40, generator=rng)
    J = (patterns.T @ patterns / 40).fill_diagonal_(0)
    memory = DenseHebbian(patterns, 2)
    assert torch.allclose(memory.field(s), s @ J, atol=1e-12)
    assert torch.allclose(memory.energy(s), -0.5 * ((s @ J) * s).sum(1), atol=1e-12)
    assert torch.allclose(DenseHebbian.from_tensor(J).field(s), s @ J, atol=1e-12)


def test_supervision_multiplies_averages_and_its_absence_averages_products(rng):
    N, P, M = 8, 4, 3
    X = examples(signs(2, N, generator=rng), 0.5, M, rng)
    s = signs(2, N, generator=rng)
    R = (X.mean(1) ** 2).mean(1).numpy()
    supervised, unsupervised = DenseHebbian(X, P), DenseHebbian(X, P, mode="unsupervised")
    for state, one, other in zip(s.numpy(), supervised.energy(s), unsupervised.energy(s)):
        assert abs(one - by_subsets(X.mean(1).numpy(), state, P, R=R)) < 1e-12
        products = [by_subsets(X[:, a].numpy(), state, P, R=R, weight=1 / M) for a in range(M)]
        assert abs(other - sum(products)) < 1e-12
    flat, labels = X.flatten(0, 1), torch.arange(2).repeat_interleave(M)
    shuffled = torch.randperm(2 * M, generator=rng)
    for mode, expected in (("supervised", supervised), ("unsupervised", unsupervised)):
        memory = DenseHebbian.from_examples(flat[shuffled], labels[shuffled], P, mode=mode)
        assert torch.allclose(memory.energy(s), expected.energy(s), atol=1e-12)
        assert torch.allclose(memory.field(s), expected.field(s), atol=1e-12)
        assert memory.classify(X[1, :1]).item() == expected.classify(X[1, :1]).item() == 1


def test_explicit_couplings_are_the_memory_that_is_never_built(rng):
    N, P = 7, 4
    patterns = signs(2, N, generator=rng)
    J = torch.einsum("ka,kb,kc,kd->abcd", *[patterns] * P) * float(N) ** (1 - P)
    for indices in itertools.product(range(N), repeat=P):
        if len(set(indices)) < P:
            J[indices] = 0
    s, noise = signs(3, N, generator=rng), noise_couplings(N, P, 2.0, rng)
    tensor, memory = DenseHebbian.from_tensor(J), DenseHebbian(patterns, P)
    assert torch.allclose(tensor.energy(s), memory.energy(s), atol=1e-13)
    assert torch.allclose(tensor.field(s), memory.field(s), atol=1e-13)
    noisy = DenseHebbian(patterns, P, couplings=noise)
    assert torch.allclose(noisy.field(s), DenseHebbian.from_tensor(J + noise).field(s), atol=1e-13)
    assert torch.allclose(noisy.energy(s), -(s * noisy.field(s)).sum(1) / P, atol=1e-13)
    end = [
        each.sample(s, 3.0, 5, generator=torch.Generator().manual_seed(1))
        for each in (noisy, DenseHebbian.from_tensor(J + noise))
    ]
    assert torch.equal(*end)


def test_noise_has_the_deviation_that_was_asked_for(rng):
    J = noise_couplings(12, 4, 3.0, rng)
    subsets = torch.combinations(torch.arange(12), 4)
    values = J[tuple(subsets.unbind(1))] * 12**3
    assert abs(values.std() - 3.0) < 4 * 3.0 / math.sqrt(2 * len(values))


class OneAtATime:
    """Sequential sweeps as the textbook has them, with fields of the whole network for every spin."""

    def __init__(self, memory: DenseHebbian, s: torch.Tensor, beta: float, seed: int) -> None:
        self.memory, self.s, self.beta = memory, s.clone(), beta
        self.generator = torch.Generator().manual_seed(seed)

    def sweep(self) -> None:
        u = torch.rand(self.s.shape, dtype=torch.float64, generator=self.generator)
        for i in range(self.s.shape[1]):
            h = self.memory.field(self.s)[:, i]
            flips = u[:, i] < 1 / (1 + torch.exp(2 * self.beta * self.s[:, i] * h))
            self.s[flips, i] *= -1


@pytest.mark.parametrize("beta", [0.5, 4.0, 30.0])
@pytest.mark.parametrize("kind", ["signs", "averages", "coinciding"])
def test_sweeps_in_blocks_are_sweeps_one_spin_at_a_time(beta, kind, rng):
    N = 40
    patterns = signs(30, N, generator=rng)
    if kind != "signs":
        patterns = examples(patterns, 0.5, 5, rng).mean(1)
    memory = DenseHebbian(patterns, 4, self_interaction=kind == "coinciding")
    s = signs(3, N, generator=rng)
    slow = OneAtATime(memory, s, beta, seed=7)
    for _ in range(3):
        slow.sweep()
    assert torch.equal(memory.sample(s, beta, 3, generator=torch.Generator().manual_seed(7)), slow.s)


@pytest.mark.parametrize("rule", ["glauber", "metropolis"])
def test_chains_visit_states_as_gibbs_says(rule, rng):
    N, P, beta, sweeps = 8, 4, 6.0, 400
    memory = DenseHebbian(examples(signs(2, N, generator=rng), 0.7, 3, rng), P)
    states = every_state(N)
    weights = torch.softmax(-beta * memory.energy(states), 0)
    exact = torch.stack([weights @ memory.energy(states), weights @ memory.overlaps(states)[:, 0].square()])
    seen: list[torch.Tensor] = []

    def observe(s: torch.Tensor) -> None:
        seen.append(torch.stack([memory.energy(s), memory.overlaps(s)[:, 0].square()]))

    memory.sample(signs(100, N, generator=rng), beta, sweeps, rule=rule, generator=rng, observe=observe)
    chains = torch.stack(seen[50:]).mean(0)  # independent chains: their spread is the error
    error = chains.std(1) / 10
    assert ((chains.mean(1) - exact).abs() < 3.5 * error).all()


def test_single_spin_moves_balance_in_detail(rng):
    N, beta = 6, 3.0
    memory = DenseHebbian(torch.rand(3, N, dtype=torch.float64, generator=rng), 4)
    states = every_state(N)
    weights = torch.softmax(-beta * memory.energy(states), 0)
    h = memory.field(states)
    for i in range(N):
        flipped = states.clone()
        flipped[:, i] *= -1
        back = ((flipped + 1) / 2 @ 2.0 ** torch.arange(N - 1, -1, -1, dtype=torch.float64)).long()
        flow = weights / (1 + torch.exp(2 * beta * states[:, i] * h[:, i]))
        assert (flow - flow[back]).abs().max() < 1e-12


def test_chains_without_coupling_to_a_bath_are_free(rng):
    memory = DenseHebbian(signs(3, 20, generator=rng), 4)
    s = memory.sample(signs(500, 20, generator=rng), 0.0, 1, generator=rng)
    assert s.mean().abs() < 4 / math.sqrt(10_000)
    assert torch.equal(memory.sample(s, 0.0, 1, rule="metropolis", generator=rng), -s)  # every move is accepted


def test_recall_mends_a_damaged_pattern_and_never_raises_the_energy(rng):
    memory = DenseHebbian(signs(20, 64, generator=rng), 4)
    start = memory.patterns[:5].double()
    start[:, :6] *= -1
    end = memory(start)
    assert torch.equal(end, memory.patterns[:5].double())
    assert memory.classify(start).tolist() == [0, 1, 2, 3, 4]
    cold = memory.sample(start, math.inf, 3, generator=rng)
    assert (memory.energy(cold) <= memory.energy(start)).all()
    for options in ({"field": "plefka1"}, {"update": "parallel", "field": "plefka1"}, {"update": "parallel"}):
        if "update" in options:
            assert torch.equal(memory.sample(start, math.inf, 5, generator=rng, **options), end)
        else:
            assert torch.equal(memory(start, **options), end)
    assert memory(start.to(torch.int8)).dtype == torch.int8


def test_tap_averages_are_the_replica_symmetric_state(rng):
    N, r, M, T, draws = 300, 0.5, 9, 0.25, 10
    q, m = [], []
    for _ in range(draws):
        xi = signs(200, N, generator=rng)
        memory = DenseHebbian(examples(xi, r, M, rng).mean(1), 4, second_moment=r * r + (1 - r * r) / M)
        seen: list[torch.Tensor] = []
        memory.sample(xi[:1], 12 / T, 60, update="parallel", field="plefka2", generator=rng, observe=seen.append)
        assert (seen[-1] - seen[-2]).abs().max() < 1e-6
        q.append(seen[-1].square().mean())
        m.append(mattis_magnetization(seen[-1], xi[:1]).item())
    theory = replica_symmetric_examples(4, 1 / T, load(200, N, 4), r, M)
    assert abs(np.mean(q) - theory.q) < 0.02
    assert abs(np.mean(m) - theory.m) < 0.025


def test_tap_corrects_the_mean_field_of_a_hot_hopfield_network(rng):
    # A small network whose averages can be had exactly; the field of a pattern breaks the symmetry.
    N, beta = 12, 0.4
    patterns = signs(6, N, generator=rng)
    memory = DenseHebbian(patterns, 2)
    states = every_state(N)
    tilt = states[states[:, 0] > 0]  # given the first spin, the others have averages
    weights = torch.softmax(-beta * memory.energy(tilt), 0)
    exact = weights @ tilt
    J = memory.field(torch.eye(N, dtype=torch.float64), real=True)
    m, before = torch.ones(N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    for _ in range(200):
        fresh = tap_step(memory, m.unsqueeze(0), before.unsqueeze(0), beta, 6 / N)[0]
        fresh[0] = 1.0
        m, before = fresh, m
    naive = torch.ones(N, dtype=torch.float64)
    for _ in range(200):
        naive = torch.tanh(beta * naive @ J)
        naive[0] = 1.0
    assert (m - exact).norm() < 0.5 * (naive - exact).norm()


@pytest.mark.parametrize(
    ("P", "K", "full", "variance"), [(4, 400, False, 1.0), (4, 400, True, 2.5), (2, 60, False, 1.0)]
)
def test_one_step_from_the_archetype_by_the_variance_of_random_fields(P, K, full, variance, rng):
    # Fields of random patterns on a state that has nothing to do with them.
    N = 100
    memory = DenseHebbian(signs(K, N, generator=rng), P, self_interaction=full)
    fields = memory.field(signs(400, N, generator=rng))
    gamma = load(K, N, P)
    # (beta' / beta)^2 gamma P / 2, in units where the signal is (P/2)(beta'/beta) = 1 / (P-1)!
    expected = variance * (2 / math.factorial(P)) ** 2 * gamma * P / 2
    of_finite_size = 1.0 if full else math.comb(N - 1, P - 1) * math.factorial(P - 1) / N ** (P - 1)
    assert abs(fields.var().item() / (expected * of_finite_size) - 1) < 0.12
    m = one_step_overlap(P, gamma, self_interaction=full)
    assert abs(m - math.erf(1 / math.factorial(P - 1) / math.sqrt(2 * expected))) < 1e-12


def test_quality_is_found_from_the_agreement_of_examples(rng):
    X = examples(signs(10, 200, generator=rng), 0.4, 12, rng)
    y = torch.arange(10).repeat_interleave(12)
    assert abs(estimate_quality(X.flatten(0, 1), y) - 0.4) < 0.02
    assert estimate_quality(X[:, :2].flatten(0, 1), torch.arange(10).repeat_interleave(2)) == pytest.approx(
        0.4, abs=0.08
    )
    clean = X[:, :1].expand(-1, 3, -1).flatten(0, 1)
    assert estimate_quality(clean, torch.arange(10).repeat_interleave(3)) == pytest.approx(1.0)


@settings(max_examples=20, deadline=None)
@given(K=st.integers(1, 5), N=st.integers(4, 30), P=st.integers(2, 4), seed=st.integers(0, 999))
def test_flipping_signs_of_a_site_in_patterns_and_states_changes_nothing(K, N, P, seed):
    generator = torch.Generator().manual_seed(seed)
    averages, s, gauge = (
        torch.randn(K, N, generator=generator),
        signs(2, N, generator=generator),
        signs(N, generator=generator),
    )
    one, other = DenseHebbian(averages, P), DenseHebbian(averages * gauge, P)
    assert torch.allclose(one.energy(s), other.energy(s * gauge), atol=1e-12)
    assert torch.allclose(one.field(s), gauge * other.field(s * gauge), atol=1e-10)
    assert torch.allclose(one.energy(-s), (-1) ** P * one.energy(s), atol=1e-12)


def test_bytes_hold_patterns_of_signs_and_copies_compute_the_same(rng):
    memory = DenseHebbian(signs(4, 30, generator=rng), 4)
    assert memory.patterns.dtype == torch.int8
    other = DenseHebbian(signs(4, 30, generator=rng), 4)
    other.load_state_dict(memory.state_dict())
    s = signs(3, 30, generator=rng)
    assert torch.equal(other.field(s), memory.field(s))


def test_the_head_finds_classes_and_outliers(rng):
    prototypes = torch.randn(3, 40, generator=rng)
    y = torch.arange(3).repeat(40)
    X = prototypes[y] + 0.7 * torch.randn(120, 40, generator=rng)
    batches = [(X[:60], y[:60]), (X[60:], y[60:])]
    for options in ({}, {"binarize": "median"}, {"recentre": True}, {"steps": 0}):
        head = DenseHebbianClassifier(40, 3, P=4, **options).fit(iter(batches))
        assert (head(X).argmax(1) == y).float().mean() > 0.97
    head = DenseHebbianClassifier.like(torch.nn.Linear(40, 3), P=4).fit(batches)
    memory = head.memory()
    inside = memory.energy(torch.where(X > 0, 1.0, -1.0))
    assert memory.energy(signs(100, 40, generator=rng)).median() > inside.quantile(0.9)


def test_the_head_is_a_layer():
    def make() -> DenseHebbianClassifier:
        head = DenseHebbianClassifier(8, 3, P=4, steps=2)
        head.averages.copy_(torch.linspace(-1, 1, 24).sin().reshape(3, 8))
        return head

    check_layer(make, torch.randn(5, 8), wrong_inputs=[torch.randn(5, 7), torch.randn(8)], gradcheck=False)


@pytest.mark.usefixtures("shape_checks_off")
def test_bad_input_is_refused_by_name(rng):
    xi, s = signs(3, 8, generator=rng), signs(2, 8, generator=rng)
    y = torch.tensor([0, 2])
    memory = DenseHebbian(xi)
    zero = torch.zeros(8, 8)
    cases = [
        (lambda: DenseHebbian(xi, 1), "P must be an order from 2"),
        (lambda: DenseHebbian(xi, 9), "P must be an order.*N = 8, got 9"),
        (lambda: DenseHebbian(xi[:0]), "at least one pattern"),
        (lambda: DenseHebbian(xi, mode="unsupervised"), r"\(K, M, N\)"),
        (lambda: DenseHebbian(xi, mode="other"), "mode must be"),
        (lambda: DenseHebbian(xi * math.nan), "finite"),
        (lambda: DenseHebbian(0 * xi), "second_moment must be positive"),
        (lambda: DenseHebbian(0.5 * xi.unsqueeze(1)), "patterns, given as examples, must hold"),
        (lambda: DenseHebbian(xi, couplings=zero), "couplings must have the shape"),
        (lambda: DenseHebbian.from_tensor(zero + torch.eye(8)), "indices coincide"),
        (lambda: DenseHebbian.from_tensor(torch.ones(8, 8).triu(1)), "symmetric"),
        (lambda: DenseHebbian.from_tensor(torch.ones(8)), "at least 2 indices"),
        (lambda: DenseHebbian.from_examples(s, y), r"none of \[1\]"),
        (lambda: DenseHebbian.from_examples(s, y[:1]), "as many examples as labels"),
        (lambda: DenseHebbian.from_examples(0.5 * s, y), r"\+1 and -1 only, got .*0.5"),
        (lambda: DenseHebbian.from_examples(s, y - 1), "labels from 0"),
        (lambda: memory.field(0.5 * s), "real=True"),
        (lambda: memory.energy(s[:, :7]), r"\(B, 8\), got \(2, 7\)"),
        (lambda: memory.sample(s, -1.0, 1), "beta must not be negative"),
        (lambda: memory.sample(s, 1.0, -1), "sweeps"),
        (lambda: memory.sample(s, 1.0, 1, field="plefka1"), "needs field 'exact'"),
        (lambda: memory.sample(s, math.inf, 1, update="parallel", field="plefka2"), "finite beta"),
        (lambda: memory.sample(s, 1.0, 1, rule="heat"), "rule must be one of"),
        (lambda: memory(s, -1), "steps"),
        (lambda: examples(xi, 0.0, 3), r"\(0, 1\], got 0"),
        (lambda: examples(xi, 0.5, 0), "at least 1, got 0"),
        (lambda: load(-1, 8, 2), "K must not be negative"),
        (lambda: beta_prime(1.0, 1), "P must be at least 2"),
        (lambda: mattis_magnetization(s, xi[:, :7]), "as many spins"),
        (lambda: estimate_quality(s, torch.tensor([0, 1])), "two examples"),
        (lambda: noise_couplings(3, 4, 1.0), "N must be at least P"),
        (lambda: DenseHebbianClassifier(8, 3, P=3), "even"),
        (lambda: DenseHebbianClassifier(8, 3).fit([(s.float(), y)]), r"none of \[1\]"),
        (lambda: DenseHebbianClassifier(8, 2).fit([(s.float(), y)]), "labels must lie in 0 .. 1"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()

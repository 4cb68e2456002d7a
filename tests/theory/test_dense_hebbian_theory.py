"""Replica-symmetric theory: against scipy's quadrature, known capacities, limits, stationarity, sampled networks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import minimize_scalar
from scipy.special import erf
from scipy.stats import binom

from lathe.theory.dense_hebbian import (
    PHASES,
    DenseHebbian,
    best_order,
    critical_load,
    dataset_entropy,
    examples,
    load,
    one_step_overlap,
    phase_diagram,
    replica_symmetric,
    replica_symmetric_examples,
    samples_needed,
    zero_temperature,
)
from lathe.theory.dense_hebbian.moments import log_cosh_mean, sech4_mean, tanh_means


def normal_mean(f, A: float, D: float) -> float:
    def integrand(z: float) -> float:
        return f(A + D * z) * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    cuts = sorted({0.0, max(-11.0, min(11.0, -A / D)) if D else 0.0})
    return quad(integrand, -12, 12, points=cuts, limit=2000, epsabs=1e-12, epsrel=1e-12)[0]


@pytest.mark.parametrize("D", [0.0, 0.1, 0.69, 0.71, 2.0, 50.0])
def test_averages_over_a_gaussian_field_by_adaptive_quadrature(D):
    A = [0.0, 0.3, 2.0, 12.0]
    a, d = torch.tensor(A, dtype=torch.float64), torch.full((4,), D, dtype=torch.float64)
    m, q = tanh_means(a, d)
    functions = [
        (m, np.tanh),
        (q, lambda x: np.tanh(x) ** 2),
        (log_cosh_mean(a, d), lambda x: np.logaddexp(x, -x)),
        (sech4_mean(a, d), lambda x: (1 - np.tanh(x) ** 2) ** 2),
    ]
    for values, f in functions:
        np.testing.assert_allclose(values, [normal_mean(f, each, D) for each in A], atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize(
    ("P", "gamma", "rho"), [(2, 0.05, 0.0), (2, 0.03, 0.2), (4, 0.2, 0.0), (4, 0.1, 0.2), (6, 0.1, 0.1)]
)
def test_solutions_satisfy_the_equations_as_scipy_integrates_them(P, gamma, rho):
    beta = 4.0
    s = replica_symmetric(P, beta, gamma, rho)
    m, q, n = s.m.item(), s.q.item(), s.n.item()
    A = beta * (P / 2) * (1 + rho) ** (P / 2 - 1) * n ** (P - 1)
    noise = beta**2 * gamma * (P / 2) * q ** (P - 1)
    if P == 2:
        noise = beta**2 * gamma * q / (1 - beta * (1 - q)) ** 2
    D = math.sqrt(rho * A * A + noise)
    assert s.converged and m > 0.8
    assert abs(normal_mean(np.tanh, A, D) - m) < 1e-9
    assert abs(normal_mean(lambda x: np.tanh(x) ** 2, A, D) - q) < 1e-9
    assert abs(m / (1 + rho) + rho * (1 - q) * A / (1 + rho) - n) < 1e-9


@pytest.mark.parametrize(
    ("P", "gamma", "rho"), [(2, 0.05, 0.0), (2, 0.03, 0.2), (4, 0.2, 0.0), (4, 0.1, 0.2), (8, 0.1, 0.1)]
)
@pytest.mark.parametrize("branch", ["retrieval", "spin-glass"])
def test_pressures_are_stationary_at_solutions(P, gamma, rho, branch):
    beta = 4.0
    s = replica_symmetric(P, beta, gamma, rho, branch=branch)

    def pressure(n: float, q: float) -> float:
        A = beta * (P / 2) * (1 + rho) ** (P / 2 - 1) * n ** (P - 1)
        noise = beta**2 * gamma * (P / 2) * q ** (P - 1)
        rest = beta**2 * gamma / 4 * (1 - P * q ** (P - 1) + (P - 1) * q**P)
        if P == 2:
            left = 1 - beta * (1 - q)
            noise = beta**2 * gamma * q / left**2
            rest = -gamma / 2 * (math.log(left) - beta * q / left) - noise * (1 - q) / 2 - beta * gamma / 2
        D = math.sqrt(rho * A * A + noise)
        mean = normal_mean(lambda x: np.logaddexp(x, -x), A, D)
        return mean - (P - 1) * beta / 2 * (1 + rho) ** (P / 2) * n**P + rest

    n, q, step = s.n.item(), s.q.item(), 2e-5
    # Four points: the curvature at P = 2 changes too fast for two.
    stencil = [(-2, 1 / 12), (-1, -8 / 12), (1, 8 / 12), (2, -1 / 12)]
    assert abs(pressure(n, q) - s.pressure.item()) < 1e-10
    assert abs(sum(w * pressure(n + k * step, q) for k, w in stencil)) / step < 2e-7
    if q > 1e-3:
        assert abs(sum(w * pressure(n, q + k * step) for k, w in stencil)) / step < 2e-7


def test_the_hopfield_network_holds_as_much_as_amit_gutfreund_and_sompolinsky_say():
    assert critical_load(2) == pytest.approx(0.13791, abs=1e-4)
    assert critical_load(2, kind="thermodynamic") == pytest.approx(0.0514, abs=1e-3)
    # Close to temperature zero the other equations say the same.
    assert critical_load(2, temperature=0.002) == pytest.approx(0.13791, abs=2e-4)
    assert critical_load(2, temperature=0.002, kind="thermodynamic") == pytest.approx(
        critical_load(2, kind="thermodynamic"), abs=2e-4
    )


@pytest.mark.parametrize(
    ("P", "gamma", "m"), [(4, 0.39572, 0.9179), (6, 0.47304, 0.9620), (8, 0.55880, 0.9764), (10, 0.64468, 0.9832)]
)
def test_clean_patterns_fit_up_to_the_maximum_of_one_function(P, gamma, m):
    best = minimize_scalar(lambda y: -(P / 4) * (erf(y) ** (P - 1) / y) ** 2, bounds=(0.3, 4), method="bounded")
    assert critical_load(P) == pytest.approx(-best.fun, abs=1e-6)
    assert critical_load(P) == pytest.approx(gamma, abs=1e-5)
    assert zero_temperature(P, critical_load(P) * (1 - 1e-6)).m.item() == pytest.approx(m, abs=5e-3)
    below, above = zero_temperature(P, critical_load(P) * torch.tensor([0.999, 1.001])).m
    assert below > 0.85 and above == 0


def test_capacities_with_poor_data_and_what_iteration_finds():
    table = {4: (0.315, 0.261, 0.197, 0.141), 6: (0.321, 0.231, 0.140, 0.076), 8: (0.331, 0.210, 0.103, 0.043)}
    for P, row in table.items():
        for rho, gamma in zip((0.05, 0.1, 0.2, 0.4), row):
            found = critical_load(P, rho)
            assert abs(found - gamma) < 1e-3
            below, above = zero_temperature(P, found * torch.tensor([0.99, 1.01]), rho).m
            assert below > 0.5 and above == 0


@pytest.mark.parametrize(("P", "rho", "T"), [(4, 0.0, 0.3), (4, 0.2, 0.3), (6, 0.1, 0.5), (2, 0.0, 0.5)])
def test_spinodals_are_where_iteration_loses_the_archetype(P, rho, T):
    gamma = critical_load(P, rho, T)
    state = replica_symmetric(P, 1 / T, gamma * torch.tensor([0.98, 1.02], dtype=torch.float64), rho)
    assert state.converged.all() and state.m[0] > 0.3 and state.m[1] < 1e-3
    edge = critical_load(P, rho, T, "thermodynamic")
    assert 0 < edge < gamma
    loads = edge * torch.tensor([0.98, 1.02], dtype=torch.float64)
    lead = (
        replica_symmetric(P, 1 / T, loads, rho).pressure
        - replica_symmetric(P, 1 / T, loads, rho, branch="spin-glass").pressure
    )
    assert lead[0] > 0 > lead[1]


def test_at_low_load_the_memory_returns_the_majority_vote():
    for P in (2, 4, 8):
        for rho in (0.05, 0.5, 3.0):
            assert zero_temperature(P, 0.0, rho).m.item() == pytest.approx(math.erf(1 / math.sqrt(2 * rho)), abs=1e-12)
            assert one_step_overlap(P, 0.0, rho).item() == pytest.approx(math.erf(1 / math.sqrt(2 * rho)), abs=1e-12)
    M = samples_needed(0.3, 0.95)
    assert math.erf(math.sqrt(0.3**2 * M / (1 - 0.3**2) / 2)) == pytest.approx(0.95, abs=1e-12)


def test_limits_of_perfect_data_and_of_cold():
    state = replica_symmetric(4, torch.tensor([2.0, 5.0], dtype=torch.float64), 0.2)
    assert torch.allclose(state.m, state.n, atol=1e-12)
    for P, gamma, rho in ((2, 0.05, 0.1), (4, 0.1, 0.05), (6, 0.05, 0.05)):
        cold, frozen = replica_symmetric(P, 200.0, gamma, rho), zero_temperature(P, gamma, rho)
        assert cold.m.item() == pytest.approx(frozen.m.item(), abs=1e-4)
        assert cold.n.item() == pytest.approx(frozen.n.item(), abs=2e-3)
        colder = replica_symmetric(P, 2000.0, gamma, rho)
        assert colder.pressure.item() / 2000 == pytest.approx(frozen.pressure.item(), abs=1e-3)


def test_many_examples_have_a_gaussian_average():
    rho, gaps = 0.2, []
    for M in (20, 40, 80):
        r = 1 / math.sqrt(1 + rho * M)
        exact = replica_symmetric_examples(4, 2.0, 0.05, r, M)
        smooth = replica_symmetric(4, 2.0, 0.05, rho)
        gaps.append(abs(exact.m - smooth.m).item())
    assert gaps[0] < 0.01
    assert gaps[1] / gaps[0] == pytest.approx(0.5, abs=0.15) and gaps[2] / gaps[1] == pytest.approx(0.5, abs=0.15)


def test_one_example_of_full_quality_is_a_clean_pattern():
    clean, one = replica_symmetric(4, 3.0, 0.2), replica_symmetric_examples(4, 3.0, 0.2, 1.0, 1)
    for name in ("m", "q", "n", "pressure"):
        assert getattr(one, name).item() == pytest.approx(getattr(clean, name).item(), abs=1e-10)
    assert one.at_stable == clean.at_stable


def test_a_sampled_network_returns_the_vote_of_few_examples(rng):
    r, M, N = 0.5, 5, 4000
    xi = 2.0 * torch.randint(0, 2, (1, N), generator=rng) - 1
    memory = DenseHebbian(examples(xi, r, M, rng), 4)
    m = (memory(xi, 1) * xi).mean().item()
    right = binom(M, (1 + r) / 2).sf(M // 2)
    assert abs(m - (2 * right - 1)) < 4 / math.sqrt(N)
    assert replica_symmetric_examples(4, 500.0, 0.0, r, M).m.item() == pytest.approx(2 * right - 1, abs=1e-6)


def test_stability_is_almeidas_and_thouless_line():
    P, beta, gamma = 4, 3.0, 3.0
    state = replica_symmetric(P, beta, gamma, branch="spin-glass")
    q = state.q.item()
    D = math.sqrt(beta**2 * gamma * (P / 2) * q ** (P - 1))
    sech4 = normal_mean(lambda x: np.cosh(x) ** -4.0, 0.0, D)
    assert beta**2 * gamma * (P / 2) * (P - 1) * q ** (P - 2) * sech4 > 1 and not state.at_stable
    assert replica_symmetric(P, 2.0, 0.05).at_stable
    # The Hopfield network freezes, and breaks the symmetry, at 1 = beta (1 + sqrt gamma).
    hot = replica_symmetric(2, 0.5, torch.tensor([0.8, 1.2], dtype=torch.float64), branch="spin-glass")
    assert hot.at_stable[0] and hot.q[0] < 1e-6 and not hot.at_stable[1] and hot.q[1] > 1e-3


def test_the_diagram_has_the_phases_that_single_solutions_have():
    gammas = torch.tensor([0.02, 0.15, 0.3, 0.38, 0.5, 0.9], dtype=torch.float64)
    temps = torch.tensor([0.05, 0.3, 0.6, 0.95, 1.5], dtype=torch.float64)
    found = phase_diagram(4, 0.0, gammas, temps)
    assert found.shape == (5, 6)
    for row, T in zip(found, temps.tolist()):
        spinodal, edge = critical_load(4, 0.0, T), critical_load(4, 0.0, T, "thermodynamic")
        for phase, gamma in zip(row.tolist(), gammas.tolist()):
            if gamma < edge:
                assert PHASES[phase] == "retrieval"
            elif gamma < spinodal:
                assert PHASES[phase] == "metastable retrieval"
            else:
                assert PHASES[phase] in ("ergodic", "spin glass")
    assert PHASES[found[0, 4]] == "spin glass" and PHASES[found[4, 0]] == "ergodic"
    # 2 tanh(x)^3 / x is the temperature at which field x is its own at no load.
    top = minimize_scalar(lambda x: -2 * math.tanh(x) ** 3 / x, bounds=(0.5, 3), method="bounded")
    assert critical_load(4, 0.0, -top.fun - 1e-3) > 0 == critical_load(4, 0.0, -top.fun + 1e-3)


@settings(max_examples=15, deadline=None)
@given(P=st.sampled_from([2, 4, 6]), beta=st.floats(0.2, 20), gamma=st.floats(0, 1), rho=st.floats(0, 1))
def test_overlaps_stay_in_their_ranges(P, beta, gamma, rho):
    for branch in ("retrieval", "spin-glass"):
        state = replica_symmetric(P, beta, gamma, rho, branch=branch, tolerance=1e-6, max_iterations=3000)
        assert -1e-9 <= state.m <= 1 + 1e-9 and -1e-9 <= state.q <= 1 + 1e-9
        assert state.pressure > math.log(2) - 2.0


def test_arguments_broadcast():
    betas, gammas = (
        torch.tensor([[2.0], [4.0]], dtype=torch.float64),
        torch.tensor([0.0, 0.1, 0.2], dtype=torch.float64),
    )
    grid = replica_symmetric(4, betas, gammas, 0.1)
    assert grid.m.shape == (2, 3)
    assert grid.m[1, 2].item() == pytest.approx(replica_symmetric(4, 4.0, 0.2, 0.1).m.item(), abs=1e-10)


def test_the_best_order_is_the_one_that_holds_the_patterns_and_no_larger():
    few = best_order(20_000, 2, 20, 0.4)
    assert few.best == 2 and few.m[0] > 0.94
    many = best_order(200, 400, 20, 0.9)
    assert many.best > 2 and many.m[0] == 0 and torch.allclose(many.gamma[0], torch.tensor(2.0, dtype=torch.float64))
    warm = best_order(200, 400, 20, 0.9, temperature=0.3)
    assert warm.best == 4
    assert load(400, 200, 4) == pytest.approx(12 * 400 / 200**3)
    assert dataset_entropy(0.5, 10) == pytest.approx(0.3)


@pytest.mark.usefixtures("shape_checks_off")
def test_what_the_theory_is_not_about_is_refused_by_name():
    one = torch.ones(1, dtype=torch.float64)
    cases = [
        (lambda: replica_symmetric(3, 1.0, 0.1), "P must be even"),
        (lambda: replica_symmetric(4, 0.0, 0.1), "beta_prime must be positive"),
        (lambda: replica_symmetric(4, math.inf, 0.1), "zero_temperature is its limit"),
        (lambda: replica_symmetric(4, 1.0, -0.1), "gamma, the load, must be finite and not negative, got -0.1"),
        (lambda: replica_symmetric(4, 1.0, math.nan), "gamma"),
        (lambda: replica_symmetric(4, 1.0, 0.1, -1.0), "rho, the entropy"),
        (lambda: replica_symmetric(4, 1.0, 0.1, branch="other"), "branch must be"),
        (lambda: replica_symmetric_examples(4, 1.0, 0.1, 1.5, 3), r"\(0, 1\]"),
        (lambda: zero_temperature(4, -0.1), "gamma"),
        (lambda: one_step_overlap(5, 0.1), "even"),
        (lambda: critical_load(4, temperature=-1.0), "temperature"),
        (lambda: critical_load(4, kind="other"), "kind must be"),
        (lambda: phase_diagram(4, 0.0, one, 0 * one), "temps must be positive"),
        (lambda: phase_diagram(4, 0.0, -one, one), "gamma"),
        (lambda: samples_needed(0.5, 1.0), "overlap must lie"),
        (lambda: best_order(100, 0, 1, 1.0), "K must be at least 1"),
        (lambda: best_order(100, 5, 1, 1.0, orders=(3,)), "even"),
        (lambda: best_order(3, 5, 1, 1.0, orders=(4,)), "at least P = 4"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()

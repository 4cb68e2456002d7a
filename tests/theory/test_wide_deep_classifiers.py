"""Against closed forms, double integrals, functional equations, scikit-learn, direct sums and neural-tangents."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from torch import nn

from lathe.core.gaussian import Activation
from lathe.theory.wide_deep_classifiers import (
    DualActivation,
    OptimalActivation,
    SineActivation,
    SingularKernelClassifier,
    classify_depth_limit,
    intrinsic_dimension,
    koenigs,
    nngp,
    ntk,
    optimal_activation,
    to_sphere,
    wide_deep_mlp,
)
from lathe.theory.wide_deep_classifiers.tables import gaps


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def simplex(n: int, ambient: int, rng: torch.Generator) -> torch.Tensor:
    """Random points on the non-negative part of the sphere."""
    return to_sphere(torch.rand(n, ambient, dtype=torch.float64, generator=rng) + 1e-3, "normalise")


def double_integral(phi, xi: float, order: int = 120) -> float:
    """`E phi(u) phi(v)` by a product Gauss-Hermite rule in numpy."""
    u, w = np.polynomial.hermite_e.hermegauss(order)
    w = w / w.sum()
    v = xi * u[:, None] + math.sqrt(1 - xi * xi) * u[None, :]
    return float(w @ (phi(u)[:, None] * phi(v)) @ w)


# Dual activations


@pytest.mark.parametrize("d", [1, 2, 3, 4, 8])
def test_optimal_polynomials_have_alpha_d_by_their_hermite_coefficients(d):
    module = OptimalActivation(d)
    u, w = np.polynomial.hermite_e.hermegauss(40)
    w = w / w.sum()
    values = module(torch.from_numpy(u)).numpy()
    squares = []
    for k in range(9):
        polynomial = np.polynomial.hermite_e.hermeval(u, [0] * k + [1]) / math.sqrt(math.factorial(k))
        squares.append((w @ (values * polynomial)) ** 2)
    assert sum(squares) == pytest.approx(1, abs=1e-12)
    slope = sum(k * square for k, square in enumerate(squares))
    assert -2 * math.log(squares[1]) / math.log(slope) == pytest.approx(d, abs=1e-10)
    dual = DualActivation(module)
    np.testing.assert_allclose(dual.hermite.square(), squares[: len(dual.hermite)], atol=1e-12)
    assert dual.value(numbers(0.5)).item() == pytest.approx(sum(s * 0.5**k for k, s in enumerate(squares)), abs=1e-12)


@pytest.mark.parametrize(
    ("phi", "function"),
    [
        ("erf", lambda z: torch.erf(torch.from_numpy(z)).numpy()),
        ("tanh", np.tanh),
        ("gelu", lambda z: nn.functional.gelu(torch.from_numpy(z)).numpy()),
        (SineActivation(2.5), lambda z: SineActivation(2.5)(torch.from_numpy(z)).numpy()),
    ],
)
def test_duals_are_double_integrals(phi, function):
    dual = DualActivation(phi)
    one = double_integral(function, 1.0)
    xi = numbers(-0.9, -0.3, 0.0, 0.4, 0.8, 0.99)
    direct = [double_integral(function, each) / one for each in xi.tolist()]
    np.testing.assert_allclose(dual.value(xi), direct, atol=1e-10)
    step = 1e-5
    slope = (dual.value(xi + step) - dual.value(xi - step)) / (2 * step)
    np.testing.assert_allclose(dual.derivative(xi), slope, atol=1e-8)


def test_neural_tangents_numbers_are_ours():
    # neural-tangents 0.6.5, jax 0.4.28, float64: stax.Dense(W_std = sqrt 2), then L times the layer and
    # stax.Dense(W_std = 1 / sqrt(E phi^2)), between (1, 0) and (xi, sqrt(1 - xi^2)).
    xi = numbers(1.0, 0.9, 0.5, 0.1)
    x = numbers(1.0, 0.0)[None]
    z = torch.stack([xi, (1 - xi * xi).sqrt()], 1)
    for (name, depth), (sigma, theta) in NEURAL_TANGENTS.items():
        torch.testing.assert_close(nngp(x, z, name, depth)[0], numbers(*sigma), rtol=1e-8, atol=0)
        torch.testing.assert_close(ntk(x, z, name, depth)[0], numbers(*theta), rtol=1e-7, atol=0)


NEURAL_TANGENTS = {
    ("erf", 1): (
        (1.0, 0.8818373585, 0.4657037548, 0.09142609279),
        (2.225700004, 1.909618057, 0.9502042223, 0.1829880747),
    ),
    ("erf", 5): (
        (1.0, 0.7843099004, 0.3422861666, 0.06381180348),
        (10.59292421, 6.701626567, 2.198072654, 0.3837758701),
    ),
    ("sin", 1): (
        (1.0, 0.8734816908, 0.443409442, 0.08523370344),
        (2.313035285, 1.970976957, 0.9231681298, 0.17075133),
    ),
    ("sin", 5): (
        (1.0, 0.7104834841, 0.2547199179, 0.04482778292),
        (13.17609048, 7.304822646, 1.708023096, 0.2700075288),
    ),
    ("relu", 1): (
        (1.0, 0.9095383988, 0.608997781, 0.3699027659),
        (2.0, 1.680328735, 0.9423311144, 0.4230911939),
    ),
    ("relu", 5): (
        (1.0, 0.9365084202, 0.810454201, 0.7471031219),
        (6.0, 4.060894741, 2.462893132, 1.883102215),
    ),
}


@pytest.mark.parametrize("centre", [False, True])
def test_relu_has_the_arc_cosine_kernel(centre):
    dual = DualActivation("relu", centre=centre)
    angle = torch.linspace(0.01, 1.57, 40, dtype=torch.float64)
    arc = (angle.sin() + (math.pi - angle) * angle.cos()) / math.pi
    expected = (arc - 1 / math.pi) / (1 - 1 / math.pi) if centre else arc
    torch.testing.assert_close(dual.value(angle.cos()), expected, atol=1e-14, rtol=1e-10)
    # The gap keeps its digits where 1 - dual has none: in e = 1 - cos t it is t^2/2 - t^3/(3 pi) + ...
    small = numbers(1e-9, 1e-6, 1e-4)
    t = 2 * (small / 2).sqrt().asin()
    scale = 1 / (1 - 1 / math.pi) if centre else 1.0
    series = scale * (small - (t**3 / 3 - t**5 / 30) / math.pi)
    torch.testing.assert_close(dual.gap(small), series, rtol=1e-12, atol=0)
    assert classify_depth_limit(dual).kind == ("singular" if centre else "majority")


def test_gaps_and_logarithms_say_the_same_as_values():
    xi = torch.linspace(0.001, 0.999, 60, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what hardtanh's series leaves out
        duals = [DualActivation(phi) for phi in ("erf", "relu", "gelu", "cos", "hardtanh", OptimalActivation(3))]
        duals += [DualActivation(phi, centre=True) for phi in ("cos", "relu", "elu")]
    for dual in duals:
        torch.testing.assert_close(1 - dual.gap(1 - xi), dual.value(xi), atol=1e-13, rtol=0)
        torch.testing.assert_close(dual.log_value(xi.log()).exp(), dual.value(xi), atol=1e-13, rtol=1e-11)
        torch.testing.assert_close(dual.log_derivative(xi.log()).exp(), dual.derivative(xi), atol=1e-13, rtol=1e-11)
        assert dual.value(numbers(1.0)).item() == pytest.approx(1, abs=1e-12)
        at_one = dual.derivative(numbers(1.0)).item()
        assert at_one == pytest.approx(dual.B_prime, rel=1e-6), dual.name


def test_hard_tanh_has_the_double_integral_that_follows_its_kinks():
    with pytest.warns(UserWarning, match="beyond the first"):
        dual = DualActivation("hardtanh")
    x = torch.randn(4_000_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert dual.factor**2 == pytest.approx(x.clamp(-1, 1).square().mean().item(), abs=1e-3)
    grid = np.linspace(-8, 8, 1601)
    density = np.exp(-grid * grid / 2) / math.sqrt(2 * math.pi) * 0.01
    for xi in (0.3, 0.8):
        v = xi * grid[:, None] + math.sqrt(1 - xi * xi) * grid[None, :]
        direct = density @ (np.clip(grid, -1, 1)[:, None] * np.clip(v, -1, 1)) @ density
        assert dual.value(numbers(xi)).item() == pytest.approx(direct / dual.factor**2, abs=1e-4)


# The taxonomy


@pytest.mark.parametrize(
    ("phi", "kind"),
    [
        ("relu", "majority"), ("sigmoid", "majority"), ("gelu", "majority"), ("swish", "majority"), ("cos", "majority"),
        ("erf", "singular"), ("tanh", "singular"), ("sin", "singular"), (OptimalActivation(5), "singular"),
        (lambda z: z * z - 1, "nearest"), (lambda z: z**3 - 3 * z, "nearest"),
        (lambda z: torch.cos(z) - math.exp(-0.5), "nearest"),
    ],
)  # fmt: skip
def test_activations_fall_into_the_papers_classes(phi, kind):
    assert classify_depth_limit(phi).kind == kind


@pytest.mark.parametrize(
    ("q_alpha", "q"), [(1.185566, 1.0), (1.999958, 2.676), (3.999998, 6.13539), (7.999978, 13.8258)]
)
def test_sines_reach_any_dimension(q_alpha, q):
    module = SineActivation(q_alpha)
    assert module.q == pytest.approx(q, rel=2e-6)
    assert classify_depth_limit(module).alpha == pytest.approx(q_alpha, abs=1e-9)
    # The module itself, by quadrature.
    assert classify_depth_limit(lambda z: torch.sin(math.sqrt(module.q) * z)).alpha == pytest.approx(q_alpha, abs=1e-6)


def test_alpha_is_that_of_the_duals_slopes_by_autograd():
    for phi in ("erf", OptimalActivation(4), DualActivation("gelu", centre=True)):
        limit = classify_depth_limit(phi)
        xi = numbers(0.0, 1.0).requires_grad_()
        zero, one = torch.autograd.grad(limit.dual.value(xi).sum(), xi)[0].tolist()
        assert limit.alpha == pytest.approx(-2 * math.log(zero) / math.log(one), rel=1e-8)
    assert classify_depth_limit("erf").alpha == pytest.approx(0.8882147, abs=1e-7)


def test_notes_tell_what_follows(rng):
    assert "subtract the mean of the activation (0.398942)" in str(classify_depth_limit("relu"))
    assert "tens of thousands of layers" in str(classify_depth_limit("relu"))
    assert "E phi'^2 < 1" in str(classify_depth_limit("sigmoid"))
    shifted = classify_depth_limit(lambda z: torch.erf(z) + 1e-3)
    assert shifted.kind == "majority" and "as if it were zero" in str(shifted)
    assert shifted.visible_depth > 50
    assert "h_3" in str(classify_depth_limit(lambda z: z**3 - 3 * z))
    for d, words in ((2, "Bayes consistent"), (4, "too flat"), (1, "too peaked")):
        limit = classify_depth_limit(OptimalActivation(2), d=d, X=simplex(50, 3, rng))
        assert words in str(limit) and limit.consistent_dimension == 2
    few = classify_depth_limit(OptimalActivation(2), X=simplex(50, 3, rng)).visible_depth
    many = classify_depth_limit(OptimalActivation(2), X=simplex(2000, 3, rng)).visible_depth
    assert few < many
    assert classify_depth_limit(DualActivation("relu", centre=True)).consistent_dimension is None


# Kernels at any depth


def test_a_linear_network_has_the_papers_kernels(rng):
    x = simplex(5, 3, rng)
    torch.testing.assert_close(nngp(x, None, "linear", 7), x @ x.mT)
    torch.testing.assert_close(ntk(x, None, "linear", 7), 8 * (x @ x.mT))


@given(depth=st.integers(0, 8), xi=st.floats(0.02, 1.0), m=st.integers(2, 4))
@settings(max_examples=30, deadline=None)
def test_powers_have_products_for_kernels(depth, xi, m):
    dual = DualActivation([None, None, lambda z: z * z - 1, lambda z: z**3 - 3 * z, lambda z: z**4 - 6 * z * z + 3][m])
    x, z = numbers(1.0, 0.0)[None], numbers(xi, math.sqrt(1 - xi * xi))[None]
    assert nngp(x, z, dual, depth, log=True).item() == pytest.approx(m**depth * math.log(xi), rel=1e-9, abs=1e-9)
    # K_l = c_l Sigma_l with c_(l+1) = 1 + m c_l.
    expected = m**depth * math.log(xi) + math.log((m ** (depth + 1) - 1) / (m - 1))
    assert ntk(x, z, dual, depth, log=True).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("phi", ["erf", "relu", OptimalActivation(3), "swish"])
def test_kernels_follow_the_recursion_in_plain_numbers(phi, rng):
    x, dual = simplex(6, 4, rng), DualActivation(phi)
    sigma = theta = x @ x.mT
    for _ in range(6):
        slope = dual.derivative(sigma.clamp(max=1))
        sigma = dual.value(sigma.clamp(max=1))
        theta = sigma + theta * slope
    torch.testing.assert_close(nngp(x, None, phi, 6), sigma, rtol=1e-9, atol=0)
    torch.testing.assert_close(ntk(x, None, phi, 6), theta, rtol=1e-7, atol=0)
    diagonal = sum(dual.B_prime**k for k in range(7))
    torch.testing.assert_close(ntk(x, None, phi, 6).diagonal(), torch.full((6,), diagonal, dtype=torch.float64))


@pytest.mark.parametrize("kernel", [nngp, ntk])
def test_large_kernels_from_tables_are_the_small_ones(kernel, rng):
    x = simplex(300, 3, rng)
    x[7] = x[3]
    for phi in ("erf", "relu", OptimalActivation(8), DualActivation("relu", centre=True)):
        whole = kernel(x, None, phi, 40)
        torch.testing.assert_close(whole[:40, 3:9], kernel(x[:40], x[3:9], phi, 40), rtol=1e-7, atol=0)
        torch.testing.assert_close(whole, whole.mT)
        logs = kernel(x, x[:100], phi, 40, log=True)
        torch.testing.assert_close(logs, kernel(x, None, phi, 40)[:, :100].log(), rtol=1e-7, atol=1e-7)


def test_kernels_go_on_in_logarithms_where_numbers_end(rng):
    x = simplex(8, 9, rng)
    logs = nngp(x, None, OptimalActivation(9), 1000, log=True)
    off = ~torch.eye(8, dtype=torch.bool)
    assert (nngp(x, None, OptimalActivation(9), 1000)[off] == 0).all() and logs[off].max() < -2000
    psi = koenigs(OptimalActivation(9)).of_gap(gaps(x, x)[off], log=True)
    torch.testing.assert_close(logs[off] - 1000 * math.log(2**-4.5), psi, rtol=0, atol=1e-9)


@pytest.mark.parametrize("phi", [OptimalActivation(2), OptimalActivation(4), "sin"])
def test_ntk_over_depth_tends_to_the_singular_kernel_as_one_over_depth(phi):
    x, z = numbers(1.0, 0.0)[None], numbers(0.5, math.sqrt(0.75))[None]
    limit = koenigs(phi)
    for depth in (20, 80, 320):
        ratio = ntk(x, z, phi, depth, log=True).item() - math.log(depth) - depth * math.log(limit.a)
        assert abs(math.exp(ratio) / limit(numbers(0.5)).item() - 1) <= 5 / depth


def test_kernels_can_be_differentiated(rng):
    x, z = torch.rand(2, 3, dtype=torch.float64, generator=rng), torch.rand(3, 3, dtype=torch.float64, generator=rng)

    def kernel(x, z, phi):
        return ntk(*(each / each.norm(dim=1, keepdim=True) for each in (x, z)), phi, 3)

    for phi in ("erf", "relu", OptimalActivation(3)):
        assert torch.autograd.gradcheck(
            lambda x, z, phi=phi: kernel(x, z, phi), (x.requires_grad_(), z.requires_grad_()), atol=1e-5
        )


def test_negative_inner_products_follow_the_plain_recursion(rng):
    x, z = numbers(1.0, 0.0)[None], torch.stack([numbers(-0.6, 0.8), numbers(-1.0, 0.0), numbers(0.6, 0.8)])
    for phi in (OptimalActivation(4), "erf"):
        dual, sigma = DualActivation(phi), numbers(-0.6, -1.0, 0.6)
        for _ in range(3):
            sigma = dual.value(sigma)
        torch.testing.assert_close(nngp(x, z, phi, 3)[0], sigma)
        with pytest.raises(ValueError, match="log=True needs"):
            nngp(x, z, phi, 3, log=True)
    many = torch.randn(200, 4, dtype=torch.float64, generator=rng)
    many = many / many.norm(dim=1, keepdim=True)
    many[1] = -many[0]
    for phi in (OptimalActivation(4), "erf", "relu", "gelu"):  # from a table
        for kernel in (nngp, ntk):
            torch.testing.assert_close(
                kernel(many, None, phi, 15)[:20], kernel(many[:20], many, phi, 15), rtol=1e-7, atol=1e-9
            )


# The singular kernel


PSI = {
    1: (0.3002222, 1.5307218, 160.48375),
    2: (0.3389131, 5.5911637, 60516.283),
    4: (0.7170410, 128.4958543, 1.46489187e10),
}


@pytest.mark.parametrize("d", [1, 2, 4])
def test_psi_has_the_sheets_numbers(d):
    found = koenigs(OptimalActivation(d))
    np.testing.assert_allclose(found(numbers(0.3, 0.9)), PSI[d][:2], rtol=3e-7)
    np.testing.assert_allclose(found.of_gap(numbers(1e-5)), PSI[d][2], rtol=1e-7)
    constant = found.of_gap(numbers(1e-5)).item() * 1e-5**found.p
    assert constant == pytest.approx({1: 0.5075, 2: 0.6052, 4: 1.4649}[d], abs=1e-4)


@given(xi=st.floats(1e-3, 0.999), which=st.sampled_from(["erf", "tanh", 1, 2, 5, 9, "relu"]))
@settings(max_examples=60, deadline=None)
def test_psi_solves_its_functional_equation(xi, which):
    dual = DualActivation(OptimalActivation(which) if isinstance(which, int) else which, centre=which == "relu")
    psi = koenigs(dual)
    left = psi.of_gap(dual.gap(numbers(1 - xi)), log=True)
    assert (left - psi.of_gap(numbers(1 - xi), log=True)).item() == pytest.approx(math.log(psi.a), abs=1e-9)


def test_psi_by_many_iterations_in_high_precision():
    import mpmath

    with mpmath.workdps(60):
        for e in (1e-12, 1e-4, 0.3):
            # d = 2: dual = (xi + xi^3) / 2
            xi, a = 1 - mpmath.mpf(e), mpmath.mpf(1) / 2
            for _ in range(150):
                xi = (xi + xi**3) / 2
            expected = float(mpmath.log(xi) - 150 * mpmath.log(a))
            assert koenigs(OptimalActivation(2)).of_gap(numbers(e), log=True).item() == pytest.approx(
                expected, abs=1e-10
            )


def test_psi_of_linear_and_nearly_linear_activations_is_known():
    xi = torch.linspace(-0.8, 0.8, 20, dtype=torch.float64)
    torch.testing.assert_close(koenigs("linear")(xi), xi)
    # sinh(q xi) / sinh(q) moves xi by -(q^2 / 6) (xi - xi^3) as q -> 0: psi solves psi' (xi - xi^3) = psi.
    q = 0.2
    nearly = koenigs(lambda z: torch.sin(math.sqrt(q) * z))
    torch.testing.assert_close(nearly(xi), xi / (1 - xi * xi).sqrt(), rtol=6e-3, atol=0)


def test_psi_of_negative_correlations():
    xi = torch.linspace(-0.99, -0.01, 30, dtype=torch.float64)
    odd, mixed = koenigs("erf"), koenigs(OptimalActivation(4))
    torch.testing.assert_close(odd(xi), -odd(-xi))
    torch.testing.assert_close(mixed(mixed.dual.value(xi)), mixed.a * mixed(xi), atol=1e-12, rtol=1e-10)
    assert odd(numbers(-1.0, 0.0, 1.0)).tolist() == [-math.inf, 0.0, math.inf]


def test_the_table_is_psi():
    e = torch.cat([torch.logspace(-30, -0.001, 3000), 1 - torch.logspace(-10, -1, 300)]).double()
    for phi in (OptimalActivation(1), OptimalActivation(8), "erf", DualActivation("relu", centre=True)):
        psi = koenigs(phi)
        assert (psi.table(e.device)(e, 1 - e) - psi.log_ratio(e)).abs().max() < 4e-7


# The classifier


def clusters(n: int, ambient: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    X = simplex(n, ambient, rng)
    noise = 0.3 * torch.rand(n, dtype=torch.float64, generator=rng)
    return X, (X[:, 0] + noise > X[:, 1] + 0.1).long()


@pytest.mark.parametrize("d", [1, 2, 4, 12])
def test_the_limit_is_the_direct_sum_of_psi(d, rng):
    X, y = clusters(200, d + 1, rng)
    query = simplex(300, d + 1, rng)
    found = SingularKernelClassifier(d, chunk=777).fit(X, y)
    weight = koenigs(OptimalActivation(d))(query @ X.mT)
    expected = (weight @ torch.nn.functional.one_hot(y).double()) / weight.sum(1, keepdim=True)
    torch.testing.assert_close(found.predict_proba(query), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.decision_function(query), expected[:, 1] - expected[:, 0], atol=2e-6, rtol=0)
    assert torch.equal(found.predict(query), (expected[:, 1] > expected[:, 0]).long())


def test_the_limit_is_near_the_hilbert_estimate(rng):
    X, y = clusters(500, 3, rng)
    query = simplex(500, 3, rng)
    weight = 1 / torch.cdist(query, X, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    hilbert = (weight @ (2.0 * y.double() - 1) > 0).long()
    assert (SingularKernelClassifier(2).fit(X, y).predict(query) == hilbert).double().mean() > 0.96


@pytest.mark.parametrize("kernel", ["nngp", "ntk"])
def test_great_depth_is_the_limit(kernel, rng):
    X, y = clusters(60, 4, rng)
    query = simplex(100, 4, rng)
    limit = SingularKernelClassifier(3).fit(X, y)
    deep = SingularKernelClassifier(3, depth=60, kernel=kernel).fit(X, y)
    assert (deep.predict(query) == limit.predict(query)).double().mean() >= (1.0 if kernel == "nngp" else 0.97)


@pytest.mark.parametrize("m", [2, 3])
def test_activations_without_mean_and_slope_are_the_nearest_neighbour(m, rng):
    X, y = clusters(100, 5, rng)
    query = simplex(200, 5, rng)
    phi = (lambda z: z * z - 1) if m == 2 else (lambda z: z**3 - 3 * z)
    deep = SingularKernelClassifier(phi, depth=30).fit(X, y)
    peer = KNeighborsClassifier(1).fit(X.numpy(), y.numpy())
    np.testing.assert_array_equal(deep.predict(query.numpy()), peer.predict(query.numpy()))


def test_deep_sigmoid_networks_vote(rng):
    X, y = clusters(30, 3, rng)
    y[:20] = 1
    deep = SingularKernelClassifier("sigmoid", depth=60).fit(X, y)
    assert (deep.predict(simplex(50, 3, rng)) == 1).all()


@pytest.mark.parametrize("depth", [5, 50, math.inf])
def test_training_points_keep_their_labels(depth, rng):
    X, y = clusters(80, 3, rng)
    for phi in (2, "erf"):
        assert torch.equal(SingularKernelClassifier(phi, depth=depth).fit(X, y).predict(X), y)


def test_a_finite_depth_solves_the_kernel_system(rng):
    X, y = clusters(40, 4, rng)
    query = simplex(30, 4, rng)
    for kernel, function in (("nngp", nngp), ("ntk", ntk)):
        f = function(query, X, "erf", 2) @ torch.linalg.solve(function(X, None, "erf", 2), 2.0 * y.double() - 1)
        found = SingularKernelClassifier("erf", depth=2, kernel=kernel).fit(X, y)
        assert torch.equal(found.predict(query), (f > 0).long())


@pytest.mark.parametrize("depth", [2, 40, math.inf])
def test_leaving_one_out_is_fitting_without_it(depth, rng):
    X, y = clusters(30, 3, rng)
    classifier = SingularKernelClassifier(2, depth=depth)
    brute = []
    for i in range(30):
        rest = torch.arange(30) != i
        brute.append(SingularKernelClassifier(2, depth=depth).fit(X[rest], y[rest]).predict(X[i : i + 1]))
    assert torch.equal(classifier.fit(X, y).leave_one_out(), torch.cat(brute))


def test_copies_of_a_point_vote_and_ties_go_to_the_larger_class():
    X = torch.stack([numbers(1.0, 0.0)] * 3 + [numbers(0.0, 1.0)] + [numbers(0.6, 0.8)] * 2)
    y = np.array(["a", "b", "b", "a", "b", "a"])
    found = SingularKernelClassifier(1).fit(X, y)
    assert found.predict(X[:1]).tolist() == ["b"]
    assert found.predict_proba(X[:1]).tolist() == [[pytest.approx(1 / 3), pytest.approx(2 / 3)]]
    # A tie of the two copies at (.6, .8); three votes each: weights decide.
    for weight, winner in ((1.1, "a"), (0.9, "b")):
        weighted = found.fit(X, y, sample_weight=np.array([1, 1, 1, weight, 1, 1.0]))
        assert weighted.predict(X[4:5]).tolist() == [winner]


def test_priors_and_weights_move_the_vote(rng):
    X, y = clusters(300, 3, rng)
    query = simplex(400, 3, rng)
    found = SingularKernelClassifier(2).fit(X, y)
    before = found.predict_proba(query)
    share = y.double().mean().item()
    found.class_prior = {0: 1 - share, 1: share}
    torch.testing.assert_close(found.predict_proba(query), before)
    found.class_prior = [0.9, 0.1]
    odds = before[:, 1] / before[:, 0] * (0.1 / 0.9) / (share / (1 - share))
    torch.testing.assert_close(found.predict_proba(query)[:, 1], odds / (1 + odds))
    doubled = SingularKernelClassifier(2).fit(X, y, sample_weight=1.0 + y.double())
    repeated = SingularKernelClassifier(2).fit(torch.cat([X, X[y == 1]]), torch.cat([y, y[y == 1]]))
    torch.testing.assert_close(doubled.predict_proba(query), repeated.predict_proba(query))


def test_scikit_learn_takes_it_in_a_pipeline_with_many_classes():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import cross_val_score

    X, y = load_digits(return_X_y=True)
    X, y = X[:600], y[:600]
    model = make_pipeline(FunctionTransformer(np.sqrt), SingularKernelClassifier(feature_map="normalise"))
    assert cross_val_score(model, X, y, cv=3).mean() > 0.85
    fitted = model.fit(X, y)[-1]
    assert fitted.dimension_source_ == "two-nn" and 4 < fitted.dimension_ < 20
    assert model.decision_function(X[:5]).shape == (5, 10) and isinstance(model.predict(X[:5]), np.ndarray)


def test_features_of_any_range_are_lifted_to_the_sphere(rng):
    X = torch.randn(200, 3, dtype=torch.float64, generator=rng) * numbers(1.0, 10.0, 0.1) + 5
    X[:, 2] = 4.0
    lifted = to_sphere(X)
    assert lifted.shape == (200, 4) and (lifted >= 0).all()
    torch.testing.assert_close(lifted.norm(dim=1), torch.ones(200, dtype=torch.float64))
    y = (X[:, 0] > 5).long()
    found = SingularKernelClassifier(2, feature_map="append").fit(X, y)
    assert torch.equal(found.predict(X), y)
    assert len(found.predict(X[:1] + 100)) == 1


@pytest.mark.parametrize(("method", "within"), [("two-nn", 0.35), ("mle", 0.5)])
def test_the_dimension_of_spheres_is_found(method, within, rng):
    for d in (1, 2, 5):
        flat = torch.rand(2000, d, dtype=torch.float64, generator=rng)
        points = flat @ torch.randn(d, 10, dtype=torch.float64, generator=rng)
        assert intrinsic_dimension(points, method) == pytest.approx(d, abs=within * max(1, d / 3))


def test_wide_networks_have_the_kernels(rng):
    x = simplex(4, 3, rng)
    for phi, centre in (("erf", False), ("relu", True)):
        dual, products = DualActivation(phi, centre=centre), []
        for _ in range(4):
            net = wide_deep_mlp(3, 1, phi, 1500, 2, centre=centre, generator=rng).double()
            hidden = net[:-1](x)
            products.append(hidden @ hidden.mT / 1500)
        torch.testing.assert_close(torch.stack(products).mean(0), nngp(x, None, dual, 2), atol=0.1, rtol=0.1)
        parameters = list(net.parameters())
        outputs = [torch.autograd.grad(net(each[None])[0, 0], parameters) for each in x]
        J = torch.stack([torch.cat([part.flatten() for part in gradient]) for gradient in outputs])
        torch.testing.assert_close(J @ J.mT, ntk(x, None, dual, 2), atol=0.5, rtol=0.2)
    assert "width" not in repr(net) and net[0].weight.shape == (1500, 3)


# What is refused


@pytest.mark.usefixtures("shape_checks_off")
def test_bad_input_is_refused(rng):
    X, y = clusters(20, 3, rng)
    fit = SingularKernelClassifier(2).fit
    for bad, message in (
        (lambda: OptimalActivation(0.5), "d must be at least 1"),
        (lambda: OptimalActivation(2.5), "integer"),
        (lambda: optimal_activation(1.5), "integer"),
        (lambda: SineActivation(1.0), "above 1"),
        (lambda: DualActivation(lambda z: torch.exp(z * z)), "finite E phi"),
        (lambda: DualActivation(lambda z: z * math.nan), "finite E phi"),
        (lambda: DualActivation(torch.zeros_like), "zero everywhere"),
        (lambda: DualActivation(torch.ones_like), "constant"),
        (lambda: DualActivation("sign"), "continuous"),
        (lambda: DualActivation("erf", order=1), "order must be at least 2"),
        (lambda: classify_depth_limit("linear"), "is linear"),
        (lambda: classify_depth_limit("erf", d=0), "d must be at least 1"),
        (lambda: koenigs("relu"), "majority vote"),
        (lambda: koenigs(lambda z: z * z - 1), "nearest neighbour"),
        (lambda: koenigs("erf")(numbers(1.5)), r"xi must be in \[-1, 1\]"),
        (lambda: koenigs("erf")(numbers(-0.5), log=True), "must not be negative"),
        (lambda: koenigs("erf").of_gap(numbers(1.5)), r"e must be in \[0, 1\]"),
        (lambda: nngp(2 * X, None, "erf", 3), "rows of norm 1"),
        (lambda: nngp(X * math.nan, None, "erf", 3), "finite"),
        (lambda: nngp(X, X[:, :2] / X[:, :2].norm(dim=1, keepdim=True), "erf", 3), "as many features"),
        (lambda: ntk(X, None, "erf", -1), "depth must be"),
        (lambda: fit(2 * X, y), "rows of norm 1"),
        (lambda: fit(X * math.nan, y), "finite"),
        (lambda: fit(X, torch.zeros(20)), "at least 2 classes"),
        (lambda: fit(X, y[:5]), "one label for each"),
        (lambda: fit(X, y, sample_weight=-torch.ones(20)), "non-negative"),
        (lambda: SingularKernelClassifier("relu").fit(X, y), "majority vote"),
        (lambda: SingularKernelClassifier(2, depth=2.5).fit(X, y), "depth must be"),
        (lambda: SingularKernelClassifier(2, kernel="rbf").fit(X, y), "'nngp' or 'ntk'"),
        (lambda: SingularKernelClassifier(2, feature_map="cube").fit(X, y), "feature_map"),
        (lambda: SingularKernelClassifier(2, chunk=0).fit(X, y), "chunk"),
        (lambda: SingularKernelClassifier(2).predict(X), "fit must be called"),
        (lambda: fit(X, y).predict(simplex(3, 5, rng)), "3 coordinates"),
        (lambda: SingularKernelClassifier(2, class_prior=[1.0]).fit(X, y).predict(X), "class_prior must give 2"),
        (lambda: SingularKernelClassifier(2, depth=3).fit(X, y).predict_proba(X), "depth=math.inf"),
        (lambda: to_sphere(X, "project"), "'append' or 'normalise'"),
        (lambda: to_sphere(torch.zeros(2, 3), "normalise"), "rows of zeros"),
        (lambda: intrinsic_dimension(X, "pca"), "'two-nn' or 'mle'"),
        (lambda: intrinsic_dimension(X[:2]), "more than 2 points"),
        (lambda: wide_deep_mlp(0, 1, "erf", 4, 2), "in_features must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
    with pytest.raises(TypeError, match="real numbers"):
        fit(X, torch.randn(20))


def test_negative_inner_products_are_warned_of_unless_the_activation_is_odd():
    angle = torch.linspace(0, 3, 30, dtype=torch.float64)
    X, y = torch.stack([angle.cos(), angle.sin()], 1), (angle > 1.5).long()
    with pytest.warns(UserWarning, match="negative inner products"):
        mixed = SingularKernelClassifier(4).fit(X, y).predict_proba(X[::5])
    assert torch.isfinite(mixed).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        odd = SingularKernelClassifier("erf").fit(X, y)
    query = torch.stack([(angle + 0.01).cos(), (angle + 0.01).sin()], 1)
    weight = koenigs("erf")(query @ X.mT)
    expected = (weight @ (2.0 * y.double() - 1) > 0).long()
    assert torch.equal(odd.predict(query), expected)


def test_an_undeclared_kink_is_refused_and_a_declared_one_is_exact():
    with pytest.raises(ValueError, match="kinks"):
        DualActivation(lambda z: z.clamp_min(0))
    declared = DualActivation(Activation(lambda z: z.clamp_min(0), slopes=(0.0, 1.0), kinks=(0.0,)))
    assert declared.B_prime == pytest.approx(1, abs=1e-9)

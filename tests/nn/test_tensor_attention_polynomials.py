"""The almost linear algorithm against the exact one and dense polynomials; its error against mpmath and its bound."""

from __future__ import annotations

import itertools
import math
import warnings

import jaxtyping
import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lathe.nn.tensor_attention import (
    degree_for,
    error_bound,
    exp_poly,
    khatri_rao,
    monomial_features,
    plan_poly,
    poly_rank,
    tensor_attention,
)
from lathe.nn.tensor_attention.polynomials import degree_within, monomial_weights


def bounded(order, n=8, m=None, d=3, v=2, B=0.8, seed=0, batch=(), requires_grad=False):
    """Entries of queries and keys up to B, the largest of them exactly B."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for t in range(2 * order - 1):
        rows = n if t == 0 or m is None else m
        x = torch.rand(*batch, rows, d if t < order else v, generator=generator, dtype=torch.float64) * 2 - 1
        made.append((B * x / x.abs().max() if t < order else x).requires_grad_(requires_grad))
    return made[0], made[1:order], made[order:]


def relative_error(coefficients, R, points=400):
    """The largest relative error on a grid, in fifty digits."""
    with mpmath.workdps(50):
        c = [mpmath.mpf(float(each)) for each in reversed(coefficients)]
        grid = [R * mpmath.cos(mpmath.pi * i / points) for i in range(points + 1)]
        return float(max(abs(mpmath.polyval(c, x) * mpmath.exp(-x) - 1) for x in grid))


@pytest.mark.parametrize("kind", ["taylor", "chebyshev"])
@pytest.mark.parametrize("R", [0.1, 1.0, 4.0, 8.0])
def test_the_stated_error_is_the_true_one(kind, R):
    for degree in (0, 1, 2, 5, 12):
        coefficients, error = exp_poly(R, degree, kind)
        assert len(coefficients) == degree + 1
        # The grid may miss a peak by a little, and is told 0.1 % more.
        true = relative_error(coefficients, R)
        assert true <= error * (1 + 1e-9) + 1e-13
        assert error <= true * 1.01 + 1e-13
    # The series itself; and a polynomial fitted to relative error needs no higher degree.
    if kind == "taylor":
        assert coefficients.tolist() == pytest.approx([1 / math.factorial(t) for t in range(13)])
    assert exp_poly(R, 12, "chebyshev")[1] <= exp_poly(R, 12, "taylor")[1] + 1e-12


def test_degrees_are_the_least_and_those_of_the_prototype():
    # Chebyshev interpolation, as computed for the paper's sheet, needs 3, 5, 7, 11, 20; Taylor 5, 7, 11, 18, 32.
    fitted = [degree_within(R, 1e-3) for R in (0.5, 1, 2, 4, 8)]
    series = [degree_within(R, 1e-3, "taylor") for R in (0.5, 1, 2, 4, 8)]
    assert all(ours <= theirs for ours, theirs in zip(fitted, (3, 5, 7, 11, 20)))
    assert all(ours <= theirs for ours, theirs in zip(series, (5, 7, 11, 18, 32)))
    for R, degree in zip((0.5, 1, 2, 4, 8), series):
        for g, reached in ((degree, True), (degree - 1, False)):
            error = relative_error([1 / mpmath.factorial(t) for t in range(g + 1)], R)
            assert (error <= 1e-3) is reached
    assert degree_for(2.0, 3, 1e-3, "taylor") == degree_within(8.0, 1e-3, "taylor")
    assert [degree_within(R, 1e-3, "taylor") for R in (16, 32, 64)] == [60, 117, 232]


@settings(max_examples=30, deadline=None)
@given(d=st.integers(1, 4), g=st.integers(0, 5), seed=st.integers(0, 99))
def test_features_are_all_monomials_and_their_weights_make_the_polynomial(d, g, seed):
    generator = torch.Generator().manual_seed(seed)
    q, a, b = (torch.randn(d, generator=generator, dtype=torch.float64) for _ in range(3))
    exponents = [alpha for alpha in itertools.product(range(g + 1), repeat=d) if sum(alpha) <= g]
    expected = sorted(math.prod(float(x) ** e for x, e in zip(q, alpha)) for alpha in exponents)
    features = monomial_features(q, g)
    assert features.shape == (poly_rank(d, g),) == (len(exponents),)
    assert sorted(features.tolist()) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    coefficients = torch.randn(g + 1, generator=generator, dtype=torch.float64)
    product = (features * monomial_features(a, g) * monomial_features(b, g) * monomial_weights(coefficients, d)).sum()
    x = float((q * a * b).sum())
    assert float(product) == pytest.approx(sum(float(c) * x**t for t, c in enumerate(coefficients)), rel=1e-9, abs=1e-9)


def test_products_of_khatri_rao_products_are_products_of_products():
    generator = torch.Generator().manual_seed(0)
    A, C = (torch.randn(7, w, generator=generator, dtype=torch.float64) for w in (3, 2))
    B, D = (torch.randn(6, w, generator=generator, dtype=torch.float64) for w in (3, 2))
    torch.testing.assert_close(khatri_rao(A, B).T @ khatri_rao(C, D), (A.T @ C) * (B.T @ D), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("kind", ["taylor", "chebyshev"])
def test_it_is_the_dense_result_of_the_same_polynomial(order, kind):
    q, ks, vs = bounded(order, n=6, m=7)
    K, V = ks[0], vs[0]
    for k, v in zip(ks[1:], vs[1:]):
        K, V = khatri_rao(K, k), khatri_rao(V, v)
    plan = plan_poly(q, ks, vs, degree=4, kind=kind)
    coefficients, _ = exp_poly(plan.radius, 4, kind)
    logits = q @ K.T / 3
    weights = sum(c * logits**t for t, c in enumerate(coefficients))
    assert (weights > 0).all()
    out, lse = tensor_attention(q, ks, vs, method="poly", degree=4, poly=kind, return_lse=True)
    torch.testing.assert_close(out, weights @ V / weights.sum(1, keepdim=True), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse, weights.sum(1).log(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": 3}, {"window": (2, 99)}], ids=str)
@pytest.mark.parametrize("order", [2, 3, 4])
def test_a_high_degree_is_exact_whatever_is_seen(order, options):
    window = options.get("window")
    if isinstance(window, tuple):
        options = {"window": (window * 2)[: order - 1]}
    q, ks, vs = bounded(order, n=9, batch=(2,), requires_grad=True)
    padding = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) < 0.3
    padding[0, :2] = True  # so that the first queries see nothing
    weights = torch.randn(2, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for mask in (None, padding, weights):
        arguments = {"key_padding_mask": mask, "return_lse": True, **options}
        exact = tensor_attention(q, ks, vs, method="exact", **arguments)
        found = tensor_attention(q, ks, vs, method="poly", degree=9, **arguments)
        for ours, expected in zip(found, exact):
            torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-8)
        inputs = [q, *ks, *vs]
        for ours, expected in zip(
            torch.autograd.grad(found[0].square().sum(), inputs), torch.autograd.grad(exact[0].square().sum(), inputs)
        ):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": 2}], ids=str)
@pytest.mark.parametrize("kind", ["taylor", "chebyshev"])
def test_gradients_agree_with_finite_differences(options, kind):
    q, ks, vs = bounded(3, n=4, requires_grad=True)

    def function(q, *rest):
        return tensor_attention(q, rest[:2], rest[2:], method="poly", degree=3, poly=kind, bound=1.0, **options)

    assert torch.autograd.gradcheck(function, (q, *ks, *vs), fast_mode=True)


def test_long_sequences_are_worked_through_in_parts(monkeypatch):
    from lathe.nn.tensor_attention import approximate

    q, ks, vs = bounded(3, n=23, batch=(2,), requires_grad=True)
    for options in ({}, {"is_causal": True}, {"window": (5, 11)}):
        results = []
        for size in (2**21, 2**10):
            monkeypatch.setitem(approximate._CHUNK, "cpu", size)
            out = tensor_attention(q, ks, vs, method="poly", degree=4, **options)
            results.append((out, *torch.autograd.grad(out.square().sum(), [q, *ks, *vs])))
        for whole, parts in zip(*results):
            torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(
    order=st.integers(2, 4), d=st.integers(1, 4), g=st.integers(1, 6), B=st.floats(0.2, 1.3), seed=st.integers(0, 999)
)
def test_the_certified_error_is_never_exceeded(order, d, g, B, seed):
    q, ks, vs = bounded(order, n=6, d=d, B=B, seed=seed)
    scale = 1.0
    for bound in (None, B):
        plan = plan_poly(q, ks, vs, scale=scale, degree=g, bound=bound)
        assert plan.measured <= d * B**order * (1 + 1e-9)
        if plan.error == math.inf:
            assert plan.relative_error >= 1
            continue
        found = tensor_attention(q, ks, vs, scale=scale, method="poly", degree=g, bound=bound)
        exact = tensor_attention(q, ks, vs, scale=scale, method="exact")
        assert float((found - exact).abs().max()) <= plan.error + 1e-12
        vmax = math.prod(float(v.abs().max()) for v in vs)
        assert plan.error == pytest.approx(error_bound(plan.relative_error, vmax))


def test_the_bound_on_the_error_is_attained_by_the_worst_weights():
    eps, n = 0.1, 1000
    weights = torch.cat([torch.tensor([1.0 + eps]), torch.full((n,), 1.0 - eps)]).double()
    large = torch.cat([torch.tensor([float(n)]), torch.ones(n)]).double()  # half of all weight on one value
    values = torch.cat([torch.ones(1), -torch.ones(n)]).double()
    off = (weights * large * values).sum() / (weights * large).sum() - (large * values).sum() / large.sum()
    assert 0.09 < float(off) <= error_bound(eps, 1.0)
    assert error_bound(0.0, 5.0) == 0.0


def test_a_tolerance_chooses_the_degree_and_is_kept():
    q, ks, vs = bounded(3, n=200, d=4)
    exact = tensor_attention(q, ks, vs, method="exact")
    degrees = []
    for tol in (1e-1, 1e-3, 1e-6):
        plan = plan_poly(q, ks, vs, tol=tol)
        assert plan.error <= tol
        degrees.append(plan.degree)
        found = tensor_attention(q, ks, vs, method="poly", tol=tol)
        assert float((found - exact).abs().max()) <= tol
    assert degrees[0] < degrees[1] < degrees[2]


def test_auto_approximates_only_where_it_may_can_and_should():
    q, ks, vs = bounded(3, n=150, d=3)
    exact = tensor_attention(q, ks, vs, method="exact")
    assert torch.equal(tensor_attention(q, ks, vs), exact)  # nobody allowed an error
    allowed = tensor_attention(q, ks, vs, tol=1e-3)
    assert 0 < float((allowed - exact).abs().max()) <= 1e-3
    some = torch.randn(150, 150)
    same = {
        "logits too large": tensor_attention(9 * q, ks, vs, tol=1e-9, scale=1.0),
        "too few rows to pay": tensor_attention(q[:9], [k[:9] for k in ks], [v[:9] for v in vs], tol=1e-3),
        "a bound that does not hold": tensor_attention(q, ks, vs, tol=1e-3, bound=0.1),
        "a mask of pairs": tensor_attention(q, ks, vs, tol=1e-3, attn_mask=[some.double(), None]),
    }
    expected = {
        "logits too large": tensor_attention(9 * q, ks, vs, method="exact", scale=1.0),
        "too few rows to pay": tensor_attention(q[:9], [k[:9] for k in ks], [v[:9] for v in vs], method="exact"),
        "a bound that does not hold": exact,
        "a mask of pairs": tensor_attention(q, ks, vs, method="exact", attn_mask=[some.double(), None]),
    }
    for name, found in same.items():
        assert torch.equal(found, expected[name]), name


def test_logits_beyond_the_bound_are_told():
    q, ks, vs = bounded(3, B=1.0)
    with pytest.warns(UserWarning, match=r"logits may reach 0\.\d+, beyond the 0\.1\d+"):
        tensor_attention(q, ks, vs, method="poly", degree=3, bound=0.5)
    with pytest.raises(ValueError, match="logits may reach"):
        tensor_attention(q, ks, vs, method="poly", degree=3, bound=0.5, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor_attention(q, ks, vs, method="poly", degree=3, bound=1.0)
    assert plan_poly(q, ks, vs, degree=3, bound=0.5).error == math.inf


def test_float32_is_accurate_even_where_the_terms_cancel():
    q, ks, vs = bounded(3, n=40, B=1.9)
    exact = tensor_attention(q, ks, vs, method="exact")
    single = [each.float() for each in (q, *ks, *vs)]
    found = tensor_attention(single[0], single[1:3], single[3:], method="poly", tol=1e-3)
    assert found.dtype == torch.float32
    assert float((found.double() - exact).abs().max()) <= 1.1e-3


@pytest.fixture
def no_shape_checks():
    """What a user has: the library's own errors, not those of jaxtyping."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def test_arguments_that_cannot_work_are_refused_before_any_work(no_shape_checks):
    q, ks, vs = bounded(3)
    for message, options in [
        ("degree must be at least 0, got -1", {"degree": -1}),
        ("bound must be positive, got 0", {"degree": 2, "bound": 0.0}),
        ("tol must be positive, got 0", {"tol": 0.0}),
    ]:
        with pytest.raises(ValueError, match=message):
            tensor_attention(q, ks, vs, method="poly", **options)
    with pytest.raises(ValueError, match=r"needs .* monomials, more than 1,000,000"):
        wide = torch.rand(2, 64)
        tensor_attention(wide, [wide, wide], [wide, wide], method="poly", degree=8)
    with pytest.raises(ValueError, match="finite"):
        tensor_attention(q * math.inf, ks, vs, method="poly", degree=2)
    for message, call in [
        ("kind must be one of chebyshev, taylor, got 'pade'", lambda: exp_poly(1.0, 2, "pade")),
        ("R must be positive and finite, got 0", lambda: exp_poly(0.0, 2)),
        ("degree must be at least 0", lambda: exp_poly(1.0, -1)),
        ("R must be at most 14.6", lambda: exp_poly(20.0, 5)),
        ("order must be at least 2, got 1", lambda: degree_for(1.0, 1, 1e-3)),
        ("bound must be positive", lambda: degree_for(0.0, 2, 1e-3)),
        ("eps must be positive", lambda: degree_for(1.0, 2, 0.0)),
        ("within reach", lambda: degree_for(3.0, 2, 1e-30)),
        (r"eps must lie in \[0, 1\), got 1", lambda: error_bound(1.0, 1.0)),
        ("d must be at least 1", lambda: poly_rank(0, 2)),
        ("g be at least 0", lambda: monomial_features(torch.ones(3), -1)),
        ("as many columns", lambda: khatri_rao(torch.ones(2, 3), torch.ones(2, 1))),
    ]:
        with pytest.raises(ValueError, match=message):
            call()

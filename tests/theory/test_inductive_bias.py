"""Laws, fits and estimates: against closed forms, mpmath, SciPy, Fourier inversion, draws, identities and limits."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special, stats

from lathe.theory.inductive_bias import (
    ScaledChi2,
    Task,
    beta_log_cdf,
    fit_losses,
    inductive_bias,
    match_cumulants,
    ncx2_log_cdf,
    ncx2_log_prob,
    relative_bias,
    weighted_chi2_cumulants,
    weighted_chi2_log_cdf,
)
from lathe.theory.inductive_bias.estimate import with_task


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mixture(x: float, df: float, nc: float) -> float:
    """`log F` as a Poisson mixture of central laws, in 30 digits."""
    with mpmath.workdps(30):
        half, total, best = mpmath.mpf(nc) / 2, mpmath.mpf(0), mpmath.mpf(0)
        for j in range(100_000):
            weight = mpmath.exp(-half) * half**j / mpmath.factorial(j)
            term = weight * mpmath.gammainc(mpmath.mpf(df) / 2 + j, 0, mpmath.mpf(x) / 2, regularized=True)
            total, best = total + term, max(best, term)
            if term < best * mpmath.mpf(10) ** -22:
                break
        return float(mpmath.log(total))


@pytest.mark.parametrize(
    ("x", "df", "nc"),
    [
        (1, 20, 5), (500, 1000, 200), (100, 1000, 200), (1e-3, 1, 50), (30, 1, 50), (1e-4, 0.01, 3), (5, 0.3, 4),
        (10, 100, 800), (2, 5, 3000), (80, 1, 50), (0.1, 1000, 0),
    ],
)  # fmt: skip
def test_ncx2_is_the_poisson_mixture_down_to_thousands_of_nats(x, df, nc):
    assert ncx2_log_cdf(float(x), float(df), float(nc)).item() == pytest.approx(
        mixture(x, df, nc), rel=1e-13, abs=1e-12
    )


def test_ncx2_has_the_sheets_values():
    found = ncx2_log_cdf(vector(1.0, 500.0, 100.0), vector(20.0, 1000.0, 1000.0), vector(5.0, 200.0, 200.0))
    torch.testing.assert_close(found, -vector(24.87688, 152.29186, 795.33259), atol=1e-4, rtol=0)


def test_central_laws_are_those_of_scipy():
    df, x = np.array([0.5, 1.0, 3.0, 50.0, 400.0]), np.array([0.01, 0.5, 1.0, 2.0])
    grid = np.multiply.outer(df, x)
    found = ncx2_log_cdf(torch.from_numpy(grid), torch.from_numpy(df[:, None]), 0.0)
    expected = stats.chi2.logcdf(grid, df[:, None])
    reached = np.isfinite(expected)
    assert reached.sum() >= 18 and (found.numpy()[~reached] < -600).all()
    np.testing.assert_allclose(found[reached], expected[reached], rtol=1e-10, atol=1e-15)
    np.testing.assert_allclose(found.exp(), special.gammainc(df[:, None] / 2, grid / 2), rtol=1e-10, atol=1e-300)
    # Far above the mean too, where the log-probability is all but zero.
    assert ncx2_log_cdf(200.0, 100.0, 0.0).item() == pytest.approx(math.log1p(-stats.chi2.sf(200, 100)), rel=1e-9)


@given(df=st.floats(0.2, 500), nc=st.floats(0, 1000), at=st.floats(-5, 5))
@settings(max_examples=40, deadline=None)
def test_ncx2_is_that_of_scipy_where_scipy_reaches(df, nc, at):
    nc = 0.0 if nc < 1e-3 else nc
    x = max(df + nc + at * math.sqrt(2 * (df + 2 * nc)), 0.05 * (df + nc))
    peer = stats.ncx2(df, nc) if nc else stats.chi2(df)
    # SciPy gives zero for some probabilities that are far from it (df = 378, nc = 1/32, at the mean).
    for ours, theirs in ((ncx2_log_cdf, peer.logcdf(x)), (ncx2_log_prob, peer.logpdf(x))):
        if np.isfinite(theirs):
            assert ours(x, df, nc).item() == pytest.approx(theirs, rel=1e-6, abs=1e-7)


def test_equal_weights_are_one_scaled_chi_squared():
    shifts2 = vector(0.3, 0.0, 1.2, 0.5, 2.0) * 0.01
    eps = vector(1e-4, 1e-3, 1e-2, 0.1)
    found = weighted_chi2_log_cdf(eps, torch.full((5,), 0.01, dtype=torch.float64), shifts2)
    torch.testing.assert_close(found, ncx2_log_cdf(eps / 0.01, 5.0, shifts2.sum() / 0.01), atol=1e-11, rtol=1e-12)
    joined = weighted_chi2_log_cdf(eps, vector(0.01), shifts2.sum()[None], df=5.0)
    torch.testing.assert_close(found, joined, atol=1e-11, rtol=1e-12)


@pytest.mark.parametrize(("terms", "level"), [(40, 10), (300, 150), (2000, 1500)])
def test_the_saddlepoint_is_within_a_thousandth_of_a_nat_of_scipy_and_exact(terms, level):
    weights = torch.full((terms,), 1 / terms, dtype=torch.float64)
    x = 1 / math.exp(math.sqrt(4 * level / terms))
    exact, quick = (
        weighted_chi2_log_cdf(x, weights, weights * 0.2, method=method).item() for method in ("exact", "saddlepoint")
    )
    assert -2 * level < exact < -level / 2
    assert quick == pytest.approx(exact, abs=1.5e-3)
    peer = stats.ncx2.logcdf(x * terms, terms, 0.2 * terms)
    if np.isfinite(peer):
        assert exact == pytest.approx(peer, abs=1e-6)


def test_weights_of_all_sizes_are_the_sum_of_exponentials():
    # Two degrees of freedom each: exponential laws, whose sum has a closed form that cancels; in 400 digits it may.
    weights = np.logspace(-3, 0, 12)
    with mpmath.workdps(400):
        rates = [1 / (2 * mpmath.mpf(w)) for w in weights.tolist()]
        factors = [mpmath.fprod(b / (b - a) for b in rates if b != a) for a in rates]

        def oracle(x: float) -> float:
            return float(mpmath.log(mpmath.fsum(f * (1 - mpmath.exp(-a * x)) for f, a in zip(factors, rates))))

        eps = [1e-8, 1e-3, 0.1, 1.0, 2 * float(weights.sum()), 30.0]
        expected = [oracle(x) for x in eps]
    found = weighted_chi2_log_cdf(vector(*eps), torch.from_numpy(weights), torch.zeros(12).double(), df=2.0)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


@pytest.fixture(scope="module")
def uneven():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(30, dtype=torch.float64, generator=generator) ** 4, torch.rand(30, generator=generator).double()


def test_exact_tails_are_gil_pelaez_and_draws(uneven):
    weights, shifts2 = (part.numpy() for part in uneven)
    mean = (weights + shifts2).sum()
    z = np.random.default_rng(0).standard_normal((100_000, 30))
    losses = np.square(np.sqrt(weights) * z + np.sqrt(shifts2)).sum(1)

    def integrand(u: float, x: float) -> float:
        through = 1 - 2j * u * weights
        phi = np.exp((1j * u * shifts2 / through - 0.5 * np.log(through)).sum() - 1j * u * x)
        return phi.imag / u

    for share in (0.45, 0.7, 1.0, 1.6):
        x = share * mean
        found = weighted_chi2_log_cdf(x, *uneven).exp().item()
        fourier = 0.5 - integrate.quad(integrand, 0, 200, args=(x,), limit=500, epsabs=1e-10)[0] / math.pi
        assert found == pytest.approx(fourier, rel=1e-3 if share < 0.5 else 1e-6)
        assert abs((losses <= x).mean() - found) <= 4 * math.sqrt(found * (1 - found) / len(losses))
        assert weighted_chi2_log_cdf(x, *uneven, method="saddlepoint").exp().item() == pytest.approx(found, rel=0.01)


def test_cumulants_are_derivatives_of_the_generating_function(uneven):
    weights, shifts2 = uneven
    found = weighted_chi2_cumulants(weights, shifts2, order=4)
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    value = (-0.5 * torch.log(1 - 2 * t * weights) + t * shifts2 / (1 - 2 * t * weights)).sum()
    for kappa in found:
        (value,) = torch.autograd.grad(value, t, create_graph=True)
        assert kappa.item() == pytest.approx(value.item(), rel=1e-10)


def test_the_floor_is_what_cannot_vary():
    weights, shifts2 = vector(0.0, 0.5, 0.0, 0.2), vector(0.3, 0.1, 0.2, 0.4)
    found = weighted_chi2_log_cdf(vector(0.4, 0.5, 0.6, 1.0), weights, shifts2)
    without = weighted_chi2_log_cdf(vector(0.1, 0.5), weights[[1, 3]], shifts2[[1, 3]])
    assert found[:2].tolist() == [-math.inf, -math.inf]
    torch.testing.assert_close(found[2:], without)


@given(st.lists(st.tuples(st.floats(1e-4, 1), st.floats(0, 2)), min_size=1, max_size=8), st.floats(0.01, 3))
@settings(max_examples=40, deadline=None)
def test_probabilities_grow_and_scale(terms, share):
    weights, shifts2 = torch.tensor(terms, dtype=torch.float64).T
    x = share * (weights + shifts2).sum()
    found = weighted_chi2_log_cdf(torch.stack([x, 1.1 * x, 2 * x]), weights, shifts2)
    assert (found <= 0).all() and (found.diff() >= -1e-12).all()
    scaled = weighted_chi2_log_cdf(7 * x, 7 * weights, 7 * shifts2)
    assert scaled.item() == pytest.approx(found[0].item(), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("method", ["exact", "saddlepoint"])
@pytest.mark.parametrize("share", [0.3, 1.3])
def test_tails_can_be_differentiated(method, share, uneven):
    weights, shifts2 = (part[:5] for part in uneven)
    x = share * (weights + shifts2).sum()
    arguments = [part.clone().requires_grad_() for part in (x, weights, shifts2)]
    assert torch.autograd.gradcheck(lambda *a: weighted_chi2_log_cdf(*a, method=method), arguments, atol=1e-5)


def test_ncx2_can_be_differentiated():
    arguments = [part.requires_grad_() for part in (vector(2.0, 30.0), vector(3.0, 20.0), vector(4.0, 0.5))]
    assert torch.autograd.gradcheck(ncx2_log_cdf, arguments, atol=1e-6)
    assert torch.autograd.gradcheck(ncx2_log_prob, arguments, atol=1e-6)
    (slope,) = torch.autograd.grad(ncx2_log_cdf(*arguments)[0], arguments[0])
    density = (ncx2_log_prob(*arguments) - ncx2_log_cdf(*arguments)).exp()
    assert slope[0].item() == pytest.approx(density[0].item(), rel=1e-10)


def test_one_dimension_of_freedom_is_two_normal_tails():
    for eps, shift, sd in ((1e-4, 2.0, 1.0), (0.5, 0.3, 0.2), (1e-6, 3.0, 0.5)):
        q = math.sqrt(eps)
        value = special.ndtr((q - shift) / sd) - special.ndtr(-(q + shift) / sd)
        found, quick = (
            weighted_chi2_log_cdf(eps, vector(sd**2), vector(shift**2), method=method).item()
            for method in ("exact", "saddlepoint")
        )
        assert found == pytest.approx(math.log(value), rel=1e-8)
        assert quick == pytest.approx(found, rel=0.03)


def test_two_moments_have_their_asymptotics():
    df, s, eps = 1000.0, 0.001, 0.1
    exact = -ScaledChi2(df, 0.0, s).log_cdf(eps).item()
    assert exact == pytest.approx(705.2138, abs=1e-4)
    stirling = df / 2 * math.log(df * s / eps) - df / 2 + eps / (2 * s) + math.log(math.sqrt(math.pi * df))
    assert stirling + math.log(1 - eps / (s * df)) == pytest.approx(exact, abs=2e-3)


@given(a=st.floats(0.3, 300), b=st.floats(0.3, 300), x=st.floats(0.001, 0.999))
@settings(max_examples=40, deadline=None)
def test_beta_tails_are_those_of_scipy(a, b, x):
    expected = stats.beta.logcdf(x, a, b)
    if expected > -600:
        assert beta_log_cdf(vector(x), a, b).item() == pytest.approx(expected, rel=1e-7, abs=1e-9)


@given(df=st.floats(1, 1000), nc=st.floats(0.1, 1000), scale=st.floats(1e-4, 10))
@settings(max_examples=30, deadline=None)
def test_matched_cumulants_give_the_law_back(df, nc, scale):
    kappa = [2 ** (k - 1) * math.factorial(k - 1) * scale**k * (df + k * nc) for k in (1, 2, 3)]
    law, name = match_cumulants(*kappa)
    assert name == "cumulants"
    again = [2 ** (k - 1) * math.factorial(k - 1) * law.scale**k * (law.df + k * law.nc) for k in (1, 2, 3)]
    np.testing.assert_allclose(again, kappa, rtol=1e-8)
    assert 0 <= law.nc < 1e6 * df


def test_cumulants_that_no_law_has_leave_two_moments():
    for kappa3 in (1.0, 1e-3):  # too skewed, too little
        law, name = match_cumulants(1.0, 0.1, kappa3)
        assert name == "two moments" and law.nc == 0
        assert (law.mean, law.variance) == pytest.approx((1.0, 0.1))
    assert match_cumulants(1.5, 0.1, floor=0.5)[0].mean == pytest.approx(1.5)


@pytest.mark.parametrize(("df", "nc", "scale"), [(3.0, 10.0, 1.0), (50.0, 0.0, 0.01), (0.5, 2.0, 1.0)])
def test_fits_recover_what_was_drawn(df, nc, scale):
    law = ScaledChi2(df, nc, scale)
    losses = law.sample(100_000, seed=1)
    eps = vector(law.mean / 3)
    for fit in ("mle", "cumulants"):
        found = fit_losses(losses, fit=fit)
        value, sd = found.log_cdf_and_sd(eps)
        assert found.law.mean == pytest.approx(law.mean, rel=0.02)
        assert abs(value - law.log_cdf(eps)) <= 4.5 * sd + (1e-3 if fit == "cumulants" else 0)


@pytest.mark.parametrize(("df", "nc", "size"), [(20.0, 30.0, 500), (3.0, 10.0, 60), (50.0, 0.0, 300)])
def test_no_law_is_likelier_than_the_fitted_one_of_scipy_or_the_truth(df, nc, size):
    law = ScaledChi2(df, nc, 0.3)
    losses = law.sample(size, seed=3)
    found = fit_losses(losses)
    assert found.fit == "mle"
    likelihood = found.law.log_prob(losses).mean()
    assert likelihood >= law.log_prob(losses).mean()
    peer = stats.ncx2.fit(losses.numpy(), floc=0)
    assert likelihood >= stats.ncx2.logpdf(losses.numpy(), *peer).mean() - 1e-5
    central = fit_losses(losses, tail="chi2").law
    gamma = stats.gamma.fit(losses.numpy(), floc=0)
    assert (central.df / 2, central.scale * 2) == pytest.approx((gamma[0], gamma[2]), rel=1e-4)


def test_deltas_are_the_spread_of_repeated_estimates():
    law, eps = ScaledChi2(40.0, 0.0, 0.02), 0.35
    found = [inductive_bias(law.sample(400, seed=k), eps, tail="chi2", fit="cumulants") for k in range(150)]
    values, sds = torch.stack([f.value for f in found]), torch.stack([f.sd for f in found])
    assert values.std().item() == pytest.approx(sds.mean().item(), rel=0.2)
    truth = -law.log_cdf(eps)
    inside = [(f.low <= truth) & (truth <= f.high) for f in found]
    assert 0.88 <= torch.stack(inside).double().mean() <= 0.99
    bootstrap = inductive_bias(law.sample(400, seed=0), eps, tail="chi2", fit="cumulants", interval="bootstrap")
    assert bootstrap.sd.item() == pytest.approx(found[0].sd.item(), rel=0.25)


def test_counts_are_counts_with_clopper_and_pearsons_interval():
    losses = torch.linspace(0.01, 1, 100, dtype=torch.float64)
    found = inductive_bias(losses, vector(0.055, 0.001), tail="empirical", base="bits")
    assert found.value[0].item() == pytest.approx(-math.log2(0.05))
    assert found.value[1] == math.inf and found.high[1] == math.inf and 4 < found.low[1] < 6
    interval = stats.binomtest(5, 100).proportion_ci()
    assert (found.low[0].item(), found.high[0].item()) == pytest.approx(
        (-math.log2(interval.high), -math.log2(interval.low)), rel=1e-6
    )


def test_the_default_is_the_smallest_loss_at_about_log_n():
    losses = ScaledChi2(100.0, 0.0, 0.01).sample(1000)
    found = inductive_bias(losses)
    assert found.eps == losses.min() and found.n == 1000
    assert 0.5 < found.extrapolation < 2 and found.extrapolation.item() == pytest.approx(found.value / math.log(1000))
    assert inductive_bias(losses, base="bits").value.item() == pytest.approx(found.value / math.log(2))
    assert found.plot().to_dict()["layer"]


def test_a_floor_shifts_the_losses():
    losses = ScaledChi2(30.0, 5.0, 0.01).sample(500)
    plain, shifted = inductive_bias(losses, 0.15), inductive_bias(losses + 2, 2.15, floor=2.0)
    assert plain.value.item() == pytest.approx(shifted.value.item(), rel=1e-6)
    assert shifted.law.mean == pytest.approx(plain.law.mean + 2)
    assert inductive_bias(losses + 2, 1.9, floor=2.0).value == math.inf


def test_far_tails_warn():
    with pytest.warns(UserWarning, match="extrapolated far"):
        inductive_bias(ScaledChi2(400.0, 0.0, 0.01).sample(100), 0.5)


def test_differences_add_their_errors_and_know_what_cannot_be_compared():
    losses = ScaledChi2(40.0, 0.0, 0.02).sample(400)
    broad, narrow = inductive_bias(losses, 0.5), inductive_bias(losses / 1.3, 0.5)
    found = relative_bias(broad, narrow)
    assert found.value == broad.value - narrow.value > 0
    assert found.sd.item() == pytest.approx(math.hypot(broad.sd, narrow.sd))
    assert found.low < found.value < found.high
    for other, words in (
        (inductive_bias(losses, 0.4), "same eps"),
        (inductive_bias(losses, 0.5, base="bits"), "same base"),
    ):
        with pytest.raises(ValueError, match=words):
            relative_bias(broad, other)
    x, y = torch.ones(3, 2), torch.zeros(3)
    tasks = [
        Task.of("mse", 5, x, y),
        Task.of("mse", 9, x.double(), y),
        Task.of("0-1", 5, x, y),
        Task.of("mse", 5, 2 * x, y),
    ]
    of = [with_task(broad, task, None) for task in tasks]
    relative_bias(of[0], of[1])
    for other, words in ((of[2], "same loss"), (of[3], "same test")):
        with pytest.raises(ValueError, match=words):
            relative_bias(of[0], other)


GOOD = torch.linspace(0.1, 1, 50, dtype=torch.float64)


@pytest.mark.parametrize(
    ("losses", "options", "words"),
    [
        (GOOD, {"eps": 0.0}, "eps must be positive.*got 0"),
        (GOOD, {"eps": vector(0.5, -1.0)}, "eps must be positive.*got -1"),
        (GOOD[:19], {}, r"at least 20, got shape \(19,\)"),
        (-GOOD, {}, "not negative"),
        (torch.cat([GOOD, vector(math.nan)]), {}, "finite"),
        (torch.full((30,), 0.3), {}, "must differ.*30 times 0.3"),
        (GOOD.half(), {}, "float32 or float64, got torch.float16"),
        (GOOD, {"tail": "normal"}, "tail must be .* got 'normal'"),
        (GOOD, {"fit": "moments"}, "fit must be .* got 'moments'"),
        (GOOD, {"base": "dits"}, "base must be .* got 'dits'"),
        (GOOD, {"interval": "exact"}, "interval must be .* got 'exact'"),
        (GOOD, {"ci": 1.5}, "ci must lie .* got 1.5"),
        (GOOD, {"floor": 0.2}, "above the floor 0.2, got 0.1"),
        (GOOD * 2, {"tail": "beta"}, "shares in 0 to 1"),
    ],
)
def test_bad_losses_are_told(losses, options, words, shape_checks_off):
    with pytest.raises(ValueError, match=words):
        inductive_bias(losses, **options)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ncx2_log_cdf(1.0, 0.0, 1.0), "df must be positive and finite, got 0"),
        (lambda: ncx2_log_prob(1.0, 2.0, -1.0), "nc must be 0 or more and finite, got -1"),
        (lambda: weighted_chi2_log_cdf(1.0, vector(-1.0), vector(0.0)), "weights must be 0 or more"),
        (lambda: weighted_chi2_log_cdf(1.0, vector(0.0), vector(1.0)), "must have a positive one"),
        (lambda: weighted_chi2_log_cdf(1.0, vector(1.0), vector(1.0), method="imhof"), "method must be .* got 'imhof'"),
        (lambda: match_cumulants(0.0, 1.0), "kappa1 must be above the floor"),
        (lambda: fit_losses(GOOD, tail="empirical"), "tail must be .* got 'empirical'"),
    ],
)
def test_bad_laws_are_told(call, words, shape_checks_off):
    with pytest.raises(ValueError, match=words):
        call()

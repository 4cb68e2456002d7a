"""Kernel alignment against Gram matrices written out, and estimates known in expectation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lathe.core.matching import linear_cka


def gaussian(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def alignment_by_hsic(x, y):
    """Three traces with the centring matrix."""
    n = len(x)
    centre = np.eye(n) - np.ones((n, n)) / n
    k, l = (centre @ (z @ z.T) @ centre for z in (x.numpy(), y.numpy()))
    return np.trace(k @ l) / np.sqrt(np.trace(k @ k) * np.trace(l @ l))


def unbiased_hsic(x, y):
    """HSIC_1 of Song et al. 2012, equation 5, up to its constant factor."""
    n = len(x)
    k, l = ((z @ z.T).numpy().copy() for z in (x, y))
    np.fill_diagonal(k, 0)
    np.fill_diagonal(l, 0)
    one = np.ones(n)
    return np.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l @ one)


@pytest.mark.parametrize(("p", "q"), [(3, 7), (30, 4), (25, 40)])
def test_alignment_by_brute_force_for_few_and_for_many_units(rng, p, q):
    x = gaussian(rng, 20, p) + 3
    y = x[:, :3] @ gaussian(rng, 3, q) + gaussian(rng, 20, q)
    assert float(linear_cka(x, y)) == pytest.approx(alignment_by_hsic(x, y), abs=1e-12)
    wanted = unbiased_hsic(x, y) / np.sqrt(unbiased_hsic(x, x) * unbiased_hsic(y, y))
    assert float(linear_cka(x, y, unbiased=True)) == pytest.approx(wanted, abs=1e-10)


@pytest.mark.parametrize("unbiased", [False, True])
def test_rotation_scale_and_shift_leave_full_alignment(rng, unbiased):
    x = gaussian(rng, 50, 8)
    turned = 0.3 * x @ torch.linalg.qr(gaussian(rng, 8, 8)).Q + gaussian(rng, 8)
    assert float(linear_cka(x, turned, unbiased=unbiased)) == pytest.approx(1, abs=1e-10)


def test_independent_units_have_no_alignment_once_unbiased(rng):
    draws = [(gaussian(rng, 30, 40), gaussian(rng, 30, 40)) for _ in range(60)]
    unbiased = [float(linear_cka(x, y, unbiased=True)) for x, y in draws]
    assert abs(np.mean(unbiased)) < 4 * np.std(unbiased) / len(draws) ** 0.5
    assert np.mean([float(linear_cka(x, y)) for x, y in draws]) > 0.5


def test_what_cannot_be_aligned_is_refused(rng):
    with pytest.raises(ValueError, match="same samples, at least 2, got 3 and 4"):
        linear_cka(torch.ones(3, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match="at least 4, got 3"):
        linear_cka(gaussian(rng, 3, 2), gaussian(rng, 3, 2), unbiased=True)
    with pytest.raises(ValueError, match="vary"):
        linear_cka(torch.ones(3, 2), gaussian(rng, 3, 2))

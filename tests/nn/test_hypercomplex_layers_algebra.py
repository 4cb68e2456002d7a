"""Kronecker sums by torch.kron and Van Loan's rearrangement; algebras by Cayley-Dickson doubling and identities."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lathe.nn.hypercomplex_layers import (
    algebra_span_angles,
    algebra_tensor,
    kronecker_singular_values,
    kronecker_sum,
    nearest_kronecker_sum,
)


def draw(rng, *shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=rng)


def kron_at_each_position(A, F):
    """sum_i torch.kron(A[i], F[i, :, :, position]), a position of the kernel at a time."""
    kernel = F.shape[3:]
    H = torch.empty(A.shape[1] * F.shape[1], A.shape[2] * F.shape[2], *kernel, dtype=F.dtype)
    for position in itertools.product(*map(range, kernel)):
        H[(slice(None), slice(None), *position)] = sum(
            torch.kron(A[i].contiguous(), F[(i, slice(None), slice(None), *position)].contiguous())
            for i in range(len(A))
        )
    return H


def doubled(x, y):
    """The Cayley-Dickson product (a, b)(c, d) = (a c - d* b, d a + b c*), down to real numbers."""
    if len(x) == 1:
        return x * y

    def conjugate(z):
        return torch.cat([z[:1], -z[1:]])

    half = len(x) // 2
    a, b, c, d = x[:half], x[half:], y[:half], y[half:]
    return torch.cat([doubled(a, c) - doubled(conjugate(d), b), doubled(d, a) + doubled(b, conjugate(c))])


def product(A, x, y):
    return torch.einsum("iab,i,b->a", A, x, y)


@settings(max_examples=40, deadline=None)
@given(
    terms=st.integers(1, 5),
    blocks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    filters=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    kernel=st.lists(st.integers(1, 3), max_size=3),
    seed=st.integers(0, 1000),
)
def test_kronecker_sum_is_torch_kron_at_each_position_of_the_kernel(terms, blocks, filters, kernel, seed):
    generator = torch.Generator().manual_seed(seed)
    A, F = draw(generator, terms, *blocks), draw(generator, terms, *filters, *kernel)
    torch.testing.assert_close(kronecker_sum(A, F), kron_at_each_position(A, F), atol=1e-12, rtol=1e-12)


def test_kronecker_sum_agrees_with_kron_of_four_dimensional_tensors(rng):
    A, F = draw(rng, 3, 3, 3), draw(rng, 3, 2, 4, 3, 3)
    expected = sum(torch.kron(a[:, :, None, None], f) for a, f in zip(A, F))
    torch.testing.assert_close(kronecker_sum(A, F), expected, atol=1e-12, rtol=1e-12)


def test_gradients_of_the_factors_are_contractions_with_the_blocks_of_the_weight_gradient(rng):
    n, p, q, k = 3, 2, 4, 5
    A, F = draw(rng, n, n, n).requires_grad_(), draw(rng, n, p, q, k).requires_grad_()
    G = draw(rng, n * p, n * q, k)
    kronecker_sum(A, F).backward(G)
    for i, a, b in itertools.product(range(n), repeat=3):
        block = G[a * p : (a + 1) * p, b * q : (b + 1) * q]
        assert A.grad[i, a, b] == pytest.approx(float((block * F[i]).sum().detach()), abs=1e-12)
    for i in range(n):
        blocks = (
            A[i, a, b] * G[a * p : (a + 1) * p, b * q : (b + 1) * q]
            for a, b in itertools.product(range(n), repeat=2)
        )  # fmt: skip
        torch.testing.assert_close(F.grad[i], sum(blocks).detach(), atol=1e-12, rtol=1e-12)


def test_first_and_second_derivatives_are_right(rng):
    A, F = draw(rng, 2, 2, 2).requires_grad_(), draw(rng, 2, 2, 1, 2).requires_grad_()
    assert torch.autograd.gradcheck(kronecker_sum, (A, F), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(kronecker_sum, (A, F))


def test_backward_keeps_the_factors_and_no_product():
    A, F = torch.randn(4, 4, 4, requires_grad=True), torch.randn(4, 16, 16, 3, 3, requires_grad=True)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kronecker_sum(A, F)
    assert sum(kept.values()) <= 4 * (A.numel() + F.numel())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_factors_are_multiplied_in_float32_and_rounded_once(dtype, rng):
    A, F = draw(rng, 4, 4, 4).to(dtype), draw(rng, 4, 5, 3, 3).to(dtype)
    expected = kron_at_each_position(A.double(), F.double())
    torch.testing.assert_close(kronecker_sum(A, F), expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_invertible_mixing_of_the_terms_leaves_the_weight_as_it_is(rng):
    A, F, M = draw(rng, 4, 4, 4), draw(rng, 4, 3, 2, 3), draw(rng, 4, 4)
    mixed = kronecker_sum(
        torch.einsum("ij,jab->iab", M, A), torch.einsum("ij,jpqk->ipqk", torch.linalg.inv(M).T, F)
    )  # fmt: skip
    torch.testing.assert_close(mixed, kronecker_sum(A, F), atol=1e-10, rtol=1e-10)


def test_a_sum_of_n_products_has_rank_n_after_rearrangement(rng):
    weight = kronecker_sum(draw(rng, 3, 3, 3), draw(rng, 3, 4, 5, 2))
    values = kronecker_singular_values(weight, 3)
    assert values[3] < 1e-12 * values[0] < values[2]


@pytest.mark.parametrize("terms", [1, 2, 4, 7, 16])
def test_error_of_the_nearest_sum_is_the_tail_of_the_singular_values(terms, rng):
    weight, n = draw(rng, 8, 12, 3), 4
    rearranged = torch.stack([
        weight[2 * a : 2 * a + 2, 3 * b : 3 * b + 3].flatten() for a in range(n) for b in range(n)
    ])  # fmt: skip
    tail = np.linalg.svd(rearranged.numpy(), compute_uv=False)[terms:]
    fit = nearest_kronecker_sum(weight, n, terms)
    missing = torch.linalg.vector_norm(weight - kron_at_each_position(fit.A, fit.F))
    assert float(missing) == pytest.approx(float(np.sqrt(np.sum(tail**2))), abs=1e-9)
    assert fit.relative_error == pytest.approx(float(missing / weight.norm()), abs=1e-9)


def test_no_descent_on_the_factors_beats_the_nearest_sum(rng):
    weight = draw(rng, 4, 6)
    fit = nearest_kronecker_sum(weight, 2)
    A, F = fit.A.clone().requires_grad_(), fit.F.clone().requires_grad_()
    loss = (weight - kronecker_sum(A, F)).square().sum()
    assert all(g.abs().max() < 1e-10 for g in torch.autograd.grad(loss, (A, F)))
    for _ in range(50):
        other = kronecker_sum(A + 0.1 * draw(rng, *A.shape), F + 0.1 * draw(rng, *F.shape))
        assert (weight - other).square().sum() > loss


def test_fit_within_a_given_algebra_is_the_least_squares_projection(rng):
    algebra = algebra_tensor("quaternion", dtype=torch.float64)
    F = draw(rng, 4, 2, 3)
    recovered = nearest_kronecker_sum(kronecker_sum(algebra, F), 4, algebra=algebra)
    torch.testing.assert_close(recovered.F, F, atol=1e-12, rtol=1e-12)
    weight = draw(rng, 8, 12)
    fit = nearest_kronecker_sum(weight, 4, algebra=algebra)
    columns = torch.stack([kronecker_sum(algebra, e.view_as(F)).flatten() for e in torch.eye(24).double()], 1)
    coefficients = np.linalg.lstsq(columns.numpy(), weight.flatten().numpy(), rcond=None)[0]
    np.testing.assert_allclose(fit.F.flatten(), coefficients, atol=1e-12)


def test_a_weight_of_zeros_is_fitted_without_error():
    fit = nearest_kronecker_sum(torch.zeros(4, 4), 2)
    assert fit.relative_error == 0.0
    assert not kronecker_sum(fit.A, fit.F).any()


@pytest.mark.parametrize(
    ("name", "n"), [("real", 1), ("complex", 2), ("quaternion", 4), ("hamilton", 4), ("octonion", 8)]
)
def test_division_algebras_are_those_of_cayley_and_dickson(name, n, rng):
    A = algebra_tensor(name, dtype=torch.float64)
    assert A.shape == (n, n, n)
    x, y = draw(rng, n), draw(rng, n)
    torch.testing.assert_close(product(A, x, y), doubled(x, y), atol=1e-12, rtol=1e-12)
    assert float(product(A, x, y).norm()) == pytest.approx(float(x.norm() * y.norm()), abs=1e-12)


def test_hamilton_matrices_are_those_of_left_multiplication():
    R, I, J, K = 2.0, 3.0, 5.0, 7.0
    expected = [[R, -I, -J, -K], [I, R, -K, J], [J, K, R, -I], [K, -J, I, R]]
    weight = kronecker_sum(algebra_tensor("quaternion"), torch.tensor([R, I, J, K]).view(4, 1, 1))
    assert weight.tolist() == expected


def test_octonions_are_alternative_but_not_associative(rng):
    A = algebra_tensor("octonion", dtype=torch.float64)
    x, y, z = (draw(rng, 8) for _ in range(3))

    def times(u, v):
        return product(A, u, v)

    torch.testing.assert_close(times(x, times(x, y)), times(times(x, x), y), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(times(times(y, x), x), times(y, times(x, x)), atol=1e-12, rtol=1e-12)
    assert (times(x, times(y, z)) - times(times(x, y), z)).norm() > 0.1


@pytest.mark.parametrize(("p", "q"), [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2), (3, 0), (1, 2), (0, 3), (2, 2)])
def test_clifford_generators_anticommute_and_square_to_their_signature(p, q, rng):
    A = algebra_tensor(f"clifford({p},{q})", dtype=torch.float64)
    size = 2 ** (p + q)
    basis = torch.eye(size, dtype=torch.float64)
    generators = [basis[2**g] for g in range(p + q)]
    for g, h in itertools.product(range(p + q), repeat=2):
        anticommutator = product(A, generators[g], generators[h]) + product(A, generators[h], generators[g])
        expected = (2.0 if g < p else -2.0) * basis[0] if g == h else torch.zeros(size, dtype=torch.float64)
        assert torch.equal(anticommutator, expected)
    x, y, z = (draw(rng, size) for _ in range(3))
    associated = product(A, x, product(A, y, z)) - product(A, product(A, x, y), z)
    assert associated.abs().max() < 1e-12
    assert torch.equal(A[0], basis)


def test_small_clifford_algebras_are_the_complex_numbers_and_the_quaternions():
    assert torch.equal(algebra_tensor("clifford(0,1)"), algebra_tensor("complex"))
    assert torch.equal(algebra_tensor("clifford(0,2)"), algebra_tensor("quaternion"))


def test_span_angles_are_those_of_scipy(rng):
    A, B = draw(rng, 4, 4, 4), draw(rng, 3, 4, 4)
    expected = scipy.linalg.subspace_angles(A.flatten(1).T.numpy(), B.flatten(1).T.numpy())[::-1]
    np.testing.assert_allclose(algebra_span_angles(A, B), expected, atol=1e-12)


def test_span_angles_vanish_under_mixing_and_see_small_rotations(rng):
    A = draw(rng, 4, 4, 4)
    mixed = torch.einsum("ij,jab->iab", draw(rng, 4, 4), A)
    assert algebra_span_angles(A, mixed).max() < 1e-12
    E = torch.zeros(2, 2, 2, dtype=torch.float64)
    E[0, 0, 0] = E[1, 0, 1] = 1.0
    turned = E.clone()
    turned[1, 1, 0] = 1e-9
    assert float(algebra_span_angles(E, turned)[-1]) == pytest.approx(1e-9, rel=1e-6)
    with pytest.raises(ValueError, match="span nothing"):
        algebra_span_angles(E, torch.zeros(2, 2, 2, dtype=torch.float64))


def test_what_does_not_fit_is_refused_with_its_numbers(rng):
    with pytest.raises(ValueError, match=r"n = 4 must divide.*\(6, 8\)"):
        nearest_kronecker_sum(torch.randn(6, 8), 4)
    with pytest.raises(ValueError, match=r"terms must lie in 1 to n\*\*2 = 4, got 5"):
        nearest_kronecker_sum(torch.randn(4, 4), 2, 5)
    with pytest.raises(ValueError, match="algebra must be"):
        nearest_kronecker_sum(torch.randn(4, 4), 2, algebra=torch.ones(3, 3, 3))
    with pytest.raises(ValueError, match="'sedenion'"):
        algebra_tensor("sedenion")
    with pytest.raises((ValueError, TypeError), match="terms"):
        kronecker_sum(torch.randn(2, 2, 2), torch.randn(3, 2, 2))
    with pytest.raises((ValueError, TypeError), match=r"one size|n=2"):
        algebra_span_angles(torch.randn(2, 2, 2), torch.randn(2, 3, 3))

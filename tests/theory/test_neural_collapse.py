"""The closed forms: against brute force, rebuilt factors and their gradients, known numbers, L-BFGS and identities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lathe.theory.neural_collapse import (
    collapse_threshold,
    cross_entropy_etf,
    general_orthogonal_frame,
    gof,
    max_weight_decay,
    orthogonal_frame,
    simplex_etf,
    ufm_optimum,
)

COUNTS = [20, 10, 5, 2]
PROBLEMS = [
    ([0.002], 0.002, False),
    ([0.003, 0.006], 0.004, False),
    ([0.004, 0.002, 0.008], 0.005, False),
    ([0.002], 0.003, True),
    ([0.004, 0.006], 0.005, True),
]


def one_hot(counts):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return F.one_hot(labels).double().mT


def squared_loss(weights, H, b, Y, weight_decays, feature_decay):
    Z = H
    for weight in weights:
        Z = weight @ Z
    penalty = sum(decay / 2 * weight.square().sum() for decay, weight in zip(weight_decays, weights))
    return (Z + b[:, None] - Y).square().sum() / (2 * Y.shape[1]) + penalty + feature_decay / 2 * H.square().sum()


@pytest.mark.parametrize("depth", [1, 2, 3, 6])
def test_each_class_has_the_best_length_of_a_fine_grid(depth):
    counts, decay = [50, 25, 12, 2], 1e-2
    found = gof(counts, decay, decay, depth=depth)
    N = sum(counts)
    b = depth * N * (N * decay ** (depth + 1)) ** (1 / depth)
    loss = 0.0
    for n, w in zip(counts, found.classifier_gram.diagonal().tolist()):
        low, high = 0.0, (n / b) ** (1 / (depth + 1)) * depth ** (1 / (depth + 1)) + 1
        for _ in range(3):  # the first grid tells the valley, the others the digits
            x = np.linspace(low, high, 200_001)
            values = n / (x**depth + 1) + b * x
            best = x[values.argmin()]
            step = x[1] - x[0]
            low, high = max(0.0, best - step), best + step
        assert (w / (N * decay)) ** (1 / depth) == pytest.approx(best, abs=1e-5)
        loss += values.min() / (2 * N)
    assert found.loss == pytest.approx(loss, abs=1e-10)
    assert found.collapsed.tolist() == [False, False, False, depth > 1]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_singular_values_are_shrunk_as_the_schatten_norm_shrinks_them(depth, bias):
    Y, decay = one_hot(COUNTS), 4e-3
    N = Y.shape[1]
    y = np.linalg.svd((Y - Y.mean(1, keepdim=True) if bias else Y).numpy(), compute_uv=False)
    o = np.linspace(0, 1.01 * y.max(), 400_001)
    penalty = (depth + 1) / 2 * decay * o ** (2 / (depth + 1))  # (decay^(M+1))^(1/(M+1)) is the decay
    loss = sum(((o - each) ** 2 / (2 * N) + penalty).min() for each in y)
    assert gof(COUNTS, decay, decay, depth=depth, bias=bias).loss == pytest.approx(loss, abs=1e-9)
    assert ufm_optimum(Y, decay, decay, depth=depth, bias=bias).loss == pytest.approx(loss, abs=1e-9)


def test_numbers_known_from_long_optimisation():
    for depth, diagonal, loss in (
        (1, [13.942135624, 9.8, 6.871067812, 6.871067812], 0.018942135624),
        (3, [52.88267550, 31.32229822, 18.50220621, 18.50220621], 0.012218400372),
    ):
        found = gof([200, 100, 50, 50], 5e-4, 5e-4, depth=depth)
        np.testing.assert_allclose(found.classifier_gram, np.diag(diagonal), atol=1e-8)
        assert found.loss == pytest.approx(loss, abs=1e-12)
    for counts, decay, depth, loss in (
        ([10] * 4, 2e-3, 1, 0.0187336659618),
        (COUNTS, 2e-3, 1, 0.0154048372363),
        (COUNTS, 5e-3, 2, 0.0412269820222),
    ):
        assert gof(counts, decay, decay, depth=depth, bias=True).loss == pytest.approx(loss, abs=1e-10)  # of a grid
    narrow = gof(COUNTS, 1e-3, 1e-3, width=2).classifier_gram
    np.testing.assert_allclose(narrow, np.diag([4.435136, 3.125278, 0, 0]), atol=1e-6)


@pytest.mark.parametrize(("weight_decays", "feature_decay", "bias"), PROBLEMS)
def test_rebuilt_factors_have_the_predicted_loss_no_gradient_and_are_balanced(weight_decays, feature_decay, bias):
    Y = one_hot(COUNTS)
    found = ufm_optimum(Y, weight_decays, feature_decay, bias=bias, width=7)
    weights = [weight.requires_grad_() for weight in found.weights]
    H = found.features.requires_grad_()
    b = (found.bias if bias else Y.new_zeros(4)).clone().requires_grad_(bias)
    loss = squared_loss(weights, H, b, Y, weight_decays, feature_decay)
    assert loss.item() == pytest.approx(found.loss, abs=1e-12)
    gradients = torch.autograd.grad(loss, [*weights, H, *([b] if bias else [])])
    assert max(gradient.norm().item() for gradient in gradients) < 1e-10
    factors, decays = [H, *weights], [feature_decay, *weight_decays]
    for below, above, low, high in zip(factors, factors[1:], decays, decays[1:]):
        torch.testing.assert_close(high * above.mT @ above, low * below @ below.mT, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("weight_decays", "feature_decay", "bias"), PROBLEMS)
def test_the_geometry_of_classes_is_that_of_the_factors(weight_decays, feature_decay, bias):
    counts = torch.tensor(COUNTS)
    Y = one_hot(COUNTS)
    predicted = gof(counts, weight_decays, feature_decay, bias=bias)
    found = ufm_optimum(Y, weight_decays, feature_decay, bias=bias)
    assert predicted.loss == pytest.approx(found.loss, abs=1e-13)
    means = found.features @ Y.mT / counts
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(found.features, means @ Y, **close)  # NC1
    for layer in range(1, len(weight_decays) + 1):
        product = torch.eye(4, dtype=torch.float64)
        for weight in found.weights[: layer - 1 : -1]:
            product = product @ weight
        product = product @ found.weights[layer - 1]
        torch.testing.assert_close(predicted.classifier_gram_from(layer), product @ product.mT, **close)
        torch.testing.assert_close(predicted.feature_gram_at(layer), means.mT @ means, **close)
        torch.testing.assert_close(predicted.dual_at(layer) @ means.mT, product, **close)  # NC3
        torch.testing.assert_close(predicted.output, product @ means, **close)
        if layer == 1:
            torch.testing.assert_close(predicted.classifier_norms, product.norm(dim=1), **close)
            torch.testing.assert_close(predicted.feature_norms, means.norm(dim=0), **close)
            W_1 = torch.linalg.svdvals(found.weights[0])[: len(predicted.load)]
            torch.testing.assert_close(predicted.singular_values.sort(descending=True).values, W_1, **close)
        means = found.weights[layer - 1] @ means
    if bias:
        torch.testing.assert_close(predicted.bias, found.bias, **close)
        torch.testing.assert_close(predicted.bias, counts / counts.sum().double(), **close)


def test_one_layer_is_nuclear_norm_regression(rng):
    Y = torch.randn(5, 9, dtype=torch.float64, generator=rng)
    U, y, V = np.linalg.svd(Y.numpy(), full_matrices=False)
    soft = (U * np.maximum(y - 9 * math.sqrt(0.04 * 0.09), 0)) @ V
    np.testing.assert_allclose(ufm_optimum(Y, [0.04], 0.09).outputs, soft, atol=1e-12)


def test_regression_targets_with_a_bias_are_at_a_stationary_point(rng):
    Y = torch.randn(3, 8, dtype=torch.float64, generator=rng) + 2
    found = ufm_optimum(Y, 0.01, 0.02, depth=2, bias=True, width=[5, 4])
    assert [tuple(weight.shape) for weight in found.weights] == [(4, 5), (3, 4)]
    parts = [part.requires_grad_() for part in (*found.weights, found.features, found.bias)]
    gradients = torch.autograd.grad(squared_loss(parts[:2], parts[2], parts[3], Y, [0.01] * 2, 0.02), parts)
    assert max(gradient.norm().item() for gradient in gradients) < 1e-10


def test_random_starts_end_at_the_minimum_and_never_below(rng):
    counts, decays, feature_decay = [6, 3, 2], [0.01, 0.02], 0.015
    Y, predicted = one_hot(counts), gof(counts, decays, feature_decay)
    losses = []
    for _ in range(4):
        shapes = [(4, 4), (3, 4), (4, 11)]
        parts = [(0.4 * torch.randn(*s, dtype=torch.float64, generator=rng)).requires_grad_() for s in shapes]
        descent = torch.optim.LBFGS(parts, max_iter=400, line_search_fn="strong_wolfe", tolerance_change=0)

        def closure(parts=parts, descent=descent):
            descent.zero_grad()
            loss = squared_loss(parts[:2], parts[2], Y.new_zeros(3), Y, decays, feature_decay)
            loss.backward()
            return loss

        descent.step(closure)
        losses.append(closure().item())
    assert min(losses) == pytest.approx(predicted.loss, abs=1e-8)
    assert min(losses) > predicted.loss - 1e-12


@pytest.mark.parametrize("depth", range(1, 8))
def test_the_threshold_is_where_both_minima_are_equal(depth):
    def gain(load):  # of the best x > 0 over x = 0, on a grid
        x = np.geomspace(1e-4, 1e3, 200_001)
        return 1 - (1 / (x**depth + 1) + load * x).min()

    threshold = collapse_threshold(depth)
    assert gain(0.999 * threshold) > 0 > gain(1.001 * threshold)


@pytest.mark.parametrize("feature_decay", [None, 0.004])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_a_class_survives_up_to_its_largest_decay(depth, feature_decay):
    for k, decay in enumerate(max_weight_decay(COUNTS, depth, feature_decay=feature_decay).tolist()):
        for factor, collapsed in ((0.999, False), (1.001, True)):
            used = factor * decay
            found = gof(COUNTS, used, used if feature_decay is None else feature_decay, depth=depth)
            assert bool(found.collapsed[k]) is collapsed


def test_collapse_is_a_jump_for_deep_heads_and_continuous_for_shallow_ones():
    for depth, jump in ((1, 0.0), (2, 1.0), (3, 2 ** (1 / 3))):
        decay = max_weight_decay([4, 4], depth)[0].item() * (1 - 1e-9)
        w = gof([4, 4], decay, decay, depth=depth).classifier_gram[0, 0].item()
        assert (w / (8 * decay)) ** (1 / depth) == pytest.approx(jump, abs=1e-4)


def test_equal_classes_form_an_orthogonal_frame_and_with_a_bias_a_simplex():
    K = 5
    plain, biased = (gof([7] * K, 1e-3, 2e-3, depth=2, bias=bias) for bias in (False, True))
    for found, frame in ((plain, torch.eye(K).double()), (biased, torch.eye(K).double() - 1 / K)):
        for matrix in (found.classifier_gram, found.feature_gram, found.output, found.classifier_gram_from(2)):
            torch.testing.assert_close(matrix / matrix.norm(), frame / frame.norm(), rtol=0, atol=1e-12)
    torch.testing.assert_close(biased.bias, torch.full((K,), 1 / K, dtype=torch.float64))
    assert (plain.rank, biased.rank) == (K, K - 1)
    assert gof([7] * K, 1e-3, 2e-3, width=3, bias=True).rank == gof([7] * K, 1e-3, 2e-3, width=3).rank == 3


def test_larger_classes_have_relatively_longer_classifiers():
    found = gof(COUNTS, 0.002, 0.003)
    ratio = (found.classifier_norms / found.feature_norms).square()
    torch.testing.assert_close(ratio, torch.tensor(COUNTS) * 0.003 / 0.002, check_dtype=False)


@given(
    counts=st.lists(st.integers(1, 500), min_size=2, max_size=6),
    decays=st.lists(st.floats(1e-6, 0.1), min_size=1, max_size=4),
    feature_decay=st.floats(1e-6, 0.1),
    bias=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_the_optimum_is_stationary_and_does_not_depend_on_the_order_of_classes(counts, decays, feature_decay, bias):
    found = gof(counts, decays, feature_decay, bias=bias)
    assert math.isfinite(found.loss) and 0 < found.loss <= 0.5 + 1e-12
    g = found.strength[~found.collapsed]
    o = (g ** (len(decays) + 1) / (feature_decay * math.prod(decays))).sqrt()
    fit = torch.linalg.svdvals(found.output * torch.tensor(counts).sqrt()[None])[: len(o)]
    torch.testing.assert_close(fit, o.sort(descending=True).values, rtol=1e-7, atol=1e-9)
    # d/do of (o - y)^2 / (2N) + (M+1)/2 p o^(2/(M+1)) at each singular value that survived
    N, M = sum(counts), len(decays)
    y = (M * N * (N * feature_decay * math.prod(decays)) ** (1 / M) / found.load[~found.collapsed]).sqrt()
    torch.testing.assert_close((y - o) * o / N, g, rtol=1e-7, atol=1e-12)
    turned = gof(counts[::-1], decays, feature_decay, bias=bias)
    torch.testing.assert_close(turned.classifier_gram.flip(0, 1), found.classifier_gram, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("K", "M"), [(4, 1), (4, 3), (10, 2), (10, 3), (20, 3)])
def test_the_simplex_under_cross_entropy_is_stationary_with_the_predicted_loss(K, M):
    n, decay = 10, 1e-3
    gap, loss = cross_entropy_etf(K, n, decay, decay, depth=M)
    known = {(4, 3): 0.030852, (10, 2): 0.114362, (10, 3): 0.092544, (20, 3): 0.195329}
    assert loss == pytest.approx(known.get((K, M), loss), abs=1e-6)
    # Balanced factors of the logits gap (I - 11^T / K), every class n times.
    Z = gap * (torch.eye(K, dtype=torch.float64) - 1 / K).repeat_interleave(n, 1)
    U, s, V = torch.linalg.svd(Z, full_matrices=False)
    U, V, root = U[:, :-1], V[:-1], s[:-1] ** (1 / (M + 1))
    parts = [torch.diag(root) @ V, *[torch.diag(root)] * (M - 1), U * root]
    parts = [part.detach().clone().requires_grad_() for part in parts]
    logits = parts[0]
    for part in parts[1:]:
        logits = part @ logits
    labels = torch.arange(K).repeat_interleave(n)
    value = F.cross_entropy(logits.mT, labels) + decay / 2 * sum(part.square().sum() for part in parts)
    assert value.item() == pytest.approx(loss, abs=1e-12)
    assert max(g.norm().item() for g in torch.autograd.grad(value, parts)) < 1e-10


def test_the_simplex_under_cross_entropy_vanishes_under_strong_penalties():
    for depth in (1, 3):
        assert cross_entropy_etf(10, 10, 0.5, 0.5, depth=depth) == (0.0, math.log(10))


@given(K=st.integers(2, 9), extra=st.integers(0, 4), drawn=st.booleans())
@settings(max_examples=25, deadline=None)
def test_frames_have_their_angles(K, extra, drawn):
    options = {"generator": torch.Generator().manual_seed(K) if drawn else None, "dtype": torch.float64}
    simplex = simplex_etf(K, K - 1 + extra, **options)
    expected = (torch.eye(K) * K - 1).double() / (K - 1)
    torch.testing.assert_close(simplex @ simplex.mT, expected)
    torch.testing.assert_close(simplex.sum(0), torch.zeros(K - 1 + extra, dtype=torch.float64))
    frame = orthogonal_frame(K, K + extra, **options)
    torch.testing.assert_close(frame @ frame.mT, torch.eye(K, dtype=torch.float64))
    lengths = torch.arange(K, dtype=torch.float64)
    general = general_orthogonal_frame(lengths, K - 1 + extra, **options)
    torch.testing.assert_close(general @ general.mT, torch.diag(lengths**2))
    assert simplex_etf(K, K).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gof([3, 0, 2], 0.1, 0.1), "class 1 has 0"),
        (lambda: gof([3, -1], 0.1, 0.1), "class 1 has -1"),
        (lambda: gof([3], 0.1, 0.1), "at least two classes"),
        (lambda: gof([3, 2], 0.0, 0.1), "weight_decays must be positive, got 0.0"),
        (lambda: gof([3, 2], [0.1, math.inf], 0.1), "weight_decays must be positive"),
        (lambda: gof([3, 2], 0.1, -1.0), "feature_decay must be positive, got -1.0"),
        (lambda: gof([3, 2], [0.1, 0.1], 0.1, depth=3), "got 2 for a depth of 3"),
        (lambda: gof([3, 2], [], 0.1), "one a layer"),
        (lambda: gof([3, 2], 0.1, 0.1, width=0), "width must be at least 1"),
        (lambda: gof([3, 2], 0.1, 0.1).classifier_gram_from(2), "layer must be between 1 and 1, got 2"),
        (lambda: ufm_optimum(torch.full((2, 3), math.nan), 0.1, 0.1), "finite matrix"),
        (lambda: ufm_optimum(torch.eye(3), 0.1, 0.1, width=[3, 3]), "one number or 1"),
        (lambda: collapse_threshold(0), "depth must be a whole number"),
        (lambda: max_weight_decay([5, 0], 2), "class 1 has 0"),
        (lambda: cross_entropy_etf(1, 5, 0.1, 0.1), "K must be at least 2"),
        (lambda: simplex_etf(5, 3), "d >= K - 1"),
        (lambda: orthogonal_frame(5, 4), "1 <= K <= d"),
        (lambda: general_orthogonal_frame([1.0, 2.0], 1), "at least the number of positive lengths, 2"),
        (lambda: general_orthogonal_frame([1.0, -2.0], 3), "numbers >= 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""Exact attention against loops over every tuple, torch's own attention, dense Khatri-Rao products, and identities."""

from __future__ import annotations

import itertools
import math

import jaxtyping
import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from lathe.core.size import measure, saved_bytes
from lathe.nn.tensor_attention import khatri_rao, match2, match3, match3_head, tensor_attention


def draw(order, n=5, m=None, d=3, v=2, batch=(), seed=0, dtype=torch.float64, requires_grad=False):
    """Queries, keys and values of axes of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [n + t for t in range(order - 1)] if m is None else [m] * (order - 1)
    shapes = [(n, d), *((size, d) for size in sizes), *((size, v) for size in sizes)]
    made = [torch.randn(*batch, *shape, generator=generator, dtype=dtype) for shape in shapes]
    made = [each.requires_grad_(requires_grad) for each in made]
    return made[0], made[1:order], made[order:]


def by_loops(q, ks, vs, scale, allowed=lambda i, *js: True, added=lambda i, *js: 0.0):
    """Every tuple of keys by itself, with the maximum taken off; also the logarithm of the normaliser."""
    q, ks, vs = q.detach().numpy(), [k.detach().numpy() for k in ks], [v.detach().numpy() for v in vs]
    out, lse = np.zeros((len(q), vs[0].shape[1])), np.full(len(q), -np.inf)
    for i in range(len(q)):
        logits, values = [], []
        for js in itertools.product(*(range(len(k)) for k in ks)):
            if not allowed(i, *js):
                continue
            key, value = np.ones(q.shape[1]), np.ones(vs[0].shape[1])
            for t, j in enumerate(js):
                key, value = key * ks[t][j], value * vs[t][j]
            logits.append(scale * float(np.sum(q[i] * key)) + added(i, *js))
            values.append(value)
        if logits:
            weights = np.exp(np.array(logits) - max(logits))
            out[i] = weights @ np.array(values) / weights.sum()
            lse[i] = max(logits) + math.log(weights.sum())
    return torch.from_numpy(out), torch.from_numpy(lse)


def dense(q, ks, vs, scale):
    """All logits at once, for gradients by autograd and for larger inputs."""
    K, V = ks[0], vs[0]
    for k, v in zip(ks[1:], vs[1:]):
        K, V = ((a.unsqueeze(-2) * b.unsqueeze(-3)).flatten(-3, -2) for a, b in ((K, k), (V, v)))
    logits = scale * q @ K.mT
    return logits.softmax(-1) @ V, logits.logsumexp(-1)


def gradients(results, inputs, seed=3):
    generator = torch.Generator().manual_seed(seed)
    loss = sum((each * torch.randn(each.shape, generator=generator, dtype=each.dtype)).sum() for each in results)
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_it_is_the_sum_over_every_tuple(order):
    q, ks, vs = draw(order)
    out, lse = tensor_attention(q, ks, vs, return_lse=True)
    expected, expected_lse = by_loops(q, ks, vs, 1 / 3)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-10, atol=1e-12)
    scaled = tensor_attention(q, ks, vs, scale=0.7)
    torch.testing.assert_close(scaled, by_loops(q, ks, vs, 0.7)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("windows", [None, (3, 2, 4)])
def test_causal_and_windowed_attention_see_what_they_should(order, windows):
    q, ks, vs = draw(order, n=5, m=5)
    window = None if windows is None else windows[: order - 1]
    out, lse = tensor_attention(q, ks, vs, is_causal=True, window=window, return_lse=True)

    def allowed(i, *js):
        return all(j <= i and (windows is None or j > i - windows[t]) for t, j in enumerate(js))

    expected, expected_lse = by_loops(q, ks, vs, 1 / 3, allowed)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-10, atol=1e-12)
    if window is not None:  # a window is causal by itself, and one as long as the sequence is all that causal is
        assert torch.equal(tensor_attention(q, ks, vs, window=window), out)
        causal = tensor_attention(q, ks, vs, is_causal=True)
        torch.testing.assert_close(tensor_attention(q, ks, vs, window=99), causal, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 3])
def test_masks_leave_out_or_add_to_any_tuple_and_any_key(window):
    q, ks, vs = draw(3, n=5, m=5)
    generator = torch.Generator().manual_seed(1)
    tuples = torch.rand(5, 5, 5, generator=generator) < 0.6
    first, second = torch.randn(5, 5, generator=generator), torch.rand(5, 5, generator=generator) < 0.7
    padding = torch.tensor([False, True, False, False, True])
    tuples[2] = False

    def near(i, *js):
        return window is None or all(i - window < j <= i for j in js)

    cases = [
        ({"attn_mask": tuples}, lambda i, j, k: bool(tuples[i, j, k]), None),
        ({"attn_mask": tuples[:, :1]}, lambda i, j, k: bool(tuples[i, 0, k]), None),
        ({"attn_mask": tuples[:1, :, :1]}, lambda i, j, k: bool(tuples[0, j, 0]), None),
        ({"attn_mask": first[:, :, None] + first[None]}, None, lambda i, j, k: float(first[i, j] + first[j, k])),
        (
            {"attn_mask": [first, second]},
            lambda i, j, k: bool(second[i, k]),
            lambda i, j, k: float(first[i, j]),
        ),
        ({"attn_mask": [None, second[:1]]}, lambda i, j, k: bool(second[0, k]), None),
        ({"key_padding_mask": padding}, lambda i, j, k: not (padding[j] or padding[k]), None),
        ({"key_padding_mask": [None, padding]}, lambda i, j, k: not padding[k], None),
        (
            {"key_padding_mask": [first[0], padding], "attn_mask": [second, None]},
            lambda i, j, k: bool(second[i, j]) and not padding[k],
            lambda i, j, k: float(first[0, j]),
        ),
    ]
    for masks, allowed, added in cases:
        masks = {name: [m if m is None or m.dtype == torch.bool else m.double() for m in mask] if isinstance(mask, list)
                 else mask if mask.dtype == torch.bool else mask.double() for name, mask in masks.items()}  # fmt: skip
        out, lse = tensor_attention(q, ks, vs, window=window, return_lse=True, **masks)
        expected, expected_lse = by_loops(
            q,
            ks,
            vs,
            1 / 3,
            lambda i, *js, allowed=allowed: near(i, *js) and (allowed is None or allowed(i, *js)),
            added or (lambda *_: 0.0),
        )
        # Numbers added in float32 made these masks, and are exact in float64.
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-10, atol=1e-12)


def test_masks_of_each_problem_and_of_all_reach_their_own_queries():
    q, ks, vs = draw(3, n=4, m=4, batch=(2, 3))
    generator = torch.Generator().manual_seed(1)
    masks = {
        "per head": torch.rand(2, 3, 4, 4, 4, generator=generator) < 0.7,
        "per problem": torch.rand(2, 1, 4, 4, 4, generator=generator) < 0.7,
        "of all": torch.rand(4, 4, 4, generator=generator) < 0.7,
    }
    for mask in masks.values():
        out = tensor_attention(q, ks, vs, attn_mask=mask)
        every = mask.expand(2, 3, 4, 4, 4)
        for b, h in itertools.product(range(2), range(3)):
            expected = by_loops(
                q[b, h],
                [k[b, h] for k in ks],
                [v[b, h] for v in vs],
                1 / 3,
                lambda i, j, k, mask=every[b, h]: bool(mask[i, j, k]),
            )[0]
            torch.testing.assert_close(out[b, h], expected, rtol=1e-10, atol=1e-12)
    padding = torch.rand(2, 1, 4, generator=generator) < 0.4
    out = tensor_attention(q, ks, vs, key_padding_mask=padding)
    equal = tensor_attention(q, ks, vs, attn_mask=[~padding.unsqueeze(-2)] * 2)
    torch.testing.assert_close(out, equal, rtol=1e-12, atol=1e-12)


def test_order_two_is_torchs_own_attention():
    q, ks, vs = draw(2, n=37, m=41, d=8, v=6, batch=(2, 3))
    ours = tensor_attention(q, ks, vs)
    theirs = functional.scaled_dot_product_attention(q, ks[0], vs[0], scale=1 / 8)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    mask = torch.rand(37, 41, generator=torch.Generator().manual_seed(0)) < 0.5
    ours = tensor_attention(q, ks, vs, attn_mask=mask)
    theirs = functional.scaled_dot_product_attention(q, ks[0], vs[0], attn_mask=mask, scale=1 / 8)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 7])
def test_an_axis_of_ones_changes_nothing(rows):
    q, ks, vs = draw(3, n=11, m=9, d=8, v=6)
    ones = [torch.ones(rows, 8).double()], [torch.ones(rows, 6).double()]
    for t in range(2):
        wide = tensor_attention(
            q, ks[:1] + ones[0] if t else ones[0] + ks[:1], vs[:1] + ones[1] if t else ones[1] + vs[:1]
        )
        torch.testing.assert_close(wide, tensor_attention(q, ks[:1], vs[:1]), rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(order=st.integers(2, 4), n=st.integers(1, 7), d=st.integers(1, 4), seed=st.integers(0, 99))
def test_axes_and_rows_may_be_permuted(order, n, d, seed):
    q, ks, vs = draw(order, n=n, d=d, seed=seed)
    out = tensor_attention(q, ks, vs)
    generator = torch.Generator().manual_seed(seed)
    axes = torch.randperm(order - 1, generator=generator).tolist()
    rows = [torch.randperm(k.shape[0], generator=generator) for k in ks]
    queries = torch.randperm(n, generator=generator)
    permuted = tensor_attention(q[queries], [ks[t][rows[t]] for t in axes], [vs[t][rows[t]] for t in axes])
    torch.testing.assert_close(permuted, out[queries], rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 8), scale=st.floats(-30, 30), seed=st.integers(0, 99))
def test_outputs_are_averages_of_values(n, scale, seed):
    q, ks, vs = draw(3, n=n, seed=seed)
    vs[1] = torch.ones_like(vs[1])
    out = tensor_attention(q, ks, vs, scale=scale)
    assert (out >= vs[0].amin(0) - 1e-12).all()
    assert (out <= vs[0].amax(0) + 1e-12).all()
    vs = [torch.randn(v.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for v in vs]
    flat = tensor_attention(torch.zeros_like(q), ks, vs)
    expected = (vs[0].mean(0) * vs[1].mean(0)).expand_as(flat)
    torch.testing.assert_close(flat, expected, rtol=1e-12, atol=1e-12)


def test_it_is_attention_over_attentions():
    q, ks, vs = draw(3, n=6, m=8, d=4, v=3)
    inner = (q[:, None] * ks[0][None]).flatten(0, 1)  # one query for each pair (i, j)
    out, lse = tensor_attention(inner, ks[1:], vs[1:], return_lse=True)
    theirs = functional.scaled_dot_product_attention(inner[None], ks[1][None], vs[1][None], scale=1 / 4)[0]
    torch.testing.assert_close(out, theirs, rtol=1e-12, atol=1e-12)
    weights = lse.view(6, 8).softmax(-1)
    expected = (weights[..., None] * vs[0] * out.view(6, 8, 3)).sum(1)
    torch.testing.assert_close(tensor_attention(q, ks, vs), expected, rtol=1e-10, atol=1e-12)


def test_it_is_attention_on_tensorlys_khatri_rao_products():
    q, ks, vs = draw(4, n=5, d=4, v=4)
    with tensorly.backend_context("pytorch"):
        K, V = tensorly.tenalg.khatri_rao(ks), tensorly.tenalg.khatri_rao(vs)
    expected = functional.scaled_dot_product_attention(q[None], K[None], V[None], scale=1 / 4)[0]
    torch.testing.assert_close(tensor_attention(q, ks, vs), expected, rtol=1e-10, atol=1e-12)
    ours = khatri_rao(khatri_rao(ks[0], ks[1]), ks[2])
    torch.testing.assert_close(ours, K, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": 2}, {"dropout": 0.4}], ids=str)
def test_gradients_agree_with_finite_differences(order, options):
    q, ks, vs = draw(order, n=4, m=4, requires_grad=True)
    padding = torch.tensor([False, False, True, False])

    def function(q, *rest):
        torch.manual_seed(0)
        return tensor_attention(
            q, rest[: order - 1], rest[order - 1 :], key_padding_mask=padding, return_lse=True, **options
        )

    if options.get("is_causal") or options.get("window"):
        padding = None  # a query that sees no key has an lse of -inf, which has no finite difference
    assert torch.autograd.gradcheck(function, (q, *ks, *vs), fast_mode=True)


def test_gradients_of_many_tiles_agree_with_those_of_all_logits_at_once():
    q, ks, vs = draw(3, n=150, m=90, d=6, v=5, batch=(3,), requires_grad=True)
    ours, theirs = tensor_attention(q, ks, vs, return_lse=True), dense(q, ks, vs, 1 / 6)
    inputs = [q, *ks, *vs]
    for mine, other in zip((*ours, *gradients(ours, inputs)), (*theirs, *gradients(theirs, inputs))):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)


def test_large_logits_and_large_shifts_stay_finite():
    q, ks, vs = draw(3, n=6, m=70, d=4, v=3, dtype=torch.float32)
    sharp = tensor_attention(q, ks, vs, scale=1e4)
    logits = torch.einsum("id,jd,kd->ijk", q, *ks).flatten(1)
    winner = logits.argmax(1)
    expected = vs[0][winner // 70] * vs[1][winner % 70]
    torch.testing.assert_close(sharp, expected, rtol=1e-4, atol=1e-4)


def test_queries_that_see_nothing_give_zeros_and_no_gradient():
    q, ks, vs = draw(3, n=4, m=4, requires_grad=True)
    mask = torch.ones(4, 4, 4, dtype=torch.bool)
    mask[1] = False
    out, lse = tensor_attention(q, ks, vs, attn_mask=mask, return_lse=True)
    assert (out[1] == 0).all()
    assert lse[1] == -math.inf
    grads = torch.autograd.grad(out.sum(), [q, *ks, *vs])
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert (grads[0][1] == 0).all()
    everything = tensor_attention(q, ks, vs, key_padding_mask=torch.ones(4, dtype=torch.bool))
    assert (everything == 0).all()
    none = tensor_attention(q, [k[:0] for k in ks], [v[:0] for v in vs])
    assert none.shape == (4, 2)
    assert (none == 0).all()


def test_dropout_drops_pairs_and_keeps_their_mean():
    torch.manual_seed(0)
    q, ks, vs = draw(3, n=6, m=40)
    runs = torch.stack([tensor_attention(q, ks, vs, dropout=0.3) for _ in range(300)])
    exact = tensor_attention(q, ks, vs)
    deviation = (runs.mean(0) - exact).abs() / (runs.std(0) / 300**0.5)
    assert float(deviation.max()) < 4.5
    # Var of a sum of dropped weights: p / (1 - p) * sum (w v)^2, whatever the pairs.
    logits = torch.einsum("id,jd,kd->ijk", q, *ks).flatten(1) / 3
    values = torch.einsum("jv,kv->jkv", *vs).flatten(0, 1)
    variance = 0.3 / 0.7 * (logits.softmax(1).square() @ values.square())
    torch.testing.assert_close(runs.var(0), variance, rtol=0.5, atol=0.0)
    assert (tensor_attention(q, ks, vs, dropout=1.0) == 0).all()


def test_nothing_as_large_as_all_logits_is_ever_made():
    n = 224
    q, ks, vs = draw(3, n=n, m=n, d=8, v=8, dtype=torch.float32, requires_grad=True)
    logits = 4 * n**3
    for options in ({}, {"is_causal": True}, {"window": 64}, {"attn_mask": [torch.rand(n, n) < 0.5] * 2}):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            tensor_attention(q, ks, vs, **options).square().sum().backward()
        largest = max(event.self_cpu_memory_usage for event in seen.events())
        assert largest < logits / 8, options
        assert saved_bytes(lambda options=options: tensor_attention(q, ks, vs, **options)) < logits / 8


def test_operations_are_counted():
    class Attention(torch.nn.Module):
        def forward(self, q):
            return tensor_attention(q, [q, q], [q, q])

    assert measure(Attention(), torch.randn(2, 10, 4), repeats=1).flops == 2 * 2 * 10**3 * (4 + 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    q, ks, vs = draw(3, n=20, m=20, d=8, dtype=torch.float32)
    low = [each.to(dtype) for each in (q, *ks, *vs)]
    out = tensor_attention(low[0], low[1:3], low[3:])
    assert out.dtype == dtype
    wide = tensor_attention(low[0].float(), [x.float() for x in low[1:3]], [x.float() for x in low[3:]])
    assert torch.equal(out, wide.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tensor_attention(q, ks, vs), tensor_attention(q, ks, vs))
        automatic = tensor_attention(q, ks, vs)
    assert torch.equal(automatic, tensor_attention(q, ks, vs))


# --- triples ---


@settings(max_examples=30, deadline=None)
@given(M=st.integers(2, 60), n=st.integers(1, 9), seed=st.integers(0, 99))
def test_matches_are_those_of_a_search_over_all_pairs_and_triples(M, n, seed):
    x = torch.randint(-M, 2 * M, (n,), generator=torch.Generator().manual_seed(seed))
    values = x.tolist()
    pairs = [any((a + b) % M == 0 for b in values) for a in values]
    triples = [any((a + b + c) % M == 0 for b in values for c in values) for a in values]
    assert match2(x, M).tolist() == pairs
    assert match3(x, M).tolist() == triples
    found = match3_head(M, 9)(x)
    assert (found > 0.5).tolist() == triples
    assert ((found > 0.99) | (found < 0.1)).all()


# --- arguments ---


@pytest.fixture
def no_shape_checks():
    """What a user has: the library's own errors, not those of jaxtyping."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def test_arguments_that_cannot_work_are_refused_before_any_work(no_shape_checks):
    q, ks, vs = draw(3, n=5, m=5)
    for message, arguments, options in [
        (r"ks and vs must hold one matrix an axis.*got 2 and 1", (q, ks, vs[:1]), {}),
        (r"at least one each, got 0 and 0", (q, [], []), {}),
        (r"ks must have the features of q.*\(5, 2\)", (q, [ks[0], ks[1][:, :2]], vs), {}),
        (r"keys and values of one axis.*\(4, 2\)", (q, ks, [vs[0], vs[1][:4]]), {}),
        (r"equal numbers of features", (q, ks, [vs[0], vs[1][:, :1]]), {}),
        (r"must have rows and features.*\(3,\)", (q[0], ks, vs), {}),
        (r"the type of q", (q, [ks[0], ks[1].float()], vs), {}),
        (r"leading dimensions must broadcast", (q.expand(2, 5, 3), [ks[0].expand(3, 5, 3), ks[1]], vs), {}),
        (r"is_causal needs as many keys", (q[:4], ks, vs), {"is_causal": True}),
        (r"window needs as many keys", (q[:4], ks, vs), {"window": 2}),
        (r"window must be positive.*got 0", (q, ks, vs), {"window": 0}),
        (r"one for each of 2 axes", (q, ks, vs), {"window": (1, 2, 3)}),
        (r"attn_mask must broadcast to \(5, 5, 5\), got \(4, 5\)", (q, ks, vs), {"attn_mask": torch.ones(4, 5) > 0}),
        (r"attn_mask must have a mask or None for each of 2", (q, ks, vs), {"attn_mask": [None]}),
        (r"booleans or floating-point", (q, ks, vs), {"attn_mask": [torch.ones(5, 5, dtype=torch.int64), None]}),
        (r"must not require a gradient", (q, ks, vs), {"attn_mask": torch.ones(5, 5, 5, requires_grad=True)}),
        (r"key_padding_mask must broadcast to \(5,\)", (q, ks, vs), {"key_padding_mask": torch.ones(4) > 0}),
        (r"method must be one of auto, exact, poly, got 'fast'", (q, ks, vs), {"method": "fast"}),
        (r"dropout must lie in 0 to 1, got 2", (q, ks, vs), {"dropout": 2.0}),
        (r"method='poly' takes masks of keys alone", (q, ks, vs), {"method": "poly", "dropout": 0.1}),
        (r"method='poly' takes masks of keys", (q, ks, vs), {"method": "poly", "attn_mask": torch.ones(5, 5, 5) > 0}),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            tensor_attention(*arguments, **options)
    with pytest.raises(ValueError, match="M must be at least 1"):
        match3(torch.zeros(3, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match=r"at most n = 4 tokens, got \(5,\)"):
        match3_head(7, 4)(torch.zeros(5, dtype=torch.int64))

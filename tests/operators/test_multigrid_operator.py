"""The layer and the network against dense matrices, identities of linear maps, locality, the public code's sizes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lathe.operators.multigrid_operator import (
    REFERENCE,
    MgNO,
    MultigridConv1d,
    MultigridConv2d,
    MultigridConv3d,
    rollout,
)

CYCLES = {1: MultigridConv1d, 2: MultigridConv2d, 3: MultigridConv3d}
DOUBLE = {"dtype": torch.float64}


def randn(*shape, rng, dtype=torch.float64):
    return torch.randn(*shape, generator=rng, dtype=dtype)


def matrix(function, shape):
    """The dense matrix of a linear map, column by column."""
    size = math.prod(shape)
    return np.stack(
        [
            function(torch.eye(size, dtype=torch.float64)[i].view(1, *shape)).flatten().detach().numpy()
            for i in range(size)
        ],
        1,
    )


# ------------------------------------------------------------------------------------------------------- linearity


@pytest.mark.parametrize(
    "options", [{}, REFERENCE, {"transfer": "zero", "post": 1, "cycle": "w"}, {"widen": 1, "share_operator": True}]
)
def test_cycle_is_linear(options, rng):
    layer = MultigridConv2d(2, 3, 4, **options, **DOUBLE)
    f, g = randn(2, 2, 17, 12, rng=rng), randn(2, 2, 17, 12, rng=rng)
    torch.testing.assert_close(layer(2.5 * f - 0.7 * g), 2.5 * layer(f) - 0.7 * layer(g), rtol=0, atol=1e-10)


def test_cycle_with_biases_is_affine(rng):
    layer = MultigridConv2d(2, 3, 3, bias=True, post=1, **DOUBLE)
    f, g = randn(1, 2, 9, 9, rng=rng), randn(1, 2, 9, 9, rng=rng)
    start = layer(torch.zeros_like(f))
    assert start.abs().max() > 1e-3

    def linear(x):
        return layer(x) - start

    torch.testing.assert_close(linear(f + 3 * g), linear(f) + 3 * linear(g), rtol=0, atol=1e-10)


# --------------------------------------------------------------------------------------------- against dense matrices


def test_single_level_is_the_product_formula(rng):
    """J = 1 with one shared (S, A): u = sum_k (I - S A)^k S f, all on 16 x 16 (oracle 3)."""
    layer = MultigridConv2d(1, 2, steps=[(4, 0)], share_operator=True, **DOUBLE)
    level = layer.levels[0]
    for smoother in level.smoothers:
        smoother.weight.data.copy_(level.smoothers[0].weight)
    S = matrix(lambda x: F.conv2d(x, level.smoothers[0].weight, padding=1), (1, 16, 16))
    A = matrix(lambda x: F.conv2d(x, level.operators[0].weight, padding=1), (2, 16, 16))
    expected = sum(np.linalg.matrix_power(np.eye(len(S)) - S @ A, k) @ S for k in range(4))
    np.testing.assert_allclose(layer.as_matrix(16).detach(), expected, atol=1e-12)


@pytest.mark.parametrize("residual, transfer, cycle", itertools.product([True, False], ["pi", "zero"], ["v", "w"]))
def test_cycle_is_the_recursion_in_matrices(residual, transfer, cycle, rng):
    """Two steps before and one after, three levels, on 9 x 7: products of dense matrices, written from the paper."""
    layer = MultigridConv2d(
        2, 3, steps=[(2, 1), (1, 1), (2, 0)], residual=residual, transfer=transfer, cycle=cycle, **DOUBLE
    )
    grids = [(9, 7), (5, 4), (3, 2)]

    def conv(kernel, l, channels, stride=1):
        return matrix(lambda x: F.conv2d(x, kernel.weight, stride=stride, padding=1), (channels, *grids[l]))

    def prolongation(kernel, l):
        def apply(coarse):
            full = F.conv_transpose2d(coarse, kernel.weight, stride=2)  # its first row and column lie outside the grid
            return full[..., 1 : 1 + grids[l][0], 1 : 1 + grids[l][1]]

        return matrix(apply, (3, *grids[l + 1]))

    def visit(l, f, u):
        level = layer.levels[l]
        S = [conv(k, l, 2) for k in level.smoothers]
        A = [conv(k, l, 3) for k in level.operators]
        before, after = layer.steps[l]
        if u is None:
            A = [None, *A]
            u = np.zeros((len(S[0]), f.shape[1]))
        used = iter(A)
        for i in range(before):
            a = next(used)
            u = u + S[i] @ (f if a is None else f - a @ u)
        if l < 2:
            bar = next(used) if residual else None
            for _ in range(2 if cycle == "w" and l == 0 else 1):
                coarse_f = conv(level.restriction, l, 2, stride=2) @ (f if bar is None else f - bar @ u)
                coarse_u = None if transfer == "zero" else conv(level.injection, l, 3, stride=2) @ u
                u = u + prolongation(level.prolongation, l) @ visit(l + 1, coarse_f, coarse_u)
        for i in range(before, before + after):
            u = u + S[i] @ (f - next(used) @ u)
        assert next(used, "none left") == "none left"
        return u

    expected = visit(0, np.eye(2 * 9 * 7), None)
    np.testing.assert_allclose(layer.as_matrix(9, 7).detach(), expected, atol=1e-12)


@pytest.mark.parametrize("size", [(16,), (13,), (9,), (16, 12), (11, 7), (8, 9, 10)])
def test_periodic_prolongation_is_transpose_of_wrapped_restriction(size, rng):
    """P with taps (r0, r1, r2, 0) must be the transpose of reading with (r0, r1, r2) around every second point."""
    d = len(size)
    layer = CYCLES[d](1, 1, steps=[(1, 0), (1, 0)], padding_mode="circular", **DOUBLE)
    taps = randn(*(3,) * d, rng=rng)
    level = layer.levels[0]
    level.prolongation.weight.data.zero_()[(0, 0, *(slice(3),) * d)] = taps
    coarse = tuple((n + 1) // 2 for n in size)
    P = matrix(lambda x: layer._prolong(level, x, torch.zeros(1, 1, *size, dtype=torch.float64)), (1, *coarse))
    R = np.zeros((math.prod(coarse), math.prod(size)))
    for j in np.ndindex(*coarse):
        for tap in np.ndindex(*(3,) * d):
            point = tuple((2 * a + t - 1) % n for a, t, n in zip(j, tap, size))
            R[np.ravel_multi_index(j, coarse), np.ravel_multi_index(point, size)] += taps[tap]
    np.testing.assert_allclose(P, R.T, atol=1e-14)


# ----------------------------------------------------------------------------------------------- adjoint, gradients


@pytest.mark.parametrize("padding_mode", ["zeros", "circular", "reflect", "replicate"])
def test_transpose_is_adjoint(padding_mode, rng):
    layer = MultigridConv2d(2, 3, 3, post=1, padding_mode=padding_mode, **DOUBLE)
    f, g = randn(2, 2, 13, 10, rng=rng), randn(2, 3, 13, 10, rng=rng)
    torch.testing.assert_close((layer(f) * g).sum(), (f * layer.transpose_apply(g)).sum(), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(matrix(layer.transpose_apply, (3, 5, 6)), layer.as_matrix(5, 6).detach().T, atol=1e-12)


def test_complex_transpose_does_not_conjugate(rng):
    layer = MultigridConv1d(1, 1, 2, dtype=torch.complex128)
    u = torch.randn(1, 1, 8, dtype=torch.complex128, generator=rng)
    with torch.no_grad():
        torch.testing.assert_close(layer.transpose_apply(u)[0, 0], layer.as_matrix(8).T @ u[0, 0])


def test_recomputing_changes_memory_and_nothing_else(rng):
    plain = MultigridConv2d(2, 4, 3, pre=2, post=1, **DOUBLE)
    lean = MultigridConv2d(2, 4, 3, pre=2, post=1, recompute=True, **DOUBLE)
    lean.load_state_dict(plain.state_dict())
    f = randn(2, 2, 16, 16, rng=rng)
    results = []
    for layer in (plain, lean):
        kept = {}

        def pack(x, kept=kept):
            return kept.setdefault(x.untyped_storage().data_ptr(), x)

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            x = f.clone().requires_grad_()
            y = layer(x)
            size = sum(x.untyped_storage().nbytes() for x in kept.values())
            y.square().sum().backward()
        results.append((y, x.grad, [p.grad for p in layer.parameters()], size))
    torch.testing.assert_close(results[0][:3], results[1][:3], rtol=1e-12, atol=1e-12)
    assert results[1][3] < 0.7 * results[0][3]


def test_gradients_by_finite_differences(rng):
    layer = MultigridConv2d(1, 1, 2, coarse=1, post=1, padding_mode="circular", **DOUBLE)
    f = randn(1, 1, 5, 4, rng=rng).requires_grad_()
    assert torch.autograd.gradcheck(lambda f, *_: layer(f), (f, *layer.parameters()))
    assert torch.autograd.gradgradcheck(lambda f: layer(f).square(), (f,))


# ------------------------------------------------------------------------------------------- symmetry and locality


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_periodic_cycle_commutes_with_coarse_translations(ndim, rng):
    layer = CYCLES[ndim](2, 2, 3, post=1, padding_mode="circular", **DOUBLE)
    f = randn(1, 2, *(16, 8, 24)[:ndim], rng=rng)
    shift, axes = (4, -8, 12)[:ndim], tuple(range(2, ndim + 2))
    torch.testing.assert_close(layer(f.roll(shift, axes)), layer(f).roll(shift, axes), rtol=0, atol=1e-10)
    assert (layer(f.roll(1, 2)) - layer(f).roll(1, 2)).abs().max() > 1e-6


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_single_level_sees_exactly_its_radius(steps):
    layer = MultigridConv2d(1, 2, steps=[(steps, 0)], **DOUBLE)
    for kernel in layer.levels[0].smoothers.children():
        kernel.weight.data.abs_()
    f = torch.zeros(1, 1, 17, 17, dtype=torch.float64, requires_grad=True)
    layer(f)[0, :, 8, 8].sum().backward()
    seen = f.grad[0, 0] != 0
    distance = torch.arange(17).sub(8).abs()
    reach = torch.maximum(distance[:, None], distance) <= 1 + 2 * (steps - 1)
    assert torch.equal(seen, reach)


@pytest.mark.parametrize("n, levels", [(8, 3), (16, 4), (32, 5), (32, 4)])
def test_deep_cycle_sees_everything(n, levels):
    """log2(n) - 1 levels below the finest reach from the centre to every corner."""
    layer = MultigridConv2d(1, 2, levels, **DOUBLE)
    f = torch.zeros(1, 1, n, n, dtype=torch.float64, requires_grad=True)
    layer(f)[0, :, n // 2, n // 2].sum().backward()
    assert (f.grad != 0).all()


# ---------------------------------------------------------------------------------------------------- sizes, counts


@settings(max_examples=30, deadline=None)
@given(
    grid=st.lists(st.integers(4, 13), min_size=1, max_size=3),
    padding_mode=st.sampled_from(["zeros", "circular", "replicate"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.complex64]),
    residual=st.booleans(),
    kernel_size=st.sampled_from([1, 3]),
)
def test_any_grid_keeps_its_size(grid, padding_mode, dtype, residual, kernel_size):
    layer = CYCLES[len(grid)](
        1, 2, 3, post=1, padding_mode=padding_mode, residual=residual, kernel_size=kernel_size, dtype=dtype
    )
    u = layer(torch.ones(2, 1, *grid, dtype=dtype))
    assert (
        u.shape == (2, 2, *grid)
        and u.dtype == dtype
        and torch.isfinite(torch.view_as_real(u) if u.is_complex() else u).all()
    )


@pytest.mark.parametrize("n, chain", [(211, [211, 106, 53, 27, 14, 7]), (32, [32, 16, 8, 4, 2, 1])])
def test_levels_halve_upwards(n, chain):
    layer = MultigridConv1d(1, 1, 6)
    seen = []
    original = layer._visit
    layer._visit = lambda l, f, u: (seen.append(f.shape[-1]), original(l, f, u))[1]
    layer(torch.zeros(1, 1, n))
    assert seen == chain


def test_valid_transfers_give_the_helmholtz_chain():
    layer = MultigridConv2d(1, 4, 5, padding_mode="reflect", transfer_padding=0, widen=1)
    seen = []
    original = layer._visit
    layer._visit = lambda l, f, u: (seen.append((f.shape[1], f.shape[-1])), original(l, f, u))[1]
    assert layer(torch.zeros(1, 1, 101, 101)).shape == (1, 4, 101, 101)
    assert seen == [(1, 101), (2, 50), (3, 24), (4, 11), (5, 5)]


@settings(max_examples=25, deadline=None)
@given(
    c_f=st.integers(1, 4),
    c_u=st.integers(1, 4),
    levels=st.integers(1, 5),
    pre=st.integers(1, 3),
    post=st.integers(0, 2),
    residual=st.booleans(),
)
def test_parameters_are_the_papers_count(c_f, c_u, levels, pre, post, residual):
    layer = MultigridConv2d(c_f, c_u, levels, pre=pre, post=post, coarse=2, residual=residual)
    smoothers = (pre + post) * (levels - 1) + (2 if levels > 1 else pre)
    operators = smoothers - 1
    count = 9 * c_f * c_u * (smoothers + operators)
    count += (levels - 1) * (9 * (c_u**2 + c_f**2 + c_f * c_u * residual) + 16 * c_u**2)
    assert sum(p.numel() for p in layer.parameters()) == count


def test_networks_have_the_public_codes_parameters():
    darcy = [(1, 0)] * 5 + [(2, 0)]

    def size(net):
        return sum(p.numel() for p in net.parameters())

    assert size(MgNO(1, 1, 24, 4, steps=darcy, **REFERENCE)) == 572_661
    assert size(MgNO(1, 1, 24, 5, steps=darcy, **REFERENCE)) == 738_573
    flow = MgNO(
        1, 1, 32, 5, steps=[(1, 0)] * 3 + [(2, 0)] * 2, bias=True, norm="layer", skip=False, padding_mode="circular",
        residual_output=True, **REFERENCE,
    )  # fmt: skip
    # The public code's norms have an affine map per channel and point of a 64 x 64 grid, ours one per channel.
    pointwise_norms = 5 * 4 * 2 * 32
    grid_norms = 5 * 2 * 32 * sum((64 // 2**level) ** 2 for level in range(4))
    assert size(flow) - pointwise_norms + grid_norms == 2_885_194


# ------------------------------------------------------------------------------------------------ layers as layers


@pytest.mark.parametrize("padding_mode", ["zeros", "circular", "reflect"])
def test_from_trained_starts_as_the_convolution(padding_mode, rng):
    conv = nn.Conv2d(3, 5, 3, padding=1, padding_mode=padding_mode, **DOUBLE)
    layer = MultigridConv2d.from_trained(conv, levels=3, pre=2)
    x = randn(2, 3, 12, 14, rng=rng)
    torch.testing.assert_close(layer(x), conv(x))
    layer(x).square().sum().backward()
    assert layer.levels[0].prolongation.weight.grad.abs().max() > 0  # the coarse levels come in with the first step


@pytest.mark.parametrize("kernel, padding", [(5, "same"), ((3, 5), (1, 2))])
def test_like_takes_shape_device_and_dtype(kernel, padding):
    layer = MultigridConv2d.like(nn.Conv2d(2, 4, kernel, padding=padding, bias=False, **DOUBLE), levels=3)
    assert layer(torch.zeros(1, 2, 20, 20, dtype=torch.float64)).shape == (1, 4, 20, 20)
    assert layer.levels[0].smoothers[0].bias is None and layer.levels[0].smoothers[0].weight.dtype == torch.float64


@pytest.mark.parametrize("change", [{"stride": 2}, {"dilation": 2}, {"groups": 2}, {"padding": 0}])
def test_like_refuses_other_convolutions(change):
    with pytest.raises(ValueError, match=next(iter(change)) if "padding" not in change else "keep the grid"):
        MultigridConv2d.like(nn.Conv2d(2, 2, 3, **{"padding": 1, **change}), levels=2)


def test_norm_takes_statistics_over_channels_and_points(rng):
    layer = MultigridConv2d(1, 3, 2, norm="layer", **DOUBLE)
    u = layer(randn(2, 1, 9, 6, rng=rng)).flatten(1)
    torch.testing.assert_close(u.mean(1), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(u.var(1, correction=0), torch.ones(2, dtype=torch.float64), rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match="norm='layer'"):
        layer.as_matrix(8)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"levels": 0}, "levels must be at least 1"),
        ({"levels": 2, "steps": [(1, 0)]}, "either levels or steps"),
        ({"steps": [(0, 1), (1, 0)]}, "finest level"),
        ({"steps": [(1, 0), (1, 1)]}, "no steps after the coarsest"),
        ({"steps": [(1, 0), (0, 1), (1, 0)], "transfer": "zero"}, "no guess"),
        ({"levels": 2, "kernel_size": 2}, "kernel_size must be odd"),
        ({"levels": 2, "padding_mode": "circular", "transfer_padding": 0}, "periodic"),
    ],
)
def test_impossible_cycles_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        MultigridConv2d(1, 1, **options)


def test_impossible_inputs_are_refused():
    with pytest.raises(ValueError, match=r"at most 3 levels, got 4"):
        MultigridConv2d(1, 1, 4)(torch.zeros(1, 1, 16, 7))
    with pytest.raises(ValueError, match=r"at most 2 levels, got 3"):
        MultigridConv2d(1, 1, 3, transfer_padding=0)(torch.zeros(1, 1, 6, 6))
    with pytest.raises(ValueError, match="needs at least 2 points on the coarsest level, got 1"):
        MultigridConv2d(1, 1, 3, padding_mode="reflect")(torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"must have 3 channels, got f of shape \(1, 2, "):
        MultigridConv2d(3, 1, 2)(torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match="2 grid axes"):
        MultigridConv2d(1, 1, 2)(torch.zeros(1, 1, 8))


# --------------------------------------------------------------------------------------------------- the network


def test_network_is_the_papers_formula(rng):
    net = MgNO(2, 3, 4, 2, 3, normalizer=(torch.tensor(0.5), torch.tensor(2.0))).double()
    a = randn(2, 2, 12, 9, rng=rng)
    v = a
    for cycle, skip in zip(net.cycles, net.skips):
        pointwise = torch.einsum("oi,bixy->boxy", skip.weight[:, :, 0, 0], v) + skip.bias[:, None, None]
        z = cycle(v) + pointwise
        v = z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    u = 0.5 + 2 * torch.einsum("oi,bixy->boxy", net.head.weight[:, :, 0, 0], v)
    torch.testing.assert_close(net(a), u)
    assert net.head.bias is None


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("head", ["pointwise", "multigrid"])
def test_network_takes_any_grid(ndim, head):
    net = MgNO(2, 2, 4, 2, 3, head=head, ndim=ndim, residual_output=True, skip=False, norm="layer", norm_layers=True)
    for grid in ((8, 9, 10), (11, 4, 5)):
        assert net(torch.ones(2, 2, *grid[:ndim])).shape == (2, 2, *grid[:ndim])


def test_network_survives_state_dict_and_float64(rng):
    net, other = MgNO(1, 1, 4, 2, 3), MgNO(1, 1, 4, 2, 3)
    other.load_state_dict(net.state_dict())
    x = randn(1, 1, 8, 8, rng=rng, dtype=torch.float32)
    torch.testing.assert_close(net(x), other(x))
    torch.testing.assert_close(net(x).double(), net.double()(x.double()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"depth": 0}, "depth"),
        ({"activation": "sine"}, "activation"),
        ({"head": "mlp"}, "head"),
        ({"residual_output": True, "out_channels": 2}, "residual_output"),
        ({"ndim": 4}, "ndim"),
    ],
)
def test_impossible_networks_are_refused(options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        MgNO(**{"in_channels": 1, "out_channels": 1, **options})


def test_rollout_repeats_the_model(rng):
    u = randn(2, 1, 4, 4, rng=rng)
    states = rollout(lambda v: 0.5 * v, u, 3)
    torch.testing.assert_close(states, torch.stack([u / 2, u / 4, u / 8], 1))
    with pytest.raises(ValueError, match="steps"):
        rollout(lambda v: v, u, 0)


@pytest.mark.compile
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_network_compiles_to_the_same_function(padding_mode, rng):
    net = MgNO(1, 1, 4, 1, 3, padding_mode=padding_mode)
    x = randn(2, 1, 16, 16, rng=rng, dtype=torch.float32)
    torch.testing.assert_close(torch.compile(net, fullgraph=True)(x), net(x), rtol=1e-4, atol=1e-5)

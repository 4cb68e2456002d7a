"""Slow nets, the operator, standardisation and a block's parts, against formulas in NumPy and torch's own layers."""

from __future__ import annotations

import math
import warnings

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lathe.nn.hyper_zzw import (
    RGU,
    BatchStd,
    ContextSlowNet,
    GroupInstanceBatchStd,
    HyperChannelInteraction,
    HyperInteraction,
    LocalBranch,
    SlowNet,
    apply_weights,
    hyperzzw_2e,
    hyperzzw_global,
    hyperzzw_local,
    instance_standardize,
    long_convolution,
)


def disturbed(module: nn.Module) -> nn.Module:
    """In float64, away from starts that are zero or one."""
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def arrays(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in module.state_dict().items()}


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture
def without_shape_checks():
    """What a user meets, who has the library's own checks only."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


# --- slow nets ---


def grid(size: tuple[int, ...]) -> np.ndarray:
    return np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in size), indexing="ij")).reshape(len(size), -1)


@pytest.mark.parametrize("size", [(7,), (5, 4)])
@pytest.mark.parametrize("omega0", [2000.0, 3.0])
@pytest.mark.parametrize("pixel_bias", [True, False])
def test_a_kernel_is_the_products_of_sines_of_the_formula(size, omega0, pixel_bias):
    net = disturbed(SlowNet(len(size), size, 6, 3, 3, omega0=omega0, pixel_bias=pixel_bias))
    w, c = arrays(net), grid(size)
    h = np.sin(w["filter_weight"][0] @ c + w["filter_bias"][0][:, None])
    for i in range(3):
        filtered = np.sin(w["filter_weight"][i + 1] @ c + w["filter_bias"][i + 1][:, None])
        h = filtered * (w["weight"][i] @ h + w["bias"][i][:, None])
        if pixel_bias:
            h = h + w["pixel_bias"].reshape(1, -1)
    kernel = w["out_weight"] @ h + w["out_bias"][:, None]
    np.testing.assert_allclose(net().detach().numpy().reshape(3, -1), kernel, atol=1e-10)


def test_one_layer_has_only_sums_and_differences_of_its_filters_frequencies():
    net = SlowNet(1, 96, 2, 1, 1, omega0=1.0, pixel_bias=False).double()
    with torch.no_grad():
        net.bias.zero_()
        net.filter_bias.normal_()
    first, second = net.filter_weight.detach()[:, :, 0].numpy()
    frequencies = [s + sign * f for f in first for s in second for sign in (1, -1)]
    c = np.linspace(-1, 1, 96)
    waves = np.stack([wave(f * c) for f in frequencies for wave in (np.sin, np.cos)] + [np.ones_like(c)], 1)
    kernel = net()[0, 0].detach().numpy()
    found, *_ = np.linalg.lstsq(waves, kernel, rcond=None)
    assert np.abs(kernel).max() > 1e-3
    np.testing.assert_allclose(waves @ found, kernel, atol=1e-9)


def test_single_precision_kernels_are_exact_also_where_their_phases_are_of_1e5():
    net = SlowNet(2, 32, 16, 4, 2)
    assert net.filter_weight.abs().max() > 1e4
    twin = SlowNet(2, 32, 16, 4, 2).double()
    twin.load_state_dict({name: value.double() for name, value in net.state_dict().items()})
    torch.testing.assert_close(net().double(), twin(), rtol=0, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(net().double(), twin(), rtol=0, atol=1e-6)


def test_the_start_has_the_variances_of_the_reference():
    net = SlowNet(2, 16, 400, 300, 2, omega0=7.0, alpha=6.0)
    # A 1x1 convolution's start, U(+-1/sqrt 2), times 2 pi omega0 and Gamma(6/k, 1), of mean and variance 6/k.
    for k, weight in enumerate(net.filter_weight.detach(), 1):
        expected = (1 / 6) * (2 * math.pi * 7) ** 2 * ((6 / k) ** 2 + 6 / k)
        assert float(weight.square().mean()) == pytest.approx(expected, rel=0.25)
    assert float(net.weight.detach().var()) == pytest.approx(1 / 400, rel=0.02)
    assert float(net.out_weight.detach().var()) == pytest.approx(1 / 400 / 256, rel=0.02)
    assert torch.all(net.bias == 1) and not net.filter_bias.any() and not net.pixel_bias.any()
    generator = torch.Generator().manual_seed(3)
    net.reset_parameters(generator)
    first = net.filter_weight.clone()
    net.reset_parameters(generator.manual_seed(3))
    assert torch.equal(first, net.filter_weight)


def test_parameters_do_not_grow_with_the_kernel_but_for_the_map_of_pixels():
    count = lambda net: sum(parameter.numel() for parameter in net.parameters())  # noqa: E731
    assert count(SlowNet(2, 16, 8, 4)) - 16**2 == count(SlowNet(2, 32, 8, 4)) - 32**2
    assert count(SlowNet(2, 16, 8, 4, pixel_bias=False)) == count(SlowNet(2, 99, 8, 4, pixel_bias=False))


def test_smooth_kernels_are_sampled_anew_at_another_size():
    net = disturbed(SlowNet(2, 9, 8, 2, omega0=0.3))
    with torch.no_grad():  # p that is linear in the coordinates is interpolated without error
        net.pixel_bias.copy_(torch.linspace(-1, 1, 9).view(-1, 1).expand(9, 9))
    coarse, fine = net(), net((17, 33))
    assert fine.shape == (1, 2, 17, 33)
    torch.testing.assert_close(fine[..., ::2, ::4], coarse)


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_contextual_kernel_follows_the_formula(per_sample):
    net = disturbed(ContextSlowNet(2, (3, 5), 4, 6, 2, omega0=2.0, per_sample=per_sample))
    x = randn(4, 6, 7, 8)
    w, c = arrays(net), grid((3, 5))
    pooled = F.adaptive_avg_pool2d(x, (3, 5)).flatten(2).numpy()
    reduced = np.einsum("hc,bcn->bhn", w["reduce.weight"], pooled) + w["reduce.bias"][:, None]
    kernels = []
    for each in reduced if per_sample else [reduced.mean(0)]:
        u = F.gelu(torch.tensor(w["fc1.weight"] @ each + w["fc1.bias"][:, None])).numpy()
        h = np.sin(w["filter_weight"][0] @ c + w["filter_bias"][0][:, None])
        for i in range(2):
            filtered = np.sin(w["filter_weight"][i + 1] @ c + w["filter_bias"][i + 1][:, None])
            h = filtered * (w["weight"][i] @ h + w["bias"][i][:, None]) + w["pixel_bias"].reshape(1, -1)
            h = h + 0.1 * h / np.sqrt((h**2).sum(1, keepdims=True))
            h = h * (w["gate_weight"][i] @ u + w["gate_bias"][i][:, None])
        kernels.append((w["out_weight"] @ h + w["out_bias"][:, None]).reshape(6, 1, 3, 5))
    np.testing.assert_allclose(net(x).detach().numpy(), kernels if per_sample else kernels[0], atol=1e-10)


def test_renormalisation_stops_the_gradient_of_what_it_carries():
    net = disturbed(ContextSlowNet(1, 3, 2, 2, 1, omega0=1.0))
    x, name = randn(2, 2, 5), "weight"
    kernel = net(x)
    seed = torch.randn_like(kernel)
    (kernel * seed).sum().backward()
    # Finite differences of the formula with what is carried held fast.
    carried = net.last_hidden(net._context(x)).detach()
    gates = carried / renormalised(net, x, None)
    base = before_renormalisation(net)
    weight = net.weight.detach().clone()
    for index in np.ndindex(*weight.shape):
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                getattr(net, name).copy_(weight)[index] += step
            values.append(float((out(net, renormalised(net, x, base) * gates) * seed.view(2, 3)).sum()))
        expected = (values[0] - values[1]) / 2e-6
        with torch.no_grad():
            net.weight.copy_(weight)
        assert float(net.weight.grad[index]) == pytest.approx(expected, abs=1e-6)


def before_renormalisation(net: ContextSlowNet) -> torch.Tensor:
    sines = net._sines(net.size)
    return (sines[1] * (net.weight[0] @ sines[0] + net.bias[0, :, None]) + net.pixel_bias).detach()


def renormalised(net: ContextSlowNet, x: torch.Tensor, carried: torch.Tensor | None) -> torch.Tensor:
    h = before_renormalisation(net)
    return (h if carried is None else carried) + 0.1 * h / h.norm(dim=1, keepdim=True)


def out(net: ContextSlowNet, h: torch.Tensor) -> torch.Tensor:
    return (net.out_weight.detach() @ h + net.out_bias.detach()[:, None])[0]


def test_constants_of_the_renormalisation_are_learnt_only_when_asked():
    assert {"renorm_alpha", "renorm_beta"} <= {name for name, _ in ContextSlowNet(2, 3, 4, 4).named_buffers()}
    net = ContextSlowNet(2, 3, 4, 4, renorm_trainable=True)
    net(torch.randn(2, 4, 5, 5)).sum().backward()
    assert net.renorm_beta.grad.any()
    assert net.renorm_alpha.grad.any()


def test_a_kernel_of_the_batch_depends_on_its_samples_and_a_kernel_of_a_sample_does_not():
    x = randn(4, 6, 8, 8)
    shared = disturbed(ContextSlowNet(2, 3, 4, 6))
    own = disturbed(ContextSlowNet(2, 3, 4, 6, per_sample=True))
    assert not torch.allclose(shared(x), shared(x[:2]))
    torch.testing.assert_close(own(x)[:2], own(x[:2]))
    torch.testing.assert_close(own(x)[[2, 0]], own(x[[2, 0]]))


def test_running_contexts_make_evaluation_independent_of_the_batch():
    net = ContextSlowNet(2, 3, 4, 6, running=True, momentum=1.0)
    x = torch.randn(5, 6, 8, 8)
    trained = net(x)
    net.eval()
    torch.testing.assert_close(net(x[:1] * 3), trained)  # the context of the last batch, as momentum is 1
    with torch.no_grad():
        assert net(x) is net(x + 1).squeeze(-1).view_as(trained) or torch.equal(net(x), net(x + 1))


class TestKeptKernel:
    """In eval() without gradients a kernel is kept, and never a stale one."""

    def test_it_is_made_once(self):
        net = SlowNet(2, 5, 4, 3).eval()
        with torch.no_grad():
            assert net() is net()
            assert net((6, 6)).shape[2:] == (6, 6)
        assert net().requires_grad
        net.train()
        with torch.no_grad():
            assert net() is not net()

    def test_it_follows_every_change(self):
        net = SlowNet(2, 5, 4, 3).eval()
        with torch.no_grad():
            for change in (
                lambda: net.weight.mul_(2),
                lambda: net.load_state_dict(SlowNet(2, 5, 4, 3).state_dict()),
                lambda: setattr(net, "out_weight", nn.Parameter(net.out_weight * 2)),
                lambda: setattr(net.bias, "data", net.bias.data + 1),
                net.double,
            ):
                before = net()
                change()
                after = net()
                assert after.dtype != before.dtype or not torch.equal(after, before)
                torch.testing.assert_close(after, net.train()(), rtol=0, atol=0)
                net.eval()

    def test_replaced_parameters_are_not_remembered(self):
        net = SlowNet(2, 5, 4, 3).eval()
        with torch.no_grad():
            own = net()
            doubled = {name: 2 * value for name, value in net.state_dict().items()}
            assert not torch.equal(torch.func.functional_call(net, doubled, ()), own)
            assert torch.equal(net(), own)
        with torch.inference_mode():
            net.weight.add_(0)
            net()
        (net().sum() * torch.ones(1, requires_grad=True)).backward()


# --- the operator ---


def test_the_global_operator_is_a_product_of_matrices_a_channel():
    z, kernel, y = randn(2, 3, 4, 4), randn(1, 3, 4, 4), randn(2, 3, 4, 4)
    expected = torch.einsum("bchk,bckw->bchw", z * kernel, y)
    torch.testing.assert_close(hyperzzw_global(z, kernel, y), expected, rtol=0, atol=1e-12)
    identity = torch.eye(4, dtype=torch.float64).expand_as(y)
    one = torch.ones_like(z)
    torch.testing.assert_close(hyperzzw_global(z, one, identity), z)
    torch.testing.assert_close(hyperzzw_global(one, one, y), y.sum(2, keepdim=True).expand_as(y))
    torch.testing.assert_close(hyperzzw_2e(z, one), z.square())
    torch.testing.assert_close(hyperzzw_global(z, kernel, y, "elementwise"), z * kernel * y)


def test_sequences_are_folded_into_squares():
    w, y = randn(2, 3, 9), randn(2, 3, 9)
    expected = torch.stack(
        [torch.stack([(a.view(3, 3) @ b.view(3, 3)).flatten() for a, b in zip(*s)]) for s in zip(w, y)]
    )
    torch.testing.assert_close(apply_weights(w, y), expected)


@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 2, 4, 5)])
def test_convolution_mode_lets_every_position_see_every_other(shape):
    w, y = randn(*shape), randn(*shape)
    positions = shape[2:]
    found = apply_weights(w, y, "convolution")
    expected = torch.zeros_like(found)
    for t in np.ndindex(*positions):
        for s in np.ndindex(*positions):
            source = tuple((a + b - (n - 1) // 2) % n for a, b, n in zip(t, s, positions))
            expected[(..., *t)] += w[(..., *s)] * y[(..., *source)]
    torch.testing.assert_close(found, expected)


@given(length=st.integers(1, 40), size=st.integers(1, 40), batch=st.integers(0, 3), own=st.booleans())
@settings(max_examples=40, deadline=None)
def test_long_convolution_is_torchs_convolution_of_the_same_size(length, size, batch, own):
    size = min(size, length)
    x, kernel = randn(batch, 3, length), randn(batch if own else 1, 3, size)
    found = long_convolution(x, kernel)
    assert found.shape == x.shape
    for sample in range(batch):
        each = kernel[sample if own else 0, :, None]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an even size makes torch copy
            expected = F.conv1d(x[sample : sample + 1], each, padding="same", groups=3)
        torch.testing.assert_close(found[sample : sample + 1], expected, rtol=1e-9, atol=1e-9)


def test_long_convolution_of_images_with_zeros_and_circular():
    x, kernel = randn(2, 3, 6, 7), randn(1, 3, 5, 3)
    expected = F.conv2d(x, kernel.transpose(0, 1), padding=(2, 1), groups=3)
    torch.testing.assert_close(long_convolution(x, kernel), expected)
    around = F.conv2d(F.pad(x, (1, 1, 2, 2), mode="circular"), kernel.transpose(0, 1), groups=3)
    torch.testing.assert_close(long_convolution(x, kernel, "circular"), around)


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("per_sample", [False, True])
def test_the_local_operator_is_a_sum_over_the_window(axes, per_sample):
    size, k = (6, 5)[:axes], (3, 5)[:axes]
    z, kernel = randn(2, 4, *size), randn(*(2,) * per_sample, 4, 1, *k)
    kernels = kernel if per_sample else kernel.expand(2, *kernel.shape)
    padded = F.pad(z, [pad for each in reversed(k) for pad in (each // 2,) * 2])
    for axis, each in enumerate(k, 2):
        padded = padded.unfold(axis, each, 1)
    expected = torch.einsum("bcnk,bck->bcn", padded.reshape(2, 4, math.prod(size), -1), kernels.flatten(2))
    torch.testing.assert_close(hyperzzw_local(z, kernel).flatten(2), expected)
    delta = torch.zeros_like(kernel)
    delta[(..., *(each // 2 for each in k))] = 1
    torch.testing.assert_close(hyperzzw_local(z, delta), z)


# --- standardisation ---


@pytest.mark.parametrize("shape", [(3, 4, 9), (3, 4, 5, 6), (2, 4, 3, 2, 2)])
def test_standardisation_is_torchs_normalisation_without_affine_maps(shape):
    x = (3 * randn(*shape) + 5).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    for ours, peer in (
        (instance_standardize, F.instance_norm),
        (BatchStd(4), lambda x: F.batch_norm(x, None, None, training=True)),
    ):
        found, expected = ours(x), peer(twin)
        torch.testing.assert_close(found, expected)
        seed = torch.randn_like(found)
        (gradient,) = torch.autograd.grad(found, x, seed)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, twin, seed)[0])


def test_groups_take_turns_between_batch_and_sample():
    x = (randn(3, 8, 4, 5) * 2 + 1).requires_grad_()
    norm = GroupInstanceBatchStd(8, 4)
    peers = [F.instance_norm(each) if i % 2 else F.batch_norm(each, None, None, training=True)
             for i, each in enumerate(x.split(2, 1))]  # fmt: skip
    found, expected = norm(x), torch.cat(peers, 1)
    torch.testing.assert_close(found, expected)
    seed = torch.randn_like(found)
    gradients = [torch.autograd.grad(each, x, seed)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients)
    by_batch, by_sample = found.unflatten(1, (4, 2))[:, ::2], found.unflatten(1, (4, 2))[:, 1::2]
    assert by_batch.mean((0, 3, 4)).abs().max() < 1e-12
    assert by_sample.mean((3, 4)).abs().max() < 1e-12


@pytest.mark.parametrize("keep_output", [True, False])
def test_derivatives_are_those_of_finite_differences(keep_output):
    x = randn(2, 4, 3).requires_grad_()
    options = {"keep_output": keep_output}
    instance = lambda x: instance_standardize(x, **options)  # noqa: E731
    for layer in (instance, BatchStd(4, **options), GroupInstanceBatchStd(4, 2, **options)):
        assert torch.autograd.gradcheck(layer, x)
        assert torch.autograd.gradgradcheck(layer, x)


def test_an_activation_in_place_may_follow():
    x = torch.randn(2, 4, 5, requires_grad=True)
    for layer, peer in ((BatchStd(4), nn.BatchNorm1d(4, affine=False)), (instance_standardize, F.instance_norm)):
        gradients = [torch.autograd.grad(torch.relu_(each(x)).square().sum(), x)[0] for each in (layer, peer)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@given(scale=st.floats(0.1, 100), shift=st.floats(-50, 50), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_standardised_values_do_not_see_affine_changes(scale, shift, seed):
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for layer in (lambda x: instance_standardize(x, 0.0), BatchStd(3, eps=0.0), GroupInstanceBatchStd(3, 3, eps=0.0)):
        torch.testing.assert_close(layer(x * scale + shift), layer(x), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 4, 5)])
def test_running_statistics_are_those_of_batch_normalisation(shape):
    peer = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(4, affine=False, momentum=0.3)
    norm, groups = BatchStd(4, running=True, momentum=0.3), GroupInstanceBatchStd(4, 2, running=True, momentum=0.3)
    for _ in range(3):
        x = torch.randn(shape) * 2 + 1
        torch.testing.assert_close(norm(x), peer(x))
        groups(x)
    torch.testing.assert_close(norm.running_mean, peer.running_mean)
    torch.testing.assert_close(norm.running_var, peer.running_var)
    for module in (norm, groups, peer):
        module.eval()
    torch.testing.assert_close(norm(x), peer(x))
    torch.testing.assert_close(groups(x)[:, :2], peer(x)[:, :2])
    torch.testing.assert_close(groups(x)[:, 2:], F.instance_norm(x)[:, 2:])
    torch.testing.assert_close(groups(x)[:1], groups(x[:1]))


def test_group_standardisation_replaces_batch_normalisation():
    norm = GroupInstanceBatchStd.like(nn.BatchNorm2d(24, eps=1e-3, momentum=0.2, dtype=torch.float64).eval())
    assert (norm.groups, norm.eps, norm.momentum, norm.training) == (12, 1e-3, 0.2, False)
    assert norm.running_mean.dtype == torch.float64
    assert GroupInstanceBatchStd.like(nn.BatchNorm1d(12, track_running_stats=False)).running_mean is None
    assert GroupInstanceBatchStd.like(nn.BatchNorm2d(12), running=False).running_mean is None
    with pytest.warns(UserWarning, match="16 channels do not divide into 12 groups: 8 taken"):
        assert GroupInstanceBatchStd.like(nn.BatchNorm2d(16)).groups == 8
    with pytest.raises(TypeError, match="BatchNorm1d, 2d or 3d, got GroupNorm"):
        GroupInstanceBatchStd.like(nn.GroupNorm(2, 4))


# --- parts of a block ---


def conv(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    return F.conv2d(x, layer.weight[..., None, None], layer.bias)


def test_a_recursive_gated_unit_follows_its_formula():
    unit, x = disturbed(RGU(6, 5)), randn(3, 6, 5, 5)
    q = F.gelu(F.instance_norm(conv(x, unit.k) * conv(conv(x, unit.v), unit.q))) + unit.pixel_bias
    torch.testing.assert_close(unit(x), conv(q, unit.y))
    sequence = disturbed(RGU(6, (25,)))
    sequence.load_state_dict(
        {name: v.flatten() if name == "pixel_bias" else v for name, v in unit.state_dict().items()}
    )
    torch.testing.assert_close(sequence(x.flatten(2)), unit(x).flatten(2))


def test_interactions_gate_by_scores_of_channels_and_of_pixels():
    x, o = randn(2, 6, 4, 4), randn(2, 6, 4, 4)
    channel = disturbed(HyperChannelInteraction(6, omega0=3.0))
    y = x.mean((2, 3))
    score = (y * channel.slow_net()[0] * y).sigmoid()
    torch.testing.assert_close(channel(x), x * score[..., None, None])
    both = disturbed(HyperInteraction(6, 4, omega0=3.0))
    y_c, y_s = o.mean((2, 3)), o.mean(1, keepdim=True)
    s_c = (y_c**2 * both.channel.slow_net()[0])[..., None, None]
    s_s = y_s**2 * both.spatial_net()
    torch.testing.assert_close(both(o, x), x * (s_s * s_c).sigmoid())
    torch.testing.assert_close(both(o), both(o, o))


def test_a_local_branch_convolves_mixes_standardises_and_activates():
    branch, x, z = disturbed(LocalBranch(6, 5, omega0=3.0)), randn(3, 6, 7, 7), randn(3, 6, 7, 7)
    convolved = F.conv2d(z, branch.slow_net(x), padding=2, groups=6)
    expected = F.gelu(F.batch_norm(conv(convolved, branch.mix), None, None, training=True)) + branch.bias
    torch.testing.assert_close(branch(x, z), expected)
    torch.testing.assert_close(branch(x), branch(x, x))
    z.requires_grad_()
    learnt = [z, *branch.parameters()]
    for found, right in zip(
        *(torch.autograd.grad(y.square().sum(), learnt) for y in (branch(x, z), expected_of(branch, x, z)))
    ):
        torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-8)


def expected_of(branch: LocalBranch, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    convolved = F.conv2d(z, branch.slow_net(x), padding=2, groups=6)
    return F.gelu(F.batch_norm(conv(convolved, branch.mix), None, None, training=True)) + branch.bias


# --- what is refused ---


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SlowNet(4, 3, 4, 4), "data_dim must be 1, 2 or 3, got 4"),
        (lambda: SlowNet(2, (3, 4, 5), 4, 4), "size must be a positive number, or 2 of them"),
        (lambda: SlowNet(2, 3, 0, 4), "hidden must be at least 1, got 0"),
        (lambda: SlowNet(2, 3, 4, 4, omega0=0.0), "omega0 and alpha must be positive"),
        (lambda: ContextSlowNet(2, 3, 4, 4, per_sample=True, running=True), "choose one"),
        (lambda: LocalBranch(4, 4), "kernel_size must be odd, got 4"),
        (lambda: GroupInstanceBatchStd(10, 4), "groups must divide channels = 10, got 4"),
        (lambda: BatchStd(0), "channels must be at least 1, got 0"),
        (lambda: RGU(4, (2, 2, 2)), "size must be positive"),
        (lambda: RGU(4, 5)(torch.zeros(1, 4, 5, 6)), r"size \(5, 5\).*\(1, 4, 5, 6\); resize=True"),
        (lambda: HyperInteraction(4, 5)(torch.zeros(1, 4, 5, 5), torch.zeros(2, 4, 5, 5)), "must have one shape"),
        (lambda: apply_weights(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4)), r"square images.*\(3, 4\)"),
        (lambda: apply_weights(torch.zeros(1, 2, 8), torch.zeros(1, 2, 8)), r"length is a square.*\(8,\)"),
        (lambda: apply_weights(torch.zeros(1, 2, 9), torch.zeros(1, 2, 8)), "must have one shape"),
        (lambda: hyperzzw_local(torch.zeros(1, 4, 5, 5), torch.zeros(4, 1, 2, 3)), r"odd sizes.*\(2, 3\)"),
        (lambda: hyperzzw_local(torch.zeros(1, 4, 5, 5), torch.zeros(3, 1, 3, 3)), r"got \(3, 1, 3, 3\)"),
        (lambda: long_convolution(torch.zeros(1, 4, 5), torch.zeros(1, 4, 6)), r"not longer than x.*\(1, 4, 6\)"),
        (lambda: apply_weights(*torch.zeros(2, 1, 2, 4, 4), "sum"), "mode must be one of matmul, elementwise, conv"),
        (lambda: long_convolution(*torch.zeros(2, 1, 2, 4), "same"), "padding must be 'zeros' or 'circular'"),
        (lambda: instance_standardize(torch.zeros(2, 3, 1)), r"at least 2 positions.*\(2, 3, 1\)"),
        (lambda: BatchStd(3)(torch.zeros(1, 3, 1)), r"at least 2 values a channel.*\(1, 3, 1\)"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_any_work(make, said, without_shape_checks):
    with pytest.raises(ValueError, match=said):
        make()

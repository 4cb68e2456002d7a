"""Blocks, networks, losses and optimisers against the unfused computation, counts, identities and NumPy."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lathe.nn.hyper_zzw import (
    GroupInstanceBatchStd,
    Kar2,
    Kar3,
    SFNEBlock,
    Terminator,
    norm_penalty,
    slow_neural_loss,
)

SMALL = {"hidden": 8, "local_hidden": 4, "channel_hidden": 4, "interaction_hidden": 4, "omega0": 5.0}


def disturbed(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(scope="module")
def unfused():
    """The benchmark's computation of the same networks by torch's own operations, one branch at a time."""
    folder = Path(__file__).parents[2] / "benchmarks"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location("unfused_hyper_zzw", folder / "hyper_zzw.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


def test_the_network_for_cifar_has_the_parameters_of_the_reference():
    net = Terminator(3, 10, 32)
    count = lambda module: sum(parameter.numel() for parameter in module.parameters())  # noqa: E731
    assert [count(block) for block in net.blocks] == [53_377, 57_824, 105_188, 253_580, 863_996]
    assert count(net) == 1_336_855 + net.shifts.numel()
    assert [block.skip_channels for block in net.blocks] == [(), (), (12,), (36,), (72, 36)]


def test_a_network_computes_what_its_branches_one_by_one_do(unfused):
    net = disturbed(Terminator(2, 5, 6, (6, 2, 2, 1, 2), dropout=[0.0] * 5, **SMALL))
    x, labels = randn(4, 2, 6, 6), torch.randint(5, (4,))
    found, expected = net(x), unfused.unfused_network(net, x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    parameters = [*net.parameters()]
    gradients = [torch.autograd.grad(F.cross_entropy(each, labels), parameters) for each in (found, expected)]
    for (name, _), ours, theirs in zip(net.named_parameters(), *gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_a_blocks_second_derivatives_are_those_of_its_branches_one_by_one(unfused):
    block = disturbed(SFNEBlock(2, 2, 4, local_sizes=(3,), groups=2, **SMALL))
    x, direction = randn(2, 2, 4, 4).requires_grad_(), randn(2, 2, 4, 4)
    products = []
    for function in (block, lambda x: unfused.unfused_block(block, x)):
        (gradient,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        learnt = [x, block.mix.weight, block.local_branches[0].mix.weight]
        products.append(torch.autograd.grad((gradient * direction).sum(), learnt))
    for ours, theirs in zip(*products):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_groups_of_every_block_have_no_mean():
    net = disturbed(Terminator(1, 5, 6, (12, 2), **SMALL))
    seen = []
    for block in net.blocks:
        block.norm.register_forward_hook(lambda module, args, y: seen.append((module, y)))
    net(randn(3, 1, 6, 6))
    for norm, y in seen:
        groups = y.unflatten(1, (norm.groups, -1))
        assert groups[:, ::2].mean((0, 3)).abs().max() < 1e-12
        assert groups[:, 1::2].mean(3).abs().max() < 1e-12


def test_one_block_sees_the_whole_image_and_the_product_a_cross():
    from lathe.nn.hyper_zzw import apply_weights

    block = disturbed(SFNEBlock(2, 2, 4, groups=2, **SMALL))
    jacobian = torch.autograd.functional.jacobian(lambda x: block(x[None])[0].sum(0).flatten(), randn(2, 4, 4))
    assert torch.all(jacobian.abs().sum(1) > 0)
    square = torch.autograd.functional.jacobian(lambda x: apply_weights(x, x).flatten(), randn(1, 1, 4, 4))
    seen = square.view(16, 4, 4) != 0
    for i in range(16):
        cross = torch.zeros(4, 4, dtype=torch.bool)
        cross[i // 4], cross[:, i % 4] = True, True
        assert torch.equal(seen[i], cross)


# --- the batch ---


def test_nothing_leaks_between_samples_where_each_has_its_own_kernels():
    options = {**SMALL, "dropout": [0.0, 0.0]}
    x = randn(5, 1, 6, 6)
    own = disturbed(Terminator(1, 4, 6, (12, 2), per_sample=True, **options))
    for mode in (True, False):
        y = own.train(mode)(x)
        torch.testing.assert_close(own(x[[3, 1]]), y[[3, 1]], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(own(x[:1]), y[:1], rtol=1e-9, atol=1e-9)
    shared = disturbed(Terminator(1, 4, 6, (12, 2), **options)).eval()
    assert not torch.allclose(shared(x)[:2], shared(x[:2]), atol=1e-3)
    running = disturbed(Terminator(1, 4, 6, (12, 2), running=True, **options))
    running(x)
    y = running.eval()(x)
    torch.testing.assert_close(running(x[3:4]), y[3:4], rtol=1e-9, atol=1e-9)


def test_running_averages_reach_what_the_batch_says_when_it_never_changes():
    x = randn(6, 1, 6, 6)
    net = disturbed(Terminator(1, 4, 6, (12, 2), running=True, dropout=[0.0, 0.0], **SMALL))
    for module in net.modules():
        if hasattr(module, "momentum"):
            module.momentum = 1.0
    for _ in range(4):  # a block's statistics are true once those of the blocks before are
        trained = net(x)
    # Running variances are unbiased, over 6 * 36 values.
    torch.testing.assert_close(net.eval()(x), trained, rtol=0.03, atol=0.03)


# --- sizes and sequences ---


@pytest.mark.parametrize("mode", ["elementwise", "convolution"])
@pytest.mark.parametrize("size", [(4, 6), (10,)])
def test_rectangular_images_and_sequences_of_any_length(mode, size):
    net = Terminator(1, 3, size, (12, 2), mode=mode, **SMALL)
    x = torch.randn(4, 1, *size)
    loss = F.cross_entropy(net(x), torch.randint(3, (4,))) + net.slow_loss()
    loss.backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_a_sequence_whose_length_is_a_square_multiplies_matrices():
    net = Terminator(2, 3, (16,), (6, 2), **SMALL)
    assert net(torch.randn(2, 2, 16)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"length is a square, got size \(15,\); 'elementwise' and 'convolution'"):
        Terminator(2, 3, (15,), (6, 2))


def test_another_resolution_is_refused_or_taken_with_maps_interpolated():
    fixed = Terminator(1, 3, 8, (12,), **SMALL)
    with pytest.raises(ValueError, match=r"size \(8, 8\) that.*got shape \(2, 1, 9, 9\); resize=True"):
        fixed(torch.randn(2, 1, 9, 9))
    free = Terminator(1, 3, 8, (12,), resize=True, **SMALL)
    free.load_state_dict(fixed.state_dict())
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(free(x), fixed(x))
    assert free(torch.randn(2, 1, 11, 11)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"square images.*\(8, 9\)"):
        free(torch.randn(2, 1, 8, 9))
    wide = Terminator(1, 3, 8, (12,), resize=True, pixel_bias=False, mode="convolution", **SMALL)
    assert wide(torch.randn(2, 1, 8, 13)).shape == (2, 3)


@pytest.mark.parametrize("mode", ["matmul", "convolution"])
def test_global_branches_of_a_smooth_image_hardly_change_with_resolution(mode):
    options = {**SMALL, "omega0": 0.02, "local_sizes": (), "pixel_bias": False, "mode": mode}
    block = SFNEBlock(2, 6, 24, resize=True, groups=12, **options).double()

    def image(n: int) -> torch.Tensor:
        line = torch.linspace(-1, 1, n, dtype=torch.float64)
        waves = [torch.sin(2 * line[:, None] + a) * torch.cos(1.5 * line[None] - a) for a in (0.3, 1.0, 2.0, 0.7)]
        return torch.stack(waves).view(2, 2, n, n)

    coarse, fine = block(image(24)), block(image(47))[..., ::2, ::2]
    assert float(((coarse - fine).norm() / coarse.norm()).detach()) < 0.15


# --- losses ---


def test_the_slow_neural_loss_compares_all_pairs_of_blocks():
    kernels = [randn(1, 2, 3, 3), randn(1, 4, 3, 3), randn(1, 12, 3, 3)]
    sums = [kernel.sum(1).numpy() for kernel in kernels]
    expected = sum(((sums[j] - sums[i]) ** 2).mean() for i in range(3) for j in range(i))
    assert float(slow_neural_loss(kernels)) == pytest.approx(expected)
    tiled = [np.concatenate([k.numpy()] * (12 // k.shape[1]), 1) for k in kernels]
    pairs = [(tiled[0][:, :4], kernels[1].numpy()), (tiled[0], tiled[2]), (tiled[1], tiled[2])]
    expected = sum(((a - b) ** 2).mean() for a, b in pairs)
    assert float(slow_neural_loss(kernels, "tile", (2, 3, 5))) == pytest.approx(expected)
    assert float(slow_neural_loss(kernels, "tile")) == pytest.approx(expected)
    equal = [kernels[0], torch.cat([kernels[0], torch.zeros(1, 2, 3, 3)], 1)]
    assert float(slow_neural_loss(equal)) == 0.0
    assert float(slow_neural_loss(kernels)) == pytest.approx(float(slow_neural_loss(kernels[::-1])))
    with pytest.raises(ValueError, match=r"factors must lead through the kernels' channels \[2, 4, 12\], got \(2, 2\)"):
        slow_neural_loss(kernels, "tile", (2, 2))
    with pytest.raises(ValueError, match="kernels must not be empty"):
        slow_neural_loss([])


@pytest.mark.parametrize("mode", ["channel_sum", "tile"])
def test_the_slow_neural_loss_reaches_the_slow_nets_alone(mode):
    net = Terminator(1, 3, 6, (12, 2, 2), **SMALL)
    net.slow_loss(mode).backward()
    reached = {name for name, parameter in net.named_parameters() if parameter.grad is not None}
    assert reached == {
        name for name, _ in net.named_parameters() if ".slow_net." in name and name.split(".")[2] == "slow_net"
    }
    assert net.blocks[0].slow_net.weight.grad.any()


def test_the_penalty_sums_norms_of_mixers_in_full_and_of_slow_weights_a_little():
    block = SFNEBlock(4, 3, 4, local_sizes=(3,), **SMALL)
    named = dict(block.named_parameters())
    full = [
        named[f"{layer}.{part}"]
        for layer in ("mix", "bottleneck", "local_branches.0.mix")
        for part in ("weight", "bias")
    ]
    full.append(named["local_branches.0.bias"])
    expected = sum(float(parameter.detach().norm()) for parameter in full)
    assert norm_penalty(block, slow=0.0).item() == pytest.approx(expected, rel=1e-6)
    slow = [named[f"rgu_{which}.{part}.weight"] for which in ("slow", "fast") for part in "kvqy"]
    for net in ("slow_net", "interaction.spatial_net", "local_branches.0.slow_net"):
        slow += [*named[f"{net}.filter_weight"], *named[f"{net}.weight"], named[f"{net}.out_weight"]]
    net = "local_branches.0.slow_net"
    slow += [named[f"{net}.reduce.weight"], named[f"{net}.fc1.weight"], *named[f"{net}.gate_weight"]]
    expected += 1e-2 * sum(float(parameter.detach().norm()) for parameter in slow)
    assert norm_penalty(block, slow=1e-2).item() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="net must hold an SFNEBlock, got Linear"):
        norm_penalty(nn.Linear(2, 2))


# --- optimisers ---


@given(seed=st.integers(0, 10_000), lr=st.floats(1e-5, 1.0))
@settings(max_examples=20, deadline=None)
def test_kar_takes_the_signs_of_the_gradient_and_of_its_old_averages(seed, lr):
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(6, 5))
    gradients[2, 1] = 0.0
    for optimizer, betas in ((Kar3, (0.5, 0.95)), (Kar2, (0.95,))):
        parameter = nn.Parameter(torch.zeros(5, dtype=torch.float64))
        kar = optimizer([parameter], lr=lr)
        theta, averages = np.zeros(5), [np.zeros(5) for _ in betas]
        for step, gradient in enumerate(gradients):
            before = parameter.detach().clone().numpy()
            parameter.grad = torch.tensor(gradient)
            kar.step()
            theta = theta - lr * (np.sign(gradient) + sum(np.sign(average) for average in averages))
            averages = [beta * average + (1 - beta) * gradient for beta, average in zip(betas, averages)]
            np.testing.assert_allclose(parameter.detach().numpy(), theta, atol=1e-12)
            moved = np.abs(parameter.detach().numpy() - before)
            assert moved.max() <= (1 + len(betas)) * lr * (1 + 1e-9)
            if step == 0:
                np.testing.assert_allclose(parameter.detach().numpy(), -lr * np.sign(gradient))


def test_kar_resumes_takes_groups_closures_and_schedules():
    def problem():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        kar = Kar3([{"params": net[0].parameters(), "lr": 1e-2}, {"params": net[2].parameters()}], lr=1e-3)
        return net, kar

    def train(net, kar, steps):
        x = torch.linspace(-1, 1, 12).view(4, 3)

        def closure():
            kar.zero_grad()
            loss = net(x).sub(x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            return loss

        return [kar.step(closure).item() for _ in range(steps)]

    net, kar = problem()
    losses = train(net, kar, 8)
    assert losses[-1] < losses[0]
    half, kar_half = problem()
    train(half, kar_half, 4)
    other, kar_other = problem()
    other.load_state_dict(half.state_dict())
    kar_other.load_state_dict(kar_half.state_dict())
    assert train(other, kar_other, 4) == losses[4:]
    torch.optim.lr_scheduler.LinearLR(kar_other)


def test_kar_refuses_what_it_cannot_do():
    parameter = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"lr must not be negative, got -1\.0"):
        Kar3([parameter], lr=-1.0)
    with pytest.raises(ValueError, match=r"betas must lie in \[0, 1\), got \(0.5, 1.0\)"):
        Kar3([parameter], betas=(0.5, 1.0))
    with pytest.raises(ValueError, match=r"betas must lie in \[0, 1\), got 1.0"):
        Kar2([parameter], beta=1.0)
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="Kar3 does not take sparse gradients"):
        Kar3(table.parameters()).step()


# --- as a whole ---


def test_a_network_learns_with_the_whole_loss_and_kar():
    torch.manual_seed(0)
    net = Terminator(1, 2, 6, (12, 2), **{**SMALL, "omega0": 100.0})
    x = torch.randn(32, 1, 6, 6)
    labels = (x[:, 0, :, :3].mean((1, 2)) > x[:, 0, :, 3:].mean((1, 2))).long()
    kar = Kar3(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(25):
        kar.zero_grad()
        loss = F.cross_entropy(net(x), labels, label_smoothing=0.1) + net.slow_loss() + 4e-5 * norm_penalty(net)
        loss.backward()
        kar.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


def test_autocast_mixes_in_half_precision_and_generates_kernels_in_single():
    net = Terminator(1, 3, 8, (12, 2), **{**SMALL, "omega0": 2000.0, "dropout": [0.0, 0.0]})
    x = torch.randn(8, 1, 8, 8)
    expected = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(x)
    found.float().square().mean().backward()
    assert float((found.float() - expected).norm() / expected.norm()) < 0.1
    assert net.blocks[0].slow_net.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SFNEBlock(4, 0, 4), "factor must be at least 1, got 0"),
        (lambda: SFNEBlock(4, 3, (4, 5)), r"square images.*\(4, 5\)"),
        (lambda: SFNEBlock(4, 3, 4, skip_channels=(3,)), "skip_channels must divide channels = 4, got 3"),
        (lambda: SFNEBlock(4, 3, 4, local_sizes=(4,)), "kernel_size must be odd, got 4"),
        (lambda: SFNEBlock(4, 3, 4, per_sample=True, running=True), "choose one"),
        (lambda: SFNEBlock(4, 3, 4, skip_channels=(2,))(torch.zeros(1, 4, 4, 4)), "needs 1 earlier outputs, got 0"),
        (
            lambda: SFNEBlock(4, 3, 4, skip_channels=(2,))(torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 4)),
            r"earlier output must be \(1, 2, 4, 4\), got shape \(1, 4, 4, 4\)",
        ),
        (lambda: Terminator(3, 10, 8, ()), "must not be empty"),
        (lambda: Terminator(3, 10, 8, (4, 3), layers=(2,)), "layers must have one entry for each of 2 factors, got 1"),
        (lambda: Terminator(3, 10, 8, (4, 3), skips=((), (1,))), r"skips must name earlier blocks.*\[1\]"),
    ],
)
def test_blocks_that_cannot_work_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_width_that_twelve_does_not_divide_takes_fewer_groups():
    with pytest.warns(UserWarning, match="8 channels do not divide into 12 groups: 8 taken"):
        block = SFNEBlock(4, 2, 4, **SMALL)
    assert isinstance(block.norm, GroupInstanceBatchStd)
    assert block.norm.groups == 8

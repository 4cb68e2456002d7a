"""Terminator against the reference's way to compute it: each branch by itself, all of them side by side, then mixed.

The reference code (Terminator of July 2024) has no package. `unfused_block` does what it does, operation by operation,
with the parameters of our block: four products for each gate, torch's normalisations, depthwise and 1x1 convolutions in
torch's default layout, earlier outputs repeated, and a concatenation of ten to twelve times the input. The authors' own
code, run apart, gives the same outputs, losses and gradients; on the CIFAR network at batch 16 its training step took
2.2 times as long as ours, and ours kept half as many bytes for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import Pair
from torch import Tensor, nn
from torch.nn import functional as F

from lathe.nn.hyper_zzw import ContextSlowNet, HyperConv1d, SFNEBlock, SlowNet, Terminator

REFERENCE = "reference formulation (unfused, concatenated)"


def conv1x1(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.conv2d(x, layer.weight[..., None, None], layer.bias)


def unfused_slow_net(net: SlowNet | ContextSlowNet, context: Tensor | None = None) -> Tensor:
    """One 1x1 convolution after the other over the grid; (1, out, *size)."""
    lines = [torch.linspace(-1, 1, n, dtype=torch.float64) for n in net.size]
    grid = torch.stack(torch.meshgrid(*lines, indexing="ij"))[None]
    ones = (1,) * len(net.size)
    convolve = {1: F.conv1d, 2: F.conv2d}[len(net.size)]

    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return convolve(x, weight.view(*weight.shape, *ones), bias)

    def sine(i: int) -> Tensor:
        phases = linear(grid, net.filter_weight[i].double(), net.filter_bias[i].double())
        return phases.sin().to(net.weight.dtype)

    h = sine(0)
    for i in range(net.layers):
        h = sine(i + 1) * linear(h, net.weight[i], net.bias[i]) + net.pixel_bias.expand_as(h)
        if isinstance(net, ContextSlowNet):
            shape = (-1, *ones)
            norm = h.flatten(2).norm(dim=2).clamp(min=1e-12).view(1, *shape)
            h = net.renorm_alpha[i].view(shape) * h.detach() + net.renorm_beta[i].view(shape) * h / norm
            pooled = F.adaptive_avg_pool2d(context, net.size)
            u = linear(pooled, net.reduce.weight, net.reduce.bias).mean(0, keepdim=True)
            u = F.gelu(linear(u, net.fc1.weight, net.fc1.bias))
            h = h * linear(u, net.gate_weight[i], net.gate_bias[i])
    return linear(h, net.out_weight, net.out_bias)


def unfused_block(block: SFNEBlock, x: Tensor, *earlier: Tensor) -> Tensor:
    """The block of a 2-D network in "matmul" mode, as the reference computes it."""

    def batch_std(x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)

    def rgu(unit: nn.Module, x: Tensor) -> Tensor:
        q = conv1x1(x, unit.k) * conv1x1(conv1x1(x, unit.v), unit.q)
        q = F.gelu(F.instance_norm(q)) + unit.pixel_bias.expand(len(x), x.shape[1], -1, -1)
        return conv1x1(q, unit.y)

    def scores(net: SlowNet, y: Tensor) -> Tensor:
        y = y.mean((2, 3))
        return (y * unfused_slow_net(net)[0] * y)[..., None, None]

    weights = x * unfused_slow_net(block.slow_net)
    fast = F.instance_norm(rgu(block.rgu_slow, weights) + rgu(block.rgu_fast, x))
    m = F.instance_norm(conv1x1(x, block.mix))
    c = F.instance_norm(x * scores(block.channel_interaction.slow_net, x).sigmoid())
    o, o_m, o_c = weights @ fast, weights @ m, weights @ c
    y = o.mean(1, keepdim=True)
    spatial = y * unfused_slow_net(block.interaction.spatial_net) * y
    hyper = x * (spatial * scores(block.interaction.channel.slow_net, o)).sigmoid()
    local = []
    for branch, (context, z) in zip(block.local_branches, ((x, c), (c, x), (m, x), (x, m))):
        kernel = unfused_slow_net(branch.slow_net, context).transpose(0, 1)
        padding = [each // 2 for each in branch.slow_net.size]
        z = conv1x1(F.conv2d(z, kernel, padding=padding, groups=len(kernel)), branch.mix)
        local.append(F.gelu(batch_std(z)) + branch.bias)
    tiled = [each.repeat(1, x.shape[1] // each.shape[1], 1, 1) for each in earlier]
    total = conv1x1(torch.cat([o, o_m, o_c, o.sigmoid() * o, fast, hyper, *local, *tiled], 1), block.bottleneck)
    groups = total.split(total.shape[1] // block.norm.groups, 1)
    total = torch.cat([F.instance_norm(each) if i % 2 else batch_std(each) for i, each in enumerate(groups)], 1)
    return F.dropout2d(F.gelu(total) + block.bias, block.dropout, block.training)


def unfused_network(net: Terminator, x: Tensor) -> Tensor:
    outputs: list[Tensor] = []
    for i, (block, skips) in enumerate(zip(net.blocks, net.skips)):
        entry = outputs[-1] + net.shifts[i - 1] if outputs else x
        outputs.append(unfused_block(block, entry, *(outputs[j] for j in skips)))
    return net.head(outputs[-1].mean((2, 3)) + net.shifts[-1])


def pairs() -> list[Pair]:
    """Training steps of the whole network and of its parts, then what is kept and what is long."""
    torch.manual_seed(0)
    return [
        training("CIFAR network, 1.3M parameters, 32x32, batch 8", 3, 32, (4, 3, 2, 2, 2), (3, 9, 5, 7), 8),
        training("digits network, 95k parameters, 8x8, batch 64", 1, 8, (12, 2, 2), (3, 7, 5, 5), 64),
        block_step(),
        inference(),
        long_kernel(),
    ]


def training(
    title: str, channels: int, size: int, factors: tuple[int, ...], local_sizes: tuple[int, ...], batch: int
) -> Pair:
    """Forward and backward pass; the gradients of all parameters must agree."""
    # Frequencies of 2000 make rounding visible in gradients of phases, which are of the order of 1e5.
    net = Terminator(channels, 10, size, factors, local_sizes=local_sizes, dropout=[0.0] * len(factors), omega0=10.0)
    x, labels = torch.randn(batch, channels, size, size), torch.randint(10, (batch,))
    parameters = [*net.parameters()]

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    def step(forward: Callable[[], Tensor]) -> Callable[[], Any]:
        def run() -> Any:
            value = loss(forward())
            gradients = torch.autograd.grad(value, parameters)
            return value, torch.cat([gradient.flatten() for gradient in gradients])

        return run

    return Pair(
        f"training step of the {title}",
        step(lambda: net(x)),
        step(lambda: unfused_network(net, x)),
        REFERENCE,
        target=1.8,
        tolerance=1e-3,
        saved_memory=True,
        memory_target=0.6,
    )


def block_step() -> Pair:
    """The third block at batch 64, forward alone, where the concatenation shows most."""
    block = SFNEBlock(36, 2, 32, skip_channels=(12,), omega0=10.0)
    x, earlier = torch.randn(64, 36, 32, 32), torch.randn(64, 12, 32, 32)

    def forward(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                return function()

        return run

    return Pair(
        "forward pass of the third CIFAR block, 36 channels, 32x32, batch 64",
        forward(lambda: block(x, earlier)),
        forward(lambda: unfused_block(block, x, earlier)),
        REFERENCE,
        target=1.5,
        tolerance=1e-4,
    )


def inference() -> Pair:
    """One sample at a time in eval(), with running averages: generated kernels are kept."""
    net = Terminator(3, 10, 32, (4, 3), running=True, omega0=10.0)
    net(torch.randn(8, 3, 32, 32))
    net.eval()
    x = torch.randn(1, 3, 32, 32)

    @torch.no_grad()
    def ours() -> Tensor:
        return net(x)

    @torch.no_grad()
    def reference() -> Tensor:
        return unfused_network(net, x)

    # Not the same answer: the reference can only use the statistics of the one sample.
    return Pair("inference of two blocks, batch 1", ours, reference, REFERENCE, target=1.5, tolerance=None)


def long_kernel() -> Pair:
    """A sequence of 1,024 with a kernel as long as it, by FFT and by torch's convolution."""
    layer = HyperConv1d(32, 32, 1023, context=False, omega0=10.0)
    x = torch.randn(4, 32, 1024)

    @torch.no_grad()
    def reference() -> Tensor:
        kernel = layer.slow_net()[0, :, None]
        return F.conv1d(F.conv1d(x, layer.weight), kernel, layer.bias, padding=511, groups=32)

    @torch.no_grad()
    def ours() -> Tensor:
        return layer(x)

    return Pair(
        "1-D convolution with a generated kernel of 1,023, length 1,024, 32 channels",
        ours,
        reference,
        f"torch {torch.__version__} conv1d",
        target=1.5,
        tolerance=1e-4,
    )

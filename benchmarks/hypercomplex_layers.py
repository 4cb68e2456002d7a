"""Hypercomplex layers against the reference's way to build their weight, and against torch's own convolution.

The reference code (eleGAN23/HyperNets) makes n full-size tensors, one for each Kronecker product, and adds them up, at
every forward pass in training and in evaluation. What that saves and costs depends on how much work the convolution
itself has: the weight is made once a step, whatever the batch and the size of the maps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import Pair
from torch import Tensor, nn
from torch.nn import functional

from lathe.nn.hypercomplex_layers import PHConv2d, PHLinear, kronecker_sum

REFERENCE = "reference formulation (outer products, summed)"


def outer_products(A: Tensor, F: Tensor) -> Tensor:
    """Each of the n Kronecker products in full, then their sum."""
    n, rows, columns = A.shape
    _, p, q, *kernel = F.shape
    products = A.view(n, rows, 1, columns, 1, *[1] * len(kernel)) * F.unsqueeze(1).unsqueeze(3)
    return products.reshape(n, rows * p, columns * q, *kernel).sum(0)


def pairs() -> list[Pair]:
    """What Lathe and the reference do for the same layer, then what the layer costs beside an ordinary one."""
    torch.manual_seed(0)
    found = [building(256, 256, 3, 4, target=3.0), building(512, 512, 3, 4, target=3.0)]
    found += [
        # 256 and 512 channels on 4 x 4 maps: the last stages of CIFAR-sized ResNets, where most of the weights are.
        training(256, size=4, batch=32, n=4, target=1.3),
        training(512, size=4, batch=32, n=4, target=1.3),
        training(256, size=4, batch=32, n=2, target=1.3),
        training(512, size=7, batch=8, n=4, target=1.3),
        # Where the convolution itself takes nearly all of the time: no slower, within the noise of timing.
        training(256, size=8, batch=32, n=4, target=1.0),
        ceiling(256, size=8, batch=32, n=4),
        training(64, size=16, batch=32, n=4, target=0.97),
        ceiling(64, size=16, batch=32, n=4),
    ]
    found += [inference(256, size=4, batch=1, n=4, target=1.0), inference(64, size=16, batch=32, n=4, target=1.0)]
    found += [few_rows(), *beside_plain()]
    return found


def building(s: int, d: int, k: int, n: int, target: float) -> Pair:
    """The weight alone, as a training step makes it."""
    A, F = torch.randn(n, n, n, requires_grad=True), torch.randn(n, s // n, d // n, k, k, requires_grad=True)
    return Pair(
        f"weight {s}x{d}x{k}x{k}, n={n}: build",
        lambda: kronecker_sum(A, F),
        lambda: outer_products(A, F),
        REFERENCE,
        target=target,
        saved_memory=True,
    )


def step(layer: PHConv2d, x: Tensor, weight: Callable[[], Tensor]) -> Callable[[], Any]:
    """Forward and backward pass; returns what both formulations must agree on."""
    learnt = [x, layer.A, layer.F]

    def run() -> Any:
        y = functional.conv2d(x, weight(), padding=1)
        return torch.autograd.grad(y.square().mean(), learnt)

    return run


def training(channels: int, *, size: int, batch: int, n: int, target: float) -> Pair:
    """Forward and backward pass of a 3x3 convolution, gradients of input, A and F."""
    layer = PHConv2d(channels, channels, 3, padding=1, bias=False, n=n)
    assert layer.F is not None
    A, F = layer.A, layer.F
    x = torch.randn(batch, channels, size, size, requires_grad=True)
    return Pair(
        f"training step {channels}->{channels} 3x3 on {size}x{size}, batch {batch}, n={n}",
        step(layer, x, lambda: layer.weight),
        step(layer, x, lambda: outer_products(A, F)),
        REFERENCE,
        target=target,
        tolerance=1e-3,
    )


def ceiling(channels: int, *, size: int, batch: int, n: int) -> Pair:
    """The same step with a weight that is there already, against the reference: no way to build it can gain more."""
    layer = PHConv2d(channels, channels, 3, padding=1, bias=False, n=n)
    assert layer.F is not None
    A, F = layer.A, layer.F
    x = torch.randn(batch, channels, size, size, requires_grad=True)
    weight = layer.weight.detach().requires_grad_()

    def alone() -> Any:
        y = functional.conv2d(x, weight, padding=1)
        return torch.autograd.grad(y.square().mean(), [x, weight])[:1]

    title = f"convolution alone {channels}->{channels} 3x3 on {size}x{size}, batch {batch}: the ceiling"
    reference = step(layer, x, lambda: outer_products(A, F))
    return Pair(title, alone, lambda: reference()[:1], REFERENCE, tolerance=1e-3)


def inference(channels: int, *, size: int, batch: int, n: int, target: float) -> Pair:
    """In eval(), where Lathe keeps the weight and the reference builds it at every call."""
    layer = PHConv2d(channels, channels, 3, padding=1, bias=False, n=n).eval()
    assert layer.F is not None
    A, F = layer.A, layer.F
    x = torch.randn(batch, channels, size, size)

    @torch.no_grad()
    def ours() -> Tensor:
        return layer(x)

    @torch.no_grad()
    def reference() -> Tensor:
        return functional.conv2d(x, outer_products(A, F), padding=1)

    return Pair(
        f"inference {channels}->{channels} 3x3 on {size}x{size}, batch {batch}, n={n}",
        ours,
        reference,
        REFERENCE,
        target=target,
    )


def few_rows() -> Pair:
    """A linear layer trained on few rows, as in fine-tuning heads and recurrent steps: the weight is never made."""
    layer = PHLinear(1024, 1024, n=4)
    assert layer.F is not None
    A, F = layer.A, layer.F
    x = torch.randn(4, 1024, requires_grad=True)

    def gradients(y: Tensor) -> Any:
        return torch.autograd.grad(y.square().mean(), [x, A, F])

    return Pair(
        "training step of a linear layer 1024->1024, batch 4, n=4",
        lambda: gradients(layer(x)),
        lambda: gradients(functional.linear(x, outer_products(A, F), layer.bias)),
        REFERENCE,
        target=1.3,
        tolerance=1e-3,
    )


def beside_plain() -> list[Pair]:
    """What a hypercomplex layer costs beside `nn.Conv2d`: at most 1.25 times as much in training, the same folded."""
    layer = PHConv2d(64, 64, 3, padding=1, n=4)
    plain, folded = nn.Conv2d(64, 64, 3, padding=1), layer.fold()
    x = torch.randn(32, 64, 16, 16)
    learner = x.clone().requires_grad_()

    def train(module: nn.Module) -> Tensor:
        module.zero_grad()
        learner.grad = None
        y = module(learner)
        y.square().mean().backward()
        return y

    @torch.no_grad()
    def infer(module: nn.Module) -> Tensor:
        return module(x)

    title = "64->64 3x3 on 16x16, batch 32"
    peer = f"torch {torch.__version__} nn.Conv2d"
    return [
        Pair(f"training step {title}", lambda: train(layer), lambda: train(plain), peer, 1 / 1.25, tolerance=None),
        Pair(f"folded inference {title}", lambda: infer(folded), lambda: infer(plain), peer, 1 / 1.02, tolerance=None),
    ]

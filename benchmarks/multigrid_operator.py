"""The multigrid cycle against the authors' formulation of it, told in our words: a module for every convolution, each
padding for itself, sums out of place, memory in torch's default order. The spectral convolution, its baseline, against
the usual formulation. Forward and backward, with the same weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from harness import Pair
from torch import Tensor, nn

from lathe.operators.fourier import SpectralConv
from lathe.operators.multigrid_operator import REFERENCE, MgNO


class AuthorsCycle(nn.Module):
    """As in the authors' code: (u, f) handed from step to step, a list of levels, P without padding of its own."""

    def __init__(
        self, c_f: int, c_u: int, steps: list[tuple[int, int]], residual: bool, bias: bool, padding: str
    ) -> None:
        super().__init__()
        same: dict[str, Any] = {"kernel_size": 3, "padding": 1, "padding_mode": padding}
        self.residual, self.steps = residual, steps
        self.smoothers, self.operators = nn.ModuleList(), nn.ModuleList()
        self.restrictions, self.injections, self.prolongations = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for l, (before, after) in enumerate(steps):
            last = l == len(steps) - 1
            uses = before + after - (l == 0) + (residual and not last)
            self.smoothers.append(nn.ModuleList(nn.Conv2d(c_f, c_u, bias=bias, **same) for _ in range(before + after)))
            self.operators.append(nn.ModuleList(nn.Conv2d(c_u, c_f, bias=bias, **same) for _ in range(uses)))
            if not last:
                self.restrictions.append(nn.Conv2d(c_f, c_f, stride=2, bias=False, **same))
                self.injections.append(nn.Conv2d(c_u, c_u, stride=2, bias=False, **same))
                self.prolongations.append(nn.ConvTranspose2d(c_u, c_u, 4, stride=2, padding=1, bias=False))

    def forward(self, f: Tensor) -> Tensor:
        levels: list[tuple[Tensor, Tensor]] = []
        unused = []
        u = None
        for l, (before, _) in enumerate(self.steps):
            operators = iter(self.operators[l])
            for i in range(before):
                smoother = self.smoothers[l][i]
                u = smoother(f) if u is None else u + smoother(f - next(operators)(u))
            levels.append((u, f))
            if l < len(self.steps) - 1:
                f = self.restrictions[l](f - next(operators)(u) if self.residual else f)
                u = self.injections[l](u)
            unused.append(operators)
        for l in range(len(self.steps) - 2, -1, -1):
            u, f = levels[l]
            u = u + self.prolongations[l](levels[l + 1][0])
            for i in range(self.steps[l][0], sum(self.steps[l])):
                u = u + self.smoothers[l][i](f - next(unused[l])(u))
            levels[l] = (u, f)
        return levels[0][0]

    def copy(self, cycle: nn.Module) -> None:
        """Takes the weights of Lathe's layer."""
        for l, level in enumerate(cycle.levels):
            mine = [*self.smoothers[l], *self.operators[l]]
            theirs = [*level.smoothers, *level.operators]
            if l < len(self.steps) - 1:
                mine += [self.restrictions[l], self.injections[l], self.prolongations[l]]
                theirs += [level.restriction, level.injection, level.prolongation]
            for module, kernel in zip(mine, theirs, strict=True):
                module.load_state_dict(kernel.state_dict())


class AuthorsNetwork(nn.Module):
    """Cycle plus 1x1 convolution, GELU, and a 1x1 head."""

    def __init__(
        self, net: MgNO, channels: int, steps: list[tuple[int, int]], residual: bool, bias: bool, padding: str
    ) -> None:
        super().__init__()
        widths = [1] + [channels] * len(net.cycles)
        self.cycles = nn.ModuleList(
            AuthorsCycle(a, b, steps, residual, bias, padding) for a, b in itertools.pairwise(widths)
        )
        self.linear = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in itertools.pairwise(widths))
        self.head = nn.Conv2d(channels, 1, 1, bias=False)
        for mine, theirs in zip(self.cycles, net.cycles):
            mine.copy(theirs)
        self.linear.load_state_dict(net.skips.state_dict())
        self.head.load_state_dict(net.head.state_dict())

    def forward(self, v: Tensor) -> Tensor:
        for cycle, linear in zip(self.cycles, self.linear):
            v = nn.functional.gelu(cycle(v) + linear(v))
        return self.head(v)


class UsualSpectralConv(nn.Module):
    """Transform whole, multiply the two corners of kept modes by complex einsum into a spectrum of zeros, and back."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        half = weight.shape[2] // 2
        self.low, self.high = nn.Parameter(weight[:, :, half:].clone()), nn.Parameter(weight[:, :, :half].clone())

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.low.shape[2:]
        spectrum = torch.fft.rfft2(x, norm="forward")
        result = spectrum.new_zeros(x.shape[0], self.low.shape[1], *spectrum.shape[2:])
        result[:, :, :rows, :columns] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, :rows, :columns], self.low)
        result[:, :, -rows:, :columns] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, -rows:, :columns], self.high)
        return torch.fft.irfft2(result, s=x.shape[2:], norm="forward")


def training_step(
    net: nn.Module, x: Tensor, grad: Tensor, last: Callable[[nn.Module], Tensor]
) -> Callable[[], tuple[Tensor, ...]]:
    """One forward and backward; returns the output, and the gradients of the input and of one coarse kernel."""
    parameters = list(net.parameters())
    coarse = next(i for i, p in enumerate(parameters) if p is last(net))

    def run() -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        y = net(leaf)
        gradients = torch.autograd.grad(y, [leaf, *parameters], grad)
        return y.detach(), gradients[0], gradients[1 + coarse]

    return run


def pairs() -> list[Pair]:
    torch.manual_seed(0)
    found = []
    steps = [(1, 0)] * 4 + [(2, 0)]
    for title, channels, side, batch, depth, options in (
        ("Darcy network, public code's cycle, 24 channels, 64 x 64, batch 4", 24, 64, 4, 2, dict(REFERENCE)),
        ("Darcy network, residual restricted, 24 channels, 64 x 64, batch 4", 24, 64, 4, 2, {"residual": True}),
        (
            "residual restricted, defects recomputed, 24 channels, 64 x 64, batch 4",
            24,
            64,
            4,
            2,
            {"residual": True, "recompute": True},
        ),
        (
            "periodic network with biases, 32 channels, 64 x 64, batch 4",
            32,
            64,
            4,
            1,
            {"residual": True, "bias": True, "padding_mode": "circular"},
        ),
    ):
        net = MgNO(1, 1, channels, depth, steps=steps, **options)
        circular = options.get("padding_mode") == "circular"
        peer = AuthorsNetwork(
            net, channels, steps, options["residual"], options.get("bias", False), "circular" if circular else "zeros"
        )
        x, grad = torch.randn(batch, 1, side, side), torch.randn(batch, 1, side, side)
        found.append(
            Pair(
                f"forward and backward, {title}",
                ours=training_step(net, x, grad, lambda net: net.cycles[0].levels[-1].smoothers[-1].weight),
                peer=training_step(peer, x, grad, lambda net: net.cycles[0].smoothers[-1][-1].weight),
                peer_name="the authors' formulation",
                # Recomputing buys memory with one convolution a step.
                target=0.8 if options.get("recompute") else 1.0,
                # The authors' P has no periodic padding: there the answers differ near the border, by intention.
                tolerance=None if circular else 1e-4,
                saved_memory=True,
                memory_target=0.85 if options.get("recompute") else 1.0,
            )
        )
    spectral = SpectralConv(32, 32, (16, 16), bias=False)
    usual = UsualSpectralConv(spectral.complex_weight.detach())
    x, grad = torch.randn(8, 32, 64, 64), torch.randn(8, 32, 64, 64)

    def both(layer: nn.Module) -> Callable[[], tuple[Tensor, ...]]:
        parameters = list(layer.parameters())

        def run() -> tuple[Tensor, ...]:
            leaf = x.detach().requires_grad_()
            y = layer(leaf)
            return y.detach(), torch.autograd.grad(y, [leaf, *parameters], grad)[0]

        return run

    found.append(
        Pair(
            "forward and backward, spectral convolution, 32 channels, 16 x 16 modes, 64 x 64, batch 8",
            ours=both(spectral),
            peer=both(usual),
            peer_name="the usual formulation",
            saved_memory=True,
            memory_target=1.01,
        )
    )
    return found

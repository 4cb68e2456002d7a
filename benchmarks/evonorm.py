"""The fused EvoNorm layers against timm's, and against what they replace: forward and backward, (32, 64, 32, 32)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from harness import Pair, PeerMissing
from torch import Tensor, nn

from lathe.nn import evonorm

TIMM = "timm==1.0.31"


def timm_evo_norm() -> ModuleType:
    """`timm.layers.evo_norm` alone: the whole of timm wants torchvision, this file of it does not."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        raise PeerMissing(f"pip install --no-deps {TIMM}")
    saved = {name: sys.modules.pop(name) for name in list(sys.modules) if name == "timm" or name.startswith("timm.")}
    try:
        for name, folder in (("timm", Path(spec.origin).parent), ("timm.layers", Path(spec.origin).parent / "layers")):
            bare = ModuleType(name)
            bare.__path__ = [str(folder)]
            sys.modules[name] = bare
        return importlib.import_module("timm.layers.evo_norm")
    finally:
        for name in [name for name in sys.modules if name == "timm" or name.startswith("timm.")]:
            del sys.modules[name]
        sys.modules.update(saved)


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """One forward and backward pass: the output, then the gradients of the input, the weight and the bias."""

    def run() -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        y = layer(leaf)
        parameters = [parameter for name, parameter in layer.named_parameters() if name.endswith(("weight", "bias"))]
        return (y.detach(), *torch.autograd.grad(y, [leaf, *parameters], grad))

    return run


def away_from_ties(x: Tensor) -> Tensor:
    """x without values at which the max of a B layer is a tie: there rounding would decide which gradient is right."""
    s_b, s_i = (x.std(axes, correction=0, keepdim=True) for axes in ((0, 2, 3), (2, 3)))
    r_i = x.square().mean((2, 3), keepdim=True).sqrt()
    lines = torch.stack([x + s_i, (x + 1) * r_i, r_i - x])
    return torch.where(((lines - s_b).abs() < 1e-4).any(0), x + 1e-3, x)


def pairs() -> list[Pair]:
    timm = timm_evo_norm()
    generator = torch.Generator().manual_seed(0)
    x = away_from_ties(torch.randn(32, 64, 32, 32, generator=generator))
    grad = torch.randn(x.shape, generator=generator)
    found = []
    for name in ("B0", "B1", "B2", "S0", "S1", "S2"):
        ours, theirs = getattr(evonorm, f"EvoNorm{name}")(64), getattr(timm, f"EvoNorm2d{name}")(64, eps=1e-5)
        found.append(
            Pair(
                f"EvoNorm-{name}, forward and backward, (32, 64, 32, 32)",
                ours=step(ours, x, grad),
                peer=step(theirs, x, grad),
                peer_name="timm 1.0.31",
                target=1.5,
                saved_memory=True,
                memory_target=0.5,
            )
        )
    for name in ("B0", "S0"):
        found.append(
            Pair(
                f"EvoNorm-{name} against the usual pair, forward and backward, (32, 64, 32, 32)",
                ours=step(getattr(evonorm, f"EvoNorm{name}")(64), x, grad),
                peer=step(nn.Sequential(nn.BatchNorm2d(64), nn.ReLU()), x, grad),
                peer_name="nn.BatchNorm2d + nn.ReLU",
                target=0.5,
                tolerance=None,
                saved_memory=True,
            )
        )
    last = x.contiguous(memory_format=torch.channels_last)
    last_grad = grad.contiguous(memory_format=torch.channels_last)
    for name in ("B0", "S0"):
        ours, theirs = getattr(evonorm, f"EvoNorm{name}")(64), getattr(timm, f"EvoNorm2d{name}")(64, eps=1e-5)
        found.append(
            Pair(
                f"EvoNorm-{name}, channels last, forward and backward, (32, 64, 32, 32)",
                ours=step(ours, last, last_grad),
                peer=step(theirs, last, last_grad),
                peer_name="timm 1.0.31",
                target=1.5,
                saved_memory=True,
                memory_target=0.5,
            )
        )
    return found

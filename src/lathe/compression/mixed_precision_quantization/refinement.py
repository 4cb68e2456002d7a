"""Scales learnt after calibration: Adam on their logarithms, weights frozen, rounding passed straight through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lathe.compression.mixed_precision_quantization.calibration import as_batches
from lathe.compression.mixed_precision_quantization.quantizers import levels
from lathe.compression.mixed_precision_quantization.simulation import SimulatedLayer, Simulator
from lathe.core.example import call

__all__ = ["refine_scales"]


def refine_scales(
    simulator: Simulator,
    batches: Any,
    bits: int,
    steps: int,
    *,
    loss_fn: Callable[..., Tensor] | None = None,
    lr: float = 1e-4,
) -> list[float]:
    """Refines the clips of all weights and inputs at `bits` bits, with every layer at `bits`; returns the losses.

    Args:
        loss_fn: `loss_fn(output, *targets)`; None takes the squared distance to the unquantised network's output, which
            needs no targets.
        lr: of Adam, on logarithms: 1e-4 moves a clip by at most about 0.01 % a step.
    """
    data = as_batches(batches, name="batches")
    kept = simulator.config
    layers = list(dict.fromkeys(simulator.layers.values()))
    logs = [tuple(clip.float().log().clone().requires_grad_(True) for clip in layer.clip(bits)) for layer in layers]
    optimizer = torch.optim.Adam([each for pair in logs for each in pair], lr=lr)
    losses: list[float] = []
    for layer, (weight, input) in zip(layers, logs):
        layer.forward = _Learnable(layer, bits, weight, input)  # type: ignore[method-assign]
    try:
        for step in range(steps):
            inputs, *targets = data[step % len(data)]
            with torch.enable_grad():
                output = call(simulator, inputs)
                if loss_fn is not None:
                    loss = loss_fn(output, *targets)
                else:
                    loss = _distance(output, _plain(simulator, layers, inputs))
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
        simulator.configure(kept)
    with torch.no_grad():
        for layer, (weight, input) in zip(layers, logs):
            layer.set_clip(bits, weight.exp(), input.exp())
    return losses


class _Learnable:
    """A simulated layer's forward with scales that take part in the gradient."""

    def __init__(self, layer: SimulatedLayer, bits: int, weight: Tensor, input: Tensor) -> None:
        self.layer, self.bits, self.weight, self.input, self.off = layer, bits, weight, input, False

    def __call__(self, x: Tensor) -> Tensor:
        if self.off:
            return self.layer.layer(x)
        low, high = levels(self.bits, self.layer.range.signed)
        values = _rounded(x.float(), self.input.exp() / high, low, high)
        weight = self.layer.weight.detach().float()
        low, high = levels(self.bits)
        scale = (self.weight.exp() / high).reshape(-1, *[1] * (weight.ndim - 1))
        bias = None if self.layer.bias is None else self.layer.bias.float()
        return self.layer.map(values, _rounded(weight, scale, low, high), bias).to(x.dtype)


def _rounded(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    codes = (x / scale).clamp(low, high)
    return (codes + (codes.round() - codes).detach()) * scale


def _plain(simulator: Simulator, layers: list[SimulatedLayer], inputs: Any) -> Any:
    """The unquantised network's output."""
    learnable = [each for layer in layers if isinstance(each := layer.forward, _Learnable)]
    for each in learnable:
        each.off = True
    try:
        with torch.no_grad():
            return call(simulator, inputs)
    finally:
        for each in learnable:
            each.off = False


def _distance(output: Any, target: Any) -> Tensor:
    pairs = [
        (a, b)
        for a, b in zip(tree_leaves(output), tree_leaves(target))
        if isinstance(a, Tensor) and a.is_floating_point()
    ]
    losses = [nn.functional.mse_loss(a.float(), b.float()) for a, b in pairs]
    return torch.stack(losses).sum()

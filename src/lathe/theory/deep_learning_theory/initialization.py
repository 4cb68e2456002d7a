"""Critical initialisation and learning rates, for the networks that people bring."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lathe.core.gaussian import Activation, ActivationLike, activation
from lathe.theory.deep_learning_theory.criticality import CriticalPoint, critical_point
from lathe.theory.deep_learning_theory.layers import WeightLayer, weight_layers

__all__ = ["Initialized", "critical_init_", "critical_param_groups", "layer_rates"]


@dataclass(frozen=True)
class Initialized:
    """One layer as `critical_init_` left it."""

    name: str
    activation: str
    C_b: float
    C_W: float
    fan_in: int


@torch.no_grad()
def critical_init_(
    module: nn.Module,
    act: ActivationLike | None = None,
    residual_gamma: float | None = None,
    generator: torch.Generator | None = None,
    *,
    readout: bool = True,
) -> list[Initialized]:
    """Draws all linear layers and convolutions of a network at the critical point of the activation that feeds each.

    Weights get the standard deviation `sqrt(C_W / fan_in)`, biases `sqrt(C_b)`. The first layer, which sees the raw
    input, takes the values of the network's first activation; for activations with `K* > 0` (GELU, SWISH) scale the
    input so that `C_b + C_W |x|^2 / n_0` is near `K*`.

    Args:
        module: any network; its graph is read by torch.fx to find which activation feeds which layer.
        act: the activation of all layers, in place of what the graph says (and where there is no graph to be had).
        residual_gamma: weight of the skip connections. The layer that closes a residual branch takes
            `C_W (1 - gamma^2)`, which keeps `z' = gamma z + branch(z)` critical (scale-invariant activations).
        readout: also draw the last layer.

    Raises:
        NoCriticalPoint: where an activation has no critical point.
        TypeError: where the network cannot be traced and `act` is not given.
        ValueError: for `residual_gamma` outside [0, 1], or where it is given and no layer closes a branch.

    Warns:
        UserWarning: where the critical point has biases and a layer has none.
    """
    if residual_gamma is not None and not 0 <= residual_gamma <= 1:
        raise ValueError(f"residual_gamma must lie in [0, 1], got {residual_gamma}")
    layers = weight_layers(module, act, graph=act is None or residual_gamma is not None)
    if residual_gamma is not None and not any(layer.closes_branch for layer in layers):
        raise ValueError("residual_gamma was given, but no layer's output is added to a skip connection")
    first = _first_activation(layers, act)
    # All points before any weight: an activation without one must leave the network as it was.
    points: dict[Activation, CriticalPoint] = {}
    plan: list[tuple[WeightLayer, Activation, CriticalPoint]] = []
    for layer in layers if readout else layers[:-1]:
        feeding = layer.activation or first
        if feeding not in points:
            points[feeding] = critical_point(feeding)
        if residual_gamma and points[feeding].universality != "scale-invariant":
            raise ValueError(f"residual_gamma needs scale-invariant activations, got {feeding.name} at {layer.name!r}")
        plan.append((layer, feeding, points[feeding]))
    done = []
    for layer, feeding, point in plan:
        C_W = point.C_W * (1 - residual_gamma**2) if residual_gamma and layer.closes_branch else point.C_W
        weight, bias = layer.module.weight, layer.module.bias
        assert isinstance(weight, torch.Tensor)
        weight.normal_(0.0, math.sqrt(C_W / layer.fan_in), generator=generator)
        if isinstance(bias, torch.Tensor):
            bias.normal_(0.0, math.sqrt(point.C_b), generator=generator) if point.C_b > 0 else bias.zero_()
        elif point.C_b > 0:
            warnings.warn(f"{layer.name!r} has no bias, but {feeding.name} is critical with C_b > 0", stacklevel=2)
        done.append(Initialized(layer.name, feeding.name, point.C_b, C_W, layer.fan_in))
    return done


def critical_param_groups(model: nn.Module, lr: float, act: ActivationLike | None = None) -> list[dict[str, Any]]:
    """Parameter groups for plain SGD by which every layer moves the output equally, at any depth (book, chapter 9).

    Weights of layer `l` of `L` get `lr lambda_W / fan_in`, biases `lr lambda_b`, with the `lambda`s of `layer_rates`;
    parameters of other modules get `lr / L`. A good global `lr` then stays good when the network gets deeper or wider.

    Raises:
        ValueError: for `lr <= 0`; NoCriticalPoint and TypeError as `critical_init_`.
    """
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr}")
    layers = weight_layers(model, act)
    point = critical_point(_first_activation(layers, act))
    groups, seen = [], set()
    for number, layer in enumerate(layers, 1):
        lambda_b, lambda_W = layer_rates(point, number, len(layers))
        for parameter, rate in ((layer.module.weight, lambda_W / layer.fan_in), (layer.module.bias, lambda_b)):
            if isinstance(parameter, nn.Parameter) and id(parameter) not in seen:
                seen.add(id(parameter))
                groups.append({"params": [parameter], "lr": lr * rate})
    others = [parameter for parameter in model.parameters() if id(parameter) not in seen]
    if others:
        groups.append({"params": others, "lr": lr / len(layers)})
    return groups


def layer_rates(point: CriticalPoint, layer: int, layers: int) -> tuple[float, float]:
    """`(lambda_b, lambda_W)` of layer `layer` (from 1) of `layers`, with which all contribute equally to the NTK.

    Scale invariance: both `1/L`. Class `K* = 0`: `L^(p-1) l^-p` and `(L/l)^(p-1)`, `p = p_perp`, as the kernel decays.
    Half-stable points keep their kernel, as scale invariance does, and get its rates.
    """
    if point.universality != "K*=0" or point.p_perp is None:
        return 1 / layers, 1 / layers
    p = point.p_perp
    return layers ** (p - 1) * layer**-p, (layers / layer) ** (p - 1)


def _first_activation(layers: list[WeightLayer], act: ActivationLike | None) -> Activation:
    if act is not None:
        return activation(act)
    return next((layer.activation for layer in layers if layer.activation is not None), activation("linear"))

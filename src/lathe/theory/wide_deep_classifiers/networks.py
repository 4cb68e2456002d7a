"""Networks of finite width whose kernels the theory predicts."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lathe.core.gaussian import ActivationLike, activation
from lathe.theory.wide_deep_classifiers.dual import DualActivation

__all__ = ["wide_deep_mlp"]


def wide_deep_mlp(
    in_features: int,
    out_features: int,
    phi: ActivationLike,
    width: int,
    depth: int,
    *,
    centre: bool = False,
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """A multi-layer perceptron without biases, in the NTK parametrisation, whose kernels tend to `nngp` and `ntk`.

    Weights are standard normal and divided by `sqrt(width)` when they are used; the first layer's are not, as inputs
    have norm one. `phi` is scaled to `E phi^2 = 1`. Plain gradient descent with a learning rate below
    `2 / lambda_max(K_L)` fits it in the kernel regime.

    Args:
        depth: hidden layers, from 0.
        centre: subtract the mean of `phi`, which moves ReLU and the like out of the majority class.
        generator: for the weights.

    Raises:
        ValueError: for sizes below 1, a negative depth, or a `phi` that cannot be scaled (see `DualActivation`).
    """
    for name, size, least in (
        ("in_features", in_features, 1), ("out_features", out_features, 1), ("width", width, 1), ("depth", depth, 0),
    ):  # fmt: skip
        if size < least:
            raise ValueError(f"{name} must be at least {least}, got {size}")
    dual = DualActivation(phi, centre=centre)
    module = phi if isinstance(phi, nn.Module) else None
    layers: list[nn.Module] = []
    fan_in, scale = in_features, 1.0
    for _ in range(depth):
        layers += [_ScaledLinear(fan_in, width, scale, generator), _Normalized(phi, module, dual.mean, dual.factor)]
        fan_in, scale = width, 1 / math.sqrt(width)
    return nn.Sequential(*layers, _ScaledLinear(fan_in, out_features, scale, generator))


class _ScaledLinear(nn.Module):
    def __init__(self, in_features: int, out_features: int, scale: float, generator: torch.Generator | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features, generator=generator))
        self.scale = scale

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        return nn.functional.linear(x, self.weight) * self.scale

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"in_features={in_features}, out_features={out_features}, scale={self.scale:.4g}"


class _Normalized(nn.Module):
    """`(phi - mean) / factor`."""

    def __init__(self, phi: ActivationLike, module: nn.Module | None, mean: float, factor: float) -> None:
        super().__init__()
        self.module, self.mean, self.factor = module, mean, factor
        self._phi = None if module is not None else activation(phi)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        value = self.module(x) if self.module is not None else self._phi(x)  # type: ignore[misc]
        return (value - self.mean) / self.factor

"""Activations in a network that torch.fx has traced: as modules, functions and methods."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from lathe.core.gaussian.activation import Activation, activation

__all__ = ["activation_of"]

_ACTIVATION_MODULES = (
    *(nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Softsign, nn.Tanh, nn.Hardtanh, nn.ReLU6, nn.Sigmoid, nn.LogSigmoid, nn.Hardswish, nn.Hardsigmoid),
    *(nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Threshold),
)
_ACTIVATION_FUNCTIONS: frozenset[Any] = frozenset(
    (
        *(
            torch.abs,
            torch.exp,
            torch.square,
            torch.relu,
            torch.tanh,
            torch.sin,
            torch.cos,
            torch.erf,
            torch.sigmoid,
            torch.selu,
            torch.special.erf,
        ),
        *(F.relu, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.softplus, F.softsign, F.tanh),
        *(F.hardtanh, F.relu6, F.sigmoid, F.logsigmoid, F.hardswish, F.hardsigmoid),
    )
)
_ACTIVATION_METHODS = {"relu": "relu", "tanh": "tanh", "sin": "sin", "cos": "cos", "erf": "erf", "sigmoid": "sigmoid"}


def activation_of(node: fx.Node, modules: dict[str, nn.Module]) -> Activation | None:
    """The activation that a node of a graph applies, if it applies one; `modules` are those of the traced network."""
    if node.op == "call_module" and isinstance(modules[str(node.target)], _ACTIVATION_MODULES):
        return activation(modules[str(node.target)])
    if node.op == "call_method" and node.target in _ACTIVATION_METHODS:
        return activation(_ACTIVATION_METHODS[str(node.target)])
    if node.op == "call_function" and node.target in _ACTIVATION_FUNCTIONS:
        return _of_call(node)
    return None


def _of_call(node: fx.Node) -> Activation:
    function: Callable[..., Any] = node.target  # type: ignore[assignment]
    options = {key: value for key, value in node.kwargs.items() if key not in ("input", "inplace")}
    rest = node.args[1:]
    if function is F.leaky_relu:
        slope: Any = options.get("negative_slope", rest[0] if rest else 0.01)
        return activation(nn.LeakyReLU(slope))
    if function is F.gelu:
        return activation(nn.GELU(str(options.get("approximate", "none"))))
    known = activation(function)
    if not options and not [value for value in rest if not isinstance(value, bool)]:
        return known
    return Activation(functools.partial(function, **options), kinks=known.kinks, name=known.name)

"""The weight layers of a person's own network, and the activation that feeds each, read from its graph."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from lathe.core.gaussian import Activation, ActivationLike, activation

__all__ = ["WeightLayer", "weight_layers"]

_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ACTIVATION_MODULES = (
    *(nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Softsign, nn.Tanh, nn.Hardtanh, nn.ReLU6, nn.Sigmoid, nn.LogSigmoid, nn.Hardswish, nn.Hardsigmoid),
    *(nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Threshold),
)
_ACTIVATION_FUNCTIONS: frozenset[Any] = frozenset(
    (
        *(torch.relu, torch.tanh, torch.sin, torch.cos, torch.erf, torch.sigmoid, torch.selu, torch.special.erf),
        *(F.relu, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.softplus, F.softsign, F.tanh),
        *(F.hardtanh, F.relu6, F.sigmoid, F.logsigmoid, F.hardswish, F.hardsigmoid),
    )
)
_ACTIVATION_METHODS = {"relu": "relu", "tanh": "tanh", "sin": "sin", "cos": "cos", "erf": "erf", "sigmoid": "sigmoid"}
_SUMS: frozenset[Any] = frozenset([operator.add, operator.iadd, torch.add, "add", "add_"])


@dataclass(frozen=True)
class WeightLayer:
    """A linear layer or convolution.

    Attributes:
        name: qualified name in the network.
        module: the layer.
        activation: what its input went through since the last weight layer; None for the network's raw input.
        closes_branch: whether its output is added to a skip connection.
    """

    name: str
    module: nn.Module
    activation: Activation | None
    closes_branch: bool

    @property
    def fan_in(self) -> int:
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return weight[0].numel()


def weight_layers(model: nn.Module, act: ActivationLike | None = None, *, graph: bool = True) -> list[WeightLayer]:
    """The weight layers of `model` in the order in which data meets them.

    `act` is the activation of all layers but the first, whatever the graph says. With `act` and without `graph` the
    network is not traced, and its layers come in the order of registration.

    Raises:
        ValueError: where there is no weight layer.
        TypeError: where the network cannot be traced by torch.fx and `act` is not given.
    """
    override = None if act is None else activation(act)
    traced = None
    if graph or override is None:
        try:
            traced = fx.symbolic_trace(model)
        except Exception as error:
            if override is None:
                kind = type(model).__name__
                raise TypeError(f"torch.fx cannot trace {kind} ({error}); say act=... so that it need not") from error
    if traced is not None:
        layers = _from_graph(traced, override)
    else:
        found = [(name, module) for name, module in model.named_modules() if isinstance(module, _WEIGHTED)]
        layers = [WeightLayer(name, m, override if i else None, False) for i, (name, m) in enumerate(found)]
    if not layers:
        raise ValueError("model has no nn.Linear and no convolution")
    return layers


def _from_graph(traced: fx.GraphModule, override: Activation | None) -> list[WeightLayer]:
    modules = dict(traced.named_modules())
    fed: dict[fx.Node, Activation | None] = {}
    layers: dict[str, WeightLayer] = {}

    def feeding(node: fx.Node) -> Activation | None:
        """The activation met first when walking from `node` towards the input; None where the input is met first."""
        if node not in fed:
            found = _activation_of(node, modules)
            if found is None and node.op != "placeholder":
                if _is_weighted(node, modules):
                    found = activation("linear")
                else:
                    sources = [feeding(source) for source in node.all_input_nodes]
                    # Where streams are added, a real activation on one of them is what matters.
                    found = next((s for s in sources if s is not None and s.name != "linear"), None)
                    found = found or next((s for s in sources if s is not None), None)
            fed[node] = found
        return fed[node]

    for node in traced.graph.nodes:
        name = str(node.target)
        if not _is_weighted(node, modules) or name in layers:
            continue
        found = feeding(node.all_input_nodes[0])
        if override is not None and found is not None:
            found = override
        layers[name] = WeightLayer(name, modules[name], found, _closes_branch(node, modules))
    return list(layers.values())


def _is_weighted(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(modules[str(node.target)], _WEIGHTED)


def _activation_of(node: fx.Node, modules: dict[str, nn.Module]) -> Activation | None:
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


def _closes_branch(layer: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the layer's output is added, with no activation between, to a stream that leaves the graph before it."""
    upstream = _ancestors(layer)
    pending = [layer]
    while pending:
        node = pending.pop()
        for user in node.users:
            if user.target in _SUMS:
                others = [_ancestors(source) | {source} for source in user.all_input_nodes]
                if any(layer not in other and other & upstream for other in others):
                    return True
            elif _activation_of(user, modules) is None and not _is_weighted(user, modules):
                pending.append(user)
    return False


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = list(node.all_input_nodes)
    while pending:
        source = pending.pop()
        if source not in found:
            found.add(source)
            pending.extend(source.all_input_nodes)
    return found

"""The weight layers of a person's own network, and the activation that feeds each, read from its graph."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lathe.core.gaussian import Activation, ActivationLike, activation
from lathe.core.gaussian.traced import activation_of

__all__ = ["WeightLayer", "weight_layers"]

_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
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
            found = activation_of(node, modules)
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
            elif activation_of(user, modules) is None and not _is_weighted(user, modules):
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

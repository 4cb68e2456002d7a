"""Reads a PyTorch module as the infinitely wide network that it is a narrow one of."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lathe.core.gaussian.traced import activation_of
from lathe.theory.kernels.images import AvgPool, Conv, Flatten, GlobalAvgPool
from lathe.theory.kernels.layers import Activation, Dense, Layer, LayerNorm, Scale, Sequential, Sum

__all__ = ["from_module"]

_SUMS: frozenset[Any] = frozenset([operator.add, operator.iadd, torch.add, "add", "add_"])
_PRODUCTS: frozenset[Any] = frozenset([operator.mul, operator.imul, torch.mul, "mul", "mul_"])
_SAME_MODULES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_SAME: frozenset[Any] = frozenset([F.dropout, F.dropout1d, F.dropout2d, F.alpha_dropout, "contiguous", "clone"])
_GLOBAL_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
#: What to do about modules that have no kernel, by a part of their name.
_HINTS = {
    "BatchNorm": "it couples the inputs of a batch; use nn.LayerNorm or nn.GroupNorm, or remove it",
    "InstanceNorm": "it normalises each channel by itself; use nn.GroupNorm, or remove it",
    "MaxPool": "maxima have no kernel in closed form; use nn.AvgPool2d or a strided convolution",
    "Softmax": "it is no function of a single unit; pass the network up to the logits",
    "Embedding": "pass the network behind it, and embedded inputs",
    "Attention": "its kernel needs an infinite number of heads; this library has none",
    "Transpose": "transposed convolutions are not supported; compose the network up to it",
    "LSTM": "recurrent layers are not supported; unroll the network with fresh weights",
    "GRU": "recurrent layers are not supported; unroll the network with fresh weights",
    "PReLU": "give it one slope (num_parameters=1), the same for all units",
}


def from_module(
    model: nn.Module,
    *,
    weight_variance: float | Mapping[str, float] | None = None,
    bias_variance: float | Mapping[str, float] | None = None,
    parametrization: str = "standard",
) -> Sequential:
    """The kernel of `model`'s architecture with infinitely many units and channels.

    Reads `nn.Sequential` and whatever `torch.fx` can trace to Linear, Conv1d, Conv2d, activations, average pooling,
    Flatten, LayerNorm, GroupNorm and sums of branches, with Dropout and Identity as in evaluation.

    Args:
        weight_variance: of each layer's weights times its fan-in, for all layers or by the layer's name; where it is
            left out, that of PyTorch's default initialisation if the present weights look like it, else measured from
            them, which suits a network that has not been trained.
        bias_variance: of the biases, likewise.
        parametrization: "standard": the NTK is that of plain gradient descent on this module, with one learning rate
            for all parameters, and parameters that do not require gradients fixed; its scale grows with the present
            widths, as that of `empirical_ntk` does. "ntk": as in papers, independent of width.

    Raises:
        ValueError: naming the module or operation that has no kernel here, and what to do.
    """
    try:
        traced = fx.symbolic_trace(model)
    except Exception as error:
        raise ValueError(
            f"torch.fx cannot trace {type(model).__name__} ({error}); compose the network from the layers of "
            "lathe.theory.kernels, or take data-dependent control flow out of its forward"
        ) from error
    return _Reader(traced, weight_variance, bias_variance, parametrization).network()


class _Reader:
    def __init__(
        self,
        traced: fx.GraphModule,
        weight_variance: float | Mapping[str, float] | None,
        bias_variance: float | Mapping[str, float] | None,
        parametrization: str,
    ) -> None:
        self.traced = traced
        self.modules = dict(traced.named_modules())
        self.variances = {"weight": weight_variance, "bias": bias_variance}
        self.parametrization = parametrization
        self.order = {node: number for number, node in enumerate(traced.graph.nodes)}
        self.dominators: dict[fx.Node, set[fx.Node]] = {}
        for side, given in self.variances.items():
            unknown = set(given) - set(self.modules) if isinstance(given, Mapping) else set()
            if unknown:
                raise ValueError(f"{side}_variance has names that are no modules: {', '.join(sorted(unknown))}")

    def network(self) -> Sequential:
        inputs = [node for node in self.order if node.op == "placeholder"]
        (output,) = [node for node in self.order if node.op == "output"]
        result = output.args[0]
        if len(inputs) != 1 or not isinstance(result, fx.Node):
            raise ValueError(f"model must take one tensor and return one, got {len(inputs)} inputs and {result}")
        calls = [str(node.target) for node in self.order if node.op == "call_module" and self._has_weights(node)]
        twice = sorted({name for name in calls if calls.count(name) > 1})
        if twice:
            raise ValueError(
                f"{', '.join(twice)} is called more than once: shared weights have no kernel here; give each call a "
                "module of its own"
            )
        return Sequential(*self._chain(result, inputs[0]))

    def _has_weights(self, node: fx.Node) -> bool:
        return any(True for _ in self.modules[str(node.target)].parameters())

    def _chain(self, node: fx.Node, start: fx.Node) -> list[Layer]:
        """The layers from `start`, which everything that reaches `node` goes through, to `node`."""
        layers: list[Layer] = []
        while node is not start:
            if node.target in _SUMS:
                a, b = self._terms(node)
                common = max(self._dominators(a) & self._dominators(b), key=self.order.__getitem__)
                branches = [Sequential(*self._chain(each, common)) for each in (a, b)]
                try:
                    layers.append(Sum(*branches))
                except ValueError as error:
                    raise ValueError(f"the sum {node.name} of model: {error}") from error
                node = common
            else:
                layer, source = self._layer(node)
                layers += [] if layer is None else [layer]
                node = source
        return layers[::-1]

    def _terms(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        terms = [each for each in node.args if isinstance(each, fx.Node)]
        if len(terms) != 2 or node.kwargs:
            self._refuse(node, "only the sum of two branches is supported, without a factor or a constant")
        return terms[0], terms[1]

    def _dominators(self, node: fx.Node) -> set[fx.Node]:
        """The nodes that all of the data which reaches `node` goes through."""
        if node not in self.dominators:
            if node.op == "placeholder":
                before: set[fx.Node] = set()
            elif node.target in _SUMS:
                before = set.intersection(*[self._dominators(term) for term in self._terms(node)])
            else:
                before = self._dominators(self._layer(node)[1])
            self.dominators[node] = before | {node}
        return self.dominators[node]

    def _layer(self, node: fx.Node) -> tuple[Layer | None, fx.Node]:
        """What a node with one input does (None for nothing), and that input."""
        sources = [each for each in node.args if isinstance(each, fx.Node)]
        if node.op in ("placeholder", "get_attr") or not sources:
            self._refuse(node, "it reads something else than the output of a layer")
        source = sources[0]
        if node.target in _PRODUCTS:
            numbers = [each for each in node.args if isinstance(each, (int, float))]
            if len(numbers) != 1:
                self._refuse(node, "products of signals have no kernel here; only that with a number has")
            return Scale(float(numbers[0])), source
        if node.op == "call_module":
            return self._module(node, self.modules[str(node.target)]), source
        found = activation_of(node, self.modules)
        if found is not None:
            return Activation(found), source
        if node.target in _SAME:
            return None, source
        reader = _FUNCTIONS.get(node.target)
        layer = reader(node) if reader is not None else None
        if layer is None:
            self._refuse(node, "read the network without it, or compose it from the layers of lathe.theory.kernels")
        return layer, source

    def _module(self, node: fx.Node, module: nn.Module) -> Layer | None:
        if isinstance(module, _SAME_MODULES):
            return None
        if isinstance(module, nn.PReLU) and module.weight.numel() > 1:
            self._refuse(node, _HINTS["PReLU"])
        found = activation_of(node, self.modules)
        if found is not None:
            return Activation(found)
        if isinstance(module, nn.Linear):
            return Dense(**self._weights(node, module, module.in_features))
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            return self._convolution(node, module)
        if isinstance(module, (nn.AvgPool1d, nn.AvgPool2d)):
            padded = any(pad > 0 for pad in _numbers(module.padding))
            if (
                module.ceil_mode
                or getattr(module, "divisor_override", None)
                or (padded and not module.count_include_pad)
            ):
                self._refuse(node, "only plain windows are supported: no ceil_mode, no divisor, zeros count")
            return AvgPool(_plain(module.kernel_size), _plain(module.stride), _plain(module.padding))
        if isinstance(module, _GLOBAL_POOLS):
            if any(size != 1 for size in _numbers(module.output_size)):
                self._refuse(node, "only output size 1 is supported")
            return GlobalAvgPool()
        if isinstance(module, nn.Flatten):
            if (module.start_dim, module.end_dim) != (1, -1):
                self._refuse(node, "only start_dim=1, end_dim=-1 are supported")
            return Flatten()
        if isinstance(module, nn.LayerNorm):
            if len(module.normalized_shape) == 1 and self._is_image(node.all_input_nodes[0]):
                self._refuse(node, "over one dimension of an image; normalise over (channels, height, width)")
            return LayerNorm(eps=module.eps)
        if isinstance(module, nn.GroupNorm):
            if module.num_groups == module.num_channels:
                self._refuse(node, _HINTS["InstanceNorm"])
            return LayerNorm(eps=module.eps)
        kind = type(module).__name__
        hint = next((hint for part, hint in _HINTS.items() if part in kind), None)
        return self._refuse(node, hint or "replace it, or compose the network from the layers of lathe.theory.kernels")

    def _is_image(self, node: fx.Node) -> bool:
        """Whether a convolution or pooling comes before, and nothing that flattens since."""
        while node.op != "placeholder":
            if node.target in _SUMS:
                node = self._terms(node)[0]
                continue
            layer, node = self._layer(node)
            if isinstance(layer, (Conv, AvgPool)):
                return True
            if isinstance(layer, (Dense, Flatten, GlobalAvgPool)):
                return False
        return False

    def _convolution(self, node: fx.Node, module: nn.Conv1d | nn.Conv2d) -> Conv:
        if module.groups > 1 and module.in_channels == module.groups:
            self._refuse(node, "depthwise convolutions sum over no channels, so that width brings no limit")
        if module.padding_mode not in ("zeros", "circular"):
            self._refuse(node, "padding_mode must be 'zeros' or 'circular'")
        return Conv(
            kernel_size=_plain(module.kernel_size),
            stride=_plain(module.stride),
            padding=module.padding if isinstance(module.padding, str) else _plain(module.padding),  # type: ignore[arg-type]
            dilation=_plain(module.dilation),
            padding_mode=module.padding_mode,  # type: ignore[arg-type]
            **self._weights(node, module, module.weight[0].numel()),
        )

    def _weights(self, node: fx.Node, module: nn.Linear | nn.Conv1d | nn.Conv2d, fan_in: int) -> dict[str, Any]:
        name = str(node.target)
        values: dict[str, float] = {}
        for side, parameter, factor in (("weight", module.weight, fan_in), ("bias", module.bias, 1)):
            given = self.variances[side]
            given = given.get(name) if isinstance(given, Mapping) else given
            if parameter is None:
                values[side] = 0.0
            elif given is not None:
                values[side] = float(given)
            else:
                values[side] = factor * _variance(parameter, fan_in)
        rates: dict[str, float | None] = {"weight_rate": None, "bias_rate": None}
        if not module.weight.requires_grad:
            rates["weight_rate"] = 0.0
        if module.bias is None or not module.bias.requires_grad:
            rates["bias_rate"] = 0.0
        return {
            "weight_variance": values["weight"],
            "bias_variance": values["bias"],
            "parametrization": self.parametrization,
            "fan_in": fan_in if self.parametrization == "standard" else None,
            **rates,
        }

    def _refuse(self, node: fx.Node, hint: str) -> NoReturn:
        if node.op == "call_module":
            what = f"{node.target} ({type(self.modules[str(node.target)]).__name__})"
        else:
            what = f"{node.name} ({getattr(node.target, '__name__', node.target)})"
        raise ValueError(f"module {what} of model has no infinitely wide kernel here: {hint}")


def _variance(parameter: Tensor, fan_in: int) -> float:
    """The mean square; or exactly that of PyTorch's default initialisation, where the numbers may well be from it."""
    values = parameter.detach().double()
    measured, default = values.square().mean().item(), 1 / (3 * fan_in)
    error = default * math.sqrt(0.8 / values.numel())  # standard error of the mean of squares of uniform numbers
    uniform = values.abs().max().item() <= fan_in**-0.5 * (1 + 1e-6)
    return default if uniform and measured > 0 and abs(measured - default) <= 4 * error else measured


def _numbers(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _plain(value: Any) -> int | tuple[int, ...]:
    """One number, where all are the same."""
    values = _numbers(value)
    return values[0] if len(set(values)) == 1 else values


def _flatten(node: fx.Node) -> Layer | None:
    rest = [*node.args[1:], *node.kwargs.values()]
    return Flatten() if rest in ([1], [1, -1]) else None


def _reshape(node: fx.Node) -> Layer | None:
    shape = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
    return Flatten() if isinstance(shape, (tuple, list)) and len(shape) == 2 and shape[1] == -1 else None


def _mean(node: fx.Node) -> Layer | None:
    over = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    axes = set(_numbers(over))
    return GlobalAvgPool() if axes in ({2, 3}, {-1, -2}) else None


def _average(node: fx.Node) -> Layer | None:
    options = dict(zip(("kernel_size", "stride", "padding"), node.args[1:])) | dict(node.kwargs)
    if len(node.args) > 4 or set(options) - {"kernel_size", "stride", "padding"}:
        return None
    return AvgPool(**{name: _plain(value) for name, value in options.items() if value is not None})


def _adaptive(node: fx.Node) -> Layer | None:
    size = node.kwargs.get("output_size", node.args[1] if len(node.args) > 1 else None)
    return GlobalAvgPool() if set(_numbers(size)) == {1} else None


_FUNCTIONS: dict[Any, Callable[[fx.Node], Layer | None]] = {
    torch.flatten: _flatten,
    "flatten": _flatten,
    "view": _reshape,
    "reshape": _reshape,
    torch.reshape: _reshape,
    torch.mean: _mean,
    "mean": _mean,
    F.avg_pool1d: _average,
    F.avg_pool2d: _average,
    F.adaptive_avg_pool1d: _adaptive,
    F.adaptive_avg_pool2d: _adaptive,
}

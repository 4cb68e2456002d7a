"""A network whose layers change their precision at a word, for search: nothing is packed, nothing is built twice."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lathe.compression.mixed_precision_quantization.calibration import Range, Ranges, quantizable
from lathe.compression.mixed_precision_quantization.layers import weight_clip
from lathe.compression.mixed_precision_quantization.quantizers import fake_quantize
from lathe.core.surgery import set_module

__all__ = ["Simulator"]


class SimulatedLayer(nn.Module):
    """A linear layer or convolution that rounds its weight and its input to `bits` bits; 16 leaves both alone."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, range: Range, per_channel: bool, observer: str) -> None:
        super().__init__()
        self.layer, self.range, self.per_channel, self.observer = layer, range, per_channel, observer
        self.bits = 16
        self.clips: dict[int, tuple[Tensor, Tensor]] = {}
        """Of weight and input, by bits."""
        self._weights: dict[int, Tensor] = {}
        self.noise: Tensor | None = None
        """Added to the weight."""

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    def clip(self, bits: int) -> tuple[Tensor, Tensor]:
        """Of the weight, a value or one for each output, and of the input."""
        if bits not in self.clips:
            assert self.observer in ("max", "mse")
            observer: Literal["max", "mse"] = "mse" if self.observer == "mse" else "max"
            weight = weight_clip(self.weight, bits, per_channel=self.per_channel, observer=observer)
            self.clips[bits] = weight, torch.tensor(self.range.clip[bits], device=weight.device)
        return self.clips[bits]

    def set_clip(self, bits: int, weight: Tensor, input: Tensor) -> None:
        self.clips[bits] = weight, input
        self._weights.pop(bits, None)

    def rounded(self, bits: int) -> Float[Tensor, " out *rest"]:
        """The weight on the grid of `bits` bits, in float32; kept, because a search asks for it again and again."""
        if bits not in self._weights:
            clip = self.clip(bits)[0]
            weight = self.weight.detach().float()
            axis = 0 if self.per_channel else None
            self._weights[bits] = fake_quantize(weight, bits, clip if self.per_channel else clip[0], axis)
        return self._weights[bits]

    def forward(self, x: Tensor) -> Tensor:
        if self.noise is not None:
            return self.map(x, self.weight + self.noise, self.bias)
        if self.bits == 16:
            return self.layer(x)
        bias = None if self.bias is None else self.bias.float()
        values = fake_quantize(x.float(), self.bits, self.clip(self.bits)[1], signed=self.range.signed)
        return self.map(values, self.rounded(self.bits), bias).to(x.dtype)

    def map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, bias)
        return self.layer._conv_forward(x, weight, bias)


class Simulator(nn.Module):
    """A copy of a network, called like it, whose layers take the precisions of a configuration.

    Args:
        model: the network, batch norms folded.
        ranges: from `calibrate`; layers without a range stay as they are.
        per_channel: weights have a scale for each output channel, or one.
        observer: how the weights' clips are found: "max" or "mse".
        dtype: of everything that is not quantised; None keeps the network's.

    Raises:
        ValueError: where no layer can be quantised.
    """

    def __init__(
        self,
        model: nn.Module,
        ranges: Ranges,
        *,
        per_channel: bool = True,
        observer: Literal["max", "mse"] = "max",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).eval()
        self.per_channel, self.observer, self.ranges = per_channel, observer, ranges
        found = quantizable(self.model)
        self.layers: dict[str, SimulatedLayer] = {}
        """By name, in the order in which they run."""
        made: dict[int, SimulatedLayer] = {}
        for name, range in ranges.items():
            if name not in found:
                raise ValueError(f"ranges must name layers of the model, got {name!r}")
            made[id(found[name])] = self.layers[name] = SimulatedLayer(found[name], range, per_channel, observer)
        if not self.layers:
            raise ValueError(
                "model must have a layer that can be quantised (nn.Linear or nn.Conv2d) and runs, got none"
            )
        keep_inference_path(self.model)
        if dtype is not None:
            self.model.to(dtype)
        for name, module in list(self.named_modules(remove_duplicate=False)):
            if id(module) in made:  # a shared layer stays shared; the network may be a single layer
                set_module(self, name, made[id(module)])
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    @property
    def config(self) -> dict[str, int]:
        """Bits by layer."""
        return {name: layer.bits for name, layer in self.layers.items()}

    def configure(self, config: Mapping[str, int]) -> Simulator:
        """Sets the bits of the layers that `config` names, and 16 for all others; returns the simulator."""
        unknown = [name for name in config if name not in self.layers]
        if unknown:
            raise ValueError(f"config must name layers among {list(self.layers)}, got {unknown}")
        for name, layer in self.layers.items():
            layer.bits = config.get(name, 16)
        return self

    def errors(self, bits: int) -> dict[str, Tensor]:
        """`Q(W) - W` of each layer."""
        return {name: layer.rounded(bits) - layer.weight.detach().float() for name, layer in self.layers.items()}

    def weight_names(self, names: Iterable[str] | None = None) -> dict[str, list[str]]:
        """For each layer the name of its weight among the simulator's parameters."""
        owned = {id(parameter): name for name, parameter in self.named_parameters()}
        return {name: [owned[id(self.layers[name].weight)]] for name in (names or self.layers)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def keep_inference_path(model: nn.Module) -> None:
    """Keeps PyTorch from taking its fused transformer encoder, which reads weights past the layers that hold them."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0

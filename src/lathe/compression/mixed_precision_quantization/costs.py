"""What a layer costs at a bit width: bytes, bit operations, an ideal machine's time, or this machine's."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lathe.compression.mixed_precision_quantization.calibration import Range, Ranges, quantizable
from lathe.compression.mixed_precision_quantization.kernels import integer_kernel
from lathe.compression.mixed_precision_quantization.layers import QuantConv2d, QuantLinear
from lathe.compression.mixed_precision_quantization.search import allocate
from lathe.core.codes import packed_bytes
from lathe.core.example import call
from lathe.core.shapes import conv_arguments
from lathe.core.surgery import find_sequences

__all__ = ["LatencyTable", "bops_costs", "byte_costs", "layer_macs", "measure_latency", "roofline_costs", "total"]

Table = dict[str, dict[int, float]]
"""For each layer and width a cost."""


def layer_macs(layer: nn.Linear | nn.Conv2d, shape: Sequence[int]) -> int:
    """Multiplications of one sample, for inputs of `shape` (samples first)."""
    if isinstance(layer, nn.Linear):
        return layer.weight.numel() * math.prod(shape[1:-1])
    probe = nn.Conv2d(**conv_arguments(layer) | {"device": "meta", "dtype": torch.float32})
    height, width = probe(torch.empty(1, *shape[1:], device="meta")).shape[-2:]
    return layer.weight.numel() * height * width


def byte_costs(model: nn.Module, ranges: Ranges, bits: Sequence[int], *, per_channel: bool = True) -> Table:
    """Bytes that each layer stores, scales and 16-bit bias included; equals `stored_bytes()` of the layer built."""

    def one(layer: nn.Linear | nn.Conv2d, width: int) -> float:
        bias = 0 if layer.bias is None else 2 * layer.bias.numel()
        if width == 16:
            return float(2 * layer.weight.numel() + bias)
        scales = (layer.weight.shape[0] if per_channel else 1) + 1
        return float(packed_bytes(layer.weight.numel(), width) + 4 * scales + bias)

    return _table(model, ranges, bits, lambda layer, _, width: one(layer, width))


def bops_costs(model: nn.Module, ranges: Ranges, bits: Sequence[int]) -> Table:
    """Bit operations of one sample: MACs times the bits of weight and input."""
    return _table(
        model, ranges, bits, lambda layer, range, width: float(layer_macs(layer, range.shape) * width * width)
    )


def roofline_costs(
    model: nn.Module,
    ranges: Ranges,
    bits: Sequence[int],
    *,
    peak: float = 1e12,
    bandwidth: float = 1e11,
) -> Table:
    """Seconds of one sample on an ideal machine: the slower of computing and moving the layer's weight and activations.

    Args:
        peak: MACs a second at 16 bits; twice as many at 8, four times at 4 (2 to 4 bits count as 4, 5 to 8 as 8).
        bandwidth: bytes a second.
    """

    def one(layer: nn.Linear | nn.Conv2d, range: Range, width: int) -> float:
        unit = 4 if width <= 4 else 8 if width <= 8 else 16
        macs = layer_macs(layer, range.shape)
        outputs = macs / layer.weight.numel() * layer.weight.shape[0]
        moved = (layer.weight.numel() + math.prod(range.shape[1:]) + outputs) * unit / 8
        return max(macs / (peak * 16 / unit), moved / bandwidth)

    return _table(model, ranges, bits, one)


@dataclass(frozen=True)
class LatencyTable:
    """Measured seconds of one call on the calibration's batch, by layer and width."""

    seconds: Table
    """Of each layer on its own, floats in and floats out."""
    conversion: dict[str, float]
    """Part of that which turns the input into bytes; saved where the layer before hands over bytes."""
    follows: dict[str, str]
    """For a layer the one whose output only it reads, so that both may pass bytes when both are quantised."""
    rest: float
    """Of everything that is not a quantisable layer."""

    def predict(self, config: Mapping[str, int]) -> float:
        """Seconds of the whole network."""
        total = self.rest
        for name, by_bits in self.seconds.items():
            total += by_bits[config[name]]
            before = self.follows.get(name)
            if before is not None and config[name] < 16 and config[before] < 16:
                total -= self.conversion[name]
        return total

    def best(self, allowed: Mapping[str, int]) -> dict[str, int]:
        """The fastest configuration that gives no layer fewer bits than `allowed` does, exactly.

        Leaves a layer in 16 bits where quantising its input would take longer than integers save.
        """
        widths = {name: sorted({16, allowed[name]}) for name in self.seconds}
        cost = {
            name: {
                width: self.seconds[name][width]
                - (self.conversion[name] if name in self.follows and width < 16 else 0.0)
                for width in widths[name]
            }
            for name in self.seconds
        }
        nothing = {name: dict.fromkeys(widths[name], 0.0) for name in self.seconds}
        return allocate(cost, nothing, 1.0, conversions=self.conversions())

    def conversions(self) -> dict[tuple[str, str], float]:
        """What it costs when the second layer is quantised and the first, which it follows, is not."""
        return {(before, name): self.conversion[name] for name, before in self.follows.items()}


def measure_latency(
    model: nn.Module,
    ranges: Ranges,
    example: Any,
    bits: Sequence[int],
    *,
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 9,
) -> LatencyTable:
    """Times every layer at every width with the kernels that will run it here; equal layers are timed once.

    Args:
        model: the network, batch norms folded.
        example: an input of the batch size to be used.
        dtype: of unquantised layers and of activations.
        repeats: the fastest of so many runs counts.
    """
    layers = quantizable(model)
    shapes = _shapes(model, layers, example)
    keys = {name: (repr(layers[name]), ranges[name].signed, shapes[name]) for name in ranges}
    whole, converted = copied(model, dtype), cast(example, dtype)
    functions: list[Callable[[], Any]] = [lambda: call(whole, converted)]
    places: dict[Any, int] = {}
    for name, key in keys.items():
        if key not in places:
            places[key] = len(functions)
            functions += _runs(layers[name], ranges[name], shapes[name], bits, dtype)
    with torch.no_grad():
        # What other programs add to a run is not the layer's: the least of the runs is the nearest to it.
        times = [taken[0] for taken in interleaved_seconds(functions, repeats)]
    seconds: Table = {}
    conversion: dict[str, float] = {}
    for name, key in keys.items():
        plain, quantized, from_bytes = times[places[key] : places[key] + 3]
        seconds[name] = {width: plain if width == 16 else quantized for width in {16, *bits}}
        conversion[name] = max(quantized - from_bytes, 0.0)
    rest = max(times[0] - sum(each[16] for each in seconds.values()), 0.0)
    return LatencyTable(seconds, conversion, byte_links(model, ranges, example), rest)


def byte_links(model: nn.Module, ranges: Ranges, example: Any = None) -> dict[str, str]:
    """For each layer the one before it, if that layer's output alone goes in, through steps that may run on bytes.

    Such steps are ReLU (the reader's grid then starts at zero, where bytes saturate), dropout and flattening.
    """
    kinds = (nn.Linear, nn.Conv2d, QuantLinear, QuantConv2d)
    steps = (nn.ReLU, nn.Dropout, nn.Flatten, nn.Dropout2d)
    links = {}
    for between in range(3):
        for found in find_sequences(model, (kinds, *[steps] * between, kinds), example):
            first, last = found.names[0], found.names[-1]
            relu = any(isinstance(module, nn.ReLU) for module in found.modules)
            if first in ranges and last in ranges and not (relu and ranges[last].signed):
                links[last] = first
    return links


def median_seconds(functions: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Medians of `interleaved_seconds`."""
    return [taken[len(taken) // 2] for taken in interleaved_seconds(functions, repeats)]


def interleaved_seconds(functions: Sequence[Callable[[], Any]], repeats: int) -> list[list[float]]:
    """Times of the functions, sorted; run in turn, so that what slows the machine down for a while slows all of them.

    A run is as many calls as take half a millisecond.
    """
    counts = []
    for function in functions:
        function()
        start = time.perf_counter()
        function()
        counts.append(max(1, math.ceil(5e-4 / max(time.perf_counter() - start, 1e-7))))
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for taken, function, count in zip(times, functions, counts):
            start = time.perf_counter()
            for _ in range(count):
                function()
            taken.append((time.perf_counter() - start) / count)
    return [sorted(taken) for taken in times]


def cast(example: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors of `example` in `dtype`, images channels-last, as integer convolutions want them."""

    def one(leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
            return leaf
        return leaf.to(dtype, memory_format=torch.channels_last) if leaf.ndim == 4 else leaf.to(dtype)

    return torch.utils._pytree.tree_map(one, example)


def copied(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in `dtype`, convolutions channels-last."""
    new = copy.deepcopy(model).eval().to(dtype)
    for module in new.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return new


def total(table: Table, config: Mapping[str, int]) -> float:
    """Cost of a configuration."""
    return sum(by_bits[config[name]] for name, by_bits in table.items())


def _runs(
    layer: nn.Linear | nn.Conv2d, range: Range, shape: tuple[int, ...], bits: Sequence[int], dtype: torch.dtype
) -> list[Callable[[], Any]]:
    """The layer in 16 bits, quantised, and quantised with bytes coming in; all widths share the int8 kernel."""
    device = layer.weight.device
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)
    x = cast((x - 0.5 if range.signed else x) * 2 * max(range.clip.values()), dtype)
    plain = copied(layer, dtype)
    widths = [width for width in bits if width != 16]
    if not widths or integer_kernel("linear" if isinstance(layer, nn.Linear) else "conv2d", device.type) is None:
        return [lambda: plain(x)] * 3
    kind: Any = QuantLinear if isinstance(layer, nn.Linear) else QuantConv2d
    quantized = kind.from_trained(layer, widths[0], range)
    quantized.execute = "native"
    codes = torch.randint(0, 255, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
    codes = codes.contiguous(memory_format=torch.channels_last) if codes.ndim == 4 else codes
    return [lambda: plain(x), lambda: quantized(x), lambda: quantized(codes)]


def _shapes(model: nn.Module, layers: Mapping[str, nn.Module], example: Any) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: shapes.__setitem__(name, tuple(args[0].shape)))
        for name, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            call(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def _table(model: nn.Module, ranges: Ranges, bits: Sequence[int], one: Callable[..., float]) -> Table:
    layers = quantizable(model)
    return {name: {width: one(layers[name], range, width) for width in bits} for name, range in ranges.items()}

"""`mixed_precision`: a trained network and an accuracy floor in, a network of 4-, 8- and 16-bit layers out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from lathe.compression.mixed_precision_quantization.calibration import (
    Observer,
    Ranges,
    as_batches,
    calibrate,
    fold_batch_norms,
    quantizable,
)
from lathe.compression.mixed_precision_quantization.certainty import Top1, floor_confidence
from lathe.compression.mixed_precision_quantization.costs import (
    LatencyTable,
    Table,
    bops_costs,
    byte_costs,
    byte_links,
    cast,
    copied,
    measure_latency,
    median_seconds,
    roofline_costs,
    total,
)
from lathe.compression.mixed_precision_quantization.kernels import integer_kernel
from lathe.compression.mixed_precision_quantization.layers import ByteReLU, QuantConv2d, QuantLinear
from lathe.compression.mixed_precision_quantization.refinement import refine_scales
from lathe.compression.mixed_precision_quantization.search import bisect_precision, check_bits, greedy_precision
from lathe.compression.mixed_precision_quantization.sensitivity import Order, sensitivity_order
from lathe.compression.mixed_precision_quantization.simulation import Simulator, keep_inference_path
from lathe.core.example import call
from lathe.core.size import stored_bytes
from lathe.core.surgery import get_module, set_module

__all__ = ["QuantizedModel", "Report", "mixed_precision", "quantize_model"]


@dataclass(frozen=True)
class Report:
    """What the search did, and what came out."""

    order: tuple[str, ...]
    """Layers, least sensitive first."""
    evaluations: int
    """Configurations evaluated, the unquantised one included."""
    accuracy: float
    """Of the network returned, as it runs here."""
    base_accuracy: float
    """Of the 16-bit network."""
    floor: float
    confidence: float | None
    """Bootstrap confidence that the floor holds on other samples; None where `evaluate` is a function."""
    bytes: int
    base_bytes: int
    """Of the 16-bit network."""
    cost: float
    """Modelled, relative to the 16-bit network."""
    predicted_latency: float | None = None
    """Seconds on the calibration's first batch, by the measured table; None for other costs."""
    measured_latency: float | None = None
    base_latency: float | None = None
    """Of the 16-bit network, measured beside it."""
    raised: tuple[str, ...] = ()
    """Layers that got bits back because the finished network missed the floor that its simulation had kept."""


class QuantizedModel(nn.Module):
    """A network with quantised layers; called like the one it was made from, and saved by its state dict.

    `execute = "native"` runs integer kernels and 16-bit floats; `"simulate"` mimics the same numbers in floating point
    on any device, and can be exported. Floating-point inputs are converted to the network's dtype, outputs to float32.
    """

    def __init__(
        self, network: nn.Module, config: Mapping[str, int], dtype: torch.dtype, links: Mapping[str, str]
    ) -> None:
        super().__init__()
        self.network, self.config, self.dtype = network, dict(config), dtype
        self.links = dict(links)
        self.report: Report | None = None
        self._execute = "simulate"

    @property
    def execute(self) -> str:
        return self._execute

    @execute.setter
    def execute(self, mode: str) -> None:
        if mode not in ("simulate", "native"):
            raise ValueError(f"execute must be 'simulate' or 'native', got {mode!r}")
        self._execute = mode
        layers = self.quantized_layers()
        for layer in layers.values():
            layer.execute, layer.byte_dtype = mode, self.dtype
            layer.emit(None)
        for name, before in self.links.items():
            if name in layers and before in layers and layers[before].is_native:
                layers[before].emit(layers[name].input_codes())

    def quantized_layers(self) -> dict[str, QuantLinear | QuantConv2d]:
        """By name in the original network."""
        found = {name: get_module(self.network, name) for name in self.config}
        return {name: each for name, each in found.items() if isinstance(each, (QuantLinear, QuantConv2d))}

    def stored_bytes(self) -> int:
        """Bytes of all weights as stored: packed codes and scales, and the rest in the network's dtype."""
        return stored_bytes(self.network)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._execute == "native":
            args, kwargs = cast((args, kwargs), self.dtype)
        else:
            args, kwargs = tree_map(lambda leaf: _to(leaf, self.dtype), (args, kwargs))
        return tree_map(lambda leaf: _to(leaf, torch.float32), self.network(*args, **kwargs))

    def to_torchao(self) -> nn.Module:
        """The 16-bit network with torchao's int8 (dynamic inputs) and int4 (weights only) layers in our configuration.

        A deployment back end of its own: torchao takes its own scales. Convolutions, which it has no CPU kernels for,
        stay in 16 bits, as do widths that it does not store.

        Raises:
            ImportError: where torchao is not installed.
        """
        from lathe.compression.mixed_precision_quantization.export import to_torchao

        return to_torchao(self)

    def export_onnx(self, path: Any, example: Any) -> None:
        """Writes the network as ONNX with QuantizeLinear and DequantizeLinear around its integer layers.

        Args:
            path: of the file. example: an input, whose first dimension stays free.

        Raises:
            ImportError: where onnx or onnxscript is not installed.
        """
        from lathe.compression.mixed_precision_quantization.export import export_onnx

        export_onnx(self, path, example)


def quantize_model(
    model: nn.Module,
    config: Mapping[str, int],
    ranges: Ranges,
    *,
    dtype: torch.dtype = torch.bfloat16,
    per_channel: bool = True,
    observer: Literal["max", "mse"] = "max",
    simulator: Simulator | None = None,
    links: Mapping[str, str] | None = None,
) -> QuantizedModel:
    """The network with the layers of `config` quantised and everything else in `dtype`.

    Args:
        model: the network, batch norms folded; left as it is.
        config: bits by layer; 16 or absent leaves a layer in `dtype`.
        simulator: whose (refined) clips to take; None finds them by `observer`.
        links: layers that may pass bytes (`byte_links`).
    """
    config = {name: config.get(name, 16) for name in ranges} | dict(config)
    network = copied(model, dtype)
    layers = quantizable(model)
    made: dict[int, nn.Module] = {}
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if type(module) is nn.ReLU and name:
            set_module(network, name, made.setdefault(id(module), ByteReLU(module.inplace)))
        if config.get(name, 16) == 16 or name not in layers:
            continue
        if id(module) not in made:
            bits, range, clip = config[name], ranges[name], None
            if simulator is not None:
                clip, input_clip = simulator.layers[name].clip(bits)
                range = type(range)(range.signed, {bits: float(input_clip)}, range.shape)
            kind: Any = QuantLinear if isinstance(module, nn.Linear) else QuantConv2d
            # From the original weight: rounding to 16 bits first would round twice.
            new = kind.from_trained(layers[name], bits, range, per_channel=per_channel, observer=observer, clip=clip)
            if new.bias is not None:
                new.bias.data = new.bias.data.to(dtype)
            made[id(module)] = new
        if name:
            set_module(network, name, made[id(module)])
        else:
            network = made[id(module)]
    keep_inference_path(network)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return QuantizedModel(network.eval(), config, dtype, links or {})


def mixed_precision(
    model: nn.Module,
    calibration: Any,
    evaluate: Callable[[nn.Module], float] | Any,
    *,
    loss: Callable[..., Tensor] = F.cross_entropy,
    keep: float = 0.999,
    bits: Sequence[int] = (16, 8, 4),
    cost: Literal["latency", "bytes", "bops", "roofline"] | Callable[[str, int], float] = "latency",
    order: Order | Sequence[str] = "augmented",
    search: Literal["bisect", "greedy"] = "bisect",
    refine_steps: int = 0,
    observer: Observer = "max",
    per_channel: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    probes: int = 50,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> QuantizedModel:
    """Gives each layer as few bits as an accuracy floor allows, without retraining.

    Layers are ordered by sensitivity; bisection finds how many may go to 8, then to 4 bits. A layer is passed over at a
    width that does not make it cheaper: under "latency" on a CPU that runs 4-bit weights on 8-bit kernels, nothing goes
    below 8 bits.

    Args:
        model: a trained network; left as it is. Its batch norms are folded in the copy.
        calibration: batches `(inputs, targets)`, or a tuple of tensors; 256 to 512 samples. Not those of `evaluate`.
        evaluate: `evaluate(model) -> float`, more is better, zero is nothing; or labelled samples in random order
            (batches or a tuple of tensors), on which top-1 accuracy is counted, no further than it takes to decide.
        loss: `loss(output, targets)`, a mean; the criterion of sensitivity.
        keep: share of the 16-bit network's accuracy to keep, in (0, 1].
        bits: widths to choose from, falling from 16.
        cost: "latency" (measured here on the first calibration batch), "bytes", "bops", "roofline" (an ideal machine),
            or `cost(name, bits) -> float`.
        order: a method of `sensitivity_order`, or the names themselves, least sensitive first.
        search: "bisect" takes 2 log2 L evaluations, "greedy" 2 L and often saves a little more.
        refine_steps: of Adam on the scales at each width, before the search (see `refine_scales`).
        observer: how inputs' ranges are found; "mse" also picks the weights' clips.
        per_channel: weights have a scale for each output channel, or one.
        dtype: of what stays in 16 bits; `torch.float32` where the machine has no fast bfloat16.
        progress: `progress(what, done, total)`.

    Returns:
        A `QuantizedModel` with `.config` and `.report`, executed natively where this machine has the kernels (a
        `RuntimeWarning` says where not).

    Raises:
        ValueError: where `keep` or `bits` is out of range, calibration is empty, a layer's input is all zero or not
            finite, or the model has no layer to quantise.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    check_bits(bits)
    if bits[0] != 16 or len(bits) < 2:
        raise ValueError(f"bits must start with 16 and have a lower width, got {tuple(bits)}")
    data = as_batches(calibration)
    example = data[0][0]
    if not quantizable(model):
        raise ValueError("model must have a layer that can be quantised (nn.Linear or nn.Conv2d), got none")
    folded = fold_batch_norms(model, example)
    ranges = calibrate(folded, data, observer, bits=bits[1:])
    options: dict[str, Any] = {"per_channel": per_channel, "observer": "mse" if observer == "mse" else "max"}
    simulator = Simulator(folded, ranges, **options)
    for width in bits[1:] if refine_steps else ():
        refine_scales(simulator, data, width, refine_steps, loss_fn=loss if len(data[0]) > 1 else None)
    native = _has_kernels(folded, ranges)
    table, latency = _costs(cost, folded, ranges, example, bits, dtype, per_channel, native)
    if isinstance(order, str):
        names = sensitivity_order(
            simulator, order, loss_fn=loss, batches=data, bits=bits[-1], probes=probes, seed=seed, progress=progress
        )
    else:
        names = list(order)
        if sorted(names) != sorted(simulator.layers):
            raise ValueError(f"order must name each of {list(simulator.layers)} once, got {names}")

    # The search judges the network in the very dtype in which it will run.
    judge = _Judge(evaluate, keep, Simulator(folded, ranges, dtype=dtype, **options), simulator, progress)
    run = bisect_precision if search == "bisect" else greedy_precision
    config = run(
        judge, names, bits, floor=judge.floor, may_lower=lambda name, width: _cheaper(table, bits, name, width)
    )
    if latency is not None:
        config = latency.best(config)

    links = byte_links(folded, ranges, example)
    build: dict[str, Any] = {"dtype": dtype, "simulator": simulator, "links": links, **options}
    base = copied(folded, dtype)
    raised: list[str] = []
    while True:
        quantized = quantize_model(folded, config, ranges, **build)
        quantized.execute = "native" if native else "simulate"
        accuracy = judge.final(quantized)
        lowered = [name for name in names if config[name] != 16]
        if accuracy >= judge.floor or not lowered:
            break
        # Kernels add in another order than the simulation: give the most sensitive layer its bits back.
        worst = lowered[-1]
        config = config | {worst: bits[bits.index(config[worst]) - 1]}
        raised.append(worst)
    predicted = measured = reference = None
    if isinstance(latency, LatencyTable):
        converted = cast(example, dtype)
        with torch.no_grad():
            measured, reference = median_seconds(
                [lambda: call(quantized, example), lambda: call(base, converted)], repeats=9
            )
        predicted = latency.predict(config)
    plain = QuantizedModel(base, {}, dtype, {})
    relative = (
        latency.predict(config) / latency.predict(dict.fromkeys(config, 16))
        if latency is not None
        else total(table, config) / total(table, dict.fromkeys(config, 16))
    )
    quantized.report = Report(
        tuple(names), judge.evaluations, accuracy, judge.base, judge.floor, judge.confidence(),
        quantized.stored_bytes(), plain.stored_bytes(), relative, predicted, measured, reference, tuple(raised),
    )  # fmt: skip
    return quantized


class _Judge:
    """Evaluates configurations, counts them, and knows the floor."""

    def __init__(
        self, evaluate: Any, keep: float, simulator: Simulator, refined: Simulator, progress: Callable[..., None] | None
    ) -> None:
        self.simulator, self.keep, self.progress = simulator, keep, progress
        for name, layer in refined.layers.items():
            for width, clip in layer.clips.items():
                simulator.layers[name].set_clip(width, *clip)
        self.evaluate = evaluate if callable(evaluate) else None
        self.top1 = None if callable(evaluate) else Top1(as_batches(evaluate, name="evaluate"))
        self.evaluations = 0
        self.last: Tensor | None = None
        simulator.configure({})
        if self.top1 is not None:
            self.reference = self.top1.correct(self._typed())
            self.base = float(self.reference.double().mean())
        else:
            self.base = float(evaluate(self._typed()))
        self.floor = keep * self.base

    def __call__(self, config: dict[str, int]) -> float:
        self.evaluations += 1
        if self.progress is not None:
            self.progress("search", self.evaluations, 0)
        if all(bits == 16 for bits in config.values()):
            return self.base
        self.simulator.configure(config)
        if self.top1 is not None:
            return self.floor * self.top1.against(self._typed(), self.reference, self.keep)
        assert self.evaluate is not None
        return float(self.evaluate(self._typed()))

    def final(self, model: nn.Module) -> float:
        """On all samples."""
        self.evaluations += 1
        if self.top1 is None:
            assert self.evaluate is not None
            return float(self.evaluate(model))
        self.last = self.top1.correct(model)
        return float(self.last.double().mean())

    def confidence(self) -> float | None:
        return None if self.last is None else floor_confidence(self.reference, self.last, self.keep)

    def _typed(self) -> nn.Module:
        dtype = next((each.dtype for each in self.simulator.parameters() if each.is_floating_point()), torch.float32)
        return QuantizedModel(self.simulator.model, {}, dtype, {})


def _costs(
    cost: Any, model: nn.Module, ranges: Ranges, example: Any, bits: Sequence[int], dtype: torch.dtype,
    per_channel: bool, native: bool,
) -> tuple[Table, LatencyTable | None]:  # fmt: skip
    if callable(cost):
        return {name: {width: float(cost(name, width)) for width in bits} for name in ranges}, None
    if cost == "bytes":
        return byte_costs(model, ranges, bits, per_channel=per_channel), None
    if cost == "bops":
        return bops_costs(model, ranges, bits), None
    if cost == "roofline" or (cost == "latency" and not native):
        if cost == "latency":
            warnings.warn("no integer kernels here: cost is an ideal machine's latency", RuntimeWarning, stacklevel=3)
        return roofline_costs(model, ranges, bits), None
    if cost != "latency":
        raise ValueError(f"cost must be 'latency', 'bytes', 'bops', 'roofline' or a function, got {cost!r}")
    latency = measure_latency(model, ranges, example, bits, dtype=dtype)
    # At its best a layer gets bytes from the one before; whether it does is settled when all bits are known.
    hopeful = {
        name: {
            width: seconds - (latency.conversion[name] if name in latency.follows and width < 16 else 0.0)
            for width, seconds in by_bits.items()
        }
        for name, by_bits in latency.seconds.items()
    }
    return hopeful, latency


def _cheaper(table: Table, bits: Sequence[int], name: str, width: int) -> bool:
    """Whether a layer costs less at `width` than at every wider one."""
    return all(table[name][width] < table[name][each] for each in bits if each > width)


def _has_kernels(model: nn.Module, ranges: Ranges) -> bool:
    layers = quantizable(model)
    kinds: set[tuple[Literal["linear", "conv2d"], str]] = {
        ("linear" if isinstance(layers[name], nn.Linear) else "conv2d", layers[name].weight.device.type)
        for name in ranges
    }
    return all(integer_kernel(*kind) is not None for kind in kinds)


def _to(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

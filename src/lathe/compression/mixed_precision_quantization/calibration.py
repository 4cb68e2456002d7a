"""What has to be known of a network before it is quantised: which layers, with inputs of which range, after folding."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lathe.compression.mixed_precision_quantization.quantizers import mse_clip
from lathe.core.example import call
from lathe.core.surgery import find_sequences, set_module

__all__ = ["Batches", "Range", "Ranges", "as_batches", "calibrate", "fold_batch_norms", "quantizable"]

Batches = list[tuple[Any, ...]]
Observer = Literal["max", "percentile", "mse"]

_KEPT = 1 << 16  # values kept of a layer's inputs for percentiles and mean squared errors


@dataclass(frozen=True)
class Range:
    """What a layer's input looked like during calibration."""

    signed: bool
    """False where no input was negative (after a ReLU): the grid then starts at zero and has twice as many levels."""
    clip: Mapping[int, float]
    """For each bit width, the largest magnitude on the grid."""
    shape: tuple[int, ...]
    """Shape of the last input seen, samples first."""


Ranges = dict[str, Range]
"""Ranges of the inputs by layer, in the order in which the layers run."""


def quantizable(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that can be quantised, by name: `nn.Linear` and `nn.Conv2d`, but no subclasses of them."""
    return {name: each for name, each in model.named_modules() if type(each) in (nn.Linear, nn.Conv2d)}  # type: ignore[misc]


def as_batches(data: Any, batch_size: int = 256, name: str = "calibration") -> Batches:
    """`data` as a list of batches `(inputs, *targets)`.

    Args:
        data: a tuple of tensors `(inputs, *targets)` with equal first dimension, which is cut into batches, or an
            iterable of batches (such as a DataLoader). `inputs` in a batch may be a tensor, a tuple or a dict.

    Raises:
        ValueError: where there is no sample.
    """
    if isinstance(data, Tensor):
        data = (data,)
    if isinstance(data, tuple) and data and all(isinstance(each, Tensor) for each in data):
        cut = [each.split(batch_size) for each in data] if data[0].shape[0] else []
        batches: Batches = list(zip(*cut))
    else:
        batches = [tuple(batch) if isinstance(batch, (tuple, list)) else (batch,) for batch in data]
    if not batches:
        raise ValueError(f"{name} must hold at least one sample, got none")
    return batches


def calibrate(
    model: nn.Module,
    loader: Any,
    observer: Observer = "max",
    *,
    percentile: float = 99.99,
    bits: Iterable[int] = range(2, 9),
    symmetric: bool = False,
) -> Ranges:
    """Ranges of the inputs of all quantisable layers over a calibration set.

    Args:
        loader: batches `(inputs, *targets)` (or a tuple of tensors, or only inputs); targets are not looked at.
        observer: "max" takes the largest magnitude seen; "percentile" the given percentile of the magnitudes, "mse" the
            clip with the least squared rounding error at each bit width, both on a sample of 65 536 values spread over
            all batches.
        bits: the widths to find clips for.
        symmetric: signed grids everywhere, as in the paper; inputs that are never negative then use half of theirs.

    Raises:
        ValueError: where the calibration set is empty, `observer` is unknown, `percentile` is outside (0, 100], or an
            input is not finite or all zero (it names the layer).
    """
    if observer not in ("max", "percentile", "mse"):
        raise ValueError(f"observer must be 'max', 'percentile' or 'mse', got {observer!r}")
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile must be in (0, 100], got {percentile}")
    batches = as_batches(loader)
    seen: dict[str, _Seen] = {}
    keep = max(_KEPT // len(batches), 256) if observer != "max" else 0
    with _watched(model, lambda name, x: seen.setdefault(name, _Seen()).add(x, keep)), torch.no_grad():
        for batch in batches:
            call(model, batch[0])
    return {name: each.range(name, observer, percentile, tuple(bits), symmetric) for name, each in seen.items()}


class _Seen:
    """Running statistics of one layer's inputs."""

    def __init__(self) -> None:
        self.low, self.high = float("inf"), float("-inf")
        self.values: list[Tensor] = []
        self.shape: tuple[int, ...] = ()

    def add(self, x: Tensor, keep: int) -> None:
        low, high = torch.aminmax(x.detach())
        self.low, self.high, self.shape = min(self.low, float(low)), max(self.high, float(high)), tuple(x.shape)
        if keep:
            # At random places (a stride could see one channel only), the same ones in each run.
            places = torch.randint(x.numel(), (keep,), generator=torch.Generator().manual_seed(0))
            self.values.append(
                (x.detach().flatten()[places.to(x.device)] if keep < x.numel() else x.detach().flatten()).float()
            )

    def range(self, name: str, observer: str, percentile: float, bits: tuple[int, ...], symmetric: bool) -> Range:
        largest = max(abs(self.low), abs(self.high))
        if not 0 < largest < float("inf"):  # false for NaN as well
            raise ValueError(
                f"the input of layer {name!r} must be finite and not all zero, got largest magnitude {largest}"
            )
        signed = symmetric or self.low < 0
        if observer == "max":
            clips = dict.fromkeys(bits, largest)
        else:
            values = torch.cat(self.values)
            if observer == "percentile":
                clip = float(values.abs().kthvalue(max(1, round(percentile / 100 * values.numel()))).values)
                clips = dict.fromkeys(bits, clip or largest)
            else:
                clips = {each: float(mse_clip(values, each, signed=signed)) for each in bits}
        return Range(signed, clips, self.shape)


@contextmanager
def _watched(model: nn.Module, see: Any) -> Iterator[None]:
    """Shows the inputs of all quantisable layers to `see(name, x)`, with the network in evaluation mode."""
    modes = [(module, module.training) for module in model.modules()]
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
        for name, module in quantizable(model).items()
    ]
    model.eval()
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode


def fold_batch_norms(model: nn.Module, example: Any = None) -> nn.Module:
    """A copy of `model` in evaluation mode, its batch norms folded into the layers before them where that is exact.

    A batch norm that follows a `nn.Conv2d` or `nn.Linear` (and is the only one to read its output) becomes
    `nn.Identity`; others stay as they are.

    Args:
        example: an input; needed where `torch.fx` cannot trace the network.
    """
    model = copy.deepcopy(model).eval()
    for kinds in ((nn.Conv2d, nn.BatchNorm2d), (nn.Linear, nn.BatchNorm1d)):
        if not any(type(module) is kinds[1] for module in model.modules()):
            continue
        for found in find_sequences(model, kinds, example):
            layer, norm = found.modules
            if norm.running_var is None or norm.running_mean is None:
                continue  # normalises by the batch itself: nothing constant to fold
            _fold(layer, norm)
            set_module(model, found.names[1], nn.Identity())
    return model


@torch.no_grad()
def _fold(layer: nn.Module, norm: nn.Module) -> None:
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    running_mean, running_var = norm.running_mean, norm.running_var
    assert isinstance(running_mean, Tensor) and isinstance(running_var, Tensor)
    factor = (running_var + norm.eps).rsqrt()  # type: ignore[operator]
    if norm.weight is not None:
        factor = factor * norm.weight  # type: ignore[operator]
    bias = layer.bias if layer.bias is not None else torch.zeros_like(running_mean)
    bias = (bias - running_mean) * factor + (norm.bias if norm.bias is not None else 0)  # type: ignore[operator]
    layer.weight.mul_(factor.reshape(-1, *itertools.repeat(1, layer.weight.ndim - 1)))
    layer.bias = nn.Parameter(bias)

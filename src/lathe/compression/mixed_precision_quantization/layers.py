"""`QuantLinear` and `QuantConv2d`: weights packed in 2 to 8 bits; run on integers, or on floats that mimic them.

Executed "native", a layer turns its input into bytes, multiplies them by the integer weights in int32 and scales the
result back. Weights below 8 bits are packed in the state dict and in `stored_bytes`; at the first native call they are
unpacked into the int8 form that the kernel wants, which the layer then holds as well. Executed "simulate", the same
numbers are computed in floating point, on any device; this form can be exported.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from lathe.compression.mixed_precision_quantization.calibration import Range
from lathe.compression.mixed_precision_quantization.kernels import integer_kernel, to_codes
from lathe.compression.mixed_precision_quantization.quantizers import levels, mse_clip, quantize, scale_of
from lathe.core.codes import pack_bits, packed_bytes, unpack_bits
from lathe.core.shapes import conv_arguments, linear_arguments

__all__ = ["QuantConv2d", "QuantLinear", "weight_clip"]


def weight_clip(
    weight: Float[Tensor, " out *rest"], bits: int, *, per_channel: bool = True, observer: Literal["max", "mse"] = "max"
) -> Float[Tensor, " scales"]:
    """Largest magnitude on the grid for a weight: one value, or one for each output channel.

    Channels without a weight other than zero get clip 1.
    """
    rows = weight.detach().float().flatten(1) if per_channel else weight.detach().float().reshape(1, -1)
    if observer == "mse":
        return mse_clip(rows, bits, axis=0)
    largest = rows.abs().amax(1)
    return torch.where(largest > 0, largest, torch.ones_like(largest))


class _Codes(NamedTuple):
    """The grid on which a layer wants its input as bytes."""

    scale: float
    zero: int


class _Quantized(nn.Module):
    """What the two layers share: packed weights, scales, and the two ways to run."""

    packed_weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    bias: Tensor | None
    _kind: Literal["linear", "conv2d"]
    _weight: Tensor | None
    _kernel: Any
    _warned: bool

    def _set_up(
        self, shape: tuple[int, ...], bias: bool, bits: int, activation_bits: int | None, signed: bool,
        per_channel: bool, device: Any, dtype: Any,
    ) -> None:  # fmt: skip
        levels(bits)
        self.bits, self.activation_bits = bits, bits if activation_bits is None else activation_bits
        if self.activation_bits != 16:
            levels(self.activation_bits)
        self.weight_shape, self.signed, self.per_channel = shape, signed, per_channel
        count = torch.Size(shape).numel()
        self.register_buffer("packed_weight", torch.zeros(packed_bytes(count, bits), dtype=torch.uint8, device=device))
        self.register_buffer("weight_scale", torch.ones(shape[0] if per_channel else 1, device=device))
        self.register_buffer("input_scale", torch.ones((), device=device))
        value = torch.zeros(shape[0], device=device, dtype=dtype) if bias else None
        self.bias = nn.Parameter(value, requires_grad=False) if value is not None else None
        self.execute = "simulate"
        self._emits: _Codes | None = None
        self.byte_dtype = dtype or torch.get_default_dtype()
        """Of the result where the input comes as bytes, which do not say in which dtype the network runs."""
        self._forget()

    @torch.no_grad()
    def _store(
        self,
        weight: Tensor,
        bias: Tensor | None,
        clip: Tensor | None,
        input_clip: float,
        observer: Literal["max", "mse"],
    ) -> None:
        """Quantises and packs a floating-point weight."""
        if clip is None:
            clip = weight_clip(weight, self.bits, per_channel=self.per_channel, observer=observer)
        scale = scale_of(clip.detach().float(), self.bits).to(weight.device)
        codes, _ = quantize(weight.float(), self.bits, scale.reshape(-1, *[1] * (weight.ndim - 1)))
        self.packed_weight.copy_(pack_bits(codes, self.bits))
        self.weight_scale.copy_(scale)
        if self.activation_bits != 16:
            self.input_scale.copy_(scale_of(input_clip, self.activation_bits, self.signed))
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)
        self._forget()

    def codes(self) -> Int8[Tensor, " out *rest"]:
        """The integer weights, unpacked."""
        return unpack_bits(self.packed_weight, self.bits, self.weight_shape, signed=True)

    @property
    def weight(self) -> Float[Tensor, " out *rest"]:
        """The weights that the codes stand for, in float32."""
        if self._weight is not None and not torch.compiler.is_compiling():
            return self._weight
        weight = self.codes().float() * self.weight_scale.reshape(-1, *[1] * (len(self.weight_shape) - 1))
        if not torch.compiler.is_compiling():  # an exported network unpacks its weights itself, and stays small
            self._weight = weight
        return weight

    def stored_bytes(self) -> int:
        """Bytes that the layer needs on disk: packed codes, scales, bias."""
        held = [self.packed_weight, self.weight_scale]
        held += [self.input_scale] if self.activation_bits != 16 else []
        held += [self.bias] if self.bias is not None else []
        return sum(each.numel() * each.element_size() for each in held)

    @property
    def is_native(self) -> bool:
        """Whether integer kernels run here; False where `execute` is "simulate" or this machine has none."""
        return self.execute == "native" and self._native_kernel() is not None

    def _native_kernel(self) -> type | None:
        return integer_kernel(self._kind, self.packed_weight.device.type) if self.activation_bits != 16 else None

    def _grid(self) -> tuple[int, int, int]:
        """Lowest and highest code of the input, and what makes them bytes."""
        low, high = levels(self.activation_bits, self.signed)
        return low, high, 128 if self.signed else 0

    def input_codes(self) -> _Codes | None:
        """The grid on which the layer takes bytes instead of floats; None where it does not run on integers."""
        return _Codes(float(self.input_scale), self._grid()[2]) if self.is_native else None

    def emit(self, codes: _Codes | None) -> None:
        """Have native calls return bytes on the grid of the one layer that reads them; None goes back to floats."""
        self._emits = codes

    def forward(self, x: Float[Tensor, " *shape"] | UInt8[Tensor, " *shape"]) -> Tensor:
        if self.execute == "native" and not torch.compiler.is_compiling():
            if self._kernel is not None or self._native_kernel() is not None:
                return self._run_native(x)
            if self.activation_bits != 16 and not self._warned:
                self._warned = True
                warnings.warn(
                    f"no integer kernel for {type(self).__name__} on {self.packed_weight.device.type}: simulating",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return self._simulate(x)

    def _simulate(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        values = x.float()
        if self.activation_bits != 16:
            low, high = levels(self.activation_bits, self.signed)
            zero = torch.zeros(1, dtype=torch.int32, device=x.device)
            values = torch.fake_quantize_per_tensor_affine(values, self.input_scale.reshape(1), zero, low, high)
        return self._linear_map(values, self.weight, bias).to(x.dtype)

    def _run_native(self, x: Tensor) -> Tensor:
        if self._kernel is None:
            self._prepare(x)
        low, high, zero = self._levels
        if x.dtype == torch.uint8:  # bytes from the layer before, which saturate at 0..255
            codes, dtype = x, self.byte_dtype
            if low + zero > 0 or high + zero < 255:
                codes = codes.clamp(low + zero, high + zero)
        else:
            dtype = x.dtype if x.dtype in (torch.float32, torch.bfloat16) else torch.float32
            codes = to_codes(self._prepared(x), self._inverse_scale, zero, low, high)
        if self._emits is not None:
            return self._kernel(codes, torch.uint8, self._emits.scale, self._emits.zero)
        result = self._kernel(codes, dtype)
        return result if x.dtype == dtype or x.dtype == torch.uint8 else result.to(x.dtype)

    def _prepare(self, x: Tensor) -> None:
        """Unpacks the weights into the form that the kernel wants, once."""
        kernel = self._native_kernel()
        assert kernel is not None
        self._levels = self._grid()
        self._inverse_scale = float(self.input_scale.reciprocal())
        bias = None if self.bias is None else self.bias.float()
        self._kernel = kernel(
            self.codes(), self.weight_scale, bias, float(self.input_scale), self._levels[2], **self._geometry(x)
        )

    def _prepared(self, x: Tensor) -> Tensor:
        return x

    def _geometry(self, x: Tensor) -> dict[str, Any]:
        return {}

    def _linear_map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _forget(self) -> None:
        """Drops what is derived from the buffers."""
        self._weight = self._kernel = None
        self._warned = False

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        scales = {name: getattr(self, name) for name in ("weight_scale", "input_scale")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # A change of dtype is for activations; scales in 16 bits would move the whole grid.
        for name, scale in scales.items():
            if getattr(self, name).dtype != scale.dtype:
                setattr(self, name, scale.to(getattr(self, name).device))
        self._forget()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)  # type: ignore[no-untyped-call]
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_weight": None, "_kernel": None}

    def _description(self) -> str:
        inputs = "float" if self.activation_bits == 16 else f"{'int' if self.signed else 'uint'}{self.activation_bits}"
        scales = "per channel" if self.per_channel else "per tensor"
        return f"weight=int{self.bits} {scales}, input={inputs}, execute={self.execute}"


class QuantLinear(_Quantized):
    """A linear layer with weights of 2 to 8 bits.

    Takes the arguments of `nn.Linear`, then its own.

    Args:
        bits: of the weights, 2 to 8.
        activation_bits: of the inputs; None for as many as the weights, 16 to leave them in floating point.
        signed: inputs may be negative; False for inputs after a ReLU, whose grid starts at zero.
        per_channel: a scale for each output, or one for the whole weight.

    Shape: `(*, in_features)` -> `(*, out_features)`, in the input's dtype.

    Raises:
        ValueError: where `bits` or `activation_bits` is out of range, or a scale would not be positive and finite.

    Example:
        >>> layer = QuantLinear.from_trained(nn.Linear(64, 32), 4, Range(True, {4: 3.0}, (1, 64)))
        >>> layer(torch.zeros(5, 64)).shape, layer.stored_bytes()
        (torch.Size([5, 32]), 1284)
    """

    _kind = "linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bits: int = 8,
        activation_bits: int | None = None,
        signed: bool = True,
        per_channel: bool = True,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._set_up((out_features, in_features), bias, bits, activation_bits, signed, per_channel, device, dtype)
        fresh = nn.Linear(in_features, out_features, bias=bias, device=device)
        self._store(fresh.weight, fresh.bias, None, 3.0, "max")

    @classmethod
    def like(cls, layer: nn.Linear, bits: int = 8, **options: Any) -> QuantLinear:
        """A fresh layer that fits where `layer` stood, for inputs of about unit variance."""
        return cls(**linear_arguments(layer), bits=bits, **options)

    @classmethod
    def from_trained(
        cls,
        layer: nn.Linear,
        bits: int,
        ranges: Range | None,
        *,
        per_channel: bool = True,
        observer: Literal["max", "mse"] = "max",
        clip: Float[Tensor, " scales"] | None = None,
    ) -> QuantLinear:
        """The layer quantised.

        Args:
            bits: of weights and inputs.
            ranges: of the layer's inputs, from `calibrate`; None keeps them in floating point (weights only).
            observer: how the weight's clip is found: its largest magnitude, or the least squared error.
            clip: the weight's clip, found elsewhere.
        """
        signed, activation_bits, input_clip = _activation(ranges, bits)
        options: dict[str, Any] = {"activation_bits": activation_bits, "signed": signed, "per_channel": per_channel}
        new = cls(**linear_arguments(layer), bits=bits, **options)
        new._store(layer.weight, layer.bias, clip, input_clip, observer)
        return new

    def _linear_map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._description()}"


class QuantConv2d(_Quantized):
    """A 2-D convolution with weights of 2 to 8 bits.

    Takes the arguments of `nn.Conv2d`, then those of `QuantLinear`. Native inputs and outputs are channels-last in
    memory, which costs a copy at the first layer only.

    Shape: `(batch, in_channels, height, width)` -> `(batch, out_channels, height', width')`, in the input's dtype.
    """

    _kind = "conv2d"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | str | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        bits: int = 8,
        activation_bits: int | None = None,
        signed: bool = True,
        per_channel: bool = True,
    ) -> None:
        super().__init__()
        fresh = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device
        )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = fresh.kernel_size, fresh.stride, fresh.dilation
        self.padding, self.padding_mode = fresh.padding, fresh.padding_mode
        # Left, right, top, bottom: what `F.pad` takes; "same" may need more on one side.
        self._sides = tuple(fresh._reversed_padding_repeated_twice)
        self._set_up(tuple(fresh.weight.shape), bias, bits, activation_bits, signed, per_channel, device, dtype)
        self._store(fresh.weight, fresh.bias, None, 3.0, "max")

    @classmethod
    def like(cls, layer: nn.Conv2d, bits: int = 8, **options: Any) -> QuantConv2d:
        """A fresh layer that fits where `layer` stood, for inputs of about unit variance."""
        return cls(**conv_arguments(layer), bits=bits, **options)

    @classmethod
    def from_trained(
        cls,
        layer: nn.Conv2d,
        bits: int,
        ranges: Range | None,
        *,
        per_channel: bool = True,
        observer: Literal["max", "mse"] = "max",
        clip: Float[Tensor, " scales"] | None = None,
    ) -> QuantConv2d:
        """The layer quantised; arguments as for `QuantLinear.from_trained`."""
        signed, activation_bits, input_clip = _activation(ranges, bits)
        options: dict[str, Any] = {"activation_bits": activation_bits, "signed": signed, "per_channel": per_channel}
        new = cls(**conv_arguments(layer), bits=bits, **options)
        new._store(layer.weight, layer.bias, clip, input_clip, observer)
        return new

    @property
    def _pads_apart(self) -> bool:
        """Whether the padding is made before the convolution: other than zeros, or not the same on both sides."""
        left, right, top, bottom = self._sides
        return self.padding_mode != "zeros" or left != right or top != bottom

    def _padded(self, x: Tensor) -> Tensor:
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self._sides, mode=mode) if self._pads_apart and any(self._sides) else x

    def _padding(self) -> tuple[int, int]:
        return (0, 0) if self._pads_apart else (self._sides[2], self._sides[0])

    def _linear_map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(self._padded(x), weight, bias, self.stride, self._padding(), self.dilation, self.groups)

    def _prepared(self, x: Tensor) -> Tensor:
        return self._padded(x).contiguous(memory_format=torch.channels_last)

    def input_codes(self) -> _Codes | None:
        return None if self._pads_apart else super().input_codes()

    def _geometry(self, x: Tensor) -> dict[str, Any]:
        return {
            "stride": self.stride,
            "padding": self._padding(),
            "dilation": self.dilation,
            "groups": self.groups,
            "shape": self._padded(x).shape if x.dtype != torch.uint8 else x.shape,
        }

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, groups={self.groups}, {self._description()}"
        )


class ByteReLU(nn.ReLU):
    """A ReLU that passes bytes on: those that come from a quantised layer were cut off at zero when they were made."""

    def forward(self, input: Tensor) -> Tensor:
        return input if input.dtype == torch.uint8 else super().forward(input)


def _activation(ranges: Range | None, bits: int) -> tuple[bool, int, float]:
    """Signedness, bits and clip of the inputs."""
    if ranges is None:
        return True, 16, 1.0
    clip: Mapping[int, float] = ranges.clip
    if bits not in clip:
        raise ValueError(f"ranges must hold a clip for {bits} bits, got clips for {sorted(clip)}")
    return ranges.signed, bits, clip[bits]

"""Integer kernels of the machine at hand: which there are (by trying them), and how they are called.

On CPUs, oneDNN multiplies uint8 inputs by int8 weights into int32 and rescales in the same pass; elsewhere
`torch._int_mm` multiplies int8 matrices. A kernel counts as present only if it gets the extreme values right: older
instruction sets saturate at 16 bits between products.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from lathe.core.size import flop_formula

__all__ = ["Int8Conv2d", "Int8Linear", "Int8Product", "integer_kernel", "to_codes"]

# Adding 1.5 * 2^23 to a float32 leaves its integer part, rounded half to even, in the low bits.
_ROUNDING = 12582912.0
# What turns an int8 into the byte that stands for it above 128.
_SIGN = torch.tensor(128, dtype=torch.uint8, device="cpu")


def to_codes(
    x: Float[Tensor, "*shape"], inverse_scale: float, zero: int, low: int, high: int
) -> UInt8[Tensor, "*shape"]:
    """`clip(round(x / scale), low, high) + zero` as bytes, ties to even, exactly as `fake_quantize` rounds.

    Args:
        inverse_scale: 1 / scale, rounded to float32.
        zero: code of zero, which makes signed grids unsigned; `low + zero` and `high + zero` are in 0..255.
    """
    if x.device.type == "cpu" and _has_byte_quantizer():
        return _bytes(x if x.dtype == torch.float32 else x.float(), 1.0 / inverse_scale, zero, low, high)
    return _codes(x, inverse_scale, zero, low, high)


def _codes(x: Tensor, inverse_scale: float, zero: int, low: int, high: int) -> Tensor:
    codes = x.float().mul(inverse_scale) if x.dtype != torch.float32 else x.mul(inverse_scale)
    # Truncating an int32 to its low byte is four times faster than converting floats to uint8.
    return codes.clamp_(low, high).add_(_ROUNDING + zero).view(torch.int32).to(torch.uint8)


def _bytes(x: Tensor, scale: float, zero: int, low: int, high: int) -> Tensor:
    """One pass over the floats in place of four; `int_repr` would copy, and slowly at that: read the storage itself."""
    # Signed grids are rounded around zero and shifted after: adding 128 first would round some products twice.
    quantized = torch.quantize_per_tensor(x, scale, 0, torch.qint8 if zero else torch.quint8)
    codes = torch.empty(0, dtype=torch.uint8).set_(quantized.untyped_storage(), 0, x.shape, quantized.stride())
    if zero:
        codes.bitwise_xor_(_SIGN)
    return codes.clamp_(low + zero, high + zero) if low + zero > 0 or high + zero < 255 else codes


@functools.cache
def _has_byte_quantizer() -> bool:
    """Whether PyTorch still has its quantised tensors (deprecated in 2.13), and they round as we do."""
    x = torch.linspace(-40, 40, 12345)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.equal(_bytes(x, 0.25, 128, -127, 127), _codes(x, 4.0, 128, -127, 127))
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


class Int8Linear:
    """`y = (codes - zero) * input_scale @ (weight * weight_scale)^T + bias`, by oneDNN.

    Args:
        weight: int8 codes, `(out_features, in_features)`.
        weight_scale: float32, a value for each output or one.
        zero: code that stands for zero in the inputs.
    """

    def __init__(
        self,
        weight: Int8[Tensor, "out_features in_features"],
        weight_scale: Float[Tensor, " scales"],
        bias: Float[Tensor, " out_features"] | None,
        input_scale: float,
        zero: int,
    ) -> None:
        self.input_scale, self.zero, self.bias = input_scale, zero, bias
        self.weight_scale = weight_scale.expand(weight.shape[0]).contiguous()
        self.weight_zero = torch.zeros(weight.shape[0], dtype=torch.int32)
        self.weight = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)

    def __call__(
        self,
        codes: UInt8[Tensor, "*batch in_features"],
        dtype: torch.dtype,
        output_scale: float = 1.0,
        output_zero: int = 0,
    ) -> Tensor:
        """The result in `dtype`; uint8 gives codes of step `output_scale`, saturated to 0..255."""
        return torch.ops.onednn.qlinear_pointwise(
            codes, self.input_scale, self.zero, self.weight, self.weight_scale, self.weight_zero, self.bias,
            output_scale, output_zero, dtype, "none", [], "",
        )  # fmt: skip


class Int8Conv2d:
    """As `Int8Linear`, for a 2-D convolution with zero padding; activations are channels-last."""

    def __init__(
        self,
        weight: Int8[Tensor, "out_channels in_channels height width"],
        weight_scale: Float[Tensor, " scales"],
        bias: Float[Tensor, " out_channels"] | None,
        input_scale: float,
        zero: int,
        *,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        shape: Sequence[int],
    ) -> None:
        self.input_scale, self.zero, self.bias = input_scale, zero, bias
        self.geometry = (list(stride), list(padding), list(dilation), groups)
        self.weight_scale = weight_scale.expand(weight.shape[0]).contiguous()
        self.weight_zero = torch.zeros(weight.shape[0], dtype=torch.int32)
        # The layout that oneDNN prefers depends on the input's shape; other shapes run as well.
        self.weight = torch.ops.onednn.qconv_prepack(
            weight.contiguous(), self.weight_scale, input_scale, zero, *self.geometry, list(shape)
        )

    def __call__(
        self,
        codes: UInt8[Tensor, "batch channels height width"],
        dtype: torch.dtype,
        output_scale: float = 1.0,
        output_zero: int = 0,
    ) -> Tensor:
        """The result in `dtype`; uint8 gives codes of step `output_scale`, saturated to 0..255."""
        return torch.ops.onednn.qconv_pointwise(
            codes.contiguous(memory_format=torch.channels_last), self.input_scale, self.zero, self.weight,
            self.weight_scale, self.weight_zero, self.bias, *self.geometry, output_scale, output_zero, dtype,
            "none", [], "",
        )  # fmt: skip


class Int8Product:
    """As `Int8Linear`, by `torch._int_mm` (CUDA and others): int32 products, rescaled in a second pass."""

    def __init__(
        self,
        weight: Int8[Tensor, "out_features in_features"],
        weight_scale: Float[Tensor, " scales"],
        bias: Float[Tensor, " out_features"] | None,
        input_scale: float,
        zero: int,
    ) -> None:
        # CUDA wants sizes in multiples of 8, and more than 16 rows; zeros change no product.
        self.out_features = weight.shape[0]
        padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 8, 0, -weight.shape[0] % 8))
        self.weight = padded.t()
        self.padding = padded.shape[1] - weight.shape[1]
        self.scale = input_scale * weight_scale
        # Codes minus 128 fit int8; what that takes away is a constant a row of the weight.
        self.offset = (128 - zero) * weight.sum(1, dtype=torch.int32)
        self.bias = bias

    def __call__(
        self,
        codes: UInt8[Tensor, "*batch in_features"],
        dtype: torch.dtype,
        output_scale: float = 1.0,
        output_zero: int = 0,
    ) -> Tensor:
        """The result in `dtype`; uint8 gives codes of step `output_scale`, saturated to 0..255."""
        rows = codes.reshape(-1, codes.shape[-1])
        signed = torch.nn.functional.pad(
            (rows ^ 128).view(torch.int8), (0, self.padding, 0, max(0, 17 - rows.shape[0]))
        )
        products = torch._int_mm(signed, self.weight)[: rows.shape[0], : self.out_features] + self.offset
        result = products * self.scale
        if self.bias is not None:
            result = result + self.bias
        if dtype == torch.uint8:
            result = (result / output_scale).round_().add_(output_zero).clamp_(0, 255)
        return result.to(dtype).unflatten(0, codes.shape[:-1])


@functools.cache
def integer_kernel(
    layer: Literal["linear", "conv2d"], device: str
) -> type[Int8Linear | Int8Conv2d | Int8Product] | None:
    """The integer kernel for this kind of layer on this kind of device, or None where there is none that is right."""
    candidates: list[type] = [Int8Linear if layer == "linear" else Int8Conv2d] if device == "cpu" else []
    if layer == "linear":
        candidates.append(Int8Product)
    return next((each for each in candidates if _is_right(each, device)), None)


def _is_right(kernel: type, device: str) -> bool:
    """Whether products of the largest codes come out exactly."""
    size = 32
    signs = torch.where(torch.arange(size * size) % 3 == 0, -127, 127).to(torch.int8).view(size, size).to(device)
    codes = torch.full((size, size), 255, dtype=torch.uint8, device=device)
    codes[::2, ::3] = 0
    expected = (codes.double() - 7) @ signs.double().T
    scale = torch.ones(1, device=device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if kernel is Int8Conv2d:
                image = codes.T.reshape(1, size, size, 1)
                run = kernel(
                    signs[:, :, None, None], scale, None, 1.0, 7,
                    stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, shape=image.shape,
                )  # fmt: skip
                result = run(image, torch.float32)[0, :, :, 0].T
            else:
                result = kernel(signs, scale, None, 1.0, 7)(codes, torch.float32)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return torch.equal(result.double(), expected)


# What `measure` counts for the packed layers: an integer multiply-add is two operations, as a float one is.
if hasattr(torch.ops.onednn, "qlinear_pointwise") and hasattr(torch.ops.onednn, "qconv_pointwise"):

    @flop_formula(torch.ops.onednn.qlinear_pointwise)
    def _linear_operations(codes_shape, *_, out_shape, **__) -> int:
        return 2 * math.prod(codes_shape) * out_shape[-1]

    @flop_formula(torch.ops.onednn.qconv_pointwise)
    def _convolution_operations(codes_shape, scale, zero, weight_shape, *_, out_shape, **__) -> int:
        return 2 * math.prod(out_shape) * math.prod(weight_shape[1:])

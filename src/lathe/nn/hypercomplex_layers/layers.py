"""Drop-in layers whose weight is a sum of n Kronecker products: about 1/n of the parameters, the same cost to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Unpack, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lathe.core.precision import autocasts
from lathe.nn.hypercomplex_layers.weight import HypercomplexLayer, Options

__all__ = [
    "PHConv1d",
    "PHConv2d",
    "PHConv3d",
    "PHConvTranspose1d",
    "PHConvTranspose2d",
    "PHConvTranspose3d",
    "PHLinear",
]

Size = int | Sequence[int]


class PHLinear(HypercomplexLayer):
    """Parameterised hypercomplex multiplication (PHM): `nn.Linear` with n**3 + in * out / n weights.

    Takes the arguments of `nn.Linear`, then those of `HypercomplexLayer`.

    Shape: `(*, in_features)` -> `(*, out_features)`.

    Example:
        >>> sum(p.numel() for p in PHLinear(64, 32, n=4, bias=False).parameters())
        576

    Source: Zhang et al. 2021 (arXiv 2102.08597), equations 3-4.
    """

    replaces = nn.Linear

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, n: int = 4, **options: Unpack[Options]
    ) -> None:
        _check_divides(n, 1, in_features=in_features, out_features=out_features)
        super().__init__((out_features, in_features), out_features, 1, bias, n=n, **options)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        """`x H^T + bias`; for a few rows the factors are applied one after the other, and H is never made.

        Raises:
            ValueError: where the last dimension of x is not in_features.
        """
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must have {self.in_features} features in its last dimension, got {tuple(x.shape)}")
        if self._makes_no_weight(x):
            return self._apply_factors(x)
        return functional.linear(x, self.weight, self.bias)

    def _makes_no_weight(self, x: Tensor) -> bool:
        # Building H costs terms * s * d and reads it back; the factors cost rows * (terms * n * d + s * d) on small
        # matrices. Measured on CPU: they win up to about 8 rows, once H outgrows the fast caches. A compiled graph does
        # not branch on the number of rows, which may be symbolic there.
        return (
            not torch.compiler.is_compiling()
            and x.numel() <= 8 * self.in_features
            and self.in_features * self.out_features >= 2**17
            and x.dtype in (torch.float32, torch.float64)
            and not autocasts(x.device)
        )

    def _apply_factors(self, x: Tensor) -> Tensor:
        # (rows, terms, n, d/n) -> (terms, rows * n, d/n): each term's mixture of the components, ready for its filters.
        mixed = torch.matmul(self.A, x.reshape(-1, 1, self.n, self.in_features // self.n)).transpose(0, 1).flatten(1, 2)
        if self.F is not None:
            y = torch.bmm(mixed, self.F.mT)
        else:
            assert self.U is not None and self.V is not None
            y = torch.bmm(torch.bmm(mixed, self.V.mT), self.U.mT)
        y = y.sum(0).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """As `nn.Linear`, then n."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, {super().extra_repr()}"

    def _plain_arguments(self) -> dict[str, Any]:
        return {"in_features": self.in_features, "out_features": self.out_features, "bias": self.bias is not None}


class _PHConv(HypercomplexLayer):
    """A convolution of any rank, forwards or transposed; `replaces` is the plain one."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    padding_mode: str
    convolve: ClassVar[Callable[..., Tensor]]

    def __init__(
        self, in_channels: int, out_channels: int, arguments: dict[str, Any], bias: bool, n: int, options: Options
    ) -> None:
        # The plain layer, without memory behind it, judges the arguments and brings them into their normal form.
        plain: Any = self.replaces(in_channels, out_channels, **arguments, bias=bias, device="meta")
        groups = arguments["groups"]
        _check_divides(n, groups, in_channels=in_channels, out_channels=out_channels)
        super().__init__(tuple(plain.weight.shape), out_channels, groups, bias, n=n, **options)
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode"):
            setattr(self, name, getattr(plain, name))
        self.output_padding = plain.output_padding
        self._border: list[int] = plain._reversed_padding_repeated_twice

    def _check_input(self, x: Tensor) -> None:
        rank = len(self.kernel_size)
        if x.ndim not in (rank + 1, rank + 2) or x.shape[-rank - 1] != self.in_channels:
            raise ValueError(
                f"x must be (batch, {self.in_channels}, {rank} spatial dimensions), batch optional, "
                f"got {tuple(x.shape)}"
            )

    def forward(self, x: Float[Tensor, "*batch_in_space"]) -> Float[Tensor, "*batch_out_space"]:
        """As the replaced convolution, with H for its weight.

        Raises:
            ValueError: where x has another number of channels or dimensions.
        """
        self._check_input(x)
        padding: str | int | tuple[int, ...] = self.padding
        if self.padding_mode != "zeros":
            x, padding = functional.pad(x, self._border, mode=self.padding_mode), 0
        return type(self).convolve(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """As the replaced convolution, then n."""
        return f"{_ConvNd.extra_repr(cast(Any, self))}, {super().extra_repr()}"

    def _plain_arguments(self) -> dict[str, Any]:
        names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"]
        names += ["padding_mode"] + ["output_padding"] * self.transposed
        return {name: getattr(self, name) for name in names} | {"bias": self.bias is not None}


class _PHConvForward(_PHConv):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: str | Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        n: int = 4,
        **options: Unpack[Options],
    ) -> None:
        arguments = {
            "kernel_size": kernel_size,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "padding_mode": padding_mode,
        }
        super().__init__(in_channels, out_channels, arguments, bias, n, options)


class _PHConvTranspose(_PHConv):
    transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: str = "zeros",
        *,
        n: int = 4,
        **options: Unpack[Options],
    ) -> None:
        arguments = {
            "kernel_size": kernel_size,
            "stride": stride,
            "padding": padding,
            "output_padding": output_padding,
            "dilation": dilation,
            "groups": groups,
            "padding_mode": padding_mode,
        }
        super().__init__(in_channels, out_channels, arguments, bias, n, options)

    def forward(
        self, x: Float[Tensor, "*batch_in_space"], output_size: Sequence[int] | None = None
    ) -> Float[Tensor, "*batch_out_space"]:
        """As the replaced transposed convolution, with H for its weight.

        Raises:
            ValueError: where x has another number of channels or dimensions, or output_size cannot be reached.
        """
        self._check_input(x)
        output_padding = _ConvTransposeNd._output_padding(
            cast(Any, self),
            x,
            cast(Any, output_size),
            cast(Any, self.stride),
            cast(Any, self.padding),
            cast(Any, self.kernel_size),
            len(self.kernel_size),
            cast(Any, self.dilation),
        )
        return type(self).convolve(
            x, self.weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        )


class PHConv1d(_PHConvForward):
    """Parameterised hypercomplex convolution (PHC) in place of `nn.Conv1d`.

    Takes the arguments of `nn.Conv1d`, then those of `HypercomplexLayer`.
    """

    replaces = nn.Conv1d
    convolve = functional.conv1d


class PHConv2d(_PHConvForward):
    """Parameterised hypercomplex convolution (PHC) in place of `nn.Conv2d`: n**3 + s d k / n weights instead of s d k.

    Takes the arguments of `nn.Conv2d`, then those of `HypercomplexLayer`.

    Shape: `(batch, in_channels, height, width)` -> `(batch, out_channels, height', width')`.

    Example:
        >>> sum(p.numel() for p in PHConv2d(64, 64, 3, bias=False, n=4).parameters())
        9280
    """

    replaces = nn.Conv2d
    convolve = functional.conv2d


class PHConv3d(_PHConvForward):
    """Parameterised hypercomplex convolution (PHC) in place of `nn.Conv3d`.

    Takes the arguments of `nn.Conv3d`, then those of `HypercomplexLayer`.
    """

    replaces = nn.Conv3d
    convolve = functional.conv3d


class PHConvTranspose1d(_PHConvTranspose):
    """Parameterised hypercomplex transposed convolution in place of `nn.ConvTranspose1d`; F is (n, d/n, s/n, k)."""

    replaces = nn.ConvTranspose1d
    convolve = functional.conv_transpose1d


class PHConvTranspose2d(_PHConvTranspose):
    """Parameterised hypercomplex transposed convolution in place of `nn.ConvTranspose2d`; F is (n, d/n, s/n, k, k)."""

    replaces = nn.ConvTranspose2d
    convolve = functional.conv_transpose2d


class PHConvTranspose3d(_PHConvTranspose):
    """Parameterised hypercomplex transposed convolution in place of `nn.ConvTranspose3d`.

    F is (n, d/n, s/n, k, k, k).
    """

    replaces = nn.ConvTranspose3d
    convolve = functional.conv_transpose3d


def _check_divides(n: int, groups: int, **counts: int) -> None:
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    unit = n * groups
    for name, count in counts.items():
        if count < 1 or count % unit:
            below, above = count // unit * unit, (max(count, 0) // unit + 1) * unit
            nearest = f"{below} or {above}" if below > 0 else f"{above}"
            per = f"n * groups = {n} * {groups}" if groups > 1 else f"n = {n}"
            raise ValueError(f"{name} must be a multiple of {per}, got {count}; the nearest is {nearest}")

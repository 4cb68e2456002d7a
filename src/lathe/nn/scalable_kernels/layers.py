"""Drop-in layers for a linear layer with its activation: features of the input times features of the parameters."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lathe.core.shapes import linear_arguments
from lathe.nn.scalable_kernels.features import URF, feature_map
from lathe.nn.scalable_kernels.projections import Orthogonality
from lathe.nn.scalable_kernels.readout import NormalEquations
from lathe.nn.scalable_kernels.spectra import Activation, named_function

__all__ = ["SNNKConv1x1", "SNNKLinear"]

Layer = TypeVar("Layer", bound="SNNKLinear")


class SNNKLinear(nn.Module):
    """A linear layer and its activation as a scalable neural network kernel: y = phi(x) weight^T + bias.

    Takes the arguments of `nn.Linear`, then its own. The trained parameters are `weight`, out_features x features
    instead of out_features x in_features, and `bias`; the random directions of phi are buffers that never change.
    That saves parameters, not always time: a forward costs m (in + out) instead of in * out.

    Args:
        bias: whether an offset is added to the outputs. Activations with a constant part (sigmoid, GELU, ...) have a
            constant feature in its place, and never a `bias`.
        num_features: m. The features are m for "relu", "step" and "relu2", and 2m (+ 1 with a constant part) for all
            other activations.
        activation: "relu" is the arc-cosine layer of the paper, which is no function of w^T x; likewise "step" and
            "relu2". All other names, and functions (also `torch.relu`), are universal random features; see `URF`.
        M, orthogonal, window, squared_norm: as in `URF`.
        floor: of the arc-cosine features; see `ArcCosFeatures`.
        input_scale: inputs are multiplied by it within phi; by default 1 / sqrt(in_features), which brings inputs of
            unit variance to unit norm.
        seed: of the directions; None draws from torch's global generator.

    Shape: `(*, in_features)` -> `(*, out_features)`.

    Attributes:
        relative_error: of `from_trained` with data: Frobenius norm of what is missing of the outputs, over that of the
            outputs; else None.

    Raises:
        ValueError: for num_features below 1, an unknown activation, and as `URF`.

    Example:
        >>> sum(p.numel() for p in SNNKLinear(768, 768, num_features=16).parameters())
        13056

    Source: section 3 (SNNKs); the parameters are trained as the reference code does.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        num_features: int = 64,
        activation: Activation = "relu",
        M: float | Literal["auto"] = "auto",
        orthogonal: Orthogonality = True,
        window: float = 4.0,
        squared_norm: float = 2.0,
        floor: float = 0.0,
        input_scale: float | None = None,
        seed: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, count in (("in_features", in_features), ("out_features", out_features)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_features, self.out_features = in_features, out_features
        self._input_scale = in_features**-0.5 if input_scale is None else float(input_scale)
        self.features = feature_map(
            activation,
            in_features,
            num_features,
            bias=bias,
            floor=floor,
            M=M,
            orthogonal=orthogonal,
            window=window,
            squared_norm=squared_norm,
            input_scale=self._input_scale,
            seed=seed,
            **made,
        )
        constant = isinstance(self.features, URF) and self.features.constant is not None
        self.weight = nn.Parameter(torch.empty(out_features, self.features.feature_dim, **made))
        offset = nn.Parameter(torch.empty(out_features, **made)) if bias and not constant else None
        self.register_parameter("bias", offset)
        self.relative_error: float | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, variance: float = 1 / 3, generator: torch.Generator | None = None) -> None:
        """Draws weight and bias anew; the directions stay.

        Args:
            variance: of the outputs, for inputs of unit variance; by default that of a fresh `nn.Linear`.
        """
        if self.weight.is_meta:
            return
        power = float(self.features.mean_squared_norm(self._input_scale**2 * self.in_features))
        bound = math.sqrt(3 * variance / power)
        self.weight.uniform_(-bound, bound, generator=generator)
        if self.bias is not None:
            self.bias.uniform_(-(self.in_features**-0.5), self.in_features**-0.5, generator=generator)

    @classmethod
    def like(cls: type[Layer], layer: nn.Module, **options: Any) -> Layer | None:
        """A fresh layer that fits where `layer` (and the activation after it) stood: shapes, device, dtype and mode.

        Args:
            options: of the constructor.

        Raises:
            TypeError: where `layer` is not of the type that this layer replaces.
        """
        arguments = cls._arguments_of(layer)
        if arguments is None:
            return None
        made = cls(**arguments, **options)
        weight = cast(Tensor, layer.weight)
        if not weight.is_meta:
            made.reset_parameters(weight.shape[1] * float(weight.detach().double().square().mean()))
        return made.train(layer.training)

    @classmethod
    @torch.no_grad()
    def from_trained(
        cls: type[Layer],
        layer: nn.Module,
        *,
        activation: Activation = "relu",
        data: Float[Tensor, "*samples"] | None = None,
        refit: bool = True,
        ridge: float = 1e-4,
        **options: Any,
    ) -> Layer | None:
        """As `like`, starting from the trained weights: weight = psi(W, b), the features of the parameters.

        Scale, window and squared_norm are set so that inputs and weights have the same norm; the expectation does not
        depend on that. Without data, inputs of zero mean and unit variance are assumed.

        Args:
            data: inputs of this layer, for those settings, and to fit the weight to the layer's own outputs.
            refit: False keeps psi(W, b), also where there is data. With "relu" that is not an approximation of the
                layer.
            ridge: see `fit_bundled`.

        Raises:
            TypeError: where `layer` is not of the type that this layer replaces.
            ValueError: where data is empty or does not fit the layer.

        Warns:
            UserWarning: where psi(W, b) is kept although its predicted error is as large as what it estimates.
        """
        arguments = cls._arguments_of(layer)
        if arguments is None:
            return None
        weight, bias = cast(Tensor, layer.weight).flatten(1), cast("Tensor | None", layer.bias)
        rows = None if data is None else cls._rows(data, weight.shape[1])
        before = None if rows is None else functional.linear(rows, weight, bias)
        refit = refit and rows is not None
        settings = balanced(weight, bias, inputs=rows, preactivations=before, refit=refit)
        made = cls(**arguments, activation=activation, **(settings | options))
        made.weight.copy_(made.features.psi(weight, bias))
        if made.bias is not None:
            made.bias.zero_()
        if not refit and isinstance(made.features, URF):
            _warn_of_noise(cls.__name__, made.features, rows, weight, bias)
        if rows is not None and before is not None:
            outputs = named_function(activation)(before)
            if refit:
                equations = NormalEquations(intercept=made.bias is not None)
                for x, y in zip(rows.split(4096), outputs.split(4096)):
                    equations.add(made.features.phi(x), y)
                A = equations.solve(ridge)
                made.weight.copy_(A[:, : made.weight.shape[1]])
                if made.bias is not None:
                    made.bias.copy_(A[:, -1])
            missing = torch.cat([SNNKLinear.forward(made, x) for x in rows.split(4096)]) - outputs
            made.relative_error = float(missing.double().norm() / outputs.double().norm().clamp(min=1e-300))
        return made.train(layer.training)

    @classmethod
    def _arguments_of(cls, layer: nn.Module) -> dict[str, Any] | None:
        """Constructor arguments of the layer to be replaced; None where it is to be left alone."""
        return linear_arguments(layer)

    @staticmethod
    def _rows(data: Tensor, in_features: int) -> Tensor:
        """Inputs of the layer as a matrix."""
        if data.ndim < 2 or data.shape[-1] != in_features or not data.numel():
            raise ValueError(f"data must be (samples, {in_features}), got {tuple(data.shape)}")
        return data.detach().flatten(0, -2)

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        """phi(x) weight^T + bias.

        Raises:
            ValueError: where the last dimension of x is not in_features.
        """
        return functional.linear(self.features.phi(x), self.weight, self.bias)

    def extra_repr(self) -> str:
        """As `nn.Linear`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class SNNKConv1x1(SNNKLinear):
    """`SNNKLinear` at every pixel, in place of an `nn.Conv2d` with a kernel of 1 x 1 and its activation.

    `like` and `from_trained` return None for other kernels, which leaves them alone in `swap`.

    Args:
        stride: of the pixels that are kept.
        options: see `SNNKLinear`.

    Shape: `(batch, in_channels, height, width)` -> `(batch, out_channels, height', width')`; the batch is optional.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        *,
        stride: tuple[int, int] = (1, 1),
        **options: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, bias, **options)
        self.stride = stride

    @classmethod
    def _arguments_of(cls, layer: nn.Module) -> dict[str, Any] | None:
        if not isinstance(layer, nn.Conv2d):
            raise TypeError(f"layer must be an nn.Conv2d, got {type(layer).__name__}")
        if layer.kernel_size != (1, 1) or layer.groups != 1 or layer.padding not in ((0, 0), "valid", "same"):
            return None
        return {
            "in_channels": layer.in_channels,
            "out_channels": layer.out_channels,
            "bias": layer.bias is not None,
            "stride": layer.stride,
            "device": layer.weight.device,
            "dtype": layer.weight.dtype,
        }

    @staticmethod
    def _rows(data: Tensor, in_features: int) -> Tensor:
        if data.ndim != 4 or data.shape[1] != in_features or not data.numel():
            raise ValueError(f"data must be (batch, {in_features}, height, width), got {tuple(data.shape)}")
        return data.detach().movedim(1, -1).flatten(0, -2)

    def forward(
        self, x: Float[Tensor, "*batch in_channels height width"]
    ) -> Float[Tensor, "*batch out_channels new_height new_width"]:
        """`SNNKLinear` along the channels.

        Raises:
            ValueError: where x is no image or batch of images with in_channels channels.
        """
        if x.ndim not in (3, 4) or x.shape[-3] != self.in_features:
            raise ValueError(f"x must be (batch, {self.in_features}, height, width), got {tuple(x.shape)}")
        x = x[..., :: self.stride[0], :: self.stride[1]]
        return super().forward(x.movedim(-3, -1)).movedim(-1, -3)


def balanced(
    weight: Tensor,
    bias: Tensor | None,
    *,
    inputs: Tensor | None,
    preactivations: Tensor | None,
    refit: bool,
    squares: float | None = None,
) -> dict[str, Any]:
    """input_scale, window and squared_norm for these weights and inputs.

    a = (mean |w|^2 / mean |x|^2)^(1/4) makes a x and w / a equally long, which is where |a x + w / a|^2 is least. For
    a weight that is refitted w does not matter: the longest input gets norm 1, since features grow with exp |x|^2.

    Args:
        inputs: of the layer.
        preactivations: what the window is to hold.
        squares: mean |x|^2, where there are no inputs; by default as many as the layer has.
    """
    of_weight = max(float(weight.double().square().sum(1).mean()), 1e-12)
    inner = 0.0
    if inputs is not None:
        squares = float(inputs.double().square().sum(1).mean())
        inner = float(weight.double().mean(0) @ inputs.double().mean(0))
    squares = max(float(weight.shape[1]) if squares is None else squares, 1e-12)
    if preactivations is None:
        reach = 4 * math.sqrt(squares / weight.shape[1]) * weight.double().norm(dim=1)
        reach = reach + (0 if bias is None else bias.double().abs())
    else:
        reach = preactivations.abs()
    window = max(1.05 * float(reach.max()), 0.5)
    shared = math.sqrt(of_weight * squares)
    if refit and inputs is not None:
        longest = max(float(torch.linalg.vector_norm(inputs.double(), dim=1).max()), 1e-6)
        return {"window": window, "input_scale": 1 / longest, "squared_norm": 2.0}
    return {
        "window": window,
        "input_scale": math.sqrt(shared / squares),
        "squared_norm": max(2 * (shared + inner), 0.0),
    }


def _warn_of_noise(name: str, features: URF, x: Tensor | None, weight: Tensor, bias: Tensor | None) -> None:
    if x is None:
        x = torch.randn(64, weight.shape[1], generator=torch.Generator().manual_seed(0), device="cpu").to(weight)
    predicted = features.relative_error(x[:64], weight[:64], None if bias is None else bias[:64])
    if predicted > 1:
        warnings.warn(
            f"{name}: psi(W, b) is predicted to err by {predicted:.1e} of the outputs; refit it to data, or take more "
            f"features than {features.num_features} or inputs and weights of lower norm",
            stacklevel=4,
        )

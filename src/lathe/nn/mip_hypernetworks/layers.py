"""Layers without weights of their own, for networks that are written to be driven by a hypernetwork.

Any network can be driven without them (`hypernetize`); they say in the network's own code what is predicted, and hold
no memory for weights that would only be replaced.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from lathe.core.shapes import conv_arguments, linear_arguments

__all__ = ["ExternalWeights", "HyperConv1d", "HyperConv2d", "HyperConv3d", "HyperLinear", "external_shapes"]


class ExternalWeights(nn.Module):
    """A layer whose tensors come from outside; `external` has their shapes by name."""

    external: dict[str, tuple[int, ...]]

    def _make_external(self) -> None:
        self.external = {name: tuple(value.shape) for name, value in self._parameters.items() if value is not None}
        for name in self.external:
            self._parameters[name] = None

    def _require_weights(self) -> None:
        missing = [name for name in self.external if self._parameters[name] is None]
        if missing:
            raise RuntimeError(
                f"{type(self).__name__} was called without {' and '.join(missing)}, which come from outside: call the "
                "network through HyperDriven with its gamma, or inside using_weights(network, weights)"
            )


def external_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a network that come from outside, by name; what `HyperNetwork` has to predict."""
    return {
        f"{prefix}.{name}" if prefix else name: shape
        for prefix, module in model.named_modules()
        if isinstance(module, ExternalWeights)
        for name, shape in module.external.items()
    }


class HyperLinear(ExternalWeights, nn.Linear):
    """`nn.Linear` with weight and bias from outside.

    Takes the arguments of `nn.Linear` but for device and dtype, which are those of the weights that come.

    Shape: `(*batch, in_features)` -> `(*batch, out_features)`.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device="meta")
        self._make_external()

    @classmethod
    def like(cls, linear: nn.Linear) -> HyperLinear:
        """A layer of the same shapes and mode, without the weights."""
        arguments = linear_arguments(linear)
        made = cls(arguments["in_features"], arguments["out_features"], arguments["bias"])
        return made.train(linear.training)

    def forward(self, x: Float[Tensor, "*batch_in"]) -> Float[Tensor, "*batch_out"]:
        """As `nn.Linear`.

        Raises:
            RuntimeError: where no weights came.
            ValueError: where x has another number of features.
        """
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must have {self.in_features} features in its last dimension, got {tuple(x.shape)}")
        self._require_weights()
        return nn.Linear.forward(self, x)

    def extra_repr(self) -> str:
        """As `nn.Linear`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={'bias' in self.external}"


class _HyperConv(ExternalWeights, nn.modules.conv._ConvNd):
    replaces: type[nn.modules.conv._ConvNd]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.replaces.__init__(self, *args, **{**kwargs, "device": "meta"})
        self._make_external()

    @classmethod
    def like(cls, conv: nn.Module) -> Any:
        """A layer of the same shapes and mode, without the weights."""
        if not isinstance(conv, cls.replaces):
            raise TypeError(f"{cls.__name__} replaces nn.{cls.replaces.__name__}, got {type(conv).__name__}")
        arguments = conv_arguments(conv)
        made = cls(**{name: value for name, value in arguments.items() if name not in ("device", "dtype")})
        return made.train(conv.training)

    def forward(self, x: Float[Tensor, "*batch_in_space"]) -> Float[Tensor, "*batch_out_space"]:
        """As the replaced convolution.

        Raises:
            RuntimeError: where no weights came.
            ValueError: where x has another number of channels or dimensions.
        """
        rank = len(self.kernel_size)
        if x.ndim not in (rank + 1, rank + 2) or x.shape[-rank - 1] != self.in_channels:
            raise ValueError(
                f"x must be (batch, {self.in_channels}, {rank} spatial dimensions), batch optional, "
                f"got {tuple(x.shape)}"
            )
        self._require_weights()
        return self._conv_forward(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """As the replaced convolution, which prints what its bias is."""
        return super().extra_repr().replace(", bias=False", "") + ", bias=False" * ("bias" not in self.external)


class HyperConv1d(_HyperConv, nn.Conv1d):
    """`nn.Conv1d` with weight and bias from outside; takes its arguments but for device and dtype."""

    replaces = nn.Conv1d


class HyperConv2d(_HyperConv, nn.Conv2d):
    """`nn.Conv2d` with weight and bias from outside; takes its arguments but for device and dtype.

    Shape: `(batch, in_channels, height, width)` -> `(batch, out_channels, height', width')`.
    """

    replaces = nn.Conv2d


class HyperConv3d(_HyperConv, nn.Conv3d):
    """`nn.Conv3d` with weight and bias from outside; takes its arguments but for device and dtype."""

    replaces = nn.Conv3d

"""Six drop-in layers that normalise and activate at once: EvoNorm-B0, B1, B2 and EvoNorm-S0, S1, S2.

The B layers stand where a BatchNorm and its activation stood; the S layers where a GroupNorm and its activation
stood, and give the same answer at any batch size, in training and in evaluation.
Liu, Brock, Simonyan, Le, "Evolving Normalization-Activation Layers", 2020, arXiv 2004.02967, Table 2.

    B0  y = weight * x / max(s_b, v x + s_i) + bias          S0  y = weight * x sigmoid(v x) / s_g + bias
    B1  y = weight * x / max(s_b, (x + 1) r_i) + bias        S1  y = weight * x sigmoid(x) / s_g + bias
    B2  y = weight * x / max(s_b, r_i - x) + bias            S2  y = weight * x sigmoid(x) / r_g + bias

s is a (biased) standard deviation, r a root mean square; b over batch and space, i over the space of one sample and
channel, g over space and the channels of a group of one sample. None of them subtracts a mean.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lathe.nn.evonorm.kernels import BatchForm, batch_evonorm, sample_evonorm

__all__ = ["EvoNormB0", "EvoNormB1", "EvoNormB2", "EvoNormS0", "EvoNormS1", "EvoNormS2"]

Layer = TypeVar("Layer", bound="_EvoNorm")


class _EvoNorm(nn.Module):
    """What all six share: the affine parameters, the checks, and how one is made from a trained normalisation."""

    _trains_v: ClassVar[bool] = False

    weight: nn.Parameter
    bias: nn.Parameter
    v: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        *,
        nonlinear: bool,
        eps: float,
        zero_init: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if num_features <= 0:
            raise ValueError(f"num_features must be at least 1, got {num_features}")
        if not eps > 0:
            raise ValueError(f"eps must be above 0, got {eps}")
        self.num_features, self.nonlinear, self.eps, self.zero_init = num_features, nonlinear, eps, zero_init
        self.weight = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        if self._trains_v and nonlinear:
            self.v = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        else:
            self.register_parameter("v", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight one (zero with `zero_init`), bias zero, v one: the paper's start."""
        with torch.no_grad():
            self.weight.fill_(0.0 if self.zero_init else 1.0)
            self.bias.zero_()
            if self.v is not None:
                self.v.fill_(1.0)

    @classmethod
    def like(cls: type[Layer], norm: nn.Module, *, keep_eps: bool = False, **options: Any) -> Layer:
        """A fresh layer that fits where `norm` stood: same number of channels, device and dtype.

        Args:
            norm: a BatchNorm, SyncBatchNorm, InstanceNorm, GroupNorm, or a LayerNorm over channels.
            keep_eps: take eps from `norm` too, instead of this layer's own default.
            options: this layer's keyword-only arguments.

        Raises:
            TypeError: where `norm` is none of these.
        """
        channels, weight = _channels(norm), getattr(norm, "weight", None)
        if weight is not None:
            options = {"device": weight.device, "dtype": weight.dtype} | options
        if keep_eps:
            options = {"eps": norm.eps} | options
        return cls(channels, **options)

    @classmethod
    def from_trained(
        cls: type[Layer],
        norm: nn.Module,
        activation: nn.Module | None = None,
        *,
        inputs: Float[Tensor, "batch channels *spatial"] | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Layer:
        """As `like`, starting near the trained pair: least squares of each channel's output on this layer's.

        Weight and bias are the regression's; v, where the layer has one, is the best of a logarithmic grid. The layers
        have no shift before their bend, so this is a start for a short fine-tuning and no identity.

        Args:
            activation: what followed `norm`; None is none.
            inputs: what `norm` sees. None draws Gaussian ones, with `norm`'s running mean and variance if it has them.
            generator: of those draws.
        """
        layer = cls.like(norm, **options)
        was_training, layer_was_training = norm.training, layer.training
        running_var, running_mean = getattr(norm, "running_var", None), getattr(norm, "running_mean", None)
        with torch.no_grad():
            if inputs is None:
                like = layer.weight
                inputs = torch.randn(64, layer.num_features, 8, 8, generator=generator).to(like.device, like.dtype)
                if running_var is not None and running_mean is not None:
                    inputs = inputs * _per_channel(running_var.sqrt(), 4) + _per_channel(running_mean, 4)
            if layer.zero_init:
                layer.weight.fill_(1.0)
            own_var = getattr(layer, "running_var", None)
            if own_var is not None:
                axes = [axis for axis in range(inputs.ndim) if axis != 1]
                own_var.copy_(running_var if running_var is not None else inputs.var(axes, correction=0))
            try:
                norm.eval(), layer.eval()
                target = norm(inputs) if activation is None else activation(norm(inputs))
                layer._fit(inputs, target)
            finally:
                norm.train(was_training), layer.train(layer_was_training)
        return layer

    def _fit(self, inputs: Tensor, target: Tensor) -> None:
        target = target.double().transpose(0, 1).flatten(1)
        target_mean = target.mean(1)
        # Few slopes, evenly spread in their logarithm: the residual is smooth in v.
        slopes = torch.logspace(-1.5, 1.5, 25).tolist() if self.v is not None else [1.0]
        best: list[Tensor] = []
        for slope in slopes:
            if self.v is not None:
                self.v.fill_(slope)
            own = self(inputs).double().transpose(0, 1).flatten(1)
            own_mean = own.mean(1)
            deviation = own - own_mean[:, None]
            weight = (deviation * target).sum(1) / deviation.square().sum(1).clamp(min=1e-30)
            bias = target_mean - weight * own_mean
            residual = (weight[:, None] * own + bias[:, None] - target).square().mean(1)
            found = [residual, weight, bias, torch.full_like(bias, slope)]
            best = [torch.where(residual < best[0], new, old) for new, old in zip(found, best)] if best else found
        self.weight.copy_(best[1])
        self.bias.copy_(best[2])
        if self.v is not None:
            self.v.copy_(best[3])

    def _check(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise TypeError(f"x must be of a floating dtype, got {x.dtype}")
        if x.ndim < 2:
            raise ValueError(f"x must have at least 2 dimensions (batch, channels), got shape {tuple(x.shape)}")
        if x.shape[1] != self.num_features:
            raise ValueError(f"x must have {self.num_features} channels, got {x.shape[1]} (shape {tuple(x.shape)})")

    def _affine(self, x: Tensor) -> Tensor:
        weight, bias = _per_channel(self.weight, x.ndim), _per_channel(self.bias, x.ndim)
        return x * weight.to(x.dtype) + bias.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}" + ("" if self.nonlinear else ", nonlinear=False")


class _BatchLayer(_EvoNorm):
    """A layer that takes its scale from the batch in training, from a running variance in evaluation."""

    _form: ClassVar[BatchForm]

    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        nonlinear: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
        zero_init: bool = False,
        sync: bool = False,
        unbiased_running_var: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
        super().__init__(num_features, nonlinear=nonlinear, eps=eps, zero_init=zero_init, device=device, dtype=dtype)
        self.momentum, self.sync, self.unbiased_running_var = momentum, sync, unbiased_running_var
        self.register_buffer("running_var", torch.ones(num_features, device=device, dtype=dtype))

    def forward(self, x: Float[Tensor, "batch channels *spatial"]) -> Float[Tensor, "batch channels *spatial"]:
        self._check(x)
        if not self.nonlinear:
            return self._affine(x)
        if x.ndim < 3:
            raise ValueError(f"x must have at least one spatial dimension, got shape {tuple(x.shape)}")
        sync = self.sync and self.training and dist.is_available() and dist.is_initialized()
        if self.training and not sync and x.numel() <= x.shape[1]:
            raise ValueError(f"training needs more than one value per channel, got x of shape {tuple(x.shape)}")
        y, variance, count = batch_evonorm(
            x.flatten(2),
            self.weight,
            self.bias,
            self.v,
            None if self.training else self.running_var,
            form=self._form,
            eps=self.eps,
            sync=sync,
        )
        if self.training:
            with torch.no_grad():
                if self.unbiased_running_var:
                    variance = variance * (count / (count - 1))
                self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)
        return y.unflatten(2, x.shape[2:])


class _SampleLayer(_EvoNorm):
    """A layer that takes its scale from groups of channels of each sample alone."""

    _centred: ClassVar[bool] = True

    def __init__(
        self,
        num_features: int,
        *,
        groups: int = 32,
        group_size: int | None = None,
        strict_groups: bool = False,
        nonlinear: bool = True,
        linear: Literal["affine", "group"] = "affine",
        eps: float = 1e-5,
        zero_init: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, nonlinear=nonlinear, eps=eps, zero_init=zero_init, device=device, dtype=dtype)
        if linear not in ("affine", "group"):
            raise ValueError(f'linear must be "affine" or "group", got {linear!r}')
        self.linear = linear
        self.groups = _group_count(num_features, groups, group_size, strict_groups)

    def forward(self, x: Float[Tensor, "batch channels *spatial"]) -> Float[Tensor, "batch channels *spatial"]:
        self._check(x)
        if not self.nonlinear and self.linear == "affine":
            return self._affine(x)
        flat = x.flatten(2) if x.ndim > 2 else x.unsqueeze(-1)
        elements = self.num_features // self.groups * flat.shape[2]
        if elements < 2:
            raise ValueError(
                f"groups: {self.groups} groups leave {elements} value a group in x of shape {tuple(x.shape)}, which has"
                " no spread; take fewer groups"
            )
        if not torch.compiler.is_compiling() and elements < 8:
            warnings.warn(
                f"{type(self).__name__} normalises over groups of {elements} values only (x of shape {tuple(x.shape)}, "
                f"{self.groups} groups); fewer groups are steadier",
                stacklevel=2,
            )
        y = sample_evonorm(
            flat,
            self.weight,
            self.bias,
            self.v,
            groups=self.groups,
            eps=self.eps,
            centred=self._centred,
            gated=self.nonlinear,
        )
        return y.unflatten(2, x.shape[2:]) if x.ndim > 2 else y.squeeze(-1)

    def extra_repr(self) -> str:
        linear = "" if self.nonlinear else f", linear={self.linear!r}"
        return f"{super().extra_repr()}{linear}, groups={self.groups}"


class EvoNormB0(_BatchLayer):
    """`weight * x / max(s_b, v x + s_i) + bias`: replaces a BatchNorm and the activation behind it.

    s_b is the channel's standard deviation over the batch in training, from the running variance in evaluation; s_i is
    that of the sample at hand, always. For a channel with v > 0 the output saturates at weight / v + bias.

    Args:
        num_features: channels of the input.
        nonlinear: False stands for a normalisation without activation and applies weight and bias only (the authors').
        momentum: share of the new batch in the running variance.
        eps: added to every variance and mean square, under the root.
        zero_init: weight starts at zero (last layer of a residual branch).
        sync: the statistics of training cover the batches of all replicas of the default process group.
        unbiased_running_var: store n / (n - 1) times the variance, as `nn.BatchNorm2d` and timm do; the authors do not.

    Shape: `(batch, num_features, *spatial)` with at least one spatial dimension, to the same.

    Raises:
        TypeError: where the input is not of a floating dtype.
        ValueError: on a wrong number of channels, on one value per channel in training, and on bad arguments.

    The gradient can be taken once; what differentiates twice is `EVONORM_GRAPHS["B0"].to_module(num_features)`.
    Evaluation cannot be folded into the convolution before it: the layer is not linear.
    Source: arXiv 2004.02967, Table 2; reference code tensorflow/tpu, models/official/resnet/resnet_model.py.

    Example:
        >>> EvoNormB0(8)(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    _form, _trains_v = "B0", True


class EvoNormB1(_BatchLayer):
    """`weight * x / max(s_b, (x + 1) r_i) + bias`, r_i the root mean square of the sample's channel.

    Arguments, shapes and errors of `EvoNormB0`.
    """

    _form = "B1"


class EvoNormB2(_BatchLayer):
    """`weight * x / max(s_b, r_i - x) + bias`, r_i the root mean square of the sample's channel.

    Arguments, shapes and errors of `EvoNormB0`.
    """

    _form = "B2"


class EvoNormS0(_SampleLayer):
    """`weight * x * sigmoid(v x) / s_g + bias`: replaces a GroupNorm and the activation behind it.

    s_g is the standard deviation over a group of channels of one sample, so the batch plays no part: training and
    evaluation agree bit for bit.

    Args:
        num_features: channels of the input.
        groups: groups of contiguous channels. Where it does not divide `num_features` the largest smaller divisor is
            taken, as the authors do (48 channels give 24 groups).
        group_size: channels of a group, instead of `groups`; must divide `num_features`.
        strict_groups: raise where `groups` does not divide `num_features`.
        nonlinear: False stands for a normalisation without activation.
        linear: what that does: "affine" applies weight and bias only (the authors'), "group" also divides by the
            group's scale (timm's "a" variants).
        eps: added to every variance and mean square, under the root.
        zero_init: weight starts at zero (last layer of a residual branch).

    Shape: `(batch, num_features, *spatial)`, spatial dimensions from none up, to the same. Tokens of shape
        `(batch, length, features)` are normalised one by one as `layer(x.flatten(0, 1)).view_as(x)`.

    Raises:
        TypeError: where the input is not of a floating dtype.
        ValueError: on a wrong number of channels, on groups of a single value, and on bad arguments.

    Warns where a group has fewer than 8 values. The gradient can be taken once; what differentiates twice is
    `EVONORM_GRAPHS["S0"].to_module(num_features)`.
    Source: arXiv 2004.02967, Table 2; reference code tensorflow/tpu, models/official/resnet/resnet_model.py.

    Example:
        >>> EvoNormS0(8, groups=4)(torch.randn(1, 8, 5, 5)).shape
        torch.Size([1, 8, 5, 5])
    """

    _trains_v = True


class EvoNormS1(_SampleLayer):
    """`weight * silu(x) / s_g + bias`. Arguments, shapes and errors of `EvoNormS0`."""


class EvoNormS2(_SampleLayer):
    """`weight * silu(x) / r_g + bias`, r_g the group's root mean square.

    Arguments, shapes and errors of `EvoNormS0`.
    """

    _centred = False


def _per_channel(vector: Tensor, ndim: int) -> Tensor:
    """A channel vector that broadcasts over (batch, channels, *spatial)."""
    return vector.view(1, -1, *[1] * (ndim - 2))


def _channels(norm: nn.Module) -> int:
    """How many channels a normalisation layer works on."""
    if isinstance(norm, _NormBase):
        return norm.num_features
    if isinstance(norm, nn.GroupNorm):
        return norm.num_channels
    if isinstance(norm, nn.LayerNorm):
        return norm.normalized_shape[0]
    raise TypeError(f"norm must be a BatchNorm, InstanceNorm, GroupNorm or LayerNorm, got {type(norm).__name__}")


def _group_count(num_features: int, groups: int, group_size: int | None, strict: bool) -> int:
    if group_size is not None:
        if group_size <= 0 or num_features % group_size:
            raise ValueError(f"group_size must divide num_features = {num_features}, got {group_size}")
        return num_features // group_size
    if groups <= 0:
        raise ValueError(f"groups must be at least 1, got {groups}")
    if strict and num_features % groups:
        raise ValueError(f"groups must divide num_features = {num_features} where strict_groups is set, got {groups}")
    groups = min(groups, num_features)
    while num_features % groups:
        groups -= 1
    return groups

"""Standardisation: zero mean and unit variance over a sample's positions, over the batch, or group by group.

There is no affine map and, in the paper, no running average: evaluation uses the batch at hand as well.
"""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.batchnorm import _BatchNorm

from lathe.core.precision import at_least_single

__all__ = ["BatchStd", "GroupInstanceBatchStd", "instance_standardize"]

GROUPS = 12


def instance_standardize(
    x: Float[Tensor, "batch channels *positions"], eps: float = 1e-5, *, keep_output: bool = False
) -> Float[Tensor, "batch channels *positions"]:
    """Each sample's channel with zero mean and unit (biased) variance.

    Args:
        eps: added to the variance.
        keep_output: keep the output for the backward pass instead of the input. Saves memory where an activation
            follows that keeps it as well; one that changes it in place does not work then.

    Raises:
        ValueError: where there is one position only, which would become zero.
    """
    _check_values(x, x.shape[2:].numel(), "positions")
    return _standardized(x, False, eps, keep_output)[0]


class BatchStd(nn.Module):
    """Batch standardisation: each channel with zero mean and unit variance over batch and positions.

    Args:
        channels: of the input.
        running: keep running averages in training and use them in evaluation, as `nn.BatchNorm2d` does; by default
            evaluation uses its own batch, as the paper does.
        momentum, eps: as in `nn.BatchNorm2d`.
        keep_output: as in `instance_standardize`.

    Shape: `(batch, channels, *positions)` -> the same.

    Raises:
        ValueError: for other channels, or where a channel has one value only.
    """

    def __init__(
        self,
        channels: int,
        *,
        running: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
        keep_output: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be at least 1, got {channels}")
        self.channels, self.momentum, self.eps, self.keep_output = channels, momentum, eps, keep_output
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.running_mean: Tensor | None
        self.running_var: Tensor | None
        # For all channels, also those of G-IBS that are standardised in each sample and do not use them.
        self.register_buffer("running_mean", torch.zeros(channels, **made) if running else None)
        self.register_buffer("running_var", torch.ones(channels, **made) if running else None)

    def _pooled(self, x: Tensor) -> Tensor | bool:
        """Which channels share their statistics over the batch; True where all do."""
        return True

    def forward(self, x: Float[Tensor, "batch channels *positions"]) -> Float[Tensor, "batch channels *positions"]:
        if x.ndim < 3 or x.shape[1] != self.channels:
            raise ValueError(f"x must be (batch, {self.channels}, *positions), got shape {tuple(x.shape)}")
        self._check_count(x)
        if self.running_mean is not None and self.running_var is not None and not self.training:
            return self._with_running(x, self.running_mean, self.running_var)
        y, mean, rstd = _standardized(x, self._pooled(x), self.eps, self.keep_output)
        if self.running_mean is not None and self.running_var is not None and len(x):
            count = x.numel() // self.channels
            with torch.no_grad():
                variance = (rstd.square().reciprocal() - self.eps) * (count / (count - 1))
                self.running_mean.lerp_(mean.mean(0).to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(variance.mean(0).to(self.running_var.dtype), self.momentum)
        return y

    def _check_count(self, x: Tensor) -> None:
        if len(x) and (self.training or self.running_mean is None):
            _check_values(x, len(x) * x.shape[2:].numel(), "values a channel")

    def _with_running(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        shape = (-1, *(1,) * (x.ndim - 2))
        scale = (variance + self.eps).rsqrt().view(shape)
        return (x - mean.view(shape)) * scale

    def extra_repr(self) -> str:
        return f"{self.channels}" + ", running=True" * (self.running_mean is not None)


class GroupInstanceBatchStd(BatchStd):
    """G-IBS: in equal groups of channels, by turns over the batch (the first, third, ...) and in each sample.

    Args:
        channels: of the input.
        groups: consecutive groups of equal size. None takes 12, the paper's, or where 12 does not divide the channels
            the largest divisor below, with a warning.
        running, momentum, eps, keep_output: as in `BatchStd`.

    Shape: `(batch, channels, *positions)` -> the same.

    Raises:
        ValueError: where `groups` does not divide `channels`, for other channels, or where there is one position only.
    """

    def __init__(
        self,
        channels: int,
        groups: int | None = None,
        *,
        running: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
        keep_output: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: dict[str, Any] = {"keep_output": keep_output, "device": device, "dtype": dtype}
        super().__init__(channels, running=running, momentum=momentum, eps=eps, **options)
        if groups is None:
            groups = max(g for g in range(1, min(GROUPS, channels) + 1) if channels % g == 0)
            if groups != GROUPS:
                warnings.warn(f"{channels} channels do not divide into {GROUPS} groups: {groups} taken", stacklevel=2)
        elif groups < 1 or channels % groups:
            raise ValueError(f"groups must divide channels = {channels}, got {groups}")
        self.groups = groups

    @classmethod
    def like(cls, norm: nn.Module, *, groups: int | None = None, running: bool | None = None) -> GroupInstanceBatchStd:
        """A fresh layer that fits where a batch normalisation stood; the affine map has no counterpart.

        Args:
            running: None does as `norm` does, so that evaluation stays independent of the batch.

        Raises:
            TypeError: where `norm` is no batch normalisation.
        """
        if not isinstance(norm, _BatchNorm):
            raise TypeError(f"norm must be an nn.BatchNorm1d, 2d or 3d, got {type(norm).__name__}")
        keeps = cast(bool, norm.track_running_stats)
        tensors = [*norm.parameters(), *(each for each in norm.buffers() if each.is_floating_point())]
        made: dict[str, Any] = {"device": tensors[0].device, "dtype": tensors[0].dtype} if tensors else {}
        momentum = 0.1 if norm.momentum is None else norm.momentum
        running = keeps if running is None else running
        layer = cls(norm.num_features, groups, running=running, momentum=momentum, eps=norm.eps, **made)
        return layer.train(norm.training)

    def _pooled(self, x: Tensor) -> Tensor:
        channels = torch.arange(self.channels, device=x.device)
        return channels // (self.channels // self.groups) % 2 == 0

    def _check_count(self, x: Tensor) -> None:
        _check_values(x, x.shape[2:].numel(), "positions")

    def _with_running(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        by_batch = super()._with_running(x, mean, variance)
        pooled = self._pooled(x).view(-1, *(1,) * (x.ndim - 2))
        return torch.where(pooled, by_batch, instance_standardize(x, self.eps))

    def extra_repr(self) -> str:
        return f"{self.channels}, groups={self.groups}" + ", running=True" * (self.running_mean is not None)


def _check_values(x: Tensor, count: int, what: str) -> None:
    if count < 2:
        raise ValueError(f"standardising needs at least 2 {what}, got an input of shape {tuple(x.shape)}")


def _standardized(x: Tensor, pooled: Tensor | bool, eps: float, keep_output: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the mean and 1 / deviation of each sample's channel; `pooled` tells the channels of batch statistics."""
    if x.numel() == 0:
        none = x.new_zeros(x.shape[:2])
        return x.clone(), none, none
    y, rstd, mean = _Standardize.apply(at_least_single(x).flatten(2), pooled, eps, keep_output)
    return y.view(x.shape).to(x.dtype), mean, rstd


class _Standardize(Function):
    """With y = (x - m) r, the gradient is r (g - mean(g) - y mean(g y)) over the values that share m and r."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "B C N"], pooled: Bool[Tensor, " C"] | bool, eps: float, keep_output: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean = _shared(x.mean(-1), pooled)
        y = x - mean[..., None]
        # On a CPU several times as fast as torch.var, and as exact, the mean being out already.
        variance = _shared(torch.linalg.vector_norm(y, dim=-1).square() / x.shape[-1], pooled)
        rstd = (variance + eps).rsqrt()
        y.mul_(rstd[..., None])
        of_all = isinstance(pooled, bool)
        ctx.pooled, ctx.eps, ctx.keep_output = pooled if of_all else None, eps, keep_output
        ctx.save_for_backward(y if keep_output else x, mean, rstd, None if of_all else pooled)
        ctx.mark_non_differentiable(mean)
        ctx.set_materialize_grads(False)
        return y, rstd, mean

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        grad, grad_rstd, _ = grads
        kept, mean, rstd, mask = ctx.saved_tensors
        pooled = ctx.pooled if mask is None else mask
        found = None
        if grad is not None and mask is None and not torch.is_grad_enabled():
            found = _fused(grad, kept, mean, rstd, pooled, ctx.keep_output).view_as(kept)
            grad = None
        if ctx.keep_output or found is not None:
            y = kept
        elif torch.is_grad_enabled():  # for second derivatives y and r are functions of x
            y, rstd, _ = _Standardize.apply(kept, pooled, ctx.eps, True)
        else:
            y = (kept - mean[..., None]) * rstd[..., None]
        if grad is not None:
            means = _shared(grad.mean(-1), pooled), _shared((grad * y).mean(-1), pooled)
            found = torch.addcmul(grad - means[0][..., None], y, means[1][..., None], value=-1) * rstd[..., None]
        if grad_rstd is not None:  # only a second derivative has one, and only of a kept output
            change = _shared(grad_rstd, pooled) * rstd.square() / -y.shape[-1]
            found = y * change[..., None] + (0.0 if found is None else found)
        return found, None, None, None


def _fused(grad: Tensor, kept: Tensor, mean: Tensor, rstd: Tensor, pooled: bool, keep_output: bool) -> Tensor:
    """The same by torch's kernel for batch normalisation: of x, or of y (mean 0, deviation 1) and then a scale."""
    if pooled:
        mean, rstd = mean[0].contiguous(), rstd[0].contiguous()
    else:
        grad, kept = grad.reshape(1, -1, grad.shape[-1]), kept.reshape(1, -1, kept.shape[-1])
        mean, rstd = mean.flatten(), rstd.flatten()
    scale = None
    if keep_output:
        scale, mean, rstd = rstd, torch.zeros_like(mean), torch.ones_like(rstd)
    backward = torch.ops.aten.native_batch_norm_backward
    return backward(grad, kept, scale, None, None, mean, rstd, True, 0.0, [True, False, False])[0]


def _shared(of_samples: Float[Tensor, "B C"], pooled: Bool[Tensor, " C"] | bool) -> Float[Tensor, "B C"]:
    """Averaged over the batch in those channels that pool their statistics."""
    if pooled is False:
        return of_samples
    mean = of_samples.mean(0, keepdim=True)
    return mean.expand_as(of_samples) if pooled is True else torch.where(pooled, mean, of_samples)

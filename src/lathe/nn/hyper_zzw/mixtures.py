"""1x1 convolutions as products of matrices over flat positions, and two sums that keep little for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from lathe.core.precision import autocast_dtype, without_autocast
from lathe.nn.hyper_zzw.operators import hyperzzw_local

__all__ = ["local_mixture", "mixed", "mixture"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"": lambda x: x, "gelu": F.gelu, "silu": F.silu}
_DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "": lambda grad, x: grad,
    "gelu": torch.ops.aten.gelu_backward,
    "silu": torch.ops.aten.silu_backward,
}


def mixed(
    x: Float[Tensor, "batch in_channels positions"],
    weight: Float[Tensor, "out_channels in_channels"],
    bias: Float[Tensor, "out_channels"] | Float[Tensor, "out_channels positions"],
) -> Float[Tensor, "batch out_channels positions"]:
    """A 1x1 convolution; on a CPU a product of matrices does it twice as fast as torch's convolution."""
    shape = (x.shape[0], weight.shape[0], x.shape[2])
    bias = bias[:, None] if bias.ndim == 1 else bias
    return torch.baddbmm(bias.expand(shape), weight.expand(shape[0], *weight.shape), x)


def mixture(
    bias: Float[Tensor, "out_channels"] | Float[Tensor, "out_channels positions"],
    parts: Sequence[tuple[Float[Tensor, "out_channels _"], Float[Tensor, "batch _ positions"], str]],
) -> Float[Tensor, "batch out_channels positions"]:
    """bias + sum_b W_b act_b(x_b) over (W_b, x_b, act_b): the 1x1 convolution of activated and concatenated branches.

    Neither the concatenation nor what the activations ("", "gelu" or "silu") give is made or kept.
    """
    weights, branches, activations = zip(*parts)
    if (dtype := autocast_dtype(bias.device)) is not None:
        bias, *rest = (each.to(dtype) for each in (bias, *weights, *branches))
        weights, branches = tuple(rest[: len(weights)]), tuple(rest[len(weights) :])
    with without_autocast(bias.device):
        if torch.compiler.is_compiling():  # a compiler chooses by itself what to compute again
            return _plain_mixture(activations, bias, *weights, *branches)
        return _Mixture.apply(activations, bias, *weights, *branches)


def local_mixture(
    z: Float[Tensor, "batch channels *positions"],
    kernel: Float[Tensor, "*kernel_shape"],
    weight: Float[Tensor, "channels channels"],
    bias: Float[Tensor, " channels"],
) -> Float[Tensor, "batch channels positions"]:
    """A 1x1 convolution of `hyperzzw_local(z, kernel)`, whose result is computed again for the backward pass."""
    if (dtype := autocast_dtype(z.device)) is not None:
        z, kernel, weight, bias = (each.to(dtype) for each in (z, kernel, weight, bias))
    with without_autocast(z.device):
        if torch.compiler.is_compiling():
            return _plain_local_mixture(z, kernel, weight, bias)
        return _LocalMixture.apply(z, kernel, weight, bias)


def _derivatives(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients that can themselves be differentiated, by recording the function anew."""
    with torch.enable_grad():
        # One input may depend on another, or be it: each gets the share of its own place only.
        places = [each.view_as(each) for each in inputs]
        needed = [place for place in places if place.requires_grad]
        found = iter(torch.autograd.grad(function(*places), needed, grad, create_graph=True, allow_unused=True))
        return tuple(next(found) if place.requires_grad else None for place in places)


class _Mixture(Function):
    @staticmethod
    def forward(ctx: Any, activations: tuple[str, ...], bias: Tensor, *tensors: Tensor) -> Tensor:
        ctx.activations = activations
        ctx.save_for_backward(bias, *tensors)
        weights, branches = tensors[: len(activations)], tensors[len(activations) :]
        total = mixed(_ACTIVATIONS[activations[0]](branches[0]), weights[0], bias)
        for weight, branch, activation in zip(weights[1:], branches[1:], activations[1:]):
            total.baddbmm_(weight.expand(len(branch), *weight.shape), _ACTIVATIONS[activation](branch))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        activations = ctx.activations
        bias, *tensors = ctx.saved_tensors
        count = len(activations)
        if torch.is_grad_enabled():
            return None, *_derivatives(lambda *all: _plain_mixture(activations, *all), [bias, *tensors], grad)
        of_weights, of_branches = [], []
        for weight, branch, activation in zip(tensors[:count], tensors[count:], activations):
            value = _ACTIVATIONS[activation](branch)
            of_weights.append(torch.bmm(grad, value.mT).sum(0))
            above = torch.bmm(weight.mT.expand(len(branch), *weight.mT.shape), grad)
            of_branches.append(_DERIVATIVES[activation](above, branch))
        return None, grad.sum((0, 2) if bias.ndim == 1 else 0), *of_weights, *of_branches


def _plain_mixture(activations: tuple[str, ...], bias: Tensor, *tensors: Tensor) -> Tensor:
    count = len(activations)
    values = [_ACTIVATIONS[activation](branch) for activation, branch in zip(activations, tensors[count:])]
    return mixed(torch.cat(values, 1), torch.cat(tensors[:count], 1), bias)


class _LocalMixture(Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(z, kernel, weight, bias)
        return _plain_local_mixture(z, kernel, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        z, kernel, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _derivatives(_plain_local_mixture, [z, kernel, weight, bias], grad)
        with torch.enable_grad():
            z, kernel = z.detach().requires_grad_(), kernel.detach().requires_grad_()
            convolved = hyperzzw_local(z, kernel)
        flat = convolved.detach().flatten(2)
        # Laid out as the convolution's result is, which on a CPU has its channels side by side.
        above = torch.bmm(grad.mT, weight.expand(len(z), *weight.shape)).mT.view(convolved.shape)
        of_z, of_kernel = torch.autograd.grad(convolved, [z, kernel], above)
        return of_z, of_kernel, torch.bmm(grad, flat.mT).sum(0), grad.sum((0, 2))


def _plain_local_mixture(z: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return mixed(hyperzzw_local(z, kernel).flatten(2), weight, bias)

"""Infinite width: the recursions of the kernel K and of the frozen neural tangent kernel Theta in depth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lathe.core.gaussian import ActivationLike, activation, kernel_moments, mirror_

__all__ = ["KernelPrediction", "first_kernel", "kernel_prediction", "kernel_recursion", "ntk_recursion"]


def first_kernel(x: Float[Tensor, "n features"], C_b: float, C_W: float) -> Float[Tensor, "n n"]:
    """`K^(1) = C_b + C_W x_a . x_b / n_0`, the covariance of the first layer's pre-activations.

    Raises:
        ValueError: for `C_b < 0`, `C_W <= 0`, or inputs that are not finite.
    """
    check_hyperparameters(C_b, C_W)
    if not torch.isfinite(x).all():
        raise ValueError("x must be finite, got infinite or NaN entries")
    return C_b + C_W * (x @ x.mT) / x.shape[1]


def kernel_recursion(
    x: Float[Tensor, "n features"],
    depth: int,
    act: ActivationLike,
    C_b: float,
    C_W: float,
    *,
    layers: Sequence[int] | None = None,
    K1: Float[Tensor, "n n"] | None = None,
) -> Float[Tensor, "layers n n"]:
    """Kernels `K^(1) .. K^(depth)` with `K^(l+1)_ab = C_b + C_W <s_a s_b>` over `z ~ N(0, K^(l))`.

    Args:
        x: inputs; float64 is advised, and needed deep at criticality.
        depth: layers, counted from 1.
        act: activation; a name, a module, a function or an `Activation`.
        C_b: variance of the biases.
        C_W: variance of the weights times their fan-in.
        layers: which layers to return (from 1); all by default. A thousand inputs are 8 MB a layer.
        K1: the first layer's kernel, in place of the one that `x` gives.

    Raises:
        ValueError: for `C_b < 0`, `C_W <= 0`, `depth < 1`, layers outside `1 .. depth` or inputs that are not finite.
    """
    first = _start(x, C_b, C_W, K1)
    kept = _kept(layers, depth)
    return torch.stack([K for K, _ in _walk(first, None, kept, act, C_b, C_W, 0.0, 0.0)])


def ntk_recursion(
    x: Float[Tensor, "n features"],
    depth: int,
    act: ActivationLike,
    C_b: float,
    C_W: float,
    lambda_b: float = 1.0,
    lambda_W: float = 1.0,
    *,
    layers: Sequence[int] | None = None,
) -> tuple[Float[Tensor, "layers n n"], Float[Tensor, "layers n n"]]:
    """Kernels and frozen NTKs, `(K, Theta)`:
    `Theta^(l+1)_ab = lambda_b + lambda_W <s_a s_b> + C_W <s'_a s'_b> Theta^(l)_ab`.

    The learning rate of a bias is `lambda_b`, that of a weight `lambda_W / fan_in`; arguments as `kernel_recursion`.
    The "ntk" parameterisation of other packages is `lambda_b = C_b`, `lambda_W = C_W`.
    """
    first = _start(x, C_b, C_W, None)
    theta = lambda_b + lambda_W * (x @ x.mT) / x.shape[1]
    kept = _kept(layers, depth)
    kernels, thetas = zip(*_walk(first, theta, kept, act, C_b, C_W, lambda_b, lambda_W))
    return torch.stack(kernels), torch.stack(thetas)


@dataclass(frozen=True)
class KernelPrediction:
    """What an infinitely wide network predicts at test inputs, on average over initialisations.

    Attributes:
        trained: mean after gradient descent to zero loss, `Theta_ta Theta_aa^-1 y`.
        bayesian: mean of the exact posterior, `K_ta K_aa^-1 y`.
        bayesian_variance: variance of the exact posterior for one output.
    """

    trained: Float[Tensor, "test outputs"]
    bayesian: Float[Tensor, "test outputs"]
    bayesian_variance: Float[Tensor, " test"]


def kernel_prediction(
    x: Float[Tensor, "train features"],
    y: Float[Tensor, "train outputs"],
    x_test: Float[Tensor, "test features"],
    depth: int,
    act: ActivationLike,
    C_b: float,
    C_W: float,
    lambda_b: float = 1.0,
    lambda_W: float = 1.0,
    *,
    ridge: float = 0.0,
) -> KernelPrediction:
    """Predictions of the infinitely wide network of `depth` layers trained on `(x, y)` with the squared loss.

    `ridge` is added to the diagonal of both training kernels. A network that starts from outputs `z0` ends at
    `z0(test) + Theta_ta Theta_aa^-1 (y - z0)`; its mean over initialisations is `trained`.
    """
    K, theta = (
        k[0] for k in ntk_recursion(torch.cat([x, x_test]), depth, act, C_b, C_W, lambda_b, lambda_W, layers=[depth])
    )
    n = len(x)
    noise = ridge * torch.eye(n, dtype=x.dtype, device=x.device)
    weights = torch.linalg.solve(K[:n, :n] + noise, K[:n, n:])
    return KernelPrediction(
        trained=theta[n:, :n] @ torch.linalg.solve(theta[:n, :n] + noise, y),
        bayesian=weights.mT @ y,
        bayesian_variance=K[n:, n:].diagonal() - (weights * K[:n, n:]).sum(0),
    )


def check_hyperparameters(C_b: float, C_W: float) -> None:
    if not C_W > 0:
        raise ValueError(f"C_W must be positive, got {C_W}")
    if not C_b >= 0:
        raise ValueError(f"C_b must not be negative, got {C_b}")


def _start(x: Tensor, C_b: float, C_W: float, K1: Tensor | None) -> Tensor:
    computed = first_kernel(x, C_b, C_W)
    if K1 is None:
        return computed
    if K1.shape != computed.shape:
        raise ValueError(f"K1 must be {tuple(computed.shape)} for the inputs given, got {tuple(K1.shape)}")
    return K1


def _kept(layers: Sequence[int] | None, depth: int) -> set[int]:
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    kept = set(range(1, depth + 1)) if layers is None else set(layers)
    if not kept or not kept <= set(range(1, depth + 1)):
        raise ValueError(f"layers must lie in 1 .. {depth}, got {layers}")
    return kept


def _walk(
    K: Tensor,
    theta: Tensor | None,
    kept: set[int],
    act: ActivationLike,
    C_b: float,
    C_W: float,
    lambda_b: float,
    lambda_W: float,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Kernel and NTK of the layers in `kept`; large ones are carried along in one place, as upper halves."""
    s = activation(act)
    store = (torch.empty_like(K), None if theta is None else torch.empty_like(K))
    for layer in range(1, max(kept) + 1):
        if layer > 1:
            before = theta

            def update(
                kernel: Tensor, slope: Tensor | None, where: tuple[slice, slice], before: Tensor | None = before
            ) -> tuple[Tensor, Tensor | None]:
                if before is None or slope is None:
                    return C_b + C_W * kernel, None
                return C_b + C_W * kernel, torch.addcmul(lambda_b + lambda_W * kernel, slope, before[where], value=C_W)

            K, theta = kernel_moments(s, K, slope=theta is not None, then=update, out=store)
        if layer in kept:
            last = K if theta is None else theta
            yield (mirror_(K.clone()), mirror_(last.clone())) if K is store[0] else (K, last)

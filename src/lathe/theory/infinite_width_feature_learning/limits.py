"""Infinitely wide networks in muP, as objects that one can train.

`LinearMuPLimit` (one hidden layer, linear) is exact; `MeanFieldLimit` and `ParticleLimit` (one hidden layer, any
activation) integrate over the law of a neuron; `two_layer_limit` (two hidden layers, experimental) draws from it. Yang
and Hu, 2020, arXiv 2011.14522: section 6 and theorem 6.1 (linear), 3.6 and appendix B (the rules of tensor programs).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lathe.core.gaussian import ActivationLike, activation, gauss_hermite

__all__ = ["LinearMuPLimit", "LinearNetwork", "MeanFieldLimit", "ParticleLimit", "two_layer_limit"]


class LinearNetwork(nn.Module):
    """One linear hidden layer: `f(x) = alpha V (U x + beta b)`.

    Args:
        U: first weight, which is trained, as are all three.
        V: second weight.
        b: bias of the hidden layer; None stands for zeros that stay.
        alpha: multiplier of the output.
        beta: multiplier of the bias.

    Shape: `(*batch, in_features)` -> `(*batch, out_features)`.

    Raises:
        ValueError: where the widths of `U`, `V` and `b` differ.
    """

    def __init__(
        self,
        U: Float[Tensor, "width in_features"],
        V: Float[Tensor, "out_features width"],
        b: Float[Tensor, " width"] | None = None,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
    ) -> None:
        super().__init__()
        if U.shape[0] != V.shape[1] or (b is not None and b.shape != U.shape[:1]):
            told = f"{tuple(U.shape)}, {tuple(V.shape)}" + ("" if b is None else f" and {tuple(b.shape)}")
            raise ValueError(f"U (width, in), V (out, width) and b (width,) must have one width, got {told}")
        self.U, self.V = nn.Parameter(U), nn.Parameter(V)
        self.b = None if b is None else nn.Parameter(b)
        self.alpha, self.beta = alpha, beta

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        hidden = x @ self.U.mT
        if self.b is not None:
            hidden = hidden + self.beta * self.b
        return self.alpha * hidden @ self.V.mT


class LinearMuPLimit(LinearNetwork):
    """The infinitely wide linear network with one hidden layer in muP, exactly.

    Every column of the infinitely long `U` and `V` stays a combination of the `in_features + out_features` independent
    Gaussian columns that it started from. The combinations train as an ordinary network of that width does, by SGD (or
    momentum) with rates that do not depend on width.

    Args:
        in_features, out_features: of the network.
        sigma_u, sigma_v: standard deviations of the two weights' coordinates at the start.
        alpha: multiplier of the output.
        hidden_bias: multiplier `beta` of the hidden layer's bias, which starts at zero; 0 for none.

    Shape: `(*batch, in_features)` -> `(*batch, out_features)`.

    Raises:
        ValueError: for fewer than one feature.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sigma_u: float = 1.0,
        sigma_v: float = 1.0,
        alpha: float = 1.0,
        hidden_bias: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if in_features < 1 or out_features < 1:
            raise ValueError(f"in_features and out_features must be at least 1, got {in_features} and {out_features}")
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        width = in_features + out_features
        super().__init__(
            sigma_u * torch.eye(width, in_features, **kind),
            sigma_v * torch.eye(width, **kind)[in_features:],
            torch.zeros(width, **kind) if hidden_bias else None,
            alpha=alpha,
            beta=hidden_bias,
        )

    @torch.no_grad()
    def sample(self, width: int, generator: torch.Generator | None = None) -> LinearNetwork:
        """A network of finite width that is drawn from this one as it is now; its outputs differ by `O(width^-1/2)`.

        Training both with the same rates keeps it so.

        Raises:
            ValueError: for a width below 1.
        """
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        neurons = torch.randn(width, self.U.shape[0], generator=generator, dtype=self.U.dtype).to(self.U.device)
        neurons = neurons * width**-0.5
        b = None if self.b is None else neurons @ self.b
        return LinearNetwork(neurons @ self.U, self.V @ neurons.mT, b, alpha=self.alpha, beta=self.beta)


class _MeanField(torch.autograd.Function):
    """`sum_k w_k a_k v_k`, with the gradients of `sum_k a_k v_k`: those by which each neuron of the limit moves."""

    @staticmethod
    def forward(ctx: Any, activations: Tensor, V: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(activations, V)
        return activations @ (weights.unsqueeze(-1) * V)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        activations, V = ctx.saved_tensors
        (gradient,) = gradients
        return gradient @ V.mT, activations.flatten(0, -2).mT @ gradient.flatten(0, -2), None


class ParticleLimit(nn.Module):
    """The infinitely wide network with one hidden layer in muP, `f(x) = E[V phi(U x)]`, by particles.

    Each particle is a neuron `(U, V)` that starts from `N(0, 1)` and moves by `-lr dLoss/df V phi'(U x) x` and
    `-lr dLoss/df phi(U x)`: by plain SGD on this module's parameters, whose gradients are those of the mean field. (For
    that reason gradients by `x` are not to be used.) Its error is that of a sample of `particles` neurons.

    Args:
        in_features, out_features: of the network; a constant feature is a bias.
        phi: activation, by name, module or function.
        particles: how many.
        generator: draws them.

    Shape: `(*batch, in_features)` -> `(*batch, out_features)`.

    Raises:
        ValueError: for fewer than one particle.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int = 1,
        phi: ActivationLike = "tanh",
        *,
        particles: int = 10_000,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if particles < 1:
            raise ValueError(f"particles must be at least 1, got {particles}")
        U = torch.randn(particles, in_features, generator=generator, dtype=dtype)
        V = torch.randn(particles, out_features, generator=generator, dtype=dtype)
        self._take(U, V, torch.full((particles,), 1 / particles, dtype=dtype), phi)

    def _take(self, U: Tensor, V: Tensor, weights: Tensor, phi: ActivationLike) -> None:
        nn.Module.__init__(self)
        self.phi = activation(phi)
        self.U, self.V = nn.Parameter(U), nn.Parameter(V)
        self.register_buffer("weights", weights)

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        return _MeanField.apply(self.phi(x @ self.U.mT), self.V, self.weights)


class MeanFieldLimit(ParticleLimit):
    """`ParticleLimit` for one input and one output without chance: the particles are a Gauss-Hermite grid.

    Args:
        phi: activation; a smooth one, or the grid converges slowly.
        quadrature: nodes along each of the two axes. 80 gives four digits after 30 steps with tanh.

    Shape: `(*batch, 1)` -> `(*batch, 1)`.
    """

    def __init__(
        self, phi: ActivationLike = "tanh", quadrature: int = 80, *, dtype: torch.dtype = torch.float64
    ) -> None:
        nodes, weights = gauss_hermite(quadrature, torch.empty(0, dtype=dtype))
        U, V = torch.cartesian_prod(nodes, nodes).T.unsqueeze(-1)
        self._take(U.clone(), V.clone(), torch.outer(weights, weights).flatten(), phi)


def two_layer_limit(
    x: Float[Tensor, "batch in_features"],
    loss: Callable[[Float[Tensor, " batch"]], Float[Tensor, ""]],
    lr: float,
    steps: int,
    *,
    phi: ActivationLike = "tanh",
    samples: int = 20_000,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "times batch"]:
    """Outputs of the infinitely wide network with two hidden layers in muP under full-batch descent. Experimental.

    The network of `ABC.mup(2)` with one output. By the rules of tensor programs a hidden weight's product has three
    parts: a Gaussian one, whose covariance is that of what it multiplies; one from earlier products with its transpose;
    and one from its updates, of rank one for each example and step. All are estimated from `samples` draws of a
    neuron's law, with an error of `O(samples^-1/2)`; time and memory grow as the square of `steps * batch`.

    Args:
        x: the training inputs.
        loss: of the outputs.
        lr: the learning rate.
        steps: how many; meant for few.
        phi: activation; smooth.
        samples: draws of a neuron in each of the two layers.

    Returns:
        outputs before training (zero) and after each step, `(steps + 1, batch)`.

    Raises:
        ValueError: for no steps or fewer than two samples.
    """
    if steps < 1 or samples < 2:
        raise ValueError(f"steps must be at least 1 and samples at least 2, got {steps} and {samples}")
    act, x = activation(phi), x.detach()

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=x.dtype).to(x.device)

    u, z = draw(samples, x.shape[1]), draw(samples)
    forward, backward = _JointGaussian(draw, samples), _JointGaussian(draw, samples)
    outputs: list[Tensor] = []
    x1s: list[Tensor] = []  # activations of layer 1, (samples, batch) a step
    dh2s: list[Tensor] = []  # gradients at layer 2, times width
    chis: list[Tensor] = []  # dLoss/df, (batch,)
    for _ in range(steps + 1):
        h1 = u @ x.mT
        x1 = act(h1)
        h2 = forward.next(x1) + _earlier(x1, backward.drawn, dh2s)
        for old, dh2, chi in zip(x1s, dh2s, chis):
            h2 = h2 - lr * dh2 @ (chi[:, None] * _mean(old, x1))
        x2 = act(h2)
        f = _mean(z[:, None], x2)[0]
        outputs.append(f)
        leaf = f.clone().requires_grad_()
        (chi,) = torch.autograd.grad(loss(leaf), leaf)
        dh2 = z[:, None] * act.derivative(h2)
        x1s.append(x1)
        dx1 = backward.next(dh2) + _earlier(dh2, forward.drawn, x1s)
        for old, old_dh2, old_chi in zip(x1s, dh2s, chis):
            dx1 = dx1 - lr * old @ (old_chi[:, None] * _mean(old_dh2, dh2))
        dh2s.append(dh2)
        chis.append(chi)
        u = u - lr * (dx1 * act.derivative(h1) * chi) @ x
        z = z - lr * x2 @ chi
    return torch.stack(outputs)


class _JointGaussian:
    """Gaussian vectors that are drawn one batch after the other, with the covariance of what they are products of."""

    def __init__(self, draw: Callable[..., Tensor], samples: int) -> None:
        self.draw, self.samples = draw, samples
        self.factors: list[Tensor] = []
        self.noise: list[Tensor] = []
        self.drawn: list[Tensor] = []  # leaves, by which everything later can be differentiated

    def next(self, factor: Tensor) -> Tensor:
        factor = factor.detach()
        self.factors.append(factor)
        self.noise.append(self.draw(self.samples, factor.shape[1]))
        covariance = _mean(torch.cat(self.factors, 1), torch.cat(self.factors, 1))
        jitter = 1e-10 * covariance.diagonal().mean() * torch.eye(len(covariance)).to(covariance)
        # The rows of the factors before stay what they were, and so do the draws.
        root = torch.linalg.cholesky(covariance + jitter)[-factor.shape[1] :]
        self.drawn.append((torch.cat(self.noise, 1) @ root.mT).requires_grad_())
        return self.drawn[-1]


def _earlier(values: Tensor, drawn: list[Tensor], factors: list[Tensor]) -> Tensor | float:
    """What earlier products with the transpose add: each factor times the mean derivative by the Gaussian it gave."""
    total: Tensor | float = 0.0
    rows = [
        torch.autograd.grad(column.sum(), drawn, retain_graph=True, materialize_grads=True)
        for column in values.unbind(1)
        if drawn and column.requires_grad
    ]
    for number, factor in enumerate(factors[: len(drawn)]):
        if rows:
            total = total + factor @ torch.stack([row[number].mean(0) for row in rows], 1)
    return total


def _mean(left: Tensor, right: Tensor) -> Tensor:
    """`E[left_i right_j]` over the samples, as a constant."""
    return left.detach().mT @ right.detach() / len(left)

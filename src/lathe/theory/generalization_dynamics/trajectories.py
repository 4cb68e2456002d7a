"""Gradient flow and gradient descent of linear regression on given features, all times at once (section 5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lathe.theory.generalization_dynamics.units import Loss, checked_times, time_per_step

__all__ = ["Modes", "Trajectory", "checked", "gradient_descent", "gradient_flow", "modes_of", "ridge_regression"]

#: Singular values below this part of the largest count as zero: those directions never move.
_RANK = 1e-12
#: Where no eigenvalue of the Gram matrix is below this part of the largest, rounding moves none by more than some 1e-8.
_CONDITION = 1e-8


@dataclass(frozen=True)
class Modes:
    """Features taken apart, `Phi = U S Q^T`. Frozen directions among the modes have an eigenvalue of zero.

    Attributes:
        eigenvalues: `S^2`, of `Phi^T Phi`, in descending order.
        directions: `Q`, in the space of weights.
        samples: `P`.
    """

    eigenvalues: Float[Tensor, "*batch modes"]
    directions: Float[Tensor, "*batch features modes"]
    samples: int

    def residual(
        self, features: Float[Tensor, "*batch samples features"], residual: Float[Tensor, "*batch samples outputs"]
    ) -> Float[Tensor, "*batch modes outputs"]:
        """`U^T residual`, zero for frozen modes."""
        moving = self.eigenvalues > 0
        inverse = torch.where(moving, self.eigenvalues, math.inf).rsqrt()
        return inverse.unsqueeze(-1) * (self.directions.mT @ (features.mT @ residual))


def modes_of(features: Float[Tensor, "*batch samples features"]) -> Modes:
    """Takes features apart: by their smaller Gram matrix, three times as fast as an SVD, where that is accurate enough.

    By SVD where features are so nearly dependent that squaring them would lose the slow modes.
    """
    samples, count = features.shape[-2:]
    tall = samples >= count
    gram = features.mT @ features if tall else features @ features.mT
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(-1), vectors.flip(-1)
    if values.shape[-1] and (values[..., -1] > _CONDITION * values[..., 0]).all():
        directions = vectors if tall else features.mT @ (vectors * values.rsqrt().unsqueeze(-2))
        return Modes(values, directions, samples)
    _, singular, rows = torch.linalg.svd(features, full_matrices=False)
    moving = singular > _RANK * singular.amax(-1, keepdim=True)
    return Modes(torch.where(moving, singular.square(), 0.0), rows.mT, samples)


@dataclass(frozen=True)
class Trajectory:
    """Weights, training and test errors along gradient flow or descent; `*outputs` is there if the targets had it.

    Attributes:
        times: the times, or the numbers of steps.
        train: mean squared residual of the training samples, for each output.
        eigenvalues: of `Phi^T Phi`, in descending order; frozen modes have zero.
        directions: the modes, in the space of weights.
        start: the first weights.
        learnt: how far the weights went along each mode.
    """

    times: Float[Tensor, " times"]
    train: Float[Tensor, "times *batch_outputs"]
    eigenvalues: Float[Tensor, "*batch modes"]
    directions: Float[Tensor, "*batch features modes"]
    start: Float[Tensor, "*batch_features_outputs"]
    learnt: Float[Tensor, "times *batch_modes_outputs"]

    @property
    def weights(self) -> Float[Tensor, "times *batch_features_outputs"]:
        """The weights at each time."""
        return self._along(self.directions, self.start)

    def predict(self, features: Float[Tensor, "*batch samples features"]) -> Float[Tensor, "times *predictions"]:
        """Predictions for other samples at each time, without forming the weights."""
        features = features.to(self.learnt)
        first = (features @ self.start.unsqueeze(-1)).squeeze(-1) if self._single else features @ self.start
        return self._along(features @ self.directions, first)

    def test(
        self, features: Float[Tensor, "*batch samples features"], targets: Float[Tensor, "*batch_samples_outputs"]
    ) -> Float[Tensor, "times *batch_outputs"]:
        """Mean squared error on other samples at each time."""
        error = (self.predict(features) - targets.to(self.learnt)).square()
        return error.mean(-1 if self._single else -2)

    def _along(self, coordinates: Tensor, first: Tensor) -> Tensor:
        """`first + coordinates @ learnt` at each time, as one product of matrices over all times."""
        learnt = self.learnt.unsqueeze(-1) if self._single else self.learnt
        columns = learnt.movedim(0, -2)
        moved = (coordinates @ columns.flatten(-2)).unflatten(-1, columns.shape[-2:]).movedim(-2, 0)
        return first + (moved.squeeze(-1) if self._single else moved)

    @property
    def _single(self) -> bool:
        return self.start.ndim == self.directions.ndim - 1


def gradient_flow(
    features: Float[Tensor, "*batch samples features"],
    targets: Float[Tensor, "*batch_samples_outputs"],
    w0: Float[Tensor, "*features_outputs"] | None = None,
    *,
    times: Float[Tensor, " times"],
) -> Trajectory:
    """Least squares by gradient flow, `dw/dt = Phi^T (y - Phi w)`, solved exactly at any times from one decomposition.

    Computed in float64: float32 would learn in directions that are frozen.

    Args:
        features: `Phi`. Leading axes are a batch.
        targets: one for each sample, with or without a last axis of outputs, which share the decomposition.
        w0: the first weights; zero by default.
        times: of the flow of `1/2 sum residual^2`, infinity allowed. A step of gradient descent on the mean loss,
            `1/(2P) sum residual^2`, takes the time `lr / P`; a learning rate that changes adds up as it goes.

    Raises:
        ValueError: for negative times, shapes that do not fit, or features and targets that are not finite.
    """
    times = checked_times(times).to(features.device)

    def kept(lam: Tensor) -> tuple[Tensor, Tensor]:
        # A frozen mode stays at infinite time too, where 0 times infinity would be NaN.
        exponent = torch.where(lam > 0, lam * _times_first(times, lam), 0.0)
        return torch.exp(-exponent), -torch.expm1(-exponent)

    return _trajectory(features, targets, w0, times, kept, modes_of(checked(features, "features")))


def gradient_descent(
    features: Float[Tensor, "*batch samples features"],
    targets: Float[Tensor, "*batch_samples_outputs"],
    w0: Float[Tensor, "*features_outputs"] | None = None,
    *,
    steps: Int[Tensor, " steps"],
    lr: float,
    loss: Loss = "sum",
    momentum: float = 0.0,
) -> Trajectory:
    """Least squares by full-batch gradient descent at any numbers of steps, exactly and without taking the steps.

    Args:
        features, targets, w0: as for `gradient_flow`.
        steps: how many steps to have taken.
        lr: the learning rate.
        loss: what is descended: "sum" is `1/2 sum residual^2`, "mean" is `1/(2P) sum residual^2`, "mse" is
            `nn.MSELoss`.
        momentum: of `torch.optim.SGD` (heavy ball, no dampening).

    Raises:
        ValueError: where the rate diverges (the message has the bound), and as for `gradient_flow`.
    """
    steps = torch.as_tensor(steps)
    if steps.is_floating_point() or (steps < 0).any():
        raise ValueError(f"steps must be whole and at least 0, got {steps.tolist()}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    modes = modes_of(checked(features, "features"))
    single = targets.ndim == features.ndim - 1
    rate = time_per_step(lr, loss, features.shape[-2], 1 if single else targets.shape[-1])
    fastest = rate * modes.eigenvalues.amax().item()
    if fastest >= 2 * (1 + momentum):
        bound = 2 * (1 + momentum) * lr / fastest
        raise ValueError(f"lr must be below {bound:.6g} (2 over the largest eigenvalue), got {lr}")

    def kept(lam: Tensor) -> tuple[Tensor, Tensor]:
        k, x = _times_first(steps.to(lam), lam), rate * lam
        if momentum:
            left = _heavy_ball(x, steps, momentum)
            return left, 1 - left
        # Slow modes by expm1, so that small steps are not lost in 1 - (1 - x)^k.
        slow = x < 0.5
        exponent = k * torch.log1p(-torch.where(slow, x, 0.0))
        power = (1 - x) ** k
        return torch.where(slow, exponent.exp(), power), torch.where(slow, -torch.expm1(exponent), 1 - power)

    return _trajectory(features, targets, w0, steps.double(), kept, modes)


def ridge_regression(
    features: Float[Tensor, "*batch samples features"],
    targets: Float[Tensor, "*batch_samples_outputs"],
    *,
    gammas: Float[Tensor, " gammas"],
) -> Trajectory:
    """Ridge regression, `1/2 sum residual^2 + gamma/2 |w|^2`, at all strengths from one decomposition.

    What `Trajectory` calls times are the strengths. `gamma = 0` is the least-norm solution.

    Raises:
        ValueError: for negative strengths, and as for `gradient_flow`.
    """
    gammas = checked_times(gammas, "gammas").to(features.device)

    def kept(lam: Tensor) -> tuple[Tensor, Tensor]:
        gamma = _times_first(gammas, lam)
        total = torch.where(lam + gamma > 0, lam + gamma, 1.0)
        learnt = torch.where(gamma.isinf(), 0.0, lam / total)
        return torch.where(gamma.isinf(), 1.0, torch.where(lam > 0, gamma, 1.0) / total), learnt

    return _trajectory(features, targets, None, gammas, kept, modes_of(checked(features, "features")))


def _trajectory(
    features: Tensor,
    targets: Tensor,
    w0: Tensor | None,
    times: Tensor,
    kept: Callable[[Tensor], tuple[Tensor, Tensor]],
    modes: Modes,
) -> Trajectory:
    """`kept(eigenvalues)` says which part of each mode's residual is left and which learnt, (times, *batch, modes)."""
    if times.ndim != 1:
        raise ValueError(f"times must have one axis, got shape {tuple(times.shape)}")
    features, targets = features.double(), checked(targets, "targets").to(features.device)
    single = targets.ndim == features.ndim - 1
    if targets.shape[: features.ndim - 1] != features.shape[:-1] or targets.ndim > features.ndim:
        shape = tuple(features.shape[:-1])
        raise ValueError(f"targets must have shape {shape} or {shape} with outputs, got {tuple(targets.shape)}")
    outputs = () if single else targets.shape[-1:]
    wanted = features.shape[:-2] + features.shape[-1:] + outputs
    start = features.new_zeros(wanted) if w0 is None else checked(w0, "w0").to(features.device)
    if start.shape != wanted:
        raise ValueError(f"w0 must have shape {tuple(wanted)}, got {tuple(start.shape)}")
    if single:
        targets, start = targets.unsqueeze(-1), start.unsqueeze(-1)
    residual = targets if w0 is None else targets - features @ start
    along = modes.residual(features, residual)
    left, learnt = kept(modes.eigenvalues)
    moving = modes.eigenvalues > 0
    inverse = torch.where(moving, modes.eigenvalues, math.inf).rsqrt()
    went = (learnt * inverse).unsqueeze(-1) * along
    square = along.square()
    outside = (residual.square().sum(-2) - square.sum(-2)).clamp_min(0)
    # As many moving modes as samples leave nothing outside: what is left of the difference is rounding.
    outside = torch.where((moving.sum(-1) == features.shape[-2]).unsqueeze(-1), 0.0, outside)
    train = ((left.square().unsqueeze(-1) * square).sum(-2) + outside) / features.shape[-2]
    if single:
        train, start, went = train.squeeze(-1), start.squeeze(-1), went.squeeze(-1)
    return Trajectory(times, train, modes.eigenvalues, modes.directions, start, went)


def _heavy_ball(x: Tensor, steps: Tensor, momentum: float) -> Tensor:
    """What heavy-ball steps leave of a deviation of 1 with no velocity: powers of a 2 x 2 matrix for each mode.

    `d_k+1 = (1 + b - x) d_k - b d_k-1`, started with `d_-1 = d_0`.
    """
    matrix = torch.zeros(*x.shape, 2, 2, dtype=x.dtype, device=x.device)
    matrix[..., 0, 0], matrix[..., 0, 1], matrix[..., 1, 0] = 1 + momentum - x, -momentum, 1.0
    return torch.stack([torch.linalg.matrix_power(matrix, int(k))[..., 0, :].sum(-1) for k in steps])


def _times_first(times: Tensor, lam: Tensor) -> Tensor:
    return times.reshape((-1,) + (1,) * lam.ndim)


def checked(value: Tensor, name: str) -> Tensor:
    """`value` in float64.

    Raises:
        TypeError: where it is not floating point.
        ValueError: where it is not finite, or as features not a matrix or a batch of them.
    """
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    if not torch.isfinite(value).all():
        raise ValueError(f"{name} must be finite")
    if name == "features" and (value.ndim < 2 or 0 in value.shape):
        raise ValueError(f"features must be samples by features, none of them zero, got shape {tuple(value.shape)}")
    return value.double()

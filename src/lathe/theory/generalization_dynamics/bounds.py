"""Bounds on the test error: by the norm of the weights, and by the frozen subspace and the spectral gap (section 7)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lathe.theory.generalization_dynamics.trajectories import checked, modes_of
from lathe.theory.generalization_dynamics.units import checked_times

__all__ = ["conditioning_bound", "rademacher_bound"]


def rademacher_bound(
    train_error: float | Tensor,
    weight_norm: float | Tensor,
    feature_norm: float | Tensor,
    samples: int,
    lipschitz: float = 2.0,
) -> Float[Tensor, "*batch"]:
    """`E_t + c B R / sqrt(P)` for `|w| <= B`, `E |h|^2 <= R^2` and a loss of Lipschitz constant `c / 2`, on average.

    It grows with the number of features, which is the wrong way: large networks generalise better than it allows.

    Raises:
        ValueError: for negative values or `samples < 1`.
    """
    found = [torch.as_tensor(each, dtype=torch.float64) for each in (train_error, weight_norm, feature_norm)]
    for name, value in zip(("train_error", "weight_norm", "feature_norm"), found):
        if not (value >= 0).all():
            raise ValueError(f"{name} must be at least 0, got {value.tolist()}")
    if samples < 1 or not lipschitz >= 0:
        raise ValueError(f"samples must be at least 1 and lipschitz at least 0, got {samples} and {lipschitz}")
    return found[0] + lipschitz * found[1] * found[2] / math.sqrt(samples)


def conditioning_bound(
    features: Float[Tensor, "samples features"],
    targets: Float[Tensor, " samples"],
    best: Float[Tensor, " features"],
    covariance: Float[Tensor, "features features"],
    *,
    w0: Float[Tensor, " features"] | None = None,
    times: Float[Tensor, " times"] | None = None,
) -> Float[Tensor, "*times"]:
    """A bound on `E_g - E_approx` along gradient flow by the frozen subspace and the spectral gap.

    With eigenvalues `lam_i` of `Phi^T Phi`, `eta = y - Phi best`, and `Pi_0` on the frozen directions, it is
    `lambda_max(Sigma) [ |Pi_0 (w0 - best)|^2 + sum_i (e^(-lam_i t) |best_i - w0_i| + (1 - e^(-lam_i t)) |eta_i| /
    sqrt(lam_i))^2 ]`. Without `times` a bound for all times, with the norms of both and the smallest eigenvalue that is
    not zero in place of the sum. In the paper's spirit; its constants are ours.

    Args:
        features, targets: the training samples.
        best: the readout that is best for the population, whose error is `E_approx`.
        covariance: `Sigma = E[h h^T]` of the population.
        w0: the first readout; zero by default.
        times: of gradient flow on `1/2 sum residual^2`.

    Raises:
        ValueError: for negative times, or values that are not finite.
    """
    features, targets = checked(features, "features"), checked(targets, "targets")
    best, covariance = checked(best, "best"), checked(covariance, "covariance")
    start = torch.zeros_like(best) if w0 is None else checked(w0, "w0")
    modes = modes_of(features)
    moving = modes.eigenvalues > 0
    lam, directions = modes.eigenvalues[moving], modes.directions[:, moving]
    away = start - best
    inside = directions.T @ away
    frozen = (away - directions @ inside).square().sum()
    eta = (modes.residual(features, (targets - features @ best).unsqueeze(-1)).squeeze(-1))[moving]
    scale = torch.linalg.eigvalsh(covariance)[-1]
    if times is None:
        return scale * (frozen + (inside.norm() + eta.norm() / lam.min().sqrt()).square())
    t = checked_times(times).to(lam).unsqueeze(-1)
    along = torch.exp(-lam * t) * inside.abs() - torch.expm1(-lam * t) * eta.abs() / lam.sqrt()
    return scale * (frozen + along.square().sum(-1))

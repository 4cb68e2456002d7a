"""The readout of fixed features in closed form: ridge regression, weighted least squares, Fisher's discriminant."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from torch import Tensor

__all__ = ["NormalEquations", "fit_bundled", "one_hot"]

Loss = Literal["mse", "fisher"]


def fit_bundled(
    features: Float[Tensor, "samples features"],
    targets: Shaped[Tensor, "samples *outputs"],
    ridge: float = 1e-4,
    *,
    loss: Loss = "mse",
    intercept: bool = False,
    sample_weight: Float[Tensor, " samples"] | None = None,
) -> Float[Tensor, "outputs features_and_intercept"]:
    """The optimal parameters A of a bundled network, A = Y^T P (P^T P + ridge I)^-1, without any gradient step.

    Args:
        features: P.
        targets: (samples, outputs) or (samples,) numbers, or integer classes, of which a column each is made.
        ridge: added to the diagonal, also for the intercept, as scikit-learn's `alpha` on a column of ones.
        loss: "mse" is least squares; "fisher" is Fisher's linear discriminant with shared covariance (targets must be
            classes, and intercept=True), whose outputs are log odds up to a common constant.
        intercept: appends a column of ones to P; its weights are the last column of the result.
        sample_weight: of each sample in the sum: generalised least squares with a diagonal covariance.

    Returns:
        A, in the dtype of the features; all sums and the Cholesky factorisation are in float64.

    Raises:
        ValueError: where samples do not pair up, nothing is to be fitted, ridge is negative or so small that P^T P
            cannot be inverted, or loss is another.
    """
    equations = NormalEquations(intercept=intercept, classes=loss == "fisher")
    check_loss(loss, targets, intercept)
    equations.add(features, one_hot(targets), sample_weight)
    return equations.solve(ridge).to(features.dtype)


def one_hot(targets: Tensor) -> Tensor:
    """Targets as columns: integer classes one-hot, numbers as they are."""
    if targets.ndim == 1 and not targets.is_floating_point():
        return torch.nn.functional.one_hot(targets.long()).double()
    return targets[:, None] if targets.ndim == 1 else targets


def check_loss(loss: str, targets: Tensor, intercept: bool) -> None:
    if loss not in ("mse", "fisher"):
        raise ValueError(f"loss must be 'mse' or 'fisher', which have a closed form, got {loss!r}")
    if loss == "fisher" and (targets.ndim != 1 or targets.is_floating_point() or not intercept):
        raise ValueError(
            "loss='fisher' needs integer classes (samples,) and intercept=True, "
            f"got {targets.dtype} {tuple(targets.shape)} and intercept={intercept}"
        )


class NormalEquations:
    """P^T P and P^T Y, summed in float64 over batches: memory grows with the features, not with the samples."""

    def __init__(self, *, intercept: bool = False, classes: bool = False) -> None:
        self.intercept, self.classes = intercept, classes
        self.gram: Tensor | None = None
        self.moments: Tensor | None = None
        self.counts: Tensor | None = None

    def add(self, P: Tensor, Y: Tensor, weight: Tensor | None = None) -> None:
        """Adds a batch of features (samples, features) and targets (samples, outputs)."""
        if P.ndim != 2 or Y.ndim != 2 or len(P) != len(Y) or (weight is not None and weight.shape != P.shape[:1]):
            weighted = "" if weight is None else f", sample_weight {tuple(weight.shape)}"
            raise ValueError(
                f"features, targets and weights must pair up, got {tuple(P.shape)} and {tuple(Y.shape)}{weighted}"
            )
        if weight is not None and not bool((weight >= 0).all()):
            raise ValueError("sample_weight must be at least 0 throughout")
        root = None if weight is None else weight.detach().double().sqrt()[:, None]
        for start in range(0, len(P), 4096):
            rows = slice(start, start + 4096)
            p, y = P[rows].detach().double(), Y[rows].detach().double()
            if self.intercept and not self.classes:
                p = torch.cat([p, torch.ones_like(p[:, :1])], 1)
            counts = y if root is None else y * root[rows].square()
            if root is not None:
                p, y = p * root[rows], y * root[rows]
            parts = _product(p, p), _product(p, y), counts.sum(0)
            if self.gram is None or self.moments is None or self.counts is None:
                self.gram, self.moments, self.counts = parts
            else:
                self.gram += parts[0]
                self.moments += parts[1]
                self.counts += parts[2]

    def solve(self, ridge: float) -> Tensor:
        """A (outputs, features, and the intercept last), in float64."""
        if not (math.isfinite(ridge) and ridge >= 0):
            raise ValueError(f"ridge must be finite and at least 0, got {ridge}")
        if self.gram is None or self.moments is None or self.counts is None:
            raise ValueError("features must have at least one sample")
        if not self.classes:
            return _solve(self.gram, self.moments, ridge).T
        total = self.counts.sum()
        means = self.moments / self.counts
        within = self.gram - (means * self.counts) @ means.T
        weight = _solve(within, means, ridge).T * (total - len(self.counts))
        offset = (self.counts / total).log() - (weight * means.T).sum(1) / 2
        return torch.cat([weight, offset[:, None]], 1)


def _product(p: Tensor, q: Tensor) -> Tensor:
    """p^T q; on CPUs by NumPy, whose BLAS multiplies out only half of p^T p."""
    if p.device.type != "cpu":
        return p.T @ q
    left = p.numpy()
    return torch.from_numpy(left.T @ (left if q is p else q.numpy()))


def _solve(gram: Tensor, right: Tensor, ridge: float) -> Tensor:
    gram = gram.clone()
    gram.diagonal().add_(ridge)
    failed = False
    if gram.device.type == "cpu":
        try:
            factor, lower = cho_factor(gram.numpy(), lower=True, overwrite_a=True, check_finite=False)
        except LinAlgError:
            failed = True
        else:
            solved = torch.from_numpy(cho_solve((factor, lower), right.numpy(), check_finite=False))
    else:
        cholesky, info = torch.linalg.cholesky_ex(gram)
        failed, solved = bool(info), torch.cholesky_solve(right, cholesky)
    if failed or not bool(solved.isfinite().all()):
        raise ValueError(
            f"ridge must be larger: the features are linearly dependent or not finite, and {ridge} is too little"
        )
    return solved

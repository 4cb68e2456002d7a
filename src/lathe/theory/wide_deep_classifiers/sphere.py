"""Data on the sphere: maps to it, and an estimate of the dimension that they fill there."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from scipy.spatial import cKDTree
from torch import Tensor

__all__ = ["intrinsic_dimension", "to_sphere", "unit_rows"]


def to_sphere(
    X: Float[Tensor, "n features"],
    method: Literal["append", "normalise"] = "append",
    *,
    low: Float[Tensor, " features"] | None = None,
    high: Float[Tensor, " features"] | None = None,
) -> Float[Tensor, "n ambient"]:
    """Points on the part of the unit sphere where no coordinate is negative; in float64.

    "append" scales each feature to [0, 1], appends a coordinate of 1 and divides by the norm: points of R^d keep their
    d dimensions. "normalise" divides by the norm: what is non-negative already (pixels, counts) loses one dimension.

    Args:
        low, high: the range that "append" scales to [0, 1], by default that of `X`; values beyond it are cut off. Give
            the training data's range for test data. A feature without range becomes 0.

    Raises:
        ValueError: for values that are not finite, an unknown method, and, for "normalise", rows of zeros.
    """
    X = X.double()
    _check_finite(X, "X")
    if method == "append":
        low = X.amin(0) if low is None else low.to(X)
        high = X.amax(0) if high is None else high.to(X)
        width = high - low
        scaled = ((X - low) / torch.where(width > 0, width, 1.0)).clamp(0, 1) * (width > 0)
        lifted = torch.cat([scaled, torch.ones_like(X[:, :1])], 1)
    elif method == "normalise":
        lifted = X
        empty = (X == 0).all(1)
        if empty.any():
            raise ValueError(f"X must have no rows of zeros to be normalised; row {int(empty.nonzero()[0])} is one")
    else:
        raise ValueError(f"method must be 'append' or 'normalise', got {method!r}")
    return lifted / torch.linalg.vector_norm(lifted, dim=1, keepdim=True)


def intrinsic_dimension(
    X: Float[Tensor, "n features"], method: Literal["two-nn", "mle"] = "two-nn", *, neighbours: int = 20
) -> float:
    """How many dimensions the points fill, from the distances to their nearest neighbours.

    "two-nn" (Facco et al. 2017) uses the ratio of the second to the first, which follows a Pareto law with exponent d
    if the density hardly varies that far; it is noisier, and less biased where the density varies. "mle" (Levina and
    Bickel 2005, averaged as by MacKay and Ghahramani) uses the first `neighbours`. Copies of a point count once.

    Raises:
        ValueError: for an unknown method, values that are not finite, and fewer than 3 (or `neighbours` + 1) points
            that differ.
    """
    if method not in ("two-nn", "mle"):
        raise ValueError(f"method must be 'two-nn' or 'mle', got {method!r}")
    _check_finite(X, "X")
    points = torch.unique(X.detach().double().cpu(), dim=0)
    count = 2 if method == "two-nn" else neighbours
    if count < 2 or len(points) <= count:
        raise ValueError(f"X must have more than {count} points that differ, got {len(points)} (neighbours >= 2)")
    distances = torch.from_numpy(cKDTree(points.numpy()).query(points.numpy(), k=count + 1)[0])[:, 1:]
    if method == "mle":
        logs = (distances[:, -1:] / distances[:, :-1]).log()
        return len(points) * (count - 1) / logs.sum().item()
    ratio = (distances[:, 1] / distances[:, 0]).log().sort().values
    # The largest ratios carry most of the noise: the exponent is fitted to the lower nine tenths, through the origin.
    kept = int(0.9 * len(ratio))
    cumulative = torch.arange(1, kept + 1, dtype=torch.float64) / len(ratio)
    log_ratio, log_survival = ratio[:kept], -torch.log1p(-cumulative)
    return ((log_ratio * log_survival).sum() / (log_ratio * log_ratio).sum()).item()


def unit_rows(x: Tensor, name: str) -> Tensor:
    """The rows in float64, of norm one to rounding.

    Raises:
        ValueError: where they are not finite, or not of norm one within 1e-6.
    """
    if x.ndim != 2:
        raise ValueError(f"{name} must be a matrix with a point in each row, got shape {tuple(x.shape)}")
    x = x.double()
    _check_finite(x, name)
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    if len(x) and (norm.detach() - 1).abs().max() > 1e-6:
        worst = int((norm.detach()[:, 0] - 1).abs().argmax())
        raise ValueError(
            f"{name} must have rows of norm 1 (within 1e-6), row {worst} has {float(norm[worst]):.6g}; use to_sphere"
        )
    return x / norm


def _check_finite(x: Tensor, name: str) -> None:
    if not torch.isfinite(x).all():
        raise ValueError(f"{name} must be finite, got infinite or NaN entries")

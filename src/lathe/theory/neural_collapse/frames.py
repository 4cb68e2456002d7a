"""The frames that collapsed classifiers and class means form, as matrices with a row a class.

For a classifier that is fixed before training, as a start, or to compare a trained one with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["general_orthogonal_frame", "orthogonal_frame", "simplex_etf"]


def simplex_etf(
    K: int,
    d: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "K d"]:
    """K rows of length 1, each two at the same cosine -1/(K - 1): a regular simplex around the origin.

    It lies in the first K - 1 coordinates, or with a `generator` in K - 1 directions drawn at random.

    Raises:
        ValueError: for fewer than two classes, or d < K - 1.
    """
    if K < 2 or d < K - 1:
        raise ValueError(f"a simplex of K classes needs K >= 2 and d >= K - 1, got K = {K}, d = {d}")
    # Helmert's matrix: an orthonormal basis of what is orthogonal to (1, .., 1).
    j = torch.arange(1, K, dtype=torch.float64)
    i = torch.arange(K, dtype=torch.float64)[:, None]
    basis = torch.where(i < j, 1.0, torch.where(i == j, -j, 0.0)) / (j * (j + 1)).sqrt()
    frame = (K / (K - 1)) ** 0.5 * basis @ _axes(K - 1, d, generator)
    return frame.to(device=device, dtype=dtype or torch.get_default_dtype())


def orthogonal_frame(
    K: int,
    d: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "K d"]:
    """K orthogonal rows of length 1: the first K axes, or with a `generator` directions drawn at random.

    Raises:
        ValueError: for no classes, or d < K.
    """
    if not 1 <= K <= d:
        raise ValueError(f"an orthogonal frame needs 1 <= K <= d, got K = {K}, d = {d}")
    return _axes(K, d, generator).to(device=device, dtype=dtype or torch.get_default_dtype())


def general_orthogonal_frame(
    lengths: Sequence[float] | Float[Tensor, " K"],
    d: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "K d"]:
    """Orthogonal rows of given lengths, such as `gof(...).classifier_norms`; a class of length 0 takes no direction.

    Raises:
        ValueError: for lengths that are negative or not finite, or more that are positive than d.
    """
    lengths = torch.as_tensor(lengths, dtype=torch.float64).cpu()
    if lengths.ndim != 1 or not bool((torch.isfinite(lengths) & (lengths >= 0)).all()):
        raise ValueError(f"lengths must be a list of numbers >= 0, got {lengths.tolist()}")
    living = lengths > 0
    count = int(living.sum())
    if count > d:
        raise ValueError(f"d must be at least the number of positive lengths, {count}, got {d}")
    frame = torch.zeros(len(lengths), d, dtype=torch.float64)
    frame[living] = lengths[living, None] * _axes(count, d, generator)
    return frame.to(device=device, dtype=dtype or torch.get_default_dtype())


def _axes(rank: int, d: int, generator: torch.Generator | None) -> Float[Tensor, "rank d"]:
    """Orthonormal rows."""
    if generator is None:
        return torch.eye(rank, d, dtype=torch.float64)
    drawn = torch.randn(d, rank, dtype=torch.float64, generator=generator, device=generator.device).cpu()
    return torch.linalg.qr(drawn).Q.mT.contiguous()

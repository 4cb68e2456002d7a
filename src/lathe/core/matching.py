"""How alike two sets of activations on the same samples are, up to a rotation of their units.

Centred kernel alignment: Kornblith, Norouzi, Lee, Hinton, "Similarity of neural network representations revisited",
2019, arXiv 1905.00414, section 3; the unbiased estimate is that of Song et al. 2012 (HSIC_1).
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

__all__ = ["linear_cka"]


def linear_cka(
    x: Float[Tensor, "samples_x units_x"], y: Float[Tensor, "samples_y units_y"], *, unbiased: bool = False
) -> Float[Tensor, ""]:
    """Centred kernel alignment with linear kernels, in float64: 1 where `y` is `x` rotated, scaled and shifted.

    Costs `samples * units_x * units_y`, or `samples^2 * units` where there are fewer samples than units.

    Args:
        x, y: activations, row by row of the same samples.
        unbiased: estimate so that independent activations have 0 on average; the plain estimate grows towards 1 with
            units over samples.

    Raises:
        ValueError: where the samples do not pair up, are fewer than 2 (4 where unbiased), or do not vary at all.
    """
    least = 4 if unbiased else 2
    if len(x) != len(y) or len(x) < least:
        raise ValueError(f"x and y must hold the same samples, at least {least}, got {len(x)} and {len(y)}")
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    product = _unbiased_product if unbiased else _product
    within = product(x, x) * product(y, y)
    if not within > 0:
        raise ValueError("x and y must both vary over the samples")
    return product(x, y) / within.sqrt()


def _product(x: Tensor, y: Tensor) -> Tensor:
    """The inner product of the Gram matrices of centred x and y, by whichever of two ways is cheaper."""
    if max(x.shape[1], y.shape[1]) <= len(x):
        return (x.mT @ y).square().sum()
    return ((x @ x.mT) * (y @ y.mT)).sum()


def _unbiased_product(x: Tensor, y: Tensor) -> Tensor:
    """n (n - 3) HSIC_1: the same without the diagonals, which carry the bias."""
    n = len(x)
    diagonal_x, diagonal_y = x.square().sum(1), y.square().sum(1)
    # x is centred: the rows of its Gram matrix sum to 0, and without the diagonal to minus the diagonal.
    trace = _product(x, y) - diagonal_x @ diagonal_y
    total = diagonal_x.sum() * diagonal_y.sum() / ((n - 1) * (n - 2))
    return trace + total - 2 / (n - 2) * (diagonal_x @ diagonal_y)

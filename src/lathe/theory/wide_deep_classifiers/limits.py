"""What great depth makes of an activation: a majority vote, the nearest neighbour, or a singular kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lathe.core.gaussian import ActivationLike
from lathe.theory.wide_deep_classifiers.dual import DualActivation, as_dual
from lathe.theory.wide_deep_classifiers.sphere import unit_rows
from lathe.theory.wide_deep_classifiers.tables import gaps

__all__ = ["DepthLimit", "classify_depth_limit"]

#: The depth at which the limit shows is told for this gap to the nearest neighbour, where no data are given.
_TYPICAL_GAP = 0.01
#: alpha within this share of d counts as equal to it.
_NEAR = 0.02


@dataclass(frozen=True)
class DepthLimit:
    """What a wide network with an activation becomes as its depth grows.

    Attributes:
        kind: "nearest" (the nearest neighbour), "majority" (a vote of all) or "singular" (a singular kernel).
        alpha: the kernel's singularity, `|x - z|^-alpha`; None unless singular.
        consistent_dimension: the dimension for which the limit is Bayes consistent, within 2%; None where there is
            none.
        visible_depth: hidden layers from which on the limit shows; None where that is not known.
        dual: the activation's dual, with A, A' and B'.
        notes: what follows for a user, in sentences.
    """

    kind: Literal["nearest", "majority", "singular"]
    alpha: float | None
    consistent_dimension: int | None
    visible_depth: int | None
    dual: DualActivation
    notes: tuple[str, ...]

    def __str__(self) -> str:
        singularity = "" if self.alpha is None else f", alpha = {self.alpha:.4g}"
        return "\n".join([f"{self.dual.name}: {self.kind}{singularity}", *(f"- {note}" for note in self.notes)])


def classify_depth_limit(
    phi: ActivationLike | DualActivation,
    *,
    d: float | None = None,
    X: Float[Tensor, "n features"] | None = None,
) -> DepthLimit:
    """The limit of depth of an activation, with what it means for data of dimension `d`.

    `E phi` decides on the vote, `E phi'` between nearest neighbour and singular kernel, whose
    `alpha = -4 log |E phi'| / log E phi'^2`; means below 1e-9 count as zero.

    Args:
        d: dimension of the data, one less than their coordinates on the sphere; to be compared with `alpha`.
        X: data on the unit sphere, from whose nearest neighbours the depth at which the limit shows is told; else it
            is told for a gap `1 - <x, z>` of 0.01.

    Raises:
        ValueError: for a linear `phi`, which depth does not change, `d < 1`, and points that are not on the sphere.
    """
    dual = as_dual(phi)
    if dual.linear:
        raise ValueError(f"phi ({dual.name}) is linear: depth does not change its kernel")
    if d is not None and not d >= 1:
        raise ValueError(f"d must be at least 1, got {d}")
    gap = _TYPICAL_GAP if X is None else _median_gap(X)
    if dual.lead == 0:
        return _majority(dual)
    if dual.lead > 1:
        return _nearest(dual, gap)
    return _singular(dual, d, gap)


def _majority(dual: DualActivation) -> DepthLimit:
    notes = [
        "adding depth in the kernel regime destroys the classifier: it becomes a vote of all training labels; subtract "
        f"the mean of the activation ({dual.mean + dual.A * dual.factor:.6g}) to move it to the singular or the "
        "nearest class"
    ]
    if abs(dual.B_prime - 1) < 1e-6:
        notes.append(
            "E phi'^2 = 1: the vote is approached as 1/depth only; tens of thousands of layers for 1000 points"
        )
    elif dual.B_prime > 1:
        notes.append("E phi'^2 > 1: points end at equal, fixed correlations, and the kernel's diagonal dominates")
    else:
        notes.append("E phi'^2 < 1: all points become one; the vote is the limit of a vanishing ridge")
    depth = None
    if abs(dual.A) < 0.05 and abs(dual.A_prime) > 1e-9:
        depth = math.ceil(math.log(dual.A**2) / math.log(dual.A_prime**2))
        notes.append(
            f"E phi = {dual.A:.2g} is small: up to about {depth} layers the network behaves as if it were zero"
        )
    return DepthLimit("majority", None, None, depth, dual, tuple(notes))


def _nearest(dual: DualActivation, gap: float) -> DepthLimit:
    m = dual.lead
    # xi^(m^L) tells neighbours apart, e.g. of correlations 1 - gap and 1 - 2 gap, once m^L gap is large.
    depth = max(1, math.ceil(math.log(10 / gap) / math.log(m)))
    notes = (
        "the deep limit is 1-NN: its asymptotic error is at most 2 R* (1 - R*), but not the Bayes error R*",
        f"the first Hermite polynomial in the activation is h_{m}: correlations fall as xi^({m}^depth), and underflow "
        "after a few layers",
        f"the limit shows from about {depth} layers on, where the nearest neighbour has 1 - <x, z> = {gap:.2g}",
    )
    return DepthLimit("nearest", None, None, depth, dual, notes)


def _singular(dual: DualActivation, d: float | None, gap: float) -> DepthLimit:
    a, b = dual.A_prime**2, dual.B_prime
    p = -math.log(a) / math.log(b)
    alpha = 2 * p
    nearest = round(alpha)
    consistent = nearest if nearest >= 1 and abs(alpha - nearest) <= _NEAR * nearest else None
    notes = [f"weights of the training points fall as |x - z|^-{alpha:.4g}"]
    if d is not None:
        if abs(alpha - d) <= _NEAR * d:
            notes.append(f"alpha = {alpha:.4g} fits d = {d:g}: Bayes consistent (if the data have a density)")
        elif alpha < d:
            notes.append(f"alpha < d = {d:g}: weights too flat, far training points dominate as their number grows")
        else:
            notes.append(f"alpha > d = {d:g}: weights too peaked, the classifier behaves like 1-NN")
    # a^L < gap^p, which is b^-L < gap
    depth = max(1, math.ceil(math.log(1 / gap) / math.log(b)))
    width = depth * a ** (-2.0 * depth)
    notes.append(
        f"the limit shows from about {depth} layers on, where the nearest neighbour has 1 - <x, z> = {gap:.2g}; a "
        f"finite network follows its kernel that far at widths of about {width:.1g}"
    )
    return DepthLimit("singular", alpha, consistent, depth, dual, tuple(notes))


def _median_gap(X: Tensor) -> float:
    X = unit_rows(X, "X")
    if len(X) < 2:
        raise ValueError(f"X must have at least 2 points, got {len(X)}")
    nearest = []
    for start in range(0, len(X), 512):
        e = gaps(X[start : start + 512], X)
        e.diagonal(start).fill_(2.0)
        nearest.append(e.amin(1))
    return min(max(torch.cat(nearest).median().item(), 1e-12), 0.5)

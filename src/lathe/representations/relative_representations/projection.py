"""The map itself: from latents and anchors to similarities, and what may be done to the similarities.

Moschella et al. 2022, arXiv 2209.15430, section 3 (definition and choice of similarity) and appendix (quantisation).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

__all__ = ["SIMILARITIES", "AnchorFrame", "Similarity", "average_by_class", "quantize", "relative"]

SIMILARITIES = ("cosine", "inner", "basis", "l1", "l2", "linf")
Measure = Callable[[Tensor, Tensor], Tensor]
Similarity = str | Measure | Sequence[str | Measure]

NORM_FLOOR = 1e-12  # the floor of `F.normalize`
ORDERS = {"l1": 1.0, "l2": 2.0, "linf": math.inf}


def relative(
    x: Float[Tensor, "*batch features"],
    anchors: Shaped[Tensor, "anchors *anchor_features"],
    *,
    similarity: Similarity = "cosine",
    center: bool = False,
    whiten: bool = False,
) -> Float[Tensor, "*batch relative_features"]:
    """Coordinates of `x` relative to the anchors: entry j is the similarity of `x` to anchor j (section 3).

    Args:
        x: latents, the feature axis last.
        anchors: latents of the anchors `(anchors, features)`, embedded by the encoder of `x` at the same weights and in
            the same mode; or integers, rows of `x`.
        similarity: one of the following, a function `(x, anchors) -> (..., anchors)`, or several of them, whose
            coordinates are concatenated.
            "cosine": the paper's. Invariant to rotations, reflections and (per sample) scale.
            "inner": `<x, a> / sqrt(features)`. Invariant to rotations and reflections only.
            "basis": the coefficients that rebuild `x` from the anchors by least squares. Invariant to every invertible
            linear map while there are no more anchors than features.
            "l1", "l2", "linf": minus the distance to the anchor, in units of the anchors' mean distance from their
            centre: free of translation and of a common scale ("l2" of rotation as well).
        center: subtract the anchors' mean from both: adds invariance to translation.
        whiten: also divide by the anchors' covariance (which passes no gradient): adds invariance to every invertible
            affine map where there are more anchors than features. Needs well-conditioned latents.

    Returns:
        `(..., anchors)` in the dtype of `x`; half precision is accumulated in float32. A zero vector has cosine 0 to
        everything, with a warning.

    Raises:
        ValueError: no anchors, another number of features than `x`, an index out of range, or an unknown similarity.
    """
    return AnchorFrame(anchor_latents(x, anchors), similarity, center, whiten)(x)


class AnchorFrame:
    """Anchors made ready for one similarity: all that does not depend on `x`, computed once. Call it on `x`."""

    def __init__(self, anchors: Tensor, similarity: Similarity = "cosine", center: bool = False, whiten: bool = False):
        measures = check_similarity(similarity)
        anchors = _accumulable(anchors)
        self.num_anchors, self.dtype = len(anchors), anchors.dtype
        with _full_precision(anchors):
            self.mean = anchors.mean(0) if center or whiten else None
            self.whitening = _whitening(anchors) if whiten else None
            anchors = self._moved(anchors)
            self._maps = [_prepared(measure, anchors) for measure in measures]

    def __call__(self, x: Tensor) -> Tensor:
        with _full_precision(x):
            wide = x.to(torch.promote_types(self.dtype, _accumulable(x).dtype))
            wide = self._moved(wide)
            parts = [apply(wide) for apply in self._maps]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).to(x.dtype)

    def _moved(self, x: Tensor) -> Tensor:
        if self.mean is not None:
            x = x - self.mean.to(x.dtype)
        return x if self.whitening is None else x @ self.whitening.to(x.dtype)


def quantize(
    values: Float[Tensor, "*batch features"], method: str, bin_size: float = 0.1
) -> Float[Tensor, "*batch features"]:
    """Coarser values, so that spaces which differ by a bounded distortion, not only by an isometry, share codes.

    Args:
        values: similarities, or normalised latents.
        method: "round" to the nearest multiple of `bin_size`; the gradient passes as if nothing had been done.
            "smooth": steps of the same width without corners, `b (v/b - sin(2 pi v/b) / (2 pi))`.
            "cluster": rows that are all within `bin_size` of each other (complete linkage) become their mean. Takes the
            distances of all pairs of rows.
        bin_size: width of a step, or diameter of a cluster.

    Raises:
        ValueError: an unknown method, or a `bin_size` that is not positive.
    """
    check_quantization(method, bin_size)
    if method == "round":
        return _StraightThrough.apply(values, bin_size)
    if method == "smooth":
        steps = values / bin_size
        return bin_size * (steps - torch.sin(2 * torch.pi * steps) / (2 * torch.pi))
    return _cluster_means(values.reshape(-1, values.shape[-1]), bin_size).reshape(values.shape)


def average_by_class(
    similarities: Float[Tensor, "*batch anchors"], labels: Int[Tensor, " labelled"], groups: int = 1
) -> Float[Tensor, "*batch averages"]:
    """Similarities averaged over the anchors of a class: `anchors` columns become `groups * classes`.

    The i-th anchor of a class belongs to group `i % groups`; columns run over the classes of group 0, then of group 1.

    Raises:
        ValueError: where `labels` does not name one class an anchor, or a class has fewer anchors than `groups`.
    """
    return similarities @ class_averages(labels, groups, similarities.shape[-1]).to(similarities)


# --- checks that raise before any work is done -----------------------------------------------------------------------


def anchor_latents(x: Tensor, anchors: Tensor) -> Tensor:
    """The anchors as rows of latents that fit `x`."""
    if not anchors.is_floating_point():
        if x.ndim != 2 or anchors.ndim != 1:
            raise ValueError(
                f"integer anchors are rows of a matrix x, got x of shape {tuple(x.shape)} "
                f"and anchors of shape {tuple(anchors.shape)}"
            )
        check_index(anchors, len(x), "anchors", "rows of x")
        anchors = x[anchors]
    check_anchors(anchors)
    if x.shape[-1] != anchors.shape[-1]:
        raise ValueError(f"anchors must have the {x.shape[-1]} features of x, got {anchors.shape[-1]}")
    return anchors


def check_anchors(anchors: Tensor) -> None:
    if anchors.ndim != 2 or anchors.numel() == 0:
        raise ValueError(f"anchors must be a non-empty (anchors, features) matrix, got shape {tuple(anchors.shape)}")


def check_index(index: Tensor, count: int, name: str, what: str) -> None:
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= count):
        raise ValueError(f"{name} must index the {count} {what}, got {int(index.min())}..{int(index.max())}")


def check_similarity(similarity: Similarity) -> list[str | Measure]:
    measures = (
        list(similarity) if isinstance(similarity, Sequence) and not isinstance(similarity, str) else [similarity]
    )
    if not measures:
        raise ValueError("similarity must name at least one measure, got none")
    for measure in measures:
        if not callable(measure) and measure not in SIMILARITIES:
            raise ValueError(f"similarity must be a function or one of {', '.join(SIMILARITIES)}, got {measure!r}")
    return measures  # type: ignore[return-value]


def check_quantization(method: str, bin_size: float) -> None:
    if method not in ("round", "smooth", "cluster"):
        raise ValueError(f"quantisation must be round, smooth or cluster, got {method!r}")
    if not bin_size > 0:
        raise ValueError(f"bin_size must be positive, got {bin_size}")


def class_averages(labels: Tensor, groups: int, anchors: int) -> Tensor:
    """The matrix (anchors, groups * classes) that averages columns; see `average_by_class`."""
    if labels.shape != (anchors,):
        raise ValueError(f"labels must name the class of each of {anchors} anchors, got shape {tuple(labels.shape)}")
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    classes, index, counts = labels.unique(return_inverse=True, return_counts=True)
    if int(counts.min()) < groups:
        raise ValueError(f"groups must be at most the {int(counts.min())} anchors of the rarest class, got {groups}")
    one_hot = F.one_hot(index, len(classes))
    rank = (one_hot.cumsum(0) - 1).gather(1, index[:, None])[:, 0]  # how many of its class came before
    column = (rank % groups) * len(classes) + index
    member = F.one_hot(column, groups * len(classes)).double()
    return member / member.sum(0)


# --- one measure after the other -------------------------------------------------------------------------------------


def _prepared(measure: str | Measure, anchors: Tensor) -> Callable[[Tensor], Tensor]:
    """The function of x that one measure and its anchors make."""
    if callable(measure):
        return lambda x: _checked(measure(x, anchors.to(x.dtype)), x, len(anchors))
    if measure == "cosine":
        norm = torch.linalg.vector_norm(anchors, dim=-1, keepdim=True)
        _warn_of_zeros(norm, "an anchor")
        unit = anchors / norm.clamp_min(NORM_FLOOR)
        return lambda x: _cosine(x, unit.to(x.dtype))
    if measure in ORDERS:
        order = ORDERS[measure]
        spread = torch.linalg.vector_norm(anchors - anchors.mean(0), order, -1).mean().clamp_min(NORM_FLOOR)
        return lambda x: -_distances(x, anchors.to(x.dtype), order) / spread.to(x.dtype)
    if measure == "inner":
        rows = anchors / math.sqrt(anchors.shape[-1])
    else:  # x = s A in the least squares sense: s = x A^+
        rows = torch.linalg.pinv(anchors).mT
    return lambda x: F.linear(x, rows.to(x.dtype))


def _cosine(x: Tensor, unit_anchors: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    _warn_of_zeros(norm, "a sample")
    norm = norm.clamp_min(NORM_FLOOR)
    if not (torch.is_grad_enabled() and (x.requires_grad or unit_anchors.requires_grad)):
        return F.linear(x, unit_anchors).div_(norm)  # scaling the product saves a copy of x
    # With a gradient both ways keep a second matrix for it: the narrower one.
    return F.linear(x / norm, unit_anchors) if x.shape[-1] < len(unit_anchors) else F.linear(x, unit_anchors) / norm


def _distances(x: Tensor, anchors: Tensor, order: float) -> Tensor:
    return torch.cdist(x.reshape(-1, x.shape[-1]), anchors, p=order).reshape(*x.shape[:-1], len(anchors))


def _whitening(anchors: Tensor) -> Tensor:
    """W (features, directions): (a - mean) W has unit covariance in the directions that the anchors span."""
    with torch.no_grad():
        _, spread, directions = torch.linalg.svd(anchors - anchors.mean(0), full_matrices=False)
        floor = spread[0] * max(anchors.shape) * torch.finfo(anchors.dtype).eps
        scale = torch.where(spread > floor, math.sqrt(max(len(anchors) - 1, 1)) / spread.clamp_min(NORM_FLOOR), 0)
        return directions.mT * scale


def _checked(similarities: Tensor, x: Tensor, anchors: int) -> Tensor:
    if similarities.shape != (*x.shape[:-1], anchors):
        raise ValueError(
            f"similarity must return shape {(*x.shape[:-1], anchors)}, returned {tuple(similarities.shape)}"
        )
    return similarities


def _accumulable(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _full_precision(x: Tensor) -> torch.autocast | nullcontext[None]:
    """Similarities of nearly parallel vectors differ in digits that autocast would drop."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _warn_of_zeros(norms: Tensor, what: str) -> None:
    if torch.compiler.is_compiling() or norms.numel() == 0:
        return
    if float(norms.detach().amin()) == 0:
        warnings.warn(f"{what} has a zero latent: its cosine to everything is set to 0", stacklevel=2)


class _StraightThrough(torch.autograd.Function):
    """Rounding forwards, the identity backwards."""

    @staticmethod
    def forward(ctx, values: Tensor, bin_size: float) -> Tensor:
        return bin_size * torch.round(values / bin_size)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _cluster_means(rows: Tensor, diameter: float) -> Tensor:
    if len(rows) < 2:
        return rows
    from sklearn.cluster import AgglomerativeClustering

    clustering = AgglomerativeClustering(n_clusters=None, distance_threshold=diameter, linkage="complete")
    labels = torch.from_numpy(clustering.fit_predict(rows.detach().double().cpu().numpy())).to(rows.device)
    member = F.one_hot(labels).to(rows.dtype)
    return (member @ (member.mT @ rows)) / member.sum(0)[labels, None]

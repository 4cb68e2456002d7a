"""Zero-shot stitching: the encoder of one network under the head of another, without training.

Moschella et al. 2022, arXiv 2209.15430, section 5. `translate` and `from_relative` go beyond it: they take similarities
back to a latent space, after Maiorca et al. 2024 ("Latent space translation via inverse relative projection").
"""

from __future__ import annotations

import warnings
from copy import deepcopy

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from lathe.core.modes import evaluating
from lathe.representations.relative_representations.modules import RelativeEncoder, RelativeRepresentation
from lathe.representations.relative_representations.projection import check_anchors

__all__ = ["StitchedModel", "from_relative", "stitch", "translate"]

ILL_CONDITIONED = 100.0  # similarities in two trained networks agree to about a hundredth; no digit would be left


class StitchedModel(nn.Module):
    """An encoder that speaks relative coordinates, and a head that was trained on those of another encoder."""

    def __init__(self, encoder: RelativeEncoder, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x: Num[Tensor, "batch *input"]):
        return self.head(self.encoder(x))


def stitch(
    encoder_a: nn.Module,
    head_b: nn.Module,
    anchors_a: Num[Tensor, "anchors_a *input_a"],
    anchors_b: Num[Tensor, "anchors_b *input_b"] | None = None,
    *,
    projection: RelativeRepresentation | None = None,
) -> StitchedModel:
    """x -> encoder A -> relative to the anchors by encoder A -> head B (section 5), without any training.

    Args:
        encoder_a: inputs -> latents; of a `RelativeEncoder`, its encoder and projection.
        head_b: trained behind another encoder's relative coordinates.
        anchors_a: inputs of the anchors for encoder A, *in the order of those that B was trained with*.
        anchors_b: those of B, where they are others (parallel anchors); only their number is compared.
        projection: what `head_b` was trained behind, where that is not the plain cosine. Its learnt norm, if any,
            belongs to B.

    Returns:
        A model of its own (copies) in evaluation mode; anchors embedded in training mode would be others.

    Raises:
        ValueError: anchor lists of different length, or a head that does not take as many similarities.
    """
    if anchors_b is not None and len(anchors_a) != len(anchors_b):
        raise ValueError(f"anchors_a and anchors_b must pair up, got {len(anchors_a)} and {len(anchors_b)}")
    if isinstance(encoder_a, RelativeEncoder):
        projection = encoder_a.projection if projection is None else projection
        encoder_a = encoder_a.encoder
    projection = RelativeRepresentation() if projection is None else deepcopy(projection)
    encoder = RelativeEncoder(deepcopy(encoder_a), anchors_a, projection=projection)
    stitched = StitchedModel(encoder, deepcopy(head_b)).eval()
    with torch.no_grad():
        coordinates = projection(encoder.anchor_latents()[:1], encoder.anchor_latents())
    _check_head(stitched.head, coordinates)
    return stitched


def _check_head(head: nn.Module, coordinates: Tensor) -> None:
    width = coordinates.shape[1]
    expected = _input_width(head)
    if expected not in (None, width):
        raise ValueError(f"head_b must take {width} coordinates, but its first layer takes {expected}")
    try:
        with torch.no_grad(), evaluating(head):
            head(coordinates)
    except RuntimeError as error:
        raise ValueError(f"head_b does not take {width} coordinates: {error}") from None


def _input_width(head: nn.Module) -> int | None:
    """What the first layer takes, as far as that can be read off a chain of known layers."""
    if isinstance(head, nn.Sequential):
        return next((width for width in map(_input_width, head) if width is not None), None)
    if isinstance(head, nn.Linear):
        return head.in_features
    if isinstance(head, nn.LayerNorm):
        return head.normalized_shape[-1]
    return head.num_features if isinstance(head, _BatchNorm) else None


# --- and back: from similarities to a latent space --------------------------------------------------------------------


def from_relative(
    similarities: Float[Tensor, "*batch similarities"],
    anchors: Float[Tensor, "anchors features"],
    *,
    similarity: str = "cosine",
    center: bool = False,
    tolerance: float | None = None,
) -> Float[Tensor, "*batch features"]:
    """The latent whose coordinates relative to `anchors` are nearest to `similarities` (least squares).

    Exact where the anchors span the space. A cosine knows no length: latents come back at unit length (then shifted to
    the anchors' mean with `center`).

    Args:
        similarity, center: as the coordinates were made: "cosine", "inner" or "basis".
        tolerance: directions of the anchors with a singular value below this share of the largest are left out; by
            default only what is zero to working precision.

    Warns:
        UserWarning: where the anchors span less than the space, or what is kept of them is ill conditioned, so that
            small errors of the similarities come back large.

    Raises:
        ValueError: another number of similarities than anchors, or a similarity that cannot be taken back.
    """
    if similarity not in ("cosine", "inner", "basis"):
        raise ValueError(f"similarity must be cosine, inner or basis to be taken back, got {similarity!r}")
    check_anchors(anchors)
    if similarities.shape[-1] != len(anchors):
        raise ValueError(f"similarities must be those to the {len(anchors)} anchors, got {similarities.shape[-1]}")
    mean = anchors.mean(0) if center else torch.zeros_like(anchors[0])
    rows = anchors - mean
    if similarity == "basis":
        return similarities @ rows + mean
    if similarity == "inner":
        return F.linear(similarities, _inverse(rows / anchors.shape[1] ** 0.5, tolerance)) + mean
    return F.normalize(F.linear(similarities, _inverse(F.normalize(rows, dim=-1), tolerance)), dim=-1) + mean


def translate(
    anchors_a: Float[Tensor, "anchors_a features_a"],
    anchors_b: Float[Tensor, "anchors_b features_b"],
    *,
    center: bool = True,
    tolerance: float | None = None,
) -> nn.Linear:
    """An affine map from the latent space of A to that of B, by way of the relative space: cosines to A's anchors are
    taken back to B's space by least squares, and lengths are scaled by the ratio of the anchors' mean lengths.

    It needs no head trained on relative coordinates: `nn.Sequential(encoder_a, translate(...), head_b)` moves a frozen
    absolute head. Exact where the spaces differ by a rotation, a scale and (`center`) a shift, and anchors span A's.

    Args:
        anchors_a, anchors_b: latents of the same (or parallel) anchors in either space, pair by pair.
        center: as in `from_relative`.
        tolerance: as in `from_relative`. Between trained networks, whose similarities differ by more than rounding, a
            value near 0.1 brings most of the way back that noise takes, above all with few more anchors than features.

    Warns:
        UserWarning: as `from_relative`.

    Raises:
        ValueError: no anchors, or not the same number.
    """
    check_anchors(anchors_a)
    check_anchors(anchors_b)
    if len(anchors_a) != len(anchors_b):
        raise ValueError(f"anchors_a and anchors_b must pair up, got {len(anchors_a)} and {len(anchors_b)}")
    a, b = anchors_a.detach().double(), anchors_b.detach().double()
    mean_a, mean_b = (a.mean(0), b.mean(0)) if center else (torch.zeros_like(a[0]), torch.zeros_like(b[0]))
    length = torch.linalg.vector_norm(b - mean_b, dim=-1).mean() / torch.linalg.vector_norm(a - mean_a, dim=-1).mean()
    unit_a, unit_b = F.normalize(a - mean_a, dim=-1), F.normalize(b - mean_b, dim=-1)
    # |x| r = (x - mean_a) unit_a^T is linear in x, so that the whole way is one linear layer.
    weight = length * _inverse(unit_b, tolerance) @ unit_a
    layer = nn.Linear(a.shape[1], b.shape[1], device=anchors_b.device, dtype=anchors_b.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(mean_b - weight @ mean_a)
    return layer.requires_grad_(False)


def _inverse(rows: Tensor, tolerance: float | None) -> Tensor:
    """The pseudo-inverse (features, anchors), with a warning where it amplifies noise."""
    left, spread, right = torch.linalg.svd(rows, full_matrices=False)
    floor = max(rows.shape) * torch.finfo(rows.dtype).eps if tolerance is None else tolerance
    kept = spread > floor * spread[0]
    rank = int(kept.sum())
    if rank < rows.shape[1]:
        warnings.warn(
            f"the anchors span {rank} of {rows.shape[1]} directions; the others cannot be recovered", stacklevel=3
        )
    if rank and float(spread[0] / spread[rank - 1]) > ILL_CONDITIONED:
        warnings.warn(
            f"the anchors have condition number {float(spread[0] / spread[rank - 1]):.1e}: errors of the similarities "
            "come back that much larger; take more or better spread anchors, or set tolerance",
            stacklevel=3,
        )
    inverse = torch.where(kept, 1 / spread, 0)
    return (right.mT * inverse) @ left.mT

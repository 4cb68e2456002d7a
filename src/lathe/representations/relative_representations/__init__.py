"""Relative representations: store an embedding as its similarities to a few anchors, and networks trained apart agree.

Two networks trained on the same data differ, in their latent spaces, by little more than a rotation and a scale. Told
by similarities to the same anchor samples, their embeddings agree: an encoder of one training plugs into the head of
another without any training ("zero-shot stitching"), spaces can be compared, and drift can be seen without labels.

Moschella, Maiorca, Fumero, Norelli, Locatello, Rodola, "Relative representations enable zero-shot latent space
communication", ICLR 2023, arXiv 2209.15430: section 3 (`relative`, `RelativeRepresentation`, `RelativeEncoder`,
`select_anchors`), 4.1 (`retrieval_scores`), 4.2 (`latent_similarity`), 5 (`stitch`), and the appendix on quantised
similarities (`quantize`). Beyond the paper: `translate`, `bootstrap_anchors`, `anchor_quality`, `compare`.
"""

from lathe.representations.relative_representations.anchors import (
    AnchorPairs,
    AnchorQuality,
    anchor_quality,
    bootstrap_anchors,
    gaussian_anchors,
    parallel_anchors,
    resample_anchors,
    select_anchors,
)
from lathe.representations.relative_representations.comparison import (
    Comparison,
    compare,
    latent_similarity,
    linear_cka,
    retrieval_scores,
)
from lathe.representations.relative_representations.modules import RelativeEncoder, RelativeRepresentation
from lathe.representations.relative_representations.projection import average_by_class, quantize, relative
from lathe.representations.relative_representations.stitching import StitchedModel, from_relative, stitch, translate

__all__ = [
    "AnchorPairs",
    "AnchorQuality",
    "Comparison",
    "RelativeEncoder",
    "RelativeRepresentation",
    "StitchedModel",
    "anchor_quality",
    "average_by_class",
    "bootstrap_anchors",
    "compare",
    "from_relative",
    "gaussian_anchors",
    "latent_similarity",
    "linear_cka",
    "parallel_anchors",
    "quantize",
    "relative",
    "resample_anchors",
    "retrieval_scores",
    "select_anchors",
    "stitch",
    "translate",
]
